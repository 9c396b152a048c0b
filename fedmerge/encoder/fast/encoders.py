"""BERT, RoBERTa, XLM-RoBERTa and MPNet: norms after the residual, all tokens see each other."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import layer_norm
from transformers import BertModel, MPNetModel, RobertaModel, XLMRobertaModel

from fedmerge.encoder.fast.attention import Runs, attend
from fedmerge.encoder.fast.products import Product, Weights, product, scaled, stacked, weights_of

ENCODERS = (BertModel, MPNetModel, RobertaModel, XLMRobertaModel)


@dataclass(frozen=True, eq=False)
class _Layer:
    """Four products from bfloat16 to bfloat16, and two norms in float32."""

    query_key_value: Product  # (t, d) -> (t, 3 d), queries scaled
    attention_output: Product  # (t, d) -> (t, d)
    intermediate: Product  # (t, d) -> (t, f), GELU included
    output: Product  # (t, f) -> (t, d)
    norms: tuple[torch.nn.LayerNorm, torch.nn.LayerNorm]


def encoder_states(model: Any) -> Callable[[torch.Tensor, torch.Tensor, Runs], torch.Tensor] | None:
    """Return a function from token ids (t,), positions (t,) and runs to hidden states, float32 (t, d); or None."""
    config = model.config
    if getattr(config, "is_decoder", False) or config.hidden_act != "gelu":
        return None
    layers = [_fast_layer(layer, config.hidden_size // config.num_attention_heads) for layer in model.encoder.layer]
    first = first_position(model)

    def states(ids: torch.Tensor, positions: torch.Tensor, runs: Runs) -> torch.Tensor:
        hidden: torch.Tensor = model.embeddings(input_ids=ids[None], position_ids=(positions + first)[None])[0]
        biases = _relative_positions(model, runs) if isinstance(model, MPNetModel) else None
        for layer in layers:
            heads = layer.query_key_value(hidden.bfloat16()).view(len(ids), 3, config.num_attention_heads, -1)
            attended = attend(heads[:, 0], heads[:, 1], heads[:, 2], runs, biases)
            hidden = _add_and_norm(hidden, layer.attention_output(attended), layer.norms[0])
            inner = layer.intermediate(hidden.bfloat16())
            hidden = _add_and_norm(hidden, layer.output(inner), layer.norms[1])
        return hidden

    return states


def first_position(model: Any) -> int:
    """Return the number of the first token's position: RoBERTa, XLM-RoBERTa and MPNet count from behind the padding."""
    behind_padding = isinstance(model, MPNetModel | RobertaModel | XLMRobertaModel)
    return int(model.embeddings.padding_idx) + 1 if behind_padding else 0


def _fast_layer(layer: Any, width: int) -> _Layer:
    if hasattr(layer.attention, "attn"):  # MPNet
        query, key, value, output = (weights_of(getattr(layer.attention.attn, name)) for name in "qkvo")
        norm = layer.attention.LayerNorm
    else:
        query, key, value = (weights_of(getattr(layer.attention.self, name)) for name in ("query", "key", "value"))
        output, norm = weights_of(layer.attention.output.dense), layer.attention.output.LayerNorm
    first: Weights = stacked([scaled(query, width**-0.5), key, value])
    return _Layer(
        product(first),
        product(output),
        product(weights_of(layer.intermediate.dense), "gelu"),
        product(weights_of(layer.output.dense)),
        (norm, layer.output.LayerNorm),
    )


def _relative_positions(model: Any, runs: Runs) -> list[torch.Tensor]:
    """Return MPNet's bias of each run, (h, n, n)."""
    return [model.encoder.compute_position_bias(torch.empty(1, length, 0))[0] for _, length in runs]


def _add_and_norm(residual: torch.Tensor, update: torch.Tensor, norm: torch.nn.LayerNorm) -> torch.Tensor:
    return layer_norm(residual.add_(update), norm.normalized_shape, norm.weight, norm.bias, norm.eps)
