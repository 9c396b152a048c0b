"""The state of a sequence model's training after an epoch, in one file on the client's disk.

A resumed training gives bit for bit the result of an uninterrupted one: the file holds the weights, the optimiser's
moments and the state of the generator that draws dropout. Batches are drawn from the seed.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from fedmerge.errors import ClientError, RunDirError
from fedmerge.files import make_folder, write_bytes

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Progressed:
    """Figures of a training that is not finished.

    Attributes:
        seconds: wall clock so far.
        best_epoch: the best epoch so far, 0 for the untrained model.
        losses: mean training loss of every epoch.
        ndcgs: NDCG@10 of the validation users before training and after every epoch.
    """

    seconds: float
    best_epoch: int
    losses: tuple[float, ...]
    ndcgs: tuple[float, ...]


def write_checkpoint(path: Path, progressed: Progressed, groups: Mapping[str, Tensors]) -> None:
    """Write figures and groups of tensors in place of an earlier checkpoint.

    Raises:
        ClientError: the disk is full, or the folder is not writable.
    """
    tensors = {
        f"{group}/{name}": tensor.contiguous() for group, named in groups.items() for name, tensor in named.items()
    }
    body = json.dumps(asdict(progressed)).encode() + b"\n" + save(tensors)
    try:
        make_folder(path.parent)
        write_bytes(path, hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
    except (OSError, RunDirError) as error:
        raise ClientError(
            f"the training checkpoint cannot be written to {path.parent} ({error}). Check the free space and the "
            "permissions there, or set cache_dir."
        ) from error


def read_checkpoint(path: Path) -> tuple[Progressed, dict[str, Tensors]] | None:
    """Read a checkpoint; None if it is missing or damaged, in which case the training starts from the beginning."""
    try:
        digest, body = path.read_bytes().split(b"\n", 1)
        if hashlib.sha256(body).hexdigest().encode() != digest:
            return None
        figures, tensors = body.split(b"\n", 1)
        found = json.loads(figures)
        progressed = Progressed(found["seconds"], found["best_epoch"], tuple(found["losses"]), tuple(found["ndcgs"]))
        groups: dict[str, Tensors] = {}
        for key, tensor in load(tensors).items():
            group, name = key.split("/", 1)
            groups.setdefault(group, {})[name] = tensor
    except (OSError, SafetensorError, ValueError, LookupError, TypeError):
        return None
    return progressed, groups
