"""A small benchmark for the tests: three domains, three strategies, two seeds, leave-one-out."""

from pathlib import Path

from in_process import finish, grid_in, small_experiment, tables_of

from fedmerge.bench.grid import Grid
from fedmerge.config import load_config, to_toml
from fedmerge.report.bench_tables import BenchTables
from sim.local.in_process import run_in_process

REPOSITORY = Path(__file__).resolve().parents[2]

TRAIN = ("beauty", "books", "coffee")

STRATEGIES = ("average", "task-arithmetic", "mergerec")

VARIANTS = ("task-arithmetic 0.2", "task-arithmetic 0.6")

FILE = """
title = "A small benchmark"
experiment = "experiment.toml"
seeds = [0, 1]
leave_one_out = true
baseline = "average"

[[strategy]]
name = "average"
set = { "merge.methods" = "average" }

[[strategy]]
name = "task-arithmetic"
[strategy.set.merge]
methods = "task-arithmetic"
task_arithmetic_coefficients = "0.2,0.6"

[[strategy]]
name = "mergerec"
set = { "merge.methods" = "mergerec", "mergerec.granularities" = "layer" }
"""

POLICIES = """
title = "Policies"
experiment = "experiment.toml"
seeds = [0]
baseline = "adapter"
[[dataset]]
name = "dp"
set = { "dp.mode" = "user", "dp.delta" = 1e-3, "dp.noise_multiplier" = 0.0, "train.negatives" = "catalog" }
[[strategy]]
name = "adapter"
set = { "privacy.policy" = "adapter" }
[[strategy]]
name = "aggregate-only"
set = { "privacy.policy" = "aggregate-only" }
[[strategy]]
name = "noised"
set = { "privacy.policy" = "aggregate-only", "dp.noise_multiplier" = "none", "dp.epsilon" = 1.0 }
[[strategy]]
name = "adapter+catalog"
set = { "merge.methods" = "mergerec" }
[[strategy]]
name = "catalog-private"
set = { "merge.methods" = "mergerec", "privacy.policy" = "catalog-private" }
"""


def make_bench_place(place: Path) -> Path:
    """Write domains, a tiny backbone, an experiment and a benchmark file; return the folder."""
    experiment = small_experiment(place, **{"privacy.min_users": 2})
    (place / "experiment.toml").write_text(to_toml(experiment))
    (place / "bench.toml").write_text(FILE)
    return place


def run_small_bench(place: Path) -> tuple[Grid, BenchTables, list[str]]:
    """Train the experts of seed 0 in a run, then the whole benchmark; return its grid, tables and lines of progress."""
    grid = grid_in(place, "done")
    run_in_process(load_config(place / "experiment.toml", ["seed=0", "until=train", "run_id=before"]))
    lines = finish(grid)
    return grid, tables_of(grid), lines


def scores(tables: BenchTables, **wanted: object) -> dict[str, float]:
    """Strategy -> recall@10, unmasked."""
    wanted = {"variant": "unmasked", "metric": "recall@10", **wanted}
    rows = [row for row in tables.results if all(row[key] == value for key, value in wanted.items())]
    assert len({row["strategy"] for row in rows}) == len(rows)
    return {row["strategy"]: row["value"] for row in rows}
