"""Two baselines without training, shown beside every table: what does not beat them has learned nothing about users."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from fedmerge.client.metrics import IntArray, check_in_catalog, rank_targets, target_ranks
from fedmerge.errors import LayoutMismatchError


def popularity_scores(train_sequences: Sequence[IntArray], num_items: int) -> npt.NDArray[np.float64]:
    """How often each item occurs in the train sequences; repeats by one user count each time.

    Pass train sequences only: counts over validation or test items would leak the targets.

    Args:
        train_sequences: one array of item indices a user.
        num_items: items of the catalog.

    Returns:
        (N,) float64 counts, 0 for an item never seen. Equal counts stay equal scores, so a ranking counts them against
        the target like all ties; where an order is needed, ``np.argsort(-scores, kind="stable")`` puts the lower item
        index first.

    Raises:
        LayoutMismatchError: an item index outside the catalog.

    >>> popularity_scores([np.array([0, 2, 2]), np.array([2])], 4)
    array([1., 0., 3., 0.])
    """
    items = np.concatenate([np.zeros(0, dtype=np.int64), *train_sequences])
    check_in_catalog(items, num_items, "the train sequences")
    return np.bincount(items, minlength=num_items).astype(np.float64)


def popularity_ranks(
    scores: npt.NDArray[np.float64], targets: IntArray, seen: Sequence[IntArray] | None = None
) -> npt.NDArray[np.int64]:
    """Ranks of the targets when every user is shown the same items, most popular first.

    Args:
        scores: (N,) of :func:`popularity_scores`; one row for all users, never copied per user.
        targets: (U,) item indices.
        seen: as in :func:`fedmerge.client.metrics.target_ranks`; None is the unmasked variant.

    Returns:
        (U,) int64 ranks from 1.
    """
    row = torch.from_numpy(scores)
    return target_ranks(row.expand(len(targets), -1), targets, seen)


def last_item_similarity(
    item_vectors: torch.Tensor,
    histories: Sequence[IntArray],
    targets: IntArray,
    seen: Sequence[IntArray] | None = None,
    *,
    block_size: int | None = None,
) -> npt.NDArray[np.int64]:
    """Ranks of the targets by similarity to the last item of the history, under the frozen backbone.

    user vector = item vector of the last history item. In the unmasked variant that item is itself a candidate and
    always the first one (cosine 1), so any other target has rank 2 at best; this is reported as it is.

    Args:
        item_vectors: (N, d), L2-normalised.
        histories: one array of item indices a user, oldest first.
        targets: (U,) item indices.
        seen: as in :func:`fedmerge.client.metrics.target_ranks`; None is the unmasked variant, ``histories`` the masked
            one.
        block_size: as in :func:`fedmerge.client.metrics.rank_targets`.

    Returns:
        (U,) int64 ranks from 1.

    Raises:
        LayoutMismatchError: an empty history, or item indices outside the catalog.
    """
    num_empty = sum(len(history) == 0 for history in histories)
    if num_empty:
        raise LayoutMismatchError(
            f"{num_empty} of {len(histories)} histories are empty; expected at least one item each: evaluate users "
            "with 3 or more"
        )
    last_items = np.array([history[-1] for history in histories], dtype=np.int64)
    check_in_catalog(last_items, len(item_vectors), "the last items of the histories")
    user_vectors = item_vectors[torch.as_tensor(last_items, device=item_vectors.device)]  # (U, d)
    return rank_targets(user_vectors, item_vectors, targets, seen, block_size=block_size)
