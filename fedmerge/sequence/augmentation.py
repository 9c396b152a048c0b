"""Augmentations of a history of items, CoSeRec-style: crop, mask, reorder, insert, substitute.

Every one is a pure function of the history, its rate and a generator. Inserted items come from a table of similar items
and are never among ``forbidden``: the target, and what the user took after it.
"""

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from fedmerge.config import AUGMENTATIONS
from fedmerge.evaluation.ranks import FloatArray, IntArray

SHORT_HISTORY = 4  # items; shorter histories are neither cropped nor reordered, as in CoSeRec's script for Sports
NEIGHBOURS = 10  # similar items of each item, so that one is left where the nearest ones are forbidden

Rates = Mapping[str, float]


def augmented(
    history: IntArray,
    rates: Rates,
    similar: IntArray | None,
    forbidden: Collection[int],
    rng: np.random.Generator,
) -> IntArray:
    """Return a history under one augmentation, drawn evenly among those that the rates name.

    Histories of at most SHORT_HISTORY items are not cropped or reordered; where nothing else is named they stay.

    Args:
        history: item indices, oldest first, at least one.
        rates: augmentation -> its rate, in (0, 1].
        similar: (N, k) of :func:`insert`; None where neither insert nor substitute is named.
        forbidden: items that must not be inserted.
        rng: decides the augmentation and its positions.

    Source: CoSeRec, arXiv:2108.06479.
    Differs: a masked item is left out, since a text has no mask item; at least two items are reordered and one item is
        kept, since histories are short; one similar item at each position; the similar item is never the target or a
        later item.
    """
    short = len(history) <= SHORT_HISTORY
    names = [name for name in AUGMENTATIONS if name in rates and not (short and name in ("crop", "reorder"))]
    if not names:
        return history
    name = names[int(rng.integers(len(names)))]
    if name == "crop":
        return crop(history, rates[name], rng)
    if name == "mask":
        return mask(history, rates[name], rng)
    if name == "reorder":
        return reorder(history, rates[name], rng)
    if similar is None:
        raise ValueError(f"{name} needs a table of similar items: pass one row for each item of the catalog")
    return (insert if name == "insert" else substitute)(history, rates[name], similar, forbidden, rng)


def crop(history: IntArray, rate: float, rng: np.random.Generator) -> IntArray:
    """Return max(1, ⌊rate · n⌋) consecutive items."""
    size = max(1, _share(rate, len(history)))
    start = int(rng.integers(len(history) - size + 1))
    return history[start : start + size]


def mask(history: IntArray, rate: float, rng: np.random.Generator) -> IntArray:
    """Leave out ⌊rate · n⌋ items, but for one; the others keep their order."""
    dropped = min(_share(rate, len(history)), len(history) - 1)
    return history[np.sort(rng.permutation(len(history))[dropped:])]


def reorder(history: IntArray, rate: float, rng: np.random.Generator) -> IntArray:
    """Shuffle max(2, ⌊rate · n⌋) consecutive items."""
    size = min(len(history), max(2, _share(rate, len(history))))
    start = int(rng.integers(len(history) - size + 1))
    moved = history.copy()
    moved[start : start + size] = rng.permutation(history[start : start + size])
    return moved


def insert(
    history: IntArray, rate: float, similar: IntArray, forbidden: Collection[int], rng: np.random.Generator
) -> IntArray:
    """Put the most similar item before each of max(1, ⌊rate · n⌋) items; the result has at most 2 n items.

    Args:
        history: item indices, oldest first.
        rate: share of the positions.
        similar: (N, k), the items most similar to each item, the nearest first.
        forbidden: items that must not be inserted; the next similar one is.
        rng: decides the positions.
    """
    items: list[int] = []
    chosen = _positions(len(history), rate, rng)
    for position, item in enumerate(history.tolist()):
        if position in chosen and (nearest := _nearest(similar, item, forbidden)) is not None:
            items.append(nearest)
        items.append(item)
    return np.array(items, dtype=history.dtype)


