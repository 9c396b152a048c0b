"""Sequences end to end: every token's vector and every gradient is that of padded batches, in all model types."""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_families
import torch
from adapters import layout_of, random_adapter
from backbones import tiny_bert
from tiny_families import TINY
from transformers import AttentionInterface

from fedmerge.config import BackboneSection
from fedmerge.device import Compute, resolve_compute
from fedmerge.encoder.attention import attention_dropout, causal
from fedmerge.encoder.backbone import Backbone, load_backbone, open_backbone
from fedmerge.encoder.encode import hidden_states
from fedmerge.encoder.fast.frozen import frozen_products
from fedmerge.encoder.fast.varlen import MODELS, VARLEN, keeps_sequences_apart, takes_varlen, varlen_attention
from fedmerge.encoder.lora import attach
from fedmerge.encoder.text import Tokens
from fedmerge.mergerec.vectors import initial_vectors, merged_forward
from fedmerge.merging.stack import stack_adapters

FLOAT32 = resolve_compute("cpu", "float32")
PADDED = {"mpnet", "recformer"}  # biases by relative position; windows with a global token
LENGTHS = [5, 40, 2, 17, 1, 40]


@pytest.fixture(scope="module", params=sorted(TINY.keys() - PADDED))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    name: str = request.param
    source = TINY[name].write(tmp_path_factory.mktemp(name))
    backbone = open_backbone(BackboneSection(source=str(source), family=TINY[name].family), FLOAT32)
    assert keeps_sequences_apart(backbone.model)
    return backbone


@pytest.fixture
def bert(tmp_path: Path) -> Backbone:
    return load_backbone(str(tiny_bert(tmp_path)), "mean", FLOAT32)


def random_sequences(backbone: Backbone) -> list[Tokens]:
    rng = np.random.default_rng(0)
    return [rng.integers(7, len(backbone.tokenizer), length).astype(np.int32) for length in LENGTHS]


def both(backbone: Backbone) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the vectors of all tokens (t, d), of a padded batch and end to end."""
    found = []
    for varlen in (False, True):
        hidden, mask = hidden_states(backbone, random_sequences(backbone), varlen=varlen)
        assert mask.sum(dim=1).tolist() == LENGTHS
        found.append(hidden[mask])
    return found[0], found[1]


def test_token_vectors_are_those_of_padded_batches(family: Backbone) -> None:
    own = family.model.config._attn_implementation
    with torch.no_grad():
        padded, found = both(family)
    torch.testing.assert_close(found, padded, atol=1e-5, rtol=1e-5)
    assert family.model.config._attn_implementation == own


def test_gradients_are_those_of_padded_batches(family: Backbone) -> None:
    model = attach(family, ["all-linear"], rank=2, alpha=4, seed=0)
    draw = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=draw)
    gradients = []
    for vectors in both(family):
        weights = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(1))
        (vectors * weights).sum().backward()  # type: ignore[no-untyped-call]  # of PyTorch
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
        model.zero_grad()
    model.unload()
    assert len(gradients[0]) == len(gradients[1]) > 2
    largest = max(float(gradient.abs().max()) for gradient in gradients[0])
    assert largest > 1e-2
    for expected, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5 * largest, rtol=1e-4)


@torch.no_grad()
def test_a_switched_direction_holds_end_to_end(tmp_path: Path) -> None:
    folder = tiny_families.llama(tmp_path)
    switched = open_backbone(BackboneSection(source=str(folder), family="llm2vec"), FLOAT32)
    own = open_backbone(BackboneSection(source=str(folder), family="decoder"), FLOAT32)
    as_switched, as_own = both(switched)[1], both(own)[1]
    assert (as_switched - as_own).abs().max() > 0.1
    with causal(switched.model, switched=True):
        torch.testing.assert_close(both(switched)[1], as_own)


@torch.no_grad()
def test_in_bfloat16_vectors_are_as_near_to_float32_as_those_of_padded_batches(family: Backbone) -> None:
    exact, _ = both(family)
    padded, found = both(replace(family, compute=resolve_compute("cpu", "bfloat16")))
    assert 0 < (found - exact).norm() < 1.2 * (padded - exact).norm()


@torch.no_grad()
def test_the_kernel_is_given_bfloat16_alone(family: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    given: set[torch.dtype] = set()

    def noted(module: Any, query: Any, key: Any, value: torch.Tensor, *rest: Any, **more: Any) -> Any:
        given.add(value.dtype)
        return varlen_attention(module, query, key, value, *rest, **more)

    monkeypatch.setitem(AttentionInterface._global_mapping, VARLEN, noted)
    half = replace(family, compute=resolve_compute("cpu", "bfloat16"))
    hidden_states(half, random_sequences(half), varlen=True)
    assert given == {torch.bfloat16}


@torch.no_grad()
def test_windows_of_a_switched_decoder(tmp_path: Path) -> None:
    section = BackboneSection(source=str(tiny_families.gemma(tmp_path)), family="llm2vec")
    switched = open_backbone(section, FLOAT32)
    assert max(LENGTHS) > switched.model.config.sliding_window
    padded, found = both(switched)
    torch.testing.assert_close(found, padded, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_threads_that_share_a_model_do_not_disturb_each_other(bert: Backbone) -> None:
    """Services encode on several threads; on a GPU each call exchanges the model's attention."""
    own, (alone, _) = bert.model.config._attn_implementation, hidden_states(bert, random_sequences(bert), varlen=True)

    def again(_: int) -> bool:
        return torch.equal(hidden_states(bert, random_sequences(bert), varlen=True)[0], alone)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # so that threads interrupt each other everywhere
    try:
        with ThreadPoolExecutor(4) as threads:
            assert all(threads.map(again, range(200)))
    finally:
        sys.setswitchinterval(interval)
    assert bert.model.config._attn_implementation == own


