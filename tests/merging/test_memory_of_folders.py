"""Merging folders reads, merges and writes one module at a time: the same bytes as in memory, and memory stays flat."""

import os
import shutil
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import as_many_as, random_adapter, random_adapters
from test_merging_methods import ELEMENTWISE, PARAMETERS, TRAINING_FREE, Tensors

from fedmerge.adapter import Adapter, LoraModule, OnDemand, adapter_sha256
from fedmerge.encoder.peft.folder import read_adapter, write_adapter
from fedmerge.errors import LayoutMismatchError
from fedmerge.merging import rows as elementwise
from fedmerge.merging import selection, training_free
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


@pytest.fixture
def _few_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "DIGIT_BITS", 8)
    monkeypatch.setattr(selection, "RADIX", 1 << 8)


@pytest.mark.usefixtures("_few_counters")
@pytest.mark.parametrize(("scope", "space"), [("tensor", "full"), ("layer", "core")])
@pytest.mark.parametrize("method", ELEMENTWISE)
def test_blocks_of_a_module_change_nothing(
    method: str, scope: Any, space: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters = random_adapters({"layers.0.q": (37, 23), "layers.0.v": (5, 30), "layers.1.q": (29, 17)})
    modules = dict(adapters["tents"].modules)
    opposite = torch.tensor([[1.0, -1.0]]).expand(37, 2)
    modules["layers.0.q"] = LoraModule(torch.rand(1, 23).expand(2, 23), opposite, 1.0)  # an update that cancels
    adapters["tents"] = Adapter(modules)
    settings = {"scope": scope, "space": space, "seed": 3, **PARAMETERS.get(method, {})}
    expected = merge_adapters(adapters, method, **settings).adapter
    for held in (3 * 23 * 2, 3 * 23 * 5):  # blocks of one neuron, of an odd number, of several
        monkeypatch.setattr(training_free, "HELD", held)
        assert adapter_sha256(merge_adapters(adapters, method, **settings).adapter) == adapter_sha256(expected)


@pytest.mark.usefixtures("_few_counters")
@pytest.mark.parametrize("method", ["della", "ties"])
def test_memory_hardly_grows_with_the_adapters_of_a_large_module(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, size = {"layers.0.q": (192, 96)}, 192 * 96 * 4  # bytes of one update
    monkeypatch.setattr(training_free, "HELD", 1 << 14)
    monkeypatch.setattr(elementwise, "BLOCK", 1 << 10)
    peaks = []
    for number in (2, 8):
        adapters, tensors = {f"d{k}": random_adapter(layout, 1, 1.5, k) for k in range(number)}, Tensors()
        with tensors:
            merge_adapters(adapters, method)
        peaks.append(tensors.peak / size)
    assert peaks[1] < peaks[0] + 1


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


@pytest.mark.parametrize("stage", ["scratch/1.safetensors", ".merged.partial-*/*.safetensors*"])
def test_a_merge_that_is_killed_leaves_nothing_under_its_name(stage: str, tmp_path: Path) -> None:
    folders = write_folders(tmp_path, 4)
    (tmp_path / "scratch").mkdir()

    def dying(adapter: Adapter) -> Adapter:
        def read(name: str) -> LoraModule:
            if any(tmp_path.glob(stage)):
                os.kill(os.getpid(), signal.SIGKILL)
            return adapter.modules[name]

        return Adapter(OnDemand(adapter.modules, read))

    child = os.fork()
    if child == 0:
        try:
            sources = read_folders(folders)
            adapters = {name: dying(adapter) for name, adapter in sources.adapters.items()}
            merged = merge_adapters(adapters, "ties", scratch=tmp_path / "scratch")
            merged = replace(merged, adapter=dying(merged.adapter))
            write_merge(merged, sources, tmp_path / "merged", None, {})
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert any(tmp_path.glob(stage))
    assert not (tmp_path / "merged").exists()
    shutil.rmtree(tmp_path / "scratch")
    assert (merge_folders(folders, "ties", tmp_path, torch.float32) / "provenance.json").is_file()
