"""From scores to a list: what may be in it, popularity, the best, and diversity."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from fedmerge.errors import ConfigError
from fedmerge.evaluation.ranks import IntArray
from fedmerge.sequence.fusion import standardise

POOL_PER_ITEM, SMALLEST_POOL = 10, 100  # candidates that a diverse list of k items is chosen from
BoolArray = npt.NDArray[np.bool_]
Scores = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Listing:
    """How a list is made of scores.

    Attributes:
        k: number of items, at least 1.
        keep_seen: True if items of the history may be in the list.
        allowed: (N,) True for items that may be in the list; None: all.
        diversity: λ in [0, 1] of :func:`diversified`; 0 takes the best k.
        popularity: w in [0, 1] of :func:`blended`; 0 leaves the scores as they are.

    Raises:
        ConfigError: a value outside its bounds.
    """

    k: int = 10
    keep_seen: bool = False
    allowed: BoolArray | None = None
    diversity: float = 0.0
    popularity: float = 0.0

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigError(f"recommend: k is {self.k}, expected at least 1.")
        for name, value in (("diversity", self.diversity), ("popularity", self.popularity)):
            if not 0 <= value <= 1:
                raise ConfigError(f"recommend: {name} is {value}, expected a number from 0 to 1.")

    @property
    def pool(self) -> int:
        """Number of best items that the list is chosen from."""
        return self.k if self.diversity == 0 else max(SMALLEST_POOL, POOL_PER_ITEM * self.k)


def popularity_source(counts: npt.NDArray[np.float64]) -> torch.Tensor:
    """Return log(1 + count) of N items, standardised over the catalog; zeros if all counts are equal."""
    return standardise(torch.from_numpy(np.log1p(counts)).float()[None])[0]


def blended(scores: torch.Tensor, popularity: torch.Tensor, weight: float) -> torch.Tensor:
    """Return (1 − w) · standardised scores + w · popularity, (U, N); the scores are overwritten.

    Args:
        scores: (U, N).
        popularity: (N,) of :func:`popularity_source`.
        weight: w in [0, 1].
    """
    return standardise(scores).mul_(1 - weight).add_(popularity, alpha=weight)


def select(
    scores: Scores,
    item_vectors: torch.Tensor,
    seen: IntArray,
    listing: Listing,
    rows: npt.NDArray[np.int64] | None = None,
) -> npt.NDArray[np.int64]:
    """Return the positions of one user's list, best first.

    Args:
        scores: (N,), popularity included; or (P,) of some items.
        item_vectors: (N, d), L2-normalised; read for a diverse list only.
        seen: positions of the history.
        listing: how the list is made.
        rows: (P,) positions of the items that are scored; None: all.

    Returns:
        At most k positions.
    """
    candidates = scores.copy()
    if listing.allowed is not None:
        candidates[~(listing.allowed if rows is None else listing.allowed[rows])] = -np.inf
    if not listing.keep_seen:
        candidates[seen if rows is None else np.isin(rows, seen)] = -np.inf
    pool = best(candidates, listing.pool)
    positions = pool if rows is None else rows[pool]
    if listing.diversity == 0:
        return positions
    vectors = item_vectors[torch.from_numpy(positions)].numpy()
    return positions[diversified(candidates[pool], vectors, listing.k, listing.diversity)]


def best(scores: Scores, k: int) -> npt.NDArray[np.int64]:
    """Return the positions of the k highest scores above −∞, highest first, of equal scores the first position first.

    >>> best(np.array([1, 3, 3, -np.inf, 2], dtype=np.float32), 3)
    array([1, 2, 4])
    """
    found = np.arange(len(scores))
    if k < len(scores):
        found = np.flatnonzero(scores >= np.partition(scores, len(scores) - k)[len(scores) - k])
    found = found[scores[found] > -np.inf]
    return found[np.argsort(-scores[found], kind="stable")[:k]]


def diversified(scores: Scores, vectors: Scores, k: int, diversity: float) -> npt.NDArray[np.int64]:
    """Choose k of P candidates by maximal marginal relevance, one after the other.

    next = argmax over the rest of  (1 − λ) · r_i − λ · max over the chosen j of ⟨x_i, x_j⟩,  r the scores, scaled to
    0 … 1 over the candidates; the maximum over nothing is 0. Of equal values the first candidate is taken.

    Args:
        scores: (P,), highest first.
        vectors: (P, d), L2-normalised.
        k: at most this many.
        diversity: λ in [0, 1].

    Returns:
        Indices into the candidates, in the order in which they were chosen.

    Source: Carbonell and Goldstein, The use of MMR, SIGIR 1998, whose λ is 1 − λ here.
    Differs: relevance is scaled, since cosines and standardised scores have other ranges than the similarity.
    """
    if not len(scores):
        return np.zeros(0, dtype=np.int64)
    spread = scores[0] - scores[-1]
    relevance = (scores - scores[-1]) / spread if spread > 0 else np.zeros_like(scores)
    nearest = np.zeros_like(relevance)  # similarity to the nearest chosen one
    chosen: list[int] = []
    for _ in range(min(k, len(scores))):
        value = (1 - diversity) * relevance - diversity * nearest
        value[chosen] = -np.inf
        chosen.append(int(value.argmax()))
        similarity = vectors @ vectors[chosen[-1]]
        nearest = similarity if len(chosen) == 1 else np.maximum(nearest, similarity)
    return np.array(chosen, dtype=np.int64)
