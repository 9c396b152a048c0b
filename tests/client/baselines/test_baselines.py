"""Popularity and last-item similarity, by hand and against full score matrices."""

import numpy as np
import pytest
import torch

from fedmerge.client.baselines.rankers import last_item_similarity, popularity_ranks, popularity_scores
from fedmerge.errors import ClientError, LayoutMismatchError
from fedmerge.evaluation.ranks import target_ranks
from fedmerge.seeding import generator


def test_popularity_counts_repeats_and_leaves_unseen_items_at_zero() -> None:
    scores = popularity_scores([np.array([0, 2, 2], dtype=np.int32), np.array([2], dtype=np.int32)], 4)
    assert scores.tolist() == [1, 0, 3, 0]
    assert scores.dtype == np.float64
    assert popularity_scores([], 3).tolist() == [0, 0, 0]


def test_equal_counts_have_a_stable_order() -> None:
    scores = popularity_scores([np.array([3, 1, 3, 1, 2])], 5)
    assert np.argsort(-scores, kind="stable").tolist() == [1, 3, 2, 0, 4]


def test_popularity_ranks_by_hand() -> None:
    scores = np.array([1.0, 0.0, 3.0, 0.0])
    # The two items at 0 tie, and the tie counts against the target.
    assert popularity_ranks(scores, np.array([2, 0, 1, 3])).tolist() == [1, 2, 4, 4]
    seen = [np.array([0]), np.array([2, 2]), np.array([2, 3]), np.array([3])]
    assert popularity_ranks(scores, np.array([2, 0, 1, 3]), seen).tolist() == [1, 1, 2, 4]


def test_popularity_ranks_do_not_depend_on_the_order_of_users_or_sequences() -> None:
    rng = generator(0, "test-baselines")
    sequences = [rng.integers(0, 30, 12) for _ in range(20)]
    assert np.array_equal(popularity_scores(sequences, 30), popularity_scores(sequences[::-1], 30))
    targets = rng.integers(0, 30, 20)
    scores = popularity_scores(sequences, 30)
    forward, backward = (
        popularity_ranks(scores, targets, sequences),
        popularity_ranks(scores, targets[::-1], sequences[::-1]),
    )
    assert forward.tolist() == backward[::-1].tolist()


def test_popularity_ranks_equal_those_of_the_full_scores() -> None:
    rng = generator(1, "test-baselines")
    sequences = [rng.integers(0, 50, rng.integers(1, 20)) for _ in range(300)]
    targets = rng.integers(0, 50, 300)
    scores = popularity_scores(sequences, 50)
    before = scores.copy()
    full = torch.tensor(np.tile(scores, (300, 1)))
    for seen in (None, sequences):
        assert popularity_ranks(scores, targets, seen).tolist() == target_ranks(full, targets, seen).tolist()
    assert np.array_equal(scores, before)


def test_popularity_outside_the_catalog_is_refused() -> None:
    with pytest.raises(LayoutMismatchError, match="2 of 3"):
        popularity_scores([np.array([0, 4]), np.array([-1])], 4)


# Items on a quarter circle, 0 to 3, each closest to its neighbours.
ANGLES = torch.tensor([0.0, 0.3, 0.7, 1.2])
ITEM_VECTORS = torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1)


def test_the_last_item_is_the_first_candidate_unless_masked() -> None:
    histories = [np.array([3, 0]), np.array([3, 0])]
    targets = np.array([1, 2])
    assert last_item_similarity(ITEM_VECTORS, histories, targets).tolist() == [2, 3]
    assert last_item_similarity(ITEM_VECTORS, histories, targets, histories).tolist() == [1, 2]


def test_only_the_last_item_counts() -> None:
    targets = np.array([2])
    short = last_item_similarity(ITEM_VECTORS, [np.array([1])], targets)
    long = last_item_similarity(ITEM_VECTORS, [np.array([3, 0, 2, 1])], targets)
    assert short.tolist() == long.tolist() == [3]  # 1 itself, then 0 (0.3 away), then 2 (0.4 away)


def test_a_repeated_last_item_is_ranked_first_in_both_variants() -> None:
    histories = [np.array([1, 3])]
    for seen in (None, histories):
        assert last_item_similarity(ITEM_VECTORS, histories, np.array([3]), seen).tolist() == [1]


@pytest.mark.parametrize("block_size", [1, 9, None])
def test_last_item_similarity_equals_the_full_cosines(block_size: int | None) -> None:
    rng = generator(2, "test-baselines")
    items = torch.nn.functional.normalize(torch.tensor(rng.standard_normal((40, 5)), dtype=torch.float32), dim=1)
    histories = [rng.integers(0, 40, rng.integers(1, 8)) for _ in range(60)]
    targets = rng.integers(0, 40, 60)
    # The cosines of these vectors differ by far more than the rounding of float32.
    cosines = torch.stack([(items * items[int(history[-1])]).sum(dim=1) for history in histories])
    for seen in (None, histories):
        found = last_item_similarity(items, histories, targets, seen, block_size=block_size)
        assert found.tolist() == target_ranks(cosines, targets, seen).tolist()


def test_empty_histories_unknown_items_and_nan_are_refused() -> None:
    with pytest.raises(LayoutMismatchError, match="1 of 2 histories"):
        last_item_similarity(ITEM_VECTORS, [np.array([1]), np.array([], dtype=np.int64)], np.array([0, 0]))
    with pytest.raises(LayoutMismatchError, match="1 of 1"):
        last_item_similarity(ITEM_VECTORS, [np.array([4])], np.array([0]))
    with pytest.raises(ClientError, match="NaN"):
        last_item_similarity(ITEM_VECTORS * float("nan"), [np.array([1])], np.array([0]))
