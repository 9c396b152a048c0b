"""Union similarity: the items of all catalogs, compared as the experts compare them on average; FedCIA-style.

A similarity e_i·e_j does not change if all vectors are rotated, so experts that share no space can be averaged by it.
S̄ = (1/K) Σ_k E_k E_kᵀ has N × N entries for N items: only random blocks of it are ever computed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from fedmerge.adapter import Adapter
from fedmerge.encoder.backbone import Backbone
from fedmerge.encoder.encode import embed_batch, encode, length_batches
from fedmerge.encoder.lora import applied
from fedmerge.encoder.text import Tokens
from fedmerge.mergerec.objective import MergeRecSettings
from fedmerge.mergerec.vectors import Vectors, merged_forward
from fedmerge.seeding import generator

BLOCK = 256  # rows and columns of a block
TOKENS_PER_PASS = 2048  # of items whose activations are in memory at once


@dataclass(frozen=True, slots=True)
class UnionSimilarity:
    """Random blocks of the experts' mean item similarity over the union of the catalogs.

    Attributes:
        items: M token sequences: the items of the union that a block has, each text once.
        rows: (T, b) int64, the items that are the rows of each block.
        columns: (T, b) int64, those that are its columns.
        targets: (T, b, b) float32, the blocks of S̄.
    """

    items: Sequence[Tokens]
    rows: npt.NDArray[np.int64]
    columns: npt.NDArray[np.int64]
    targets: torch.Tensor


def union_similarity(
    backbone: Backbone,
    adapters: Mapping[str, Adapter],
    catalogs: Mapping[str, Sequence[Tokens]],
    settings: MergeRecSettings,
) -> UnionSimilarity:
    """Compute the blocks that learning coefficients compares with: one for each step, and one more for validation.

    Every expert encodes the items that the blocks have, at most 512 a step.

    Args:
        backbone: the frozen encoder; left as it was.
        adapters: domain -> expert.
        catalogs: domain -> token sequences of its items.
        settings: steps, select_every and seed are read.

    Source: FedCIA-style, after arXiv:2504.14208 and its released code.
    Differs: the original averages the similarities of clients that share one item set, and each client fits its item
        table to them; here the items are those of all catalogs, the similarities are computed where all experts and
        catalogs are, without noise, and merging coefficients are fitted.
    """
    union = union_of([catalogs[name] for name in sorted(catalogs)])
    rows, columns = draw_blocks(len(union), settings.steps + bool(settings.select_every), settings.seed)
    used, places = np.unique(np.stack([rows, columns]), return_inverse=True)
    rows, columns = places.reshape(2, *rows.shape)
    items = [union[item] for item in used]
    targets = torch.zeros(*rows.shape, columns.shape[1])
    for name in sorted(adapters):
        with applied(backbone, adapters[name]):
            add_similarity(targets, encode(backbone, items), rows, columns)
    return UnionSimilarity(items, rows, columns, targets / len(adapters))


def union_of(catalogs: Sequence[Sequence[Tokens]]) -> list[Tokens]:
    """Return the items of several catalogs, each text once: every model gives equal texts equal vectors."""
    return list({item.tobytes(): item for catalog in catalogs for item in catalog}.values())


def draw_blocks(num_items: int, number: int, seed: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Draw rows and columns of blocks, each in permutations of all items, so that all are drawn equally often.

    Args:
        num_items: N.
        number: T, blocks.
        seed: seed of the draws.

    Returns:
        Two arrays (T, b), b = min(256, N). Each covers every item before any item twice.
    """
    size = min(BLOCK, num_items)

    def drawn(of: str) -> npt.NDArray[np.int64]:
        rng = generator(seed, "mergerec", "similarity", of)
        orders = [rng.permutation(num_items) for _ in range(-(-number * size // num_items))]
        return np.concatenate(orders)[: number * size].reshape(number, size)

    return drawn("rows"), drawn("columns")


def add_similarity(
    targets: torch.Tensor, vectors: torch.Tensor, rows: npt.NDArray[np.int64], columns: npt.NDArray[np.int64]
) -> None:
    """Add the blocks of E Eᵀ to ``targets`` (T, b, b), in place, for the vectors E (M, d) of one expert."""
    for block, (of_rows, of_columns) in enumerate(zip(rows, columns, strict=True)):
        targets[block] += vectors[of_rows] @ vectors[of_columns].T


def similarity_term(
    backbone: Backbone, vectors: Vectors, coefficients: torch.Tensor, union: UnionSimilarity, block: int
) -> tuple[float, torch.Tensor]:
    """Compute the mean of (ê_i·ê_j - S̄_ij)² over a block, and its gradient in the coefficients.

    The items are encoded twice: without gradients, for the loss and its gradient in every vector; then in small
    batches, each of which takes these gradients back to the coefficients. So memory is that of a batch.

    Args:
        backbone: the frozen encoder; left as it was.
        vectors: vectors of the K experts, on its device.
        coefficients: (K,) or (K, G) float32 on its device.
        union: the blocks.
        block: number of the block.

    Returns:
        The mean, and the gradient in the shape of the coefficients; zeros where gradients are disabled.
    """
    used, places = np.unique(np.stack([union.rows[block], union.columns[block]]), return_inverse=True)
    rows, columns = places.reshape(2, -1)
    items = [union.items[item] for item in used]
    batches = length_batches([len(item) for item in items], TOKENS_PER_PASS)
    leaf = coefficients.detach().clone().requires_grad_()
    with merged_forward(backbone, vectors, leaf):
        found = torch.empty(len(items), backbone.width, device=leaf.device)
        with torch.no_grad():
            for batch in batches:
                found[batch] = embed_batch(backbone, [items[item] for item in batch])
        gradient = torch.zeros_like(leaf)
        found.requires_grad_(torch.is_grad_enabled())
        difference = found[rows] @ found[columns].T - union.targets[block].to(found)
        loss = difference.square().mean()
        if loss.requires_grad:
            (of_vectors,) = torch.autograd.grad(loss, [found])
            for batch in batches:
                again = embed_batch(backbone, [items[item] for item in batch])
                gradient += torch.autograd.grad(again, [leaf], of_vectors[batch])[0]
    return float(loss.detach()), gradient
