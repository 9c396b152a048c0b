"""Whether simulated clients get a GPU."""

import ctypes

import pytest
import torch

from fedmerge.config import Runtime, from_flat
from fedmerge.errors import ConfigError
from sim.checks import check_simulation
from sim.local.gpus import gpus_of_client


def driver(monkeypatch: pytest.MonkeyPatch, *, installed: bool, seen: bool) -> None:
    def load(name: str) -> None:
        assert name == "libcuda.so.1"
        if not installed:
            raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", load)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: seen)


@pytest.mark.parametrize(
    ("installed", "seen", "device", "expected"),
    [
        (True, True, "auto", 1.0),
        (True, True, "cuda", 1.0),
        (True, True, "cpu", 0.0),
        (True, False, "auto", 0.0),  # a CPU build of PyTorch
        (False, True, "auto", 0.0),
    ],
)
def test_auto_is_a_whole_gpu_where_pytorch_may_use_one(
    monkeypatch: pytest.MonkeyPatch, installed: bool, seen: bool, device: str, expected: float
) -> None:
    driver(monkeypatch, installed=installed, seen=seen)
    assert gpus_of_client(Runtime(device=device)) == expected


@pytest.mark.parametrize("gpus", [0.0, 0.25, 2.0])
def test_a_number_stands(monkeypatch: pytest.MonkeyPatch, gpus: float) -> None:
    driver(monkeypatch, installed=True, seen=True)
    assert gpus_of_client(Runtime(gpus_per_client=gpus)) == gpus


def test_a_numbered_gpu_is_refused_in_a_simulation() -> None:
    config = from_flat({"domains.root": "demo", "domains.train": "camping,coffee", "runtime.device": "cuda:1"})
    with pytest.raises(ConfigError, match=r"runtime\.device = 'cuda:1': a simulated client sees only"):
        check_simulation(config)
