"""Clients, settings and states that aggregation rules refuse."""

import math
from dataclasses import replace
from typing import Any

import pytest
from adapters import random_adapter
from federated_oracles import COUNTS, RANKS, equal, fresh, one, row_of, run, trained, vectors

from fedmerge.adapter import Adapter
from fedmerge.errors import AggregationError, ConfigError, LayoutMismatchError, MergeError
from fedmerge.federated.averages import fedit, ffa_lora, hetlora
from fedmerge.federated.robust import krum, multi_krum, trimmed_mean
from fedmerge.federated.rounds import aggregate, initial_state


def test_wrong_clients_are_refused() -> None:
    state = initial_state(fresh(RANKS))
    local = trained(state)
    refused: list[tuple[type[Exception], str, str, dict[str, Adapter]]] = [
        (AggregationError, "flora, round 1.*books", "flora", {}),
        (AggregationError, "ducks.*books", "flora", {"ducks": local["toys"]}),
        (AggregationError, r"fedit.*layer\.0\.query.*books 2, coffee 2, games 3", "fedit", local),
        (MergeError, r"'toys'.*layer\.0\.query: 1 .*lora_B", "median", {
            **local, "toys": changed(local["toys"], "layer.0.query", float("nan"))}),
        (LayoutMismatchError, r"'toys'.*layer\.1\.query", "flexlora", {
            **local, "toys": Adapter({n: m for n, m in local["toys"].modules.items() if n != "layer.1.query"})}),
        (LayoutMismatchError, r"'toys'.*layer\.0\.query.*\(3, ",
         "flexlora", {**local, "toys": local["books"]}),
        (LayoutMismatchError, r"'toys'.*top.*layer\.0\.query", "flexlora", {
            "toys": random_adapter({"top": (3, 3)}, 3, 2.0, 0)}),
    ]  # fmt: skip
    for kind, values, rule, adapters in refused:
        with pytest.raises(kind, match=values):
            aggregate(rule, state, adapters)


def changed(adapter: Adapter, name: str, value: float) -> Adapter:
    lora_B = adapter.modules[name].lora_B.clone()
    lora_B[0, 0] = value
    return Adapter({**adapter.modules, name: replace(adapter.modules[name], lora_B=lora_B)})


def test_ffa_lora_refuses_an_A_that_is_not_shared() -> None:
    state = initial_state(fresh(dict.fromkeys(RANKS, 2)))
    with pytest.raises(AggregationError, match=r"ffa-lora.*'books'.*layer\.0\.query.*lora_A"):
        aggregate("ffa-lora", state, trained(state))
    apart = {"a": one([[1.0]], [[2.0]]), "b": one([[1.5]], [[2.0]])}
    with pytest.raises(AggregationError, match=r"'b'.* m: .*'a'.*0\.5"):
        ffa_lora(apart, equal(apart))
    uneven = {"a": one([[1.0]], [[2.0]]), "b": one([[1.0]], [[2.0]], 2.0)}
    for rule in (fedit, ffa_lora, hetlora):
        with pytest.raises(AggregationError, match=r" m: .*a 1, b 2"):
            rule(uneven, equal(uneven))


def test_robust_rules_refuse_too_few_clients() -> None:
    clients = vectors([1.0], [2.0], [3.0], [4.0])
    with pytest.raises(AggregationError, match=r"krum.* 4 .*num_malicious 1.* 5 "):
        krum(clients, {}, 1)
    with pytest.raises(AggregationError, match=r"krum.* 4 "):
        multi_krum(clients, equal(clients), 1, 1)
    with pytest.raises(AggregationError, match=r" 4 .*trim 0\.2.* 5 "):
        trimmed_mean(clients, {}, 0.2)
    assert row_of(trimmed_mean(vectors(*([float(k)] for k in range(100))), {}, 0.29).adapter) == [49.5]
    five = vectors([1.0], [2.0], [3.0], [4.0], [5.0])
    with pytest.raises(AggregationError, match=r"num_selected 5 of 5 .* 4"):
        multi_krum(five, equal(five), 1, 5)


def test_wrong_settings_are_refused() -> None:
    state = initial_state(fresh(RANKS))
    local = trained(state)
    refused: list[tuple[str, str, dict[str, Any]]] = [
        ("fedsgd", "'fedsgd'.*weighted-average, fedit", {}),
        ("mergerec", "'mergerec'.*function", {}),
        (
            "krum",
            "'krum'.*num_malicious.*-1.* 0",
            {"num_malicious": -1},
        ),
        ("flora", "'flora'.*continuation", {"continuation": "frozen"}),
        ("trimmed-mean", "trim.*0.5", {"trim": 0.5}),
        ("iso-c", "scope.*'model'.*tensor", {"scope": "model"}),
        ("median", "continuation.*'factors'.*truncated, frozen", {"continuation": "factors"}),
    ]
    for rule, values, parameters in refused:
        with pytest.raises(ConfigError, match=values):
            aggregate(rule, state, local, **parameters)
    with pytest.raises(AggregationError, match=r"client_weights.*books.*books, coffee"):
        aggregate("flora", state, local, {"books": 1.0})
    for weight in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(AggregationError, match=rf"client_weights.*'toys'.*{weight}"):
            aggregate("flora", state, local, {**COUNTS, "toys": weight})


def test_states_that_do_not_fit_are_refused() -> None:
    with pytest.raises(AggregationError, match=r"'a'.* m: .*scaling 1 and 1 .*lora_B"):
        initial_state({"a": one([[1.0]], [[2.0]])})
    with pytest.raises(AggregationError, match="scaling 0 and 0 "):
        initial_state({"a": one([[1.0]], [[0.0]], 0.0)})
    frozen = run("flora", 1)
    with pytest.raises(AggregationError, match="flexlora, round 2"):
        aggregate("flexlora", frozen, trained(frozen))
    adam = run("fedadam", 1)
    with pytest.raises(AggregationError, match=r"fedyogi.*fedadam"):
        aggregate("fedyogi", adam, trained(adam))
