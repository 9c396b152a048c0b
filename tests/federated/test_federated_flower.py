"""Our robust rules and server optimisers agree with Flower's own on vectors."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.server.strategy import aggregate as flower
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM, FedMedian, FedTrimmedAvg, FedYogi, Krum, MultiKrum
from flwr.serverapp.strategy.multikrum import compute_distances
from flwr.supercore.task_identity import TaskIdentity
from numpy.typing import NDArray

from fedmerge.adapter import Adapter, LoraModule
from fedmerge.federated.robust import coordinate_median, krum, krum_scores, multi_krum, trimmed_mean
from fedmerge.federated.rounds import aggregate, initial_state

Vector = NDArray[Any]
WIDTHS = {"one": 7, "two": 5}


def client_vectors(num_clients: int, seed: int) -> list[list[Vector]]:
    """[client][module], one far from the others."""
    rng = np.random.default_rng(seed)
    found = [[rng.normal(size=width).astype(np.float32) for width in WIDTHS.values()] for _ in range(num_clients)]
    found[num_clients // 2] = [vector * 30 + 5 for vector in found[num_clients // 2]]
    return found


def adapters(vectors: Sequence[Sequence[Vector]]) -> dict[str, Adapter]:
    """Return vectors as rank-1 modules of one output: A is the vector, B = 1."""
    return {
        f"client {k:02}": Adapter(
            {
                name: LoraModule(torch.from_numpy(vector)[None].clone(), torch.ones(1, 1), 1.0)
                for name, vector in zip(WIDTHS, client, strict=True)
            }
        )
        for k, client in enumerate(vectors)
    }


def rows(adapter: Adapter) -> list[Vector]:
    return [adapter.modules[name].delta_weight()[0].numpy() for name in WIDTHS]


def reply(vectors: Sequence[Vector], num_examples: int, node: int) -> Message:
    arrays = ArrayRecord({name: Array(vector) for name, vector in zip(WIDTHS, vectors, strict=True)})
    content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": num_examples})})
    return Message(content, reply_to=Message(RecordDict(), dst_node_id=node, message_type="train"))


@pytest.fixture(autouse=True)
def _task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's messages want to know whose they are."""
    for key, value in {"_task_id": 1, "_run_id": 1, "_node_id": SUPERLINK_NODE_ID}.items():
        monkeypatch.setattr(TaskIdentity, key, value)


def by_flower(
    strategy: FedAvg, vectors: Sequence[Sequence[Vector]], counts: Sequence[int], round_: int = 1
) -> list[Vector]:
    replies = [reply(v, n, k + 1) for k, (v, n) in enumerate(zip(vectors, counts, strict=True))]
    arrays, _ = strategy.aggregate_train(round_, replies)
    assert arrays is not None
    return [arrays[name].numpy() for name in WIDTHS]


def close(found: Sequence[Vector], expected: Sequence[Vector]) -> bool:
    return all(np.allclose(left, right, rtol=1e-5, atol=1e-6) for left, right in zip(found, expected, strict=True))


@pytest.mark.parametrize("num_clients", [5, 6, 8, 11])
def test_median_and_trimmed_mean(num_clients: int) -> None:
    vectors = client_vectors(num_clients, num_clients)
    clients, counts = adapters(vectors), [1] * num_clients
    median = rows(coordinate_median(clients, {}).adapter)
    assert close(median, by_flower(FedMedian(), vectors, counts))
    assert close(median, flower.aggregate_median([(list(v), 1) for v in vectors]))
    for trim in (0.2, 0.3, 0.45):
        trimmed = rows(trimmed_mean(clients, {}, trim).adapter)
        assert close(trimmed, by_flower(FedTrimmedAvg(beta=trim), vectors, counts))
        assert close(trimmed, flower.aggregate_trimmed_avg([(list(v), 1) for v in vectors], trim))


