"""Aggregation rules over rounds: by hand, against dense oracles, and what clients continue from."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import federated_oracles as oracles
import numpy as np
import pytest
import torch
from adapters import Layout, random_adapter
from federated_oracles import (
    COUNTS,
    LAYOUT,
    RANKS,
    dense,
    equal,
    error,
    fresh,
    one,
    random_clients,
    row_of,
    run,
    shares,
    trained,
    vectors,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fedmerge.adapter import Adapter, adapter_sha256
from fedmerge.client.training.losses import proximal_term
from fedmerge.encoder.backbone import Backbone
from fedmerge.encoder.lora import adapter_of, attach
from fedmerge.errors import AggregationError
from fedmerge.federated.averages import fedit, ffa_lora, hetlora, weighted_average
from fedmerge.federated.product_space import client_update, compressed, decomposed, relative_error
from fedmerge.federated.robust import coordinate_median, krum, krum_scores, multi_krum, trimmed_mean
from fedmerge.federated.rounds import aggregate, fresh_seed, initial_state, state_of, state_tensors
from fedmerge.federated.rules import CONTINUATIONS, RULES, rule_named, rules_table
from fedmerge.federated.server_steps import fedadam, fedavgm, fedyogi
from fedmerge.merging.methods import METHODS
from fedmerge.merging.training_free import merge_adapters

EXAMPLES = settings(deadline=None, max_examples=12, derandomize=True)
TRAINING_FREE = [name for name, row in METHODS.items() if not (row.learned or row.signals) and row.most_domains is None]


# by hand


def test_fedit_by_hand() -> None:
    adapters = {"a": one([[1.0]], [[2.0]]), "b": one([[3.0]], [[4.0]])}
    found = fedit(adapters, equal(adapters))
    assert row_of(found.adapter) == [6.0]  # (1 + 3) / 2 · (2 + 4) / 2, where the mean of 2 and 12 is 7
    assert found.error == pytest.approx(1 / 7)
    assert row_of(weighted_average(adapters, equal(adapters)).adapter) == [7.0]
    assert row_of(weighted_average(adapters, {"a": 0.75, "b": 0.25}).adapter) == [4.5]
    assert row_of(fedit(adapters, {"a": 0.75, "b": 0.25}).adapter) == [1.5 * 2.5]
    assert fedit({"a": adapters["a"]}, {"a": 1.0}).error == 0


def test_ffa_lora_by_hand() -> None:
    adapters = {"a": one([[1.0, 2.0]], [[2.0]], 0.5), "b": one([[1.0, 2.0]], [[4.0]], 0.5)}
    found = ffa_lora(adapters, {"a": 0.25, "b": 0.75}).adapter
    assert row_of(found) == [1.75, 3.5]  # .5 · 3.5 · [1, 2]
    assert found.modules["m"].rank == 1


def test_hetlora_by_hand() -> None:
    # norms 3 and 1: weights 3/4 and 1/4; the second row is the wider client's alone
    adapters = {"a": one([[3.0]], [[1.0]]), "b": one([[1.0], [0.0]], [[1.0, 2.0]])}
    found = hetlora(adapters, equal(adapters)).adapter.modules["m"]
    assert found.lora_A.tolist() == [[2.5], [0.0]]
    assert found.lora_B.tolist() == [[1.0, 0.5]]
    nothing = {client: one([[1.0]], [[0.0]]) for client in ("a", "b")}
    assert hetlora(nothing, equal(nothing)).adapter.modules["m"].lora_A.tolist() == [[1.0]]


def test_robust_rules_by_hand() -> None:
    clients = vectors([1.0, 5.0], [2.0, 4.0], [3.0, 3.0], [4.0, 2.0], [100.0, -100.0])
    assert row_of(coordinate_median(clients, {}).adapter) == [3.0, 3.0]
    assert row_of(trimmed_mean(clients, {}, 0.2).adapter) == [3.0, 3.0]
    assert row_of(coordinate_median(vectors([1.0], [2.0], [4.0], [9.0]), {}).adapter) == [3.0]
    # the two nearest of the others: clients 1 and 2 have 2 + 2, clients 0 and 3 have 2 + 8
    scores = {"client 0": 10.0, "client 1": 4.0, "client 2": 4.0, "client 3": 10.0, "client 4": 39638.0}
    assert krum_scores(clients, 1) == pytest.approx(scores)
    found = krum(clients, {}, 1)
    assert (found.selected, row_of(found.adapter)) == (("client 1",), [2.0, 4.0])  # the first of two equal scores
    several = multi_krum(clients, equal(clients), 1, None)
    assert (several.selected, row_of(several.adapter)) == (("client 1", "client 2"), [2.5, 3.5])
    four = multi_krum(clients, equal(clients), 1, 4)
    assert (len(four.selected), row_of(four.adapter)) == (4, [2.5, 3.5])


def test_server_steps_by_hand() -> None:
    update = one([[2.0]], [[1.0]])
    step, moments = fedavgm(update, None, learning_rate=0.5, momentum=0.9)
    assert row_of(step) == [1.0]
    step, moments = fedavgm(update, moments, learning_rate=0.5, momentum=0.9)
    assert row_of(step) == pytest.approx([1.9])  # .5 · (.9 · 2 + 2)
    assert (moments.num_steps, moments.second) == (2, {})
    # m = .2, v = .04, √v = .2; the bias is corrected by √(1 − .99²) / (1 − .9²)
    step, _ = fedadam(update, None, learning_rate=0.1, beta_1=0.9, beta_2=0.99, tau=0.3)
    assert row_of(step) == pytest.approx([0.1 * math.sqrt(1 - 0.99**2) / (1 - 0.9**2) * 0.2 / 0.5], rel=1e-5)
    step, moments = fedyogi(update, None, learning_rate=0.1, beta_1=0.9, beta_2=0.99, tau=0.3)
    assert row_of(step) == pytest.approx([0.1 * 0.2 / 0.5], rel=1e-5)
    assert moments.second["m"].item() == pytest.approx(0.04)


def test_the_proximal_term_by_hand() -> None:
    tensors = [torch.tensor([[1.0, 2.0]], requires_grad=True), torch.tensor([3.0], requires_grad=True)]
    start = [torch.tensor([[0.0, 4.0]]), torch.tensor([3.5], requires_grad=True)]
    term = proximal_term(tensors, start, 0.5)
    assert term.item() == 0.25 * (1 + 4 + 0.25)
    term.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    assert [tensor.grad.tolist() for tensor in tensors if tensor.grad is not None] == [[[0.5, -1.0]], [-0.25]]
    assert start[1].grad is None
    with pytest.raises(ValueError, match=r"\(1,\).*\(2,\)"):
        proximal_term([torch.zeros(1)], [torch.zeros(2)], 1.0)


# against oracles


@pytest.mark.parametrize("counts", [dict.fromkeys(COUNTS, 1.0), COUNTS], ids=["equal", "counted"])
def test_stacking_svd_and_average_agree_for_one_round(counts: dict[str, float]) -> None:
    local = trained(initial_state(fresh(RANKS)))
    expected = oracles.mean([dense(local[client]) for client in RANKS], [counts[client] for client in RANKS])
    found = {
        rule: aggregate(rule, initial_state(fresh(RANKS)), local, counts)
        for rule in ("flora", "flexlora", "weighted-average", "average")
    }
    for state in found.values():
        assert error(dense(state.adapter), expected) < 1e-6
    assert found["flora"].report is not None
    assert found["flora"].report.rank == 9  # Σ r_k = 13: dense beside an identity is smaller
    # clients of full rank receive all of it
    wide = dict.fromkeys(RANKS, 11)
    local = trained(initial_state(fresh(wide)))
    expected = oracles.mean([dense(local[client]) for client in wide], [counts[client] for client in wide])
    for rule in ("flexlora", "weighted-average"):
        state = aggregate(rule, initial_state(fresh(wide)), local, counts)
        assert all(error(dense(start), expected) < 1e-5 for start in state.starts.values())


@pytest.mark.parametrize("num_clients", [2, 4, 8])
def test_fedit_is_far_from_the_exact_mean(num_clients: int) -> None:
    adapters = {f"client {k}": random_adapter({"m": (90, 80)}, 8, 2.0, k) for k in range(num_clients)}
    found = fedit(adapters, equal(adapters))
    ordered, weights = list(adapters.values()), [1.0] * num_clients
    exact = oracles.mean([dense(adapter) for adapter in ordered], weights)
    assert error(dense(found.adapter), oracles.fedit(ordered, weights)) < 1e-6
    assert found.error == pytest.approx(error(oracles.fedit(ordered, weights), exact), rel=1e-5)
    assert found.error == pytest.approx(math.sqrt((num_clients - 1) / num_clients), rel=0.05)  # of independent factors


def test_hetlora_and_its_error_against_the_oracle() -> None:
    adapters = random_clients(RANKS)
    found = hetlora(adapters, shares(adapters))
    expected = oracles.hetlora(list(adapters.values()))
    exact = oracles.mean([dense(a) for a in adapters.values()], [COUNTS[client] for client in adapters])
    assert error(dense(found.adapter), expected) < 1e-6
    assert found.error == pytest.approx(error(expected, exact), rel=1e-5)


def test_flexlora_gives_every_client_its_leading_directions() -> None:
    state = run("flexlora", 1)
    local = trained(initial_state(fresh(RANKS)))
    expected = oracles.mean([dense(local[client]) for client in RANKS], [COUNTS[client] for client in RANKS])
    assert state.report is not None
    for client, rank in RANKS.items():
        assert error(dense(state.starts[client]), oracles.cut(expected, rank)) < 1e-5
        residual = error(oracles.cut(expected, rank), expected)
        assert state.report.start_residuals[client] == pytest.approx(residual, rel=1e-5)
        assert state.starts[client].modules["layer.0.query"].scaling == 2.0
        assert state.report.bytes_down[client] == state.starts[client].size_bytes
    assert state.report.bytes_up == {client: adapter.size_bytes for client, adapter in local.items()}


@given(
    seed=st.integers(0, 999),
    ranks=st.lists(st.integers(1, 4), min_size=5, max_size=7),
    trim=st.sampled_from([0.2, 0.4]),
)
@EXAMPLES
def test_robust_rules_against_oracles(seed: int, ranks: list[int], trim: float) -> None:
    clients = random_clients({f"client {k}": rank for k, rank in enumerate(ranks)}, seed)
    updates = [dense(adapter) for adapter in clients.values()]
    assert error(dense(coordinate_median(clients, {}).adapter), oracles.median(updates)) < 1e-5
    cut = int(trim * len(ranks) + 1e-9)
    assert error(dense(trimmed_mean(clients, {}, trim).adapter), oracles.trimmed_mean(updates, cut)) < 1e-5
    scores = oracles.krum_scores(updates, 1)
    assert list(krum_scores(clients, 1).values()) == pytest.approx(scores, rel=1e-5)
    assert krum(clients, {}, 1).selected == (f"client {int(np.argmin(scores))}",)


@given(
    ranks=st.lists(st.integers(1, 4), min_size=3, max_size=5),
    away=st.lists(st.integers(0, 2), min_size=3, max_size=3),
    continuation=st.sampled_from(["truncated", "frozen"]),
    output_rank=st.sampled_from([None, 3]),
)
@EXAMPLES
def test_rounds_of_the_average_against_a_dense_oracle(
    ranks: list[int], away: list[int], continuation: str, output_rank: int | None
) -> None:
    names = {f"client {k}": rank for k, rank in enumerate(ranks)}
    state, expected = initial_state(fresh(names)), {name: np.zeros(shape) for name, shape in LAYOUT.items()}
    for missing in away:
        local = trained(state, [client for client in names if client != f"client {missing}"])
        updates = [oracles.minus(dense(a), dense(state.starts[client])) for client, a in local.items()]
        state = aggregate("weighted-average", state, local, continuation=continuation, output_rank=output_rank)
        expected = oracles.plus(expected, oracles.mean(updates, [1.0] * len(updates)))
        assert state.report is not None
        if output_rank is not None:
            assert state.report.output_residual == pytest.approx(
                error(oracles.cut(expected, output_rank), expected), rel=1e-4
            )
            expected = oracles.cut(expected, output_rank)
        assert error(dense(state.adapter), expected) < 1e-5
        for client, rank in names.items():
            if continuation == "truncated":
                assert error(dense(state.starts[client]), oracles.cut(expected, rank)) < 1e-4
            else:
                assert state.base is state.adapter
                assert not any(module.lora_B.any() for module in state.starts[client].modules.values())


def test_flora_grows_and_reports_it() -> None:
    layout: Layout = {"m": (40, 50)}
    start = {
        f"client {k}": Adapter(
            {"m": replace(random_adapter(layout, rank, 1.0, k).modules["m"], lora_B=torch.zeros(40, rank))}
        )
        for k, rank in enumerate((2, 3))
    }
    state = initial_state(start)
    assert state.base is None
    expected = np.zeros((40, 50))
    for number in (1, 2, 3):
        local = trained(state)
        expected = expected + np.mean([dense(adapter)["m"] for adapter in local.values()], axis=0)
        state = aggregate("flora", state, local)
        assert state.report is not None
        assert (state.report.rank, state.report.size_bytes) == (5 * number, 5 * number * 90 * 4)
        assert state.report.bytes_down == dict.fromkeys(start, 5 * number * 90 * 4)
        assert state.report.bytes_up == {"client 0": 2 * 90 * 4, "client 1": 3 * 90 * 4}
        assert state.report.start_residuals == {"client 0": 0.0, "client 1": 0.0}
        assert error(dense(state.adapter), {"m": expected}) < 1e-6
    drawn = [state.starts["client 0"], aggregate("flora", state, trained(state)).starts["client 0"]]
    assert not torch.equal(drawn[0].modules["m"].lora_A, drawn[1].modules["m"].lora_A)  # another A every round


def test_a_rank_that_the_merge_does_not_fill_is_fresh_and_can_learn() -> None:
    ranks = {"narrow": 1, "wide": 6}
    rules: dict[str, dict[str, Any]] = {
        "weighted-average": {},
        "flexlora": {},
        "hetlora": {},
        "ties": {"space": "core"},
    }
    for rule, parameters in rules.items():
        state = initial_state(fresh(ranks))
        state = aggregate(rule, state, trained(state, ["narrow"]), **parameters)
        module = state.starts["wide"].modules["layer.0.query"]
        assert error(dense(state.starts["wide"]), dense(state.adapter)) < 1e-5
        assert (module.lora_A.norm(dim=1) > 0).all()
        assert module.lora_B[:, 0].any()
        assert not module.lora_B[:, 1:].any()


def test_starts_are_those_of_attach(backbone: Backbone) -> None:
    def attached(rank: int, seed: int) -> Adapter:
        model = attach(backbone, ("query",), rank, 2 * rank, seed)
        try:
            return adapter_of(model)
        finally:
            model.unload()

    state = initial_state({"narrow": attached(2, 7), "wide": attached(4, 7)})
    for name, module in state.starts["narrow"].modules.items():
        assert torch.equal(module.lora_A, state.starts["wide"].modules[name].lora_A[:2])
    state = aggregate("flora", state, trained(state), seed=7)
    for client, rank in (("narrow", 2), ("wide", 4)):
        expected = attached(rank, fresh_seed(7, state.num_rounds))
        assert adapter_sha256(state.starts[client]) == adapter_sha256(expected)


# every rule


@pytest.mark.parametrize("rule", [*RULES, *TRAINING_FREE])
def test_rounds_of_every_rule(rule: str) -> None:
    row = rule_named(rule)
    for continuation in row.continuations:
        parameters: dict[str, Any] = {"continuation": continuation} if "continuation" in row.parameters else {}
        state = run(rule, 3, **parameters)
        assert state.report is not None
        assert state.num_rounds == 3
        assert state.starts.keys() == RANKS.keys()
        assert state.frozen == (continuation == "frozen")
        assert all(tensor.isfinite().all() for tensor in state_tensors(state)[0].values())
        for client, start in state.starts.items():
            known = dense(start) if state.base is None else oracles.plus(dense(start), dense(state.base))
            residual = state.report.start_residuals[client]
            assert error(known, dense(state.adapter)) == pytest.approx(residual, rel=1e-4, abs=1e-5)
            shapes = {name: module.lora_A.shape for name, module in start.modules.items()}
            assert shapes == {n: m.lora_A.shape for n, m in trained(state)[client].modules.items()}


@pytest.mark.parametrize("rule", [*RULES, "dare"])
def test_order_and_inputs_do_not_matter_and_rounds_repeat(rule: str) -> None:
    ranks = dict.fromkeys(RANKS, 2)
    state = initial_state(fresh(ranks))
    local = trained(state, only_B=rule == "ffa-lora")
    before = {client: adapter_sha256(adapter) for client, adapter in local.items()}
    forward = aggregate(rule, state, local, COUNTS, seed=3)
    backward = aggregate(rule, state, dict(reversed(local.items())), dict(reversed(COUNTS.items())), seed=3)
    assert adapter_sha256(forward.adapter) == adapter_sha256(backward.adapter)
    assert {c: adapter_sha256(a) for c, a in forward.starts.items()} == {
        c: adapter_sha256(a) for c, a in backward.starts.items()
    }
    assert {client: adapter_sha256(adapter) for client, adapter in local.items()} == before


@pytest.mark.parametrize("rule", ["median", "trimmed-mean", "krum", "multi-krum"])
def test_one_bad_client_is_outvoted(rule: str) -> None:
    names = [f"client {k}" for k in range(8)]
    good = random_adapter(LAYOUT, 2, 1.0, 5)
    clients = {
        name: Adapter({n: replace(m, lora_B=m.lora_B + 0.01 * k) for n, m in good.modules.items()})
        for k, name in enumerate(names)
    }
    clients["client 3"] = Adapter({n: replace(m, lora_B=-1000 * m.lora_B) for n, m in good.modules.items()})
    state = initial_state(fresh(dict.fromkeys(names, 2), scaling=1.0))
    found = dense(aggregate(rule, state, clients).adapter)
    assert error(found, dense(good)) < 0.2
    assert error(dense(aggregate("weighted-average", state, clients).adapter), dense(good)) > 100


def test_krum_forms_no_dense_update() -> None:
    layout: Layout = {"m": (60_000, 60_000)}  # a Δ has 14 GB
    clients = {f"client {k}": random_adapter(layout, 1, 1.0, k) for k in range(5)}
    assert len(krum_scores(clients, 1)) == 5


def test_merging_methods_and_functions_are_rules_of_a_round() -> None:
    state = initial_state(fresh(RANKS))
    local = trained(state)
    expected = merge_adapters(local, "ties", density=0.4, scope="model").adapter
    found = aggregate("ties", state, local, density=0.4, scope="model", continuation="frozen")
    assert error(dense(found.adapter), dense(expected)) < 1e-6
    weighted = {client: len(local) * share for client, share in shares(local).items()}
    expected = merge_adapters(local, "ties", coefficients=weighted).adapter
    assert error(dense(aggregate("ties", state, local, COUNTS).adapter), dense(expected)) < 1e-5

    def learned(updates: Mapping[str, Adapter]) -> Adapter:
        return merge_adapters(updates, "task-arithmetic", coefficient=0.3).adapter

    found = aggregate(learned, state, local, continuation="frozen")
    assert found.report is not None
    assert found.report.rule == "learned"
    expected = merge_adapters(local, "task-arithmetic", coefficient=0.3).adapter
    assert error(dense(found.adapter), dense(expected)) < 1e-6
    draws = [aggregate("dare", state, local, seed=seed).adapter for seed in (1, 2)]
    assert adapter_sha256(draws[0]) != adapter_sha256(draws[1])


def test_updates_and_errors_in_product_space() -> None:
    state = run("weighted-average", 1)
    local = trained(state)
    for client, adapter in local.items():
        difference = oracles.minus(dense(adapter), dense(state.starts[client]))
        assert error(dense(client_update(adapter, state.starts[client])), difference) < 1e-5
    left, right = random_clients({"left": 2, "right": 5}).values()
    assert relative_error(left, right) == pytest.approx(error(dense(left), dense(right)), rel=1e-6)
    assert relative_error(left, left) < 1e-12
    nothing = initial_state(fresh(RANKS)).adapter
    assert (relative_error(nothing, nothing), relative_error(left, nothing)) == (0.0, math.inf)
    assert compressed(decomposed(nothing), 2)[1] == 0


# kept


@pytest.mark.parametrize("rule", ["flexlora", "flora", "fedavgm", "fedadam", "hetlora"])
def test_a_state_survives_files(rule: str, tmp_path: Path) -> None:
    state = run(rule, 2)
    tensors, record = state_tensors(state)
    save_file(tensors, tmp_path / "state.safetensors")
    restored = state_of(load_file(tmp_path / "state.safetensors"), json.loads(json.dumps(record)))
    assert restored.report == state.report
    after = [aggregate(rule, each, trained(each), COUNTS) for each in (state, restored)]
    assert adapter_sha256(after[0].adapter) == adapter_sha256(after[1].adapter)
    assert after[0].report == after[1].report
    lost = {name: tensor for name, tensor in tensors.items() if "start 0" not in name}
    with pytest.raises(AggregationError, match="'start 0/"):
        state_of(lost, record)
    assert state_of(*state_tensors(initial_state(fresh(RANKS)))).report is None


# refused


def test_the_documentation_has_the_table() -> None:
    document = (Path(__file__).resolve().parents[2] / "docs" / "reference" / "rounds.md").read_text(encoding="utf-8")
    assert rules_table() in document
    assert all(f"**{name}**" in document and text in " ".join(document.split()) for name, text in CONTINUATIONS.items())
