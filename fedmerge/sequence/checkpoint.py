"""The state of a sequence model's training after an epoch, in one file on the client's disk.

A resumed training gives bit for bit the result of an uninterrupted one: the file holds the weights, the optimiser's
moments and the state of the generator that draws dropout. Batches are drawn from the seed.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from fedmerge.tensor_files import read_tensors, write_tensors

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
    tensors = {f"{group}/{name}": tensor for group, named in groups.items() for name, tensor in named.items()}
    write_tensors(path, tensors, asdict(progressed), "the checkpoint of a sequence model")


def read_checkpoint(path: Path) -> tuple[Progressed, dict[str, Tensors]] | None:
    """Read a checkpoint; None if it is missing or damaged, in which case the training starts from the beginning."""
    found = read_tensors(path)
    if found is None:
        return None
    tensors, facts = found
    groups: dict[str, Tensors] = {}
    for key, tensor in tensors.items():
        group, name = key.split("/", 1)
        groups.setdefault(group, {})[name] = tensor
    try:
        figures = Progressed(facts["seconds"], facts["best_epoch"], tuple(facts["losses"]), tuple(facts["ndcgs"]))
    except (LookupError, TypeError):
        return None
    return figures, groups
