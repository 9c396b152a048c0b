"""The checkpoint of a training: its state after a validation, in one file on the client's disk.

The state is everything that the next step depends on, so a resumed training gives bit for bit the result of an
uninterrupted one. Batches are drawn from the seed, so only their number is stored.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from fedmerge.adapter import Adapter, LoraModule
from fedmerge.tensor_files import read_tensors, write_tensors


@dataclass(frozen=True)
class Validation:
    """One validation: its step, the mean training loss since the previous one, and NDCG@10 of the validation users."""

    step: int
    loss: float
    ndcg: float


@dataclass(frozen=True)
class TrainingState:
    """The state of a training between two steps.

    Attributes:
        step: optimiser steps made.
        spent: share of the budget spent, in [0, 1].
        seconds: wall clock so far.
        best_step: step of the best adapter so far.
        best: that adapter.
        validations: so far.
        tensors: parameters and optimiser moments, see :func:`fedmerge.tensor_files.state_tensors`.
        signals: sums of the training signals so far; None in a checkpoint of a version that had none.
    """

    step: int
    spent: float
    seconds: float
    best_step: int
    best: Adapter
    validations: tuple[Validation, ...]
    tensors: Mapping[str, torch.Tensor]
    signals: tuple[float, ...] | None = None


def write_checkpoint(path: Path, state: TrainingState) -> None:
    """Write the state in place of an earlier one; an interruption leaves the earlier file whole.

    Raises:
        ClientError: the disk is full, or the folder is not writable.
    """
    tensors = dict(state.tensors)
    scalings = {}
    for name, module in state.best.modules.items():
        tensors |= {f"best.{name}.lora_A": module.lora_A, f"best.{name}.lora_B": module.lora_B}
        scalings[name] = module.scaling
    facts = {
        "step": state.step,
        "spent": state.spent,
        "seconds": state.seconds,
        "best_step": state.best_step,
        "scalings": scalings,
        "validations": [asdict(validation) for validation in state.validations],
        "signals": state.signals,
    }
    write_tensors(path, tensors, facts, "the training checkpoint")


def read_checkpoint(path: Path) -> TrainingState | None:
    """Read a checkpoint; None if it is missing or damaged, in which case the training starts from step 0."""
    found = read_tensors(path)
    if found is None:
        return None
    tensors, facts = found
    try:
        best = {
            name: LoraModule(tensors.pop(f"best.{name}.lora_A"), tensors.pop(f"best.{name}.lora_B"), scaling)
            for name, scaling in facts["scalings"].items()
        }
        validations = tuple(Validation(**validation) for validation in facts["validations"])
        signals = facts.get("signals")
        state = TrainingState(
            facts["step"],
            facts["spent"],
            facts["seconds"],
            facts["best_step"],
            Adapter(best),
            validations,
            tensors,
            None if signals is None else tuple(map(float, signals)),
        )
    except (LookupError, TypeError, ValueError):
        return None
    return state if math.isfinite(state.spent) else None
