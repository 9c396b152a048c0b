"""Adapters of a run are read and hashed once per process, and again as soon as a file changes."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmerge.adapter import Adapter, LoraModule, adapter_sha256
from fedmerge.encoder.peft.contents import TENSOR_FILE
from fedmerge.errors import RunDirError
from fedmerge.runs import verified
from fedmerge.runs.checkpoints import ADAPTERS, read_expert_hash, stored_experts, write_expert
from fedmerge.runs.verified import forget_adapters, read_verified


def adapter(seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    lora_A, lora_B = torch.randn(2, 4, generator=generator), torch.randn(4, 2, generator=generator)
    return Adapter({"encoder.layer.0.query": LoraModule(lora_A, lora_B, 2.0)})


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Count how often adapters are read and hashed."""
    counts: Counter[str] = Counter()

    def counted(name: str) -> None:
        function = getattr(verified, name)

        def count(*arguments: Any) -> Any:
            counts[name] += 1
            return function(*arguments)

        monkeypatch.setattr(verified, name, count)

    forget_adapters()
    counted("read_adapter")
    counted("adapter_sha256")
    yield counts
    forget_adapters()


def test_an_expert_is_read_and_hashed_once(tmp_path: Path, counts: Counter[str]) -> None:
    sources = {name: write_expert(tmp_path, name, adapter(seed), {}, "tiny") for seed, name in enumerate(("a", "b"))}
    for _ in range(5):
        assert read_expert_hash(tmp_path, "a") == sources["a"]
        assert [adapter_sha256(expert) for expert in stored_experts(tmp_path, sources).values()] == list(
            sources.values()
        )
    assert counts == {"read_adapter": 2, "adapter_sha256": 2}


def test_a_changed_expert_is_read_again_and_refused(tmp_path: Path, counts: Counter[str]) -> None:
    sources = {"a": write_expert(tmp_path, "a", adapter(0), {}, "tiny")}
    experts = stored_experts(tmp_path, sources)
    assert experts["a"]
    path = tmp_path / ADAPTERS / "a" / TENSOR_FILE
    data, stat = bytearray(path.read_bytes()), path.stat()
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same size, same modification time
    with pytest.raises(RunDirError) as caught:
        experts["a"]
    assert str(tmp_path / ADAPTERS / "a") in str(caught.value)
    assert read_expert_hash(tmp_path, "a") is None
    assert write_expert(tmp_path, "a", adapter(0), {}, "tiny") == sources["a"]
    assert experts["a"]


def test_adapters_beyond_the_limit_are_read_again_but_not_hashed(
    tmp_path: Path, counts: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed, name in enumerate(("a", "b")):
        write_expert(tmp_path, name, adapter(seed), {}, "tiny")
    monkeypatch.setattr(verified, "CACHE_BYTES", 0)
    for _ in range(3):
        for name in ("a", "b"):
            read_verified(tmp_path / ADAPTERS / name)
    assert counts == {"read_adapter": 6, "adapter_sha256": 2}
