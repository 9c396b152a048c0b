"""Attacks as statistics: by hand, against slow definitions, and against scores whose answer is known."""

import math
from itertools import combinations

import numpy as np
import pytest

from fedmerge.privacy.attacks import (
    auc,
    consecutive_pairs,
    exposures,
    likelihood_ratios,
    membership,
    precision_at,
    top_pairs,
    tpr_at_fpr,
)


def test_auc_by_hand_and_by_definition() -> None:
    members, others = np.array([3.0, 1.0, 2.0]), np.array([2.0, 0.0])
    assert auc(members, others)[0] == pytest.approx((2 + 1 + 1.5) / 6)
    rng = np.random.default_rng(0)
    members, others = rng.integers(0, 9, 40).astype(float), rng.integers(0, 7, 30).astype(float)
    pairs = [(m > o) + 0.5 * (m == o) for m in members for o in others]
    assert auc(members, others)[0] == pytest.approx(np.mean(pairs))


def test_the_error_of_the_auc_is_its_spread_over_samples() -> None:
    rng = np.random.default_rng(1)
    draws = [auc(rng.normal(0.5, 1, 60), rng.normal(0, 1, 80)) for _ in range(400)]
    assert np.mean([error for _, error in draws]) == pytest.approx(np.std([area for area, _ in draws]), rel=0.15)


def test_tpr_at_small_fpr_by_hand() -> None:
    others = np.arange(200.0)
    members = np.array([500.0, 198.5, 197.5, 3.0])
    assert tpr_at_fpr(members, others, 0.01) == 0.75  # two of 200 may be accused: whoever is above 197
    assert tpr_at_fpr(members, others, 0.005) == 0.5
    assert tpr_at_fpr(members, others, 0.001) is None  # would take 1000 others
    result = membership(members, others)
    assert result["tpr_at_fpr_0.01"] == 0.75
    assert result["tpr_at_fpr_0.001"] is None


def test_equal_scores_accuse_nobody() -> None:
    assert tpr_at_fpr(np.ones(5), np.ones(200), 0.01) == 0.0
    assert auc(np.ones(5), np.ones(200))[0] == 0.5


def test_likelihood_ratios_find_what_a_threshold_on_the_score_cannot() -> None:
    """Users differ by nature far more than by membership: shadows tell each one's own two levels."""
    rng = np.random.default_rng(2)
    level, effect = rng.normal(0, 10, 400), 1.0
    inside = rng.random((16, 400)) < 0.5
    shadows = level + effect * inside + rng.normal(0, 0.4, inside.shape)
    member = rng.random(400) < 0.5
    scores = level + effect * member + rng.normal(0, 0.4, 400)
    assert auc(scores[member], scores[~member])[0] < 0.65
    ratios = likelihood_ratios(scores, shadows, inside)
    assert auc(ratios[member], ratios[~member])[0] > 0.85


def test_likelihood_ratios_by_hand() -> None:
    shadows = np.array([[1.0], [3.0], [5.0], [9.0]])
    inside = np.array([[False], [False], [True], [True]])
    # Outside: mean 2, variance 2; inside: mean 7, variance 8 (one degree of freedom less than shadows).
    expected = -0.5 * math.log(8) - (6 - 7) ** 2 / 16 + 0.5 * math.log(2) + (6 - 2) ** 2 / 4
    assert likelihood_ratios(np.array([6.0]), shadows, inside).tolist() == pytest.approx([expected])


def test_a_user_whom_no_shadow_held_is_scored_all_the_same() -> None:
    inside = np.array([[False, True], [False, False], [False, True]])
    ratios = likelihood_ratios(np.array([1.0, 2.0]), np.array([[0.0, 2.0], [0.1, 0.0], [0.2, 2.1]]), inside)
    assert np.isfinite(ratios).all()


def test_exposure_by_hand_and_by_chance() -> None:
    assert exposures(np.array([1, 2, 64]), 64).tolist() == [6.0, 5.0, 0.0]
    uniform = exposures(np.arange(1, 4097), 4096)
    assert uniform.mean() == pytest.approx(math.log2(math.e), abs=0.01)


@pytest.mark.parametrize("block", [1, 3, 7, 40])
def test_top_pairs_are_those_of_the_whole_matrix_in_whatever_blocks(block: int) -> None:
    rng = np.random.default_rng(3)
    scores = rng.normal(size=(20, 20))
    scores = scores + scores.T
    whole = sorted(combinations(range(20), 2), key=lambda pair: -scores[pair])[:12]
    blocks = ((start, scores[start : start + block]) for start in range(0, 20, block))
    assert [tuple(pair) for pair in top_pairs(blocks, 12).tolist()] == whole


def test_precision_counts_the_first_k() -> None:
    pairs = np.array([[0, 1], [0, 2], [1, 2]])
    assert precision_at(pairs, {(0, 1), (1, 2)}, (1, 2, 3, 4)) == {"1": 1.0, "2": 0.5, "3": pytest.approx(2 / 3)}


def test_consecutive_pairs_are_unordered_and_of_different_items() -> None:
    assert consecutive_pairs([np.array([3, 1, 1, 2]), np.array([2, 1])]) == {(1, 3), (1, 2)}
