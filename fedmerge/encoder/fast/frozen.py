"""Frozen linear layers in bfloat16 training on a CPU: weights are cast and packed once instead of at every call.

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
    """Make the fast product of each frozen linear layer, for :func:`using`; empty for other precisions and devices.

    Each weight is copied twice in bfloat16: for the product and for its gradient.
    """
    compute = backbone.compute
    if compute.device.type != "cpu" or compute.autocast_dtype != torch.bfloat16 or not packs_bfloat16():
        return {}
    products: dict[torch.nn.Linear, Product] = {}
    for module in backbone.model.modules():
        trained = any(parameter.requires_grad for parameter in module.parameters())
        if type(module) is torch.nn.Linear and not trained and "forward" not in vars(module):
            weight, bias = module.weight.detach(), module.bias
            half_bias = None if bias is None else bias.detach().bfloat16()
            products[module] = _product(packed(weight), packed(weight.T), half_bias)
    return products


def _product(weight: torch.Tensor, transposed: torch.Tensor, bias: torch.Tensor | None) -> Product:
    return lambda x: _FrozenLinear.apply(x, weight, transposed, bias)  # type: ignore[no-untyped-call]


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
