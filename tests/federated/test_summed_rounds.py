"""Rounds of secure sums: they equal rounds of single adapters, and rules that need single adapters are refused."""

from typing import Any

import numpy as np
import pytest
from federated_oracles import COUNTS, RANKS, dense, error, fresh, mean, random_clients, shares, trained

from fedmerge.config import SUMMED_METHODS, SUMMED_RULES, ExperimentConfig, from_flat
from fedmerge.errors import AggregationError, ConfigError
from fedmerge.federated.rounds import aggregate, aggregate_mean, initial_state, state_of, state_tensors
from fedmerge.federated.rules import RULES
from fedmerge.federated.summed import adapter_of_mean, num_summed, summed_rank, summed_values
from fedmerge.merging.methods import METHODS


def test_the_configuration_names_the_rules_and_methods_for_sums() -> None:
    assert {name for name, row in RULES.items() if row.summed} == set(SUMMED_RULES)
    linear = {name for name, row in METHODS.items() if row.coefficients}
    assert linear - {"linear-by-layer", "livar-style"} == set(SUMMED_METHODS)  # these weigh each domain
    assert RULES["flora"].summed is None  # a concatenation shows every block
    assert RULES["hetlora"].summed is None  # its weights are norms of single adapters


@pytest.mark.parametrize("continuation", ["truncated", "frozen"])
@pytest.mark.parametrize("rule", SUMMED_RULES)
def test_rounds_of_means_equal_rounds_of_adapters(rule: str, continuation: str) -> None:
    row = RULES[rule]
    parameters: dict[str, Any] = {"continuation": continuation} if "continuation" in row.parameters else {}
    ranks = dict.fromkeys(RANKS, 2) if rule in ("fedit", "ffa-lora") else RANKS
    seen = hidden = initial_state(fresh(ranks))
    for number in range(3):
        here = [client for client in ranks if number != 1 or client != "toys"]
        local = trained(seen, here, only_B=rule == "ffa-lora")
        weights, parts = {client: COUNTS[client] for client in local}, shares(local)
        summed = row.summed or "updates"
        values = {
            client: summed_values(summed, adapter, seen.starts[client] if row.of == "updates" else None)
            for client, adapter in local.items()
        }
        total = np.sum([parts[client] * values[client].astype(np.float64) for client in local], axis=0)
        hidden = aggregate_mean(rule, seen, total, weights, **parameters)
        seen = aggregate(rule, seen, local, weights, **parameters)
        assert error(dense(hidden.adapter), dense(seen.adapter)) < 1e-5
        assert hidden.report is not None
        assert seen.report is not None
        assert hidden.report.error == (None if rule == "fedit" else seen.report.error)
        assert hidden.report.rank == seen.report.rank
        assert set(hidden.report.bytes_up.values()) == {4 * len(total)}
        assert len(total) == num_summed(summed, seen.starts["books"])
    tensors, record = state_tensors(hidden)
    assert state_of(tensors, record).report == hidden.report


def test_the_mean_of_updates_is_cut_to_the_ranks_it_can_have() -> None:
    clients = random_clients({"a": 1, "b": 2, "c": 1})
    values = np.mean([summed_values("updates", adapter, None) for adapter in clients.values()], axis=0)
    noisy = values + np.random.default_rng(0).uniform(-1e-8, 1e-8, values.shape)
    made = adapter_of_mean("updates", noisy, clients["a"], summed_rank(clients))
    assert {module.rank for module in made.modules.values()} == {4}
    assert error(dense(made), mean([dense(adapter) for adapter in clients.values()], [1, 1, 1])) < 1e-6
    with pytest.raises(AggregationError, match=rf"\(5,\).*\({len(values)},\)"):
        adapter_of_mean("updates", values[:5], clients["a"], None)


def test_a_rule_that_needs_single_adapters_is_refused_in_a_round() -> None:
    state = initial_state(fresh({"a": 1, "b": 1, "c": 1}))
    for rule in ("flora", "median", "ties"):
        with pytest.raises(ConfigError, match=f"{rule}.*weighted-average"):
            aggregate_mean(rule, state, np.zeros(3), {"a": 1.0})
    with pytest.raises(AggregationError, match=r"\bx\b.*a, b, c"):
        aggregate_mean("fedit", state, np.zeros(3), {"a": 1.0, "x": 1.0})


HIDDEN = {"privacy.policy": "aggregate-only", "merge.methods": "average"}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"merge.methods": "average,mergerec"}, r"merge\.methods.*mergerec.*privacy\.policy"),
    (
        {"merge.methods": "ties"},
        r"merge\.methods.*ties.*average, task-arithmetic, knots-task-arithmetic.*privacy\.policy",
    ),
    ({"rounds.rule": "flora"}, r"rounds\.rule.*flora"),
    ({"rounds.rule": "median"}, r"rounds\.rule.*median.*weighted-average"),
    ({"rounds.rule": "krum"}, r"rounds\.rule.*krum"),
    ({"rounds.rule": "hetlora"}, r"rounds\.rule.*hetlora"),
    ({"rounds.rule": "mergerec"}, r"rounds\.rule.*mergerec"),
    ({"rounds.rule": "fedit", "lora.ranks": "books=2"}, r"lora\.ranks.*rounds\.rule = 'fedit'"),
    ({"domains.train": "books,coffee"}, r"\b2 clients.*\b3\b"),
    ({"rounds.rule": "fedit", "rounds.fraction": 0.5}, r"\b2 clients.*rounds\.fraction"),
    (
        {"rounds.rule": "fedit", "rounds.weights": "users", "domains.train": "a,b,c"},
        r"rounds\.weights = 'users'.*\b3 clients.*rounds\.weights = 'equal'",
    ),
    ({"privacy.threshold": 2}, r"privacy\.threshold = 2\b.*\b4 clients.*3 to 4"),
    ({"privacy.threshold": 5}, r"privacy\.threshold = 5\b.*\b4 clients"),
    ({"dp.mode": "domain-central", "dp.epsilon": 4.0, "dp.delta": 1e-4}, r"dp\.mode.*'domain-central'"),
    ({"until": "train"}, r"until = 'train'"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_settings_that_need_single_adapters_are_refused_before_a_run(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_flat(HIDDEN | changes)


def test_settings_for_sums_are_accepted() -> None:
    for changes in ({}, {"merge.methods": "task-arithmetic"}, {"privacy.threshold": 4}, {"domains.train": "a,b,c"}):
        assert from_flat(HIDDEN | changes).privacy.policy == "aggregate-only"
    for rule in SUMMED_RULES:
        assert (
            from_flat({"privacy.policy": "aggregate-only", "rounds.rule": rule, "until": "train"}).rounds.rule == rule
        )
    assert ExperimentConfig().privacy.threshold is None
