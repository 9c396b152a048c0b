"""Encoding in bfloat16 on a CPU, without padding and with few, large operations; forward only.

Under autocast, transformers casts the frozen weights and the same input several times per layer, copies the bias into
the result, multiplies padding, passes over the widest tensor again for the activation, and runs an attention that is
slow for short sequences. Here weights are cast and packed once, query, key and value are one product, bias and
activation are part of the product, and sequences are concatenated.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn.functional import normalize

from fedmerge.encoder.backbone import Backbone
from fedmerge.encoder.fast.decoders import DECODERS, decoder_states
from fedmerge.encoder.fast.encoders import ENCODERS, encoder_states
from fedmerge.encoder.fast.products import packs_bfloat16
from fedmerge.encoder.text import Tokens


def fused_encoder(backbone: Backbone) -> Callable[[Sequence[Tokens]], torch.Tensor] | None:
    """Make a faster equivalent of :func:`fedmerge.encoder.encode.embed_batch`, or return None.

    As under autocast, products are summed in float32 and rounded once, and norms and the residual are float32.
    Activations and the softmax are computed before rounding. The weights are read here and must not change while it is
    in use.

    Returns:
        A function from token sequences, sorted by length, to float32 (n, d) with L2-normalised rows. None for other
        precisions, devices or model families, for the pooling ``mean-text``, where oneDNN has no bfloat16, for windows
        of attention, and for models with hooks, replaced methods or adapters other than plain LoRA.
    """
    model: Any = backbone.model  # PyTorch does not know the types of submodules
    compute, pooling = backbone.compute, backbone.pooling
    if compute.device.type != "cpu" or compute.autocast_dtype != torch.bfloat16 or not packs_bfloat16():
        return None
    if pooling == "mean-text" or not _is_plain(model):
        return None
    states = encoder_states(model) if type(model) in ENCODERS else decoder_states(model)
    if states is None:
        return None

    @torch.inference_mode()
    def embed(sequences: Sequence[Tokens]) -> torch.Tensor:
        lengths = np.array([len(sequence) for sequence in sequences])
        ids = torch.from_numpy(np.concatenate(sequences).astype(np.int64))
        positions = torch.from_numpy(np.concatenate([np.arange(length) for length in lengths]))
        starts = np.flatnonzero(np.diff(lengths, prepend=0))  # first sequence of each length
        runs = list(zip(np.diff(starts, append=len(lengths)).tolist(), lengths[starts].tolist(), strict=True))
        blocks = torch.split(states(ids, positions, runs), [number * length for number, length in runs])
        pooled = [
            _pool(block.view(number, length, -1), pooling) for block, (number, length) in zip(blocks, runs, strict=True)
        ]
        return normalize(torch.cat(pooled)[:, : backbone.width], dim=-1)

    return embed


def _is_plain(model: Any) -> bool:
    if type(model) not in (*ENCODERS, *DECODERS) or model.training:
        return False
    for module in model.modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return False
        if isinstance(module, BaseTunerLayer) and (type(module) is not LoraLinear or module.lora_variant):
            return False  # an adapter other than plain LoRA
    return True


def _pool(hidden: torch.Tensor, pooling: str) -> torch.Tensor:
    return hidden.mean(dim=1) if pooling == "mean" else hidden[:, 0 if pooling == "cls" else -1]