def substitute(
    history: IntArray, rate: float, similar: IntArray, forbidden: Collection[int], rng: np.random.Generator
) -> IntArray:
    """Put the most similar item in place of each of max(1, ⌊rate · n⌋) items; arguments as for :func:`insert`."""
    items = history.copy()
    for position in _positions(len(history), rate, rng):
        if (nearest := _nearest(similar, int(history[position]), forbidden)) is not None:
            items[position] = nearest
    return items


def segment(num_items: int, rng: np.random.Generator) -> slice:
    """Draw a segment of 1 … ⌊n / 2⌋ of n ≥ 2 consecutive items, its length and its place evenly."""
    size = 1 + int(rng.integers(num_items // 2))
    start = int(rng.integers(num_items - size + 1))
    return slice(start, start + size)


def forbidden_items(history: IntArray, later: IntArray) -> frozenset[int]:
    """Return the items that an augmentation of a history must not insert: its target and those after, if not in it."""
    return frozenset(later.tolist()) - frozenset(history.tolist())


def most_similar(
    vectors: npt.NDArray[np.float32],
    neighbours: IntArray | None = None,
    similarities: npt.NDArray[np.float64] | None = None,
    rows_per_block: int = 512,
) -> npt.NDArray[np.int32]:
    """Return the items most similar to each item, nearest first, by max(c_ij, s_ij / max s).

    c_ij is the cosine of two items, scaled to [0, 1] over all pairs, since the cosines of many encoders are all large.

    Args:
        vectors: (N, d) item vectors, L2-normalised.
        neighbours: (N, k) items with a similarity s above 0 counted in train sequences; None: cosines alone.
        similarities: (N, k) their s; 0 where an item has fewer neighbours.
        rows_per_block: items whose similarities to all others are held at once.

    Returns:
        (N, min(NEIGHBOURS, N − 1)); no item is its own neighbour. Of equally similar items the one with the lower index
        is nearer, unless more than NEIGHBOURS are as similar as the last.

    Source: CoSeRec's hybrid of item-to-item counts and representations, both scaled.
    Differs: cosines of a frozen encoder in place of the model's own inner products after some epochs.
    """
    num_items = len(vectors)
    k = min(NEIGHBOURS, num_items - 1)
    found = np.empty((num_items, k), dtype=np.int32)
    if not k:
        return found
    blocks = [np.arange(start, min(start + rows_per_block, num_items)) for start in range(0, num_items, rows_per_block)]
    low = min(float(_cosines(vectors, rows, math.inf).min()) for rows in blocks)
    high = max(float(_cosines(vectors, rows, -math.inf).max()) for rows in blocks)
    largest = 0.0 if similarities is None or not similarities.size else float(similarities.max())
    for rows in blocks:
        scores = (_cosines(vectors, rows, -math.inf) - low) / max(high - low, 1e-12)  # (block, N)
        if neighbours is not None and similarities is not None and largest > 0:
            row, column = np.nonzero(similarities[rows])
            items = neighbours[rows][row, column]
            scores[row, items] = np.maximum(scores[row, items], similarities[rows][row, column] / largest)
        nearest = np.sort(np.argpartition(-scores, k - 1, axis=1)[:, :k], axis=1)
        order = np.argsort(-np.take_along_axis(scores, nearest, axis=1), axis=1, kind="stable")
        found[rows] = np.take_along_axis(nearest, order, axis=1)
    return found


def _cosines(vectors: npt.NDArray[np.float32], rows: npt.NDArray[np.int64], of_itself: float) -> FloatArray:
    """Return the cosines (block, N) of some items to all, with a value in place of that of an item to itself."""
    cosines = (vectors[rows] @ vectors.T).astype(np.float64)
    cosines[np.arange(len(rows)), rows] = of_itself
    return cosines


def _share(rate: float, num_items: int) -> int:
    return math.floor(rate * num_items + 1e-9)  # 0.7 of 10 items are 7, however 0.7 is rounded


def _positions(num_items: int, rate: float, rng: np.random.Generator) -> Sequence[int]:
    return sorted(rng.permutation(num_items)[: max(1, _share(rate, num_items))].tolist())


def _nearest(similar: IntArray, item: int, forbidden: Collection[int]) -> int | None:
    return next((other for other in similar[item].tolist() if other not in forbidden), None)
