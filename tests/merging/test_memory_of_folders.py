"""Merging folders reads, merges and writes one module at a time: the same bytes as in memory, and memory stays flat."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import as_many_as, random_adapter
from test_merging_methods import PARAMETERS, TRAINING_FREE, Tensors

from fedmerge.adapter import Adapter, LoraModule, OnDemand, adapter_sha256
from fedmerge.encoder.peft.folder import read_adapter, write_adapter
from fedmerge.errors import LayoutMismatchError
from fedmerge.merging.folders.reading import read_folders
from fedmerge.merging.folders.writing import rounded, write_merge
from fedmerge.merging.training_free import merge_adapters

NAMES = ("books", "tents", "toys")
WIDTH, RANK = 64, 8
FACTORS = 3 * RANK * 2 * WIDTH * 4  # bytes of one module of three adapters


def write_folders(root: Path, num_modules: int) -> dict[str, Path]:
    layout = {f"layers.{number}.q": (WIDTH, WIDTH) for number in range(num_modules)}
    for seed, name in enumerate(NAMES):
        write_adapter(random_adapter(layout, RANK, 1.5, seed), root / name, "base")
    return {name: root / name for name in NAMES}


def merge_folders(folders: dict[str, Path], method: str, root: Path, dtype: torch.dtype, **settings: Any) -> Path:
    sources = read_folders(as_many_as(method, folders))
    (root / "scratch").mkdir()
    merged = merge_adapters(sources.adapters, method, scratch=root / "scratch", **settings)
    write_merge(rounded(merged, dtype), sources, root / "merged", None, {}, dtype=dtype)
    return root / "merged"


@pytest.mark.parametrize("method", TRAINING_FREE)
def test_memory_does_not_grow_with_the_number_of_modules(method: str, tmp_path: Path) -> None:
    peaks = []
    for number in (2, 6):
        root = tmp_path / str(number)
        folders, tensors = write_folders(root, number), Tensors()
        with tensors:
            merge_folders(folders, method, root, torch.float32, output_rank=24, **PARAMETERS.get(method, {}))
        peaks.append(tensors.peak)
    assert peaks[0] > FACTORS
    assert peaks[1] < peaks[0] + FACTORS / 2  # four more modules


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scope", ["tensor", "layer", "model"])
def test_a_merge_through_files_is_that_in_memory(scope: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    folders = write_folders(tmp_path, 3)
    merged = merge_folders(folders, "ties", tmp_path, dtype, scope=scope)
    adapters = {name: read_adapter(folder) for name, folder in folders.items()}
    expected = merge_adapters(adapters, "ties", scope=scope).adapter
    write_adapter(expected, tmp_path / "expected", "base", dtype=dtype)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (merged / file).read_bytes() == (tmp_path / "expected" / file).read_bytes()
    assert adapter_sha256(read_adapter(merged)) in (merged / "provenance.json").read_text()


@pytest.mark.parametrize("method", TRAINING_FREE)
def test_a_module_is_read_once(method: str) -> None:
    """Reading may be expensive: an update of DoRA is computed from the weights of the base model."""
    reads: Counter[tuple[str, str]] = Counter()

    def counted(domain: str, adapter: Adapter) -> Adapter:
        def read(name: str) -> LoraModule:
            reads[domain, name] += 1
            return adapter.modules[name]

        return Adapter(OnDemand(adapter.modules, read))

    layout = {f"layers.{number}.q": (6, 5) for number in range(3)}
    adapters = {name: random_adapter(layout, 2, 1.5, seed) for seed, name in enumerate(NAMES)}
    merge_adapters(as_many_as(method, {name: counted(name, each) for name, each in adapters.items()}), method)
    assert reads == Counter((name, module) for name in as_many_as(method, adapters) for module in layout)


def test_a_source_that_changes_while_it_is_merged_is_noticed(tmp_path: Path) -> None:
    folders = write_folders(tmp_path, 2)
    sources = read_folders(folders)
    write_adapter(read_adapter(folders["books"]), folders["tents"], "base")
    with pytest.raises(LayoutMismatchError, match="changed while it was read"):
        merge_adapters(sources.adapters, "average")
