"""Exports of families with prompts, an appended end token or cut vectors: equal in the libraries that load them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_families import TINY

from fedmerge.config import BackboneSection, Text
from fedmerge.device import resolve_compute
from fedmerge.domain.catalog import Catalog
from fedmerge.domain.demo import generate_domain
from fedmerge.encoder.backbone import Backbone, open_backbone
from fedmerge.encoder.encode import encode
from fedmerge.encoder.export.folder import export_model
from fedmerge.encoder.text import build_token_table, item_sequences, item_text, pack_sequences, sequence_text
from fedmerge.errors import BackboneError
from fedmerge.files import read_json

FLOAT32 = resolve_compute("cpu", "float32")
TEXT = Text(max_tokens=120, max_items=3, max_attribute_tokens=20)
HISTORIES = [[4], [1, 2], [7, 8, 9, 3, 5]]


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return generate_domain("toys", num_users=1, num_items=20).catalog


def opened(name: str, folder: Path, **settings: Any) -> Backbone:
    section = {"source": str(TINY[name].write(folder)), "family": TINY[name].family, **settings}
    return open_backbone(BackboneSection.model_validate(section), FLOAT32)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("bert", {"history_prompt": "title: the tent", "item_prompt": "brand:", "dimension": 20}),
        ("qwen3-embedding", {"dimension": 20}),
        ("e5-mistral", {}),
        ("llama", {"eos": "append"}),
    ],
)
def test_sentence_transformers_gives_the_vectors_of_both_sides(
    name: str, settings: dict[str, Any], catalog: Catalog, tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer  # noqa: PLC0415  # takes seconds, in this process alone

    backbone = opened(name, tmp_path / "backbone", **settings)
    out = tmp_path / "out"
    export_model(backbone, None, out, TEXT, {}, catalog=catalog)
    model = SentenceTransformer(str(out), device="cpu")
    table = build_token_table(catalog, backbone.tokenizer, TEXT.max_attribute_tokens)
    rows = [{key: values[row] for key, values in catalog.attributes.items()} for row in range(len(catalog))]
    texts = [item_text(row, backbone.tokenizer, TEXT.max_attribute_tokens) for row in rows]
    histories = [sequence_text([texts[item] for item in history], TEXT.max_items) for history in HISTORIES]
    items = encode(backbone, item_sequences(table, backbone.special, TEXT.max_tokens)).numpy()
    users = encode(backbone, pack_sequences(table, HISTORIES, backbone.special, TEXT.max_items, TEXT.max_tokens))
    assert items.shape == (20, settings.get("dimension", 32))
    np.testing.assert_allclose(model.encode_document(texts), items, atol=1e-5)
    np.testing.assert_allclose(model.encode_query(histories), users.numpy(), atol=1e-5)
    record = read_json(out / "text.json")
    assert record is not None
    np.testing.assert_allclose(model.encode([record["item_prompt"] + text for text in texts]), items, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("llm2vec", TEXT, r"the pooling mean-text leaves prompts out"),
        ("bert", TEXT.model_copy(update={"order": "newest-last"}), r"newest-last' cuts histories at the beginning"),
    ],
)
def test_what_an_export_cannot_say_is_refused(name: str, text: Text, reason: str, tmp_path: Path) -> None:
    backbone = opened(name, tmp_path / "backbone")
    with pytest.raises(BackboneError, match=rf"{reason}.*Serve it with fedmerge.recommend instead"):
        export_model(backbone, None, tmp_path / "out", text, {})


def test_a_switched_direction_has_a_graph_but_no_folder_of_sentence_transformers(tmp_path: Path) -> None:
    backbone = opened("llama", tmp_path / "backbone", attention="both-ways")
    with pytest.raises(BackboneError, match=r"attention is switched .* take --to onnx"):
        export_model(backbone, None, tmp_path / "out", TEXT, {})
