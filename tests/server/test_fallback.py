"""Merged or own expert: chosen a domain at a time on validation, and reported from what was evaluated."""

import json

import numpy as np
import pytest

from fedmerge.errors import RunDirError
from fedmerge.evaluation.ranks import METRICS, per_user_metrics
from fedmerge.evaluation.sums import MetricSums, Variant, metric_sums, paired_difference
from fedmerge.report.run.final_report import Evaluated, run_report
from fedmerge.server.choice import FALLBACK, SERVED, Choice, choose_per_domain, with_served


def sums(variant: Variant = "unmasked", **ranks: list[int]) -> MetricSums:
    outcomes = {method.replace("_", " "): per_user_metrics(np.array(of_method)) for method, of_method in ranks.items()}
    return metric_sums(outcomes, variant)


BETTER = sums(expert=[1, 1], average=[2, 2])
WORSE = sums(expert=[3, 3], average=[2, 2])
EQUAL = sums(expert=[2, 2], average=[2, 2])


def test_the_expert_serves_only_where_it_was_better() -> None:
    found = choose_per_domain({"c": EQUAL, "b": WORSE, "a": BETTER}, "average", "mrr", fallback=True)
    assert found == {
        "a": {"serve": "expert", "merged": 0.5, "expert": 1.0},
        "b": {"serve": "merged", "merged": 0.5, "expert": pytest.approx(1 / 3)},
        "c": {"serve": "merged", "merged": 0.5, "expert": 0.5},
    }
    assert list(found) == ["a", "b", "c"]


def test_without_fallback_the_merge_serves_everybody() -> None:
    found = choose_per_domain({"a": BETTER, "b": WORSE}, "average", "mrr", fallback=False)
    assert {of_domain["serve"] for of_domain in found.values()} == {"merged"}


def test_the_served_row_is_a_copy_with_its_products() -> None:
    before = sums(expert=[1, 4, 9], average=[2, 3, 60])
    after = with_served(before, "expert")
    assert after.methods == ("expert", "average", SERVED)
    for metric in METRICS:
        assert after.mean(SERVED, metric) == before.mean("expert", metric)
        assert paired_difference(after, SERVED, "expert", metric).standard_error == 0
        own = paired_difference(before, "expert", "average", metric)
        assert paired_difference(after, SERVED, "average", metric) == own
    assert before.methods == ("expert", "average")


def test_the_report_names_who_is_served_what() -> None:
    test: dict[str, dict[Variant, MetricSums]] = {
        "a": {
            "unmasked": sums(expert=[1, 1], average=[20, 20]),
            "masked": sums("masked", expert=[1, 1], average=[9, 9]),
        },
        "b": {
            "unmasked": sums(expert=[20, 20], average=[1, 1]),
            "masked": sums("masked", expert=[9, 9], average=[1, 1]),
        },
        "new": {"unmasked": sums(average=[1, 20]), "masked": sums("masked", average=[1, 20])},
    }
    evaluated = Evaluated(
        sums=test,
        roles={"a": "train", "b": "train", "new": "unseen"},
        merged=["average"],
        served="average",
        per_domain=choose_per_domain({"a": BETTER, "b": WORSE}, "average", "mrr", fallback=True),
        excluded={"gone": "it hung"},
        merged_domains=["a", "b", "gone"],
        synthetic=False,
    )
    report = run_report(evaluated, fallback=True)
    cells = [line.split()[3:] for line in report.splitlines() if line.startswith(SERVED)]
    assert cells[0] == ["1.0000", "1.0000", "0.5000", "1.0000", "0.5000"]  # recall@10: a, b, new, mean, mean of unseen
    assert "served their own expert instead, selected on validation: a\n" in report
    assert "excluded, but its expert is still merged: gone: it hung\n" in report
    plain = run_report(evaluated, fallback=False)
    assert SERVED not in plain
    assert "selected on validation; served: average\n" in plain


def test_a_choice_survives_its_file_and_an_incomplete_file_is_refused() -> None:
    per_domain = choose_per_domain({"a": BETTER, "b": WORSE}, "average", "mrr", fallback=True)
    rollback = {"from": "average", "to": FALLBACK, "dropped": ["a"]}
    choice = Choice("mrr", {"average": 0.5}, {"average": "average"}, "average", ["a", "b"], per_domain, {}, rollback)
    entries = json.loads(json.dumps(choice.to_dict()))
    assert Choice.from_dict({**entries, "of a later version": 1}) == choice
    assert choice.fell_back
    with pytest.raises(RunDirError, match="served, per_domain"):
        Choice.from_dict({key: value for key, value in entries.items() if key not in ("served", "per_domain")})


def test_the_merge_of_a_rollback_is_selected_too_and_named_in_the_file() -> None:
    best, served = {"average": "average", "ties": "ties"}, "ties without a"
    rollback = {"from": "average", "to": served, "dropped": ["b"]}
    choice = Choice("mrr", {"average": 0.5, "ties": 0.4}, best, served, ["a", "b"], {}, {}, rollback)
    assert choice.labels == ("average", "ties", served)
    assert not choice.fell_back
    entries = json.loads(json.dumps(choice.to_dict()))
    assert list(entries["best_variants"].items()) == [*best.items(), ("rolled back", served)]
    assert Choice.from_dict(entries) == choice
