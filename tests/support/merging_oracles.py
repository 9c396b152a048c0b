"""Slow oracles of the merging methods, in NumPy float64, written from their definitions with plain loops."""

import copy
import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray

from fedmerge.adapter import Adapter, LoraModule
from fedmerge.encoder.backbone import Backbone

Array = NDArray[np.float64]
Rows = list[list[float]]  # K rows of n entries
Flat = Callable[[Rows], list[float]]


def _count(fraction: float, n: int, rounded: Callable[[Fraction], int]) -> int:
    return rounded(Fraction(str(fraction)) * n)


def average(rows: Rows) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def task_arithmetic(rows: Rows, coefficient: float) -> list[float]:
    return [coefficient * sum(column) for column in zip(*rows, strict=True)]


def _trimmed(row: list[float], density: float) -> list[float]:
    smallest = sorted((abs(x) for x in row), reverse=True)[_count(density, len(row), math.ceil) - 1]
    return [x if abs(x) >= smallest else 0.0 for x in row]


def ties(rows: Rows, density: float, coefficient: float = 1.0) -> list[float]:
    merged = []
    for column in zip(*(_trimmed(row, density) for row in rows), strict=True):
        mass = math.fsum(column)
        agreeing = [x for x in column if x * mass > 0]
        merged.append(coefficient * sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return merged


def dropped(rows: Rows, density: float, draws: Sequence[Sequence[float]]) -> Rows:
    return [
        [x / density if u < density else 0.0 for x, u in zip(row, drawn, strict=True)]
        for row, drawn in zip(rows, draws, strict=True)
    ]


def magpruned(row: list[float], density: float, epsilon: float, draws: Sequence[float], width: int) -> list[float]:
    half = min(epsilon / 2, density / 2, 1 - density)
    pruned = []
    for start in range(0, len(row), width):
        neuron = row[start : start + width]
        order = sorted(range(width), key=lambda i: abs(neuron[i]))
        for i, x in enumerate(neuron):
            share = order.index(i) / (width - 1) if width > 1 else 0.5
            probability = density + half * (2 * share - 1)
            pruned.append(x / probability if draws[start + i] < probability else 0.0)
    return pruned


def emr_unified(rows: Rows, coefficient: float = 1.0) -> list[float]:
    merged = []
    for column in zip(*rows, strict=True):
        mass = math.fsum(column)
        merged.append(coefficient * max((x for x in column if x * mass > 0), key=abs, default=0.0))
    return merged


def consensus(rows: Rows, mask_threshold: float, min_domains: int, coefficient: float = 1.0) -> list[float]:
    merged = []
    for column in zip(*rows, strict=True):
        mass = math.fsum(column)
        votes = sum(abs(x) >= mask_threshold * abs(mass - x) for x in column)
        merged.append(coefficient * mass if votes >= min(min_domains, len(rows)) else 0.0)
    return merged


def _minmax(values: list[float]) -> list[float]:
    low, high = min(values), max(values)
    return [(x - low) / (high - low) if high > low else 0.0 for x in values]


def pcb(rows: Rows, density: float, clamp: float = 0.0001, coefficient: float = 1.0) -> list[float]:
    num_domains, n = len(rows), len(rows[0])
    sums = [math.fsum(column) for column in zip(*rows, strict=True)]
    clamped, weights = [], []
    for row in rows:
        magnitudes = sorted(abs(x) for x in row)
        cut = _count(clamp, n, math.floor)
        low, high = magnitudes[cut], magnitudes[n - 1 - cut]
        sizes = [min(max(abs(x), low), high) for x in row]
        clamped.append([math.copysign(size, x) if x else 0.0 for size, x in zip(sizes, row, strict=True)])
        intra = [math.exp(num_domains * x**2) for x in _minmax(sizes)]
        inter = [math.tanh(x * s) for x, s in zip(row, sums, strict=True)]
        scores = [a * b for a, b in zip(intra, inter, strict=True)]
        ordered = sorted(scores, reverse=True)
        smallest, largest = ordered[_count(density, n, math.ceil) - 1], ordered[0]
        if largest > smallest:
            weights.append([max(x - smallest, 0.0) / (largest - smallest) for x in scores])
        else:
            weights.append([1.0 if x >= smallest and x else 0.0 for x in scores])
    merged = []
    for i in range(n):
        below = sum(weights[k][i] for k in range(num_domains))
        above = sum(weights[k][i] * clamped[k][i] for k in range(num_domains))
        merged.append(coefficient * above / below if below > 0 else 0.0)
    return merged


def localize_and_stitch(rows: Rows, density: float, coefficient: float = 1.0) -> list[float]:
    merged = []
    for column in zip(*(_trimmed(row, density) for row in rows), strict=True):
        kept = [x for x in column if x != 0]
        merged.append(coefficient * sum(kept) / len(kept) if kept else 0.0)
    return merged


def breadcrumbs(rows: Rows, drop_smallest: float, drop_largest: float, coefficient: float = 1.0) -> list[float]:
    n = len(rows[0])
    merged = [0.0] * n
    for row in rows:
        magnitudes = sorted(abs(x) for x in row)
        low = magnitudes[_count(drop_smallest, n, math.floor)]
        high = magnitudes[n - 1 - _count(drop_largest, n, math.floor)]
        for i, x in enumerate(row):
            merged[i] += coefficient * x if low <= abs(x) <= high else 0.0
    return merged


def over_scope(updates: list[list[Array]], merge: Flat) -> list[Array]:
    """Merge K domains' matrices as rows over all modules together: [module][domain] -> [module]."""
    rows = [np.concatenate([module[k].ravel() for module in updates]).tolist() for k in range(len(updates[0]))]
    merged, out, start = np.array(merge(rows)), [], 0
    for module in updates:
        size = module[0].size
        out.append(merged[start : start + size].reshape(module[0].shape))
        start += size
    return out


def supported_svd(matrix: Array, largest: float = 0.0) -> tuple[Array, Array, Array]:
    U, S, Vh = np.linalg.svd(matrix, full_matrices=False)
    rank = int((max(S[0], largest) * 1e-6 < S).sum())
    return U[:, :rank], S[:rank], Vh[:rank]


def knots(updates: list[Array]) -> tuple[Array, list[Array]]:
    """Return U and the S V_k of [Δ_1 | … | Δ_K]."""
    U, S, Vh = supported_svd(np.concatenate(updates, axis=1))
    return U, np.split(S[:, None] * Vh, len(updates), axis=1)


def core(updates: list[Array]) -> tuple[Array, Array, list[Array]]:
    """Return U_ref, V_ref and the core matrices of K updates, each factored as U √S · √S Vᵀ."""
    triples = [supported_svd(update) for update in updates]
    left = supported_svd(np.concatenate([U * np.sqrt(S) for U, S, _ in triples], axis=1))[0]
    right = supported_svd(np.concatenate([Vh.T * np.sqrt(S) for _, S, Vh in triples], axis=1))[0]
    return left, right, [left.T @ update @ right for update in updates]


def _whitened(matrix: Array) -> Array:
    P, _, Qh = supported_svd(matrix)
    return P @ Qh


def tsv(updates: list[Array], coefficient: float = 1.0) -> Array:
    kept = max(1, min(updates[0].shape) // len(updates))
    triples = [supported_svd(update) for update in updates]
    U = np.concatenate([U[:, :kept] for U, _, _ in triples], axis=1)
    S = np.concatenate([S[:kept] for _, S, _ in triples])
    Vh = np.concatenate([Vh[:kept] for _, _, Vh in triples])
    merged: Array = coefficient * _whitened(U) @ np.diag(S) @ _whitened(Vh)
    return merged


def iso_c(updates: list[Array], coefficient: float = 1.0) -> Array:
    U, S, Vh = supported_svd(sum(updates, np.zeros_like(updates[0])))
    merged: Array = coefficient * S.mean() * U @ Vh
    return merged


def iso_cts(updates: list[Array], common_fraction: float = 0.8, coefficient: float = 1.0) -> Array:
    U, S, Vh = supported_svd(sum(updates, np.zeros_like(updates[0])))
    num_domains = len(updates)
    own = round((len(S) - int(common_fraction * len(S) + 1e-9)) / num_domains)
    common = len(S) - own * num_domains
    lefts, values, rights = [U[:, :common]], [S[:common]], [Vh[:common]]
    for update in updates:
        rest = update - U[:, :common] @ U[:, :common].T @ update
        u, s, vh = supported_svd(rest, np.linalg.svd(update, compute_uv=False)[0])
        lefts.append(u[:, :own])
        values.append(s[:own])
        rights.append(vh[:own])
    left, right = _whitened(np.concatenate(lefts, axis=1)), _whitened(np.concatenate(rights))
    merged: Array = coefficient * np.concatenate(values).mean() * left @ right
    return merged


def slerp(updates: list[Array], t: float = 0.5) -> Array:
    """On the arc; on the line if one of the updates is zero."""
    first, second = updates
    if not first.any() or not second.any():
        on_line: Array = (1 - t) * first + t * second
        return on_line
    cosine = np.sum(first * second) / np.linalg.norm(first) / np.linalg.norm(second)
    theta = np.arccos(cosine)
    merged: Array = (np.sin((1 - t) * theta) * first + np.sin(t * theta) * second) / np.sin(theta)
    return merged


def multi_slerp(updates: list[Array], coefficient: float = 1.0) -> Array:
    """Project onto the tangent space at the mean direction, average there, and return by the exponential map.

    An update of zero has no direction.
    """
    lengths = [np.linalg.norm(update) for update in updates]
    directions = [update / length if length else update for update, length in zip(updates, lengths, strict=True)]
    mean = sum(directions, np.zeros_like(updates[0]))
    mean = mean / np.linalg.norm(mean)
    tangents = [direction - np.sum(direction * mean) * mean for direction in directions]
    step = sum(tangents, np.zeros_like(mean)) / len(updates)
    length = np.linalg.norm(step) + 1e-300
    point = np.cos(length) * mean + np.sin(length) / length * step
    merged: Array = coefficient * np.mean(lengths) * point
    return merged


Deltas = NDArray[np.float64]  # (K, out, in)


def dense_vectors(
    backbone: Backbone,
    adapters: dict[str, Adapter],
    coefficients: Callable[[str, str], torch.Tensor | float],
    sequences: list[np.ndarray],
) -> torch.Tensor:
    """Return the (n, d) vectors of θ₀ + Σ_k w_k Δ_k; ``coefficients(domain, module)`` gives w."""
    model = copy.deepcopy(backbone.model).double()
    parameters: dict[str, torch.Tensor] = dict(model.named_parameters())
    for module in next(iter(adapters.values())).modules:
        for domain, adapter in adapters.items():
            lora = adapter.modules[module]
            delta = lora.scaling * lora.lora_B.double() @ lora.lora_A.double()
            parameters[f"{module}.weight"] = parameters[f"{module}.weight"] + coefficients(domain, module) * delta
    vectors = []
    for sequence in sequences:
        ids = torch.tensor(sequence[None, :].astype(np.int64))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        hidden = torch.func.functional_call(model, parameters, kwargs=inputs).last_hidden_state[0]
        pooled = hidden.mean(dim=0) if backbone.pooling == "mean" else hidden[0]
        vectors.append(pooled / pooled.norm())
    return torch.stack(vectors)


def oracle_rows(adapters: dict[str, Adapter], initialisation: str) -> dict[str, Adapter]:
    """Return each domain's contribution, dense and in float64, as an adapter with factors I and v_k."""
    updates = {
        module: {
            name: (
                adapter.modules[module].scaling
                * adapter.modules[module].lora_B.double()
                @ adapter.modules[module].lora_A.double()
            ).numpy()
            for name, adapter in adapters.items()
        }
        for module in next(iter(adapters.values())).modules
    }
    rows: dict[str, dict[str, LoraModule]] = {name: {} for name in adapters}
    for module, of_domain in updates.items():
        stacked = np.stack(list(of_domain.values()))  # (K, out, in)
        for name, row in zip(of_domain, ROWS[initialisation](stacked), strict=True):
            rows[name][module] = LoraModule(torch.from_numpy(row), torch.eye(len(row), dtype=torch.float64), 1.0)
    return {name: Adapter(modules) for name, modules in rows.items()}


def trimmed(updates: Deltas, density: float) -> Deltas:
    kept = np.zeros_like(updates)
    for k, update in enumerate(updates):
        smallest = np.sort(np.abs(update).ravel())[::-1][math.ceil(density * update.size - 1e-9) - 1]
        kept[k] = np.where(np.abs(update) >= smallest, update, 0.0)
    return kept


def ties_rows(updates: Deltas) -> Deltas:
    kept = trimmed(updates, 0.2)
    agree = kept * np.sign(kept.sum(0)) > 0
    rows: Deltas = np.where(agree, kept, 0.0) / np.maximum(agree.sum(0), 1)
    return rows


def stitched_rows(updates: Deltas) -> Deltas:
    kept = trimmed(updates, 0.05)
    rows: Deltas = kept / np.maximum((kept != 0).sum(0), 1)
    return rows


def pcb_rows(updates: Deltas) -> Deltas:
    scores, clamped = np.zeros_like(updates), np.zeros_like(updates)
    for k, update in enumerate(updates):
        sizes = np.sort(np.abs(update).ravel())
        cut = math.floor(0.0001 * update.size)
        size = np.clip(np.abs(update), sizes[cut], sizes[-1 - cut])
        clamped[k] = np.sign(update) * size
        score = np.exp(len(updates) * ((size - size.min()) / (size.max() - size.min())) ** 2)
        score = score * np.tanh(update * updates.sum(0))
        smallest = np.sort(score.ravel())[::-1][math.ceil(0.1 * update.size) - 1]
        scores[k] = np.maximum(score - smallest, 0.0) / (score.max() - smallest)
    summed = scores.sum(0)
    return clamped * scores / np.where(summed > 0, summed, 1.0)


ROWS: dict[str, Callable[[Deltas], Deltas]] = {
    "task-vectors": lambda updates: updates,
    "ties": ties_rows,
    "pcb": pcb_rows,
    "localize-and-stitch": stitched_rows,
}
