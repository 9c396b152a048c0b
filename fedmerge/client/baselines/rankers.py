"""Baselines, the reference rows of every table: a model that does not beat them has learned nothing worth sharing.

Popularity and last-item similarity need no training; ItemKNN and SASRec learn from a client's own users, without text.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from fedmerge.client.baselines.item_knn import choose_item_knn, item_knn_ranks
from fedmerge.client.baselines.sasrec import load_or_train_sasrec
from fedmerge.client.local_domain import LocalDomain
from fedmerge.config import Baseline, Evaluation
from fedmerge.domain.splits import Examples, evaluation_examples, train_sequences
from fedmerge.errors import LayoutMismatchError
from fedmerge.evaluation.ranks import IntArray, check_in_catalog, rank_targets, target_ranks
from fedmerge.evaluation.sums import LAST_ITEM
from fedmerge.sequence.model import SequenceSettings
from fedmerge.sequence.ranking import sequence_source

Progress = Callable[[str], None]
Ranker = Callable[[Examples, Sequence[IntArray] | None], npt.NDArray[np.int64]]
"""(examples, seen items) -> ranks."""

# Labels of the baselines' rows in tables.
BASELINE_LABELS: Mapping[Baseline, str] = {
    "popularity": "popularity",
    "last-item": LAST_ITEM,
    "item-knn": "item-knn",
    "sasrec": "sasrec",
}


def baseline_rankers(
    domain: LocalDomain,
    names: Sequence[Baseline],
    evaluation: Evaluation,
    seed: int,
    cache_dir: str,
    progress: Progress = lambda line: None,
) -> dict[str, Ranker]:
    """Make the rankers of baselines for a domain: trained, or selected on validation, where the baseline needs it.

    Args:
        domain: the client's domain.
        names: the baselines, in the order of the rows.
        evaluation: number of validation users, and the time limit of sasrec.
        seed: seed of the experiment.
        cache_dir: folder on the client's own disk, for the trained sasrec.
        progress: receives one line now and then.

    Returns:
        Row label -> ranker. sasrec has no row if it has no training data: no user has two items outside validation and
        test.
    """
    rankers: dict[str, Ranker] = {}
    for name in names:
        label = BASELINE_LABELS[name]
        if name == "popularity":
            rankers[label] = _popularity(domain)
        elif name == "last-item":
            rankers[label] = _last_item(domain)
        elif name == "item-knn":
            rankers[label] = _item_knn(domain, evaluation.validation_users, seed, progress)
        elif domain.training_sequences:
            rankers[label] = _sasrec(domain, sasrec_settings(evaluation), seed, cache_dir, progress)
        else:
            progress(
                f"{domain.manifest.name}: no row for sasrec, since no user has two items outside validation and test"
            )
    return rankers


def _popularity(domain: LocalDomain) -> Ranker:
    scores = popularity_scores(train_sequences(domain.interactions), len(domain.catalog))
    return lambda examples, seen: popularity_ranks(scores, examples.targets, seen)


def _last_item(domain: LocalDomain) -> Ranker:
    return lambda examples, seen: last_item_similarity(
        domain.backbone_item_vectors, examples.histories, examples.targets, seen
    )


def _item_knn(domain: LocalDomain, validation_users: int | None, seed: int, progress: Progress) -> Ranker:
    validation = evaluation_examples(domain.interactions, "valid", validation_users, seed)
    neighbours, choice = choose_item_knn(train_sequences(domain.interactions), len(domain.catalog), validation)
    progress(
        f"{domain.manifest.name}: item-knn with {choice.num_neighbours} neighbours, shrinkage {choice.shrinkage:g} "
        f"(validation ndcg@10 {choice.ndcg:.4f}, {len(validation)} users)"
    )
    return lambda examples, seen: item_knn_ranks(neighbours, examples.histories, examples.targets, seen)


def _sasrec(domain: LocalDomain, settings: SequenceSettings, seed: int, cache_dir: str, progress: Progress) -> Ranker:
    model = load_or_train_sasrec(domain, settings, seed, Path(cache_dir).expanduser(), progress)

    def ranks(examples: Examples, seen: Sequence[IntArray] | None) -> npt.NDArray[np.int64]:
        source = sequence_source(model, examples.histories)
        return rank_targets(source.user_vectors, source.item_vectors, examples.targets, seen)

    return ranks


def sasrec_settings(evaluation: Evaluation) -> SequenceSettings:
    """Return the settings of the sasrec baseline: fixed, except for its time limit."""
    return SequenceSettings(max_minutes=evaluation.sasrec_max_minutes)


def popularity_scores(train_sequences: Sequence[IntArray], num_items: int) -> npt.NDArray[np.float64]:
    """Count each item in the train sequences; repeats by one user count each time.

    Pass train sequences only: counts over validation or test items would leak the targets.

    Args:
        train_sequences: one array of item indices per user.
        num_items: items of the catalog.

    Returns:
        (N,) float64 counts, 0 for an unseen item. Equal counts are equal scores, so a ranking counts them against the
        target like all ties; if an order is needed, ``np.argsort(-scores, kind="stable")`` puts the lower item index
        first.

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
    """Rank the targets by popularity: every user gets the same list, most popular items first.

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
    """Rank the targets by similarity to the last item of the history, under the frozen backbone.

    user vector = item vector of the last history item. In the unmasked variant that item is itself a candidate and
    always ranks first (cosine 1), so any other target has rank 2 at best; this is reported unchanged.

    Args:
        item_vectors: (N, d), L2-normalised.
        histories: one array of item indices per user, oldest first.
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
            f"{num_empty} of {len(histories)} histories are empty; expected at least one item in each. Evaluate users "
            "with 3 items or more."
        )
    last_items = np.array([history[-1] for history in histories], dtype=np.int64)
    check_in_catalog(last_items, len(item_vectors), "the last items of the histories")
    user_vectors = item_vectors[torch.as_tensor(last_items, device=item_vectors.device)]  # (U, d)
    return rank_targets(user_vectors, item_vectors, targets, seen, block_size=block_size)