@pytest.mark.parametrize(("num_clients", "num_malicious"), [(5, 1), (8, 1), (8, 2), (11, 4)])
def test_krum_and_multi_krum(num_clients: int, num_malicious: int) -> None:
    vectors = client_vectors(num_clients, 10 * num_clients + num_malicious)
    clients, counts = adapters(vectors), list(range(1, num_clients + 1))
    weights = {client: count / sum(counts) for client, count in zip(clients, counts, strict=True)}
    records = [ArrayRecord(list(client)) for client in vectors]
    nearest = np.sort(compute_distances(records), axis=1)[:, 1 : num_clients - num_malicious - 1]
    assert np.allclose(list(krum_scores(clients, num_malicious).values()), nearest.sum(axis=1), rtol=1e-4)
    found = rows(krum(clients, weights, num_malicious).adapter)
    assert close(found, by_flower(Krum(num_malicious_nodes=num_malicious), vectors, counts))
    assert close(found, flower.aggregate_krum([(list(v), 1) for v in vectors], num_malicious, 0))
    for selected in (1, 2, num_clients - num_malicious):
        several = rows(multi_krum(clients, weights, num_malicious, selected).adapter)
        strategy = MultiKrum(num_malicious_nodes=num_malicious, num_nodes_to_select=selected)
        assert close(several, by_flower(strategy, vectors, counts))
        results = [(list(v), n) for v, n in zip(vectors, counts, strict=True)]
        assert close(several, flower.aggregate_krum(results, num_malicious, selected))


ADAPTIVE: dict[str, Any] = {"beta_1": 0.8, "beta_2": 0.95, "tau": 0.05}
OPTIMISERS: dict[str, tuple[dict[str, Any], Callable[[], FedAvg]]] = {
    "weighted-average": ({}, FedAvg),
    "fedavgm": (
        {"learning_rate": 0.7, "momentum": 0.8},
        lambda: FedAvgM(server_learning_rate=0.7, server_momentum=0.8),
    ),
    "fedadam": ({"learning_rate": 0.2, **ADAPTIVE}, lambda: FedAdam(eta=0.2, **ADAPTIVE)),
    "fedyogi": ({"learning_rate": 0.2, **ADAPTIVE}, lambda: FedYogi(eta=0.2, **ADAPTIVE)),
}


@pytest.mark.parametrize("continuation", ["truncated", "frozen"])
@pytest.mark.parametrize("rule", OPTIMISERS)
def test_server_optimisers_over_rounds(rule: str, continuation: str) -> None:
    """Rank 1 cuts nothing off a row, so that both ways of continuing follow Flower's vectors."""
    parameters, made = OPTIMISERS[rule]
    strategy, counts = made(), [10, 30, 60]
    fresh = {
        client: Adapter({n: LoraModule(m.lora_A, torch.zeros(1, 1), 1.0) for n, m in adapter.modules.items()})
        for client, adapter in adapters([[np.ones(width, np.float32) for width in WIDTHS.values()]] * 3).items()
    }
    state = initial_state(fresh)
    current: list[Vector] = [np.zeros(width, np.float32) for width in WIDTHS.values()]
    if isinstance(strategy, FedAvgM):  # as its configure_train does in the first round, and the others' in every one
        strategy.current_arrays = ArrayRecord({n: Array(v) for n, v in zip(WIDTHS, current, strict=True)})
    for number in (1, 2, 3):
        if isinstance(strategy, (FedAdam, FedYogi)):
            strategy.current_arrays = dict(zip(WIDTHS, current, strict=True))
        steps = client_vectors(3, number)
        local = [[value + step for value, step in zip(current, client, strict=True)] for client in steps]
        current = by_flower(strategy, local, counts, number)
        sent = adapters(steps if continuation == "frozen" else local)
        weights = dict(zip(fresh, map(float, counts), strict=True))
        state = aggregate(rule, state, sent, weights, continuation=continuation, **parameters)
        assert close(rows(state.adapter), current)
