"""Tensors in safetensors files: found by the headers, read one at a time when they are used, written one at a time."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

_TYPES = {  # in the order in which files hold them, as safetensors sorts them
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}
_PLACES = {dtype: place for place, dtype in enumerate(_NAMES)}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        path: the file.
        version: inode, size and time of change of the file when its header was read.
        dtype: its type; None for one that torch lacks.
        shape: its shape.
        start: byte of the file at which its values begin.
    """

    path: Path
    version: tuple[int, int, int]
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    start: int


def find_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a file by name, in the order of their values; none is read.

    Raises:
        OSError, SafetensorError: the file is missing or damaged.
    """
    with safe_open(path, "pt"):  # checks the header: no name twice, no value outside the file
        version = _version(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    found = {
        name: StoredTensor(
            path, version, _TYPES.get(entry["dtype"]), tuple(entry["shape"]), 8 + length + entry["data_offsets"][0]
        )
        for name, entry in header.items()
    }
    return dict(sorted(found.items(), key=lambda each: each[1].start))


def read_tensor(stored: StoredTensor) -> torch.Tensor:
    """Return a tensor whose values are read from the file as they are used.

    Raises:
        OSError: the file is gone, or changed since its header was read, or its type is unknown.
    """
    if stored.dtype is None:
        raise OSError("it holds a type that torch lacks")
    if _version(stored.path) != stored.version:
        raise OSError(f"{stored.path.name} changed while it was read")
    if 0 in stored.shape:
        return torch.empty(stored.shape, dtype=stored.dtype)
    size = math.prod(stored.shape) * stored.dtype.itemsize
    values = np.memmap(stored.path, np.uint8, "c", stored.start, (size,))  # a copy of what is written to it
    return torch.from_numpy(values).view(stored.dtype).reshape(stored.shape)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a file that is equal to that of ``safetensors.torch.save_file``, with one tensor in memory at a time.

    Args:
        path: the file.
        tensors: by name; each is read twice.
    """
    kinds = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    names, start = sorted(kinds, key=lambda name: (_PLACES[kinds[name][0]], name)), 0
    for name in names:
        dtype, shape = kinds[name]
        end = start + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": (start, end)}
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(bytes_of(tensors[name]))


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the values of a tensor of any type as bytes, without a copy if they are contiguous and on the CPU."""
    view: memoryview = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return view


def _version(path: Path) -> tuple[int, int, int]:
    found = os.stat(path)
    return found.st_ino, found.st_size, found.st_mtime_ns
