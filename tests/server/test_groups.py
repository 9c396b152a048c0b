"""Groups of domains: cosines against dense updates, known structures, the number of groups, rows, refusals."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from adapters import random_adapter
from bench_many_domains import build_backbone, choice_of_groups, federation_in_groups

from fedmerge.adapter import Adapter, LoraModule
from fedmerge.config import from_flat
from fedmerge.errors import ConfigError, LayoutMismatchError
from fedmerge.evaluation.ranks import per_user_metrics
from fedmerge.evaluation.sums import GROUP, MetricSums, metric_sums
from fedmerge.merging.candidate import Candidate, Provenance
from fedmerge.server.choice import Choice, choose_per_domain
from fedmerge.server.groups import (
    Grouping,
    choose_grouping,
    group_domains,
    row_of_choice,
    rows_of,
    similarities,
    with_group_row,
)

LAYOUT = {"layer.0.query": (6, 9), "layer.1.query": (7, 5)}


def turned(adapter: Adapter) -> Adapter:
    """Return the same updates by other factors: turned, and with the scaling inside."""
    modules = {}
    for name, module in adapter.modules.items():
        turn = torch.linalg.qr(torch.randn(module.rank, module.rank, generator=torch.Generator().manual_seed(0)))[0]
        modules[name] = LoraModule(turn @ module.lora_A, module.scaling * module.lora_B @ turn.T, 1.0)
    return Adapter(modules)


def test_similarities_are_cosines_of_dense_updates() -> None:
    adapters = {name: random_adapter(LAYOUT, 1 + k, 0.5 + k, k) for k, name in enumerate("dbca")}
    dense = [
        torch.cat([module.delta_weight().flatten() for module in adapters[name].modules.values()]).double()
        for name in "abcd"
    ]
    expected = torch.stack([torch.stack([a @ b / a.norm() / b.norm() for b in dense]) for a in dense])
    torch.testing.assert_close(similarities(adapters), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(
        similarities({name: turned(each) for name, each in adapters.items()}), expected, atol=1e-6, rtol=1e-6
    )


def test_an_update_of_zero_is_similar_to_nothing() -> None:
    modules = random_adapter(LAYOUT, 2, 1.0, 0).modules
    zero = Adapter({name: LoraModule(each.lora_A, 0 * each.lora_B, 1.0) for name, each in modules.items()})
    found = similarities({"a": Adapter(modules), "b": zero})
    assert found.tolist() == [[pytest.approx(1), 0], [0, 0]]
    with pytest.raises(LayoutMismatchError, match=r"'b'"):
        similarities({"a": Adapter(modules), "b": Adapter({"layer.0.query": modules["layer.0.query"]})})


@pytest.mark.parametrize("num_groups", [1, 2, 4])
def test_known_groups_are_found_and_without_groups_there_is_one_merge(num_groups: int) -> None:
    backbone = build_backbone(32, 2, 0)
    experts, truths = federation_in_groups(backbone, 12, num_groups, 0)
    entry, sums = choice_of_groups(backbone, experts, truths, (2, 3, 4), 0)
    assert entry["number"] == num_groups
    assert entry["scores"].keys() == {f"average in {number} groups" for number in (2, 3, 4)}
    json.dumps(entry, allow_nan=False)
    if num_groups == 1:
        assert "groups" not in entry
        assert entry["gain"] <= entry["needed"] or entry["gain"] <= 0
        return
    names = sorted(experts)
    assert sorted(entry["groups"]) == sorted(names[group::num_groups] for group in range(num_groups))
    assert entry["gain"] > entry["needed"] > 0
    assert len({entry["merges"][name] for name in names}) == num_groups
    best = max(entry["scores"].values())
    assert best == pytest.approx(np.mean([sums[name].mean(entry["label"], "ndcg@10") for name in names]))


def test_more_groups_divide_the_groups_of_fewer_and_ranks_may_differ() -> None:
    experts, _ = federation_in_groups(build_backbone(32, 2, 1), 9, 3, 1)
    found = group_domains(experts, (9, 3, 2, 5, 3, 10))
    assert list(found) == [2, 3, 5, 9]
    for fewer, more in ((2, 3), (3, 5), (5, 9)):
        for group in found[more]:
            assert any({*group} <= {*whole} for whole in found[fewer])
    assert all(sorted(name for group in groups for name in group) == sorted(experts) for groups in found.values())
    shuffled = {name: experts[name] for name in reversed(experts)}
    assert group_domains(shuffled, (2, 3)) == {number: found[number] for number in (2, 3)}
    assert group_domains({"a": experts["domain 00"]}, (2,)) == {}


def sums(**ranks: list[int]) -> MetricSums:
    return metric_sums(
        {method.replace("_", " "): per_user_metrics(np.array(of_method)) for method, of_method in ranks.items()},
        "unmasked",
    )


def grouping(label: str, *groups: str) -> Grouping:
    empty = Adapter({"m": LoraModule(torch.zeros(1, 2), torch.zeros(2, 1), 1.0)})

    def candidate(group: str) -> Candidate:
        return Candidate(empty, Provenance("average", {}, "", label=f"average of {group}"))

    merges = {domain: candidate(group) for group in groups for domain in group}
    return Grouping(label, tuple(tuple(group) for group in groups), merges)


def test_a_small_gain_is_chance_and_a_large_one_is_not() -> None:
    two = grouping("two", "ab", "c")
    better = {name: sums(average=[3, 4, 2, 5], two=[1, 1, 1, 1]) for name in "abc"}
    entry = choose_grouping([two], better, "average", "mrr")
    assert entry is not None
    assert (entry["number"], entry["label"], entry["groups"]) == (2, "two", [["a", "b"], ["c"]])
    assert entry["merges"] == {"a": "average of ab", "b": "average of ab", "c": "average of c"}
    chance = {name: sums(average=[3, 1, 2, 5], two=[1, 2, 2, 5]) for name in "abc"}
    found = choose_grouping([two], chance, "average", "mrr")
    assert found is not None
    assert found["gain"] > 0
    assert found["number"] == 1
    assert choose_grouping([], better, "average", "mrr") is None
    many = [grouping(f"{number}", "ab", "c") for number in range(20)]
    rows = {name: sums(average=[3, 1], **{str(each): [1, 1] for each in range(20)}) for name in "abc"}
    needed = [choose_grouping(each, rows, "average", "mrr") for each in (many[:1], many)]
    assert needed[0] is not None
    assert needed[1] is not None
    assert needed[1]["needed"] > needed[0]["needed"]  # the more that is tried, the more is needed


def test_withheld_scores_keep_one_merge() -> None:
    withheld = sums(average=[3, 4], two=[1, 1])
    withheld.sums[1] = np.nan
    entry = choose_grouping([grouping("two", "a")], {"a": withheld}, "average", "mrr")
    assert entry is not None
    assert entry["number"] == 1
    assert entry["scores"] == {"two": None}
    json.dumps(entry, allow_nan=False)


def test_the_group_is_served_like_other_models_of_a_domain() -> None:
    two = grouping("two", "ab", "c")
    better = {name: sums(average=[3, 4, 2, 5], expert=[2, 2, 2, 2], two=[1, 1, 1, 1]) for name in "abc"}
    entry = choose_grouping([two], better, "average", "mrr")
    rows = with_group_row(entry, better)
    for fallback in (True, False):
        served = choose_per_domain(rows, "average", "mrr", fallback)
        assert {each["serve"] for each in served.values()} == {GROUP}
        assert served["a"][GROUP] == 1.0
    worse = {**rows, "c": with_group_row(entry, {"c": sums(average=[3], expert=[1], two=[2])})["c"]}
    assert choose_per_domain(worse, "average", "mrr", fallback=True)["c"]["serve"] == "expert"
    assert with_group_row({"number": 1}, better) == better
    assert rows_of([two]).keys() == {"a", "b", "c"}
    assert row_of_choice(entry, [two])["a"].keys() == {GROUP}
    assert row_of_choice({"number": 1}, [two]) == row_of_choice(None, []) == {}
    choice = Choice("mrr", {}, {}, "average", [], {}, {}, None, entry)
    assert Choice.from_dict(json.loads(json.dumps(choice.to_dict()))) == choice
    assert "groups" not in Choice("mrr", {}, {}, "average", [], {}, {}, None).to_dict()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"privacy.policy": "aggregate-only", "merge.methods": "average"}, "aggregate-only' hides from the server"),
        ({"rounds.rule": "fedit"}, "rounds.rule = 'fedit' leaves none"),
        ({"head.kind": "local"}, "heads are trained over one merge for all domains"),
        ({"admission.rollback": True, "admission.action": "flag"}, "admission.rollback, which replaces"),
        ({"privacy.policy": "catalog-private", "merge.methods": "mergerec"}, "learned through the clients"),
        ({"mergerec.pseudo_users": "contrastive"}, "a contrast in mergerec"),
        ({"merge.methods": "rmm-style"}, "rmm-style, which searches"),
        ({"merge.groups": "1"}, "greater than or equal to 2"),
        ({"merge.groups": "2,2"}, "groups has 2 more than once"),
    ],
    ids=str,
)
def test_what_cannot_have_groups_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_flat({"merge.groups": "2,3", **changes})
