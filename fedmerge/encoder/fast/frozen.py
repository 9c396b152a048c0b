"""Frozen linear layers in bfloat16 training: weights are cast, and on a CPU packed, once instead of at every call.

Autocast caches the casts of trained weights only, and oneDNN packs a weight for every product. Results are identical to
the last bit.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from fedmerge.encoder.backbone import Backbone
from fedmerge.encoder.fast.products import Product, packed, packs_bfloat16


class _FrozenLinear(torch.autograd.Function):
    """x Wᵀ + b in bfloat16, with a gradient for x only."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, transposed: torch.Tensor, bias: torch.Tensor) -> Any:
        ctx.transposed, ctx.dtype = transposed, x.dtype
        return torch.ops.mkldnn._linear_pointwise(x.bfloat16(), weight, bias, "none", [], "none")

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        gradient = gradients[0].bfloat16()
        x = torch.ops.mkldnn._linear_pointwise(gradient, ctx.transposed, None, "none", [], "none")
        return x.to(ctx.dtype), None, None, None


def frozen_products(backbone: Backbone) -> dict[torch.nn.Linear, Product]:
    """Make the fast product of each frozen linear layer, for :func:`using`; empty for other precisions.

    Each weight is copied in bfloat16; on a CPU twice, for the product and for its gradient.
    """
    compute = backbone.compute
    on_cpu = compute.device.type == "cpu"
    if compute.autocast_dtype != torch.bfloat16 or (on_cpu and not packs_bfloat16()):
        return {}
    products: dict[torch.nn.Linear, Product] = {}
    for module in backbone.model.modules():
        trained = any(parameter.requires_grad for parameter in module.parameters())
        if type(module) is torch.nn.Linear and not trained and "forward" not in vars(module):
            weight, bias = module.weight.detach(), module.bias
            half_bias = None if bias is None else bias.detach().bfloat16()
            products[module] = (_packed_product if on_cpu else _product)(weight, half_bias)
    return products


def _packed_product(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    of_input, of_gradient = packed(weight), packed(weight.T)
    return lambda x: _FrozenLinear.apply(x, of_input, of_gradient, bias)  # type: ignore[no-untyped-call]


def _product(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    half = weight.bfloat16()
    return lambda x: torch.nn.functional.linear(x.bfloat16(), half, bias)


@contextmanager
def using(products: Mapping[torch.nn.Linear, Product]) -> Iterator[None]:
    """Compute these layers with these products within the block."""
    try:
        for module, product in products.items():
            vars(module)["forward"] = product
        yield
    finally:
        for module in products:
            vars(module).pop("forward", None)
