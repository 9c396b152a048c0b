"""Vectors of every family beside transformers called as its authors do, and laws that hold for all of them."""

import importlib
import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from adapters import random_adapter
from tiny_families import TINY, layout_of_linear
from transformers import AutoModel, AutoTokenizer

from fedmerge.config import ATTRIBUTES, BackboneSection
from fedmerge.device import resolve_compute
from fedmerge.domain.catalog import Catalog, make_catalog
from fedmerge.encoder.backbone import Backbone, open_backbone
from fedmerge.encoder.encode import encode
from fedmerge.encoder.families import TASK
from fedmerge.encoder.lora import applied
from fedmerge.encoder.text import build_token_table, item_sequences, item_text, pack_sequences, sequence_text

FLOAT32 = resolve_compute("cpu", "float32")
NO_LIMIT = 300
ITEMS = [
    {"title": "Red tent, small", "brand": "kids", "category": "steel > organic"},
    {"title": "coffee grinder", "brand": "", "category": "kids"},
    {"title": "blue car (large)", "brand": "", "category": ""},
]
HISTORIES = [[0], [1, 2], [2, 0, 1]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: tiny.write(tmp_path_factory.mktemp(name)) for name, tiny in TINY.items()}


@pytest.fixture(scope="module", params=TINY)
def family(request: pytest.FixtureRequest) -> str:
    return cast(str, request.param)


@pytest.fixture(scope="module")
def opened(family: str, folders: dict[str, Path]) -> Backbone:
    return open_backbone(BackboneSection(source=str(folders[family]), family=TINY[family].family), FLOAT32)


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    columns = {name: [item[name] for item in ITEMS] for name in ATTRIBUTES}
    return make_catalog("shop", [f"i{i}" for i in range(len(ITEMS))], columns)


def texts() -> tuple[list[str], list[str]]:
    """Return the texts of the items and of the histories."""
    of_items = [item_text(item) for item in ITEMS]
    return of_items, [sequence_text([of_items[index] for index in history]) for history in HISTORIES]


def packed(backbone: Backbone, catalog: Catalog, max_tokens: int = NO_LIMIT) -> tuple[list[Any], list[Any]]:
    """Return the token sequences of the items and of the histories."""
    table = build_token_table(catalog, backbone.tokenizer, NO_LIMIT)
    items = item_sequences(table, backbone.special, max_tokens)
    return items, pack_sequences(table, HISTORIES, backbone.special, 50, max_tokens)


# The convention of each family, as its authors use transformers; the text of an item begins with a blank.


def original(family: str, folder: Path, text: str, is_history: bool) -> torch.Tensor:
    """Return the vector of one text by definition."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    if family == "e5-mistral":
        return e5_mistral(tokenizer, model, f"Instruct: {TASK}\nQuery: {text}" if is_history else text)
    if family == "llm2vec":
        return llm2vec(tokenizer, model, f"{TASK}:" if is_history else "", text)
    if family == "qwen3-embedding" and is_history:
        text = f"Instruct: {TASK}\nQuery: {text}"
    elif family not in ("bert", "mpnet", "xlm-roberta"):  # a byte-level tokenizer, or one that keeps blanks
        text = f" {text}"
    inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    hidden: torch.Tensor = model(**inputs).last_hidden_state[0]
    if family == "blair":
        return hidden[0]
    return hidden[-1] if family in ("llama", "smollm", "gemma", "qwen3-embedding") else hidden.mean(dim=0)


def e5_mistral(tokenizer: Any, model: Any, text: str) -> torch.Tensor:
    """Cut to one token less, append the end, pad on the left, and take the last token."""
    batch = tokenizer([text, "a tent"], max_length=NO_LIMIT - 1, truncation=True, padding=False)
    ids = [[*tokens, tokenizer.eos_token_id] for tokens in batch["input_ids"]]
    length = max(map(len, ids))
    rows = torch.tensor([[tokenizer.pad_token_id] * (length - len(each)) + each for each in ids])
    mask = torch.tensor([[0] * (length - len(each)) + [1] * len(each) for each in ids])
    return cast(torch.Tensor, model(input_ids=rows, attention_mask=mask).last_hidden_state[0, -1])


def llm2vec(tokenizer: Any, model: Any, instruction: str, text: str) -> torch.Tensor:
    """Attend both ways by an explicit mask, and take the mean over the text's own tokens."""
    ids = tokenizer(f"{instruction} {text}", return_tensors="pt")["input_ids"]
    own = len(tokenizer(f" {text}", add_special_tokens=False)["input_ids"])
    size = ids.shape[1]
    hidden = model(input_ids=ids, attention_mask=torch.zeros(1, 1, size, size)).last_hidden_state[0]
    return cast(torch.Tensor, hidden[-own:].mean(dim=0))


