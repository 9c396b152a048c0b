"""Encoding in bfloat16 on a CPU: as near to float32 as autocast, whatever the model, which is left as it was."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_families
import torch
from adapters import layout_of, random_adapter
from backbones import tiny_bert, tiny_roberta
from peft import LoraConfig, get_peft_model
from transformers import LlamaModel, Qwen2Model

from fedmerge.backbone_files import MINILM, MINILM_PACKAGE
from fedmerge.device import resolve_compute
from fedmerge.encoder.attention import attend_both_ways
from fedmerge.encoder.backbone import Backbone, load_backbone
from fedmerge.encoder.encode import embed_batch, encode
from fedmerge.encoder.fast.fused import fused_encoder
from fedmerge.encoder.fast.products import packs_bfloat16
from fedmerge.encoder.lora import applied, attach
from fedmerge.encoder.text import Tokens

HALF = resolve_compute("cpu", "bfloat16")
needs_bfloat16 = pytest.mark.skipif(
    not packs_bfloat16(),
    reason="oneDNN has no bfloat16 here",
)


def decoder(folder: Path, model_class: Any = LlamaModel) -> Backbone:
    """A two-layer causal model with grouped keys, the last token's vector, and a gated block without bias."""
    roberta = load_backbone(str(tiny_roberta(folder)), "last", HALF)
    config = model_class.config_class(
        vocab_size=len(roberta.tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
        pad_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config).train(False).requires_grad_(False)
    for name, parameter in model.named_parameters():
        draw = torch.Generator().manual_seed(parameter.numel())
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2, generator=draw)
        else:  # norms and biases that count
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, std=0.3, generator=draw)
    return replace(roberta, model=model)


def both_ways(folder: Path) -> Backbone:
    """A decoder whose tokens see each other, read at their mean."""
    backbone = replace(decoder(folder), pooling="mean")
    assert attend_both_ways(backbone.model)
    return backbone


FAMILIES: dict[str, Callable[[Path], Backbone]] = {
    "bert": lambda folder: load_backbone(str(tiny_bert(folder)), "mean", HALF),
    "roberta": lambda folder: load_backbone(str(tiny_roberta(folder)), "cls", HALF),
    "mpnet": lambda folder: load_backbone(str(tiny_families.mpnet(folder)), "mean", HALF),
    "llama": decoder,
    "both ways": both_ways,
    "qwen2": lambda folder: decoder(folder, Qwen2Model),
    "qwen3": lambda folder: load_backbone(str(tiny_families.qwen3(folder)), "last", HALF),
    "mistral": lambda folder: load_backbone(str(tiny_families.mistral(folder)), "last", HALF),
    "gemma": lambda folder: load_backbone(str(tiny_families.gemma(folder)), "last", HALF),
    "modernbert": lambda folder: load_backbone(str(tiny_families.modernbert(folder)), "mean", HALF),
}
ORDINARY = {"gemma", "modernbert"}


@pytest.fixture(params=list(FAMILIES))
def backbone(request: pytest.FixtureRequest, tmp_path: Path) -> Backbone:
    return FAMILIES[request.param](tmp_path)


@pytest.fixture
def bert(tmp_path: Path) -> Backbone:
    return FAMILIES["bert"](tmp_path)


def random_sequences(backbone: Backbone, number: int, longest: int) -> list[Tokens]:
    rng = np.random.default_rng(0)
    size = len(backbone.tokenizer)
    return [rng.integers(7, size, length).astype(np.int32) for length in rng.integers(2, longest, number)]


@torch.no_grad()
def under_autocast(backbone: Backbone, sequences: list[Tokens]) -> torch.Tensor:
    """Return the vectors of the unmodified model, one sequence at a time."""
    return torch.cat([embed_batch(backbone, [tokens]) for tokens in sequences])


