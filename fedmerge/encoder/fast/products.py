"""Products with weights that oneDNN holds in bfloat16, cast and packed once, with an activation as part of them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear

PACKED_ROWS = 4096  # number of rows that oneDNN packs the weights for
Product = Callable[[torch.Tensor], torch.Tensor]
Weights = tuple[torch.Tensor, torch.Tensor | None]  # weight (out, in) and bias (out,) in float32


def packs_bfloat16() -> bool:
    """Return True if oneDNN multiplies packed bfloat16 matrices on this machine."""
    return bool(torch._C._has_mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def packed(weight: torch.Tensor) -> Any:
    """Pack a weight (out, in) in bfloat16 for oneDNN."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.bfloat16().contiguous(), PACKED_ROWS)


def product(weights: Weights, activation: str = "none") -> Product:
    """Return x Wᵀ + b, from bfloat16 to bfloat16, with an activation before rounding: ``none``, ``gelu``, ``swish``."""
    weight, bias = packed(weights[0]), None if weights[1] is None else weights[1].bfloat16()
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "none")


def weights_of(layer: Any) -> Weights:
    """Return weight and bias of a linear layer, with the update of an attached LoRA."""
    weight = layer.weight.detach()
    if isinstance(layer, LoraLinear) and not (layer.merged or layer.disable_adapters):
        for name in layer.active_adapters:
            weight = weight + layer.get_delta_weight(name).detach()
    return weight, None if layer.bias is None else layer.bias.detach()


def stacked(layers: Sequence[Weights]) -> Weights:
    """Return the weights of several layers with one input as those of one layer."""
    biases = [torch.zeros(len(weight)) if bias is None else bias for weight, bias in layers]
    none = all(bias is None for _, bias in layers)
    return torch.cat([weight for weight, _ in layers]), None if none else torch.cat(biases)


def scaled(weights: Weights, factor: float) -> Weights:
    """Return the weights of a layer whose output is multiplied by a factor."""
    return weights[0] * factor, None if weights[1] is None else weights[1] * factor
