"""A LoRA adapter as data: its modules, its hash and the layer of each module. Needs torch alone."""

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
        """r."""
        return self.lora_A.shape[0]

    def delta_weight(self) -> torch.Tensor:
        """Δ, float32 (out, in)."""
        return self.scaling * (self.lora_B @ self.lora_A)


@dataclass(frozen=True)
class Adapter:
    """All LoRA modules of one fine-tuning, by module name in the bare backbone, sorted."""

    modules: Mapping[str, LoraModule]

    def __post_init__(self) -> None:
        object.__setattr__(self, "modules", MappingProxyType(dict(sorted(self.modules.items()))))

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for m in self.modules.values() for tensor in (m.lora_A, m.lora_B))


def adapter_sha256(adapter: Adapter) -> str:
    """A hash over names, shapes, scalings and values."""
    digest = hashlib.sha256()
    for name, module in adapter.modules.items():
        digest.update(f"{name} {tuple(module.lora_A.shape)} {tuple(module.lora_B.shape)} {module.scaling!r}\n".encode())
        for tensor in (module.lora_A, module.lora_B):
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def layer_of(module_name: str) -> int | None:
    """The encoder layer of a module: ``encoder.layer.3.…`` is 3; None for modules outside the layers."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", module_name)
    return int(found.group(1)) if found else None