def test_vectors_are_those_of_the_original_convention(
    family: str, opened: Backbone, folders: dict[str, Path], catalog: Catalog
) -> None:
    for sequences, of_kind, is_history in zip(packed(opened, catalog), texts(), (False, True), strict=True):
        found = encode(opened, sequences)
        with torch.no_grad():
            wanted = torch.stack([original(family, folders[family], text, is_history) for text in of_kind])
        torch.testing.assert_close(found, torch.nn.functional.normalize(wanted, dim=-1), atol=2e-5, rtol=0)


def test_a_vector_is_the_same_alone_in_a_batch_and_padded_on_either_side(
    family: str, opened: Backbone, catalog: Catalog
) -> None:
    items, histories = packed(opened, catalog)
    sequences = [*items, *histories]
    together = encode(opened, sequences)
    alone = torch.cat([encode(opened, [sequence]) for sequence in sequences])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    apart = together[: len(items)]
    assert (apart @ apart.T - torch.eye(len(items))).max() < 0.999  # the model tells the items apart
    if TINY[family].family in ("decoder", "qwen3-embedding", "e5-mistral"):  # pooled at the end: by hand on the left
        tokens, padding = torch.from_numpy(sequences[-1]).long()[None], 7
        rows = torch.nn.functional.pad(tokens, (padding, 0), value=opened.special.pad)
        mask = torch.nn.functional.pad(torch.ones_like(tokens), (padding, 0))
        with torch.no_grad():
            state = opened.model(input_ids=rows, attention_mask=mask).last_hidden_state[0, -1]
        torch.testing.assert_close(together[-1], torch.nn.functional.normalize(state, dim=0), atol=1e-5, rtol=0)


def test_the_first_state_sees_the_last_token_iff_attention_is_both_ways(family: str, opened: Backbone) -> None:
    tokens = torch.arange(4, 14)[None].repeat(2, 1)
    tokens[1, -1] = 5
    for padding in (0, 3):
        rows = torch.nn.functional.pad(tokens, (0, padding), value=opened.special.pad)
        mask = torch.nn.functional.pad(torch.ones_like(tokens), (0, padding))
        for implementation in ("eager", "sdpa"):
            opened.model.set_attn_implementation(implementation)
            with torch.no_grad():
                first, second = opened.model(input_ids=rows, attention_mask=mask).last_hidden_state[:, 0]
            assert bool((first - second).abs().max() > 1e-4) == TINY[family].both_ways


def test_a_text_ends_with_exactly_one_end_token_also_if_it_is_cut(
    family: str, opened: Backbone, catalog: Catalog
) -> None:
    ends = {"bert": "[SEP]", "modernbert": "[SEP]", "qwen3-embedding": "<|endoftext|>"}
    ends |= dict.fromkeys(("blair", "xlm-roberta", "mpnet", "e5-mistral"), "</s>")
    end = opened.tokenizer.convert_tokens_to_ids(ends[family]) if family in ends else None
    around = opened.special.num_around
    for max_tokens in (around + 1, around + 9, NO_LIMIT):
        for sequence in (tokens for kind in packed(opened, catalog, max_tokens) for tokens in kind):
            assert len(sequence) <= max_tokens
            assert sequence.tolist().count(end) == (end is not None)
            assert end is None or sequence[-1] == end


def test_folding_an_adapter_and_back_restores_the_bytes(opened: Backbone) -> None:
    before = {name: tensor.clone() for name, tensor in opened.model.state_dict().items()}
    adapter = random_adapter(layout_of_linear(opened.model), 2, 1.0, 0)
    assert len(adapter.modules) >= 8
    with applied(opened, adapter):
        assert any(not torch.equal(tensor, before[name]) for name, tensor in opened.model.state_dict().items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in opened.model.state_dict().items())


@pytest.mark.parametrize("name", ["bert", "mpnet", "qwen3-embedding"])
def test_auto_gives_what_sentence_transformers_makes_of_its_files(
    name: str, folders: dict[str, Path], catalog: Catalog, tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer  # noqa: PLC0415  # takes seconds, in this process alone

    parts = importlib.import_module("sentence_transformers.models")

    modes = {"bert": "cls", "mpnet": "mean", "qwen3-embedding": "lasttoken"}
    prompts = {"query": f"Instruct: {TASK}\nQuery: "} if name == "qwen3-embedding" else {"query": "query: "}
    prompts["document"] = " " if name == "qwen3-embedding" else ""  # the blank that begins the text of an item
    transformer = parts.Transformer(str(folders[name]))
    transformer.max_seq_length = NO_LIMIT
    modules = [transformer, parts.Pooling(32, pooling_mode=modes[name]), parts.Normalize()]
    model = SentenceTransformer(modules=modules, prompts=prompts, device="cpu")
    model.save(str(tmp_path))
    assert json.loads((tmp_path / "modules.json").read_text())

    backbone = open_backbone(BackboneSection(source=str(tmp_path)), FLOAT32)
    of_items, of_histories = texts()
    items, histories = packed(backbone, catalog)
    np.testing.assert_allclose(encode(backbone, items), model.encode_document(of_items), atol=1e-5)
    np.testing.assert_allclose(encode(backbone, histories), model.encode_query(of_histories), atol=1e-5)
