"""Full ranking with one relevant item per user: ranks, Recall, NDCG and MRR of each user.

To add a metric, add its name to METRICS and its column to ``per_user_metrics``. Sums, intervals and tables follow.

Per-user outcomes stay at the client. Only their sums may leave it: :mod:`fedmerge.evaluation.sums`.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedmerge.errors import DivergedError, LayoutMismatchError

IntArray = npt.NDArray[np.integer[Any]]
FloatArray = npt.NDArray[np.float64]
CUTOFFS: tuple[int, ...] = (1, 5, 10, 50)
METRICS: tuple[str, ...] = (*(f"recall@{k}" for k in CUTOFFS), *(f"ndcg@{k}" for k in CUTOFFS), "mrr")
SELECTION_METRIC = "ndcg@10"  # selects adapters in training, and variants of merges: its mean over domains, unmasked
# Scores in memory at once by default: 16 MiB of float32.
_SCORES_PER_BLOCK = 2**22


def target_ranks(
    scores: torch.Tensor, targets: IntArray, seen: Sequence[IntArray] | None = None, *, block_size: int | None = None
) -> npt.NDArray[np.int64]:
    """Return the rank of each user's target among all items; ties count against the target.

    rank = 1 + #{candidates i other than the target : score_i >= score_target}

    Args:
        scores: (U, N) floating point; higher is better. An expanded view is not materialised.
        targets: (U,) item index of each user's one relevant item.
        seen: one array of item indices per user, repeats allowed. These items are not candidates, except the target
            itself: the masked variant. None is the unmasked variant.
        block_size: users ranked at once; None limits a block to about four million scores.

    Returns:
        (U,) int64 ranks from 1.

    Raises:
        LayoutMismatchError: shapes or item indices do not fit the scores.
        DivergedError: scores are NaN or infinite.

    >>> target_ranks(torch.tensor([[0.9, 0.5, 0.5, 0.1]]), np.array([2]))
    array([3])
    >>> target_ranks(torch.tensor([[0.9, 0.5, 0.5, 0.1]]), np.array([2]), [np.array([0, 2, 0])])
    array([2])
    """
    if scores.ndim != 2:
        raise LayoutMismatchError(f"scores have shape {tuple(scores.shape)}; expected (users, items)")
    num_users, num_items = scores.shape
    _check_indices(num_users, num_items, targets, seen)
    spans = _row_spans(num_users, num_items, block_size)
    with torch.no_grad():
        return _rank_blocks(((span, scores[span]) for span in spans), targets, seen)


def rank_targets(
    user_vectors: torch.Tensor,
    item_vectors: torch.Tensor,
    targets: IntArray,
    seen: Sequence[IntArray] | None = None,
    *,
    block_size: int | None = None,
) -> npt.NDArray[np.int64]:
    """Return ranks as :func:`target_ranks` does, from inner-product scores computed in float32 block by block.

    score = <user vector, item vector>, the cosine if both are L2-normalised. No (U, N) matrix is formed. Autocast is
    disabled inside, since half-precision scores would tie items whose vectors differ.

    Args:
        user_vectors: (U, d).
        item_vectors: (N, d), on the same device.
        targets: (U,) item index of each user's one relevant item.
        seen: as in :func:`target_ranks`.
        block_size: users scored at once; None limits a block to about four million scores.

    Returns:
        (U,) int64 ranks from 1.

    Raises:
        LayoutMismatchError: vectors of different width, or item indices outside the catalog.
        DivergedError: scores are NaN or infinite.
    """
    if user_vectors.ndim != 2 or item_vectors.ndim != 2 or user_vectors.shape[1] != item_vectors.shape[1]:
        raise LayoutMismatchError(
            f"user vectors have shape {tuple(user_vectors.shape)} and item vectors {tuple(item_vectors.shape)}; "
            "expected (users, d) and (items, d) from one encoder"
        )
    num_users, num_items = user_vectors.shape[0], item_vectors.shape[0]
    _check_indices(num_users, num_items, targets, seen)
    spans = _row_spans(num_users, num_items, block_size)
    with torch.no_grad(), torch.autocast(item_vectors.device.type, enabled=False):
        catalog_by_column = item_vectors.float().T  # (d, N)
        return _rank_blocks(((span, user_vectors[span].float() @ catalog_by_column) for span in spans), targets, seen)


def _row_spans(num_users: int, num_items: int, block_size: int | None) -> Iterator[slice]:
    if block_size is None:
        block_size = max(1, _SCORES_PER_BLOCK // max(1, num_items))
    if block_size < 1:
        raise ValueError(f"block_size is {block_size}; expected at least 1 user, or None for the default")
    return (slice(start, min(start + block_size, num_users)) for start in range(0, num_users, block_size))


def _check_indices(num_users: int, num_items: int, targets: IntArray, seen: Sequence[IntArray] | None) -> None:
    if targets.shape != (num_users,):
        raise LayoutMismatchError(
            f"targets have shape {targets.shape}; expected one item for each of {num_users} users"
        )
    check_in_catalog(targets, num_items, "targets")
    if seen is None:
        return
    if len(seen) != num_users:
        raise LayoutMismatchError(f"found histories of {len(seen)} users; expected one for each of {num_users} users")
    if num_users:
        check_in_catalog(np.concatenate(seen), num_items, "histories")


def check_in_catalog(items: IntArray, num_items: int, what: str) -> None:
    """Raise on item indices outside 0 .. num_items - 1; a negative one would silently count from the end.

    Raises:
        LayoutMismatchError: gives the number of such indices and names ``what``.
    """
    num_outside = int(np.count_nonzero((items < 0) | (items >= num_items)))
    if num_outside:
        raise LayoutMismatchError(
            f"{num_outside} of {items.size} item indices in {what} are outside the catalog of {num_items} items; "
            "rank against the catalog that the interactions were written with"
        )


def _rank_blocks(
    blocks: Iterable[tuple[slice, torch.Tensor]], targets: IntArray, seen: Sequence[IntArray] | None
) -> npt.NDArray[np.int64]:
    ranks = np.zeros(len(targets), dtype=np.int64)
    num_non_finite = num_scores = 0
    for span, scores in blocks:  # scores (b, N)
        num_scores += scores.numel()
        # A float64 sum of finite float32 numbers cannot overflow, so one read-only pass finds NaN and infinity.
        if not math.isfinite(scores.sum(dtype=torch.float64).item()):
            num_in_block = int((~torch.isfinite(scores)).sum())
            num_non_finite += num_in_block
            if num_in_block:
                continue
        target = torch.as_tensor(targets[span].astype(np.int64), device=scores.device)  # (b,)
        at_least = scores >= scores.gather(1, target[:, None])  # (b, N) bool
        if seen is not None:
            histories = seen[span]
            rows = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
            columns = np.concatenate(histories).astype(np.int64)
            pairs = torch.as_tensor(np.stack([rows, columns]), device=scores.device)  # (2, history items)
            at_least[pairs[0], pairs[1]] = False
        at_least.scatter_(1, target[:, None], False)  # the target never competes with itself
        ranks[span] = (1 + at_least.sum(dim=1)).cpu().numpy()
    if num_non_finite:
        raise DivergedError(
            f"ranking of {len(targets)} users: {num_non_finite} of {num_scores} scores are NaN or infinite; "
            "expected finite scores. The adapter or the encoder has diverged: lower its learning rate, "
            "or leave this adapter out of the merge"
        )
    return ranks


def selection_score(ranks: IntArray) -> float:
    """Return the mean of SELECTION_METRIC over users, from their (U,) ranks."""
    return float(per_user_metrics(ranks)[:, METRICS.index(SELECTION_METRIC)].mean())


def per_user_metrics(ranks: IntArray) -> FloatArray:
    """Compute the outcomes of every user, for one relevant item each.

    recall@k = [rank <= k],  ndcg@k = [rank <= k] / log2(1 + rank),  mrr = 1 / rank

    Args:
        ranks: (U,) ranks from 1.

    Returns:
        (U, len(METRICS)) float64, columns in the order of METRICS. It stays at the client; only its
        :func:`~fedmerge.evaluation.sums.metric_sums` leave.

    Raises:
        ValueError: a rank is below 1.

    >>> dict(zip(METRICS, per_user_metrics(np.array([3]))[0].tolist()))["ndcg@5"]
    0.5
    """
    if ranks.ndim != 1 or (ranks.size and int(ranks.min()) < 1):
        raise ValueError(
            f"ranks have shape {ranks.shape} and minimum {ranks.min(initial=1)}; expected (users,) and ranks from 1"
        )
    rank = ranks.astype(np.float64)[:, None]  # (U, 1)
    hits = (rank <= np.array(CUTOFFS)).astype(np.float64)  # (U, cutoffs)
    return np.concatenate([hits, hits / np.log2(1.0 + rank), 1.0 / rank], axis=1)
