"""Merging coefficients learned on clients' own users: a client returns only a gradient of K or K × G numbers.

With ``through_clients.users = "own-users"`` the answers to ``query.gradient`` carry these gradients. They have no
formal guarantee by themselves; with ``dp.mode = "user"`` they are sums over users, with each user's part clipped.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from fedmerge.client.local_domain import LocalDomain
from fedmerge.client.training.dp_sgd import Records, clip_factors
from fedmerge.encoder.encode import embed_batch
from fedmerge.encoder.text import pack_sequences
from fedmerge.errors import ConfigError, DomainError
from fedmerge.mergerec.coefficients import LearnedCoefficients, Progress, optimise, start_coefficients
from fedmerge.mergerec.vectors import Vectors, merged_forward, on_device
from fedmerge.seeding import generator

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ClientMergeSettings:
    """Settings of learning coefficients on users.

    Attributes:
        granularity: "domain": one coefficient per domain; "layer": one per domain and group of the stack.
        initial_coefficient: start of every coefficient.
        learning_rate: constant learning rate of Adam.
        steps: rounds; every client computes one gradient in each.
        batch_size: users per client and round.
        temperature: divisor of the cosines.
        negatives: items drawn from the public catalog in each round, as negatives of all users.
        prior_weight: weight of the mean squared distance from the start.
        seed: seed of all draws.

    Raises:
        ConfigError: a value out of bounds.
    """

    granularity: Literal["domain", "layer"] = "layer"
    initial_coefficient: float = 0.5
    learning_rate: float = 1e-2
    steps: int = 150
    batch_size: int = 16
    temperature: float = 0.05
    negatives: int = 64
    prior_weight: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"steps": 1, "batch_size": 1, "negatives": 1, "prior_weight": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ConfigError(f"client merge: {name}: found {getattr(self, name)}, expected at least {low}")
        for name in ("temperature", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"client merge: {name}: found {getattr(self, name)}, expected more than 0")
        if self.granularity not in ("domain", "layer"):
            raise ConfigError(f"client merge: granularity: found {self.granularity!r}, expected 'domain' or 'layer'")


def draw_batch(
    domain: LocalDomain, round_index: int, settings: ClientMergeSettings
) -> tuple[list[npt.NDArray[np.int32]], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Draw the users of a round, a random prefix of each, and negatives from the catalog.

    Args:
        domain: the client's domain.
        round_index: the draws depend on it, on the seed and on the domain's name.
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
    rng = generator(settings.seed, "client merge", name, round_index)
    drawn = [sequences[user] for user in rng.permutation(len(sequences))[: settings.batch_size]]
    cuts = [int(rng.integers(1, len(sequence))) for sequence in drawn]
    negatives = rng.permutation(len(domain.catalog))[: settings.negatives].astype(np.int64)
    targets = np.array([sequence[cut] for sequence, cut in zip(drawn, cuts, strict=True)], dtype=np.int64)
    return [sequence[:cut] for sequence, cut in zip(drawn, cuts, strict=True)], targets, negatives


def coefficient_gradient(
    domain: LocalDomain, vectors: Vectors, coefficients: torch.Tensor, round_index: int, settings: ClientMergeSettings
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
        round_index: see :func:`draw_batch`.
        settings: see there.

    Returns:
        The gradient of the mean loss with respect to the coefficients, (K,) or (K, G) float32; and that loss, for the
        curves of a study.

    Raises:
        DomainError: no user to learn from.
    """
    backbone, text = domain.backbone, domain.text
    histories, targets, negatives = draw_batch(domain, round_index, settings)
    items, rows = np.unique(np.concatenate([targets, negatives]), return_inverse=True)
    target_rows = torch.from_numpy(rows[: len(targets)]).to(backbone.device)  # (b,)
    leaf = coefficients.detach().clone().requires_grad_()
    with merged_forward(backbone, vectors, leaf):
        with torch.no_grad():
            item_vectors = embed_batch(backbone, [domain.item_sequences[item] for item in items])  # (m, d)
        packed = pack_sequences(domain.table, histories, backbone.special, text.max_items, text.max_tokens)
        user_vectors = embed_batch(backbone, packed)  # (b, d)
    allowed = torch.from_numpy(np.isin(items, negatives)).to(backbone.device).repeat(len(targets), 1)  # (b, m)
    allowed[torch.arange(len(targets)), target_rows] = True
    logits = (user_vectors @ item_vectors.T / settings.temperature).masked_fill(~allowed, -torch.inf)
    loss = torch.nn.functional.cross_entropy(logits, target_rows)
    (gradient,) = torch.autograd.grad(loss, [leaf])
    return gradient, float(loss.detach())


