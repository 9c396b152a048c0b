"""What clients add up where nobody may see a single adapter, as flat vectors, and the adapter that their mean is.

updates   the dense Δ of every module: exact, any ranks, out · in values a module
A and B   the factors one by one, as FedIT averages them: inexact, r (in + out) values a module
B         over a frozen A that all share, as FFA-LoRA: exact, r · out values a module
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
    """What a client adds to the sum.

    Args:
        summed: see above.
        local: the adapter as trained.
        start: what is subtracted from it in product space; None: nothing.

    Returns:
        (n,), module by module in the order of the names; of a module Δ, or A and B, or B, row by row.
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
    """How many values a client adds whose adapter has the shapes of ``like``."""
    return sum(rows * columns for module in like.modules.values() for rows, columns in _shapes(summed, module))


def adapter_of_mean(summed: Summed, mean: NDArray[np.floating], like: Adapter, rank: int | None) -> Adapter:
    """The adapter that the mean of the clients' values stands for.

    Args:
        summed: what they are.
        mean: (n,).
        like: an adapter whose shapes a client's has; its A is the shared one, where B is summed.
        rank: of updates: the sum of the clients' ranks. The mean has no more directions, but rounding gives it all of
            them; the rest is cut off by SVD. None: nothing is cut.

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
    """The most directions that a sum of updates of adapters of these shapes has: Σ r_k, of the widest module."""
    names = next(iter(locals_.values())).modules
    return max(sum(adapter.modules[name].rank for adapter in locals_.values()) for name in names)


def _shapes(summed: Summed, module: LoraModule) -> list[tuple[int, int]]:
    (rank, width_in), width_out = module.lora_A.shape, len(module.lora_B)
    if summed == "updates":
        return [(width_out, width_in)]
    return [(rank, width_in), (width_out, rank)] if summed == "A and B" else [(width_out, rank)]