@torch.no_grad()
def test_a_merge_from_factors_is_the_same_end_to_end(bert: Backbone) -> None:
    layout = layout_of(bert, ("query", "dense"))
    vectors = initial_vectors(stack_adapters({name: random_adapter(layout, 2, 1.0, len(name)) for name in ("a", "bb")}))
    bare = both(bert)[1]
    with merged_forward(bert, vectors, torch.tensor([0.7, -0.2])):
        padded, found = both(bert)
    assert (found - bare).abs().max() > 1e-2
    torch.testing.assert_close(found, padded, atol=1e-5, rtol=1e-5)


def attended(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor, **more: Any
) -> torch.Tensor:
    """Let the tokens of sequences of at most seven attend."""
    found, weights = varlen_attention(
        torch.nn.Module(), query, key, value, None, cu_seq_lens_q=starts, max_length_q=7, **more
    )
    assert weights is None
    return found


@pytest.mark.parametrize("causal_window", [(True, None), (False, None), (True, 3), (False, 3)])
@pytest.mark.parametrize("groups", [4, 2])
def test_attention_is_softmax_within_each_sequence(causal_window: tuple[bool, int | None], groups: int) -> None:
    is_causal, window = causal_window
    draw = torch.Generator().manual_seed(0)
    lengths = [3, 7, 1]
    query, key, value = (torch.randn(1, heads, 11, 8, generator=draw) for heads in (4, groups, groups))
    starts = torch.tensor([0, 3, 10, 11], dtype=torch.int32)
    found = attended(query, key, value, starts, scaling=0.3, is_causal=is_causal, sliding_window=window)
    for head in range(4):
        for start, length in zip([0, 3, 10], lengths, strict=True):
            for i in range(length):
                seen = [
                    j
                    for j in range(length)
                    if (j <= i or not is_causal) and (window is None or abs(i - j) < window + (not is_causal))
                ]
                q = query[0, head, start + i].double()
                k, v = (each[0, head * groups // 4, [start + j for j in seen]].double() for each in (key, value))
                wanted = torch.softmax(0.3 * k @ q, dim=0) @ v
                torch.testing.assert_close(found[0, start + i, head].double(), wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 3])
def test_the_kernel_of_gpus_takes_what_it_is_given(window: int | None) -> None:
    """PyTorch checks the call and infers shapes on its device without data."""
    pytest.importorskip("torch.nn.attention.varlen")
    query, key, value = (torch.randn(1, heads, 11, 8, device="meta", requires_grad=True) for heads in (4, 2, 2))
    starts = torch.empty(4, dtype=torch.int32, device="meta")
    found = attended(query, key, value, starts, is_causal=True, sliding_window=window)
    assert found.shape == (1, 11, 4, 8)
    found.sum().backward()  # type: ignore[no-untyped-call]  # of PyTorch
    assert all(part.grad is not None and part.grad.shape == part.shape for part in (query, key, value))


def on_gpu(backbone: Backbone, precision: torch.dtype | None = torch.bfloat16) -> Backbone:
    return replace(backbone, compute=Compute(torch.device("cuda"), precision, "as if it were there"))


def test_only_gpus_from_ampere_on_take_them(bert: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    capability = (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert takes_varlen(on_gpu(bert))
    assert not takes_varlen(on_gpu(bert, None))
    assert not takes_varlen(bert)
    assert not takes_varlen(replace(bert, compute=resolve_compute("cpu", "bfloat16")))
    capability = (7, 5)
    assert not takes_varlen(on_gpu(bert))


@pytest.mark.parametrize("name", sorted(PADDED & TINY.keys()))
def test_other_attentions_stay_padded(name: str, tmp_path: Path) -> None:
    section = BackboneSection(source=str(TINY[name].write(tmp_path)), family=TINY[name].family)
    assert not keeps_sequences_apart(open_backbone(section, FLOAT32).model)


def test_dropout_of_attention_stays_padded(tmp_path: Path) -> None:
    backbone = open_backbone(BackboneSection(source=str(tiny_families.llama(tmp_path))), FLOAT32)
    with attention_dropout(backbone.model, 0.3):
        assert not keeps_sequences_apart(backbone.model)
    assert keeps_sequences_apart(backbone.model)


def test_heads_that_the_kernel_cannot_have_stay_padded(tmp_path: Path) -> None:
    backbone = open_backbone(BackboneSection(source=str(tiny_families.llama(tmp_path))), FLOAT32)
    model: Any = backbone.model
    for width, fits in ((8, True), (4, False), (256, True), (264, False)):
        model.config.head_dim = width
        assert keeps_sequences_apart(model) == fits


def test_a_mask_is_refused() -> None:
    part, starts = torch.zeros(1, 1, 2, 8), torch.tensor([0, 2], dtype=torch.int32)
    with pytest.raises(ValueError, match="there is no padding"):
        varlen_attention(torch.nn.Module(), part, part, part, torch.ones(2, 2), cu_seq_lens_q=starts, max_length_q=2)


def test_every_model_type_has_a_tiny_one(tmp_path: Path) -> None:
    written = [TINY[name].write(tmp_path / name) for name in TINY]
    types = {
        type(open_backbone(BackboneSection(source=str(folder), family=tiny.family), FLOAT32).model)
        for folder, tiny in zip(written, TINY.values(), strict=True)
    }
    assert {each.__name__ for each in MODELS} - {each.__name__ for each in types} == {"Qwen2Model"}  # Llama's layers


def test_frozen_layers_of_gpus_are_those_of_autocast(bert: Backbone) -> None:
    products = frozen_products(on_gpu(bert))
    layers = [module for module in bert.model.modules() if type(module) is torch.nn.Linear]
    assert set(products) == set(layers)
    for layer in layers:
        x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0), requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            expected = layer(x)
        found = products[layer](x)
        assert torch.equal(found, expected)
        gradients = [torch.autograd.grad(out.float().sin().sum(), x)[0] for out in (found, expected)]
        assert torch.equal(*gradients)
