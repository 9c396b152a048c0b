"""Differentially private training steps: the unit is one user of the domain (DP-SGD, arXiv:1607.00133).

In each step every user takes part with probability q, independently, with one record: a history and its target. The
gradient of a user's loss in the LoRA tensors is clipped to norm C, the clipped gradients are added up, Gaussian noise
of standard deviation σC is added to the sum, and the sum is divided by qU, the expected number of users.

A user's loss must depend on no other user. So the negatives are the items of the public catalog, and the items' vectors
are constants: they are encoded by the model as it is, which noise has protected, and no gradient goes through them.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedmerge.client.local_domain import LocalDomain
from fedmerge.client.training.batches import item_refresh_is_due
from fedmerge.client.training.loop import Attached, Step, StepResult
from fedmerge.client.training.losses import TEMPERATURE, catalog_softmax
from fedmerge.config import DP, ExperimentConfig, Train
from fedmerge.encoder.backbone import in_float32
from fedmerge.encoder.encode import TRAINING_GROUPS, embed_batch, encode
from fedmerge.encoder.text import Tokens, pack_sequences
from fedmerge.errors import DomainError
from fedmerge.privacy.dp.accountant import agreed_noise, opacus_accountants
from fedmerge.privacy.dp.randomness import Randomness, Source, source
from fedmerge.privacy.dp.releases import metric_releases, user_releases


@dataclass(frozen=True)
class UserPlan:
    """What a private training does, fixed before its first step.

    Attributes:
        noise_multiplier: σ.
        clip: C.
        sample_rate: q.
        num_users: U, taken as public.
        steps: of the whole training.
        randomness: where sampling and noise come from.
    """

    noise_multiplier: float
    clip: float
    sample_rate: float
    num_users: int
    steps: int
    randomness: Randomness


@dataclass(frozen=True)
class Records:
    """One record of each user who takes part in a step: histories (oldest first) and targets."""

    histories: list[npt.NDArray[np.int32]]
    targets: npt.NDArray[np.int64]


def user_plan(domain: LocalDomain, config: ExperimentConfig) -> UserPlan:
    """Choose the noise for a training, and for answers about coefficients where they are computed from users, too.

    Raises:
        DomainError: as :func:`check_user_dp`.
        ConfigError: no noise is enough; or Opacus is not installed.
    """
    check_user_dp(domain, config.dp)
    num_users, dp = len(domain.training_sequences), config.dp
    releases = user_releases(config, num_users)
    rate, steps = releases[0]
    return UserPlan(agreed_noise(dp, releases, metric_releases(config)), dp.clip, rate, num_users, steps, dp.randomness)


def check_user_dp(domain: LocalDomain, dp: DP) -> None:
    """Refuse a domain for whose users differential privacy would promise nothing.

    Raises:
        DomainError: the catalog is not public, or δ is no guarantee for so many users.
    """
    name, num_users = domain.manifest.name, len(domain.training_sequences)
    if not domain.manifest.public_catalog:
        raise DomainError(
            f"domain {name}: dp.mode = 'user' takes the catalog as public, since it is every user's negatives, but its "
            "manifest says public_catalog = false. Import the domain again as public, if its catalog does not depend "
            "on what single users did; else it cannot be used with differential privacy."
        )
    if dp.delta is not None and dp.delta >= 1 / num_users:
        raise DomainError(
            f"domain {name}: dp.delta = {dp.delta:g} is not below one over its {num_users} training users, so it would "
            f"allow to publish one of them. Set dp.delta well below {1 / num_users:.2g}."
        )


def private_steps(
    domain: LocalDomain,
    attached: Attached,
    settings: Train,
    plan: UserPlan,
    seed: int,
    *scope: str | int,
    penalty: Callable[[], torch.Tensor] | None = None,
) -> Step:
    """Return the step function: encode the items when due, draw users, clip, add noise, and move the parameters.

    In float32, whatever ``runtime.precision`` is: who is in a batch decides how it is padded, and with bfloat16 one
    user could change the rounding of everybody's gradient by more than the clip norm bounds.

    Args:
        domain: the client's own.
        attached: a trainable LoRA on the domain's backbone.
        settings: samples, schedules.
        plan: noise, clip norm and sampling.
        seed: of the experiment; read with seeded randomness only.
        scope: of the randomness.
        penalty: a term added to the loss; it depends on no user.
    """
    domain = replace(domain, backbone=in_float32(domain.backbone))
    items: torch.Tensor | None = None

    def step(number: int) -> StepResult:
        nonlocal items
        if items is None or item_refresh_is_due(settings, number):
            items = encode(domain.backbone, domain.item_sequences).to(domain.backbone.device)
        drawn = source(plan.randomness, seed, "client", *scope, "dp", number)
        records = poisson_records(domain.training_sequences, settings.samples, plan.sample_rate, drawn)
        total = clipped_sum(domain, attached.model, attached.parameters, records, items, TEMPERATURE, plan.clip)
        noised = add_noise(total, plan.noise_multiplier * plan.clip, drawn)
        attached.optimizer.zero_grad()
        if penalty is not None:
            penalty().backward()  # type: ignore[no-untyped-call]  # PyTorch leaves it untyped
        for parameter, gradient in zip(attached.parameters, noised, strict=True):
            mean = gradient / (plan.sample_rate * plan.num_users)
            parameter.grad = mean if parameter.grad is None else parameter.grad + mean
        attached.optimizer.step()
        return StepResult(None)

    return step


def poisson_records(
    sequences: Sequence[npt.NDArray[np.int32]], samples: str, sample_rate: float, drawn: Source
) -> Records:
    """One record of every user who takes part: each with the same probability, and whoever else does.

    Args:
        sequences: every user's training items, oldest first, two or more.
        samples: ``last`` or ``random-prefix``, see :class:`fedmerge.config.Train`.
        sample_rate: q.
        drawn: randomness; two numbers a user are drawn whether they take part or not.
    """
    takes_part = drawn.random(len(sequences)) < sample_rate
    cuts = np.array([len(sequence) - 1 for sequence in sequences])
    prefixes = 1 + (drawn.random(len(sequences)) * cuts).astype(np.int64)
    if samples == "random-prefix":
        cuts = prefixes
    users = np.flatnonzero(takes_part).tolist()
    histories = [sequences[user][: cuts[user]] for user in users]
    return Records(histories, np.array([sequences[user][cuts[user]] for user in users], dtype=np.int64))


def clipped_sum(
    domain: LocalDomain,
    model: torch.nn.Module,
    parameters: Sequence[torch.nn.Parameter],
    records: Records,
    items: torch.Tensor,
    temperature: float,
    clip: float,
) -> list[torch.Tensor]:
    """Σ over users of gᵤ · min(1, C / ‖gᵤ‖), the norm over all parameters together; float32, one tensor a parameter.

    Adding or removing a user changes it by at most C. A user whose gradient is not finite counts for nothing.
    """
    total = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
    for gradients in user_gradients(domain, model, parameters, records, items, temperature):
        factors = clip_factors(gradients, clip)
        for number, gradient in enumerate(gradients):
            kept = torch.where(factors.view(-1, *[1] * (gradient.ndim - 1)) > 0, gradient, 0.0)
            total[number] += torch.einsum("b,b...->...", factors, kept)
    return total


def clip_factors(gradients: Sequence[torch.Tensor], clip: float) -> torch.Tensor:
    """(b,) what b users' gradients, each a row of every tensor, are multiplied by; 0 where the norm is not finite."""
    norms = torch.stack([gradient.flatten(1).double().norm(dim=1) for gradient in gradients]).norm(dim=0)
    factors = torch.clamp(clip / norms.clamp(min=1e-30), max=1.0)
    # Rounding to float32 must not lift a clipped gradient above C.
    return torch.where(norms.isfinite(), factors * (1 - 1e-6), 0.0).float()


