"""The anchored head: attention over a history's whitened text vectors, which starts as a fixed model and stays near it.

Every trained part is a low-rank map of an :class:`~fedmerge.adapter.Adapter` that is zero at the start. So it has no
ids and no table of items, ranks any catalog, and is sent, checked and merged as an adapter.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fedmerge.adapter import Adapter, LoraModule
from fedmerge.encoder.lora import initial_lora_A
from fedmerge.errors import ClientError, DomainError, LayoutMismatchError
from fedmerge.evaluation.ranks import IntArray, check_in_catalog
from fedmerge.seeding import generator
from fedmerge.sequence.blocks import LOGITS_PER_BLOCK, MIN_SEQUENCE, backward_in_blocks
from fedmerge.sequence.catalog import DrawnItems, by_blocks, draw_items, mean_and_covariance
from fedmerge.sequence.ranking import Source, last_states, pad

ATTENTION, ITEM, RECENCY = "attention", "item", "recency"  # modules of the adapter
SCALING = 2.0
RECENT = 50  # items read of a history without training; older ones weigh less than 1e-10
RIDGE = 0.1  # of the whitening, as a share of the mean variance
DECAY = 0.5  # c: fall of the untrained attention's logit with every later item
TEMPERATURE = 0.12  # τ; with it and BACKGROUND the untrained head's scores are calibrated (docs/findings.md)
BACKGROUND = 0.5  # π: probability in the loss that text does not explain the next item

Progress = Callable[[str], None]
Factors = dict[str, tuple[torch.Tensor, torch.Tensor, float]]
"""Module name -> A, B and scaling."""
Whitening = tuple[torch.Tensor, torch.Tensor]
"""Mean (d,) and symmetric matrix (d, d)."""


@dataclass(frozen=True, slots=True)
class AnchoredReport:
    """Report of a training.

    Attributes:
        steps: optimiser steps.
        seconds: wall clock.
        loss: mean training loss over all steps; None without a step.
    """

    steps: int
    seconds: float
    loss: float | None


def text_head(width: int, rank: int, max_length: int, seed: int) -> Adapter:
    """Return the untrained head: A drawn from the seed and B = 0, so that every Δ is zero.

    Args:
        width: d, of the item vectors.
        rank: r of every map.
        max_length: L, number of most recent items read of a history.
        seed: seed of A.
    """
    shapes = {ATTENTION: (width, width), ITEM: (width, width), RECENCY: (1, max_length)}
    return Adapter(
        {
            name: LoraModule(initial_lora_A(seed, name, rank, width_in), torch.zeros(width_out, rank), SCALING)
            for name, (width_in, width_out) in shapes.items()
        }
    )


def whitening(item_vectors: torch.Tensor) -> Whitening:
    """Return the whitening of a catalog: its mean, and (Σ + ridge · tr Σ / d · I)^(-1/2) of its covariance Σ.

    Text vectors share a few directions in which all items of a shop lie near each other; without them, cosines tell
    items apart. Nobody's interactions are read, so a domain that nobody trained on has its own.

    Args:
        item_vectors: (N, d).

    Returns:
        float32, on the CPU; the matrix is scaled so that its largest factor is 1. Of equal vectors: no mean, identity.

    Source: ZCA whitening, Bell and Sejnowski, Vision Research 37, 1997; of text vectors in recommenders: Zhang et al.,
        WhitenRec, ICDE 2024.
    Differs: the ridge, which keeps directions that a small catalog hardly has from being enlarged without bound.
    """
    mean, covariance = mean_and_covariance(item_vectors.detach().cpu())
    values, axes = torch.linalg.eigh(covariance)
    if values[-1] <= 1e-12:
        return torch.zeros_like(mean).float(), torch.eye(len(mean))
    shrunk = values.clamp(min=0) + RIDGE * values.clamp(min=0).mean()
    return mean.float(), (axes * (shrunk / shrunk[0]).rsqrt() @ axes.T).float()


def whitened(item_vectors: torch.Tensor, by: Whitening) -> torch.Tensor:
    """Return normalised (item_vectors - mean) @ matrix, (N, d) float32 on the device of the vectors."""
    mean, matrix = (part.to(item_vectors.device) for part in by)
    return by_blocks(
        lambda block: nn.functional.normalize((block.float() - mean) @ matrix, dim=-1), item_vectors.detach()
    )


@torch.no_grad()
def anchored_source(
    head: Adapter,
    item_vectors: torch.Tensor,
    histories: Sequence[IntArray],
    label: str = "federated head",
    by: Whitening | None = None,
    items: torch.Tensor | None = None,
) -> Source:
    """Return the user vectors of histories under the head, and the whitened item vectors.

    With e_1, ..., e_t the whitened vectors of the last L items of a history, oldest first:

    w = softmax over j of  e_t · Δ_attention e_j − c (t − j) + Δ_recency[t − j]
    s = Σ_j w_j e_j;   score of item i = s / |s| · (I + Δ_item) e_i

    (I + Δ_item) is applied to the user's side, (I + Δ_item)ᵀ s / |s|, which gives the same scores.

    Args:
        head: with the modules of :func:`text_head`, of any rank and scaling.
        item_vectors: (N, d), L2-normalised.
        histories: U arrays of item indices, oldest first, none empty.
        label: name of the source.
        by: whitening of another catalog, such as one without its newest items; None: of these items.
        items: whitened vectors of the items, if they are known; ``by`` is not used then.

    Returns:
        A source of float32 vectors on the CPU.

    Raises:
        LayoutMismatchError: the head has other modules or another width, a history is empty, or item indices are
            outside the catalog.
    """
    factors, max_length = _checked(head, item_vectors)
    if items is None:
        items = whitened(item_vectors, by or whitening(item_vectors))
    if not all(len(history) for history in histories):
        raise LayoutMismatchError("a history is empty; expected at least one item in each")
    check_in_catalog(np.concatenate([np.zeros(0, dtype=np.int64), *histories]), len(items), "histories")
    on_device = {name: (A.to(items.device), B.to(items.device), x) for name, (A, B, x) in factors.items()}
    users = last_states(lambda padded: _user_vectors(on_device, items[padded]), histories, max_length, items)
    return Source(label, users, items.cpu())


def recent_items_source(
    item_vectors: torch.Tensor, histories: Sequence[IntArray], label: str, items: torch.Tensor | None = None
) -> Source:
    """Return the source of the untrained head: recency-weighted means of whitened vectors, for anyone without training.

    Args:
        item_vectors, histories, label, items: as for :func:`anchored_source`; the last ``RECENT`` items of each are
            read.
    """
    return anchored_source(text_head(item_vectors.shape[1], 1, RECENT, 0), item_vectors, histories, label, items=items)


def dense_maps(head: Adapter) -> dict[str, torch.Tensor]:
    """Return what :func:`anchored_source` computes with, as dense matrices for a service without fedmerge.

    Returns:
        ``attention`` Δ and ``item`` I + Δ, both (d, d); ``by_age`` (L,), the logit of an item of each age:
        Δ_recency[k] − c k.
    """
    deltas = {name: module.delta_weight().float() for name, module in head.modules.items()}
    return {
        ATTENTION: deltas[ATTENTION],
        ITEM: torch.eye(len(deltas[ITEM])) + deltas[ITEM],
        "by_age": deltas[RECENCY][:, 0] - DECAY * torch.arange(len(deltas[RECENCY])),
    }


def train_anchored(
    sequences: Sequence[IntArray],
    item_vectors: torch.Tensor,
    start: Adapter,
    *,
    steps: int,
    learning_rate: float = 2e-4,
    batch_size: int = 64,
    proximal: float = 0.0,
    sampled_items: int | None = None,
    seed: int,
    scope: tuple[str | int, ...] = (),
    progress: Progress = lambda line: None,
) -> tuple[Adapter, AnchoredReport]:
    """Train the head by Adam on next items, all positions of a sequence at once.

    loss = mean over users and positions of −log((1 − π) softmax_i (score_i / τ)[next item] + π / N)
           + proximal / 2 · ‖factors − factors of the start‖²

    The softmax is over all N items of the catalog. The term π / N keeps next items that no text explains from
    dominating the gradient.

    Args:
        sequences: train sequences, oldest first; the last L + 1 items of each are used, and sequences of fewer than two
            items are left out.
        item_vectors: (N, d), L2-normalised; they are whitened, and not trained.
        start: head to start from.
        steps: optimiser steps.
        learning_rate: of Adam, constant.
        batch_size: users of a step, drawn without replacement.
        proximal: FedProx coefficient.
        sampled_items: items drawn for the softmax of a step; None: all.
        seed: seed of all randomness.
        scope: further parts of the randomness, e.g. domain and round.
        progress: receives one line at the end.

    Returns:
        The trained head, with the ranks and scalings of the start; and the report.

    Raises:
        DomainError: no sequence to train on.
        LayoutMismatchError: the start does not fit the item vectors, or an item index is outside the catalog.
        ClientError: the loss is not finite.

    Source: loss over the whole catalog as for SASRec in :mod:`fedmerge.sequence.training`; proximal term of FedProx,
        Li et al., MLSys 2020.
    """
    factors, max_length = _checked(start, item_vectors)
    cut = [np.asarray(s[-max_length - 1 :], dtype=np.int64) for s in sequences if len(s) >= MIN_SEQUENCE]
    if not cut:
        raise DomainError(
            f"a federated head cannot be trained: none of {len(sequences)} train sequences has {MIN_SEQUENCE} items or "
            "more. Add data, or leave the domain out of the run's training domains."
        )
    check_in_catalog(np.concatenate(cut), len(item_vectors), "the train sequences")
    items = whitened(item_vectors, whitening(item_vectors))
    started, device = time.monotonic(), item_vectors.device
    trained = {
        name: (A.detach().to(device).clone().requires_grad_(), B.detach().to(device).clone().requires_grad_(), scaling)
        for name, (A, B, scaling) in factors.items()
    }
    parameters = [tensor for A, B, _ in trained.values() for tensor in (A, B)]
    anchors = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    total = 0.0
    for step in range(steps):
        rng = generator(seed, "anchored", *scope, step)
        drawn = rng.choice(len(cut), min(batch_size, len(cut)), replace=False)
        batch, scored = [cut[user] for user in drawn], None
        if sampled_items is not None:
            rng = generator(seed, "anchored", "items", *scope, step)
            scored = draw_items(batch, sampled_items, len(items), rng, device)
        optimizer.zero_grad()
        loss = backward(trained, items, batch, drawn=scored)
        if not math.isfinite(loss):
            raise ClientError(
                f"the training loss of the federated head is {loss} in step {step + 1}. Lower head.steps, or leave "
                "the head out: head.kind = 'none'."
            )
        if proximal:
            for parameter, anchor in zip(parameters, anchors, strict=True):
                (proximal / 2 * (parameter - anchor).square().sum()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        total += loss
    report = AnchoredReport(steps, time.monotonic() - started, total / steps if steps else None)
    if steps:
        progress(f"federated head: {steps} steps, {report.seconds:.0f} s, loss {total / steps:.3f}")
    modules = {
        name: LoraModule(A.detach().cpu(), B.detach().cpu(), scaling) for name, (A, B, scaling) in trained.items()
    }
    return Adapter(modules), report


def backward(
    factors: Factors,
    item_vectors: torch.Tensor,
    batch: Sequence[npt.NDArray[np.int64]],
    *,
    logits_per_block: int = LOGITS_PER_BLOCK,
    drawn: DrawnItems | None = None,
) -> float:
    """Add the gradients of a batch's mean loss to those of the factors.

    Args:
        factors: of the head; leaves that require gradients.
        item_vectors: (N, d), whitened.
        batch: sequences of two items or more; every item except the first is predicted from those before it.
        logits_per_block: logits held at once, for a block of positions.
        drawn: items that the softmax is over in place of all, those of the batch among them.

    Returns:
        The loss.
    """
    device = item_vectors.device
    if drawn is not None:
        item_vectors = item_vectors[drawn.items]
        batch = drawn.numbered(batch)
    padded, lengths = pad([sequence[:-1] for sequence in batch], device)  # (b, t)
    users = _user_vectors(factors, item_vectors[padded])[
        torch.arange(padded.shape[1], device=device) < lengths[:, None]
    ]
    targets = torch.from_numpy(np.concatenate([sequence[1:] for sequence in batch])).to(device)  # (P,)
    states = users.detach().requires_grad_()
    total = backward_in_blocks(
        states,
        item_vectors,
        targets,
        temperature=TEMPERATURE,
        background=BACKGROUND,
        logits_per_block=logits_per_block,
        drawn=drawn,
    )
    torch.autograd.backward(users, states.grad)
    return total


def _user_vectors(factors: Factors, vectors: torch.Tensor) -> torch.Tensor:
    """Return user vectors after each position.

    Args:
        factors: of the head.
        vectors: (b, t, d) whitened vectors of histories, padded on the right.

    Returns:
        (b, t, d); position s has read items 0 .. s.
    """
    A, B, scaling = factors[RECENCY]
    by_age = scaling * (B @ A)[:, 0] - DECAY * torch.arange(B.shape[0], device=vectors.device)  # (L,)
    position = torch.arange(vectors.shape[1], device=vectors.device)
    age = position[:, None] - position[None, :]  # (t, t), negative for later items
    logits = _transposed(factors[ATTENTION], vectors) @ vectors.transpose(1, 2) + by_age[age.clamp(min=0)]  # (b, t, t)
    weights = logits.masked_fill(age < 0, -math.inf).softmax(dim=-1)
    states = nn.functional.normalize(weights @ vectors, dim=-1)
    return states + _transposed(factors[ITEM], states)


def _transposed(factor: tuple[torch.Tensor, torch.Tensor, float], vectors: torch.Tensor) -> torch.Tensor:
    """Return Δᵀ x for every row x, from the factors."""
    A, B, scaling = factor
    return scaling * (vectors @ B) @ A


def _checked(head: Adapter, item_vectors: torch.Tensor) -> tuple[Factors, int]:
    """Return the factors of a head and L, its number of items read."""
    width = item_vectors.shape[1]
    found = {name: (len(module.lora_B), module.lora_A.shape[1]) for name, module in head.modules.items()}
    max_length = found.get(RECENCY, (0, 0))[0]
    expected = {ATTENTION: (width, width), ITEM: (width, width), RECENCY: (max_length, 1)}
    if found != expected or not max_length:
        raise LayoutMismatchError(
            f"the federated head has maps (out, in) {found}; expected {expected} for item vectors of width {width}. It "
            "belongs to another backbone or another fedmerge version: use those that it was trained with."
        )
    return {name: (m.lora_A.float(), m.lora_B.float(), m.scaling) for name, m in head.modules.items()}, max_length
