"""The gate in front of the merge: an adapter that is not what was asked for is refused by name."""

from collections.abc import Mapping

import torch

from fedmerge.config import Lora
from fedmerge.encoder.backbone import Backbone
from fedmerge.encoder.lora import Adapter, adapter_of, attach
from fedmerge.errors import LayoutMismatchError

Layout = Mapping[str, tuple[tuple[int, ...], tuple[int, ...], float]]
"""Module name -> shape of lora_A, shape of lora_B, scaling."""


def expected_layout(backbone: Backbone, lora: Lora) -> Layout:
    """The layout that every client of this experiment trains."""
    model = attach(backbone, lora.target_modules, lora.rank, lora.alpha, seed=0)
    try:
        return layout_of(adapter_of(model))
    finally:
        model.unload()


def layout_of(adapter: Adapter) -> Layout:
    """The layout of an adapter."""
    return {
        name: (tuple(module.lora_A.shape), tuple(module.lora_B.shape), module.scaling)
        for name, module in adapter.modules.items()
    }


def check_adapter(domain: str, adapter: Adapter, layout: Layout) -> None:
    """Refuse an adapter of another layout or with values that are not finite.

    Raises:
        LayoutMismatchError: what differs, and where.
    """
    found = layout_of(adapter)
    missing, extra = sorted(layout.keys() - found.keys()), sorted(found.keys() - layout.keys())
    if missing or extra:
        raise LayoutMismatchError(
            f"domain {domain}: its adapter lacks the modules {missing[:3]} and has unexpected {extra[:3]} "
            f"({len(found)} modules, expected {len(layout)}). Use the same lora.target_modules and backbone everywhere."
        )
    for name, expected in layout.items():
        if found[name] != expected:
            raise LayoutMismatchError(
                f"domain {domain}: module {name} has (lora_A, lora_B, scaling) {found[name]}, expected {expected}. "
                "Use the same lora.rank and lora.alpha everywhere."
            )
        module = adapter.modules[name]
        for part, tensor in (("lora_A", module.lora_A), ("lora_B", module.lora_B)):
            wrong = int((~torch.isfinite(tensor)).sum())
            if wrong or tensor.dtype != torch.float32:
                raise LayoutMismatchError(
                    f"domain {domain}: {name}.{part} is {tensor.dtype} with {wrong} of {tensor.numel()} values NaN or "
                    "infinite, expected finite float32. Its training diverged or the file is damaged: leave it out, or "
                    "train again."
                )
