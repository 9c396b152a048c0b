"""Comparisons over seeds, Holm, Friedman and Nemenyi, against SciPy and by hand."""

import math
from collections.abc import Mapping

import numpy as np
import pytest
from scipy import stats

from fedmerge.errors import ClientError, LayoutMismatchError
from fedmerge.evaluation.ranks import METRICS, per_user_metrics
from fedmerge.evaluation.sums import (
    Estimate,
    MetricSums,
    metric_sums,
    paired_difference,
    paired_difference_of_mean,
)
from fedmerge.report.bench_tables import COLUMNS
from fedmerge.report.statistics import (
    comparison_rows,
    critical_difference,
    difference_over_seeds,
    friedman,
    holm,
    rank_rows,
)
from fedmerge.seeding import generator

NUM_ITEMS = 60


def some_sums(seed: int, domain: str, lift: Mapping[str, float], num_users: int = 300) -> MetricSums:
    """Draw metric sums; users of a domain are the same under every seed, and a seed shifts every method a little."""
    luck = generator(0, "users", domain).random(num_users)
    outcomes = {}
    for method, amount in lift.items():
        noise = generator(seed, method, domain).normal(0, 0.1, num_users)
        place = np.clip(luck + noise - amount, 0, 0.999)
        outcomes[method] = per_user_metrics(1 + (place * NUM_ITEMS).astype(np.int64))
    return metric_sums(outcomes, "unmasked")


def test_demsars_table_of_critical_values() -> None:
    """Check q / sqrt(2) of table 5 (a) of Demšar (2006) and the critical difference of the paper's example."""
    for num_strategies, value in {2: 1.960, 3: 2.343, 4: 2.569, 5: 2.728, 10: 3.164}.items():
        per_block = math.sqrt(num_strategies * (num_strategies + 1) / 6)
        assert critical_difference(num_strategies, 1) / per_block == pytest.approx(value, abs=1e-3)
    assert critical_difference(4, 14) == pytest.approx(1.25, abs=0.01)


# Over seeds


def test_one_seed_is_the_interval_of_its_users() -> None:
    sums = some_sums(0, "books", {"a": 0.1, "base": 0.0})
    alone = paired_difference(sums, "a", "base", "ndcg@10")
    over = difference_over_seeds([alone])
    assert (over.num_seeds, over.mean) == (1, alone.mean)
    assert over.half_width == pytest.approx(alone.high - alone.mean, rel=1e-4)
    assert over.p_value == pytest.approx(2 * stats.norm.sf(abs(alone.mean / alone.standard_error)), rel=1e-9)


def test_three_seeds_by_hand() -> None:
    differences = [Estimate(mean, 0.02, 0.0, 0.0) for mean in (0.01, 0.03, 0.05)]
    over = difference_over_seeds(differences)
    seeds = 0.02 / math.sqrt(3)
    assert over.mean == pytest.approx(0.03)
    assert over.half_width == pytest.approx(math.hypot(1.959964 * 0.02, 4.302653 * seeds))
    reached = math.hypot(stats.norm.isf(over.p_value / 2) * 0.02, stats.t.isf(over.p_value / 2, 2) * seeds)
    assert reached == pytest.approx(0.03)  # the interval of this level ends at 0
    far = difference_over_seeds([Estimate(mean, 1e-9, 0.0, 0.0) for mean in (0.5, 0.5, 0.5 + 1e-12)])
    assert 0.0 <= far.p_value < 1e-9


def test_without_noise_of_users_it_is_the_t_test_over_seeds() -> None:
    values = [0.01, 0.03, 0.02, 0.05]
    over = difference_over_seeds([Estimate(value, 0.0, value, value) for value in values])
    assert over.p_value == pytest.approx(stats.ttest_1samp(values, 0.0).pvalue)
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert (over.mean - over.half_width, over.mean + over.half_width) == pytest.approx((low, high))


def test_differences_that_cancel_up_to_rounding_have_an_interval() -> None:
    for high, low in ((1 / 900, -1 / 900 * (1 + 2e-16)), (0.1 + 0.2, -0.3), (1e-3, -1e-3)):
        over = difference_over_seeds([Estimate(mean, 0.004, mean, mean) for mean in (high, low)])
        assert abs(over.mean) < 1e-16
        assert over.p_value == pytest.approx(1.0, abs=1e-9)
        assert over.half_width > max(high, -low)


def test_equal_methods_do_not_differ_and_a_constant_difference_is_certain() -> None:
    assert difference_over_seeds([Estimate(0.0, 0.0, 0.0, 0.0)] * 3).p_value == 1.0
    assert difference_over_seeds([Estimate(0.5, 0.0, 0.5, 0.5)] * 3).p_value == 0.0
    with pytest.raises(LayoutMismatchError, match="seed"):
        difference_over_seeds([])


@pytest.mark.parametrize("of_seed", [0.0, 0.05, 0.1, 0.4])
def test_intervals_cover_the_truth(of_seed: float) -> None:
    """Shared users, an effect of the seed, and noise of both: at least 95 of 100 intervals contain 0."""
    random = generator(0, "coverage")
    num_users, num_seeds, covered = 200, 3, 0
    for _ in range(1000):
        users = random.normal(0, 1, num_users)
        differences = []
        for _ in range(num_seeds):
            values = users + random.normal(0, of_seed) + random.normal(0, 0.5, num_users)
            mean, error = float(values.mean()), float(values.std(ddof=1) / math.sqrt(num_users))
            differences.append(Estimate(mean, error, 0.0, 0.0))
        over = difference_over_seeds(differences)
        covered += abs(over.mean) <= over.half_width
        assert (over.p_value < 0.05) == (abs(over.mean) > over.half_width)
    assert 936 <= covered <= 995  # 950 minus two standard errors, and an upper bound


