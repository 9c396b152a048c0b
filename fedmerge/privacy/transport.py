"""Transport of an adapter's factors: float32, float16, 8-bit levels, or the largest changes only.

The client packs them, and the server unpacks them. The server treats everything that arrives as hostile: it checks
types, shapes, positions and numbers of entries against the agreed ones before it computes anything.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from fedmerge.adapter import Adapter, LoraModule
from fedmerge.config import Lora, Privacy, Transport
from fedmerge.encoder.backbone import Backbone
from fedmerge.encoder.lora import fresh_adapter
from fedmerge.errors import LayoutMismatchError

PIECES: Mapping[Transport, Mapping[str, str]] = {  # arrays that encode one matrix: suffix -> dtype
    "float32": {"": "float32"},
    "float16": {".half": "float16"},
    "int8": {".levels": "int8", ".scales": "float32"},
    "top-k": {".values": "float32", ".positions": "int32"},
}

LEVELS = 127
TOP_K_DENSITY = 0.1  # share of each factor's entries that travels

Array = npt.NDArray[np.generic]


@dataclass(frozen=True)
class Coding:
    """The encoding of adapters, known to both sides.

    Attributes:
        transport: a key of PIECES.
        density: for top-k, the share of each factor's entries that travels: those that training changed most.
        start: for top-k, the adapter that training started from, to which the changes are added.
    """

    transport: Transport = "float32"
    density: float = 1.0
    start: Adapter | None = None


def coding_of(privacy: Privacy, lora: Lora, seed: int, backbone: Backbone) -> Coding:
    """Return the encoding of a domain's expert, whose own ``lora`` and seed give the start of its training."""
    if privacy.transport != "top-k":
        return Coding(privacy.transport)
    return Coding(privacy.transport, TOP_K_DENSITY, fresh_adapter(backbone, lora, seed))


def pack(adapter: Adapter, coding: Coding) -> dict[str, Array]:
    """Encode an adapter's factors as ``<module>.lora_A<piece>`` -> array with two axes.

    With int8 every rank component (row of A, column of B) has its own scale.
    """
    packed: dict[str, Array] = {}
    for name, part, matrix in _factors(adapter):
        start = None if coding.start is None else getattr(coding.start.modules[name], part)
        pieces = _pack_matrix(matrix, part, coding, start)
        packed |= {f"{name}.{part}{piece}": values for piece, values in pieces.items()}
    return packed


def unpack(packed: Mapping[str, Array], like: Adapter, scalings: Mapping[str, float], coding: Coding) -> Adapter:
    """Decode the arrays of :func:`pack`, up to rounding.

    Args:
        packed: received arrays, with the dtypes of PIECES.
        like: an adapter of the expected layout; its values are not used.
        scalings: module -> scaling.
        coding: the encoding.

    Raises:
        LayoutMismatchError: unexpected tensors, shapes, numbers of entries or positions.
    """
    pieces = PIECES[coding.transport]
    expected = {f"{name}.{part}{piece}" for name, part, _ in _factors(like) for piece in pieces}
    if set(packed) != expected or set(scalings) != set(like.modules):
        strange = sorted(set(packed) ^ expected) or sorted(set(scalings) ^ set(like.modules))
        raise LayoutMismatchError(
            f"the adapter arrived as {coding.transport} with unexpected or missing tensors: {strange[:3]}. Use the "
            "same privacy.transport and lora settings everywhere."
        )
    factors: dict[tuple[str, str], torch.Tensor] = {}
    for name, part, matrix in _factors(like):
        arrived = {piece: packed[f"{name}.{part}{piece}"] for piece in pieces}
        start = None if coding.start is None else getattr(coding.start.modules[name], part)
        factors[name, part] = _unpack_matrix(f"{name}.{part}", arrived, matrix.shape, part, coding, start)
    return Adapter(
        {name: LoraModule(factors[name, "lora_A"], factors[name, "lora_B"], scalings[name]) for name in like.modules}
    )


