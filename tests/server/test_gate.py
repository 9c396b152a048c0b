"""The admission gate and the rollback: numbers against their definitions, and the decisions made from them."""

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from adapters import layout_of, random_adapter, random_adapters

from fedmerge.adapter import Adapter, LoraModule
from fedmerge.config import ATTRIBUTES, Text, from_flat
from fedmerge.domain.catalog import Catalog, make_catalog
from fedmerge.domain.demo import generate_domain
from fedmerge.encoder.backbone import Backbone
from fedmerge.encoder.encode import encode
from fedmerge.encoder.lora import applied
from fedmerge.encoder.text import build_token_table, item_sequences
from fedmerge.errors import MergeError
from fedmerge.evaluation.ranks import METRICS
from fedmerge.evaluation.sums import MetricSums, metric_sums
from fedmerge.federated.product_space import inner_product
from fedmerge.seeding import generator
from fedmerge.server.choice import FALLBACK, dropped_domains, roll_back
from fedmerge.server.gate import (
    ALL,
    LEAST_FACTOR,
    MOST_FACTOR,
    WITHOUT,
    check_experts,
    cohort_geometry,
    leave_one_out_checks,
    leave_one_out_merges,
    norm_checks,
    probe_checks,
    votes_of,
)

LAYOUT = {"encoder.layer.0.query": (5, 7), "encoder.layer.1.value": (6, 4)}
PROBES = ("titles", "categories")
TEXT = Text(max_attribute_tokens=8, max_items=2, max_tokens=32)


def dense(adapter: Adapter) -> np.ndarray:
    """All Δ as one vector, float64."""
    return np.concatenate(
        [
            (module.scaling * (module.lora_B.double() @ module.lora_A.double())).numpy().ravel()
            for module in adapter.modules.values()
        ]
    )


def scaled(adapter: Adapter, factor: float) -> Adapter:
    return Adapter({name: LoraModule(m.lora_A, m.lora_B * factor, m.scaling) for name, m in adapter.modules.items()})


# ---- geometry and norms


def test_inner_products_are_those_of_dense_updates() -> None:
    left, right, _ = random_adapters(LAYOUT).values()
    assert inner_product(left, right) == pytest.approx(dense(left) @ dense(right), rel=1e-12)
    assert inner_product(left, left) == pytest.approx(dense(left) @ dense(left), rel=1e-12)


def test_the_geometry_of_a_cohort_is_that_of_dense_averages() -> None:
    adapters = random_adapters(LAYOUT)  # unequal ranks and scalings; Σ r above min(in, out)
    found = cohort_geometry(adapters)
    updates = {name: dense(adapter) for name, adapter in adapters.items()}
    mean = np.mean(list(updates.values()), axis=0)
    for name, update in updates.items():
        others = np.mean([each for other, each in updates.items() if other != name], axis=0)
        shift = np.linalg.norm(mean - others) / np.linalg.norm(mean)
        cosine = update @ others / np.linalg.norm(update) / np.linalg.norm(others)
        assert found[name] == pytest.approx(
            {"norm": np.linalg.norm(update), "shift": shift, "cosine": cosine}, rel=1e-5, abs=1e-6
        )


def test_the_geometry_of_updates_of_norm_zero_and_of_a_single_one() -> None:
    nothing = scaled(random_adapter(LAYOUT, 2, 1.0, 0), 0.0)
    zero = {"norm": 0.0, "shift": 0.0, "cosine": 0.0}
    assert cohort_geometry({"a": nothing, "b": nothing}) == {"a": zero, "b": zero}
    alone = cohort_geometry({"a": random_adapter(LAYOUT, 2, 1.0, 0)})["a"]
    assert alone["norm"] > 0
    assert (alone["shift"], alone["cosine"]) == (0.0, 0.0)


def failed(norms: Mapping[str, float]) -> list[str]:
    return [domain for domain, check in norm_checks(norms).items() if check.failed]


def test_factors_that_cancel_have_norm_zero() -> None:
    """Rounding makes ‖Δ‖² negative for about half of them, and a client could send such factors."""
    for seed in range(20):
        draw = torch.Generator().manual_seed(seed)
        a, b = 1e3 * torch.randn(2, 24, generator=draw), 1e3 * torch.randn(16, 1, generator=draw)
        module = LoraModule(torch.cat([a, a.sum(dim=0, keepdim=True)]), torch.cat([b, b, -b], dim=1), 1.0)
        found = cohort_geometry({"a": Adapter({"layer": module}), "b": Adapter({"layer": module})})
        assert all(value >= 0 or key == "cosine" for values in found.values() for key, value in values.items())


