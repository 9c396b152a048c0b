"""Sequences end to end, without padding, through transformers' own layers and with gradients: for GPUs.

transformers lets a model's attention be exchanged. Here it keeps every sequence to itself: on a GPU it is PyTorch's
FlashAttention over variable lengths. The same code runs on a CPU, where attention goes sequence by sequence: that is
slow and serves tests.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers as hf

from fedmerge.device import AMPERE
from fedmerge.encoder.attention import attention_drops
from fedmerge.encoder.backbone import Backbone
from fedmerge.encoder.fast.encoders import first_position
from fedmerge.encoder.text import Tokens

VARLEN = "fedmerge-varlen"  # the name of this attention in transformers
MODELS = (
    hf.BertModel,
    hf.Gemma3TextModel,
    hf.LlamaModel,
    hf.MistralModel,
    hf.ModernBertModel,
    hf.Qwen2Model,
    hf.Qwen3Model,
    hf.RobertaModel,
    hf.XLMRobertaModel,
)
_PYTORCH = "2.13"  # the first whose kernel has windows and grouped keys
_WIDTHS = (8, 256)  # of a head: a multiple of the first, at most the second


def takes_varlen(backbone: Backbone) -> bool:
    """Return whether batches of a backbone are computed end to end: in bfloat16 on a GPU from Ampere on."""
    compute = backbone.compute
    if compute.device.type != "cuda" or compute.autocast_dtype != torch.bfloat16:
        return False
    if torch.torch_version.TorchVersion(torch.__version__) < _PYTORCH or not keeps_sequences_apart(backbone.model):
        return False
    return torch.cuda.get_device_capability(compute.device) >= AMPERE


def keeps_sequences_apart(model: Any) -> bool:
    """Return whether :func:`varlen_attention` is all of a model that lets tokens see each other, and can be computed.

    The kernel has no dropout.
    """
    if type(model) not in MODELS or attention_drops(model):
        return False
    heads = int(model.config.num_attention_heads)
    width = int(getattr(model.config, "head_dim", None) or model.config.hidden_size // heads)
    return width % _WIDTHS[0] == 0 and width <= _WIDTHS[1]


def varlen_inputs(backbone: Backbone, sequences: Sequence[Tokens]) -> dict[str, Any]:
    """Return the model's arguments for n sequences end to end, t tokens together: one row, with positions of each."""
    first = first_position(backbone.model)
    lengths = [len(sequence) for sequence in sequences]
    positions = np.concatenate([np.arange(first, first + length) for length in lengths])
    starts = on_device(np.cumsum([0, *lengths], dtype=np.int32), backbone.device)
    return {
        "input_ids": on_device(np.concatenate(sequences).astype(np.int64), backbone.device)[None],
        "position_ids": on_device(positions, backbone.device)[None],
        "cu_seq_lens_q": starts,
        "max_length_q": max(lengths),
        "use_cache": False,  # nothing is read again, and a cache holds the values in float32, which the kernel refuses
    }


def padded_again(hidden: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Lay token vectors (t, d) of n sequences out as (n, longest, d), with zeros behind each."""
    rows = np.repeat(np.arange(len(lengths)), lengths)
    columns = np.concatenate([np.arange(length) for length in lengths])
    padded = hidden.new_zeros(len(lengths), max(lengths), hidden.shape[-1])
    padded[on_device(rows, hidden.device), on_device(columns, hidden.device)] = hidden
    return padded


def on_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy an array to a device; a GPU takes it while it computes what was queued before."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def varlen_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Let tokens see those of their own sequence, in the form that transformers asks of an attention.

    Args:
        module: the layer's attention, which says whether it is causal.
        query: (1, h, t, w) for t tokens together.
        key: (1, g, t, w); each of the g heads serves h / g consecutive heads of ``query``.
        value: (1, g, t, w).
        attention_mask: None: there is no padding.
        cu_seq_lens_q: int32 (n + 1,), where each sequence begins, and t.
        max_length_q: length of the longest.
        scaling: of the scores; None: 1 / √w.
        is_causal: whether later tokens are hidden; None: as the module says.
        sliding_window: a token sees itself and fewer than this many on either side, in a decoder that was switched
            (``is_causal`` is False) as many; None: all.

    Returns:
        (1, t, h, w), and None for the weights.
    """
    if attention_mask is not None:
        raise ValueError("attention over variable lengths was given a mask, expected none: there is no padding")
    causal = bool(module.is_causal) if is_causal is None else is_causal
    switched = is_causal is False
    reach = -1 if sliding_window is None else sliding_window - (0 if switched else 1)  # as transformers' masks have it
    q, k, v = (part[0].transpose(0, 1).to(value.dtype) for part in (query, key, value))  # (t, h or g, w)
    window = (reach, 0 if causal else reach)
    if q.device.type == "cpu":
        return _by_sequence(q, k, v, cu_seq_lens_q, scaling, window)[None], None
    from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415 - PyTorch before 2.10 has none

    starts, longest = cu_seq_lens_q, max_length_q
    attended = varlen_attn(
        q, k, v, starts, starts, longest, longest, scale=scaling, window_size=window, enable_gqa=True
    )
    assert isinstance(attended, torch.Tensor)  # without the sums that are returned on request
    return attended[None], None


def _by_sequence(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    scale: float | None,
    window: tuple[int, int],
) -> torch.Tensor:
    """Compute what PyTorch's ``varlen_attn`` does: (t, h, w) from (t, h, w) and twice (t, g, w)."""
    parts, lengths = [], starts.diff().tolist()
    for part in zip(*(torch.split(each, lengths) for each in (query, key, value)), strict=True):
        q, k, v = (each.transpose(0, 1)[None] for each in part)  # (1, h or g, n, w)
        places = torch.arange(q.shape[2])
        behind = places[:, None] - places  # (n, n), how far a key is behind a query
        left, right = (length if length >= 0 else len(places) for length in window)
        seen = (behind <= left) & (behind >= -right)
        found = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=True)
        parts.append(found[0].transpose(0, 1))
    return torch.cat(parts)


hf.AttentionInterface.register(VARLEN, varlen_attention)
