"""Llama, Mistral, Qwen2 and Qwen3: norms before each part, rotated queries and keys, a gated block."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaModel, MistralModel, Qwen2Model, Qwen3Model

from fedmerge.encoder.fast.attention import Runs, attend
from fedmerge.encoder.fast.products import Product, Weights, product, scaled, stacked, weights_of

DECODERS = (LlamaModel, MistralModel, Qwen2Model, Qwen3Model)
_FIXED_ROTATIONS = ("default", "linear", "llama3", "yarn")  # the others depend on the longest text of a batch


@dataclass(frozen=True, eq=False)
class _Layer:
    """Five products from bfloat16 to bfloat16. The norm before a part scales the columns of the part's weights."""

    attention: Any  # the model's own, for its numbers of heads and norms of queries and keys
    query_key_value: Product  # (t, d) -> (t, (h + 2 g) w), queries scaled unless they have a norm
    attention_output: Product  # (t, h w) -> (t, d)
    gate: Product  # (t, d) -> (t, f), SiLU included
    up: Product  # (t, d) -> (t, f)
    down: Product  # (t, f) -> (t, d)
    epsilon: float


def decoder_states(model: Any) -> Callable[[torch.Tensor, torch.Tensor, Runs], torch.Tensor] | None:
    """Return a function from token ids (t,), positions (t,) and runs to hidden states, float32 (t, d); or None."""
    config = model.config
    windows = getattr(config, "layer_types", None) or ()
    mistral = type(model) is MistralModel and config.sliding_window is not None
    if config.hidden_act != "silu" or mistral or any(kind != "full_attention" for kind in windows):
        return None
    if config.rope_parameters["rope_type"] not in _FIXED_ROTATIONS:
        return None
    layers = [_fast_layer(layer) for layer in model.layers]
    causal = bool(model.layers[0].self_attn.is_causal)

    def states(ids: torch.Tensor, positions: torch.Tensor, runs: Runs) -> torch.Tensor:
        hidden = model.embed_tokens(ids).float()
        rotation = tuple(part[0, :, None].float() for part in model.rotary_emb(hidden[None], positions[None]))
        biases = [torch.full((1, n, n), -torch.inf).triu(1) for _, n in runs] if causal else None
        for layer in layers:
            hidden.add_(
                layer.attention_output(_attended(layer, _normed(hidden, layer.epsilon), rotation, runs, biases))
            )
            inner = _normed(hidden, layer.epsilon)
            hidden.add_(layer.down(layer.gate(inner).mul_(layer.up(inner))))
        normed: torch.Tensor = model.norm(hidden)
        return normed

    return states


def _fast_layer(layer: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    query, key, value, output = (weights_of(getattr(attention, f"{name}_proj")) for name in "qkvo")
    if not hasattr(attention, "q_norm"):
        query = scaled(query, attention.scaling)
    before, after = layer.input_layernorm, layer.post_attention_layernorm
    return _Layer(
        attention,
        product(_after_norm(stacked([query, key, value]), before)),
        product(output),
        product(_after_norm(weights_of(mlp.gate_proj), after), "swish"),
        product(_after_norm(weights_of(mlp.up_proj), after)),
        product(weights_of(mlp.down_proj)),
        before.variance_epsilon,
    )


def _after_norm(weights: Weights, norm: Any) -> Weights:
    return weights[0] * norm.weight.detach().float(), weights[1]


def _normed(hidden: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Divide each row (t, d) by the root of its mean square: bfloat16."""
    mean_square = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True).square_().div_(hidden.shape[-1])
    return torch.mul(
        hidden, mean_square.add_(epsilon).rsqrt_(), out=hidden.new_empty(hidden.shape, dtype=torch.bfloat16)
    )


def _attended(
    layer: _Layer,
    hidden: torch.Tensor,
    rotation: tuple[torch.Tensor, ...],
    runs: Runs,
    biases: list[torch.Tensor] | None,
) -> torch.Tensor:
    attention = layer.attention
    width, tokens = attention.head_dim, len(hidden)
    output = layer.query_key_value(hidden).view(tokens, -1, width)
    groups = (output.shape[1] - attention.config.num_attention_heads) // 2
    query, key, value = output[:, : -2 * groups], output[:, -2 * groups : -groups], output[:, -groups:]
    if hasattr(attention, "q_norm"):
        query, key = attention.q_norm(query.float()) * attention.scaling, attention.k_norm(key.float())
    return attend(_rotated(query, *rotation), _rotated(key, *rotation), value, runs, biases)


def _rotated(heads: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (i, i + w / 2) of every head: float32 (t, h, w), for angles (t, 1, w) given twice."""
    half = heads.shape[-1] // 2
    first, second = heads[..., :half].float(), heads[..., half:].float()
    cosine, sine, rotated = cosine[..., :half], sine[..., :half], heads.new_empty(heads.shape, dtype=torch.float32)
    torch.mul(first, cosine, out=rotated[..., :half]).addcmul_(second, sine, value=-1)
    torch.mul(second, cosine, out=rotated[..., half:]).addcmul_(first, sine)
    return rotated
