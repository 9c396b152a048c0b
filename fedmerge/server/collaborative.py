"""MergeRec and AdaMerging: merging coefficients learned from pseudo-users; no interaction is read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from fedmerge import seeding
from fedmerge.config import PAPER_STEPS
from fedmerge.encoder.backbone import Backbone
from fedmerge.encoder.encode import embed_batch, encode
from fedmerge.encoder.lora import applied
from fedmerge.errors import ConfigError, LayoutMismatchError
from fedmerge.merging.learned import LearnedCoefficients, Progress, optimise, start_coefficients
from fedmerge.merging.methods import METHODS, check_parameter
from fedmerge.merging.stack import Stack
from fedmerge.merging.vectors import (
    TASK_VECTORS,
    Vectors,
    merge_vectors,
    merged_forward,
    on_device,
)
from fedmerge.server.pseudo_users import PseudoDomain

HELD_OUT = 64  # pseudo-users a domain that validation looks at, at most a fifth of them


@dataclass(frozen=True, slots=True)
class CollaborativeSettings:
    """How the coefficients are learned; bounds stand in ``METHODS["mergerec"]``.

    Attributes:
        granularity: "domain": one coefficient per domain; "layer": one per domain and group of the stack.
        initialisation: what the coefficients multiply, a key of INITIALISATIONS.
        initial_coefficient: where every coefficient starts; None: 1/√K for the task vectors of K domains (the sum of K
            orthogonal updates of one norm then has that norm), 1 for rows (the method's own merge).
        loss: a key of LOSSES.
        rec_weight: factor on the term of the loss that is not distillation.
        rec_temperature: the logits of "rec", "entropy" and "self" are divided by it.
        kd_weight: factor on L_kd.
        temperature: T of L_kd.
        kd_top_k: L_kd compares the expert's first so many items only; None: all (paper).
        learning_rate: of Adam, constant.
        steps: optimisation steps.
        batch_size: pseudo-users a step, of all domains together.
        pseudo_users: a kind of ``fedmerge.server.pseudo_users``.
        num_pseudo_users: how many a domain; None: as many as it has items.
        refresh_every: steps after which the student's item vectors are encoded again; None: never (paper).
        balance_domains: every domain is drawn equally often; False: in proportion to its pseudo-users (paper).
        select_every: the step is chosen on held-out pseudo-users, looked at so often; None: the last step (paper).
        prior_weight: of the mean squared distance from the start; 0: none (paper).
        clamp: coefficients are kept in [0, 1] (AdaMerging).
        seed: of all draws.

    Raises:
        ConfigError: a value out of its bounds.
    """

    granularity: Literal["domain", "layer"] = "layer"
    initialisation: Literal["task-vectors", "ties", "pcb", "localize-and-stitch"] = "task-vectors"
    initial_coefficient: float | None = None
    loss: str = "kd"
    rec_weight: float = 1.0
    rec_temperature: float = 1.0
    kd_weight: float = 1000.0
    temperature: float = 0.05
    kd_top_k: int | None = 50
    learning_rate: float = 5e-3
    steps: int = 100
    batch_size: int = 16
    pseudo_users: str = "one-item"
    num_pseudo_users: int | None = None
    refresh_every: int | None = None
    balance_domains: bool = True
    select_every: int | None = None
    prior_weight: float = 0.0
    clamp: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name in METHODS["mergerec"].parameters:
                parameter = METHODS["mergerec"].parameters[field.name]
                check_parameter(f"mergerec: {field.name}", parameter, getattr(self, field.name))

    @property
    def start(self) -> float | None:
        """The initial coefficient; None: 1/√K, see :func:`fedmerge.merging.learned.start_coefficients`."""
        rows = None if self.initialisation == TASK_VECTORS else 1.0
        return rows if self.initial_coefficient is None else self.initial_coefficient


PAPER = CollaborativeSettings(  # arXiv:2601.01753, written out so that no default can change it
    granularity="domain",
    initialisation="task-vectors",
    initial_coefficient=0.2,  # 1 for rows
    loss="rec+kd",
    rec_weight=1.0,
    rec_temperature=1.0,
    kd_weight=1000.0,
    temperature=0.05,
    kd_top_k=None,
    learning_rate=1e-3,
    steps=PAPER_STEPS,
    batch_size=16,
    pseudo_users="one-item",
    num_pseudo_users=None,
    refresh_every=None,
    balance_domains=False,
    select_every=None,
    prior_weight=0.0,
    clamp=False,
)

ADAMERGING = replace(  # arXiv:2310.02575, with pseudo-users in place of unlabelled test data
    PAPER, initial_coefficient=0.3, loss="entropy", learning_rate=1e-3, steps=500, clamp=True
)


# ---- losses: of student logits z (n, N), teacher logits S (n, N); one value a pseudo-user, (n,)


def first_choice(z: torch.Tensor, S: torch.Tensor, settings: CollaborativeSettings) -> torch.Tensor:
    """L_rec = CE(z / τ, argmax S), τ = rec_temperature: the expert's first choice as a hard label."""
    return F.cross_entropy(z / settings.rec_temperature, S.argmax(dim=1), reduction="none")


def distillation(z: torch.Tensor, S: torch.Tensor, settings: CollaborativeSettings) -> torch.Tensor:
    """L_kd = T² · KL(softmax(S/T) ‖ softmax(z/T)); with kd_top_k over the expert's first k items, renormalised."""
    temperature, top = settings.temperature, settings.kd_top_k
    if top is not None and top < S.shape[1]:
        S, chosen = S.topk(top, dim=1)
        z = z.gather(1, chosen)
    student, teacher = F.log_softmax(z / temperature, dim=1), F.log_softmax(S / temperature, dim=1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=1) * temperature**2


def squared_error(z: torch.Tensor, S: torch.Tensor, settings: CollaborativeSettings) -> torch.Tensor:
    """The mean over the items of (z - S)²."""
    return (z - S).square().mean(dim=1)


def entropy(z: torch.Tensor, S: torch.Tensor, settings: CollaborativeSettings) -> torch.Tensor:
    """The entropy of softmax(z / τ): no teacher (AdaMerging)."""
    logs = F.log_softmax(z / settings.rec_temperature, dim=1)
    return -(logs.exp() * logs).sum(dim=1)


def own_choice(z: torch.Tensor, S: torch.Tensor, settings: CollaborativeSettings) -> torch.Tensor:
    """CE(z / τ, argmax z): the merged model's own first choice as a hard label."""
    return F.cross_entropy(z / settings.rec_temperature, z.argmax(dim=1), reduction="none")


Term = Callable[[torch.Tensor, torch.Tensor, CollaborativeSettings], torch.Tensor]

TERMS: dict[str, Term] = {
    "rec": first_choice,
    "kd": distillation,
    "mse": squared_error,
    "entropy": entropy,
    "self": own_choice,
}

LOSSES: dict[str, tuple[str, ...]] = {  # all of arXiv:2601.01753 and its code; "kd" has kd_weight, others rec_weight
    "rec+kd": ("rec", "kd"),
    "rec": ("rec",),
    "kd": ("kd",),
    "mse": ("mse",),
    "entropy": ("entropy",),
    "entropy+kd": ("entropy", "kd"),
    "self": ("self",),
    "self+kd": ("self", "kd"),
}


def weighted_total(terms: Mapping[str, torch.Tensor], settings: CollaborativeSettings) -> torch.Tensor:
    """The loss: kd_weight · L_kd + rec_weight · the other term."""
    weights = {name: settings.kd_weight if name == "kd" else settings.rec_weight for name in terms}
    return torch.stack([term * weights[name] for name, term in terms.items()]).sum()


def batch_terms(
    users: torch.Tensor,
    teacher_users: torch.Tensor,
    drawn_domains: np.ndarray,
    teachers: list[torch.Tensor],
    students: list[torch.Tensor],
    settings: CollaborativeSettings,
) -> dict[str, torch.Tensor]:
    """The terms of the loss over a batch that mixes domains; each pseudo-user is scored on its own catalog only.

    Args:
        users: (n, d) vectors of the pseudo-users under the merged model, differentiable.
        teacher_users: (n, d), the same under their own experts.
        drawn_domains: (n,) the domain of each.
        teachers: per domain E_k, (N_k, d).
        students: per domain Ê_k, (N_k, d).
        settings: loss, weights and temperatures are read.

    Returns:
        term of the loss -> mean over the batch, a scalar. Teacher logits exist for the batch only: n × N_k, never
        N_k × N_k.
    """
    sums = {name: users.new_zeros(()) for name in LOSSES[settings.loss]}
    for domain in np.unique(drawn_domains):
        rows = torch.as_tensor(np.flatnonzero(drawn_domains == domain), device=users.device)
        z = users[rows] @ students[domain].T  # (n_k, N_k)
        S = teacher_users[rows] @ teachers[domain].T  # (n_k, N_k)
        sums = {name: value + TERMS[name](z, S, settings).sum() for name, value in sums.items()}
    return {name: value / len(users) for name, value in sums.items()}


# ---- the optimisation


def draw_pseudo_users(sizes: tuple[int, ...], settings: CollaborativeSettings) -> tuple[np.ndarray, np.ndarray]:
    """Which pseudo-users each step takes: epochs of a permutation, so that none comes again before all have come.

    Args:
        sizes: number of pseudo-users of each domain.
        settings: steps, batch_size, balance_domains and seed are read.

    Returns:
        domain and pseudo-user of each draw, two int64 arrays (steps, batch_size). Balanced: domains alternate in a
        random order and each walks through its own permutations; else one permutation of all of them together.
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
    backbone: Backbone, vectors: Vectors, domains: Mapping[str, PseudoDomain], coefficients: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Every domain's item vectors under the merge: Ê_k, (N_k, d) float32 on the CPU, by domain.

    Args:
        backbone: the frozen encoder; left as it was.
        vectors: of the K experts.
        domains: name -> pseudo-users, for exactly the vectors' domains.
        coefficients: (K,) or (K, G).

    Raises:
        LayoutMismatchError: vectors, pseudo-users and backbone do not belong together.
    """
    _check_domains(vectors, domains)
    with applied(backbone, merge_vectors(vectors, coefficients)):
        return {name: encode(backbone, domains[name].items) for name in vectors.domains}


def learn_coefficients(
    backbone: Backbone,
    vectors: Vectors,
    domains: Mapping[str, PseudoDomain],
    settings: CollaborativeSettings = PAPER,
    progress: Progress | None = None,
    students: Mapping[str, torch.Tensor] | None = None,
    start: torch.Tensor | None = None,
) -> LearnedCoefficients:
    """Learn merging coefficients on the server from pseudo-users.

    The loss of θ(w) = θ₀ + Σ_k w_k v_k is minimised by Adam over w alone; the items' vectors Ê are held fixed between
    two refreshes, and no gradient goes through them. Published: L = L_rec + 1000 · L_kd, w neither clamped nor
    normalised, Ê never refreshed. For a one-item pseudo-user the teacher's first choice is the item itself.

    Args:
        backbone: the frozen encoder; left as it was.
        vectors: of the K experts, :func:`fedmerge.merging.vectors.initial_vectors` of ``settings.initialisation``.
        domains: name -> pseudo-users, for exactly the vectors' domains; the order does not matter.
        settings: see there.
        progress: called after every step.
        students: :func:`student_vectors` at the start, which variants can share; None: encoded here.
        start: coefficients to start from, (K,) or (K, G), in place of ``settings.start`` for all.

    Returns:
        coefficients, history and start.

    Raises:
        ConfigError: vectors of another initialisation than the settings say; too few pseudo-users to hold some out.
        LayoutMismatchError: vectors, pseudo-users and backbone do not belong together.
        MergeError: a loss or a coefficient that is not finite, with its step.

    Source: arXiv:2601.01753 (MergeRec); AdaMerging (arXiv:2310.02575) with the settings ADAMERGING.
    Differs: low-rank or sparse student and teacher logits per batch, instead of K + 1 dense models and an N × N matrix
        per domain; the result is the same. refresh_every, balance_domains, select_every, prior_weight, kd_top_k and
        rec_temperature are not in the paper.
    """
    _check_domains(vectors, domains)
    if isinstance(vectors, Stack) != (settings.initialisation == TASK_VECTORS):
        raise ConfigError(
            f"learn_coefficients: found {type(vectors).__name__}, but settings.initialisation is "
            f"{settings.initialisation!r}; make the vectors with initial_vectors(stack, settings.initialisation)"
        )
    device = backbone.compute.device
    vectors = on_device(vectors, device)
    pseudo = [domains[name] for name in vectors.domains]
    teachers = [domain.teacher_items.to(device, torch.float32) for domain in pseudo]
    orders = [
        seeding.generator(settings.seed, "mergerec", "held out", name).permutation(len(domains[name].users))
        if settings.select_every
        else np.arange(len(domains[name].users))
        for name in vectors.domains
    ]
    held_out = [min(HELD_OUT, len(order) // 5) if settings.select_every else 0 for order in orders]
    if settings.select_every and not any(held_out):
        raise ConfigError(
            f"mergerec: select_every: found at most {max(map(len, orders))} pseudo-users a domain, expected 5 or more "
            "in one, so that a fifth can be held out; set it to None, or make more pseudo-users"
        )
    drawn_domains, drawn_users = draw_pseudo_users(
        tuple(len(order) - held for order, held in zip(orders, held_out, strict=True)), settings
    )
    initial = start_coefficients(vectors, settings.granularity, settings.start if start is None else start).to(device)
    if students is None:
        students = student_vectors(backbone, vectors, domains, initial)
    student_items = [students[name].to(device) for name in vectors.domains]

    def terms_of(pairs: list[tuple[int, int]], coefficients: torch.Tensor) -> dict[str, torch.Tensor]:
        with merged_forward(backbone, vectors, coefficients):
            users = embed_batch(backbone, [pseudo[domain].users[user] for domain, user in pairs])  # (n, d)
        teacher_users = torch.stack([pseudo[domain].teacher_users[user] for domain, user in pairs]).to(users)  # (n, d)
        drawn = np.array([domain for domain, _ in pairs])
        return batch_terms(users, teacher_users, drawn, teachers, student_items, settings)

    def gradient(step: int, coefficients: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        nonlocal student_items
        if step and settings.refresh_every and step % settings.refresh_every == 0:
            fresh = student_vectors(backbone, vectors, domains, coefficients)
            student_items = [fresh[name].to(device) for name in vectors.domains]
        pairs = [
            (int(domain), int(orders[domain][user + held_out[domain]]))
            for domain, user in zip(drawn_domains[step], drawn_users[step], strict=True)
        ]
        terms = terms_of(pairs, coefficients)
        loss = weighted_total(terms, settings)
        (found,) = torch.autograd.grad(loss, [coefficients])
        return found, {"total": float(loss.detach()), **{name: float(term.detach()) for name, term in terms.items()}}

    @torch.no_grad()
    def validate(coefficients: torch.Tensor) -> float:
        """The loss on the pseudo-users held out, every domain counting the same."""
        losses = []
        for domain, (order, held) in enumerate(zip(orders, held_out, strict=True)):
            if held:
                pairs = [(domain, int(user)) for user in order[:held]]
                losses.append(float(weighted_total(terms_of(pairs, coefficients), settings)))
        return float(np.mean(losses))

    return optimise(
        "adamerging" if settings.clamp else "mergerec",
        initial,
        gradient,
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        clamp=settings.clamp,
        prior_weight=settings.prior_weight,
        validate=validate if settings.select_every else None,
        validate_every=settings.select_every,
        progress=progress,
    )


def _check_domains(vectors: Vectors, domains: Mapping[str, PseudoDomain]) -> None:
    if set(domains) != set(vectors.domains):
        raise LayoutMismatchError(
            f"learn_coefficients: found pseudo-users of {', '.join(sorted(domains)) or 'no domain'}, "
            f"expected those of {', '.join(vectors.domains)}; build them for exactly the domains that are merged"
        )


def _epochs(size: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """The first ``count`` entries of one permutation of range(size) after the other."""
    return np.concatenate([rng.permutation(size) for _ in range(-(-count // size))] or [np.empty(0, np.int64)])[:count]
