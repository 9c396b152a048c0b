"""Positions of each model family: exact at the limit that is stated, refused above it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

from fedmerge.device import resolve_compute
from fedmerge.encoder.backbone import Backbone, check_max_tokens, usable_positions
from fedmerge.encoder.encode import encode
from fedmerge.encoder.text import SpecialTokens
from fedmerge.errors import BackboneError

POSITIONS = 34
SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 1,
}
Family = tuple[Any, Any, dict[str, Any]]  # model, configuration, its own settings
BEHIND_PADDING: dict[str, Family] = {
    "roberta": (hf.RobertaModel, hf.RobertaConfig, {}),
    "xlm-roberta": (hf.XLMRobertaModel, hf.XLMRobertaConfig, {}),
    "xlm-roberta-xl": (hf.XLMRobertaXLModel, hf.XLMRobertaXLConfig, {}),
    "camembert": (hf.CamembertModel, hf.CamembertConfig, {}),
    "mpnet": (hf.MPNetModel, hf.MPNetConfig, {}),
    "mpnet, padded with 0": (hf.MPNetModel, hf.MPNetConfig, {"pad_token_id": 0}),
    "roberta-prelayernorm": (hf.RobertaPreLayerNormModel, hf.RobertaPreLayerNormConfig, {}),
    "data2vec-text": (hf.Data2VecTextModel, hf.Data2VecTextConfig, {}),
    "esm": (hf.EsmModel, hf.EsmConfig, {"position_embedding_type": "absolute", "mask_token_id": 3}),
    "longformer": (hf.LongformerModel, hf.LongformerConfig, {"attention_window": 8}),
}
FROM_ZERO: dict[str, Family] = {
    "bert": (hf.BertModel, hf.BertConfig, {}),
    "electra": (hf.ElectraModel, hf.ElectraConfig, {"embedding_size": 16}),
    "distilbert": (hf.DistilBertModel, hf.DistilBertConfig, {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 24}),
    "gpt2": (hf.GPT2Model, hf.GPT2Config, {"n_positions": POSITIONS, "n_embd": 16, "n_layer": 1, "n_head": 2}),
}
ROTARY: dict[str, Family] = {
    "modernbert": (hf.ModernBertModel, hf.ModernBertConfig, {"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2}),
    "esm with rotary positions": (hf.EsmModel, hf.EsmConfig, {"position_embedding_type": "rotary", "mask_token_id": 3}),
    "llama": (hf.LlamaModel, hf.LlamaConfig, {}),
}
LIMITS = dict.fromkeys(BEHIND_PADDING, POSITIONS - 2) | dict.fromkeys([*FROM_ZERO, *ROTARY], POSITIONS)


def tiny(family: str) -> Backbone:
    model, config, own = (BEHIND_PADDING | FROM_ZERO | ROTARY)[family]
    names = {key: value for key, value in SIZES.items() if not (own.get("n_positions") or "dim" in own)}
    common = {"vocab_size": SIZES["vocab_size"], "max_position_embeddings": POSITIONS, "pad_token_id": 1}
    torch.manual_seed(0)
    made = model(config(**{**common, **names, **own})).eval()
    special = SpecialTokens(np.array([2], np.int32), np.array([], np.int32), 1)
    return Backbone(made, None, special, "mean", family, "", resolve_compute("cpu", "float32"))  # type: ignore[arg-type]


@pytest.mark.parametrize("family", LIMITS)
def test_the_stated_limit_is_exact_and_one_more_is_refused(family: str) -> None:
    backbone, limit = tiny(family), LIMITS[family]
    assert usable_positions(backbone.model) == limit
    check_max_tokens(backbone, limit)
    with pytest.raises(BackboneError, match=rf"= {limit + 1}, but {family} has {limit} positions.* {limit} or less"):
        check_max_tokens(backbone, limit + 1)

    longest, short = np.arange(limit, dtype=np.int32) % 30 + 5, np.arange(4, dtype=np.int32) + 9
    vectors = encode(backbone, [short, longest])
    for vector, tokens in zip(vectors, (short, longest), strict=True):
        rows = torch.from_numpy(tokens)[None].long()
        first = torch.zeros_like(rows).index_fill_(1, torch.tensor([0]), 1)
        more = {"global_attention_mask": first} if family == "longformer" else {}
        with torch.no_grad():
            hidden = backbone.model(input_ids=rows, **more).last_hidden_state[0]
        alone = torch.nn.functional.normalize(hidden.mean(dim=0), dim=0)
        torch.testing.assert_close(vector, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", [*BEHIND_PADDING, *FROM_ZERO])
def test_the_model_itself_has_no_more_positions(family: str) -> None:
    backbone, call = tiny(family), lambda tokens: encode(backbone, [np.full(tokens, 7, np.int32)])
    assert fails(call, LIMITS[family] + 1)
    assert not fails(call, LIMITS[family])


def fails(call: Callable[[int], object], tokens: int) -> bool:
    """Return True if the model's table has no row for the last token."""
    try:
        call(tokens)
    except (IndexError, RuntimeError):
        return True
    return False


def test_relative_positions_have_no_limit() -> None:
    config = hf.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    assert usable_positions(hf.T5EncoderModel(config)) is None
