"""Slow, dense oracles of the aggregation rules in NumPy float64, written from their definitions."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from adapters import Layout, random_adapter
from numpy.typing import NDArray

from fedmerge.adapter import Adapter, LoraModule
from fedmerge.federated.rounds import GlobalState, aggregate, initial_state

Array = NDArray[np.float64]
Dense = dict[str, Array]  # module -> Δ (out, in)


def dense(adapter: Adapter) -> Dense:
    return {
        name: m.scaling * (m.lora_B.double().numpy() @ m.lora_A.double().numpy()) for name, m in adapter.modules.items()
    }


def mean(updates: Sequence[Dense], weights: Sequence[float]) -> Dense:
    total = sum(weights)
    return {
        name: np.sum([w / total * update[name] for w, update in zip(weights, updates, strict=True)], axis=0)
        for name in updates[0]
    }


def norm(update: Dense) -> float:
    return float(np.sqrt(sum((matrix**2).sum() for matrix in update.values())))


def minus(left: Dense, right: Dense) -> Dense:
    return {name: left[name] - right[name] for name in left}


def plus(left: Dense, right: Dense) -> Dense:
    return {name: left[name] + right[name] for name in left}


def error(found: Dense, expected: Dense) -> float:
    return norm(minus(found, expected)) / norm(expected)


def cut(update: Dense, rank: int) -> Dense:
    """Return the best approximation of this rank, by module."""
    out = {}
    for name, matrix in update.items():
        U, S, Vh = np.linalg.svd(matrix, full_matrices=False)
        out[name] = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    return out


def _factors(adapter: Adapter, name: str) -> tuple[Array, Array]:
    module = adapter.modules[name]
    return module.lora_A.double().numpy(), module.lora_B.double().numpy()


def fedit(adapters: Sequence[Adapter], weights: Sequence[float]) -> Dense:
    out = {}
    for name, module in adapters[0].modules.items():
        factors = [_factors(adapter, name) for adapter in adapters]
        A = np.average([A for A, _ in factors], axis=0, weights=weights)
        B = np.average([B for _, B in factors], axis=0, weights=weights)
        out[name] = module.scaling * (B @ A)
    return out


def hetlora(adapters: Sequence[Adapter]) -> Dense:
    out = {}
    for name, module in adapters[0].modules.items():
        factors = [_factors(adapter, name) for adapter in adapters]
        norms = [np.sqrt(((B @ A) ** 2).sum()) for A, B in factors]
        width = max(len(A) for A, _ in factors)
        A_mean, B_mean = np.zeros((width, factors[0][0].shape[1])), np.zeros((len(factors[0][1]), width))
        for (A, B), weight in zip(factors, norms, strict=True):
            for row in range(len(A)):
                A_mean[row] += weight / sum(norms) * A[row]
                B_mean[:, row] += weight / sum(norms) * B[:, row]
        out[name] = module.scaling * (B_mean @ A_mean)
    return out


def median(updates: Sequence[Dense]) -> Dense:
    out = {}
    for name, matrix in updates[0].items():
        out[name] = np.zeros_like(matrix)
        for place in np.ndindex(*matrix.shape):
            values = sorted(update[name][place] for update in updates)
            half = len(values) // 2
            out[name][place] = values[half] if len(values) % 2 else (values[half - 1] + values[half]) / 2
    return out


def trimmed_mean(updates: Sequence[Dense], cut_off: int) -> Dense:
    out = {}
    for name, matrix in updates[0].items():
        out[name] = np.zeros_like(matrix)
        for place in np.ndindex(*matrix.shape):
            values = sorted(update[name][place] for update in updates)[cut_off : len(updates) - cut_off]
            out[name][place] = sum(values) / len(values)
    return out


def krum_scores(updates: Sequence[Dense], num_malicious: int) -> list[float]:
    scores = []
    for i, update in enumerate(updates):
        others = [norm(minus(update, other)) ** 2 for j, other in enumerate(updates) if j != i]
        scores.append(sum(sorted(others)[: len(updates) - num_malicious - 2]))
    return scores


LAYOUT: Layout = {"layer.0.query": (9, 8), "layer.0.value": (8, 11), "layer.1.query": (10, 9)}
RANKS = {"books": 2, "toys": 3, "tents": 1, "coffee": 2, "games": 3, "spices": 2}
COUNTS = {"books": 10.0, "toys": 30.0, "tents": 5.0, "coffee": 40.0, "games": 15.0, "spices": 20.0}


def shares(adapters: Mapping[str, Adapter]) -> dict[str, float]:
    total = sum(COUNTS[client] for client in adapters)
    return {client: COUNTS[client] / total for client in adapters}


def random_clients(ranks: Mapping[str, int], seed: int = 0, scaling: float = 2.0) -> dict[str, Adapter]:
    return {name: random_adapter(LAYOUT, rank, scaling, 100 * seed + k) for k, (name, rank) in enumerate(ranks.items())}


def fresh(ranks: Mapping[str, int], scaling: float = 2.0) -> dict[str, Adapter]:
    """Return starts with the first rows of one shared A, and B = 0."""
    widest = random_adapter(LAYOUT, max(ranks.values()), scaling, 77)

    def of_rank(rank: int) -> Adapter:
        return Adapter(
            {
                name: LoraModule(module.lora_A[:rank].clone(), torch.zeros(len(module.lora_B), rank), scaling)
                for name, module in widest.modules.items()
            }
        )

    return {client: of_rank(rank) for client, rank in ranks.items()}


def trained(state: GlobalState, clients: list[str] | None = None, only_B: bool = False) -> dict[str, Adapter]:
    """Return possible adapters after the next round: a random step from their starts."""
    found = {}
    for number, client in enumerate(sorted(state.starts)):
        rng = torch.Generator().manual_seed(1000 * state.num_rounds + number)
        modules = {}
        for name, module in state.starts[client].modules.items():
            step_A, step_B = (0.4 * torch.randn(t.shape, generator=rng) for t in (module.lora_A, module.lora_B))
            lora_A = module.lora_A if only_B else module.lora_A + step_A
            modules[name] = LoraModule(lora_A, module.lora_B + step_B, module.scaling)
        if clients is None or client in clients:
            found[client] = Adapter(modules)
    return found


def one(A: list[list[float]], B: list[list[float]], scaling: float = 1.0) -> Adapter:
    return Adapter({"m": LoraModule(torch.tensor(A), torch.tensor(B), scaling)})


def vectors(*rows: list[float]) -> dict[str, Adapter]:
    """Return clients whose update is a row vector."""
    return {f"client {k}": one([row], [[1.0]]) for k, row in enumerate(rows)}


def row_of(adapter: Adapter) -> list[float]:
    values: list[float] = adapter.modules["m"].delta_weight().double().squeeze(0).tolist()
    return values


def equal(adapters: Mapping[str, Adapter]) -> dict[str, float]:
    return {client: 1 / len(adapters) for client in adapters}


def run(rule: str, rounds: int, ranks: Mapping[str, int] | None = None, **parameters: Any) -> GlobalState:
    """Run some rounds; one client is absent in the second. Ranks are equal where the rule requires it."""
    if ranks is None:
        ranks = dict.fromkeys(RANKS, 2) if rule in ("fedit", "ffa-lora") else RANKS
    state = initial_state(fresh(ranks))
    for number in range(rounds):
        here = [client for client in ranks if number != 1 or client != "toys"]
        local = trained(state, here, only_B=rule == "ffa-lora")
        state = aggregate(rule, state, local, {client: COUNTS[client] for client in local}, **parameters)
    return state
