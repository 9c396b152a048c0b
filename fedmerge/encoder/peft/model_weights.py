"""Weights of a full model in a folder of safetensors files, read one at a time."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from fedmerge.encoder.peft.tensors import StoredTensor, find_tensors, read_tensor
from fedmerge.errors import BackboneError

_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class ModelWeights:
    """Where the weights of a model are.

    Attributes:
        folder: folder of the model.
        tensors: name -> tensor in one of its files.
    """

    folder: Path
    tensors: Mapping[str, StoredTensor]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name of a tensor -> its shape."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}


def open_weights(folder: Path) -> ModelWeights:
    """Find the weights in a folder that transformers' ``save_pretrained`` wrote, whole or in several files.

    Raises:
        BackboneError: no safetensors file, or a damaged one.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in _files(folder):
        try:
            tensors |= find_tensors(path)
        except (OSError, SafetensorError) as error:
            raise _unreadable(path, error) from error
    return ModelWeights(folder, tensors)


def read_weight(weights: ModelWeights, name: str) -> torch.Tensor:
    """Read one tensor in its own type.

    Raises:
        BackboneError: a damaged file.
    """
    try:
        return read_tensor(weights.tensors[name])
    except OSError as error:
        raise _unreadable(weights.tensors[name].path, error) from error


def read_weight_like(weights: ModelWeights, name: str) -> torch.Tensor:
    """Read a weight whose name in the checkpoint may differ by the prefix of a model's class.

    ``bert.encoder…`` and ``encoder…`` are one, so the only name that ends like the other is taken, too.

    Args:
        weights: of a base model.
        name: name of the parameter in the bare backbone.

    Raises:
        BackboneError: no tensor of this name, or several, or a damaged file.
    """
    found = [name] if name in weights.tensors else []
    found = found or [key for key in weights.tensors if key.endswith(f".{name}") or name.endswith(f".{key}")]
    if len(found) != 1:
        listed = ", ".join(found) or "none"
        raise BackboneError(
            f"base model {weights.folder}: expected one weight {name}, found {listed}. The adapters belong to another "
            "base model, or this one shares the weight with another layer: save it untied."
        )
    return read_weight(weights, found[0])


def _files(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if not index.is_file():
        files = [folder / _FILE] if (folder / _FILE).is_file() else sorted(folder.glob("*.safetensors"))
        if not files:
            raise BackboneError(
                f"model {folder}: found no {_FILE} and no {_INDEX}. Give the folder of a model that was saved with "
                "save_pretrained."
            )
        return files
    try:
        shards = sorted({str(shard) for shard in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise _unreadable(index, error) from error
    return [folder / Path(shard).name for shard in shards]


def _unreadable(path: Path, error: Exception) -> BackboneError:
    return BackboneError(f"model {path}: cannot be read ({error}). Get the model again.")
