"""Reference rows beside every table: what does not beat them has learned nothing worth sharing about users.

Popularity and last-item similarity need no training; ItemKNN and SASRec know a client's own users and no text.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from fedmerge.client.baselines.item_knn import choose_item_knn, item_knn_ranks
from fedmerge.client.baselines.sasrec import Settings, load_or_train_sasrec, sasrec_ranks
from fedmerge.client.local_domain import LocalDomain
from fedmerge.config import Baseline, Evaluation, ExperimentConfig
from fedmerge.domain.splits import Examples, evaluation_examples, train_sequences
from fedmerge.errors import LayoutMismatchError
from fedmerge.evaluation.ranks import IntArray, check_in_catalog, rank_targets, target_ranks

Progress = Callable[[str], None]
Ranker = Callable[[Examples, Sequence[IntArray] | None], npt.NDArray[np.int64]]  # examples and seen items to ranks

# The row of each baseline in a table.
BASELINE_LABELS: Mapping[Baseline, str] = {
    "popularity": "popularity",
    "last-item": "last item",
    "item-knn": "item-knn",
    "sasrec": "sasrec",
}


def baseline_rankers(
    domain: LocalDomain, config: ExperimentConfig, names: Sequence[Baseline], progress: Progress = lambda line: None
) -> dict[str, Ranker]:
    """What ranks the users of a domain under each baseline; trained, or chosen on validation, where it has to be.

    Args:
        domain: the client's own.
        config: evaluation, seed and cache_dir count.
        names: which, in the order of the rows.
        progress: receives one line now and then.

    Returns:
        Row label -> ranker. sasrec has no row where no user has two items outside validation and test, since there is
        nothing to train on.
    """
    rankers = {BASELINE_LABELS[name]: _MAKERS[name](domain, config, progress) for name in names}
    return {label: ranker for label, ranker in rankers.items() if ranker is not None}


def _popularity(domain: LocalDomain, config: ExperimentConfig, progress: Progress) -> Ranker:
    scores = popularity_scores(train_sequences(domain.interactions), len(domain.catalog))
    return lambda examples, seen: popularity_ranks(scores, examples.targets, seen)


def _last_item(domain: LocalDomain, config: ExperimentConfig, progress: Progress) -> Ranker:
    return lambda examples, seen: last_item_similarity(
        domain.backbone_item_vectors, examples.histories, examples.targets, seen
    )


def _item_knn(domain: LocalDomain, config: ExperimentConfig, progress: Progress) -> Ranker:
    validation = evaluation_examples(domain.interactions, "valid", config.evaluation.validation_users, config.seed)
    neighbours, choice = choose_item_knn(train_sequences(domain.interactions), len(domain.catalog), validation)
    progress(
        f"{domain.manifest.name}: item-knn chose {choice.num_neighbours} neighbours, shrinkage {choice.shrinkage:g} "
        f"(validation ndcg@10 {choice.ndcg:.4f}, {len(validation)} users)"
    )
    return lambda examples, seen: item_knn_ranks(neighbours, examples.histories, examples.targets, seen)


def sasrec_settings(evaluation: Evaluation) -> Settings:
    """Return the settings of the sasrec baseline: fixed, except for its time limit."""
    return Settings(max_minutes=evaluation.sasrec_max_minutes)


def _sasrec(domain: LocalDomain, config: ExperimentConfig, progress: Progress) -> Ranker | None:
    if not domain.training_sequences:
        progress(f"{domain.manifest.name}: no row of sasrec: no user has two items outside validation and test")
        return None
    cache_dir = Path(config.cache_dir).expanduser()
    model = load_or_train_sasrec(domain, sasrec_settings(config.evaluation), config.seed, cache_dir, progress)
    return lambda examples, seen: sasrec_ranks(model, examples.histories, examples.targets, seen)


_MAKERS: Mapping[Baseline, Callable[[LocalDomain, ExperimentConfig, Progress], Ranker | None]] = {
    "popularity": _popularity,
    "last-item": _last_item,
    "item-knn": _item_knn,
    "sasrec": _sasrec,
}


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
        seen: as in :func:`fedmerge.evaluation.ranks.target_ranks`; None is the unmasked variant.

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
        seen: as in :func:`fedmerge.evaluation.ranks.target_ranks`; None is the unmasked variant, ``histories``
            the masked one.
        block_size: as in :func:`fedmerge.evaluation.ranks.rank_targets`.

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
