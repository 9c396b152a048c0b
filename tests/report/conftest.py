"""Benchmarks and a run to report on."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from report_folders import make_reported_run, some_bench
from run_folders import Place, make_place

from fedmerge.config import from_flat
from fedmerge.report.bench_tables import BenchTables, write_bench_tables

RUN_ID = "shops-20260102-030405-abcd"


PRIVATE: dict[str, dict[str, Any]] = {
    "average": {"dp.noise_multiplier": 0.0},
    "some": {"dp.epsilon": 8.0},
    "much": {"dp.epsilon": 1.0},
    "summed": {"dp.epsilon": 1.0, "privacy.policy": "aggregate-only"},
    "only-noise": {"dp.noise_multiplier": 2.0},
    "open": {"dp.mode": "none", "dp.delta": "none", "train.negatives": "in-batch"},
}


@pytest.fixture(scope="session")
def bench() -> BenchTables:
    return some_bench()


@pytest.fixture(scope="session")
def private_bench() -> BenchTables:
    """Strategies with differential privacy, and one without."""
    tables = some_bench(tuple(PRIVATE), folds=False)
    flat = {"dp.mode": "user", "dp.delta": 1e-4, "train.negatives": "catalog", "merge.methods": "average"}
    configs = {name: from_flat(flat | changes).model_dump(mode="json") for name, changes in PRIVATE.items()}
    return replace(tables, cells=[{**cell, "config": configs[cell["strategy"]]} for cell in tables.cells])


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="session")
def run(place: Place) -> Path:
    return make_reported_run(place, RUN_ID)


@pytest.fixture
def folder(bench: BenchTables, tmp_path: Path) -> Path:
    """Of a benchmark."""
    write_bench_tables(tmp_path, bench)
    return tmp_path
