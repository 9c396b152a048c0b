"""Augmentations of histories, similar items, and the contrast of views, against slow oracles."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmerge.client.baselines.item_knn import item_neighbours
from fedmerge.config.training import AUGMENTATIONS
from fedmerge.seeding import generator
from fedmerge.sequence.augmentation import (
    NEIGHBOURS,
    SHORT_HISTORY,
    augmented,
    crop,
    forbidden_items,
    insert,
    mask,
    most_similar,
    reorder,
    segment,
    substitute,
)
from fedmerge.sequence.contrast import numbered, view_contrast

NUM_ITEMS = 12
RATES = {"crop": 0.6, "mask": 0.7, "reorder": 0.2, "insert": 0.4, "substitute": 0.1}
NEXT = np.array([[(item + step) % NUM_ITEMS for step in range(1, 6)] for item in range(NUM_ITEMS)])
items_of = st.lists(st.integers(0, NUM_ITEMS - 1), min_size=1, max_size=20)


def rng(number: int) -> np.random.Generator:
    return generator(0, "test", number)


def is_subsequence(short: list[int], long: list[int]) -> bool:
    rest = iter(long)
    return all(item in rest for item in short)


# Augmentations


@given(items_of, st.sampled_from([0.1, 0.2, 0.6, 0.7, 1.0]), st.integers(0, 50))
def test_lengths_and_order_are_as_defined(items: list[int], rate: float, seed: int) -> None:
    history, n = np.array(items, dtype=np.int32), len(items)
    share = round(rate * 10) * n // 10  # exact, unlike rate * n
    kept = crop(history, rate, rng(seed)).tolist()
    assert len(kept) == max(1, share)
    assert any(items[start : start + len(kept)] == kept for start in range(n))
    left = mask(history, rate, rng(seed)).tolist()
    assert len(left) == max(1, n - share)
    assert is_subsequence(left, items)
    moved = reorder(history, rate, rng(seed)).tolist()
    assert sorted(moved) == sorted(items)
    changed = [i for i in range(n) if moved[i] != items[i]]
    assert not changed or changed[-1] - changed[0] < max(2, share)
    longer = insert(history, rate, NEXT, frozenset(), rng(seed)).tolist()
    assert len(longer) == n + max(1, share)
    assert is_subsequence(items, longer)
    other = substitute(history, rate, NEXT, frozenset(), rng(seed)).tolist()
    assert sum(a != b for a, b in zip(other, items, strict=True)) == max(1, share)
    assert all(b in (a, (a + 1) % NUM_ITEMS) for a, b in zip(items, other, strict=True))
    assert history.tolist() == items  # inputs are never mutated


def test_an_insertion_stands_before_its_item() -> None:
    assert insert(np.array([3]), 0.5, NEXT, frozenset(), rng(0)).tolist() == [4, 3]
    assert insert(np.array([3]), 0.5, NEXT, {4, 5}, rng(0)).tolist() == [6, 3]
    assert insert(np.array([3]), 0.5, NEXT, set(range(NUM_ITEMS)), rng(0)).tolist() == [3]
    assert substitute(np.array([3]), 0.5, NEXT, {4}, rng(0)).tolist() == [5]


@given(items_of, items_of, st.integers(0, 50))
def test_no_augmentation_reveals_the_target_or_what_came_after_it(
    items: list[int], later: list[int], seed: int
) -> None:
    history, draws = np.array(items), rng(seed)
    forbidden = forbidden_items(history, np.array(later))
    for _ in range(20):
        found = augmented(history, RATES, NEXT, forbidden, draws)
        assert 1 <= len(found) <= 2 * len(items)
        assert not ({*found.tolist()} - {*items}) & {*later}


def test_a_target_that_the_history_has_may_stay() -> None:
    assert forbidden_items(np.array([1, 2]), np.array([2, 5])) == {5}


def test_short_histories_are_neither_cropped_nor_reordered() -> None:
    short = np.arange(SHORT_HISTORY)
    for number in range(20):
        assert augmented(short, {"crop": 0.5, "reorder": 1.0}, None, (), rng(number)).tolist() == short.tolist()
    longer = np.arange(SHORT_HISTORY + 1)
    assert any(len(augmented(longer, {"crop": 0.5}, None, (), rng(number))) == 2 for number in range(3))


def test_every_named_augmentation_is_drawn_about_evenly() -> None:
    # Of six distinct items each augmentation leaves a result that no other one can.
    history, counts = np.arange(0, 12, 2), dict.fromkeys(AUGMENTATIONS, 0)
    rates = {"crop": 0.5, "mask": 0.9, "reorder": 1.0, "insert": 0.5, "substitute": 0.5}
    similar, draws = np.arange(1, 13)[:, None], rng(0)  # odd items are inserted only
    for _ in range(2000):
        found = augmented(history, rates, similar, (), draws).tolist()
        if len(found) == 9:
            counts["insert"] += 1
        elif len(found) == 3:
            counts["crop"] += 1
        elif len(found) == 1:
            counts["mask"] += 1
        else:
            counts["substitute" if any(item % 2 for item in found) else "reorder"] += 1
    assert all(330 < count < 470 for count in counts.values())


def test_inserting_without_a_table_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a table of similar items"):
        augmented(np.array([1]), {"insert": 0.5}, None, (), rng(0))


@pytest.mark.parametrize("num_items", [2, 3, 7])
def test_segments_are_half_a_history_at_most(num_items: int) -> None:
    spans = [segment(num_items, rng(number)) for number in range(200)]
    assert {span.stop - span.start for span in spans} == {*range(1, num_items // 2 + 1)}
    assert min(span.start for span in spans) == 0
    assert max(span.stop for span in spans) == num_items


# Similar items


@pytest.mark.parametrize("num_items", [1, 2, 40])
def test_similar_items_are_the_greatest_of_both_similarities(num_items: int) -> None:
    draws = rng(num_items)
    vectors = draws.standard_normal((num_items, 6)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    users = [draws.integers(0, num_items, 5) for _ in range(60)]
    counted = item_neighbours(users, num_items, NEIGHBOURS, 10.0)
    found = most_similar(vectors, counted.items, counted.similarities, rows_per_block=7)
    assert found.shape == (num_items, min(NEIGHBOURS, num_items - 1))
    scores = [
        [float(vectors[i].astype(float) @ vectors[j].astype(float)) for j in range(num_items)] for i in range(num_items)
    ]
    pairs = [scores[i][j] for i in range(num_items) for j in range(num_items) if i != j]
    low, high = min(pairs, default=0), max(pairs, default=0)
    scores = [[(score - low) / max(high - low, 1e-12) for score in row] for row in scores]
    largest = counted.similarities.max()
    for i in range(num_items):
        for j, s in zip(counted.items[i], counted.similarities[i], strict=True):
            if s > 0:
                scores[i][j] = max(scores[i][j], s / largest)
        expected = sorted((j for j in range(num_items) if j != i), key=lambda j: -scores[i][j])[:NEIGHBOURS]
        assert [scores[i][j] for j in found[i]] == pytest.approx([scores[i][j] for j in expected], abs=1e-6)
        assert len({*found[i].tolist()} - {i}) == len(expected)
    if num_items > NEIGHBOURS:
        assert (found != most_similar(vectors)).any()


# The contrast of views


def test_the_contrast_of_two_users_by_hand() -> None:
    # Views a1 = a2 = (1, 0) of one user, b1 = b2 = (0, 1) of the other; τ = 1/2, so logits are 2 and 0.
    first = second = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    loss = view_contrast(first, second, torch.tensor([0, 1]), torch.arange(4), 0.5)
    assert float(loss) == pytest.approx(math.log(1 + 2 * math.exp(-2)), rel=1e-6)  # one partner, two negatives


def by_hand(first: torch.Tensor, second: torch.Tensor, histories: list[int], views: list[int], tau: float) -> float:
    z, b, losses = torch.cat([first, second]).double(), len(first), []
    for a in range(2 * b):
        p = (a + b) % (2 * b)
        negatives = [
            n
            for n in range(2 * b)
            if n not in (a, p) and histories[n % b] != histories[a % b] and views[n] not in (views[a], views[p])
        ]
        scores = [float(z[a] @ z[n]) / tau for n in [p, *negatives]]
        losses.append(math.log(math.fsum(math.exp(score - scores[0]) for score in scores)))
    return math.fsum(losses) / len(losses)


def test_duplicates_are_no_negatives() -> None:
    draws = torch.Generator().manual_seed(0)
    first, second = (torch.nn.functional.normalize(torch.randn(5, 4, generator=draws), dim=1) for _ in range(2))
    histories, views = [0, 1, 0, 2, 3], [0, 1, 2, 3, 4, 5, 3, 6, 7, 1]
    found = view_contrast(first, second, torch.tensor(histories), torch.tensor(views), 0.3)
    assert float(found) == pytest.approx(by_hand(first, second, histories, views, 0.3), rel=1e-5)
    naive = view_contrast(first, second, torch.arange(5), torch.arange(10), 0.3)
    assert abs(float(naive - found)) > 0.01


def test_equal_histories_alone_have_no_loss() -> None:
    vectors = torch.eye(2)
    assert float(view_contrast(vectors, vectors, torch.tensor([0, 0]), torch.arange(4), 0.05)) == 0.0


def test_equal_sequences_have_one_number() -> None:
    assert numbered([np.array([1, 2]), np.array([2, 1]), np.array([1, 2])]).tolist() == [0, 1, 0]
