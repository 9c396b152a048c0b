"""The tiny encoder for trials: it loads as any other, knows the words of the demo, and is the same every time."""

from pathlib import Path

import pytest
import torch

from fedmerge.device import resolve_compute
from fedmerge.domain.demo import DEMO_DOMAINS, generate_domain
from fedmerge.encoder.backbone import Backbone, load_backbone
from fedmerge.encoder.demo_backbone import NOTE, write_demo_backbone
from fedmerge.encoder.encode import encode
from fedmerge.encoder.text import build_token_table, item_sequences
from fedmerge.errors import BackboneError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo_backbone(tmp_path_factory.mktemp("demo") / "missing" / "backbone")


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Backbone:
    return load_backbone(str(folder), "mean", resolve_compute("cpu", "float32"))


def test_it_is_the_same_every_time_and_another_seed_is_another(backbone: Backbone, tmp_path: Path) -> None:
    compute = resolve_compute("cpu", "float32")
    again = load_backbone(str(write_demo_backbone(tmp_path / "again")), "mean", compute)
    other = load_backbone(str(write_demo_backbone(tmp_path / "other", seed=1)), "mean", compute)
    assert again.sha256 == backbone.sha256 != other.sha256


def test_it_says_what_it_is_and_is_small(folder: Path, backbone: Backbone) -> None:
    assert (folder / "README.md").read_text().strip() == NOTE
    assert sum(file.stat().st_size for file in folder.iterdir()) < 2_000_000
    assert backbone.width == 64
    assert [path.name for path in folder.parent.iterdir()] == ["backbone"]


@pytest.mark.long
def test_it_knows_every_word_of_the_demo_and_tells_items_apart(backbone: Backbone) -> None:
    unknown = backbone.tokenizer.unk_token_id
    for name in (*DEMO_DOMAINS, "toys-2"):
        table = build_token_table(generate_domain(name, num_users=1).catalog, backbone.tokenizer, 32)
        assert not (table.ids == unknown).any(), name
        assert len(table.ids) / len(table) < 32, name  # words are whole, not spelled
    vectors = encode(backbone, item_sequences(table, backbone.special, 64))
    similarity = vectors @ vectors.T - 2 * torch.eye(len(vectors))
    assert similarity.max() < 0.9999
    assert similarity.median() < 0.9


def test_an_existing_folder_or_file_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(BackboneError, match="mine: "):
        write_demo_backbone(tmp_path / "mine")
    with pytest.raises(BackboneError, match=r"thesis\.txt: "):
        write_demo_backbone(tmp_path / "mine" / "thesis.txt")
    with pytest.raises(BackboneError, match="below: "):
        write_demo_backbone(tmp_path / "mine" / "thesis.txt" / "below")
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "thesis.txt"]
    (tmp_path / "empty").mkdir()
    assert (write_demo_backbone(tmp_path / "empty") / "config.json").is_file()