def test_norms_by_hand() -> None:
    # log-norms 0, 0, 0, log 2.9 or log 3.1: the MAD is 0, so the least factor decides
    assert failed({"a": 1.0, "b": 1.0, "c": 1.0, "d": 2.9}) == []
    assert failed({"a": 1.0, "b": 1.0, "c": 1.0, "d": 3.1}) == ["d"]
    check = norm_checks({"a": 1.0, "b": 1.0, "c": 1.0, "d": 10.0})["d"]
    assert check.value == 10.0
    assert check.limit == pytest.approx(LEAST_FACTOR)
    assert all(value in check.reason for value in ("norm 10,", "10.0 times", "3.0 times"))
    # norms e^-.3, 1, e^.3: the MAD is .3, so the limit is e^(3.5 · 1.4826 · .3); of 1/e, 1, e it would be 179
    wide = norm_checks({"a": np.exp(-0.3), "b": 1.0, "c": np.exp(0.3)})
    assert wide["b"].limit == pytest.approx(np.exp(3.5 * 1.4826 * 0.3))
    assert norm_checks({"a": np.exp(-1.0), "b": 1.0, "c": np.e})["b"].limit == pytest.approx(MOST_FACTOR)
    assert failed({"a": 0.01, "b": 1.0, "c": 1.0, "d": 0.0}) == []  # small updates do no harm
    assert norm_checks({"a": 1.0, "b": 100.0}) == {}
    assert norm_checks({"a": 1.0, "b": 100.0, "c": 0.0}) == {}  # two norms above 0


@pytest.mark.parametrize("num_domains", [3, 4, 8, 40])
def test_clean_cohorts_pass_and_one_large_update_always_fails(num_domains: int) -> None:
    random = np.random.default_rng(num_domains)
    false_alarms = 0
    for _ in range(300):
        norms = np.exp(0.3 * random.standard_normal(num_domains))  # two thirds within a third of the median
        named = {f"d{number}": float(norm) for number, norm in enumerate(norms)}
        false_alarms += len(failed(named))
        assert "d0" in failed(named | {"d0": 100 * float(norms.max())})
    assert false_alarms <= 0.001 * 300 * num_domains


# ---- the probe


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return generate_domain("camping", num_users=1, num_items=60).catalog


def to_one_direction() -> Adapter:
    """Adds a large positive number, gelu(u x) + gelu(-u x), times one vector to every word of the tiny BERT."""
    rng = torch.Generator().manual_seed(0)
    along = 30 * torch.randn(1, 32, generator=rng)
    neurons = torch.zeros(64, 2)
    neurons[0, 0] = neurons[1, 1] = 1
    return Adapter(
        {
            "encoder.layer.1.intermediate.dense": LoraModule(torch.cat([along, -along]), neurons, 1.0),
            "encoder.layer.1.output.dense": LoraModule(
                neurons.sum(1)[None], 30 * torch.randn(32, 1, generator=rng), 1.0
            ),
        }
    )


def test_a_small_update_passes_the_probe_and_a_huge_one_fails(backbone: Backbone, catalog: Catalog) -> None:
    layout = layout_of(backbone)
    before = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    mild = scaled(random_adapter(layout, 2, 1.0, 0), 0.02)
    found = probe_checks(backbone, "camping", mild, catalog, TEXT, 40, 0)
    assert {name: check.failed for name, check in found.items()} == dict.fromkeys(PROBES, False)
    assert found["titles"].limit == pytest.approx(0.6 * found["titles"].details["backbone"])
    assert all(not check.reason for check in found.values())
    assert found == probe_checks(backbone, "camping", mild, catalog, TEXT, 40, 0)
    found = probe_checks(backbone, "camping", to_one_direction(), catalog, TEXT, 40, 0)
    assert found["titles"].failed
    assert f"{found['titles'].value:.3f}" in found["titles"].reason
    broken = scaled(random_adapter(layout, 2, 1.0, 0), float("inf"))
    found = probe_checks(backbone, "camping", broken, catalog, TEXT, 40, 0)
    assert {name: check.value for name, check in found.items()} == {"titles": 0.0, "categories": 0.0}
    assert found["titles"].failed
    assert found["categories"].failed
    assert "0.000" in found["categories"].reason
    assert f"{found['categories'].details['backbone']:.3f}" in found["categories"].reason
    after = backbone.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_catalog_without_titles_is_not_probed(backbone: Backbone) -> None:
    blank, ids = [""] * 50, [f"item {number}" for number in range(50)]
    bare = make_catalog("bare", ids, {"title": ["tent"] * 20 + blank[20:], "brand": blank, "category": blank})
    adapter = random_adapter(layout_of(backbone), 2, 1.0, 0)
    assert probe_checks(backbone, "bare", adapter, bare, TEXT, 40, 0) == {}
    titled = make_catalog("bare", ids, {"title": [f"tent {id}" for id in ids], "brand": blank, "category": blank})
    found = probe_checks(backbone, "bare", adapter, titled, TEXT, 40, 0)
    assert (found["categories"].value, found["categories"].failed) == (0.0, False)


