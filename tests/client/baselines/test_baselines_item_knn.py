"""ItemKNN by hand, and against a slow one with Python sets."""

import math
from collections.abc import Sequence

import numpy as np
import pytest

from fedmerge.client.baselines.item_knn import (
    NUM_NEIGHBOURS,
    SHRINKAGES,
    choose_item_knn,
    item_knn_ranks,
    item_neighbours,
)
from fedmerge.domain.splits import Examples
from fedmerge.errors import LayoutMismatchError
from fedmerge.evaluation.ranks import METRICS, IntArray, per_user_metrics
from fedmerge.seeding import generator

NUM_ITEMS = 40
BASKETS = [np.array([0, 1]), np.array([1, 0, 1]), np.array([2, 0]), np.array([3])]


def random_sequences(num_users: int, seed: int) -> list[IntArray]:
    rng = generator(seed, "test-item-knn")
    return [rng.integers(0, NUM_ITEMS, rng.integers(1, 9)) for _ in range(num_users)]


def test_neighbours_by_hand() -> None:
    # Users of the items: three of 0, two of 1, one of 2, one of 3; nobody has 4.
    found = item_neighbours(BASKETS, 5, 2)
    assert found.items.tolist() == [[1, 2], [0, 0], [0, 0], [0, 0], [0, 0]]
    two, one = 2 / math.sqrt(6), 1 / math.sqrt(3)
    expected = np.array([[two, one], [two, 0.0], [one, 0.0], [0.0, 0.0], [0.0, 0.0]])
    np.testing.assert_allclose(found.similarities, expected, rtol=1e-15)


def test_the_rest_of_a_large_catalog_changes_no_neighbours() -> None:
    sequences = random_sequences(60, 0)
    small, large = (item_neighbours(sequences, num_items, 5, 1.0) for num_items in (NUM_ITEMS, 10_000))
    assert np.array_equal(large.items[:NUM_ITEMS], small.items)
    assert np.array_equal(large.similarities[:NUM_ITEMS], small.similarities)
    assert not large.similarities[NUM_ITEMS:].any()


def test_shrinkage_lowers_similarities_based_on_few_users() -> None:
    found = item_neighbours(BASKETS, 5, 2, shrinkage=10.0)
    np.testing.assert_allclose(found.similarities[0], [2 / (math.sqrt(6) + 10), 1 / (math.sqrt(3) + 10)], rtol=1e-15)


def test_of_equally_similar_items_the_lower_index_is_nearer() -> None:
    sequences = [np.array([5, 7]), np.array([5, 2]), np.array([5, 4])]
    assert item_neighbours(sequences, 8, 3).items[5].tolist() == [2, 4, 7]
    assert item_neighbours(sequences, 8, 3).nearest(2).items[5].tolist() == [2, 4]
    assert item_neighbours(sequences, 8, 2).items[5].tolist() == [2, 4]


def test_ranks_by_hand() -> None:
    neighbours = item_neighbours(BASKETS, 5, 2)
    histories = [np.array([0]), np.array([1]), np.array([0, 1])]
    # Scores: user 0 has 1 above 2; user 1 has 0 alone; user 2 has both bought items first, then 2. Zeros tie.
    assert item_knn_ranks(neighbours, histories, np.array([1, 0, 2])).tolist() == [1, 1, 3]
    assert item_knn_ranks(neighbours, histories, np.array([2, 4, 2]), histories).tolist() == [2, 4, 1]
    assert item_knn_ranks(neighbours, histories, np.array([3, 3, 3])).tolist() == [5, 5, 5]


