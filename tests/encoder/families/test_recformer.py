"""RecFormer and plain Longformers: text as keys and values, windows, the global first token, and checkpoints."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_families import longformer, recformer

from fedmerge.backbone_files import missing_target_modules
from fedmerge.config import ATTRIBUTES, BackboneSection, Lora, Text
from fedmerge.device import resolve_compute
from fedmerge.domain.catalog import Catalog, make_catalog
from fedmerge.encoder.backbone import Backbone, check_max_tokens, open_backbone
from fedmerge.encoder.encode import embed_batch, encode
from fedmerge.encoder.export.folder import export_model
from fedmerge.encoder.lora import attach, factors_of, fresh_adapter
from fedmerge.encoder.text import Tokens, TokenTable, build_token_table, item_sequences, pack_sequences
from fedmerge.errors import BackboneError

FLOAT32 = resolve_compute("cpu", "float32")
WINDOW = 64
LENGTHS = (63, 64, 65, 127, 128, 129, 200)
ITEMS = [
    {"title": "Red tent, small", "brand": "kids", "category": "steel > organic"},
    {"title": "coffee grinder with a very long title that goes on", "brand": "", "category": "kids"},
    {"title": "blue car (large)", "brand": "", "category": ""},
]


def opened(folder: Path, **settings: Any) -> Backbone:
    return open_backbone(BackboneSection(source=str(folder), **settings), FLOAT32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recformer(tmp_path_factory.mktemp("recformer"))


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Backbone:
    return opened(folder)


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    columns = {name: [item[name] for item in ITEMS] for name in ATTRIBUTES}
    return make_catalog("shop", [f"i{i}" for i in range(len(ITEMS))], columns)


def table_of(backbone: Backbone, catalog: Catalog, limit: int = 32) -> TokenTable:
    return build_token_table(catalog, backbone.tokenizer, limit, backbone.special.attributes)


def drawn(length: int, seed: int = 0) -> Tokens:
    """Draw tokens of a text: any ids, types that alternate, items of five tokens."""
    rng = np.random.default_rng(seed)
    ids = [0, *rng.integers(4, 250, length - 1)]
    types = [0, *rng.integers(1, 3, length - 1)]
    return np.array([ids, types, [0, *(1 + np.arange(length - 1) // 5)]], dtype=np.int32).T


# A dense attention written from the definition, on the tensors of the file


def dense(tensors: Mapping[str, torch.Tensor], tokens: Tokens, window: int, first_is_global: bool = True) -> Any:
    """Return the first hidden state (d,) of one text by full attention under a mask.

    A token sees those at most half a window away and, as they all do, the first one, which has keys and values of its
    own kind for what it sees itself.
    """

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(dim=-1, keepdim=True)
        scale = (centred.square().mean(dim=-1, keepdim=True) + 1e-12).sqrt()
        return centred / scale * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.view(len(x), 4, 8).transpose(0, 1)  # (4, tokens, 8)

    columns = torch.from_numpy(tokens.reshape(len(tokens), -1)).long()
    ids, size = columns[:, 0], len(tokens)
    x = tensors["embeddings.word_embeddings.weight"][ids]
    x = x + tensors["embeddings.position_embeddings.weight"][torch.arange(size) + 2]  # from behind the padding, 1
    types = columns[:, 1] if columns.shape[1] > 1 else torch.zeros(size, dtype=torch.long)
    x = x + tensors["embeddings.token_type_embeddings.weight"][types]
    if columns.shape[1] > 1:
        x = x + tensors["embeddings.item_position_embeddings.weight"][columns[:, 2]]
    x = norm("embeddings.LayerNorm", x)
    places = torch.arange(size)
    seen = (places[:, None] - places[None, :]).abs() <= window // 2
    if first_is_global:
        seen[:, 0] = True
    for layer in ("encoder.layer.0", "encoder.layer.1"):
        own = f"{layer}.attention.self"
        query, key, value = (heads(linear(f"{own}.{name}", x)) for name in ("query", "key", "value"))
        scores = (query @ key.transpose(1, 2) / 8**0.5).masked_fill(~seen, -torch.inf)
        mixed = (scores.softmax(dim=-1) @ value).transpose(0, 1).reshape(size, 32)
        if first_is_global:
            query = heads(linear(f"{own}.query_global", x[:1]))
            key, value = (heads(linear(f"{own}.{name}_global", x)) for name in ("key", "value"))
            scores = query @ key.transpose(1, 2) / 8**0.5
            mixed[0] = (scores.softmax(dim=-1) @ value).transpose(0, 1).reshape(32)
        x = norm(f"{layer}.attention.output.LayerNorm", x + linear(f"{layer}.attention.output.dense", mixed))
        inner = torch.nn.functional.gelu(linear(f"{layer}.intermediate.dense", x))
        x = norm(f"{layer}.output.LayerNorm", x + linear(f"{layer}.output.dense", inner))
    return x


def test_windows_and_the_global_token_are_a_dense_attention_under_a_mask(folder: Path, backbone: Backbone) -> None:
    tensors = load_file(folder / "model.safetensors")
    sequences = [drawn(length, length) for length in LENGTHS]
    wanted = torch.stack([dense(tensors, tokens, WINDOW)[0] for tokens in sequences])
    wanted = torch.nn.functional.normalize(wanted, dim=-1)
    torch.testing.assert_close(encode(backbone, sequences), wanted, atol=1e-5, rtol=0)
    with torch.no_grad():
        together = embed_batch(backbone, sequences)  # all padded to the longest
    torch.testing.assert_close(together, wanted, atol=1e-5, rtol=0)
    locally = torch.stack([dense(tensors, tokens, WINDOW, False)[0] for tokens in sequences])
    assert (torch.nn.functional.normalize(locally, dim=-1) - wanted).norm(dim=-1).min() > 0.01


def test_a_plain_longformer_attends_globally_from_its_first_token(tmp_path: Path) -> None:
    folder = longformer(tmp_path / "longformer")
    tensors = load_file(folder / "model.safetensors")
    plain, first = opened(folder), opened(folder, pooling="cls")
    assert plain.special.attributes is None
    for length in LENGTHS:
        tokens = drawn(length)[:, 0]
        states = dense(tensors, tokens, WINDOW)
        for backbone, wanted in ((plain, states.mean(dim=0)), (first, states[0])):
            found = encode(backbone, [tokens, tokens[:5]])[0]
            torch.testing.assert_close(found, torch.nn.functional.normalize(wanted, dim=0), atol=1e-5, rtol=0)


def test_the_global_mask_types_item_positions_and_order_change_a_vector(backbone: Backbone, catalog: Catalog) -> None:
    table = table_of(backbone, catalog)
    one, swapped = pack_sequences(table, [[0, 1, 2], [1, 0, 2]], backbone.special, 50, 300)
    other_types, other_items = one.copy(), one.copy()
    other_types[1:, 1] = 3 - one[1:, 1]
    other_items[1:, 2] += 1
    vectors = encode(backbone, [one, swapped, other_types, other_items])
    assert (vectors[1:] - vectors[0]).norm(dim=-1).min() > 0.01
    rows = torch.from_numpy(one).long()[None]
    inputs = dict(zip(("input_ids", "token_type_ids", "item_position_ids"), rows.unbind(dim=2), strict=True))
    with torch.no_grad():
        locally = backbone.model(**inputs, attention_mask=torch.ones_like(rows[:, :, 0])).last_hidden_state[:, 0]
    assert (torch.nn.functional.normalize(locally, dim=-1) - vectors[0]).norm() > 0.01


def test_a_text_alone_is_as_in_a_padded_batch(backbone: Backbone, catalog: Catalog) -> None:
    table = table_of(backbone, catalog)
    sequences = item_sequences(table, backbone.special, 300)
    sequences += pack_sequences(table, [[0], [1, 2], [2, 0, 1, 1, 0]], backbone.special, 50, 300)
    together = encode(backbone, sequences)
    alone = torch.cat([encode(backbone, [sequence]) for sequence in sequences])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(together[0], together[3])  # an item is a history of its own


def test_bfloat16_is_near_float32_with_gradients(folder: Path, backbone: Backbone) -> None:
    half = open_backbone(BackboneSection(source=str(folder)), resolve_compute("cpu", "bfloat16"))
    sequences = [drawn(length) for length in (5, 70, 200)]
    assert (encode(half, sequences) * encode(backbone, sequences)).sum(dim=1).min() > 0.999
    model = attach(half, ("attention", "query_global"), 2, 4, 0)
    (embed_batch(half, sequences) @ torch.randn(32)).sum().backward()  # type: ignore[no-untyped-call]  # of PyTorch
    gradients = {name: factors[1].grad for name, factors in factors_of(model).items()}
    model.unload()
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    assert gradients["encoder.layer.1.attention.self.query_global"].any()  # type: ignore[union-attr]


# Text


def test_tokens_are_the_authors_keys_and_values_at_item_positions(backbone: Backbone, catalog: Catalog) -> None:
    tokenizer: Any = backbone.tokenizer
    ids: list[int] = [0]
    types, positions = [0], [0]
    for position, item in enumerate([ITEMS[1], ITEMS[0]], 1):  # the newest first
        for name in ("title", "brand"):  # two attributes, as its files say
            if item[name]:
                parts = [tokenizer.encode(text, add_special_tokens=False) for text in (name, item[name])]
                ids += (parts[0] + parts[1])[:32]
                types += ([1] * len(parts[0]) + [2] * len(parts[1]))[:32]
        positions += [position] * (len(ids) - len(positions))
    assert 32 < ids.__len__() < 100
    table = table_of(backbone, catalog)
    (found,) = pack_sequences(table, [[0, 1]], backbone.special, 50, 300)
    assert found.T.tolist() == [ids, types, positions]
    (cut,) = pack_sequences(table, [[2, 0, 1]], backbone.special, 2, 40)
    assert cut.T.tolist() == [ids[:40], types[:40], positions[:40]]
    assert table_of(backbone, catalog, 3).item(0)[:, 1].tolist() == [1, 1, 1] * 2  # the key alone fills the limit


def test_limits_are_those_of_its_tables(folder: Path, backbone: Backbone, catalog: Catalog) -> None:
    check_max_tokens(backbone, 300, 50)
    with pytest.raises(BackboneError, match=r"max_items = 51, but .* has positions of 50 items. Set text.max_items"):
        check_max_tokens(backbone, 300, 51)
    with pytest.raises(BackboneError, match=r"max_tokens = 301, but .* has 300 positions"):
        check_max_tokens(backbone, 301, 50)
    (longest,) = pack_sequences(table_of(backbone, catalog), [[2] * 60], backbone.special, 50, 300)
    assert (len(longest), longest[-1, 2]) == (300, 15)  # 21 tokens each
    (many,) = pack_sequences(table_of(backbone, catalog, 2), [[2] * 60], backbone.special, 50, 300)
    assert many[-1, 2] == 50
    assert encode(backbone, [many]).isfinite().all()
    with pytest.raises(BackboneError, match=r"gives it a prompt or an end token. Leave history_prompt"):
        opened(folder, history_prompt="Query:")


# Files


@pytest.mark.parametrize(("prefix", "stated"), [("", True), ("longformer.", True), ("", False), ("longformer.", False)])
def test_a_checkpoint_in_the_authors_naming_is_found_loaded_and_written_again(
    prefix: str, stated: bool, backbone: Backbone, catalog: Catalog, tmp_path: Path
) -> None:
    folder = recformer(tmp_path / "checkpoint", prefix, stated)
    found = opened(folder)
    assert (found.pooling, found.special.attributes) == ("cls", 2 if stated else 3)
    assert found.conventions.max_positions == (300 if stated else 1024)
    assert found.model.config.attention_window == [WINDOW, WINDOW]
    sequences = [drawn(length) for length in (5, 70, 150)]
    torch.testing.assert_close(encode(found, sequences), encode(backbone, sequences), atol=0, rtol=0)
    found.model.save_pretrained(tmp_path / "again")
    found.tokenizer.save_pretrained(tmp_path / "again")
    again = opened(tmp_path / "again")
    ours = {name.removeprefix(prefix): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    written = load_file(tmp_path / "again" / "model.safetensors")
    assert {*ours} - {*written} == {"embeddings.position_ids", *(["item_embedding.weight"] if prefix else [])}
    assert all(torch.equal(tensor, ours[name]) for name, tensor in written.items())
    torch.testing.assert_close(encode(again, sequences), encode(backbone, sequences), atol=0, rtol=0)


def test_a_family_that_is_not_that_of_the_files_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"are those of a RecFormer. Set backbone.family = 'recformer', or 'auto'"):
        opened(folder, family="encoder")
    plain = longformer(tmp_path / "longformer")
    with pytest.raises(BackboneError, match=r"are those of no RecFormer. Set backbone.family = 'encoder', or 'auto'"):
        opened(plain, family="recformer")
    lacking = recformer(tmp_path / "lacking")
    longformer(tmp_path / "other", type_vocab_size=4)
    (lacking / "model.safetensors").write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    with pytest.raises(BackboneError, match=r"weights lack embeddings.item_position_embeddings.weight"):
        opened(lacking)


def test_conventions_are_part_of_the_hash(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["max_attr_num"] == 2
    assert opened(folder).sha256 != opened(folder, family="recformer").sha256  # two attributes, three attributes
    assert opened(folder).sha256 != opened(folder, pooling="mean").sha256


def test_what_an_export_cannot_say_of_windows_and_types_is_refused(backbone: Backbone, tmp_path: Path) -> None:
    plain = opened(longformer(tmp_path / "longformer"))
    for model, reason in ((backbone, "keys and values by their types"), (plain, "first token has global attention")):
        with pytest.raises(BackboneError, match=rf"{reason}.*Serve it with fedmerge.recommend instead"):
            export_model(model, None, tmp_path / "out", Text(max_tokens=100), {})


# Adapters


def test_the_global_projections_are_adapted_only_where_they_are_named(folder: Path, backbone: Backbone) -> None:
    def ends(*targets: str) -> set[str]:
        modules = fresh_adapter(backbone, Lora(rank=2, target_modules=targets), 0).modules
        return {name.split(".", 3)[3] for name in modules}

    local = {f"attention.self.{name}" for name in ("query", "key", "value")}
    everywhere = {f"{name}_global" for name in local}
    dense = {"attention.output.dense"}
    assert ends("query", "value") == local - {"attention.self.key"}
    assert ends("attention") == local | dense
    assert ends("attention", "query_global", "key_global", "value_global") == local | dense | everywhere
    assert ends("all-linear") == local | dense | everywhere | {"intermediate.dense", "output.dense"}
    assert missing_target_modules(folder, ("attention", "mlp", "query_global")) == []
