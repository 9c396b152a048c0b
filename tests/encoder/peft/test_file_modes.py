"""Who may read what is written: results are as the umask says, a client's cache is its own."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fedmerge.adapter import Adapter, LoraModule
from fedmerge.client.cache.folders import fill_folder
from fedmerge.encoder.demo_backbone import write_demo_backbone
from fedmerge.encoder.peft.folder import write_adapter


@pytest.fixture(params=[0o022, 0o027, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(folder: Path) -> set[int]:
    return {path.stat().st_mode & 0o777 for path in folder.iterdir()}


def adapter() -> Adapter:
    return Adapter({"layer.query": LoraModule(torch.ones(1, 3), torch.ones(2, 1), 1.0)})


def test_the_files_of_an_adapter_are_as_the_umask_says(umask: int, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    write_adapter(adapter(), folder, "x")
    assert modes(folder) == {0o666 & ~umask}
    assert len(list(folder.iterdir())) == 2


def test_the_files_of_a_backbone_are_readable(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        folder = write_demo_backbone(tmp_path / "backbone")
    finally:
        os.umask(before)
    assert modes(folder) == {0o644}


def test_a_cached_result_is_the_client_s_own(umask: int, tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "result"
    fill_folder(folder, lambda filled: write_adapter(adapter(), filled, "x"), lambda: False, "a result")
    assert folder.stat().st_mode & 0o777 == 0o700
