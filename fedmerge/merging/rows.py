"""Elementwise merging methods: they map K rows of entries to K rows whose sum is the merge.

A row is one domain's update, flattened over the scope: a module, a layer, or the whole model. It comes in pieces, one
per module, so a scope may be larger than memory. Thresholds are exact nevertheless: they take several passes.
Entries that tie with the last one that passes a threshold pass as well. Entries of 0 never pass.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch

from fedmerge.errors import ConfigError
from fedmerge.merging.selection import order_statistics
from fedmerge.seeding import generator


@dataclass(frozen=True, slots=True)
class Piece:
    """One module's part of K rows.

    Attributes:
        module: name of the module.
        domains: names of the K domains.
        rows: (K, n) float32 or float64.
    """

    module: str
    domains: tuple[str, ...]
    rows: torch.Tensor


Pieces = Callable[[], Iterable[Piece]]
"""Every call yields the same pieces in the same order."""


def ties(pieces: Pieces, density: float, coefficient: float) -> Iterator[torch.Tensor]:
    """TIES: trim, elect a sign per coordinate, average the entries with that sign.

    Each row keeps its ⌈density · n⌉ largest magnitudes. The elected sign is the sign of the sum of these entries. Row k
    then keeps its entries of the elected sign, divided by the number of rows that agree. A tie of signs yields 0.

    Args:
        pieces: the rows.
        density: fraction of entries that is kept.
        coefficient: factor on the merge.

    Yields:
        (K, n) for every piece; the sum over K is the merge.

    Source: arXiv:2306.01708, algorithm 1.
    Differs: published code rounds density · n down, and resolves a tie of signs to + or to the majority.
    """
    threshold = _smallest_kept(pieces, density)  # (K, 1)
    for piece in pieces():
        kept = torch.empty_like(piece.rows)
        for row, smallest, out in zip(piece.rows, threshold.expand(len(piece.rows), 1), kept, strict=True):
            out.copy_(torch.where(row.abs() >= smallest, row, 0.0))
        agree = kept * total(kept).sign().to(kept.dtype) > 0
        yield kept.masked_fill_(~agree, 0.0).mul_(coefficient).div_(agree.sum(0).clamp(min=1))


def dare(pieces: Pieces, density: float, coefficient: float, seed: int) -> Iterator[torch.Tensor]:
    """DARE: drop entries at random, rescale the rest, then average.

    Each entry is kept with probability density and divided by it. The draws depend only on the seed, the domain and the
    module.

    Args:
        pieces: the rows.
        density: probability that an entry is kept.
        coefficient: factor on the merge.
        seed: seed of the draws.

    Yields:
        (K, n) for every piece; the sum over K is the merge.

    Source: arXiv:2311.03099; the drop rate there is 1 - density.
    """
    for piece in pieces():
        yield _drop(piece, density, seed).rows.mul_(coefficient).div_(len(piece.rows))


def dare_ties(
    pieces: Pieces, density: float, ties_density: float, coefficient: float, seed: int
) -> Iterator[torch.Tensor]:
    """DARE's drop and rescale, then TIES, trimmed to ``ties_density`` of all entries (1: sign election only).

    Yields:
        (K, n) for every piece; the sum over K is the merge.

    Source: arXiv:2311.03099. Without trimming it equals ``dare_ties`` of peft and of mergekit.
    """
    return ties(lambda: (_drop(piece, density, seed) for piece in pieces()), ties_density, coefficient)


def pcb(pieces: Pieces, density: float, clamp: float, coefficient: float) -> Iterator[torch.Tensor]:
    """PCB-Merging: weight each entry by its size within its row and its agreement with the other rows.

    τ̃ is τ with magnitudes clamped to their [clamp, 1 - clamp] quantiles. intra = exp(K · minmax(|τ̃|)²),
    inter = tanh(τ_k · Σ τ), score = intra · inter. s_k is the score of the row's ⌈density · n⌉ best entries, scaled to
    [0, 1] by min-max, and 0 elsewhere. The merge is Σ τ̃ s / Σ s, and 0 where Σ s = 0.

    Args:
        pieces: the rows.
        density: fraction of entries with a weight.
        clamp: fraction clamped at each end: ⌊clamp · n⌋ magnitudes.
        coefficient: factor on the merge.

    Yields:
        (K, n) for every piece; the sum over K is the merge.

    Source: Parameter Competition Balancing for Model Merging, NeurIPS 2024, arXiv:2410.02396.
    Differs: where min-max is 0/0, magnitudes become 0 and scores 1 (a score of 0 stays 0); published code yields NaN.
        Its upper quantile lies one entry lower where clamp · n is not an integer.
    """

    def ends(n: int) -> tuple[int, int]:
        cut = math.floor(_part(clamp, n))
        return cut, n - 1 - cut

    bounds = order_statistics(lambda: (piece.rows for piece in pieces()), ends, magnitudes=True).double()  # (K, 2)

    def clamped(row: torch.Tensor, k: int) -> torch.Tensor:
        return row.abs().double().clamp(bounds[k, 0], bounds[k, 1])

    def scores(piece: Piece) -> torch.Tensor:
        """(K, n) float64, divided by exp(K) to avoid overflow with many domains; s is the same."""
        summed, found = total(piece.rows), torch.empty_like(piece.rows, dtype=torch.float64)
        for k, row in enumerate(piece.rows):
            low, high = bounds[k]
            spread = (clamped(row, k) - low) / torch.where(high > low, high - low, 1.0)
            found[k] = torch.exp(len(piece.rows) * (spread.square() - 1)) * torch.tanh(row * summed)
        return found

    best = order_statistics(
        lambda: (scores(piece) for piece in pieces()), lambda n: (n - math.ceil(_part(density, n)), n - 1)
    )  # (K, 2): the smallest score kept, the largest
    for piece in pieces():
        found = scores(piece)
        for k, (low, high) in enumerate(best):
            if high > low:
                found[k] = (found[k].clamp(min=low) - low) / (high - low)
            else:
                found[k] = (found[k] >= low) & (found[k] != 0)
        summed = found.sum(0)
        summed = torch.where(summed > 0, summed, 1.0)
        merged = torch.empty_like(piece.rows)
        for k, row in enumerate(piece.rows):
            merged[k] = coefficient * row.sign() * clamped(row, k) * found[k] / summed
        yield merged


def localize_and_stitch(pieces: Pieces, density: float, coefficient: float) -> Iterator[torch.Tensor]:
    """Localize-and-Stitch without data: keep each row's ⌈density · n⌉ largest magnitudes, average overlaps.

    Args:
        pieces: the rows.
        density: fraction of entries that is kept.
        coefficient: factor on the merge.

    Yields:
        (K, n) for every piece; the sum over K is the merge.

    Source: arXiv:2408.13656, the dataless variant.
    """
    threshold = _smallest_kept(pieces, density)  # (K, 1)
    for piece in pieces():
        mask = (piece.rows.abs() >= threshold) & (piece.rows != 0)
        yield torch.where(mask, piece.rows, 0.0).mul_(coefficient).div_(mask.sum(0).clamp(min=1))


def breadcrumbs(
    pieces: Pieces, drop_smallest: float, drop_largest: float, coefficient: float
) -> Iterator[torch.Tensor]:
    """Model Breadcrumbs: drop each row's smallest and largest magnitudes, then task arithmetic.

    Args:
        pieces: the rows.
        drop_smallest: fraction of a row that is dropped at the lower end, rounded down.
        drop_largest: fraction of a row that is dropped at the upper end, rounded down.
        coefficient: factor on the merge.

    Yields:
        (K, n) for every piece; the sum over K is the merge.

    Raises:
        ConfigError: no entry would be left.

    Source: arXiv:2312.06795.
    """
    if drop_smallest + drop_largest >= 1:
        raise ConfigError(
            f"breadcrumbs: drop_smallest = {drop_smallest} and drop_largest = {drop_largest} drop everything; "
            "their sum must be below 1"
        )

    def ends(n: int) -> tuple[int, int]:
        return math.floor(_part(drop_smallest, n)), n - 1 - math.floor(_part(drop_largest, n))

    bounds = order_statistics(lambda: (piece.rows for piece in pieces()), ends, magnitudes=True)  # (K, 2)
    for piece in pieces():
        size = piece.rows.abs()
        kept = (size >= bounds[:, :1]) & (size <= bounds[:, 1:])
        yield torch.where(kept, piece.rows, 0.0).mul_(coefficient)


def total(rows: torch.Tensor) -> torch.Tensor:
    """Sum over K in float64, which is exact for float32 numbers of similar size: (n,)."""
    summed = torch.zeros_like(rows[0], dtype=torch.float64)
    for row in rows:
        summed += row
    return summed


def _smallest_kept(pieces: Pieces, density: float) -> torch.Tensor:
    """The ⌈density · n⌉-th largest magnitude of each row: (K, 1), or a single 0 at density 1."""
    if density == 1:
        return torch.zeros(1, 1)
    return order_statistics(
        lambda: (piece.rows for piece in pieces()), lambda n: (n - math.ceil(_part(density, n)),), magnitudes=True
    )


def _part(fraction: float, n: int) -> Fraction:
    """fraction · n, with the fraction read as a decimal: 0.07 of 100 is 7, not 7.000000000000001."""
    return Fraction(str(fraction)) * n


def _drop(piece: Piece, density: float, seed: int) -> Piece:
    rows = torch.empty_like(piece.rows)
    for k, domain in enumerate(piece.domains):
        drawn = generator(seed, "dare", domain, piece.module).random(rows.shape[1], dtype=np.float32)
        kept = torch.from_numpy(drawn < density).to(rows.device)
        rows[k] = torch.where(kept, piece.rows[k], 0.0) / density
    return Piece(piece.module, piece.domains, rows)
