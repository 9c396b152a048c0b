"""Slow oracles of the aggregation rules, dense, in NumPy float64, written from their definitions."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedmerge.encoder.lora import Adapter

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
    """The best approximation of this rank, by module."""
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
