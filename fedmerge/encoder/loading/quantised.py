"""Frozen linear layers that hold their weights in 8 or 4 bits and compute them anew whenever they are used.

Every kind of adapter works on top: a layer is a linear layer, its ``weight`` is the quantised W_q in float32, and
folding puts W_q + Δ beside the codes.
"""

import importlib
from typing import Any, Literal

import torch
from torch.nn.functional import linear

from fedmerge.errors import ConfigError

Kind = Literal["int8", "nf4"]
_NF4_BLOCK = 64  # weights that share a scale


class QuantisedLinear(torch.nn.Linear):
    """A frozen linear layer with a quantised weight.

    int8: one scale a row, the largest absolute value over 127. nf4: bitsandbytes' 4-bit NormalFloat, one scale for each
    64 weights (QLoRA, arXiv:2305.14314), scales in float32.

    Attributes:
        kind: ``int8`` or ``nf4``.
        dense: a weight (out, in) that is used in place of the codes, such as W_q + Δ; None: there is none.
    """

    def __init__(self, layer: torch.nn.Linear, kind: Kind) -> None:
        torch.nn.Module.__init__(self)  # that of Linear would make a weight
        self.in_features, self.out_features, self.kind = layer.in_features, layer.out_features, kind
        self.bias = layer.bias
        self.dense: torch.Tensor | None = None
        self.state: Any = None  # bitsandbytes' scales
        weight = layer.weight.detach().float()
        if kind == "int8":
            scales = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127  # (out, 1)
            codes = (weight / scales).round().to(torch.int8)
            self.register_buffer("scales", scales)
        else:
            codes, self.state = _bitsandbytes().quantize_4bit(weight, blocksize=_NF4_BLOCK, quant_type="nf4")
        self.register_buffer("codes", codes)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]  # a parameter in Linear
        """The weight in float32 (out, in), computed at each access."""
        if self.dense is not None:
            return self.dense
        codes = self.get_buffer("codes")
        if self.kind == "int8":
            return codes * self.get_buffer("scales")
        weight: torch.Tensor = _bitsandbytes().dequantize_4bit(codes, self.state)
        return weight

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return x W_qᵀ + b."""
        product: torch.Tensor = _Product.apply(input, self)  # type: ignore[no-untyped-call]
        return product

    def extra_repr(self) -> str:
        """Return what the layer's text says of it."""
        return f"{super().extra_repr()}, {self.kind}"


class _Product(torch.autograd.Function):
    """x W_qᵀ + b, which computes W_q again for the gradient of x instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: QuantisedLinear) -> torch.Tensor:
        ctx.layer, ctx.dtype, ctx.dense = layer, x.dtype, layer.dense
        return linear(x, layer.weight, layer.bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        weight = ctx.layer.weight if ctx.dense is None else ctx.dense
        return (gradients[0] @ weight.to(gradients[0].dtype)).to(ctx.dtype), None


def quantise(model: torch.nn.Module, kind: Kind) -> None:
    """Quantise all linear layers of a model, in place; embeddings and norms stay as they are.

    Raises:
        ConfigError: nf4 without bitsandbytes.
    """
    if kind == "nf4":
        _bitsandbytes()
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is torch.nn.Linear:
                setattr(parent, name, QuantisedLinear(layer, kind))


def own_weight(layer: torch.nn.Linear) -> torch.Tensor | None:
    """Return what :func:`use_weight` needs to put a layer's present weight back."""
    return layer.dense if isinstance(layer, QuantisedLinear) else layer.weight.data


def use_weight(layer: torch.nn.Linear, weight: torch.Tensor | None) -> None:
    """Let a layer use a weight (out, in), in place; None: that of the codes of a quantised layer."""
    if isinstance(layer, QuantisedLinear):
        layer.dense = weight
    elif weight is not None:
        layer.weight.data = weight


def _bitsandbytes() -> Any:
    try:
        return importlib.import_module("bitsandbytes.functional")
    except ImportError as error:
        raise ConfigError(
            "backbone.quantisation = 'nf4': bitsandbytes is not installed. Install it with pip install "
            "'fedmerge[nf4]', or set backbone.quantisation = 'int8', which needs nothing more."
        ) from error