def test_comparisons_of_domains_and_their_mean() -> None:
    lift = {"base": 0.0, "better": 0.2, "same": 0.0}
    sums = {(seed, domain): some_sums(seed, domain, lift) for seed in range(3) for domain in ("toys", "books")}
    rows = comparison_rows(sums, dataset="demo", baseline="base", role="train")
    assert all(set(row) == set(COLUMNS["comparisons"]) for row in rows)
    assert len(rows) == len(METRICS) * 2 * 3  # strategies; mean and two domains
    by_key = {(row["strategy"], row["domain"], row["metric"]): row for row in rows}
    row = by_key["better", "mean", "ndcg@10"]
    expected = difference_over_seeds(
        [
            paired_difference_of_mean([sums[seed, name] for name in ("books", "toys")], "better", "base", "ndcg@10")
            for seed in range(3)
        ]
    )
    assert (row["difference"], row["half_width"]) == pytest.approx((expected.mean, expected.half_width))
    assert (row["num_seeds"], row["significant"], row["variant"]) == (3, True, "unmasked")
    assert not by_key["same", "mean", "ndcg@10"]["significant"]
    of_domains = [by_key[s, d, "mrr"] for s in ("better", "same") for d in ("books", "toys")]
    family = holm([row["p_value"] for row in of_domains])
    assert [row["p_adjusted"] for row in of_domains] == pytest.approx(family)


def test_a_seed_without_the_strategy_does_not_count() -> None:
    sums = {
        (0, "toys"): some_sums(0, "toys", {"base": 0.0, "a": 0.1}),
        (1, "toys"): some_sums(1, "toys", {"base": 0.0}),
    }
    rows = comparison_rows(sums, dataset="demo", baseline="base", role="unseen", left_out="any", metrics=["mrr"])
    assert [(row["domain"], row["num_seeds"], row["left_out"]) for row in rows] == [
        ("mean", 1, "any"),
        ("toys", 1, "any"),
    ]
    half = {
        **sums,
        (0, "books"): some_sums(0, "books", {"base": 0.0}),
        (1, "books"): some_sums(1, "books", {"base": 0}),
    }
    rows = comparison_rows(half, dataset="demo", baseline="base", role="train", metrics=["mrr"])
    assert [row["domain"] for row in rows] == ["toys"]  # no mean without every domain


def test_invalid_comparisons_are_refused() -> None:
    sums = some_sums(0, "toys", {"a": 0.0, "b": 0.1})
    with pytest.raises(LayoutMismatchError, match=r"'c'.*\['a', 'b'\]"):
        comparison_rows({(0, "toys"): sums}, dataset="demo", baseline="c", role="train")
    with pytest.raises(LayoutMismatchError, match=r"\[\]"):
        comparison_rows({}, dataset="demo", baseline="c", role="train")
    one_user = some_sums(0, "toys", {"a": 0.0, "b": 0.1}, num_users=1)
    with pytest.raises(ClientError, match="2"):
        comparison_rows({(0, "toys"): one_user}, dataset="demo", baseline="a", role="train")


# Several comparisons, and ranks


def test_holm_by_hand() -> None:
    assert holm([]) == []
    assert holm([0.2]) == [0.2]
    assert holm([0.01, 0.02, 0.03, 0.9]) == pytest.approx([0.04, 0.06, 0.06, 0.9])
    assert holm([0.6, 0.5]) == [1.0, 1.0]


def test_friedman_matches_scipy_with_ties() -> None:
    random = generator(0, "friedman")
    for scores in (random.random((12, 5)), random.integers(0, 3, (9, 4)).astype(float)):
        ours, expected = friedman(scores), stats.friedmanchisquare(*scores.T)
        assert (ours.statistic, ours.p_value) == pytest.approx((expected.statistic, expected.pvalue))
        assert ours.mean_ranks == pytest.approx(stats.rankdata(-scores, axis=1).mean(axis=0))
    tied = friedman(np.ones((3, 4)))
    assert (tied.statistic, tied.p_value, tied.mean_ranks.tolist()) == (0.0, 1.0, [2.5] * 4)
    with pytest.raises(LayoutMismatchError, match=r"\(1, 3\)"):
        friedman(np.ones((1, 3)))


def test_ranks_per_dataset_and_overall() -> None:
    scores = {
        (dataset, domain, seed): {"a": 0.3, "b": 0.2 + 0.2 * (dataset == "y"), "c": 0.1}
        for dataset in ("x", "y")
        for domain in ("toys", "books")
        for seed in range(3)
    }
    rows = rank_rows(scores)
    assert all(set(row) == set(COLUMNS["ranks"]) for row in rows)
    ranks = {(row["dataset"], row["strategy"]): row["mean_rank"] for row in rows}
    assert [ranks["x", s] for s in "abc"] == [1.0, 2.0, 3.0]
    assert [ranks["", s] for s in "abc"] == [1.5, 1.5, 3.0]
    assert {row["dataset"]: row["num_blocks"] for row in rows} == {"": 12, "x": 6, "y": 6}
    scores["x", "toys", 0] = {"a": 0.3}
    assert {row["dataset"]: row["num_blocks"] for row in rank_rows(scores)}["x"] == 5
    assert rank_rows({("x", "toys", 0): {"a": 0.1, "b": 0.2}}) == []
    assert rank_rows({}) == []
