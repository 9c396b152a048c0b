"""A small experiment, and a benchmark's trainings and cells in this process."""

import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from backbones import tiny_bert

from fedmerge.adapter import Adapter
from fedmerge.bench.cells import Cell, Ended, work
from fedmerge.bench.config import load_bench
from fedmerge.bench.grid import Grid, open_folder
from fedmerge.bench.stages import run_grid
from fedmerge.bench.tables import bench_tables
from fedmerge.client.cache.experts import load_expert, load_or_train_expert
from fedmerge.client.local_domain import LocalDomain
from fedmerge.client.training.loop import Progress
from fedmerge.client.training.settings import training_settings
from fedmerge.config import ExperimentConfig, from_flat
from fedmerge.domain.demo import write_demo
from fedmerge.report.bench_tables import BenchTables, read_bench_tables, write_bench_tables
from sim.local.in_process import run_in_process


def small_experiment(place: Path, **changes: object) -> ExperimentConfig:
    """Three domains that train and one unseen, a tiny backbone, a few steps; what is written lies in ``place``."""
    if not (place / "domains").exists():
        write_demo(place / "domains", num_domains=8, num_users=30, num_items=25)
        tiny_bert(place / "backbone")
    flat = {
        "name": "small",
        "run_id": "run",
        "output_dir": str(place / "runs"),
        "cache_dir": str(place / "cache"),
        "domains.root": str(place / "domains"),
        "domains.train": "beauty,books,coffee",
        "domains.unseen": "camping",
        "backbone.source": str(place / "backbone"),
        "text.max_attribute_tokens": 8,
        "text.max_items": 2,
        "text.max_tokens": 32,
        "lora.rank": 2,
        "lora.alpha": 4,
        "train.learning_rate": 0.03,
        "train.batch_size": 10,
        "train.max_steps": 4,
        "train.warmup_steps": 1,
        "train.validate_every_steps": 1,
        "merge.task_arithmetic_coefficients": "0.5",
        "mergerec.granularities": "domain,layer",
        "mergerec.steps": 2,
        "runtime.device": "cpu",
        "runtime.precision": "float32",
        "runtime.server_threads": 1,
    }
    return from_flat({**flat, **changes})


def train(config: ExperimentConfig) -> None:
    run_in_process(config.model_copy(update={"resume": (Path(config.output_dir) / str(config.run_id)).exists()}))


def expert_of(
    domain: LocalDomain, config: ExperimentConfig, progress: Progress = lambda line: None
) -> tuple[Adapter, dict[str, Any]]:
    """Return the client's expert from its cache, or train it."""
    return load_or_train_expert(domain, training_settings(config), config.cache_dir, config.run_id, progress)


def cached_expert_of(domain: LocalDomain, config: ExperimentConfig, sha256: str | None) -> Adapter:
    return load_expert(domain, training_settings(config), config.cache_dir, config.run_id, sha256)


def here(cells: Sequence[Cell]) -> Iterator[Ended]:
    return map(work, cells)


def grid_in(place: Path, name: str, file: str = "bench.toml", overrides: Sequence[str] = ()) -> Grid:
    """Open the folder ``name`` for a benchmark; both are in ``place``."""
    bench = load_bench(place / file, overrides)
    open_folder(place / name, bench)
    return Grid(bench, place / name)


def finish(grid: Grid) -> list[str]:
    """Run a benchmark in which nothing may fail; return its lines of progress."""
    lines: list[str] = []
    assert run_grid(grid, train, here, lines.append) == []
    return lines


def tables_of(grid: Grid) -> BenchTables:
    write_bench_tables(grid.folder, bench_tables(grid))
    return read_bench_tables(grid.folder)


def killed_at_write(config: ExperimentConfig, number: int) -> bool:
    """Run in a process that is killed at its n-th write; return True if it got that far."""
    child = os.fork()
    if child == 0:
        writes, replace = 0, os.replace

        def replace_or_die(*places: Any) -> None:
            nonlocal writes
            writes += 1
            if writes == number:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*places)

        os.replace = replace_or_die  # type: ignore[assignment]  # as far as it is used
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 2)
        try:
            run_in_process(config)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)
