"""Whether what is served beats popularity and the last item: against outcomes user by user, and what the page says."""

from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from fedmerge.evaluation.ranks import METRICS, per_user_metrics
from fedmerge.evaluation.sums import EXPERT, MetricSums, Variant, inexact_sums, metric_sums
from fedmerge.report.run.alone import METRIC
from fedmerge.report.run.verdict import Judged, judge, verdict
from fedmerge.report.tables import Role

# Rank of the target by user; average is the merge, b is served its own expert.
RANKS: dict[str, dict[str, list[int]]] = {
    "a": {"average": [1, 1, 2, 1], "popularity": [2, 3, 2, 9], "last item": [4, 40, 4, 50]},
    "b": {"average": [30, 30, 30], EXPERT: [1, 2, 8], "popularity": [3, 3, 9], "last item": [1, 1, 1]},
    "new": {"average": [5, 5], "popularity": [1, 1], "last item": [9, 9]},
}
ROLES: dict[str, Role] = {"a": "train", "b": "train", "new": "unseen"}
PER_DOMAIN = {"a": {"serve": "merged"}, "b": {"serve": EXPERT}}


def sums_of(ranks: Mapping[str, Mapping[str, Sequence[int]]], variant: Variant = "unmasked") -> dict[str, MetricSums]:
    return {
        domain: metric_sums({row: per_user_metrics(np.array(of_row)) for row, of_row in rows.items()}, variant)
        for domain, rows in ranks.items()
    }


def judged(ranks: Mapping[str, Mapping[str, Sequence[int]]] = RANKS, variant: Variant = "unmasked") -> Judged:
    return judge(sums_of(ranks, variant), ROLES, PER_DOMAIN, "average")


def ndcg(domain: str, row: str) -> np.ndarray:
    outcomes: np.ndarray = per_user_metrics(np.array(RANKS[domain][row]))[:, METRICS.index(METRIC)]
    return outcomes


def test_the_comparison_is_that_of_the_users_of_what_is_served() -> None:
    found = judged()
    assert [(each.domain, each.role, each.model) for each in found.models] == [
        ("a", "train", "average"),
        ("b", "train", EXPERT),
        ("new", "unseen", "average"),
    ]
    users = {each.domain: ndcg(each.domain, each.model) - ndcg(each.domain, "popularity") for each in found.models}
    for each in found.models:
        against = each.against["popularity"]
        assert against.difference is not None
        assert against.difference.mean == pytest.approx(users[each.domain].mean())
        assert against.served - against.other == pytest.approx(users[each.domain].mean())
        assert each.score == pytest.approx(ndcg(each.domain, each.model).mean())
    mean = found.means["popularity"]
    assert mean.difference is not None
    assert mean.difference.mean == pytest.approx((users["a"].mean() + users["b"].mean()) / 2)  # not the unseen one
    errors = [users[name].std(ddof=1) / len(users[name]) ** 0.5 for name in "ab"]
    assert mean.difference.standard_error == pytest.approx(np.hypot(*errors) / 2)


def test_above_both_it_names_the_domains_where_it_is_not() -> None:
    found = verdict({"unmasked": judged()})
    assert not found.is_warning
    assert found.text.startswith("What is served ranks above popularity and the last item: NDCG@10 0.")
    assert "mean over 2 training domains on test" in found.text
    assert "not above popularity in new (unseen) and not above the last item in b" in found.text
    assert found.short == "above popularity and last item, not in 2 of 3 domains; may be chance for the last item"


def with_popularity(ranks: list[int]) -> dict[str, dict[str, list[int]]]:
    return {name: {**rows, "popularity": ranks[: len(rows["average"])]} for name, rows in RANKS.items()}


def test_below_popularity_is_the_first_thing_said() -> None:
    found = verdict({"unmasked": judged(with_popularity([1, 1, 1, 1]))})
    assert found.is_warning
    assert found.text.startswith("What is served ranks below popularity: NDCG@10 ")
    assert "against 1.0000, mean over 2 training domains" in found.text
    assert found.short == "below popularity"
    equal = {name: {**rows, "popularity": rows.get(EXPERT, rows["average"])} for name, rows in RANKS.items()}
    found = verdict({"unmasked": judged(equal)})
    assert found.is_warning
    assert found.text.startswith("What is served ranks no higher than popularity: ")
    assert found.short == "no higher than popularity"


def test_chance_is_named() -> None:
    close = {"a": {"average": [1, 8, 1, 9], "popularity": [9, 1, 9, 1], "last item": [99] * 4}}
    found = verdict({"unmasked": judge(sums_of(close), {"a": "train"}, {}, "average")})
    assert "one training domain" in found.text
    assert "; the difference may be chance for popularity" in found.text


def test_below_in_the_ranking_that_is_served_is_a_warning_too() -> None:
    masked = judged(with_popularity([1, 1, 1, 1]), "masked")
    found = verdict({"unmasked": judged(), "masked": masked})
    assert found.is_warning
    first, _, second = found.text.partition(". Without the items of a user's history, as fedmerge recommend ranks, it ")
    assert first.startswith("What is served ranks above")
    assert second.startswith("ranks below popularity: NDCG@10 ")
    assert found.short.endswith("; masked below popularity")
    both = verdict({"unmasked": judged(with_popularity([1, 1, 1, 1])), "masked": masked})
    assert "Without the items" not in both.text  # the same is not said twice


def test_without_the_rows_nothing_is_claimed() -> None:
    bare = {name: {row: rows[row] for row in rows if row in ("average", EXPERT)} for name, rows in RANKS.items()}
    found = verdict({"unmasked": judged(bare)})
    assert found.text.startswith("Nothing says whether what is served is better than popularity")
    assert not found.is_warning
    assert found.short == "not compared"
    # scores that a client withholds
    b = sums_of(RANKS)["b"]
    withheld = inexact_sums(b.methods, "unmasked", b.num_users, np.full_like(b.sums, np.nan), 1.0)
    of_a = judge({**sums_of(RANKS), "b": withheld}, ROLES, PER_DOMAIN, "average")
    assert of_a.num_compared == 1
    assert of_a.models[1].against == {}
    unknown = judge(sums_of(RANKS), ROLES, {"a": {"serve": "head on the merge"}}, "average")
    assert np.isnan(unknown.models[0].score)
