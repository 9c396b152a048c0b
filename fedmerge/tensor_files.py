"""Tensors with facts in one file, whole or absent, with a hash of both: state that a killed process resumes from."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fedmerge.errors import ClientError

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any], what: str) -> None:
    """Write tensors and facts in place of an earlier file; an interruption leaves the earlier file whole.

    Args:
        path: of the file.
        tensors: by name, on the CPU.
        facts: JSON types.
        what: subject of the error message, for example ``the training checkpoint``.

    Raises:
        ClientError: the disk is full, or the folder is not writable.
    """
    text = json.dumps(facts)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, partial, metadata={"facts": text, "sha256": _digest(text, contiguous)})
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise ClientError(
            f"{what} cannot be written to {path.parent} ({error}). Check the free space and the permissions there, or "
            "set cache_dir."
        ) from error


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """Read the tensors and the facts of :func:`write_tensors`; None if the file is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
        facts = json.loads(metadata["facts"])
        whole = metadata["sha256"] == _digest(metadata["facts"], tensors) and isinstance(facts, dict)
    except (OSError, SafetensorError, ValueError, LookupError):
        return None
    return (tensors, facts) if whole else None


def read_facts(path: Path) -> dict[str, Any] | None:
    """Read the facts alone, without checking the tensors; None if the file is missing, damaged or without facts."""
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})["facts"])
    except (OSError, SafetensorError, ValueError, LookupError):
        return None
    return facts if isinstance(facts, dict) else None


def state_tensors(
    parameters: Sequence[torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    """Copy the parameters and their optimiser moments to the CPU; one that had no gradient yet has no moments."""
    found = {}
    for number, parameter in enumerate(parameters):
        found[f"parameter.{number}"] = parameter.detach().cpu().clone()
        for moment in _MOMENTS if parameter in optimizer.state else ():
            found[f"{moment}.{number}"] = optimizer.state[parameter][moment].detach().cpu().clone()
    return found


def restore(
    tensors: Mapping[str, torch.Tensor], parameters: Sequence[torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Load the tensors of :func:`state_tensors` into the parameters and the optimiser, in place."""
    state = optimizer.state_dict()
    for number, parameter in enumerate(parameters):
        with torch.no_grad():
            parameter.copy_(tensors[f"parameter.{number}"])
        if f"step.{number}" in tensors:
            state["state"][number] = {moment: tensors[f"{moment}.{number}"].clone() for moment in _MOMENTS}
    optimizer.load_state_dict(state)


def _digest(text: str, tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).numpy().data)  # a view of one dimension; nothing is copied
    return digest.hexdigest()