def test_the_probe_equals_its_definition(backbone: Backbone, catalog: Catalog) -> None:
    adapter = random_adapter(layout_of(backbone), 2, 1.0, 0)
    found = probe_checks(backbone, "camping", adapter, catalog, TEXT, 60, 0)
    chosen = generator(0, "probe", "camping").permutation(60)
    texts = {}
    for name, attributes in (("titles", ("title",)), ("items", ATTRIBUTES)):
        columns = {
            key: [values[item] if key in attributes else "" for item in chosen]
            for key, values in catalog.attributes.items()
        }
        table = build_token_table(make_catalog("c", [str(i) for i in chosen], columns), backbone.tokenizer, 8)
        with applied(backbone, adapter):
            texts[name] = encode(backbone, item_sequences(table, backbone.special, 32)).double().numpy()
    categories = [catalog.attributes["category"][item] for item in chosen]
    scores, similar = texts["titles"] @ texts["items"].T, texts["items"] @ texts["items"].T
    ranks = [
        1 + sum(other >= own for k, other in enumerate(row) if k != i)
        for i, (row, own) in enumerate(zip(scores, scores.diagonal(), strict=True))
    ]
    nearest = [sorted((k for k in range(60) if k != i), key=lambda k: -row[k])[:10] for i, row in enumerate(similar)]
    agree = [np.mean([categories[k] == categories[i] for k in near]) for i, near in enumerate(nearest) if categories[i]]
    assert found["titles"].value == pytest.approx(np.mean([1 / rank for rank in ranks]), abs=0.02)
    assert found["categories"].value == pytest.approx(np.mean(agree), abs=0.01)


# ---- leave one out


def test_leave_one_out_merges_are_averages_of_the_others() -> None:
    adapters = random_adapters(LAYOUT)
    merges = leave_one_out_merges(adapters)
    assert list(merges) == [ALL, *(WITHOUT + name for name in sorted(adapters))]
    for label, merge in merges.items():
        taken = [dense(adapter) for name, adapter in adapters.items() if WITHOUT + name != label]
        np.testing.assert_allclose(dense(merge), np.mean(taken, axis=0), atol=1e-6)
    assert leave_one_out_merges({name: adapters[name] for name in ("books", "toys")}) == {}


def sums_of(hits: Mapping[str, Sequence[float]]) -> MetricSums:
    """The same outcomes in every metric."""
    return metric_sums(
        {label: np.repeat(np.array(values)[:, None], len(METRICS), axis=1) for label, values in hits.items()},
        "unmasked",
    )


def test_votes_by_hand() -> None:
    # 100 users: 20 hits with all; without b 40, without c 20.5 (a gain of 2.5 %), without d 24, without e 20 others
    whole = [1.0] * 20 + [0.0] * 80
    sums = sums_of(
        {
            ALL: whole,
            WITHOUT + "b": [1.0] * 40 + [0.0] * 60,
            WITHOUT + "c": [1.0] * 20 + [0.5] + [0.0] * 79,
            WITHOUT + "d": [1.0] * 22 + [0.0] * 78,
            WITHOUT + "e": [0.0] * 80 + [1.0] * 20,
        }
    )
    votes = votes_of(sums, ["b", "c", "d", "e"], "ndcg@10")
    assert {name: vote for name, (_, vote) in votes.items()} == {"b": True, "c": False, "d": False, "e": False}
    assert votes["b"][0] == pytest.approx(1.0)
    assert votes["c"][0] == pytest.approx(0.025)
    nothing = votes_of(sums_of({ALL: [0.0] * 9, WITHOUT + "b": [1.0] * 8 + [0.0]}), ["b"], "ndcg@10")
    assert nothing["b"] == (np.inf, True)


def test_an_expert_fails_only_if_more_than_half_of_the_others_vote_against_it() -> None:
    names = ["a", "b", "c", "d", "e"]
    yes, no = (0.5, True), (-0.1, False)
    votes = {voter: {other: yes if other == "e" else no for other in names if other != voter} for voter in names}
    checks = leave_one_out_checks(votes)
    assert [name for name, check in checks.items() if check.failed] == ["e"]
    assert all(value in checks["e"].reason for value in ("4 of 4", "50 %"))
    # two of five lie about all others; no honest domain fails
    lies = {voter: {other: yes for other in names if other != voter} for voter in ("d", "e")}
    honest = {voter: {other: no for other in names if other != voter} for voter in ("a", "b", "c")}
    assert not any(check.failed for check in leave_one_out_checks({**honest, **lies}).values())
    assert leave_one_out_checks({"a": {"b": yes}}) == {}  # one vote is not a majority


