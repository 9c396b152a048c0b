"""BERT-like encoders in bfloat16 on a CPU, without padding and with few, large operations; forward only.

Under autocast, transformers casts the frozen weights and the same input at least four times per layer, copies the bias
into the result, multiplies padding, passes over the widest tensor again for the GELU, and runs an attention that is
slow for short sequences. Here weights are cast and packed once, query, key and value are one product, bias and GELU are
part of the product, and sequences are concatenated.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn.functional import layer_norm, normalize
from transformers import BertModel, RobertaModel, XLMRobertaModel

from fedmerge.encoder.backbone import Backbone
from fedmerge.encoder.frozen import Product, packed, packs_bfloat16
from fedmerge.encoder.text import Tokens

ATTENTION_SCORES = 2**19  # scores of one block, which fit into the cache


@dataclass(frozen=True, eq=False)
class _Layer:
    """One encoder layer: four products from bfloat16 to bfloat16, and two norms in float32."""

    query_key_value: Product  # (t, d) -> (t, 3 d), queries scaled
    attention_output: Product  # (t, d) -> (t, d)
    intermediate: Product  # (t, d) -> (t, f), GELU included
    output: Product  # (t, f) -> (t, d)
    norms: tuple[torch.nn.LayerNorm, torch.nn.LayerNorm]


def fused_encoder(backbone: Backbone) -> Callable[[Sequence[Tokens]], torch.Tensor] | None:
    """Make a faster equivalent of :func:`fedmerge.encoder.encode.embed_batch`, or return None.

    As under autocast, products are summed in float32 and rounded once, and norms and the residual are float32. The GELU
    and the softmax are computed before rounding. The weights are read here and must not change while it is in use.

    Returns:
        A function from token sequences, sorted by length, to float32 (n, d) with L2-normalised rows. None for other
        precisions, devices or model families, for the pooling ``mean-text``, where oneDNN has no bfloat16, and for
        models with hooks, replaced methods or adapters other than plain LoRA.
    """
    model: Any = backbone.model  # PyTorch does not know the types of submodules
    compute = backbone.compute
    if compute.device.type != "cpu" or compute.autocast_dtype != torch.bfloat16 or not _is_plain(model):
        return None
    if backbone.pooling == "mean-text":
        return None
    layers = [_fused_layer(layer) for layer in model.encoder.layer]
    first_position = model.embeddings.padding_idx + 1 if isinstance(model, RobertaModel | XLMRobertaModel) else 0
    heads, pooling = model.config.num_attention_heads, backbone.pooling

    @torch.inference_mode()
    def embed(sequences: Sequence[Tokens]) -> torch.Tensor:
        lengths = np.array([len(sequence) for sequence in sequences])
        ids = torch.from_numpy(np.concatenate(sequences).astype(np.int64))
        positions = torch.from_numpy(np.concatenate([np.arange(length) for length in lengths]) + first_position)
        starts = np.flatnonzero(np.diff(lengths, prepend=0))  # first sequence of each length
        runs = list(zip(np.diff(starts, append=len(lengths)).tolist(), lengths[starts].tolist(), strict=True))
        hidden = model.embeddings(input_ids=ids[None], position_ids=positions[None])[0]  # float32 (t, d)
        for layer in layers:
            attended = _attention(layer.query_key_value(hidden.bfloat16()), runs, heads)
            hidden = _add_and_norm(hidden, layer.attention_output(attended), layer.norms[0])
            inner = layer.intermediate(hidden.bfloat16())
            hidden = _add_and_norm(hidden, layer.output(inner), layer.norms[1])
        blocks = hidden.split([number * length for number, length in runs])
        pooled = [
            _pool(block.view(number, length, -1), pooling) for block, (number, length) in zip(blocks, runs, strict=True)
        ]
        return normalize(torch.cat(pooled)[:, : backbone.width], dim=-1)

    return embed


def _is_plain(model: Any) -> bool:
    if type(model) not in (BertModel, RobertaModel, XLMRobertaModel) or model.training:
        return False
    if model.config.is_decoder or model.config.hidden_act != "gelu":
        return False
    if not packs_bfloat16():
        return False
    for module in model.modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return False
        if isinstance(module, BaseTunerLayer) and (type(module) is not LoraLinear or module.lora_variant):
            return False  # an adapter other than plain LoRA
    return True


def _fused_layer(layer: Any) -> _Layer:
    attention, output = layer.attention.self, layer.attention.output
    query, key, value = (_weight_and_bias(getattr(attention, name)) for name in ("query", "key", "value"))
    scaled = [query[i] * attention.scaling for i in (0, 1)]
    return _Layer(
        _product(torch.cat([scaled[0], key[0], value[0]]), torch.cat([scaled[1], key[1], value[1]])),
        _product(*_weight_and_bias(output.dense)),
        _product(*_weight_and_bias(layer.intermediate.dense), activation="gelu"),
        _product(*_weight_and_bias(layer.output.dense)),
        (output.LayerNorm, layer.output.LayerNorm),
    )


def _weight_and_bias(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weight and bias in float32, with the update of an attached LoRA."""
    weight = layer.weight.detach()
    if isinstance(layer, LoraLinear) and not (layer.merged or layer.disable_adapters):
        for name in layer.active_adapters:
            weight = weight + layer.get_delta_weight(name).detach()
    return weight, layer.bias.detach()


def _product(weight: torch.Tensor, bias: torch.Tensor, activation: str = "none") -> Product:
    weight, bias = packed(weight), bias.bfloat16()
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "none")


def _attention(query_key_value: torch.Tensor, runs: list[tuple[int, int]], heads: int) -> torch.Tensor:
    """Compute softmax(Q Kᵀ) V for every sequence and head, with scores in float32.

    Args:
        query_key_value: bfloat16 (t, 3 d), queries scaled.
        runs: number and length of consecutive sequences of equal length; t tokens together.
        heads: number of heads h.

    Returns:
        bfloat16 (t, d).
    """
    width = query_key_value.shape[1] // 3
    attended, start = query_key_value.new_empty(len(query_key_value), width), 0
    for number, length in runs:
        at_once = max(1, ATTENTION_SCORES // (heads * length * length))
        for size in [at_once] * (number // at_once) + [number % at_once] * (number % at_once > 0):
            end = start + size * length
            block = query_key_value[start:end].view(size, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
            query, key, value = block.contiguous().view(3, size * heads, length, -1)
            scores = torch.bmm(query.float(), key.float().transpose(1, 2))
            mixed = torch.bmm(scores.softmax(dim=-1).bfloat16(), value)  # (size · h, length, d / h)
            attended[start:end].view(size, length, heads, -1).copy_(mixed.view(size, heads, length, -1).transpose(1, 2))
            start = end
    return attended


def _add_and_norm(residual: torch.Tensor, update: torch.Tensor, norm: torch.nn.LayerNorm) -> torch.Tensor:
    return layer_norm(residual.add_(update), norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _pool(hidden: torch.Tensor, pooling: str) -> torch.Tensor:
    return hidden.mean(dim=1) if pooling == "mean" else hidden[:, 0 if pooling == "cls" else -1]
