"""ItemKNN: ranking by items that users have in common with the items of the history, without training."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from fedmerge.domain.splits import Examples
from fedmerge.evaluation.ranks import METRICS, FloatArray, IntArray, check_in_catalog, per_user_metrics, target_ranks

# The grid that validation selects from.
NUM_NEIGHBOURS = (20, 100, 200)
SHRINKAGES = (0.0, 10.0, 100.0)

SCORES_PER_BLOCK = 2**22  # 32 MiB of float64


@dataclass(frozen=True, slots=True, eq=False)
class ItemNeighbours:
    """The nearest items of every item, nearest first.

    Attributes:
        items: (N, k) int32; where an item has fewer neighbours, item 0 at similarity 0, which adds nothing.
        similarities: (N, k) float64, 0 or above.
    """

    items: npt.NDArray[np.int32]
    similarities: FloatArray

    def nearest(self, num_neighbours: int) -> "ItemNeighbours":
        """Return at most ``num_neighbours`` per item, as views."""
        return ItemNeighbours(self.items[:, :num_neighbours], self.similarities[:, :num_neighbours])


@dataclass(frozen=True, slots=True)
class ItemKnnChoice:
    """The selected parameters, and their NDCG@10 on validation."""

    num_neighbours: int
    shrinkage: float
    ndcg: float


def item_neighbours(
    train_sequences: Sequence[IntArray], num_items: int, num_neighbours: int, shrinkage: float = 0.0
) -> ItemNeighbours:
    """Find the nearest items by the cosine between columns of the binary user-item matrix of the train sequences.

    s_ij = c_ij / (√(n_i n_j) + h) for i ≠ j, where n_i users have item i and c_ij users have both.

    Args:
        train_sequences: one array of item indices per user; an item counts once per user.
        num_items: N, items of the catalog.
        num_neighbours: k; of equally similar items the one with the lower index is nearer.
        shrinkage: h; lowers similarities that are based on few users.

    Raises:
        LayoutMismatchError: an item index outside the catalog.

    Source: Deshpande and Karypis, Item-based top-N recommendation algorithms, TOIS 2004; the shrinkage as in Ferrari
        Dacrema et al., Are we really making much progress?, RecSys 2019.
    """
    distinct = [np.unique(sequence).astype(np.int64) for sequence in train_sequences]
    bought = np.concatenate([np.zeros(0, dtype=np.int64), *distinct])
    check_in_catalog(bought, num_items, "the train sequences")
    num_users = np.bincount(bought, minlength=num_items)  # (N,) of each item
    users = np.repeat(np.arange(len(distinct)), [len(items) for items in distinct])
    buyers = np.split(users[np.argsort(bought, kind="stable")], np.cumsum(num_users)[:-1])  # N arrays of users
    neighbours = np.zeros((num_items, num_neighbours), dtype=np.int32)
    similarities = np.zeros((num_items, num_neighbours))
    for item, its_buyers in enumerate(buyers):
        if not len(its_buyers):
            continue
        candidates, together = _counted(np.concatenate([distinct[user] for user in its_buyers]), num_items)
        others = candidates != item
        candidates, together = candidates[others], together[others]
        cosines = together / (np.sqrt(num_users[item] * num_users[candidates]) + shrinkage)
        nearest = np.argsort(-cosines, kind="stable")[:num_neighbours]
        neighbours[item, : len(nearest)] = candidates[nearest]
        similarities[item, : len(nearest)] = cosines[nearest]
    return ItemNeighbours(neighbours, similarities)


def _counted(items: npt.NDArray[np.int64], num_items: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the distinct items in ascending order, and how often each occurs; few items never cost a whole catalog."""
    if len(items) < num_items // 8:
        return np.unique(items, return_counts=True)
    counts = np.bincount(items, minlength=num_items)
    found = np.flatnonzero(counts)
    return found, counts[found]


def item_knn_ranks(
    neighbours: ItemNeighbours,
    histories: Sequence[IntArray],
    targets: IntArray,
    seen: Sequence[IntArray] | None = None,
    *,
    block_size: int | None = None,
) -> npt.NDArray[np.int64]:
    """Rank the targets by the sum of their similarities to the items of the history.

    score_uj = Σ s_ij over the items i in the history of u that have j among their neighbours; without any such item the
    score is 0, and these items tie.

    Args:
        neighbours: result of :func:`item_neighbours`.
        histories: one array of item indices per user; repeats and order do not matter.
        targets: (U,) item indices.
        seen: as in :func:`fedmerge.evaluation.ranks.target_ranks`; None is the unmasked variant.
        block_size: users scored at once; None: as many as have about four million scores.

    Returns:
        (U,) int64 ranks from 1.

    Raises:
        LayoutMismatchError: item indices outside the catalog.
    """
    num_items = len(neighbours.items)
    check_in_catalog(np.concatenate([np.zeros(0, dtype=np.int64), *histories]), num_items, "the histories")
    size = block_size or max(1, SCORES_PER_BLOCK // max(1, num_items))
    ranks = np.zeros(len(histories), dtype=np.int64)
    for start in range(0, len(histories), size):
        span = slice(start, start + size)
        distinct = [np.unique(history) for history in histories[span]]  # sorted, so sums do not depend on the order
        rows = np.repeat(np.arange(len(distinct)), [len(items) for items in distinct])
        items = np.concatenate(distinct)
        cells = rows[:, None] * num_items + neighbours.items[items]  # (history items, k)
        weights = neighbours.similarities[items]
        scores = np.bincount(cells.ravel(), weights.ravel(), minlength=len(distinct) * num_items)
        block = torch.from_numpy(scores.reshape(len(distinct), num_items))
        ranks[span] = target_ranks(block, targets[span], None if seen is None else seen[span])
    return ranks


def choose_item_knn(
    train_sequences: Sequence[IntArray], num_items: int, validation: Examples
) -> tuple[ItemNeighbours, ItemKnnChoice]:
    """Select the neighbours that rank the validation users best (NDCG@10, unmasked) in NUM_NEIGHBOURS x SHRINKAGES.

    Args:
        train_sequences: as in :func:`item_neighbours`.
        num_items: N.
        validation: examples of the split ``valid``; of equally good parameters the first in the grid is taken.
    """
    return max(_try_grid(train_sequences, num_items, validation), key=lambda tried: tried[1].ndcg)


def _try_grid(
    train_sequences: Sequence[IntArray], num_items: int, validation: Examples
) -> Iterator[tuple[ItemNeighbours, ItemKnnChoice]]:
    for shrinkage in SHRINKAGES:
        widest = item_neighbours(train_sequences, num_items, max(NUM_NEIGHBOURS), shrinkage)
        for num_neighbours in NUM_NEIGHBOURS:
            neighbours = widest.nearest(num_neighbours)
            ranks = item_knn_ranks(neighbours, validation.histories, validation.targets)
            ndcg = float(per_user_metrics(ranks)[:, METRICS.index("ndcg@10")].mean())
            yield neighbours, ItemKnnChoice(num_neighbours, shrinkage, ndcg)