def slow_ranks(
    train: Sequence[IntArray],
    histories: Sequence[IntArray],
    targets: IntArray,
    num_neighbours: int,
    shrinkage: float,
    masked: bool,
) -> list[int]:
    users: dict[int, set[int]] = {item: set() for item in range(NUM_ITEMS)}
    for user, sequence in enumerate(train):
        for item in sequence.tolist():
            users[item].add(user)
    nearest: dict[int, dict[int, float]] = {}
    for item in range(NUM_ITEMS):
        cosines = {
            other: len(users[item] & users[other]) / (math.sqrt(len(users[item]) * len(users[other])) + shrinkage)
            for other in range(NUM_ITEMS)
            if other != item and users[item] & users[other]
        }
        order = sorted(cosines, key=lambda other, cosines=cosines: (-cosines[other], other))  # type: ignore[misc]
        nearest[item] = {other: cosines[other] for other in order[:num_neighbours]}
    ranks = []
    for history, target in zip(histories, targets.tolist(), strict=True):
        scores = [0.0] * NUM_ITEMS
        for item in sorted(set(history.tolist())):
            for other, cosine in nearest[item].items():
                scores[other] += cosine
        removed = set(history.tolist()) if masked else set()
        rivals = [item for item in range(NUM_ITEMS) if item != target and item not in removed]
        ranks.append(1 + sum(scores[item] >= scores[target] for item in rivals))
    return ranks


@pytest.mark.parametrize(("num_neighbours", "shrinkage"), [(1, 0.0), (3, 10.0), (50, 2.5)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("block_size", [1, 7, None])
def test_ranks_equal_those_of_sets_and_loops(
    num_neighbours: int, shrinkage: float, masked: bool, block_size: int | None
) -> None:
    train, histories = random_sequences(60, 0), random_sequences(25, 1)
    targets = generator(2, "test-item-knn").integers(0, NUM_ITEMS, 25)
    neighbours = item_neighbours(train, NUM_ITEMS, num_neighbours, shrinkage)
    found = item_knn_ranks(neighbours, histories, targets, histories if masked else None, block_size=block_size)
    assert found.tolist() == slow_ranks(train, histories, targets, num_neighbours, shrinkage, masked)


def test_order_and_repeats_in_a_history_do_not_matter() -> None:
    neighbours = item_neighbours(random_sequences(60, 0), NUM_ITEMS, 10)
    targets = np.arange(NUM_ITEMS)
    histories = random_sequences(NUM_ITEMS, 3)
    shuffled = [np.concatenate([history[::-1], history]) for history in histories]
    assert np.array_equal(item_knn_ranks(neighbours, histories, targets), item_knn_ranks(neighbours, shuffled, targets))


def test_validation_selects_the_best_of_the_grid() -> None:
    train, histories = random_sequences(200, 0), random_sequences(80, 4)
    targets = generator(5, "test-item-knn").integers(0, NUM_ITEMS, 80)
    validation = Examples(np.arange(80), [history.astype(np.int32) for history in histories], targets)
    ndcgs = {}
    for shrinkage in SHRINKAGES:
        for num_neighbours in NUM_NEIGHBOURS:
            ranks = slow_ranks(train, histories, targets, num_neighbours, shrinkage, masked=False)
            outcomes = per_user_metrics(np.array(ranks))[:, METRICS.index("ndcg@10")]
            ndcgs[num_neighbours, shrinkage] = float(outcomes.mean())
    neighbours, choice = choose_item_knn(train, NUM_ITEMS, validation)
    assert choice.ndcg == max(ndcgs.values()) > min(ndcgs.values())
    assert (choice.num_neighbours, choice.shrinkage) == max(ndcgs, key=lambda key: ndcgs[key])
    assert neighbours.items.shape == (NUM_ITEMS, choice.num_neighbours)


def test_items_outside_the_catalog_are_refused() -> None:
    with pytest.raises(LayoutMismatchError, match="1 of 2"):
        item_neighbours([np.array([0, 4])], 4, 2)
    neighbours = item_neighbours([np.array([0, 1])], 4, 2)
    with pytest.raises(LayoutMismatchError, match="1 of 1"):
        item_knn_ranks(neighbours, [np.array([-1])], np.array([0]))


def test_without_users_there_are_no_ranks() -> None:
    neighbours = item_neighbours([], 4, 2)
    assert neighbours.similarities.sum() == 0
    assert item_knn_ranks(neighbours, [], np.zeros(0, dtype=np.int64)).tolist() == []
