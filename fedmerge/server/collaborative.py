"""MergeRec: merging coefficients learned from pseudo-users, so that the merge ranks as each domain's expert does."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.hooks import RemovableHandle

from fedmerge import seeding
from fedmerge.encoder.backbone import Backbone
from fedmerge.encoder.encode import embed_batch, encode
from fedmerge.encoder.lora import applied
from fedmerge.errors import LayoutMismatchError, MergeError
from fedmerge.merging.methods import METHODS, check_parameter
from fedmerge.merging.stack import Stack, StackedModule, expand_coefficients, linear_merge
from fedmerge.server.pseudo_users import PseudoDomain

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CollaborativeSettings:
    """How the coefficients are learned; the defaults are the published ones, bounds stand in ``METHODS["mergerec"]``.

    Attributes:
        granularity: "domain": one coefficient per domain; "layer": one per domain and group of the stack.
        initial_coefficient: where every coefficient starts.
        learning_rate: of Adam, constant.
        steps: optimisation steps.
        batch_size: pseudo-users a step, of all domains together.
        temperature: T of the distillation loss.
        rec_weight: factor on L_rec.
        kd_weight: factor on L_kd.
        refresh_every: steps after which the student's item vectors are encoded again; None: never (paper).
        balance_domains: every domain is drawn equally often; False: in proportion to its catalog (paper).
        seed: of the draws.

    Raises:
        ConfigError: a value out of its bounds.
    """

    granularity: Literal["domain", "layer"] = "domain"
    initial_coefficient: float = 0.2
    learning_rate: float = 1e-3
    steps: int = 500
    batch_size: int = 16
    temperature: float = 0.05
    rec_weight: float = 1.0
    kd_weight: float = 1000.0
    refresh_every: int | None = None
    balance_domains: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name != "seed":
                parameter = METHODS["mergerec"].parameters[field.name]
                check_parameter(f"mergerec: {field.name}", parameter, getattr(self, field.name))


PAPER = CollaborativeSettings()


class Losses(NamedTuple):
    """Loss of one step and its two parts, means over the batch, before their weights."""

    total: float
    rec: float
    kd: float


@dataclass(frozen=True, slots=True)
class LearnedCoefficients:
    """What the server learned.

    Attributes:
        coefficients: (K,) or (K, G) float32, on the CPU, domains in the order of the stack.
        history: the losses of every step, before its update.
        initial_coefficients: the same shape, where the optimisation started.
    """

    coefficients: torch.Tensor
    history: tuple[Losses, ...]
    initial_coefficients: torch.Tensor


@contextmanager
def merged_forward(backbone: Backbone, stack: Stack, coefficients: torch.Tensor) -> Iterator[None]:
    """Inside the context the backbone computes with θ₀ + Σ_k w_k Δ_k, differentiable in the coefficients.

    Every target module's output gets ((x Aᵀ) · w[owner]) Bᵀ added: the cost is that of one LoRA of rank R = Σ r_k, and
    no out × in matrix is formed. The coefficients are read at every forward, so that a step of an optimiser counts at
    once.

    Args:
        backbone: its weights are not touched; the hooks are removed on leaving, also after an error.
        stack: K adapters.
        coefficients: (K,) or (K, G) float32 on the backbone's device.

    Raises:
        LayoutMismatchError: the backbone lacks a module, or has it in another shape; coefficients of another shape.
        MergeError: a coefficient that is not finite.
    """
    expand_coefficients(stack, coefficients)
    layers = _target_layers(backbone, stack)
    handles: list[RemovableHandle] = []
    try:
        for name, layer in layers.items():
            group = stack.group_of[name] if coefficients.ndim == 2 else None
            handles.append(layer.register_forward_hook(_low_rank_hook(stack.modules[name], layer, coefficients, group)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def collaborative_losses(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """L_rec and L_kd of pseudo-users of one domain.

    L_rec = CE(z, argmax S) at temperature 1; L_kd = T² · KL(softmax(S/T) ‖ softmax(z/T)).

    Args:
        student_logits: z, (n, N).
        teacher_logits: S, (n, N).
        temperature: T.

    Returns:
        two (n,) tensors, one value a pseudo-user.

    Source: arXiv:2601.01753, collaborative optimisation.
    """
    rec = F.cross_entropy(student_logits, teacher_logits.argmax(dim=1), reduction="none")  # (n,)
    student = F.log_softmax(student_logits / temperature, dim=1)  # (n, N)
    teacher = F.log_softmax(teacher_logits / temperature, dim=1)
    kd = F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=1) * temperature**2  # (n,)
    return rec, kd


def batch_losses(
    users: torch.Tensor,
    drawn_domains: np.ndarray,
    drawn_items: np.ndarray,
    teachers: list[torch.Tensor],
    students: list[torch.Tensor],
    *,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean L_rec and L_kd over a batch that mixes domains; each pseudo-user is scored on its own catalog only.

    Args:
        users: (n, d) vectors of the pseudo-users under the merged model, differentiable.
        drawn_domains: (n,) the domain of each.
        drawn_items: (n,) the item of each in its domain.
        teachers: per domain E_k, (N_k, d).
        students: per domain Ê_k, (N_k, d).
        temperature: T.

    Returns:
        two scalars. Teacher logits exist for the batch only: n × N_k, never N_k × N_k.
    """
    rec_sum, kd_sum = users.new_zeros(()), users.new_zeros(())
    for domain in np.unique(drawn_domains):
        rows = np.flatnonzero(drawn_domains == domain)
        teacher = teachers[domain]
        teacher_logits = teacher[torch.as_tensor(drawn_items[rows], device=teacher.device)] @ teacher.T  # (n_k, N_k)
        student_logits = users[torch.as_tensor(rows, device=users.device)] @ students[domain].T  # (n_k, N_k)
        rec, kd = collaborative_losses(student_logits, teacher_logits, temperature)
        rec_sum, kd_sum = rec_sum + rec.sum(), kd_sum + kd.sum()
    return rec_sum / len(users), kd_sum / len(users)


