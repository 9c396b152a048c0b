"""One small benchmark, run once for all tests of this folder."""

from pathlib import Path

import pytest
from in_process import here, small_experiment, tables_of, train
from small_bench import FILE, grid_in

from fedmerge.bench.grid import Grid
from fedmerge.bench.stages import run_grid
from fedmerge.config import load_config, to_toml
from fedmerge.report.bench_tables import BenchTables
from sim.local.in_process import run_in_process


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Domains, a tiny backbone, and a benchmark file."""
    place = tmp_path_factory.mktemp("bench")
    experiment = small_experiment(place, **{"privacy.min_users": 2})
    (place / "experiment.toml").write_text(to_toml(experiment))
    (place / "bench.toml").write_text(FILE)
    return place


@pytest.fixture(scope="session")
def done(place: Path) -> tuple[Grid, BenchTables, list[str]]:
    lines: list[str] = []
    grid = grid_in(place, "done")
    run_in_process(load_config(place / "experiment.toml", ["seed=0", "until=train", "run_id=before"]))
    assert run_grid(grid, train, here, lines.append) == []
    return grid, tables_of(grid), lines
