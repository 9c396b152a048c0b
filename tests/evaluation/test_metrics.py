"""Ranks and metrics by hand, against a slow oracle, ranx, torchmetrics and SciPy."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedmerge.errors import ClientError, LayoutMismatchError
from fedmerge.evaluation.ranks import (
    CUTOFFS,
    METRICS,
    FloatArray,
    IntArray,
    per_user_metrics,
    rank_targets,
    target_ranks,
)
from fedmerge.evaluation.sums import (
    MetricSums,
    metric_sums,
    metric_sums_from_dict,
    paired_difference,
    paired_difference_of_mean,
)
from fedmerge.seeding import generator


def slow_ranks(scores: FloatArray, targets: IntArray, seen: Sequence[IntArray] | None) -> list[int]:
    """The definition, item by item."""
    ranks = []
    for user, target in enumerate(targets.tolist()):
        rank = 1
        for item in range(scores.shape[1]):
            removed = seen is not None and item in seen[user].tolist()
            if item != target and not removed and scores[user, item] >= scores[user, target]:
                rank += 1
        ranks.append(rank)
    return ranks


def distinct_scores(num_users: int, num_items: int, *scope: str | int) -> torch.Tensor:
    """(U, N) float32 without ties inside a row."""
    rng = generator(0, "test-metrics", *scope)
    rows = [rng.permutation(num_items) / num_items - 0.5 for _ in range(num_users)]
    return torch.tensor(np.array(rows), dtype=torch.float32)


def some_outcomes(num_users: int = 200, *scope: str | int) -> dict[str, FloatArray]:
    rng = generator(1, "test-metrics-outcomes", *scope)
    hard = rng.integers(1, 80, num_users)
    easier = np.maximum(1, hard - rng.integers(0, 30, num_users))
    return {
        "backbone": per_user_metrics(hard),
        "average": per_user_metrics(easier),
        "other": per_user_metrics(rng.integers(1, 80, num_users)),
    }


# Ranks by hand


def test_ranks_by_hand() -> None:
    scores = torch.tensor([[0.9, 0.1, 0.5], [0.9, 0.1, 0.5], [0.9, 0.1, 0.5]])
    assert target_ranks(scores, np.array([0, 1, 2])).tolist() == [1, 3, 2]


def test_ties_count_against_the_target() -> None:
    scores = torch.tensor([[0.5, 0.5, 0.5, 0.1], [0.0, 0.0, 0.0, 0.0]])
    assert target_ranks(scores, np.array([1, 3])).tolist() == [3, 4]


def test_masking_removes_the_history_once_for_repeated_items() -> None:
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.6]])
    target = np.array([3])
    assert target_ranks(scores, target, [np.array([0, 0, 0])]).tolist() == [3]
    assert target_ranks(scores, target, [np.array([0, 2, 0, 2])]).tolist() == [2]
    assert target_ranks(scores, target, [np.array([], dtype=np.int32)]).tolist() == [4]


def test_a_target_in_its_own_history_is_not_masked() -> None:
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.6]])
    assert target_ranks(scores, np.array([2]), [np.array([2, 0, 2])]).tolist() == [2]
    assert target_ranks(scores, np.array([0]), [np.array([0])]).tolist() == [1]


def test_no_users_have_no_ranks() -> None:
    assert target_ranks(torch.empty(0, 5), np.empty(0, dtype=np.int64), []).shape == (0,)


# Ranks against the oracle


@settings(deadline=None, max_examples=60)
@given(data=st.data(), num_users=st.integers(1, 5), num_items=st.integers(1, 7), block_size=st.integers(1, 6))
def test_ranks_equal_the_definition(data: st.DataObject, num_users: int, num_items: int, block_size: int) -> None:
    # Few distinct values and short catalogs, so that ties, repeats and targets in the history are frequent.
    cell = st.integers(-2, 2).map(float)
    item = st.integers(0, num_items - 1)
    drawn = st.lists(st.lists(cell, min_size=num_items, max_size=num_items), min_size=num_users, max_size=num_users)
    scores = np.array(data.draw(drawn))
    targets = np.array(data.draw(st.lists(item, min_size=num_users, max_size=num_users)))
    histories = data.draw(st.lists(st.lists(item, max_size=6), min_size=num_users, max_size=num_users))
    seen = [np.array(history, dtype=np.int32) for history in histories]
    tensor = torch.tensor(scores, dtype=torch.float32)
    for history in (None, seen):
        ranks = target_ranks(tensor, targets, history, block_size=block_size)
        assert ranks.tolist() == slow_ranks(scores, targets, history)


@pytest.mark.parametrize("block_size", [1, 7, 64, 1000, None])
def test_lazily_computed_scores_rank_as_given_ones(block_size: int | None) -> None:
    rng = generator(2, "test-metrics-vectors")
    # Small integers: their inner products are exact in float32, so the order of summation cannot matter; ties abound.
    users, items = rng.integers(-3, 4, (50, 6)), rng.integers(-3, 4, (40, 6))
    targets = rng.integers(0, 40, 50)
    seen = [rng.integers(0, 40, rng.integers(0, 9)) for _ in range(50)]
    for history in (None, seen):
        lazy = rank_targets(
            torch.tensor(users, dtype=torch.float64), torch.tensor(items), targets, history, block_size=block_size
        )
        assert lazy.tolist() == slow_ranks((users @ items.T).astype(np.float64), targets, history)
        assert lazy.dtype == np.int64


def test_autocast_does_not_coarsen_the_scores() -> None:
    # 1 and 1 + 2^-10 are one number in bfloat16 and two in float32.
    items = torch.tensor([[1.0], [1.0 + 2.0**-10]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert rank_targets(torch.tensor([[1.0]]), items, np.array([1])).tolist() == [1]


def test_inputs_are_unchanged() -> None:
    scores = distinct_scores(4, 9, "unchanged")
    before = scores.clone()
    seen = [np.array([1, 1, 2])] * 4
    target_ranks(scores, np.array([0, 1, 2, 3]), seen)
    assert torch.equal(scores, before)
    assert [history.tolist() for history in seen] == [[1, 1, 2]] * 4


def test_one_score_row_serves_all_users_without_being_copied() -> None:
    row = torch.tensor([3.0, 2.0, 1.0])
    num_users = 2000
    ranks = target_ranks(row.expand(num_users, -1), np.arange(num_users) % 3, block_size=100)
    assert ranks.tolist() == [1 + user % 3 for user in range(num_users)]


# What ranks refuse


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_counted_and_refused(bad: float) -> None:
    scores = distinct_scores(6, 5, "bad")
    scores[1, 2] = scores[4, 0] = scores[4, 1] = bad
    with pytest.raises(ClientError, match="3 of 30"):
        target_ranks(scores, np.zeros(6, dtype=np.int64), block_size=2)


def test_infinities_of_both_signs_do_not_cancel() -> None:
    with pytest.raises(ClientError, match="2 of 3"):
        target_ranks(torch.tensor([[math.inf, -math.inf, 0.0]]), np.array([2]))


def test_large_but_finite_scores_are_ranked() -> None:
    largest = float(np.finfo(np.float64).max)
    assert target_ranks(torch.tensor([[largest, largest, 1.0]], dtype=torch.float64), np.array([2])).tolist() == [3]


def test_vectors_that_are_not_finite_are_refused() -> None:
    items = torch.ones(4, 2)
    items[3, 0] = math.nan
    with pytest.raises(ClientError, match="3 of 12"):
        rank_targets(torch.ones(3, 2), items, np.zeros(3, dtype=np.int64))


@pytest.mark.parametrize(
    ("targets", "seen", "values"),
    [
        (np.array([0, 5]), None, "1 of 2 .*targets.* 5 items"),
        (np.array([0, -1]), None, "1 of 2 .*targets"),
        (np.array([0]), None, r"targets.*\(1,\).* 2 users"),
        (np.array([0, 1]), [np.array([0])], "histories.* 1 users.* 2 users"),
        (np.array([0, 1]), [np.array([-1]), np.array([9, 1])], "2 of 3 .*histories"),
    ],
)
def test_indices_that_do_not_fit_are_refused(targets: IntArray, seen: list[IntArray] | None, values: str) -> None:
    with pytest.raises(LayoutMismatchError, match=values):
        target_ranks(torch.zeros(2, 5), targets, seen)


def test_vectors_of_different_width_are_refused() -> None:
    with pytest.raises(LayoutMismatchError, match=r"\(1, 3\).*\(4, 2\)"):
        rank_targets(torch.zeros(1, 3), torch.zeros(4, 2), np.array([0]))


def test_an_empty_block_is_refused() -> None:
    with pytest.raises(ValueError, match=r"block_size.* 0"):
        target_ranks(torch.zeros(1, 2), np.array([0]), block_size=0)


# Metrics


def test_metrics_by_hand() -> None:
    outcomes = per_user_metrics(np.array([1, 3, 11, 60]))
    by_name = dict(zip(METRICS, outcomes.T.tolist(), strict=True))
    assert by_name["recall@1"] == [1, 0, 0, 0]
    assert by_name["recall@5"] == [1, 1, 0, 0]
    assert by_name["recall@10"] == [1, 1, 0, 0]
    assert by_name["recall@50"] == [1, 1, 1, 0]
    assert by_name["ndcg@1"] == [1, 0, 0, 0]
    assert by_name["ndcg@10"] == [1, 0.5, 0, 0]
    assert by_name["ndcg@50"] == pytest.approx([1, 0.5, 1 / math.log2(12), 0], abs=1e-15)
    assert by_name["mrr"] == pytest.approx([1, 1 / 3, 1 / 11, 1 / 60], abs=1e-15)


def test_the_cutoff_itself_is_a_hit() -> None:
    for cutoff in CUTOFFS:
        column = METRICS.index(f"recall@{cutoff}")
        assert per_user_metrics(np.array([cutoff, cutoff + 1]))[:, column].tolist() == [1, 0]


def test_ranks_start_at_one() -> None:
    with pytest.raises(ValueError, match="minimum 0"):
        per_user_metrics(np.array([3, 0]))


@pytest.mark.long
def test_metrics_agree_with_ranx() -> None:
    import ranx  # noqa: PLC0415  (slow to import: it compiles)

    scores = distinct_scores(60, 90, "ranx")
    targets = generator(3, "test-metrics-ranx").integers(0, 90, 60)
    ours = per_user_metrics(target_ranks(scores, targets)).mean(axis=0)
    # Named so that string order is index order: ranx sorts the ids.
    qrels = ranx.Qrels({f"u{user:03d}": {f"i{target:03d}": 1} for user, target in enumerate(targets.tolist())})
    run = ranx.Run(
        {
            f"u{user:03d}": {f"i{item:03d}": score for item, score in enumerate(row)}
            for user, row in enumerate(scores.tolist())
        }
    )
    theirs = ranx.evaluate(qrels, run, list(METRICS))
    assert ours.tolist() == pytest.approx([theirs[name] for name in METRICS], abs=1e-6)


def test_metrics_agree_with_torchmetrics() -> None:
    from torchmetrics.functional.retrieval import (  # noqa: PLC0415  (slow to import)
        retrieval_normalized_dcg,
        retrieval_recall,
        retrieval_reciprocal_rank,
    )

    scores = distinct_scores(60, 90, "torchmetrics")
    targets = generator(4, "test-metrics-torchmetrics").integers(0, 90, 60)
    outcomes = per_user_metrics(target_ranks(scores, targets))
    for user, target in enumerate(targets.tolist()):
        relevant = torch.zeros(90, dtype=torch.bool)
        relevant[target] = True
        # In recall and reciprocal rank, torchmetrics 1.9 takes items with a score of 0 or less as not retrieved.
        positive = scores[user] + 1.0
        theirs = [
            *(retrieval_recall(positive, relevant, top_k=k).item() for k in CUTOFFS),
            *(retrieval_normalized_dcg(positive, relevant, top_k=k).item() for k in CUTOFFS),
            retrieval_reciprocal_rank(positive, relevant).item(),
        ]
        assert outcomes[user].tolist() == pytest.approx(theirs, abs=1e-6)


# Sums


def test_sums_are_those_of_the_raw_outcomes() -> None:
    outcomes = some_outcomes()
    sums = metric_sums(outcomes, "masked")
    assert (sums.methods, sums.variant, sums.num_users) == (("backbone", "average", "other"), "masked", 200)
    for p, left in enumerate(outcomes.values()):
        np.testing.assert_allclose(sums.means()[p], left.mean(axis=0), rtol=0, atol=1e-14)
        for q, right in enumerate(outcomes.values()):
            np.testing.assert_allclose(sums.products[:, p, q], np.einsum("um,um->m", left, right), rtol=1e-13)
    assert np.array_equal(sums.products, sums.products.transpose(0, 2, 1))
    assert sums.mean("average", "mrr") == sums.means()[1, METRICS.index("mrr")]


def test_sums_survive_json_exactly() -> None:
    sums = metric_sums(some_outcomes(), "unmasked")
    back = metric_sums_from_dict(json.loads(json.dumps(sums.to_dict())))
    assert (back.methods, back.variant, back.num_users) == (sums.methods, sums.variant, sums.num_users)
    assert np.array_equal(back.sums, sums.sums)
    assert np.array_equal(back.products, sums.products)


def test_nothing_in_the_sums_grows_with_the_users() -> None:
    few, many = (metric_sums(some_outcomes(n, "size"), "masked") for n in (20, 4000))
    assert few.sums.shape == many.sums.shape == (3, len(METRICS))
    assert few.products.shape == many.products.shape == (len(METRICS), 3, 3)


def test_outcomes_of_different_users_are_refused() -> None:
    with pytest.raises(LayoutMismatchError, match=r"'b'.*\(4, {0}\).*\(3, {0}\)".format(len(METRICS))):
        metric_sums({"a": np.zeros((3, len(METRICS))), "b": np.zeros((4, len(METRICS)))}, "masked")


def test_no_users_are_refused_and_not_reported_as_zero() -> None:
    with pytest.raises(ClientError, match=" 0 users"):
        metric_sums({"average": np.zeros((0, len(METRICS)))}, "masked")


def test_malformed_sums_cannot_be_built() -> None:
    good = metric_sums(some_outcomes(9), "masked")
    skewed = good.products.copy()
    skewed[0, 0, 1] += 1.0
    bad = good.sums.copy()
    bad[0, 0] = math.nan
    with pytest.raises(ClientError, match="products"):
        replace(good, products=skewed)
    with pytest.raises(ClientError, match="1 of 27 sums"):
        replace(good, sums=bad)
    with pytest.raises(ClientError, match=r"sums.*\(2, 9\).*\(3, 9\)"):
        replace(good, sums=good.sums[:2])
    with pytest.raises(ClientError, match=r"\['a', 'a', 'b'\]"):
        replace(good, methods=("a", "a", "b"))
    with pytest.raises(ClientError, match=r"'half'.*'unmasked', 'masked'"):
        replace(good, variant="half")  # type: ignore[arg-type]  # what a broken client could send


@pytest.mark.parametrize(
    ("change", "values"),
    [
        ({"metrics": ["recall@3"]}, r"\['recall@3'\].*'recall@1', 'recall@5'"),
        ({"sums": [["x"]]}, "'x'"),
        ({"sums": [[1.0], [1.0, 2.0]]}, r"\(2,\)"),
        ({"extra": 1}, "'extra'"),
    ],
)
def test_malformed_records_are_refused(change: dict[str, object], values: str) -> None:
    record = metric_sums(some_outcomes(9), "masked").to_dict() | change
    with pytest.raises(ClientError, match=values):
        metric_sums_from_dict(record)


# Paired differences


def test_a_paired_difference_by_hand() -> None:
    # recall@1 of four users: 1 0 1 1 against 0 0 1 0, so the differences are 1 0 0 1 with variance 1/3.
    sums = metric_sums(
        {"new": per_user_metrics(np.array([1, 2, 1, 1])), "old": per_user_metrics(np.array([2, 2, 1, 2]))}, "masked"
    )
    found = paired_difference(sums, "new", "old", "recall@1")
    standard_error = math.sqrt(1 / 3 / 4)
    assert found.mean == 0.5
    assert found.standard_error == pytest.approx(standard_error, abs=1e-15)
    assert (found.low, found.high) == pytest.approx((0.5 - 1.96 * standard_error, 0.5 + 1.96 * standard_error))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("num_users", [2, 30, 20_000])
def test_standard_errors_are_those_of_a_paired_t_test(num_users: int, metric: str) -> None:
    outcomes = some_outcomes(num_users, "scipy")
    found = paired_difference(metric_sums(outcomes, "unmasked"), "average", "backbone", metric)
    column = METRICS.index(metric)
    average, backbone = outcomes["average"][:, column], outcomes["backbone"][:, column]
    if np.ptp(average - backbone) == 0:
        assert found.standard_error == 0
        return
    test = stats.ttest_rel(average, backbone)
    interval = test.confidence_interval(0.95)
    quantile = stats.t.ppf(0.975, num_users - 1)
    standard_error = (interval.high - interval.low) / 2 / quantile
    assert found.standard_error == pytest.approx(standard_error, rel=0, abs=1e-10)
    assert found.mean == pytest.approx((interval.high + interval.low) / 2, rel=0, abs=1e-10)
    assert found.high - found.mean == pytest.approx(1.96 * standard_error, rel=0, abs=1e-9)


def test_equal_methods_differ_by_exactly_nothing() -> None:
    outcomes = some_outcomes(1001, "equal")
    sums = metric_sums({"a": outcomes["other"], "b": outcomes["other"].copy()}, "masked")
    for metric in METRICS:
        found = paired_difference(sums, "a", "b", metric)
        assert (found.mean, found.standard_error) == (0, 0)


def test_a_difference_turns_with_its_methods() -> None:
    sums = metric_sums(some_outcomes(), "masked")
    there, back = paired_difference(sums, "average", "other", "mrr"), paired_difference(sums, "other", "average", "mrr")
    assert (there.mean, there.low, there.high) == (-back.mean, -back.high, -back.low)
    assert there.standard_error == back.standard_error


def test_one_user_in_many_is_not_lost_in_rounding() -> None:
    # Two methods that differ for one of 50,000 users by 1/2 - 1/3.
    ranks = np.full(50_000, 2)
    other = ranks.copy()
    other[7] = 3
    found = paired_difference(
        metric_sums({"a": per_user_metrics(ranks), "b": per_user_metrics(other)}, "masked"), "a", "b", "mrr"
    )
    assert found.mean == pytest.approx(1 / 6 / 50_000, rel=1e-6)
    assert found.standard_error == pytest.approx(1 / 6 / 50_000, rel=1e-4)


def test_the_mean_over_domains_weighs_domains_equally() -> None:
    domains = [metric_sums(some_outcomes(n, "domain", n), "masked") for n in (50, 400, 90)]
    parts = [paired_difference(sums, "average", "backbone", "ndcg@10") for sums in domains]
    found = paired_difference_of_mean(domains, "average", "backbone", "ndcg@10")
    assert found.mean == pytest.approx(sum(part.mean for part in parts) / 3, abs=1e-15)
    expected = math.sqrt(sum(part.standard_error**2 for part in parts)) / 3
    assert found.standard_error == pytest.approx(expected, abs=1e-15)
    assert (found.low, found.high) == pytest.approx((found.mean - 1.96 * expected, found.mean + 1.96 * expected))
    assert paired_difference_of_mean(domains[::-1], "average", "backbone", "ndcg@10") == found
    alone = paired_difference_of_mean(domains[:1], "average", "backbone", "ndcg@10")
    assert alone.mean == pytest.approx(parts[0].mean, abs=1e-15)
    assert alone.standard_error == pytest.approx(parts[0].standard_error, abs=1e-15)


def test_differences_that_cannot_be_are_refused() -> None:
    sums = metric_sums(some_outcomes(), "masked")
    with pytest.raises(ClientError, match=r"'ties'.*'backbone', 'average', 'other'"):
        paired_difference(sums, "ties", "backbone", "mrr")
    with pytest.raises(ClientError, match=r"'recall@3'.*'mrr'"):
        paired_difference(sums, "average", "backbone", "recall@3")
    with pytest.raises(ClientError, match=r" 1 user.* 2"):
        paired_difference(metric_sums(some_outcomes(1), "masked"), "average", "backbone", "mrr")
    with pytest.raises(LayoutMismatchError, match=r"\['masked', 'unmasked'\]"):
        paired_difference_of_mean([sums, metric_sums(some_outcomes(), "unmasked")], "average", "backbone", "mrr")
    with pytest.raises(LayoutMismatchError, match=" 0 domains"):
        paired_difference_of_mean([], "average", "backbone", "mrr")
    impossible: MetricSums = replace(sums, products=np.zeros_like(sums.products))
    with pytest.raises(ClientError, match=r"'average'.*'backbone'.*mrr.*-"):
        paired_difference(impossible, "average", "backbone", "mrr")
