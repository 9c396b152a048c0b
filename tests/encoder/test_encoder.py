"""Text to tokens to vectors: equal to the tokenizer on the joined text, and to transformers called directly."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from backbones import WORDS, tiny_bert, tiny_roberta
from safetensors.torch import load_file, save_file

from fedmerge.backbone_files import MINILM, MINILM_PACKAGE
from fedmerge.client.local_domain import open_domain
from fedmerge.config import ATTRIBUTES, Text
from fedmerge.device import resolve_compute
from fedmerge.domain.catalog import Catalog, make_catalog
from fedmerge.domain.folder import write_domain
from fedmerge.domain.interactions import make_interactions
from fedmerge.encoder.backbone import Backbone, check_max_tokens, load_backbone
from fedmerge.encoder.encode import embed_batch, embed_in_groups, encode, length_batches, tokens_at_once
from fedmerge.encoder.fast.frozen import frozen_products, using
from fedmerge.encoder.fast.products import packs_bfloat16
from fedmerge.encoder.lora import attach
from fedmerge.encoder.text import (
    SpecialTokens,
    build_token_table,
    item_sequences,
    num_packed,
    pack_items,
    pack_sequences,
)
from fedmerge.errors import BackboneError, ConfigError

FLOAT32 = resolve_compute("cpu", "float32")
NO_LIMIT = 10_000

ITEMS = [
    {"title": "Red tent, small", "brand": "kids", "category": "steel > organic"},
    {"title": "coffee grinder", "brand": "", "category": "kids"},
    {"title": "", "brand": "brush", "category": "soap"},
    {"title": "blue car (large)", "brand": "", "category": ""},
    {"title": "", "brand": "", "category": ""},
]
WITHOUT_TEXT = 4


def catalog_of(items: list[dict[str, str]]) -> Catalog:
    columns = {attribute: [item[attribute] for item in items] for attribute in ATTRIBUTES}
    return make_catalog("shop", [f"i{i}" for i in range(len(items))], columns)


def joined_text(history: list[int]) -> str:
    """Return the text of a history by definition: most recent item first."""
    texts = []
    for index in reversed(history):
        present = {attribute: value for attribute, value in ITEMS[index].items() if value}
        texts.append(" ".join(f"{attribute}: {value}" for attribute, value in present.items()))
    return "; ".join(texts)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    builders = {"bert": tiny_bert, "roberta": tiny_roberta}
    return {name: build(tmp_path_factory.mktemp(name)) for name, build in builders.items()}


@pytest.fixture(scope="module")
def bert(folders: dict[str, Path]) -> Backbone:
    return load_backbone(str(folders["bert"]), "mean", FLOAT32)


@pytest.fixture(scope="module")
def roberta(folders: dict[str, Path]) -> Backbone:
    return load_backbone(str(folders["roberta"]), "cls", FLOAT32)


def random_sequences(backbone: Backbone, number: int, longest: int) -> list[np.ndarray]:
    """Token sequences of many lengths, special tokens included."""
    rng = np.random.default_rng(0)
    special, size = backbone.special, len(backbone.tokenizer)
    return [
        np.concatenate([special.prefix, rng.integers(7, size, rng.integers(1, longest)), special.suffix]).astype(
            np.int32
        )
        for _ in range(number)
    ]


# Tokens

HISTORIES = [[0], [1], [3], [1, 0], [0, 3], [3, 3, 1], [2], [0, 2, 1], [2, 0]]


@pytest.mark.parametrize("history", HISTORIES, ids=str)
def test_packed_sequences_are_the_tokens_of_the_joined_text_under_wordpiece(bert: Backbone, history: list[int]) -> None:
    table = build_token_table(catalog_of(ITEMS), bert.tokenizer, NO_LIMIT)
    (tokens,) = pack_sequences(table, [history], bert.special, 50, NO_LIMIT)
    assert tokens.dtype == np.int32
    assert tokens.tolist() == bert.tokenizer(joined_text(history))["input_ids"]


@pytest.mark.parametrize(
    "history",
    HISTORIES,
    ids=str,
)
def test_packed_sequences_are_the_tokens_of_the_joined_text_under_byte_level_bpe(
    roberta: Backbone, history: list[int]
) -> None:
    # A blank in front of the whole text is an option of these tokenizers (add_prefix_space); none may be lost inside.
    table = build_token_table(catalog_of(ITEMS), roberta.tokenizer, NO_LIMIT)
    (tokens,) = pack_sequences(table, [history], roberta.special, 50, NO_LIMIT)
    text = joined_text(history)
    wanted = [roberta.tokenizer(start + text)["input_ids"] for start in ("", " ")]
    assert tokens.tolist() in wanted, roberta.tokenizer.decode(tokens)


def test_an_item_sequence_is_the_tokens_of_its_text(bert: Backbone) -> None:
    table = build_token_table(catalog_of(ITEMS), bert.tokenizer, NO_LIMIT)
    assert len(table) == len(ITEMS)
    sequences = item_sequences(table, bert.special, NO_LIMIT)
    assert [tokens.tolist() for tokens in sequences] == [
        bert.tokenizer(joined_text([index]))["input_ids"] for index in range(len(ITEMS))
    ]
    assert len(sequences[WITHOUT_TEXT]) == len(bert.special.prefix) + len(bert.special.suffix)


@pytest.mark.parametrize("chunk", [1, 2, len(ITEMS)])
def test_a_catalog_in_chunks_has_the_same_tokens(bert: Backbone, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    whole = build_token_table(catalog_of(ITEMS), bert.tokenizer, NO_LIMIT)
    monkeypatch.setattr("fedmerge.encoder.text.CHUNK", chunk)
    chunked = build_token_table(catalog_of(ITEMS), bert.tokenizer, NO_LIMIT)
    assert (chunked.ids.dtype.name, chunked.offsets.dtype.name) == ("int32", "int64")
    np.testing.assert_array_equal(chunked.ids, whole.ids)
    np.testing.assert_array_equal(chunked.offsets, whole.offsets)


def test_each_value_is_cut_and_its_key_is_not(bert: Backbone) -> None:
    long = {"title": "red " * 9, "brand": "kids", "category": "soap brush toy"}
    table = build_token_table(catalog_of([long]), bert.tokenizer, 2)
    wanted = bert.tokenizer("title: red red brand: kids category: soap brush", add_special_tokens=False)["input_ids"]
    assert table.item(0).tolist() == wanted


def test_the_oldest_tokens_are_cut(bert: Backbone) -> None:
    table = build_token_table(catalog_of(ITEMS), bert.tokenizer, NO_LIMIT)
    history = [0, 1, 3]
    (whole,) = pack_sequences(table, [history], bert.special, 50, NO_LIMIT)
    for max_tokens in range(3, len(whole) + 2):
        (tokens,) = pack_sequences(table, [history], bert.special, 50, max_tokens)
        kept = min(max_tokens, len(whole)) - 1
        assert tokens.tolist() == [*whole[:kept], *bert.special.suffix]


@pytest.mark.parametrize("separator_size", [0, 1, 3])
def test_the_number_of_packed_items_is_that_of_those_with_a_token_in_the_sequence(separator_size: int) -> None:
    special = SpecialTokens(np.array([101], np.int32), np.array([102], np.int32), 0)
    separator = np.full(separator_size, 999, np.int32)
    items = [np.full(size, number, np.int32) for number, size in enumerate((2, 4, 1, 3))]
    for max_tokens in range(3, 25):
        packed = pack_items(items, separator, special, max_tokens)
        assert num_packed(items, separator, special, max_tokens) == len({*packed.tolist()} & {0, 1, 2, 3})


def test_only_the_most_recent_items_are_read(bert: Backbone) -> None:
    table = build_token_table(catalog_of(ITEMS), bert.tokenizer, NO_LIMIT)
    long, short = pack_sequences(table, [np.array([0, 2, 1, 3]), [1, 3]], bert.special, 2, NO_LIMIT)
    assert long.tolist() == short.tolist()


def test_special_tokens_are_read_off_the_tokenizer(bert: Backbone, roberta: Backbone) -> None:
    assert bert.tokenizer.convert_ids_to_tokens([*bert.special.prefix, *bert.special.suffix]) == ["[CLS]", "[SEP]"]
    assert roberta.tokenizer.convert_ids_to_tokens([*roberta.special.prefix, *roberta.special.suffix]) == [
        "<s>",
        "</s>",
    ]
    assert (bert.special.pad, roberta.special.pad) == (0, 1)


# Vectors


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
def test_a_vector_is_the_pooled_output_of_transformers(folders: dict[str, Path], family: str, pooling: str) -> None:
    backbone = load_backbone(str(folders[family]), pooling, FLOAT32)
    sequences = random_sequences(backbone, 6, 20)
    found = embed_batch(backbone, sequences)
    assert found.dtype == torch.float32
    for tokens, vector in zip(sequences, found, strict=True):
        hidden = backbone.model(input_ids=torch.tensor(tokens.astype(np.int64))[None]).last_hidden_state[0]
        pooled = {"cls": hidden[0], "mean": hidden.mean(dim=0), "last": hidden[-1]}[pooling]
        torch.testing.assert_close(vector, pooled / pooled.norm(), atol=1e-5, rtol=0)


def test_the_tiny_backbones_tell_texts_apart(bert: Backbone, roberta: Backbone) -> None:
    for backbone in (bert, roberta):  # otherwise the equalities of this file would hold of anything
        vectors = encode(backbone, random_sequences(backbone, 30, 20))
        cosines = vectors @ vectors.T - 2 * torch.eye(30)
        assert cosines.max() < 0.98


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_encoding_many_is_encoding_one_by_one(folders: dict[str, Path], family: str) -> None:
    backbone = load_backbone(str(folders[family]), "mean", FLOAT32)
    sequences = random_sequences(backbone, 200, 100)  # more than one batch
    assert len(length_batches([len(tokens) for tokens in sequences], 8192)) > 1
    calls: list[tuple[int, int]] = []
    found = encode(backbone, sequences, lambda done, total: calls.append((done, total)))
    single = torch.cat([embed_batch(backbone, [tokens]) for tokens in sequences])
    torch.testing.assert_close(found, single, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(200), atol=1e-5, rtol=0)
    assert calls[-1] == (200, 200)
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    assert not found.requires_grad


def test_length_batches_hold_every_sequence_once_within_the_budget() -> None:
    lengths = np.random.default_rng(1).integers(1, 90, 300).tolist()
    batches = length_batches(lengths, 256)
    assert sorted(np.concatenate(batches).tolist()) == list(range(300))
    assert all(len(batch) * max(lengths[i] for i in batch) <= 256 for batch in batches)
    longest = [max(lengths[i] for i in batch) for batch in batches]
    assert longest == sorted(longest, reverse=True)
    assert [batch.tolist() for batch in length_batches([300, 2], 256)] == [[0], [1]]  # too long for any batch: alone
    assert length_batches([], 256) == []


def test_gradients_reach_the_weights(bert: Backbone) -> None:
    weight = bert.model.get_parameter("encoder.layer.0.attention.self.query.weight")
    weight.requires_grad_(True)
    try:
        torch.autograd.backward(embed_batch(bert, random_sequences(bert, 2, 9))[0, 0])
        assert weight.grad is not None
        assert weight.grad.abs().sum() > 0
    finally:
        weight.requires_grad_(False)
        weight.grad = None


def adapter_gradients(
    backbone: Backbone,
    sequences: list[np.ndarray],
    embed: Callable[[Backbone, list[np.ndarray]], torch.Tensor],
    pack: bool = False,
) -> list[torch.Tensor]:
    """Return gradients of a fixed function of the vectors for the parameters of a fresh adapter with B ≠ 0."""
    model = attach(backbone, ["all-linear"], rank=2, alpha=4, seed=0)
    try:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
        with using(frozen_products(backbone) if pack else {}):
            vectors = embed(backbone, sequences)
            targets = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(0))
            (vectors * targets).sum().backward()  # type: ignore[no-untyped-call]
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    finally:
        model.unload()


def test_groups_change_no_vector_and_no_gradient(bert: Backbone) -> None:
    sequences = random_sequences(bert, 13, 30)
    for number in (1, 3, 13):
        torch.testing.assert_close(embed_in_groups(bert, sequences[:number]), embed_batch(bert, sequences[:number]))
    found, expected = (adapter_gradients(bert, sequences, embed) for embed in (embed_in_groups, embed_batch))
    assert expected
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("number", [1, 40, 90, 10_000])
def test_tokens_at_once_change_no_vector_and_no_gradient(bert: Backbone, number: int) -> None:
    sequences = random_sequences(bert, 13, 30)
    expected = embed_batch(bert, sequences)
    gradients = adapter_gradients(bert, sequences, embed_batch)
    with tokens_at_once(number):
        torch.testing.assert_close(embed_in_groups(bert, sequences), expected)
        torch.testing.assert_close(adapter_gradients(bert, sequences, embed_in_groups), gradients, atol=1e-5, rtol=1e-4)
    assert torch.equal(embed_batch(bert, sequences), expected)


def held_bytes(backbone: Backbone, sequences: list[np.ndarray]) -> int:
    """Return the bytes that a forward pass with an adapter holds for its backward pass, without the weights."""
    model = attach(backbone, ["all-linear"], rank=2, alpha=4, seed=0)
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    held: dict[int, int] = {}

    def hold(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    try:
        with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            vectors = embed_in_groups(backbone, sequences)
        del vectors
        return sum(held.values())
    finally:
        model.unload()


def test_what_a_step_holds_does_not_depend_on_the_batch(bert: Backbone) -> None:
    few, many = random_sequences(bert, 8, 30), random_sequences(bert, 64, 30)
    whole = [held_bytes(bert, few), held_bytes(bert, many)]
    with tokens_at_once(64):
        parts = [held_bytes(bert, few), held_bytes(bert, many)]
    assert whole[1] > 5 * whole[0]
    assert parts[1] < whole[0] / 4
    vectors = 4 * len(many) * bert.width
    assert parts[1] - parts[0] < 4 * vectors  # what is left are the vectors themselves


@pytest.mark.skipif(not packs_bfloat16(), reason="oneDNN has no bfloat16 here")
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_packed_weights_change_no_gradient(folders: dict[str, Path], family: str) -> None:
    half = load_backbone(str(folders[family]), "mean", resolve_compute("cpu", "bfloat16"))
    sequences = random_sequences(half, 13, 30)
    expected = adapter_gradients(half, sequences, embed_batch)
    found = adapter_gradients(half, sequences, embed_batch, pack=True)
    assert expected
    assert all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))
    products = frozen_products(half)
    layer = half.model.get_submodule("encoder.layer.0.output.dense")
    assert layer in products
    with using(products):
        assert layer.forward is products[layer]
    assert "forward" not in vars(layer)


def test_nothing_is_packed_in_float32(bert: Backbone) -> None:
    assert frozen_products(bert) == {}


def test_bfloat16_stays_close_and_comes_back_as_float32(folders: dict[str, Path], bert: Backbone) -> None:
    half = load_backbone(str(folders["bert"]), "mean", resolve_compute("cpu", "bfloat16"))
    sequences = random_sequences(bert, 8, 20)
    exact, rounded = encode(bert, sequences), encode(half, sequences)
    assert rounded.dtype == torch.float32
    assert 1e-6 < (exact - rounded).abs().max() < 0.05


def test_minilm_is_what_sentence_transformers_makes_of_it() -> None:
    pytest.importorskip(MINILM_PACKAGE)
    sentence_transformers = pytest.importorskip("sentence_transformers")
    backbone = load_backbone(MINILM, "mean", FLOAT32)
    texts = [joined_text([0]), joined_text([0, 1, 2]), "title: " + "tent " * 40]
    sequences = [np.array(backbone.tokenizer(text)["input_ids"], dtype=np.int32) for text in texts]
    folder = str(Path(str(pytest.importorskip(MINILM_PACKAGE).__file__)).parent / "model")
    wanted = sentence_transformers.SentenceTransformer(folder, device="cpu").encode(texts, convert_to_tensor=True)
    torch.testing.assert_close(encode(backbone, sequences), wanted.float().cpu(), atol=1e-5, rtol=0)


# Backbones


def test_a_loaded_backbone_is_frozen_and_named_after_its_folder(folders: dict[str, Path], bert: Backbone) -> None:
    assert not bert.model.training
    assert not any(parameter.requires_grad for parameter in bert.model.parameters())
    assert {parameter.dtype for parameter in bert.model.parameters()} == {torch.float32}
    assert (bert.name, bert.width) == (folders["bert"].name, 32)


def test_the_announced_weights_are_accepted_and_others_refused(folders: dict[str, Path]) -> None:
    digest = hashlib.sha256((folders["bert"] / "model.safetensors").read_bytes()).hexdigest()
    assert load_backbone(str(folders["bert"]), "cls", FLOAT32, digest).pooling == "cls"
    with pytest.raises(BackboneError, match="weights_sha256") as caught:
        load_backbone(str(folders["roberta"]), "cls", FLOAT32, digest)
    assert digest in str(caught.value)
    assert str(folders["roberta"]) in str(caught.value)


def test_the_identity_covers_weights_and_tokenizer(tmp_path: Path, folders: dict[str, Path], bert: Backbone) -> None:
    same = shutil.copytree(folders["bert"], tmp_path / "same")
    assert load_backbone(str(same), "mean", FLOAT32).sha256 == bert.sha256
    other_weights = tiny_bert(tmp_path / "weights", seed=1)
    assert load_backbone(str(other_weights), "mean", FLOAT32).sha256 != bert.sha256
    text = (same / "tokenizer.json").read_text()
    (same / "tokenizer.json").write_text(text.replace(f'"{WORDS[3]}"', '"tant"'))
    assert load_backbone(str(same), "mean", FLOAT32).sha256 != bert.sha256


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"backbone.source.*gone"):
        load_backbone(str(tmp_path / "gone"), "mean", FLOAT32)


def test_other_formats_than_safetensors_are_never_opened(tmp_path: Path, folders: dict[str, Path]) -> None:
    folder = shutil.copytree(folders["bert"], tmp_path / "pickle")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(BackboneError, match=r"pickle.*\.safetensors"):
        load_backbone(str(folder), "mean", FLOAT32)


def truncate_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def remove_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["encoder.layer.1.attention.self.query.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def remove_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def spoil_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def spoil_width(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 16}))


def remove_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def spoil_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": 1')


@pytest.mark.parametrize(
    "damage",
    [
        truncate_weights,
        remove_weight,
        remove_config,
        spoil_config,
        spoil_width,
        remove_tokenizer,
        spoil_tokenizer,
    ],
)
def test_damaged_folders_are_refused_by_name(
    tmp_path: Path, folders: dict[str, Path], damage: Callable[[Path], None]
) -> None:
    folder = shutil.copytree(folders["bert"], tmp_path / "damaged")
    damage(folder)
    with pytest.raises(BackboneError, match=re.escape(str(folder))):
        load_backbone(str(folder), "mean", FLOAT32)


def test_a_missing_gpu_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match=r"runtime\.device = 'cuda'"):
        resolve_compute("cuda")


def test_a_gpu_that_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ConfigError, match=r"runtime\.device = 'cuda:1', but PyTorch numbers the GPUs here from 0 to 0"):
        resolve_compute("cuda:1")
    assert resolve_compute("cuda:0").precision == "float32"  # bfloat16 would be emulated
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert resolve_compute("auto").precision == "bfloat16"


@pytest.mark.parametrize(("family", "positions"), [("bert", 128), ("roberta", 256)])
def test_max_tokens_is_held_to_the_positions(folders: dict[str, Path], family: str, positions: int) -> None:
    backbone = load_backbone(str(folders[family]), "mean", FLOAT32)
    check_max_tokens(backbone, positions)
    with pytest.raises(BackboneError, match=rf"text\.max_tokens = {positions + 1}.* {positions} "):
        check_max_tokens(backbone, positions + 1)
    sequence = np.full(positions, 7, dtype=np.int32)
    assert embed_batch(backbone, [sequence]).isfinite().all()  # the limit itself does work ...
    with pytest.raises((IndexError, RuntimeError)):
        embed_batch(backbone, [np.full(positions + 1, 7, dtype=np.int32)])  # ... and one more does not


def test_a_domain_is_not_opened_with_longer_sequences_than_the_backbone_has_positions(
    tmp_path: Path, bert: Backbone
) -> None:
    interactions = make_interactions(["u"], [[0, 1, 2]])
    write_domain(tmp_path / "shop", catalog_of(ITEMS), interactions, public_catalog=True, synthetic=True, source="test")
    domain = open_domain(tmp_path / "shop", bert, Text(max_tokens=128))
    assert len(domain.table) == len(domain.item_sequences) == len(ITEMS)
    with pytest.raises(BackboneError, match=r"text\.max_tokens = 129"):
        open_domain(tmp_path / "shop", bert, Text(max_tokens=129))
