"""Merging coefficients learned on clients' own users: a client returns only a gradient of K or K × G numbers.

With ``through_clients.users = "own-users"`` the answers to ``query.gradient`` carry these gradients. They have no
formal guarantee by themselves; with ``dp.mode = "user"`` they are sums over users, with each user's part clipped.
"""

import logging
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from fedmerge.client.local_domain import LocalDomain
from fedmerge.client.training.dp_sgd import Records, clip_factors
from fedmerge.encoder.encode import embed_batch
from fedmerge.errors import ConfigError, DomainError
from fedmerge.mergerec.vectors import Vectors, merged_forward
from fedmerge.seeding import generator

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ClientMergeSettings:
    """Settings of learning coefficients on users.

    Attributes:
        batch_size: users per client and step.
        temperature: divisor of the cosines.
        negatives: items drawn from the public catalog in each step, as negatives of all users.
        seed: seed of all draws.

    Raises:
        ConfigError: a value out of bounds.
    """

    batch_size: int = 16
    temperature: float = 0.05
    negatives: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "negatives"):
            if getattr(self, name) < 1:
                raise ConfigError(f"client merge: {name}: found {getattr(self, name)}, expected at least 1")
        if not self.temperature > 0:
            raise ConfigError(f"client merge: temperature: found {self.temperature}, expected more than 0")


def draw_batch(
    domain: LocalDomain, step: int, settings: ClientMergeSettings
) -> tuple[list[npt.NDArray[np.int32]], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Draw the users of a step, a random prefix of each, and negatives from the catalog.

    Args:
        domain: the client's domain.
        step: the draws depend on it, on the seed and on the domain's name.
        settings: batch_size, negatives and seed are read.

    Returns:
        b histories (oldest first), b targets, and the items drawn from the catalog.

    Raises:
        DomainError: no user to learn from.
    """
    name, sequences = domain.manifest.name, domain.training_sequences
    if not sequences:
        raise DomainError(
            f"domain {name}: no user has two items or more outside validation and test. Remove the domain from the "
            "training domains."
        )
    rng = generator(settings.seed, "client merge", name, step)
    drawn = [sequences[user] for user in rng.permutation(len(sequences))[: settings.batch_size]]
    cuts = [int(rng.integers(1, len(sequence))) for sequence in drawn]
    negatives = rng.permutation(len(domain.catalog))[: settings.negatives].astype(np.int64)
    targets = np.array([sequence[cut] for sequence, cut in zip(drawn, cuts, strict=True)], dtype=np.int64)
    return [sequence[:cut] for sequence, cut in zip(drawn, cuts, strict=True)], targets, negatives


def coefficient_gradient(
    domain: LocalDomain, vectors: Vectors, coefficients: torch.Tensor, step: int, settings: ClientMergeSettings
) -> tuple[torch.Tensor, float]:
    """Compute the gradient of one batch of a client's own users.

    L(w) = mean_u −log softmax(cos(f_w(history of u), Ê)/τ)[target of u], over the user's target and the negatives drawn
    from the catalog. Ê are the item vectors under the same merge; no gradient flows through them. So a user's part of
    the gradient depends on that user and on public items alone, as clipping by user requires. Histories and targets
    are random prefixes of the training sequences; validation and test items are never read.

    Args:
        domain: the client's domain.
        vectors: vectors of all K experts, as every client receives them.
        coefficients: (K,) or (K, G) float32 on the backbone's device.
        step: see :func:`draw_batch`.
        settings: see there.

    Returns:
        The gradient of the mean loss with respect to the coefficients, (K,) or (K, G) float32; and that loss, for the
        curves of a study.

    Raises:
        DomainError: no user to learn from.
    """
    backbone = domain.backbone
    histories, targets, negatives = draw_batch(domain, step, settings)
    items, rows = np.unique(np.concatenate([targets, negatives]), return_inverse=True)
    target_rows = torch.from_numpy(rows[: len(targets)]).to(backbone.device)  # (b,)
    leaf = coefficients.detach().clone().requires_grad_()
    with merged_forward(backbone, vectors, leaf):
        with torch.no_grad():
            item_vectors = embed_batch(backbone, [domain.item_sequences[item] for item in items])  # (m, d)
        user_vectors = embed_batch(backbone, domain.packed(histories))  # (b, d)
    allowed = torch.from_numpy(np.isin(items, negatives)).to(backbone.device).repeat(len(targets), 1)  # (b, m)
    allowed[torch.arange(len(targets)), target_rows] = True
    logits = (user_vectors @ item_vectors.T / settings.temperature).masked_fill(~allowed, -torch.inf)
    loss = torch.nn.functional.cross_entropy(logits, target_rows)
    (gradient,) = torch.autograd.grad(loss, [leaf])
    return gradient, float(loss.detach())


def draw_negatives(domain: LocalDomain, step: int, settings: ClientMergeSettings) -> npt.NDArray[np.int64]:
    """Draw the negatives of a step, (m,), from the public catalog; they do not depend on the sampled users."""
    rng = generator(settings.seed, "client merge", domain.manifest.name, "negatives", step)
    return rng.permutation(len(domain.catalog))[: settings.negatives].astype(np.int64)


def clipped_gradient_sum(
    domain: LocalDomain,
    vectors: Vectors,
    coefficients: torch.Tensor,
    records: Records,
    step: int,
    settings: ClientMergeSettings,
    clip: float,
) -> torch.Tensor:
    """Compute Σ over users of gᵤ · min(1, C / ‖gᵤ‖), where gᵤ is the gradient of user u's loss in the coefficients.

    The loss is that of :func:`coefficient_gradient`. A user's part depends on that user and on public items alone, so
    adding or removing a user changes the sum by at most C. A gradient that is not finite, or that cannot be computed,
    is left out.

    Args:
        domain: the client's domain; its catalog is public.
        vectors: as for :func:`coefficient_gradient`.
        coefficients: (K,) or (K, G) float32 on the backbone's device.
        records: one record of each sampled user.
        step: see :func:`draw_negatives`.
        settings: negatives, temperature and seed are read.
        clip: C.

    Returns:
        (K,) or (K, G) float32; zeros without users.
    """
    backbone = domain.backbone
    negatives = draw_negatives(domain, step, settings)
    total = torch.zeros_like(coefficients)
    leaf = coefficients.detach().clone().requires_grad_()
    right = torch.zeros(1, dtype=torch.long, device=backbone.device)  # the target comes first

    def gradient_of(history: npt.NDArray[np.int32], target: int) -> torch.Tensor:
        with torch.no_grad():
            wanted = embed_batch(backbone, [domain.item_sequences[target]])  # (1, d)
        items = torch.cat([wanted, others[torch.from_numpy(negatives != target).to(backbone.device)]])
        logits = embed_batch(backbone, domain.packed([history])) @ items.T / settings.temperature
        (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, right), [leaf])
        return gradient

    with merged_forward(backbone, vectors, leaf):
        with torch.no_grad():
            others = embed_batch(backbone, [domain.item_sequences[item] for item in negatives])  # (m, d)
        for history, target in zip(records.histories, records.targets.tolist(), strict=True):
            try:
                gradient = gradient_of(history, target)
            except Exception:  # an error of one user must not affect the parts of the others
                logger.warning("domain %s: a user's gradient failed; left out", domain.manifest.name, exc_info=True)
                continue
            (factor,) = clip_factors([gradient[None]], clip)
            total += factor * gradient if factor > 0 else 0.0
    return total
