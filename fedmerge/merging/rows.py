"""Elementwise merging methods: they map K rows of entries to K rows whose sum is the merge.

A row is one domain's update, flattened over the scope: a module, a layer, or the whole model. It comes in pieces, one
or several per module, so a scope and a module may be larger than memory. Thresholds are exact nevertheless: they take
several passes. Entries that tie with the last one that passes a threshold pass as well. Entries of 0 never pass.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import torch

from fedmerge.errors import ConfigError, MergeError
from fedmerge.merging.selection import order_statistics
from fedmerge.seeding import derive

BLOCK = 1 << 20  # entries whose ranks are held at a time


@dataclass(frozen=True, slots=True)
class Piece:
    """One module's part of K rows, or a block of its neurons.

    Attributes:
        module: name of the module.
        domains: names of the K domains.
        rows: (K, n) float32 or float64.
        width: entries of one neuron; None if the whole row is one neuron.
        first: place of the first entry within the module.
    """

    module: str
    domains: tuple[str, ...]
    rows: torch.Tensor
    width: int | None = None
    first: int = 0


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


def della(pieces: Pieces, density: float, epsilon: float, coefficient: float, seed: int) -> Iterator[torch.Tensor]:
    """DELLA: drop entries at random, small ones more often, rescale the rest, elect a sign, average what has it.

    MagPrune keeps entry i of a neuron with probability q_i and divides it by q_i, so that its expectation stays. The
    q_i rise evenly with the rank of the magnitude within the neuron, from density - ε/2 to density + ε/2.

    Args:
        pieces: the rows.
        density: mean probability that an entry is kept.
        epsilon: difference of the probabilities of a neuron's largest and smallest entry. It is narrowed where a
            probability would fall below half the density or exceed 1.
        coefficient: factor on the merge.
        seed: seed of the draws.

    Yields:
        (K, n) for every piece; the sum over K is the merge.

    Source: DELLA-Merging, arXiv:2406.11617: drop, elect, fuse, with ranks by row.
    Differs: mergekit's ``della`` restores the L1 norm of a tensor instead of dividing by q_i, and its epsilon is half
        of this one. A tie of signs yields 0, as in :func:`ties`.
    """
    return ties(lambda: (_magprune(piece, density, epsilon, seed) for piece in pieces()), 1.0, coefficient)


def della_linear(
    pieces: Pieces, density: float, epsilon: float, coefficient: float, seed: int
) -> Iterator[torch.Tensor]:
    """MagPrune of :func:`della`, then the average of all entries.

    Yields:
        (K, n) for every piece; the sum over K is the merge.

    Source: arXiv:2406.11617 without the election; ``della_linear`` of mergekit.
    """
    for piece in pieces():
        pruned = _magprune(piece, density, epsilon, seed).rows
        yield pruned.mul_(coefficient / len(pruned))


def emr_unified(pieces: Pieces, coefficient: float) -> Iterator[torch.Tensor]:
    """Elect the sign of the sum of each entry, then take the largest magnitude among the entries that have it.

    This is the unified vector of EMR-Merging, the part that is one adapter. EMR itself serves every domain another
    model, λ_k · mask_k ⊙ unified, which has no low rank. A tie of signs yields 0. Rows that share the largest
    magnitude share the entry.

    Args:
        pieces: the rows.
        coefficient: factor on the merge.

    Yields:
        (K, n) for every piece; the sum over K is the merge.

    Source: EMR-Merging, NeurIPS 2024, arXiv:2405.17461, equations of the unified task vector.
    Differs: published code resolves a tie of signs to -.
    """
    for piece in pieces():
        sign = total(piece.rows).sign().to(piece.rows.dtype)
        agreeing = (piece.rows * sign).clamp(min=0)
        largest = agreeing.amax(0)
        kept = (agreeing == largest) & (largest > 0)
        yield torch.where(kept, piece.rows, 0.0).mul_(coefficient).div_(kept.sum(0).clamp(min=1))


def consensus(pieces: Pieces, mask_threshold: float, min_domains: int, coefficient: float) -> Iterator[torch.Tensor]:
    """Consensus task arithmetic: the scaled sum, without entries that matter to few domains.

    An entry matters to domain k if |τ_k| ≥ mask_threshold · |Σ τ - τ_k|: its TALL mask. Entries that matter to no
    domain are noise, those that matter to a single one are selfish; both are dropped.

    Args:
        pieces: the rows.
        mask_threshold: λ of the TALL masks; larger values make them smaller.
        min_domains: domains to which a kept entry matters; at most K are asked for.
        coefficient: factor on the merge.

    Yields:
        (K, n) for every piece; the sum over K is the merge.

    Source: Localizing Task Information for Improved Model Merging and Compression, ICML 2024, arXiv:2405.07813.
    Differs: one λ for all domains, where the authors choose each domain's on validation.
    """
    for piece in pieces():
        summed = total(piece.rows)  # (n,) float64
        votes = torch.zeros_like(summed, dtype=torch.int32)
        for row in piece.rows:
            votes += row.abs() >= mask_threshold * (summed - row).abs()
        kept = votes >= min(min_domains, len(piece.rows))
        yield torch.where(kept, piece.rows, 0.0).mul_(coefficient)


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
    """Sum over K in float64, which is exact for float32 numbers of similar size: (n,).

    Raises:
        MergeError: the sum is not finite.
    """
    summed = torch.zeros_like(rows[0], dtype=torch.float64)
    for row in rows:
        summed += row
    if not summed.sum().isfinite():
        raise MergeError(
            "merge: the sum of the domains' entries is not finite in float32, whose largest number is 3.4e38. "
            "Give a smaller coefficient, or a larger density."
        )
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


def _generator(seed: int, purpose: str, domain: str, piece: Piece) -> np.random.Generator:
    """Return the generator of a domain's draws in a module, past the float32 draws of its entries before this piece."""
    bits = np.random.PCG64(derive(seed, purpose, domain, piece.module))
    bits.advance(piece.first // 2)  # a step of 64 bits makes two draws
    rng = np.random.Generator(bits)
    rng.random(piece.first % 2, dtype=np.float32)
    return rng


def _drop(piece: Piece, density: float, seed: int) -> Piece:
    rows = torch.empty_like(piece.rows)
    for k, domain in enumerate(piece.domains):
        drawn = _generator(seed, "dare", domain, piece).random(rows.shape[1], dtype=np.float32)
        kept = torch.from_numpy(drawn < density).to(rows.device)
        rows[k] = torch.where(kept, piece.rows[k], 0.0) / density
    return replace(piece, rows=rows)


def _magprune(piece: Piece, density: float, epsilon: float, seed: int) -> Piece:
    """Keep entries with probabilities that rise with their rank in their neuron, and divide each by its own."""
    num_entries = piece.rows.shape[1]
    width = piece.width or num_entries
    half = min(epsilon / 2, density / 2, 1 - density)
    steps = torch.linspace(-half, half, width, dtype=torch.float64) if width > 1 else torch.zeros(1).double()
    probabilities = (density + steps).to(piece.rows.device)  # (width,) by rank, smallest magnitude first
    block = max(1, BLOCK // width) * width  # ranks and probabilities of a block of neurons are in memory
    rows = torch.empty_like(piece.rows)
    for k, domain in enumerate(piece.domains):
        rng = _generator(seed, "della", domain, piece)
        for start in range(0, num_entries, block):
            entries = piece.rows[k, start : start + block].reshape(-1, width)
            drawn = torch.from_numpy(rng.random(entries.numel(), dtype=np.float32)).to(entries.device)
            order = entries.abs().argsort(dim=1, stable=True)
            kept_with = torch.empty_like(entries, dtype=torch.float64).scatter_(
                1, order, probabilities.expand(len(entries), width)
            )
            kept = drawn.reshape(entries.shape) < kept_with
            rows[k, start : start + block] = torch.where(kept, entries / kept_with, 0.0).flatten()
    return replace(piece, rows=rows)