def decode_as_receiver(adapter: Adapter, coding: Coding) -> Adapter:
    """Return an adapter as the receiver decodes it."""
    return unpack(pack(adapter, coding), adapter, {n: m.scaling for n, m in adapter.modules.items()}, coding)


def residual(adapter: Adapter, received: Adapter) -> float:
    """Return ‖Δ - Δ'‖_F / ‖Δ‖_F over all modules, Δ = scaling · B A; 0 if both are 0."""
    lost = sum(
        float((module.delta_weight() - received.modules[name].delta_weight()).square().sum())
        for name, module in adapter.modules.items()
    )
    whole = sum(float(module.delta_weight().square().sum()) for module in adapter.modules.values())
    return 0.0 if lost == 0 else math.sqrt(lost / whole) if whole else math.inf


def _factors(adapter: Adapter) -> list[tuple[str, str, torch.Tensor]]:
    return [
        (name, part, getattr(module, part)) for name, module in adapter.modules.items() for part in ("lora_A", "lora_B")
    ]


def _pack_matrix(matrix: torch.Tensor, part: str, coding: Coding, start: torch.Tensor | None) -> dict[str, Array]:
    if coding.transport == "float32":
        return {"": matrix.contiguous().numpy()}
    if coding.transport == "float16":
        return {".half": matrix.half().contiguous().numpy()}
    if coding.transport == "int8":
        scales = matrix.abs().amax(dim=_across(part), keepdim=True) / LEVELS
        levels = torch.round(matrix / torch.where(scales > 0, scales, 1.0)).clamp(-LEVELS, LEVELS)
        return {".levels": levels.to(torch.int8).contiguous().numpy(), ".scales": scales.contiguous().numpy()}
    change = (matrix if start is None else matrix - start).flatten()
    positions = change.abs().topk(_kept(change.numel(), coding)).indices.sort().values
    return {
        ".values": change[positions][:, None].contiguous().numpy(),
        ".positions": positions.to(torch.int32)[:, None].contiguous().numpy(),
    }


def _unpack_matrix(
    what: str,
    arrived: Mapping[str, Array],
    shape: torch.Size,
    part: str,
    coding: Coding,
    start: torch.Tensor | None,
) -> torch.Tensor:
    rows, columns = shape
    number = _kept(rows * columns, coding)
    shapes = {
        ".levels": (rows, columns),
        ".scales": (rows, 1) if part == "lora_A" else (1, columns),
        ".values": (number, 1),
        ".positions": (number, 1),
    }
    for piece, values in arrived.items():
        expected, dtype = shapes.get(piece, (rows, columns)), PIECES[coding.transport][piece]
        if values.shape != expected or str(values.dtype) != dtype:
            raise LayoutMismatchError(
                f"{what}{piece} is {values.dtype} of shape {values.shape}, expected {dtype} of shape {expected}. Use "
                "the same privacy.transport and lora settings everywhere."
            )
    tensors = {piece: torch.from_numpy(np.array(values)) for piece, values in arrived.items()}
    if coding.transport in ("float32", "float16"):
        return next(iter(tensors.values())).float()
    if coding.transport == "int8":
        return tensors[".levels"].float() * tensors[".scales"]
    positions = tensors[".positions"].long().flatten()
    if bool((positions[1:] <= positions[:-1]).any()) or int(positions[0]) < 0 or int(positions[-1]) >= rows * columns:
        raise LayoutMismatchError(
            f"{what}.positions are not ascending in 0 … {rows * columns - 1}. Use one fedmerge version everywhere."
        )
    matrix = torch.zeros(rows * columns) if start is None else start.clone().flatten()
    matrix[positions] += tensors[".values"].flatten()
    return matrix.reshape(rows, columns)


def _across(part: str) -> int:
    """Return the axis along which a rank component of a factor lies."""
    return 1 if part == "lora_A" else 0


def _kept(size: int, coding: Coding) -> int:
    return max(1, math.ceil(coding.density * size))
