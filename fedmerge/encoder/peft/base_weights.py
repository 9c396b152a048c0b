"""Weights of a base model in a folder of safetensors files, read one at a time."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from fedmerge.errors import BackboneError

_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class BaseWeights:
    """Where the weights of a base model are.

    Attributes:
        folder: folder of the model.
        file_of: name of a tensor -> its file.
    """

    folder: Path
    file_of: Mapping[str, Path]


def open_base(folder: Path) -> BaseWeights:
    """Find the weights in a folder that transformers' ``save_pretrained`` wrote, whole or in several files.

    Raises:
        BackboneError: no safetensors file, or a damaged one.
    """
    try:
        if (folder / _INDEX).is_file():
            index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
            file_of = {str(name): folder / Path(str(file)).name for name, file in index["weight_map"].items()}
        else:
            with safe_open(folder / _FILE, "pt") as weights:
                file_of = dict.fromkeys(weights.keys(), folder / _FILE)
    except FileNotFoundError as error:
        raise BackboneError(
            f"base model {folder}: found no {_FILE} and no {_INDEX}. Give the folder of the base model, saved with "
            "save_pretrained."
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise BackboneError(f"base model {folder}: damaged ({error}). Get the folder again.") from error
    return BaseWeights(folder, file_of)


def base_weight(base: BaseWeights, name: str) -> torch.Tensor:
    """Read a weight of the base model in its own type.

    The names in a checkpoint and in a model may differ by the prefix of a model's class (``bert.encoder…`` and
    ``encoder…``), so the only name that ends like the other is taken, too.

    Args:
        base: from :func:`open_base`.
        name: name of the parameter in the bare backbone.

    Raises:
        BackboneError: no tensor of this name, or several, or a damaged file.
    """
    found = [name] if name in base.file_of else []
    found = found or [key for key in base.file_of if key.endswith(f".{name}") or name.endswith(f".{key}")]
    if len(found) != 1:
        listed = ", ".join(found) or "none"
        raise BackboneError(
            f"base model {base.folder}: expected one weight {name}, found {listed}. The adapters belong to another "
            "base model, or this one shares the weight with another layer: save it untied."
        )
    try:
        with safe_open(base.file_of[found[0]], "pt") as weights:
            tensor: torch.Tensor = weights.get_tensor(found[0])
    except (OSError, SafetensorError) as error:
        raise BackboneError(f"base model {base.folder}: damaged ({error}). Get the folder again.") from error
    return tensor
