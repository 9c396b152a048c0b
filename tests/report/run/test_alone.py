"""Alone against joined, against differences computed user by user."""

import numpy as np
import pytest

from fedmerge.evaluation.ranks import METRICS, per_user_metrics
from fedmerge.evaluation.sums import MetricSums, inexact_sums, metric_sums
from fedmerge.report.run.alone import MEAN, METRIC, alone_text, compare_alone, note_on_heads

HEAD = "head on the expert"
RANKS = {
    "a": {
        "average": [9, 2, 3, 40],
        "expert": [5, 5, 6, 2],
        HEAD: [2, 3, 1, 8],
        "sasrec": [4, 4, 4, 90],
        "popularity": [1] * 4,
    },
    "b": {"average": [1, 2, 8], "expert": [2, 2, 9], "popularity": [1] * 3},
}
PER_DOMAIN = {
    "a": {"serve": "head on the merge", "merged": 0.1, "expert": 0.2, HEAD: 0.3},
    "b": {"serve": "merged", "merged": 0.5, "expert": 0.4},
    "gone": {"serve": "merged", "merged": 0.5, "expert": 0.4},
}


def outcomes(domain: str) -> dict[str, np.ndarray]:
    ranks = dict(RANKS[domain])
    if domain == "a":
        ranks["head on the merge"] = [1, 3, 2, 7]
    return {row: per_user_metrics(np.array(of_row)) for row, of_row in ranks.items()}


@pytest.fixture
def sums() -> dict[str, MetricSums]:
    return {domain: metric_sums(outcomes(domain), "unmasked") for domain in RANKS}


def test_alone_is_the_best_own_and_the_difference_is_that_of_the_users(sums: dict[str, MetricSums]) -> None:
    a, b, mean = compare_alone(sums, PER_DOMAIN, "average")
    assert (a.domain, a.alone, a.joined) == ("a", HEAD, "head on the merge")
    assert (b.domain, b.alone, b.joined) == ("b", "expert", "average")
    errors = []
    for row in (a, b):
        of_users = outcomes(row.domain)
        users = of_users[row.joined][:, METRICS.index(METRIC)] - of_users[row.alone][:, METRICS.index(METRIC)]
        assert row.difference is not None
        assert row.difference.mean == pytest.approx(users.mean())
        assert row.scores[1] - row.scores[0] == pytest.approx(users.mean())
        errors.append(users.std(ddof=1) / len(users) ** 0.5)
        assert row.difference.standard_error == pytest.approx(errors[-1])
    assert mean.domain == MEAN
    assert mean.difference is not None
    assert mean.difference.standard_error == pytest.approx((errors[0] ** 2 + errors[1] ** 2) ** 0.5 / 2)


def test_sasrec_has_a_comparison_of_its_own_where_it_was_evaluated(sums: dict[str, MetricSums]) -> None:
    (row,) = compare_alone(sums, PER_DOMAIN, "average", "sasrec")
    assert (row.domain, row.alone, row.joined) == ("a", "sasrec", "head on the merge")
    text = alone_text({"unmasked": sums}, PER_DOMAIN, "average")
    assert [line.split()[0] for line in text.splitlines()[6:]] == ["a", "b", "mean", "a"]


def test_withheld_sums_and_rounds_without_experts_have_no_comparison(sums: dict[str, MetricSums]) -> None:
    b = sums["b"]
    withheld = inexact_sums(b.methods, "unmasked", b.num_users, np.full_like(b.sums, np.nan), 1.0)
    assert [row.domain for row in compare_alone({**sums, "b": withheld}, PER_DOMAIN, "average")] == ["a"]
    after_rounds = {"a": {"serve": "merged", "merged": 0.1}}
    assert compare_alone(sums, after_rounds, "average") == []
    assert alone_text({"unmasked": {"b": b}}, {"b": {"serve": "merged", "merged": 0.1}}, "average") == ""


def test_a_head_on_the_backbone_is_alone_and_a_gain_of_heads_only_is_named(sums: dict[str, MetricSums]) -> None:
    backbone = "head on the backbone, fused"
    a = sums["a"]
    with_head = metric_sums({**outcomes("a"), backbone: per_user_metrics(np.array([1, 2, 1, 5]))}, "unmasked")
    entry = {"serve": "head on the merge", "merged": 0.1, "expert": 0.2, backbone: 0.25}
    (row,) = compare_alone({"a": with_head}, {"a": entry}, "average")
    assert row.alone == backbone
    assert note_on_heads({"a": entry}) == ""
    only_merge = {"a": {"serve": "head on the merge", "merged": 0.1, "expert": 0.2}}
    assert "merge,expert" in note_on_heads(only_merge)
    assert note_on_heads(only_merge) in alone_text({"unmasked": {"a": a}}, only_merge, "average")
