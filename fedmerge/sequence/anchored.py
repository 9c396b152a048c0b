"""The anchored head: attention over a history's text vectors that starts as a fixed text model and stays near it.

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
from fedmerge.encoder.encode import length_batches
from fedmerge.encoder.lora import initial_lora_A
from fedmerge.errors import ClientError, DomainError, LayoutMismatchError
from fedmerge.evaluation.ranks import IntArray, check_in_catalog
from fedmerge.seeding import derive, generator
from fedmerge.sequence.ranking import Source, pad

ATTENTION, VALUE, ITEM, RECENCY = "attention", "value", "item", "recency"  # modules of the adapter
SCALING = 2.0
SHARPNESS = 0.0  # β: the untrained attention prefers items similar to the last one
DECAY = 0.3  # c: the untrained attention to an item falls by this factor, in nats, with every later item
TEMPERATURE = 0.05  # of cosines in training; ranks do not depend on it
ITEM_DROPOUT = 0.2
COORDINATE_DROPOUT = 0.1
MIN_SEQUENCE = 2  # one item to read and one to predict
LOGITS_PER_BLOCK = 2**20  # 4 MiB of float32
POSITIONS_PER_BATCH = 16384  # padded positions read at once outside training

Progress = Callable[[str], None]
Factors = dict[str, tuple[torch.Tensor, torch.Tensor, float]]
"""Module name -> A, B and scaling."""


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
    shapes = {ATTENTION: (width, width), VALUE: (width, width), ITEM: (width, width), RECENCY: (1, max_length)}
    return Adapter(
        {
            name: LoraModule(initial_lora_A(seed, name, rank, width_in), torch.zeros(width_out, rank), SCALING)
            for name, (width_in, width_out) in shapes.items()
        }
    )


@torch.no_grad()
def anchored_source(
    head: Adapter, item_vectors: torch.Tensor, histories: Sequence[IntArray], label: str = "federated head"
) -> Source:
    """Return the user vectors of histories under the head, and the item vectors as they are.

    With e_1, ..., e_t the vectors of the last L items of a history, oldest first:

    w = softmax over j of  e_t · (β I + Δ_attention) e_j − c (t − j) + Δ_recency[t − j]
    s = Σ_j w_j (I + Δ_value) e_j;   score of item i = s / |s| · (I + Δ_item) e_i

    (I + Δ_item) is applied to the user's side, (I + Δ_item)ᵀ s / |s|, which gives the same scores.

    Args:
        head: with the modules of :func:`text_head`, of any rank and scaling.
        item_vectors: (N, d), L2-normalised.
        histories: U arrays of item indices, oldest first, none empty.
        label: name of the source.

    Returns:
        A source of float32 vectors on the CPU.

    Raises:
        LayoutMismatchError: the head has other modules or another width, a history is empty, or item indices are
            outside the catalog.
    """
    factors, max_length = _checked(head, item_vectors)
    if not all(len(history) for history in histories):
        raise LayoutMismatchError("a history is empty; expected at least one item in each")
    cut = [np.asarray(history[-max_length:], dtype=np.int64) for history in histories]
    check_in_catalog(np.concatenate([np.zeros(0, dtype=np.int64), *cut]), len(item_vectors), "histories")
    on_device = {name: (A.to(item_vectors.device), B.to(item_vectors.device), x) for name, (A, B, x) in factors.items()}
    users = torch.empty(len(cut), item_vectors.shape[1])
    for batch in length_batches([len(history) for history in cut], POSITIONS_PER_BATCH):
        padded, lengths = pad([cut[user] for user in batch], item_vectors.device)
        vectors = _user_vectors(on_device, item_vectors[padded].float())
        users[torch.from_numpy(batch)] = vectors[torch.arange(len(batch)), lengths - 1].cpu()
    return Source(label, users, item_vectors.detach().float().cpu())


def dense_maps(head: Adapter) -> dict[str, torch.Tensor]:
    """Return what :func:`anchored_source` computes with, as dense matrices for a service without fedmerge.

    Returns:
        ``attention`` β I + Δ, ``value`` and ``item`` I + Δ, all (d, d); ``by_age`` (L,), the logit of an item of each
        age: Δ_recency[k] − c k.
    """
    deltas = {name: module.delta_weight().float() for name, module in head.modules.items()}
    identity = torch.eye(len(deltas[VALUE]))
    return {
        ATTENTION: SHARPNESS * identity + deltas[ATTENTION],
        VALUE: identity + deltas[VALUE],
        ITEM: identity + deltas[ITEM],
        "by_age": deltas[RECENCY][:, 0] - DECAY * torch.arange(len(deltas[RECENCY])),
    }


def train_anchored(
    sequences: Sequence[IntArray],
    item_vectors: torch.Tensor,
    start: Adapter,
    *,
    steps: int,
    learning_rate: float = 1e-3,
    batch_size: int = 64,
    proximal: float = 0.0,
    seed: int,
    scope: tuple[str | int, ...] = (),
    progress: Progress = lambda line: None,
) -> tuple[Adapter, AnchoredReport]:
    """Train the head by Adam on next items, all positions of a sequence at once.

    loss = mean over users and positions of −log softmax_i (score_i / τ)[next item], over all items i of the catalog
           + proximal / 2 · ‖factors − factors of the start‖²

    In training, items of a history are left out of the attention and coordinates of their vectors set to zero at
    random, so that the head learns no single items.

    Args:
        sequences: train sequences, oldest first; the last L + 1 items of each are used, and sequences of fewer than two
            items are left out.
        item_vectors: (N, d), L2-normalised; they are not trained.
        start: head to start from.
        steps: optimiser steps.
        learning_rate: of Adam, constant.
        batch_size: users of a step, drawn without replacement.
        proximal: FedProx coefficient.
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
    started, device = time.monotonic(), item_vectors.device
    trained = {
        name: (A.detach().to(device).clone().requires_grad_(), B.detach().to(device).clone().requires_grad_(), scaling)
        for name, (A, B, scaling) in factors.items()
    }
    parameters = [tensor for A, B, _ in trained.values() for tensor in (A, B)]
    anchors = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    total = 0.0
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for step in range(steps):
            torch.manual_seed(derive(seed, "anchored-dropout", *scope, step))
            drawn = generator(seed, "anchored-batch", *scope, step).choice(
                len(cut), min(batch_size, len(cut)), replace=False
            )
            optimizer.zero_grad()
            loss = backward(trained, item_vectors, [cut[user] for user in drawn], dropout=True)
            if not math.isfinite(loss):
                raise ClientError(
                    f"the training loss of the federated head is {loss} in step {step + 1}. Lower head.steps, or leave "
                    "the head out: head.kind = 'none'."
                )
            for parameter, anchor in zip(parameters, anchors, strict=True) if proximal else ():
                parameter.grad = proximal * (parameter.detach() - anchor) + (
                    0.0 if parameter.grad is None else parameter.grad
                )
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
    factors: Factors, item_vectors: torch.Tensor, batch: Sequence[npt.NDArray[np.int64]], *, dropout: bool
) -> float:
    """Add the gradients of a batch's mean loss to those of the factors.

    Args:
        factors: of the head; leaves that require gradients.
        item_vectors: (N, d).
        batch: sequences of two items or more; every item except the first is predicted from those before it.
        dropout: True to leave out items and coordinates.

    Returns:
        The loss.
    """
    device = item_vectors.device
    padded, lengths = pad([sequence[:-1] for sequence in batch], device)  # (b, t)
    vectors, kept = item_vectors[padded].float(), None
    if dropout:
        kept = torch.rand(padded.shape, device=device) >= ITEM_DROPOUT
        vectors = nn.functional.dropout(vectors, COORDINATE_DROPOUT)
    users = _user_vectors(factors, vectors, kept)[torch.arange(padded.shape[1], device=device) < lengths[:, None]]
    targets = torch.from_numpy(np.concatenate([sequence[1:] for sequence in batch])).to(device)  # (P,)
    states = users.detach().requires_grad_()
    total, size = 0.0, max(1, LOGITS_PER_BLOCK // len(item_vectors))
    for some, their_targets in zip(torch.split(states, size), torch.split(targets, size), strict=True):
        logits = some @ item_vectors.T / TEMPERATURE  # (block, N)
        loss = nn.functional.cross_entropy(logits, their_targets, reduction="sum") / len(targets)
        loss.backward()  # type: ignore[no-untyped-call]  # PyTorch leaves it untyped
        total += loss.item()
    torch.autograd.backward(users, states.grad)
    return total


def _user_vectors(factors: Factors, vectors: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
    """Return user vectors after each position.

    Args:
        factors: of the head.
        vectors: (b, t, d) vectors of histories, padded on the right.
        kept: (b, t) False for items that are left out of the attention; None keeps all. A position that would be left
            with no item reads its own.

    Returns:
        (b, t, d); position s has read items 0 .. s.
    """
    length = vectors.shape[1]
    queries = SHARPNESS * vectors + _transposed(factors[ATTENTION], vectors)  # (β I + Δ)ᵀ e_t
    A, B, scaling = factors[RECENCY]
    start = torch.arange(B.shape[0], device=vectors.device)
    by_age = scaling * (B @ A)[:, 0] - DECAY * start  # (L,)
    position = torch.arange(length, device=vectors.device)
    age = position[:, None] - position[None, :]  # (t, t), negative for later items
    logits = queries @ vectors.transpose(1, 2) + by_age[age.clamp(min=0)]  # (b, t, t)
    readable = (age >= 0).expand(len(vectors), -1, -1)
    if kept is not None:
        left = readable & kept[:, None, :]
        readable = left | ((age == 0) & ~left.any(dim=2, keepdim=True))
    weights = logits.masked_fill(~readable, -math.inf).softmax(dim=-1)
    read = weights @ vectors  # Δ_value is linear, so it is applied once, to the weighted sum
    states = nn.functional.normalize(read + _applied(factors[VALUE], read), dim=-1)
    return states + _transposed(factors[ITEM], states)


def _applied(factor: tuple[torch.Tensor, torch.Tensor, float], vectors: torch.Tensor) -> torch.Tensor:
    """Return Δ x for every row x, from the factors."""
    A, B, scaling = factor
    return scaling * (vectors @ A.T) @ B.T


def _transposed(factor: tuple[torch.Tensor, torch.Tensor, float], vectors: torch.Tensor) -> torch.Tensor:
    """Return Δᵀ x for every row x, from the factors."""
    A, B, scaling = factor
    return scaling * (vectors @ B) @ A


def _checked(head: Adapter, item_vectors: torch.Tensor) -> tuple[Factors, int]:
    """Return the factors of a head and L, its number of items read."""
    width = item_vectors.shape[1]
    found = {name: (len(module.lora_B), module.lora_A.shape[1]) for name, module in head.modules.items()}
    max_length = found.get(RECENCY, (0, 0))[0]
    expected = {ATTENTION: (width, width), VALUE: (width, width), ITEM: (width, width), RECENCY: (max_length, 1)}
    if found != expected or not max_length:
        raise LayoutMismatchError(
            f"the federated head has maps (out, in) {found}; expected {expected} for item vectors of width {width}. It "
            "belongs to another backbone or another fedmerge version: use those that it was trained with."
        )
    return {name: (m.lora_A.float(), m.lora_B.float(), m.scaling) for name, m in head.modules.items()}, max_length
