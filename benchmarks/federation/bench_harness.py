"""Overhead of the benchmark harness: `fedmerge bench` on a grid of 20 cells, against the work of its cells alone.

    python benchmarks/federation/bench_harness.py

A turn is the whole command: Python's start, imports, Ray's start, the workers' imports, distributing cells, selections,
tables, report, and Ray's end. Own work is the time of the cells in their workers, including backbone and domains. The
command gets as many CPUs as a cell has threads, so that one cell runs at a time. Nothing is trained: the experts are
random adapters on disk (bench_scaling.py times Flower's start). `--users` and `--items` set the length of a cell.
"""

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from fedmerge.adapter import Adapter
from fedmerge.bench.config import load_bench
from fedmerge.bench.grid import Grid, Place, open_folder
from fedmerge.bench.ranking import backbone_of
from fedmerge.domain.demo import write_demo
from fedmerge.encoder.lora import fresh_adapter
from fedmerge.files import write_json, write_table
from fedmerge.runs.checkpoints import write_expert, write_sources
from fedmerge.runs.folder import DONE, environment

NUM_CELLS = 20  # 2 of merging, 2 variants on 3 domains' validation, 4 rows on 3 domains' test
EXPERIMENT = """
[domains]
root = "domains"
train = "beauty,books,camping"
unseen = ""
[merge]
task_arithmetic_coefficients = "0.4,0.8"
[evaluation]
validation_users = {users}
test_users = {users}
baselines = ""
[runtime]
threads_per_client = {threads}
server_threads = {threads}
"""
BENCH = """
title = "Harness"
experiment = "experiment.toml"
seeds = [0]
baseline = "average"
[[strategy]]
name = "average"
set = { "merge.methods" = "average" }
[[strategy]]
name = "task-arithmetic"
set = { "merge.methods" = "task-arithmetic" }
"""


def main() -> None:
    """Time the turns and print the shares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--users", type=int, default=400, help="users per domain and split")
    parser.add_argument("--items", type=int, default=1000, help="items per domain")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
        prepare(place, options)
        shares = [turn(place, number) for number in range(options.repeats)]
    low, middle, high = (100 * share for share in statistics.quantiles(shares, n=4))
    print(f"harness: {middle:.1f} % of the cells' own work (quartiles {low:.1f} to {high:.1f})")


def prepare(place: Path, options: argparse.Namespace) -> None:
    """Write domains, the benchmark, and its folder in the state after training."""
    write_demo(place / "domains", num_domains=3, num_users=options.users, num_items=options.items)
    (place / "experiment.toml").write_text(EXPERIMENT.format(users=options.users, threads=options.threads))
    (place / "bench.toml").write_text(BENCH)
    os.chdir(place)
    bench = load_bench(place / "bench.toml")
    open_folder(place / "begun", bench)
    grid = Grid(bench, place / "begun")
    config = grid.experiment(Place("main", 0, ""), None)
    run = grid.run(Place("main", 0, ""), None)
    run.mkdir(parents=True)
    start = fresh_adapter(backbone_of(config.backbone, config.runtime), config.lora, 0)
    rng = torch.Generator().manual_seed(0)
    sources, ledger = {}, []
    for domain in config.domains.train:
        modules = {
            name: replace(module, lora_B=0.01 * torch.randn(module.lora_B.shape, generator=rng))
            for name, module in start.modules.items()
        }
        report = {"seconds": 0.0, "validations": []}
        sources[domain] = write_expert(run, domain, Adapter(modules), report, config.backbone.source)
        sent = {"message": "train", "late": False, "name": "adapter.all", "size_bytes": Adapter(modules).size_bytes}
        ledger.append({"domain": domain, **sent})
    write_table(run / "exposure.parquet", ledger)
    write_sources(run, sources)
    write_json(run / "environment.json", environment())
    (run / DONE).touch()


def turn(place: Path, number: int) -> float:
    """Run the whole command once; return its time beyond that of its cells, as a share of theirs."""
    shutil.copytree(place / "begun", place / str(number))
    command = [sys.executable, "-m", "fedmerge.cli", "bench", "bench.toml", "--out", str(number)]
    started = time.monotonic()
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - started
    stages = re.findall(r"^\w+: ([\d.]+) s of work in ([\d.]+) s$", done.stdout, re.MULTILINE)
    own, around = (sum(float(stage[part]) for stage in stages) for part in (0, 1))
    if done.returncode or len(re.findall(r"^\w+ \d+ of \d+: ", done.stdout, re.MULTILINE)) != NUM_CELLS:
        sys.exit(done.stdout + done.stderr)
    print(
        f"own work {own:6.1f} s, handing out {around - own:5.1f} s, before and after {seconds - around:5.1f} s: "
        f"{100 * (seconds - own) / own:.1f} % more",
        flush=True,
    )
    return (seconds - own) / own


if __name__ == "__main__":
    main()
