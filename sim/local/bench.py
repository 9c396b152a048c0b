"""`fedmerge bench`: Flower trains experts, one experiment after the other; all other cells are Ray tasks.

This process reserves no CPU of Ray: it starts cells and writes their results.
"""

import atexit
import hashlib
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ray

from fedmerge.bench.cells import Cell, Ended, Running, work_in_task
from fedmerge.bench.config import Bench, load_bench
from fedmerge.bench.grid import Grid, open_folder
from fedmerge.bench.stages import run_grid
from fedmerge.bench.tables import bench_tables
from fedmerge.config import ExperimentConfig
from fedmerge.errors import ClientError
from fedmerge.files import write_text
from fedmerge.report.bench.page import bench_page
from fedmerge.report.bench_tables import read_bench_tables, write_bench_tables
from fedmerge.report.tracking import FOLDER, write_tracking
from fedmerge.runs.folder import CONFIG_FILE, locked
from sim.checks import check_simulations
from sim.local.gpus import gpus_of_client
from sim.local.launch import MARK, SOCKET_FOLDER_LENGTH, end_processes
from sim.local.run import run_experiment

REPORT = "report.html"
SILENCE_SECONDS = 30.0  # after which the running cells are shown


def run_bench(
    file: Path, folder: Path, app_dir: Path, address: str | None = None, overrides: Sequence[str] = ()
) -> int:
    """Run or resume a benchmark, and print its progress.

    Args:
        file: the benchmark file.
        folder: folder of the benchmark; on a cluster, one that all nodes share.
        app_dir: of the Flower app.
        address: address of a Ray cluster; None for RAY_ADDRESS, or a cluster started on this machine for this call.
        overrides: changes of the benchmark's experiment file, as ``key=value``.

    Returns:
        0 if every cell finished, else 1; the tables hold the finished cells.

    Raises:
        ConfigError: the benchmark is not valid, or the folder belongs to another one.
        ClientError: training the experts failed.
    """
    bench = load_bench(file, overrides)
    first = bench.experiment(bench.config.dataset[0].name, None, 0)
    check_simulations(_experiments(bench))
    open_folder(folder, bench)
    grid = Grid(bench, folder.resolve())
    mark = mark_of(grid.folder)
    gpus = gpus_of_client(first.runtime)
    with locked(grid.folder):
        end_processes(mark)  # left by a killed call
        try:
            failed = run_grid(
                grid,
                lambda config: _train(config, app_dir, mark),
                lambda cells: _on_ray(cells, gpus, address or os.environ.get("RAY_ADDRESS"), mark),
                lambda line: print(line, flush=True),
            )
        finally:
            ray.shutdown()
        write_bench_tables(grid.folder, bench_tables(grid))
        tables = read_bench_tables(grid.folder)
        write_text(grid.folder / REPORT, bench_page(tables))
        if first.tracking is not None:
            write_tracking(tables, grid.folder / FOLDER, first.tracking)
    for line in failed:
        print(f"failed: {line}")
    print(f"report: {grid.folder / REPORT}")
    return int(bool(failed))


def mark_of(folder: Path) -> str:
    """Return the mark of all processes that a benchmark in this folder starts."""
    return hashlib.sha256(str(folder).encode()).hexdigest()[:32]


def _experiments(bench: Bench) -> dict[str, ExperimentConfig]:
    """Return the experiments of all cells by name, without those that differ in seed or in the left-out domain only."""
    experiments = {}
    for dataset in bench.config.dataset:
        for strategy in bench.config.strategy:
            name = f"dataset {dataset.name}, strategy {strategy.name}"
            config = bench.experiment(dataset.name, strategy.name, bench.config.seeds[0])
            experiments[name] = config
            if bench.config.leave_one_out:
                rest = config.domains.model_copy(update={"train": config.domains.train[1:]})
                experiments[f"{name}, with leave_one_out = true"] = config.model_copy(update={"domains": rest})
    return experiments


def _train(config: ExperimentConfig, app_dir: Path, mark: str) -> None:
    run = Path(config.output_dir) / str(config.run_id)
    has_started = (run / CONFIG_FILE).is_file()
    if run.exists() and not has_started:  # killed before its configuration was written
        shutil.rmtree(run)
    run.parent.mkdir(parents=True, exist_ok=True)
    if run_experiment(config.model_copy(update={"resume": has_started}), app_dir, mark):
        raise ClientError(f"{run}: training the experts failed; see the messages above, then start the benchmark again")


def _on_ray(cells: Sequence[Cell], gpus: float, address: str | None, mark: str) -> Iterator[Ended | Running]:
    """Run cells as Ray tasks, as many at once as CPUs and shares of GPUs allow, and yield each as it ends."""
    if not cells:
        return
    if not ray.is_initialized():
        _connect(address, mark)
    task = ray.remote(max_retries=1, num_gpus=gpus)(work_in_task)
    left = deque(cells)
    running: dict[Any, Cell] = {}
    most = 1  # CPUs of the largest node, while one is alive
    while left or running:
        nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]  # untyped in Ray
        most = max(nodes, default=0) or most
        free = sum(nodes) - sum(min(cell.threads, most) for cell in running.values())
        if left and (not running or min(left[0].threads, most) <= free):
            cell = left.popleft()
            running[task.options(num_cpus=min(cell.threads, most)).remote(cell)] = cell
            continue
        ended, _ = ray.wait(list(running), num_returns=1, timeout=SILENCE_SECONDS)
        if not ended:
            yield Running(tuple(running.values()))
            continue
        cell = running.pop(ended[0])
        try:
            yield ray.get(ended[0])
        except ray.exceptions.RayError as error:
            problem = f"its process ended ({type(error).__name__}), perhaps killed for lack of memory"
            yield Ended(cell, problem, 0.0)


def _connect(address: str | None, mark: str) -> None:
    """Join a Ray cluster, or start one here that ends with this process."""
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is not None:
        ray.init(address=address, **quiet)
        return
    os.environ |= {MARK: mark, "RAY_USAGE_STATS_ENABLED": "0"}
    temporary = tempfile.gettempdir()
    short = temporary if len(temporary) <= SOCKET_FOLDER_LENGTH else "/tmp"
    files = Path(short) / f"fedmerge-{mark[:8]}"
    shutil.rmtree(files, ignore_errors=True)  # left by a killed call
    atexit.register(shutil.rmtree, files, ignore_errors=True)
    cpus = len(os.sched_getaffinity(0))
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, _temp_dir=str(files), **quiet)