def user_gradients(
    domain: LocalDomain,
    model: torch.nn.Module,
    parameters: Sequence[torch.nn.Parameter],
    records: Records,
    items: torch.Tensor,
    temperature: float,
) -> Iterator[list[torch.Tensor]]:
    """Every user's own gradient, some users of similar length at a time: one tensor (b, …) a parameter, float32.

    Raises:
        ConfigError: Opacus is not installed.
    """
    text, backbone = domain.text, domain.backbone
    packed = pack_sequences(domain.table, records.histories, backbone.special, text.max_items, text.max_tokens)
    with _gradients_by_user(model):
        for group in _groups(packed):
            targets = torch.from_numpy(records.targets[group]).to(backbone.device)
            vectors = embed_batch(backbone, [packed[index] for index in group])
            losses = catalog_softmax(vectors, items, targets, temperature)
            losses.sum().backward()  # type: ignore[no-untyped-call]  # PyTorch leaves it untyped
            yield [_taken(parameter) for parameter in parameters]


def add_noise(total: Sequence[torch.Tensor], deviation: float, drawn: Source) -> list[torch.Tensor]:
    """The tensors plus Gaussian noise of this standard deviation in every coordinate; nothing is drawn for 0."""
    if deviation == 0:
        return list(total)
    noise = [drawn.standard_normal(tensor.numel()).reshape(tuple(tensor.shape)) for tensor in total]
    return [
        tensor + torch.from_numpy(deviation * values).to(tensor) for tensor, values in zip(total, noise, strict=True)
    ]


def plan_record(plan: UserPlan) -> Mapping[str, Any]:
    """What was spent, as it is told in the training report; the server's accountant adds it up."""
    return {
        "unit": "user",
        "noise_multiplier": plan.noise_multiplier,
        "clip": plan.clip,
        "sample_rate": plan.sample_rate,
        "num_units": plan.num_users,
        "steps": plan.steps,
        "randomness": plan.randomness,
    }


def _groups(packed: Sequence[Tokens]) -> list[npt.NDArray[np.int64]]:
    order = np.argsort([len(sequence) for sequence in packed], kind="stable")
    return [group for group in np.array_split(order, TRAINING_GROUPS) if len(group)]


@contextmanager
def _gradients_by_user(model: torch.nn.Module) -> Iterator[None]:
    """Opacus' hooks on the layers that are trained. They look at layers in training mode only."""
    opacus_accountants()
    from opacus.grad_sample import GradSampleHooks  # noqa: PLC0415 - only for those who use differential privacy

    trained = [module for module in model.modules() if any(p.requires_grad for p in module.parameters(recurse=False))]
    modes = [module.training for module in trained]
    for module in trained:
        module.train()
    with warnings.catch_warnings():  # the inputs of the first layer need no gradient, and get none
        warnings.simplefilter("ignore")
        hooks = GradSampleHooks(model, loss_reduction="sum")
        try:
            yield
        finally:
            hooks.cleanup()
            for module, mode in zip(trained, modes, strict=True):
                module.train(mode)


def _taken(parameter: Any) -> torch.Tensor:
    gradient: torch.Tensor = parameter.grad_sample.float()
    parameter.grad_sample = parameter.grad = None
    return gradient
