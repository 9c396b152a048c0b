"""The choice among merge, expert and heads, and the rows of heads in replies."""

import math

import numpy as np
import pytest

from fedmerge.config import Privacy
from fedmerge.errors import ClientError
from fedmerge.evaluation.ranks import METRICS, per_user_metrics
from fedmerge.evaluation.sums import EXPERT, VARIANTS, MetricSums, Variant, inexact_sums, metric_sums
from fedmerge.server.choice import MERGED, choose_per_domain, served_row
from fedmerge.server.reply_checks import check_sums

HEAD, FUSED = "head on the merge", "head on the merge, fused"
HEADS = {"a": (HEAD, FUSED)}


def sums(variant: Variant = "unmasked", /, **ranks: int) -> MetricSums:
    """Return sums of two users who have these ranks."""
    names = {"head": HEAD, "fused": FUSED}
    outcomes = {names.get(row, row): per_user_metrics(np.array([rank, rank])) for row, rank in ranks.items()}
    return metric_sums(outcomes, variant)


@pytest.mark.parametrize(
    ("ranks", "serve"),
    [
        ({"average": 4, "expert": 3, "head": 2, "fused": 1}, FUSED),
        ({"average": 4, "expert": 3, "head": 1, "fused": 2}, HEAD),
        ({"average": 4, "expert": 1, "head": 2, "fused": 2}, EXPERT),
        ({"average": 1, "expert": 1, "head": 1, "fused": 1}, MERGED),
        ({"average": 2, "expert": 3, "head": 1, "fused": 1}, HEAD),
    ],
)
def test_the_best_is_served_and_of_equals_the_first(ranks: dict[str, int], serve: str) -> None:
    (entry,) = choose_per_domain({"a": sums(**ranks)}, "average", "mrr", True, HEADS).values()
    assert entry == {
        "serve": serve,
        **{
            name: pytest.approx(1 / ranks[row])
            for name, row in ((MERGED, "average"), (EXPERT, "expert"), (HEAD, "head"), (FUSED, "fused"))
        },
    }


def test_a_domain_without_heads_or_fallback_chooses_as_before() -> None:
    of_a, of_b = sums(average=4, expert=3, head=2, fused=1), sums(average=2, expert=3)
    found = choose_per_domain({"a": of_a, "b": of_b}, "average", "mrr", True, HEADS)
    assert {domain: entry["serve"] for domain, entry in found.items()} == {"a": FUSED, "b": MERGED}
    assert set(found["b"]) == {"serve", MERGED, EXPERT}
    kept = choose_per_domain({"a": of_a, "b": of_b}, "average", "mrr", False, HEADS)
    assert {entry["serve"] for entry in kept.values()} == {MERGED}


def test_a_dropped_domain_is_served_the_best_of_the_others() -> None:
    best_is_merge = {"a": sums(average=1, expert=3, head=2, fused=4)}
    for fallback, heads, serve in ((True, HEADS, HEAD), (True, {}, EXPERT), (False, HEADS, EXPERT)):
        found = choose_per_domain(best_is_merge, "average", "mrr", fallback, heads, dropped=["a"])
        assert found["a"]["serve"] == serve


def test_a_withheld_score_is_not_served_but_a_withheld_merge_is() -> None:
    def withheld(*rows: str) -> dict[str, MetricSums]:
        whole = sums(average=4, expert=3, head=2, fused=1)
        values = whole.sums.copy()
        values[[whole.methods.index(row) for row in rows]] = math.nan
        return {"a": inexact_sums(whole.methods, "unmasked", 2, values, 0.5)}

    without_fused = choose_per_domain(withheld(FUSED), "average", "mrr", True, HEADS)["a"]
    assert (without_fused["serve"], without_fused[FUSED]) == (HEAD, None)
    assert choose_per_domain(withheld("average"), "average", "mrr", True, HEADS)["a"]["serve"] == MERGED


def test_the_served_row_is_that_of_the_entry() -> None:
    per_domain = {"a": {"serve": FUSED}, "b": {"serve": "merged"}, "c": "damaged"}
    assert [served_row(per_domain, "average", name) for name in "abcd"] == [FUSED, "average", "average", "average"]


def both(**ranks: int) -> dict[Variant, MetricSums]:
    return {variant: sums(variant, **ranks) for variant in VARIANTS}


def test_rows_of_heads_are_exactly_those_that_were_asked_for() -> None:
    asked, reply = ["average", HEAD, FUSED], both(average=3, head=2, fused=1)
    check_sums("a", reply, asked, True, (1, 2), Privacy())
    with pytest.raises(ClientError, match=r"domain a: its metric sums lack \['head on the merge, fused'\]"):
        check_sums("a", both(average=3, head=2), asked, True, (1, 2), Privacy())
    with pytest.raises(ClientError, match=r"which were not requested"):
        check_sums("a", reply, ["average", HEAD], True, (1, 2), Privacy())
    assert len(METRICS) == reply["masked"].sums.shape[1]
