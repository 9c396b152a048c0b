"""The direction of a model's attention: switched, and never trusted but tested."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from fedmerge.encoder.families import Conventions
from fedmerge.encoder.text import SpecialTokens, token_ids
from fedmerge.errors import BackboneError

_PROBED_TOKENS = 4
_ROUNDING = 1e-5  # of the state's length


def attend_both_ways(model: PreTrainedModel) -> bool:
    """Let all tokens of a text see each other, in place; return True if that is not the model's own way.

    transformers makes masks for both directions where the configuration says ``is_causal = False``, and its attention
    functions mask later tokens themselves where a module has ``is_causal`` and there is no mask.
    """
    modules = [module for module in model.modules() if getattr(module, "is_causal", False)]
    if not modules:
        return False
    model.config.is_causal = False
    for module in modules:
        module.is_causal = False  # type: ignore[assignment]  # nn.Module declares tensors and modules alone
    return True


def attends_globally(model: PreTrainedModel) -> bool:
    """Return whether a model attends within windows, so that its first token needs global attention to see a text."""
    return bool(model.config.model_type == "longformer")


@contextmanager
def causal(model: PreTrainedModel, *, switched: bool) -> Iterator[None]:
    """Within the block hide later tokens from earlier ones, also in a model that :func:`attend_both_ways` switched.

    Args:
        model: a decoder.
        switched: whether its attention is switched.
    """
    modules = [module for module in model.modules() if getattr(module, "is_causal", None) is False]
    parts: list[Any] = [model.config, *modules] if switched else []
    try:
        for part in parts:
            part.is_causal = True
        yield
    finally:
        for part in parts:
            part.is_causal = False


def dropping_layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """Return the layers whose attention has a dropout that can be set."""
    return [module for module in model.modules() if isinstance(getattr(module, "attention_dropout", None), int | float)]


def attention_drops(model: PreTrainedModel) -> bool:
    """Return whether a layer drops weights of its attention now."""
    layers: list[Any] = dropping_layers(model)
    return any(layer.training and layer.attention_dropout for layer in layers)


@contextmanager
def attention_dropout(model: PreTrainedModel, rate: float) -> Iterator[None]:
    """Within the block drop this share of the attention's weights; nothing else of the model is in training mode."""
    layers: list[Any] = dropping_layers(model)
    before = [(layer.attention_dropout, layer.training) for layer in layers]
    try:
        for layer in layers:
            layer.attention_dropout, layer.training = rate, True
        yield
    finally:
        for layer, (own, training) in zip(layers, before, strict=True):
            layer.attention_dropout, layer.training = own, training


@torch.no_grad()
def attends_both_ways(model: PreTrainedModel, special: SpecialTokens) -> bool:
    """Return whether the first token's state depends on the last token, with and without padding.

    Raises:
        BackboneError: it depends on the padding, so that the switch of this model type is not complete.
    """
    size = int(model.config.vocab_size)
    first = np.resize(np.concatenate([token_ids(special.before_item), np.arange(size - 1, size)]), _PROBED_TOKENS)
    rows = torch.tensor(np.stack([first, first]), dtype=torch.int64, device=model.device)
    rows[1, -1] = (rows[0, -1] + 1) % size
    mask = torch.ones_like(rows)
    states = model(input_ids=rows, attention_mask=mask).last_hidden_state[:, 0].float()
    padded = torch.nn.functional.pad(rows, (0, 1), value=special.pad)
    mask = torch.nn.functional.pad(mask, (0, 1))
    beside = model(input_ids=padded, attention_mask=mask).last_hidden_state[:, 0].float()
    found = [float((pair[0] - pair[1]).norm() / pair[0].norm()) > _ROUNDING for pair in (states, beside)]
    if found[0] != found[1]:
        raise BackboneError(
            f"{type(model).__name__}: the direction of its attention depends on the padding of a batch. Set "
            "backbone.attention = 'auto', or take another model."
        )
    return found[0]


def check_attention(model: PreTrainedModel, special: SpecialTokens, conventions: Conventions, name: str) -> None:
    """Test the direction that a family has, and that ``cls`` is a token that sees the text.

    Raises:
        BackboneError: another direction than stated, or ``cls`` of a causal model.
    """
    if conventions.attention is None and conventions.pooling != "cls":
        return
    both_ways = attends_both_ways(model, special)
    found = "both-ways" if both_ways else "causal"
    if conventions.attention not in (None, found):
        raise BackboneError(
            f"backbone {name}: {type(model).__name__} attends {found}, expected {conventions.attention}. Set "
            f"backbone.attention = {found!r}, or choose another backbone.family."
        )
    if conventions.pooling == "cls" and not both_ways:
        raise BackboneError(
            f"backbone {name}: backbone.pooling = 'cls' reads the first token, which sees nothing of the text under "
            "causal attention, so all texts would have one vector. Set backbone.pooling = 'last'."
        )