def draw_negatives(domain: LocalDomain, round_index: int, settings: ClientMergeSettings) -> npt.NDArray[np.int64]:
    """Draw the negatives of a round, (m,), from the public catalog; they do not depend on the sampled users."""
    rng = generator(settings.seed, "client merge", domain.manifest.name, "negatives", round_index)
    return rng.permutation(len(domain.catalog))[: settings.negatives].astype(np.int64)


def clipped_gradient_sum(
    domain: LocalDomain,
    vectors: Vectors,
    coefficients: torch.Tensor,
    records: Records,
    round_index: int,
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
        round_index: see :func:`draw_negatives`.
        settings: negatives, temperature and seed are read.
        clip: C.

    Returns:
        (K,) or (K, G) float32; zeros without users.
    """
    backbone, text = domain.backbone, domain.text
    negatives = draw_negatives(domain, round_index, settings)
    total = torch.zeros_like(coefficients)
    leaf = coefficients.detach().clone().requires_grad_()
    right = torch.zeros(1, dtype=torch.long, device=backbone.device)  # the target comes first

    def gradient_of(history: npt.NDArray[np.int32], target: int) -> torch.Tensor:
        with torch.no_grad():
            wanted = embed_batch(backbone, [domain.item_sequences[target]])  # (1, d)
        items = torch.cat([wanted, others[torch.from_numpy(negatives != target).to(backbone.device)]])
        packed = pack_sequences(domain.table, [history], backbone.special, text.max_items, text.max_tokens)
        logits = embed_batch(backbone, packed) @ items.T / settings.temperature
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


def learn_on_clients(
    domains: Sequence[LocalDomain],
    vectors: Vectors,
    settings: ClientMergeSettings,
    progress: Progress | None = None,
    start: torch.Tensor | None = None,
) -> LearnedCoefficients:
    """Run the whole optimisation in one process, for studies: average the clients' gradients, then one step of Adam.

    Args:
        domains: the clients, opened on one backbone; all count equally, whatever their size.
        vectors: vectors of the K experts, see :func:`fedmerge.mergerec.vectors.initial_vectors`.
        settings: learning rate, steps and draws.
        progress: called after every round.
        start: coefficients to start from, (K,) or (K, G), in place of the initial coefficient.

    Returns:
        The coefficients; the history has "total" and each client's loss by name.

    Raises:
        DomainError: no client, or a client without users to learn from.
        MergeError: a loss or a coefficient is not finite.
    """
    clients = sorted(domains, key=lambda domain: domain.manifest.name)
    if not clients:
        raise DomainError("learn_on_clients: found no domain, expected at least one. Open the training domains.")
    device = clients[0].backbone.device
    placed = on_device(vectors, device)
    initial = start_coefficients(
        placed, settings.granularity, settings.initial_coefficient if start is None else start
    ).to(device)

    def gradient(step: int, coefficients: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        answers = {
            client.manifest.name: coefficient_gradient(client, placed, coefficients, step, settings)
            for client in clients
        }
        mean = torch.stack([found for found, _ in answers.values()]).mean(dim=0)
        losses = {name: loss for name, (_, loss) in answers.items()}
        return mean, {"total": sum(losses.values()) / len(losses), **losses}

    return optimise(
        "learning on clients",
        initial,
        gradient,
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        prior_weight=settings.prior_weight,
        progress=progress,
    )