def distances(found: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    return 1 - (found.double() * exact.double()).sum(dim=1)


def in_float32(backbone: Backbone) -> Backbone:
    return replace(backbone, compute=resolve_compute("cpu", "float32"))


def test_vectors_are_as_near_to_float32_as_under_autocast(backbone: Backbone) -> None:
    sequences = random_sequences(backbone, 60, 40)
    exact = encode(in_float32(backbone), sequences)
    found, plain = encode(backbone, sequences), under_autocast(backbone, sequences)
    assert distances(found, exact).max() > 1e-7
    assert distances(found, exact).mean() < 1.1 * distances(plain, exact).mean()
    assert distances(found, exact).max() < 1e-3


def test_minilm_is_nearer_to_float32_than_under_autocast() -> None:
    pytest.importorskip(MINILM_PACKAGE)
    backbone = load_backbone(MINILM, "mean", HALF)
    sequences = random_sequences(backbone, 16, 40)
    exact = encode(in_float32(backbone), sequences)
    found, plain = encode(backbone, sequences), under_autocast(backbone, sequences)
    assert distances(found, exact).mean() < 1.02 * distances(plain, exact).mean()
    assert distances(found, exact).max() < 2e-4


def test_a_vector_does_not_depend_on_its_companions_and_comes_again(backbone: Backbone) -> None:
    sequences = random_sequences(backbone, 60, 40)
    together = encode(backbone, sequences)
    alone = torch.cat([encode(backbone, [tokens]) for tokens in sequences])
    torch.testing.assert_close(together, alone, atol=0.01, rtol=0)
    assert torch.equal(together, encode(backbone, sequences))


def test_the_model_is_left_as_it_was(backbone: Backbone) -> None:
    before = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    encode(backbone, random_sequences(backbone, 5, 20))
    after = backbone.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert not any("forward" in vars(module) for module in backbone.model.modules())


@needs_bfloat16
@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
def test_every_pooling_and_more_scores_than_one_block_holds(bert: Backbone, pooling: str) -> None:
    bert = replace(bert, pooling=pooling)
    rng, size = np.random.default_rng(0), len(bert.tokenizer)
    sequences = [rng.integers(7, size, length).astype(np.int32) for length in [100] * 40 + [99, 7, 7, 1]]
    fused = fused_encoder(bert)
    assert fused is not None
    assert distances(fused(sequences), under_autocast(bert, sequences)).max() < 1e-3
    assert distances(encode(bert, sequences[::-1]), fused(sequences[::-1])).max() < 1e-5


@pytest.mark.parametrize("kind", ["attached", "applied"])
def test_adapters_count(bert: Backbone, kind: str) -> None:
    sequences = random_sequences(bert, 20, 30)
    bare = encode(bert, sequences)
    if kind == "applied":
        with applied(bert, random_adapter(layout_of(bert, ("query", "dense")), 4, 1.0, seed=0)):
            found, plain = encode(bert, sequences), under_autocast(bert, sequences)
    else:
        model = attach(bert, ["all-linear"], rank=4, alpha=8, seed=0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(len(name)))
        found, plain = encode(bert, sequences), under_autocast(bert, sequences)
        with model.disable_adapter():
            assert distances(encode(bert, sequences), bare).max() < 1e-6
        model.unload()
    assert distances(found, bare).min() > 1e-3
    assert distances(found, plain).max() < 1e-3


def test_hooks_are_called_and_their_outputs_count(bert: Backbone) -> None:
    sequences = random_sequences(bert, 20, 30)
    bare = encode(bert, sequences)
    calls = []

    def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        calls.append(module)
        return output * 1.5

    layer = bert.model.get_submodule("encoder.layer.0.intermediate.dense")
    handle = layer.register_forward_hook(hook)
    try:
        found = encode(bert, sequences)
        assert len(calls) == 1
        assert distances(found, bare).min() > 1e-4
        assert distances(found, under_autocast(bert, sequences)).max() < 1e-3
    finally:
        handle.remove()


def replaced(backbone: Backbone) -> Backbone:
    layer = backbone.model.get_submodule("encoder.layer.1.output")
    layer.forward = layer.forward
    return backbone


def hooked(backbone: Backbone) -> Backbone:
    backbone.model.get_submodule("encoder.layer.1.output").register_forward_pre_hook(lambda module, inputs: None)
    return backbone


def with_dora(backbone: Backbone) -> Backbone:
    get_peft_model(backbone.model, LoraConfig(r=2, target_modules=["query"], use_dora=True))
    return backbone


def with_another_activation(backbone: Backbone) -> Backbone:
    backbone.model.config.hidden_act = "relu"
    return backbone


def in_training(backbone: Backbone) -> Backbone:
    backbone.model.train()
    return backbone


@pytest.mark.parametrize("change", [in_float32, replaced, hooked, with_dora, with_another_activation, in_training])
def test_what_is_not_plain_takes_the_ordinary_path(bert: Backbone, change: Callable[[Backbone], Backbone]) -> None:
    assert fused_encoder(change(bert)) is None


@needs_bfloat16
def test_which_families_are_fused(tmp_path: Path) -> None:
    fused = {name for name, build in FAMILIES.items() if fused_encoder(build(tmp_path / name)) is not None}
    assert fused == FAMILIES.keys() - ORDINARY


def with_windows(backbone: Backbone) -> Backbone:
    backbone.model.config.layer_types = ["full_attention", "sliding_attention"]
    return backbone


def with_rotations_of_the_longest_text(backbone: Backbone) -> Backbone:
    backbone.model.config.rope_parameters["rope_type"] = "dynamic"
    return backbone


@pytest.mark.parametrize("change", [with_windows, with_rotations_of_the_longest_text])
def test_decoders_that_differ_take_the_ordinary_path(tmp_path: Path, change: Callable[[Backbone], Backbone]) -> None:
    assert fused_encoder(change(decoder(tmp_path, Qwen2Model))) is None


@needs_bfloat16
@pytest.mark.parametrize("family", ["mpnet", "llama", "qwen2", "qwen3", "mistral"])
def test_lora_on_every_linear_layer_counts(tmp_path: Path, family: str) -> None:
    backbone = FAMILIES[family](tmp_path)
    sequences = random_sequences(backbone, 20, 30)
    bare = encode(backbone, sequences)
    model = attach(backbone, ["all-linear"], rank=4, alpha=8, seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    assert fused_encoder(backbone) is not None
    exact = encode(in_float32(backbone), sequences)
    found, plain = encode(backbone, sequences), under_autocast(backbone, sequences)
    assert distances(found, bare).min() > 1e-3
    assert distances(found, exact).mean() < 1.1 * distances(plain, exact).mean()


def test_gradients_never_meet_the_fused_path(bert: Backbone) -> None:
    model = attach(bert, ["query"], rank=2, alpha=4, seed=0)
    embed_batch(bert, random_sequences(bert, 3, 9)).sum().backward()  # type: ignore[no-untyped-call]
    assert any(parameter.grad is not None for parameter in model.parameters())
