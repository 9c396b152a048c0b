"""Items without text: a finite vector from special tokens, or refused by row where the tokenizer adds none."""

from pathlib import Path

import pytest
import torch
from backbones import tiny_bert
from tokenizers import Tokenizer

from fedmerge.client.local_domain import open_domain
from fedmerge.config import Text
from fedmerge.device import resolve_compute
from fedmerge.domain.catalog import make_catalog
from fedmerge.domain.folder import write_domain
from fedmerge.domain.interactions import make_interactions
from fedmerge.encoder.backbone import load_backbone
from fedmerge.encoder.encode import encode
from fedmerge.errors import DomainError

TITLES = ["red tent", "", "blue car", "\u200b", "toy"]  # a zero-width space has no tokens either
TEXT = Text(max_attribute_tokens=6, max_items=3, max_tokens=48)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("domains") / "shop"
    catalog = make_catalog("shop", list("abcde"), {"title": TITLES})
    histories = make_interactions(["u", "v"], [[0, 1, 2], [3, 1, 4]])
    write_domain(folder, catalog, histories, public_catalog=True, synthetic=True, source="test")
    return folder


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_special_tokens_give_all_items_without_text_one_finite_vector(shop: Path, tmp_path: Path, pooling: str) -> None:
    backbone = load_backbone(str(tiny_bert(tmp_path)), pooling, resolve_compute("cpu", "float32"))
    vectors = encode(backbone, open_domain(shop, backbone, TEXT).item_sequences)
    assert vectors.isfinite().all()
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(vectors[1], vectors[3])


def test_without_special_tokens_they_are_refused_by_row(shop: Path, tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = None
    tokenizer.save(str(folder / "tokenizer.json"))
    backbone = load_backbone(str(folder), "mean", resolve_compute("cpu", "float32"))
    assert len(backbone.special.prefix) == len(backbone.special.suffix) == 0
    with pytest.raises(DomainError, match=r"domain shop: 2 of 5 items have no text, in the rows 1, 3 of the catalog"):
        open_domain(shop, backbone, TEXT, tmp_path / "cache")