def draw_pseudo_users(sizes: tuple[int, ...], settings: CollaborativeSettings) -> tuple[np.ndarray, np.ndarray]:
    """Which pseudo-users each step takes: epochs of a permutation, so that none comes again before all have come.

    Args:
        sizes: number of pseudo-users of each domain.
        settings: steps, batch_size, balance_domains and seed are read.

    Returns:
        domain and item of each draw, two int64 arrays (steps, batch_size). Balanced: domains alternate in a random
        order and each walks through its own permutations; else one permutation of all of them together.
    """
    shape = (settings.steps, settings.batch_size)
    count = settings.steps * settings.batch_size
    if not settings.balance_domains:
        pooled = _epochs(sum(sizes), count, seeding.generator(settings.seed, "mergerec"))
        starts = np.cumsum((0, *sizes))
        domains = np.searchsorted(starts, pooled, side="right") - 1
        return domains.reshape(shape), (pooled - starts[domains]).reshape(shape)
    domains = _epochs(len(sizes), count, seeding.generator(settings.seed, "mergerec", "domains"))
    items = np.empty_like(domains)
    for domain, size in enumerate(sizes):
        chosen = domains == domain
        items[chosen] = _epochs(size, int(chosen.sum()), seeding.generator(settings.seed, "mergerec", "items", domain))
    return domains.reshape(shape), items.reshape(shape)


def student_vectors(
    backbone: Backbone, stack: Stack, domains: Mapping[str, PseudoDomain], coefficients: torch.Tensor | np.ndarray
) -> dict[str, torch.Tensor]:
    """Every domain's item vectors under the merge: Ê_k, (N_k, d) float32 on the CPU, by domain.

    Args:
        backbone: the frozen encoder; left as it was.
        stack: the K experts.
        domains: name -> pseudo-users, for exactly the stack's domains.
        coefficients: (K,) or (K, G).

    Raises:
        LayoutMismatchError: stack, pseudo-users and backbone do not belong together.
    """
    _check_domains(stack, domains)
    with applied(backbone, linear_merge(stack, coefficients)):
        return {name: encode(backbone, domains[name].sequences) for name in stack.domains}


