"""The cache of item vectors: encoded once under each adapter, whole or encoded again, and nothing depends on it."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from adapters import layout_of, random_adapter
from backbones import tiny_bert
from run_folders import full_disk

from fedmerge.adapter import Adapter, adapter_sha256
from fedmerge.client.heads.vectors import item_vectors
from fedmerge.client.local_domain import LocalDomain, open_domain
from fedmerge.config import Text
from fedmerge.device import resolve_compute
from fedmerge.domain.demo import write_demo
from fedmerge.encoder.backbone import load_backbone
from fedmerge.encoder.encode import encode
from fedmerge.encoder.lora import applied
from fedmerge.tensor_files import read_facts, write_tensors

TEXT = Text(max_attribute_tokens=6, max_items=3, max_tokens=48)


@pytest.fixture(scope="module")
def domain(tmp_path_factory: pytest.TempPathFactory) -> LocalDomain:
    place = tmp_path_factory.mktemp("heads")
    write_demo(place / "domains", num_domains=4, num_users=10, num_items=40)
    backbone = load_backbone(str(tiny_bert(place / "bert")), "mean", resolve_compute("cpu", "float32"))
    return open_domain(place / "domains" / "coffee", backbone, TEXT)


@pytest.fixture(scope="module")
def adapter(domain: LocalDomain) -> Adapter:
    return random_adapter(layout_of(domain.backbone, ("query",)), 2, 1.0, 0)


def blind(domain: LocalDomain) -> LocalDomain:
    """Return the domain without its texts, so that vectors can only come from the disk."""
    return replace(domain, table=cast(Any, None))


def files(cache: Path) -> list[Path]:
    return sorted(cache.glob("item-vectors/*"))


def test_items_are_encoded_once_under_each_adapter(domain: LocalDomain, adapter: Adapter, tmp_path: Path) -> None:
    cache = str(tmp_path)
    with applied(domain.backbone, adapter):
        expected = encode(domain.backbone, domain.item_sequences)
    assert torch.equal(item_vectors(domain, adapter, cache), expected)
    assert torch.equal(item_vectors(blind(domain), adapter, cache), expected)
    assert torch.equal(item_vectors(domain, None, cache), domain.backbone_item_vectors)
    assert not torch.equal(expected, domain.backbone_item_vectors)
    assert torch.equal(item_vectors(blind(domain), None, cache), domain.backbone_item_vectors)
    facts = [read_facts(path) for path in files(tmp_path)]
    assert {str(each["adapter"]) for each in facts if each} == {"", adapter_sha256(adapter)}
    os.utime(files(tmp_path)[0], (1, 1))
    for each in (adapter, None):
        item_vectors(domain, each, cache)
    assert files(tmp_path)[0].stat().st_mtime > 1  # that it was used is noted
    assert [path.name.rpartition("-")[0] for path in files(tmp_path)] == ["coffee", "coffee"]


@pytest.mark.parametrize("limits", [{"max_tokens": 40}, {"max_attribute_tokens": 5}])
def test_other_inputs_have_vectors_of_their_own(
    domain: LocalDomain, adapter: Adapter, tmp_path: Path, limits: dict[str, int]
) -> None:
    item_vectors(domain, adapter, str(tmp_path))
    for other in (
        replace(domain, text=domain.text.model_copy(update=limits)),
        replace(domain, backbone=replace(domain.backbone, pooling="cls")),
        replace(domain, catalog=replace(domain.catalog, sha256="0" * 64)),
    ):
        before = len(files(tmp_path))
        item_vectors(other, adapter, str(tmp_path))
        assert len(files(tmp_path)) == before + 1
    longer = replace(domain, text=domain.text.model_copy(update={"max_items": 9}))  # changes no item
    item_vectors(longer, adapter, str(tmp_path))
    assert len(files(tmp_path)) == before + 1


def test_damaged_vectors_are_encoded_again(domain: LocalDomain, adapter: Adapter, tmp_path: Path) -> None:
    expected = item_vectors(domain, adapter, str(tmp_path))
    (path,) = files(tmp_path)
    honest = path.read_bytes()
    for damage in (honest[: len(honest) // 2], b"", honest[:-1] + bytes([honest[-1] ^ 1])):
        path.write_bytes(damage)
        assert torch.equal(item_vectors(domain, adapter, str(tmp_path)), expected)
        assert torch.equal(item_vectors(blind(domain), adapter, str(tmp_path)), expected)
    write_tensors(path, {"vectors": expected[:3]}, {}, "vectors of another catalog")
    assert torch.equal(item_vectors(domain, adapter, str(tmp_path)), expected)
    assert torch.equal(item_vectors(blind(domain), adapter, str(tmp_path)), expected)


def test_a_full_disk_costs_only_time(
    domain: LocalDomain, adapter: Adapter, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = item_vectors(domain, adapter, str(tmp_path / "free"))
    with full_disk(largest_file_bytes=1000):
        assert torch.equal(item_vectors(domain, adapter, str(tmp_path / "full")), expected)
    assert "domain coffee: its item vectors cannot be written" in caplog.text
    assert files(tmp_path / "full") == []
