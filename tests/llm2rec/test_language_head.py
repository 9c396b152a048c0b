"""The head of every kind of decoder, and the loss under it, against transformers' own causal model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from tiny_families import END, GROUPED, SIZES, byte_level
from transformers import AutoModelForCausalLM

from fedmerge.config.model import BackboneSection
from fedmerge.device import resolve_compute
from fedmerge.encoder.attention import dropping_layers
from fedmerge.encoder.backbone import open_backbone
from fedmerge.llm2rec.head import language_head, token_losses

POSITIONS = [range(5, 9), range(3, 5), range(1, 14)]
SEQUENCES = [np.random.default_rng(length).integers(3, 200, length).astype(np.int32) for length in (9, 5, 14)]
SLIDING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 320}
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config, {**SIZES, "num_key_value_heads": 2}),
    "gemma2: softcap": (hf.Gemma2ForCausalLM, hf.Gemma2Config, {**SIZES, **GROUPED, "query_pre_attn_scalar": 8}),
    "gemma3: tied": (hf.Gemma3ForCausalLM, hf.Gemma3TextConfig, {**SIZES, **GROUPED, **SLIDING}),
    "phi: bias": (hf.PhiForCausalLM, hf.PhiConfig, SIZES),
    "gpt_neox: embed_out": (hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig, {**SIZES, "rotary_pct": 1.0}),
    "gpt2: no dropout to set": (hf.GPT2LMHeadModel, hf.GPT2Config, GPT2),
}


def written(name: str, folder: Path) -> Path:
    make, configure, sizes = KINDS[name]
    tokenizer = byte_level(["<s>", END], "<s> $A", bos_token="<s>", eos_token=END)
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = make(configure(vocab_size=len(tokenizer), **sizes, **special))
        for parameter in model.parameters():  # biases, too
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", KINDS)
def test_losses_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    folder = written(name, tmp_path)
    backbone = open_backbone(BackboneSection(source=str(folder)), resolve_compute("cpu", "float32"))
    head = language_head(backbone, "test")
    tokens = [sequence[of.start : of.stop].tolist() for sequence, of in zip(SEQUENCES, POSITIONS, strict=True)]
    found = token_losses(backbone, head, SEQUENCES, POSITIONS, tokens, hide_later=True)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    model.eval()
    for sequence, of, loss in zip(SEQUENCES, POSITIONS, found.tolist(), strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(sequence).long()[None]).logits[0].log_softmax(dim=-1)
        assert loss == pytest.approx(-sum(float(logits[i - 1, sequence[i]]) for i in of), rel=1e-4)
    assert bool(dropping_layers(backbone.model)) == ("no dropout" not in name)
