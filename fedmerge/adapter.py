"""LoRA adapters as data: modules, hash, and the layer of a module. Imports torch alone.

On disk an adapter is a PEFT folder, see ``fedmerge.encoder.peft.folder``; on a model, see ``fedmerge.encoder.lora``.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeVar

import torch

K = TypeVar("K")
T = TypeVar("T")

MODERATE_EXPONENT = 60  # factors within 2^±60 are rounded to float32 as they are


@dataclass(frozen=True)
class LoraModule:
    """The low-rank update of one linear layer, Δ = scaling · B A.

    Attributes:
        lora_A: float32 (r, in).
        lora_B: float32 (out, r).
        scaling: alpha / r (rsLoRA: alpha / √r).
    """

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    scaling: float

    @property
    def rank(self) -> int:
        """The rank r."""
        return self.lora_A.shape[0]

    def delta_weight(self) -> torch.Tensor:
        """Compute Δ, float32 (out, in)."""
        return self.scaling * (self.lora_B @ self.lora_A)


class OnDemand(Mapping[K, T]):
    """A mapping, sorted by key, that makes a value each time it is read, so that memory holds only those in use."""

    def __init__(self, names: Iterable[K], make: Callable[[K], T]) -> None:
        self._names = dict.fromkeys(sorted(names))  # type: ignore[type-var]  # names, or dataclasses with an order
        self._make = make

    def __getitem__(self, name: K) -> T:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[K]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class Adapter:
    """All LoRA modules of one fine-tuning, by their names in the bare backbone, sorted.

    They are in memory, or ``OnDemand``: read from disk or computed one at a time.
    """

    modules: Mapping[str, LoraModule]

    def __post_init__(self) -> None:
        if not isinstance(self.modules, OnDemand):
            object.__setattr__(self, "modules", MappingProxyType(dict(sorted(self.modules.items()))))

    @property
    def size_bytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(tensor.nbytes for m in self.modules.values() for tensor in (m.lora_A, m.lora_B))


def adapter_sha256(adapter: Adapter) -> str:
    """Hash names, shapes, scalings and values."""
    digest = hashlib.sha256()
    for name, module in adapter.modules.items():
        digest.update(f"{name} {tuple(module.lora_A.shape)} {tuple(module.lora_B.shape)} {module.scaling!r}\n".encode())
        for tensor in (module.lora_A, module.lora_B):
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).numpy().data)
    return digest.hexdigest()


def in_memory(adapter: Adapter) -> Adapter:
    """Return the adapter with a copy of all its tensors in memory."""
    return Adapter(
        {
            name: LoraModule(module.lora_A.clone(), module.lora_B.clone(), module.scaling)
            for name, module in adapter.modules.items()
        }
    )


def is_zero(adapter: Adapter) -> bool:
    """Return True if the update is zero in every module, as that of a fresh adapter: nothing was learned."""
    return not any(
        module.lora_A.any() and module.lora_B.any() and module.scaling for module in adapter.modules.values()
    )


def layer_of(module_name: str) -> str | None:
    """Return the path of a module's layer: ``encoder.layer.3`` for ``encoder.layer.3.…``, None outside the layers.

    A layer ends at the first index after a name. So experts (``layers.3.experts.2``) and sub-layers
    (``encoder.block.0.layer.1`` of T5) belong to the layer around them, and blocks (``stages.1.blocks.4``) to their
    stage. An index at the start (``0.auto_model.…``) counts only if no other follows.
    """
    parts = module_name.split(".")
    indices = [place for place, part in enumerate(parts) if part.isdecimal()]
    after_name = [place for place in indices if not all(part.isdecimal() for part in parts[:place])]
    end = next(iter(after_name or indices), None)
    return None if end is None else ".".join(parts[: end + 1])


def float32_factors(
    lora_A: torch.Tensor, lora_B: torch.Tensor, factor: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return factor · A and B in float32; where magnitudes are extreme, with powers of two moved between them.

    A · 1e40 and B · 1e-40 in float64 are ordinary updates: rounded as they are, they would be infinite and 0. Each row
    of A and its column of B get a power of their own.

    Args:
        lora_A: (r, in), any floating dtype.
        lora_B: (out, r), any floating dtype.
        factor: finite factor on the product.
    """
    sizes = [largest_magnitude(lora_A), largest_magnitude(lora_B)]
    exponents = [math.frexp(size)[1] for size in (sizes[0] * abs(factor), sizes[1])]
    if not all(map(math.isfinite, sizes)) or max(map(abs, exponents)) <= MODERATE_EXPONENT:
        return lora_A.float() * factor, lora_B.float()
    rows, columns = lora_A.double().abs().amax(1) * abs(factor), lora_B.double().abs().amax(0)
    shifts = (torch.frexp(rows).exponent - torch.frexp(columns).exponent) // 2  # (r,)
    return (_times_power(lora_A, -shifts[:, None]) * factor).float(), _times_power(lora_B, shifts).float()


def _times_power(tensor: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """Return tensor · 2^exponents in float64, in two steps, since 2^1024 is infinite."""
    half = exponents // 2
    return tensor.double() * torch.exp2(half.double()) * torch.exp2((exponents - half).double())


def largest_magnitude(tensor: torch.Tensor) -> float:
    """Return the largest magnitude, or NaN if an entry is NaN."""
    return max(map(abs, map(float, tensor.aminmax()))) if tensor.numel() else 0.0


def num_not_finite(tensor: torch.Tensor) -> int:
    """Count the entries that are NaN or infinite."""
    return 0 if math.isfinite(largest_magnitude(tensor)) else int((~tensor.isfinite()).sum())


def fits_float32(module: LoraModule) -> bool:
    """Return True if ‖Δ‖_F is at most the largest float32, so that Δ is finite in any orthonormal coordinates."""
    largest = torch.finfo(torch.float32).max
    entries = largest_magnitude(module.lora_A) * largest_magnitude(module.lora_B)  # a bound that is quick to compute
    width = math.sqrt(module.lora_A.shape[1] * module.lora_B.shape[0])
    if abs(module.scaling) * module.rank * entries * width <= largest:
        return True
    terms = factor_norms(module.lora_B, module.lora_A)
    if abs(module.scaling) * float(terms.sum()) <= largest:
        return True
    delta = module.lora_B.double() @ module.lora_A.double()
    return float(torch.linalg.vector_norm(module.scaling * delta)) <= largest


def factor_norms(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Compute ‖b_j‖ ‖a_j‖ of the terms of left · right = Σ_j b_j a_jᵀ: (out, r), (r, in) -> (r,) float64."""
    rows: torch.Tensor = torch.linalg.vector_norm(right, dim=1, dtype=torch.float64)
    norms: torch.Tensor = rows * torch.linalg.vector_norm(left, dim=0, dtype=torch.float64)
    return norms
