"""Differentially private training steps: the unit is one user of the domain (DP-SGD, arXiv:1607.00133).

Each step samples every user independently with probability q, with one record: a history and its target. The gradient
of a user's loss with respect to the LoRA tensors is clipped to norm C, the clipped gradients are summed, Gaussian noise
of standard deviation σC is added, and the sum is divided by qU, the expected number of users.

The loss of a user must not depend on any other user. So the negatives are the items of the public catalog, and their
vectors are constants: the current model encodes them, which noise protects already, and no gradient flows through them.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedmerge.client.auxiliary.objectives import catalog_loss
from fedmerge.client.auxiliary.prepared import Auxiliary, augmented_histories
from fedmerge.client.local_domain import LocalDomain
from fedmerge.client.training.loop import Attached, Step, StepResult
from fedmerge.client.training.losses import TEMPERATURE, catalog_softmax
from fedmerge.client.training.plain_sgd import item_refresh_is_due
from fedmerge.config import DP, Train
from fedmerge.domain.manifest import DP_BY_USER, check_catalog_is_given
from fedmerge.encoder.backbone import in_float32
from fedmerge.encoder.encode import embed_batch, encode, tokens_at_once, training_groups
from fedmerge.errors import DomainError
from fedmerge.privacy.dp.accountant import agreed_noise, opacus_accountants
from fedmerge.privacy.dp.randomness import Randomness, Source, source
from fedmerge.privacy.dp.releases import NoisyAnswers, Release, user_releases


@dataclass(frozen=True)
class UserPlan:
    """Noise, clipping and sampling of a private training, fixed before its first step.

    Attributes:
        noise_multiplier: σ.
        clip: C.
        sample_rate: q.
        num_users: U, taken as public.
        steps: steps of the whole training.
        randomness: source of sampling and noise.
    """

    noise_multiplier: float
    clip: float
    sample_rate: float
    num_users: int
    steps: int
    randomness: Randomness


@dataclass(frozen=True)
class Records:
    """One record of each sampled user: histories (oldest first), targets, and the users' numbers among the sequences.

    Only an augmentation reads the numbers.
    """

    histories: list[npt.NDArray[np.int32]]
    targets: npt.NDArray[np.int64]
    users: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))


def user_plan(
    domain: LocalDomain, train: Train, dp: DP, answers: NoisyAnswers, sums: tuple[Release, ...], woven: int = 0
) -> UserPlan:
    """Calibrate the noise of all trainings and of the noisy answers about coefficients, beside noisy metric sums.

    Args:
        domain: the client's domain.
        train: batch size and steps.
        dp: (ε, δ) or the noise, the clip norm and the randomness.
        answers: noisy answers that are computed from users.
        sums: noisy metric sums, which have noise of their own and share (ε, δ).
        woven: steps in which the client continues adapters of others, with the same noise.

    Returns:
        The plan of the expert's training.

    Raises:
        DomainError: as :func:`check_user_dp`.
        ConfigError: no noise is enough; or Opacus is not installed.
    """
    check_user_dp(domain, dp)
    num_users = len(domain.training_sequences)
    releases = user_releases(train, answers, num_users, woven)
    rate, steps = releases[0]
    return UserPlan(agreed_noise(dp, releases, sums), dp.clip, rate, num_users, steps, dp.randomness)


def check_user_dp(domain: LocalDomain, dp: DP) -> None:
    """Refuse a domain to whose users differential privacy would give no guarantee.

    Raises:
        DomainError: the catalog is not public or depends on users, or δ is too large for this number of users.
    """
    name, num_users = domain.manifest.name, len(domain.training_sequences)
    if not domain.manifest.public_catalog:
        raise DomainError(
            f"domain {name}: dp.mode = 'user' treats the catalog as public, since its items are every user's "
            "negatives, but the manifest says public_catalog = false. If others may see it, import the domain again "
            "with --public-catalog."
        )
    check_catalog_is_given(domain.manifest, DP_BY_USER)
    if dp.delta is not None and dp.delta >= 1 / num_users:
        raise DomainError(
            f"domain {name}: dp.delta = {dp.delta:g} allows the data of one of its {num_users} training users to be "
            f"published. Set dp.delta well below {1 / num_users:.2g}, one over the number of users."
        )


def private_steps(
    domain: LocalDomain,
    attached: Attached,
    settings: Train,
    plan: UserPlan,
    seed: int,
    *scope: str | int,
    penalty: Callable[[], torch.Tensor] | None = None,
    auxiliary: Auxiliary | None = None,
) -> Step:
    """Return the step function: encode the items when due, draw users, clip, add noise, and move the parameters.

    Steps are computed in float32, whatever ``runtime.precision`` is: the users of a batch decide its padding, and in
    bfloat16 one user could change the rounding of all gradients by more than the clip norm.

    Args:
        domain: the client's domain.
        attached: a trainable LoRA on the domain's backbone.
        settings: samples, schedules.
        plan: noise, clip norm and sampling.
        seed: seed of the experiment, used with seeded randomness only.
        scope: names of the randomness after the seed.
        penalty: a term added to the loss; it must not depend on any user.
        auxiliary: of :func:`fedmerge.client.auxiliary.prepared.prepare` by user: a user's augmented history depends on
            that user alone, and the loss that it adds on no user.
    """
    domain = replace(domain, backbone=in_float32(domain.backbone))
    items: torch.Tensor | None = None

    def step(number: int) -> StepResult:
        nonlocal items
        if items is None or item_refresh_is_due(settings, number):
            items = encode(domain.backbone, domain.item_sequences).to(domain.backbone.device)
        drawn = source(plan.randomness, seed, "client", *scope, "dp", number)
        records = poisson_records(domain.training_sequences, settings.samples, plan.sample_rate, drawn)
        if auxiliary is not None:
            histories = augmented_histories(auxiliary, domain, records.histories, records.users, number)
            records = replace(records, histories=histories)
        with tokens_at_once(settings.tokens_at_once):
            total = clipped_sum(domain, attached.model, attached.parameters, records, items, TEMPERATURE, plan.clip)
        noised = add_noise(total, plan.noise_multiplier * plan.clip, drawn)
        attached.optimizer.zero_grad()
        terms = [] if penalty is None else [penalty()]
        if auxiliary is not None and (of_catalog := catalog_loss(auxiliary, domain, number)) is not None:
            terms.append(of_catalog)
        for term in terms:
            term.backward()  # type: ignore[no-untyped-call]  # PyTorch leaves it untyped
        for parameter, gradient in zip(attached.parameters, noised, strict=True):
            mean = gradient / (plan.sample_rate * plan.num_users)
            parameter.grad = mean if parameter.grad is None else parameter.grad + mean
        attached.optimizer.step()
        return StepResult(None)

    return step


def poisson_records(
    sequences: Sequence[npt.NDArray[np.int32]], samples: str, sample_rate: float, drawn: Source
) -> Records:
    """Sample users independently with the same probability, and one record of each.

    Args:
        sequences: every user's training items, oldest first, two or more.
        samples: ``last`` or ``random-prefix``, see :class:`fedmerge.config.Train`.
        sample_rate: q.
        drawn: randomness; it draws two numbers for every user, sampled or not.
    """
    takes_part = drawn.random(len(sequences)) < sample_rate
    cuts = np.array([len(sequence) - 1 for sequence in sequences])
    prefixes = 1 + (drawn.random(len(sequences)) * cuts).astype(np.int64)
    if samples == "random-prefix":
        cuts = prefixes
    users = np.flatnonzero(takes_part).tolist()
    histories = [sequences[user][: cuts[user]] for user in users]
    targets = np.array([sequences[user][cuts[user]] for user in users], dtype=np.int64)
    return Records(histories, targets, np.array(users, dtype=np.int64))


def clipped_sum(
    domain: LocalDomain,
    model: torch.nn.Module,
    parameters: Sequence[torch.nn.Parameter],
    records: Records,
    items: torch.Tensor,
    temperature: float,
    clip: float,
) -> list[torch.Tensor]:
    """Compute Σ over users of gᵤ · min(1, C / ‖gᵤ‖), with the norm over all parameters together.

    Adding or removing a user changes the sum by at most C. A gradient that is not finite is left out.

    Returns:
        float32, one tensor per parameter.
    """
    total = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
    for gradients in user_gradients(domain, model, parameters, records, items, temperature):
        factors = clip_factors(gradients, clip)
        for number, gradient in enumerate(gradients):
            finite = torch.where(factors.view(-1, *[1] * (gradient.ndim - 1)) > 0, gradient, 0.0)
            total[number] += torch.einsum("b,b...->...", factors, finite)
    return total


def clip_factors(gradients: Sequence[torch.Tensor], clip: float) -> torch.Tensor:
    """Return the factors (b,) that clip the gradients of b users, each a row of every tensor.

    The factor is 0 where the norm is not finite.
    """
    norms = torch.stack([gradient.flatten(1).double().norm(dim=1) for gradient in gradients]).norm(dim=0)
    factors = torch.clamp(clip / norms.clamp(min=1e-30), max=1.0)
    # Leave room for rounding to float32, which could lift a clipped gradient above C.
    return torch.where(norms.isfinite(), factors * (1 - 1e-6), 0.0).float()


def user_gradients(
    domain: LocalDomain,
    model: torch.nn.Module,
    parameters: Sequence[torch.nn.Parameter],
    records: Records,
    items: torch.Tensor,
    temperature: float,
) -> Iterator[list[torch.Tensor]]:
    """Yield the gradients of single users, for b users of similar length at a time.

    Yields:
        float32, one tensor (b, …) per parameter.

    Raises:
        ConfigError: Opacus is not installed.
    """
    backbone, packed = domain.backbone, domain.packed(records.histories)
    with _gradients_by_user(model):
        for group in training_groups(packed):
            targets = torch.from_numpy(records.targets[group]).to(backbone.device)
            vectors = embed_batch(backbone, [packed[index] for index in group], varlen=False)  # a row is a user
            losses = catalog_softmax(vectors, items, targets, temperature)
            losses.sum().backward()  # type: ignore[no-untyped-call]  # PyTorch leaves it untyped
            yield [_take_gradients(parameter, len(group)) for parameter in parameters]


def add_noise(total: Sequence[torch.Tensor], deviation: float, drawn: Source) -> list[torch.Tensor]:
    """Add Gaussian noise of this standard deviation to every coordinate; draw nothing if it is 0."""
    if deviation == 0:
        return list(total)
    noise = [drawn.standard_normal(tensor.numel()).reshape(tuple(tensor.shape)) for tensor in total]
    return [
        tensor + torch.from_numpy(deviation * values).to(tensor) for tensor, values in zip(total, noise, strict=True)
    ]


def plan_record(plan: UserPlan) -> Mapping[str, Any]:
    """Return the record of the privacy loss for the training report; the server's accountant adds these up."""
    return {
        "unit": "user",
        "noise_multiplier": plan.noise_multiplier,
        "clip": plan.clip,
        "sample_rate": plan.sample_rate,
        "num_units": plan.num_users,
        "steps": plan.steps,
        "randomness": plan.randomness,
    }


@contextmanager
def _gradients_by_user(model: torch.nn.Module) -> Iterator[None]:
    """Hook Opacus to the trained layers, which are in training mode meanwhile: Opacus ignores all others."""
    opacus_accountants()
    from opacus.grad_sample import GradSampleHooks  # noqa: PLC0415 - only for those who use differential privacy

    trained = [module for module in model.modules() if any(p.requires_grad for p in module.parameters(recurse=False))]
    modes = [module.training for module in trained]
    for module in trained:
        module.train()
    with warnings.catch_warnings():  # of PyTorch: the inputs of the first layer have no gradient, and need none
        warnings.simplefilter("ignore")
        hooks = GradSampleHooks(model, loss_reduction="sum")
        try:
            yield
        finally:
            hooks.cleanup()
            for module, mode in zip(trained, modes, strict=True):
                module.train(mode)


def _take_gradients(parameter: Any, num_users: int) -> torch.Tensor:
    """Return the gradients of single users, (b, …), and clear them."""
    gradient: torch.Tensor = parameter.grad_sample.float()
    if len(gradient) != num_users:
        raise RuntimeError(f"Opacus made {len(gradient)} gradients of {num_users} users, expected one of each")
    parameter.grad_sample = parameter.grad = None
    return gradient