def learn_coefficients(
    backbone: Backbone,
    stack: Stack,
    domains: Mapping[str, PseudoDomain],
    settings: CollaborativeSettings = PAPER,
    progress: Callable[[int, int, dict[str, float]], None] | None = None,
    students: Mapping[str, torch.Tensor] | None = None,
) -> LearnedCoefficients:
    """Learn merging coefficients on the server from pseudo-users; no interaction is read.

    L(w) = rec_weight · L_rec + kd_weight · L_kd of θ(w) = θ₀ + Σ_k w_k Δ_k, minimised by Adam over w alone, which is
    neither clamped nor normalised. For a one-item pseudo-user the teacher's argmax is the item itself.

    Args:
        backbone: the frozen encoder; left as it was.
        stack: the K experts.
        domains: name -> pseudo-users, for exactly the stack's domains; the order does not matter.
        settings: see there.
        progress: called after every step with (steps done, steps, {"loss", "rec", "kd"}).
        students: :func:`student_vectors` where every coefficient is the initial one, which variants can share; None:
            encoded here.

    Returns:
        coefficients, history and start.

    Raises:
        LayoutMismatchError: stack, pseudo-users and backbone do not belong together.
        MergeError: a loss or a coefficient that is not finite, with its step.

    Source: arXiv:2601.01753 (MergeRec), task-vector initialisation.
    Differs: low-rank student and teacher logits per batch, instead of K + 1 dense models and an N × N matrix per
        domain; the result is the same. ``refresh_every`` and ``balance_domains`` are not in the paper.
    """
    _check_domains(stack, domains)
    device = backbone.compute.device
    stack = _on_device(stack, device)
    pseudo = [domains[name] for name in stack.domains]
    teachers = [domain.teacher_items.to(device, torch.float32) for domain in pseudo]
    drawn_domains, drawn_items = draw_pseudo_users(tuple(len(domain.sequences) for domain in pseudo), settings)
    shape = (len(stack.domains),) if settings.granularity == "domain" else (len(stack.domains), len(stack.groups))
    coefficients = torch.full(shape, settings.initial_coefficient, device=device, requires_grad=True)
    initial = coefficients.detach().cpu().clone()
    optimizer = torch.optim.Adam([coefficients], lr=settings.learning_rate)
    history: list[Losses] = []
    period = settings.refresh_every or settings.steps
    for start in range(0, settings.steps, period):
        if start or students is None:
            students = student_vectors(backbone, stack, domains, coefficients)
        student_items = [students[name].to(device) for name in stack.domains]
        with merged_forward(backbone, stack, coefficients):
            for step in range(start, min(start + period, settings.steps)):
                sequences = [
                    pseudo[domain].sequences[item]
                    for domain, item in zip(drawn_domains[step], drawn_items[step], strict=True)
                ]
                users = embed_batch(backbone, sequences)  # (n, d)
                rec, kd = batch_losses(
                    users,
                    drawn_domains[step],
                    drawn_items[step],
                    teachers,
                    student_items,
                    temperature=settings.temperature,
                )
                loss = settings.rec_weight * rec + settings.kd_weight * kd
                (coefficients.grad,) = torch.autograd.grad(loss, [coefficients])
                optimizer.step()
                losses = Losses(float(loss.detach()), float(rec.detach()), float(kd.detach()))
                history.append(losses)
                if not np.isfinite(losses).all() or not bool(coefficients.detach().isfinite().all()):
                    raise MergeError(
                        f"mergerec, step {step + 1} of {settings.steps}: found loss {losses.total:g} "
                        f"(rec {losses.rec:g}, kd {losses.kd:g}) and coefficients {coefficients.tolist()}, "
                        "expected finite values; lower the learning rate or check the experts' norms"
                    )
                if progress is not None:
                    progress(step + 1, settings.steps, {"loss": losses.total, "rec": losses.rec, "kd": losses.kd})
    logger.info("mergerec: %d steps, loss %.4f -> %.4f", settings.steps, history[0].total, history[-1].total)
    return LearnedCoefficients(coefficients.detach().cpu().clone(), tuple(history), initial)


def _low_rank_hook(
    factors: StackedModule, layer: torch.nn.Linear, coefficients: torch.Tensor, group: int | None
) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...], torch.Tensor], torch.Tensor]:
    weight = layer.weight
    lora_A, lora_B = factors.lora_A.to(weight), factors.lora_B.to(weight)  # device and dtype of the weight
    owner = factors.owner.to(weight.device)

    def hook(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        per_domain = coefficients if group is None else coefficients[:, group]  # (K,)
        hidden = F.linear(inputs[0], lora_A)  # (..., R)
        # multiplied in float32: bfloat16 would round away the steps of the optimiser
        return output + F.linear((hidden * per_domain[owner]).to(hidden.dtype), lora_B)

    return hook


def _target_layers(backbone: Backbone, stack: Stack) -> dict[str, torch.nn.Linear]:
    found = dict(backbone.model.named_modules())
    layers = {}
    for name, module in stack.modules.items():
        layer, shape = found.get(name), (module.lora_B.shape[0], module.lora_A.shape[1])
        if not isinstance(layer, torch.nn.Linear) or tuple(layer.weight.shape) != shape:
            what = tuple(layer.weight.shape) if isinstance(layer, torch.nn.Linear) else type(layer).__name__
            raise LayoutMismatchError(
                f"backbone {backbone.name!r}, module {name}: found {what}, expected a linear layer of shape {shape}; "
                "merge on the backbone that the adapters were trained on"
            )
        layers[name] = layer
    return layers


def _check_domains(stack: Stack, domains: Mapping[str, PseudoDomain]) -> None:
    if set(domains) != set(stack.domains):
        raise LayoutMismatchError(
            f"learn_coefficients: found pseudo-users of {', '.join(sorted(domains)) or 'no domain'}, "
            f"expected those of {', '.join(stack.domains)}; build them for exactly the domains that are merged"
        )


def _on_device(stack: Stack, device: torch.device) -> Stack:
    modules = {
        name: StackedModule(module.lora_A.to(device), module.lora_B.to(device), module.owner.to(device))
        for name, module in stack.modules.items()
    }
    return replace(stack, modules=modules)


def _epochs(size: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """The first ``count`` entries of one permutation of range(size) after the other."""
    return np.concatenate([rng.permutation(size) for _ in range(-(-count // size))] or [np.empty(0, np.int64)])[:count]
