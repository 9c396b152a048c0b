"""The cache of a catalog's tokens: one entry per set of inputs, and nothing depends on the cache."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from backbones import tiny_bert, tiny_roberta
from run_folders import full_disk
from safetensors.numpy import load_file, save_file

from fedmerge.client.cache.tokens import HASH_FILE, TOKENS_FILE
from fedmerge.client.local_domain import LocalDomain, open_domain
from fedmerge.config import Text
from fedmerge.device import resolve_compute
from fedmerge.domain.demo import write_demo
from fedmerge.encoder.backbone import Backbone, load_backbone

TEXT = Text(max_attribute_tokens=6, max_items=3, max_tokens=48)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return load_backbone(str(tiny_bert(tmp_path_factory.mktemp("bert"))), "mean", resolve_compute("cpu", "float32"))


@pytest.fixture
def coffee(tmp_path: Path) -> Path:
    write_demo(tmp_path / "domains", num_domains=4, num_users=10, num_items=40)
    return tmp_path / "domains" / "coffee"


def same(one: LocalDomain, other: LocalDomain) -> bool:
    arrays = ("ids", "offsets", "separator")
    return all(
        getattr(one.table, name).dtype == getattr(other.table, name).dtype
        and np.array_equal(getattr(one.table, name), getattr(other.table, name))
        for name in arrays
    )


def cached_files(cache_dir: Path) -> list[Path]:
    return sorted(cache_dir.glob(f"tokens/*/{TOKENS_FILE}"))


def test_a_catalog_is_tokenised_once(coffee: Path, backbone: Backbone, tmp_path: Path) -> None:
    plain = open_domain(coffee, backbone, TEXT)
    assert same(open_domain(coffee, backbone, TEXT, tmp_path / "cache"), plain)
    (file,) = cached_files(tmp_path / "cache")
    assert file.parent.name.startswith("coffee-")
    assert same(open_domain(coffee, backbone, TEXT, tmp_path / "cache"), plain)
    before = file.stat()
    blind = replace(backbone, tokenizer=cast(Any, None))  # it cannot tokenise, so the tokens come from the file
    assert same(open_domain(coffee, blind, TEXT, tmp_path / "cache"), plain)
    assert file.stat() == before


def test_other_inputs_have_tokens_of_their_own(coffee: Path, backbone: Backbone, tmp_path: Path) -> None:
    other = load_backbone(str(tiny_roberta(tmp_path / "roberta")), "mean", resolve_compute("cpu", "float32"))
    camping = coffee.with_name("camping")
    cases = [
        (coffee, backbone, TEXT),
        (camping, backbone, TEXT),
        (coffee, other, TEXT),
        (coffee, backbone, TEXT.model_copy(update={"max_attribute_tokens": 2})),
    ]
    for number, (folder, encoder, text) in enumerate(cases, start=1):
        for _ in range(2):
            assert same(open_domain(folder, encoder, text, tmp_path / "cache"), open_domain(folder, encoder, text))
        assert len(cached_files(tmp_path / "cache")) == number


@pytest.mark.parametrize("harm", ["empty", "half", "other", "longer", "flipped", "no hash"])
def test_a_damaged_file_is_replaced(coffee: Path, backbone: Backbone, tmp_path: Path, harm: str) -> None:
    plain = open_domain(coffee, backbone, TEXT, tmp_path / "cache")
    (file,) = cached_files(tmp_path / "cache")
    whole = file.read_bytes()
    if harm in ("empty", "half"):
        file.write_bytes(whole[: len(whole) // 2 if harm == "half" else 0])
    else:
        arrays = load_file(file)
        if harm == "other":
            del arrays["separator"]
        elif harm == "flipped":
            arrays["ids"] = arrays["ids"][::-1].copy()
        elif harm == "no hash":
            (file.parent / HASH_FILE).unlink()
        else:
            arrays["offsets"] = np.append(arrays["offsets"], arrays["offsets"][-1])
        save_file(arrays, file)
    assert same(open_domain(coffee, backbone, TEXT, tmp_path / "cache"), plain)
    assert cached_files(tmp_path / "cache") == [file]
    assert file.read_bytes() == whole


def test_a_domain_opens_without_a_writable_cache(
    coffee: Path, backbone: Backbone, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with caplog.at_level("WARNING", logger="fedmerge"):
        opened = open_domain(coffee, backbone, TEXT, tmp_path / "cache")
    assert same(opened, open_domain(coffee, backbone, TEXT))
    assert "domain coffee" in caplog.text
    assert f"{tmp_path}/cache" in caplog.text
    with full_disk(100):
        assert same(open_domain(coffee, backbone, TEXT, tmp_path / "full"), opened)
    assert not cached_files(tmp_path / "full")
