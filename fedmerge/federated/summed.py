"""Flat vectors that clients add up in a secure sum, which hides single adapters; and the adapter of their mean.

updates   dense Δ of every module: exact, any ranks, out · in values per module
A and B   the factors separately, as in FedIT: inexact, r (in + out) values per module
B         over a frozen A that all share, as in FFA-LoRA: exact, r · out values per module
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from fedmerge.adapter import Adapter, LoraModule
from fedmerge.errors import AggregationError
from fedmerge.federated.product_space import client_update, compressed, decomposed, factors_of
from fedmerge.merging.stack import dense_module

Summed = Literal["updates", "A and B", "B"]


def summed_values(summed: Summed, local: Adapter, start: Adapter | None) -> NDArray[np.float32]:
    """Return the values that a client adds to the sum.

    Args:
        summed: kind of values, see the top of this file.
        local: the trained adapter.
        start: adapter to subtract in product space; None subtracts nothing.

    Returns:
        (n,), module by module, sorted by name; for each module Δ, or A and B, or B, row by row.
    """
    parts: list[torch.Tensor] = []
    adapter = local if start is None or summed != "updates" else client_update(local, start)
    for module in adapter.modules.values():
        if summed == "updates":
            left, right = factors_of(module)
            parts.append(left @ right)
        else:
            parts += [module.lora_A, module.lora_B] if summed == "A and B" else [module.lora_B]
    return torch.cat([part.reshape(-1).float() for part in parts]).numpy()


def num_summed(summed: Summed, like: Adapter) -> int:
    """Count the values of a client whose adapter has the shapes of ``like``."""
    return sum(rows * columns for module in like.modules.values() for rows, columns in _shapes(summed, module))


def adapter_of_mean(summed: Summed, mean: NDArray[np.floating], like: Adapter, rank: int | None) -> Adapter:
    """Return the adapter that the mean of the clients' values represents.

    Args:
        summed: kind of values.
        mean: (n,).
        like: adapter with the shapes of a client's; its A is the shared one if B is summed.
        rank: for updates, the sum of the clients' ranks. The exact mean has at most this rank; directions that rounding
            adds are cut by SVD. None cuts nothing.

    Raises:
        AggregationError: another number of values.
    """
    if mean.shape != (num_summed(summed, like),):
        raise AggregationError(
            f"sum of {summed}: found {mean.shape} values, expected ({num_summed(summed, like)},); train what the "
            "server sent"
        )
    modules, done = {}, 0
    for name, module in like.modules.items():
        parts = []
        for rows, columns in _shapes(summed, module):
            part = mean[done : done + rows * columns].reshape(rows, columns)
            parts.append(torch.from_numpy(part.astype(np.float32)))
            done += rows * columns
        if summed == "updates":
            modules[name] = dense_module(parts[0])
        else:
            lora_A = parts[0] if summed == "A and B" else module.lora_A
            modules[name] = LoraModule(lora_A, parts[-1], module.scaling)
    adapter = Adapter(modules)
    return compressed(decomposed(adapter), rank)[0] if summed == "updates" and rank is not None else adapter


def summed_rank(locals_: Mapping[str, Adapter]) -> int:
    """Return the largest rank that a sum of updates of these adapters can have: Σ r_k of the module with the most."""
    names = next(iter(locals_.values())).modules
    return max(sum(adapter.modules[name].rank for adapter in locals_.values()) for name in names)


def _shapes(summed: Summed, module: LoraModule) -> list[tuple[int, int]]:
    (rank, width_in), width_out = module.lora_A.shape, len(module.lora_B)
    if summed == "updates":
        return [(width_out, width_in)]
    return [(rank, width_in), (width_out, rank)] if summed == "A and B" else [(width_out, rank)]
