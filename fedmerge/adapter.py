"""LoRA adapters as data: modules, hash, and the layer of a module. Imports torch alone.

On disk an adapter is a PEFT folder, see ``fedmerge.encoder.peft_folder``; on a model, see ``fedmerge.encoder.lora``.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch


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


@dataclass(frozen=True)
class Adapter:
    """All LoRA modules of one fine-tuning, by their names in the bare backbone, sorted."""

    modules: Mapping[str, LoraModule]

    def __post_init__(self) -> None:
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
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def is_zero(adapter: Adapter) -> bool:
    """Return True if the update is zero in every module, as that of a fresh adapter: nothing was learned."""
    return not any(
        module.lora_A.any() and module.lora_B.any() and module.scaling for module in adapter.modules.values()
    )


def layer_of(module_name: str) -> int | None:
    """Return the number of a module's layer: 3 for ``encoder.layer.3.…``, None for a module outside the layers."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", module_name)
    return int(found.group(1)) if found else None
