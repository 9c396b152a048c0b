"""Differences across runs: bounds from sums, against paired differences of the users themselves."""

import math

import numpy as np
import pytest

from fedmerge.evaluation.ranks import METRICS, per_user_metrics
from fedmerge.evaluation.sums import MetricSums, estimate_mean, inexact_sums, metric_sums
from fedmerge.report.against.difference import difference_across, difference_of_mean, shared_rows
from fedmerge.seeding import generator

METRIC, M = "ndcg@10", METRICS.index("ndcg@10")
NUM_USERS = 200


def outcomes(seed: int) -> dict[str, np.ndarray]:
    """Outcomes of two runs on the same users: shared rows, and a merge of each that resembles the backbone."""
    random = generator(seed, "outcomes")
    hard = random.random(NUM_USERS)
    rows = {"backbone": hard, "popularity": random.random(NUM_USERS)}
    rows["left"] = hard + random.normal(0, 0.05, NUM_USERS)
    rows["right"] = hard + random.normal(-0.05, 0.05, NUM_USERS)
    return {name: per_user_metrics(1 + (np.clip(row, 0, 0.999) * 40).astype(np.int64)) for name, row in rows.items()}


def runs(seed: int, shared: tuple[str, ...] = ("backbone", "popularity")) -> tuple[MetricSums, MetricSums]:
    found = outcomes(seed)
    left = metric_sums({"merge": found["left"], **{row: found[row] for row in shared}}, "unmasked")
    right = metric_sums({**{row: found[row] for row in reversed(shared)}, "merge": found["right"]}, "unmasked")
    return left, right


def paired_error(seed: int) -> float:
    found = outcomes(seed)
    difference = found["right"][:, M] - found["left"][:, M]
    return float(difference.std(ddof=1) / math.sqrt(NUM_USERS))


@pytest.mark.parametrize("seed", range(5))
def test_the_error_lies_between_the_paired_one_and_the_sum_of_both(seed: int) -> None:
    found = outcomes(seed)
    for shared in ((), ("popularity",), ("backbone", "popularity")):
        left, right = runs(seed, shared)
        assert {*shared_rows(left, right)} == {*shared}
        across = difference_across(left, right, "merge", "merge", METRIC)
        assert across.mean == pytest.approx((found["right"] - found["left"])[:, M].mean())
        apart = sum(estimate_mean(sums, "merge", METRIC).standard_error for sums in (left, right))
        assert paired_error(seed) <= across.standard_error <= apart + 1e-12
        if not shared:
            assert across.standard_error == pytest.approx(apart)
    assert across.standard_error < 0.75 * apart  # the backbone ties the merges to each other


def test_the_error_is_reached_by_some_outcomes() -> None:
    """With remainders that point in opposite directions the bound is exact, so no smaller one holds."""
    random = generator(0, "opposite")
    shared, rest = random.random(NUM_USERS) / 4, random.random(NUM_USERS) / 4
    rest -= rest.mean()
    centred = shared - shared.mean()
    rest -= centred * (rest @ centred) / (centred @ centred)
    rows = {"backbone": shared, "left": 0.4 + shared + rest, "right": 0.4 + shared - rest}
    wide = {name: np.repeat(row[:, None], len(METRICS), axis=1) for name, row in rows.items()}
    left = metric_sums({"merge": wide["left"], "backbone": wide["backbone"]}, "unmasked")
    right = metric_sums({"merge": wide["right"], "backbone": wide["backbone"]}, "unmasked")
    error = (rows["right"] - rows["left"]).std(ddof=1) / math.sqrt(NUM_USERS)
    assert difference_across(left, right, "merge", "merge", METRIC).standard_error == pytest.approx(error)


def test_a_row_that_both_have_differs_by_nothing_and_pairs_exactly() -> None:
    left, right = runs(0)
    same = difference_across(left, right, "backbone", "backbone", METRIC)
    assert (same.mean, same.standard_error) == (0.0, 0.0)
    found = outcomes(0)
    difference = found["popularity"][:, M] - found["backbone"][:, M]
    across = difference_across(left, right, "backbone", "popularity", METRIC)
    assert across.standard_error == pytest.approx(difference.std(ddof=1) / math.sqrt(NUM_USERS))


def test_rows_of_other_users_or_without_exact_products_are_not_shared() -> None:
    left, right = runs(0)
    assert shared_rows(left, runs(1)[1]) == []
    inexact = inexact_sums(right.methods, "unmasked", NUM_USERS, right.sums, 1.0)
    assert shared_rows(left, inexact) == []
    across = difference_across(left, inexact, "merge", "merge", METRIC)
    assert across.standard_error >= paired_error(0)


def test_the_mean_over_domains_has_independent_users() -> None:
    each = [difference_across(*runs(seed), "merge", "merge", METRIC) for seed in range(3)]
    mean = difference_of_mean(each)
    assert mean.mean == pytest.approx(np.mean([one.mean for one in each]))
    assert mean.standard_error == pytest.approx(np.sqrt(np.sum([one.standard_error**2 for one in each])) / 3)