# ---- all of it


def test_the_record_has_every_number_and_names_the_failed_experts(backbone: Backbone, catalog: Catalog) -> None:
    layout = layout_of(backbone)
    cohort = {name: scaled(random_adapter(layout, 2, 1.0, seed), 0.01) for seed, name in enumerate("abcd")}
    cohort["d"] = scaled(cohort["d"], 10.0)
    config = from_flat({"admission.action": "exclude", "admission.probe_items": 30, "admission.leave_one_out": True})
    gate = (cohort, config.admission, config.text, config.seed)
    record = check_experts(*gate, backbone, dict.fromkeys(cohort, catalog), {})
    assert record["action"] == "exclude"
    assert list(record["failed"]) == ["d"]
    assert record["failed"]["d"].startswith("its update has norm ")
    assert set(record["checks"]) == {"norm", *PROBES, "leave-one-out"}
    assert all(set(record["checks"][name]) == set("abcd") for name in ("norm", *PROBES))
    assert set(record["geometry"]["a"]) == {"norm", "shift", "cosine"}
    with pytest.raises(MergeError, match=r"catalog .*\ba\b"):
        check_experts(*gate, backbone, {}, {})
    with pytest.raises(MergeError, match="backbone"):
        check_experts(*gate, None, {}, {})


def test_experts_that_are_zero_are_named_and_fail_no_check(backbone: Backbone) -> None:
    layout = layout_of(backbone)
    cohort = {name: scaled(random_adapter(layout, 2, 1.0, seed), 0.01) for seed, name in enumerate("abcd")}
    cohort["c"] = scaled(cohort["c"], 0.0)
    config = from_flat({"admission.action": "exclude"})
    record = check_experts(cohort, config.admission, config.text, config.seed, None, {}, {})
    assert (record["failed"], list(record["nothing_learned"])) == ({}, ["c"])
    assert "nothing was learned" in record["nothing_learned"]["c"]


# ---- rolling back


def outcomes(**means: float) -> MetricSums:
    """100 users per row; a mean of 0.3 is 30 hits."""
    return sums_of(
        {label: [1.0] * round(100 * mean) + [0.0] * (100 - round(100 * mean)) for label, mean in means.items()}
    )


def test_a_domain_is_dropped_if_its_expert_is_significantly_better() -> None:
    sums = {
        "beauty": outcomes(merge=0.1, expert=0.3),
        "books": outcomes(merge=0.29, expert=0.3),
        "coffee": outcomes(merge=0.4, expert=0.3),
        "unseen": outcomes(merge=0.0),
    }
    found = dropped_domains(sums, "merge", "ndcg@10")
    assert list(found) == ["beauty"]
    assert found["beauty"]["mean"] == pytest.approx(-0.2)
    assert found["beauty"]["high"] < 0


def test_a_rollback_leads_to_the_merge_without_failed_experts_or_to_the_fallback() -> None:
    bad = {"merge": 0.1, "expert": 0.4}
    sums = {
        "beauty": outcomes(**bad, without=0.4),
        "books": outcomes(**bad, without=0.1),
        "coffee": outcomes(merge=0.9, expert=0.1, without=0.0),  # failed, so it has no vote
    }
    decided = roll_back(sums, "merge", ["without"], ["coffee"], "ndcg@10")
    assert decided == {"from": "merge", "to": "without", "dropped": ["beauty", "books"]}
    decided = roll_back(sums, "merge", [], ["coffee"], "ndcg@10")
    assert decided == {"from": "merge", "to": FALLBACK, "dropped": ["beauty", "books"]}
    worse = {domain: outcomes(**bad, without=0.11) for domain in ("beauty", "books")}
    decided = roll_back(worse, "merge", ["without"], [], "ndcg@10")
    assert decided is not None
    assert decided["to"] == FALLBACK  # better, but it drops as many
    fine = {"beauty": outcomes(merge=0.4, expert=0.4, without=0.9)}
    assert roll_back(fine, "merge", ["without"], ["coffee"], "ndcg@10") is None
    only_bad = {"coffee": outcomes(merge=0.1, expert=0.9)}
    assert roll_back(only_bad, "merge", [], ["coffee"], "ndcg@10") is None
