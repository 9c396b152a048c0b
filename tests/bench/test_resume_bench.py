"""Benchmarks that are killed, that fail in part, or that run on Ray."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from in_process import grid_in, here, tables_of, train
from small_bench import FILE, REPOSITORY, scores

import sim.local.bench
from fedmerge.bench.cells import Cell, Ended, work
from fedmerge.bench.grid import Grid, Place
from fedmerge.bench.ranking import sums_of_ranks
from fedmerge.bench.stages import run_grid
from fedmerge.errors import ClientError, PolicyError, RunDirError
from fedmerge.files import read_json, write_json
from fedmerge.report.bench_tables import BenchTables, read_bench_tables
from sim.local.bench import run_bench

pytestmark = [pytest.mark.federation, pytest.mark.timeout(900)]  # two starts of Flower, four of Ray


def test_a_grid_killed_ten_times_gives_the_same_tables(
    bench_place: Path, finished_bench: tuple[Grid, BenchTables, list[str]]
) -> None:
    finished, expected, _ = finished_bench
    grid = grid_in(bench_place, "killed")
    shutil.copytree(
        finished.folder / "training", grid.folder / "training"
    )  # killed trainings are tested in test_resume.py
    random = np.random.default_rng(0)
    did: list[Path] = []

    class Killed(BaseException):
        pass

    def dying(cells: Sequence[Cell]) -> Iterator[Ended]:
        for cell in cells:
            if random.random() < 0.12 and kills < 10:
                if random.random() < 0.5 and not cell.result.is_file():  # in the middle of a cell
                    cell.result.parent.mkdir(parents=True, exist_ok=True)
                    (cell.result.parent / f".{cell.result.name}.partial").write_bytes(b"half")
                raise Killed
            ended = work(cell)
            did.append(cell.result)
            yield ended

    kills = 0
    while True:
        try:
            assert run_grid(grid_in(bench_place, "killed"), train, dying, lambda line: None) == []
            break
        except Killed:
            kills += 1
    assert kills == 10
    assert len(did) == len(set(did)), "a finished cell was done again"
    measured = {"server_seconds": 0, "peak_bytes": 0, "seconds": 0}
    found = tables_of(grid)
    for name in ("results", "comparisons", "curves", "coefficients", "ranks", "costs"):
        with_same = [
            [{**row, **{k: v for k, v in measured.items() if k in row}} for row in getattr(t, name)]
            for t in (found, expected)
        ]
        assert with_same[0] == with_same[1], name


def test_a_failed_cell_is_reported_and_the_others_run(
    bench_place: Path, finished_bench: tuple[Grid, BenchTables, list[str]]
) -> None:
    text = FILE.replace("leave_one_out = true", "").replace("[0, 1]", "[0]")
    text = text.replace('"layer" }', '"layer", "mergerec.initial_coefficient" = 1e300 }')
    (bench_place / "failing.toml").write_text(text)
    grid = grid_in(bench_place, "failing", "failing.toml")
    shutil.copytree(finished_bench[0].folder / "training", grid.folder / "training")
    (failed,) = run_grid(grid, train, here, lambda line: None)
    assert failed.startswith("merging: mergerec (main, seed 0): MergeError: ")
    tables = tables_of(grid)
    assert {cell["strategy"]: cell["status"] for cell in tables.cells}["mergerec"] == "failed"
    assert set(scores(tables, domain="books")) == {
        "average",
        "task-arithmetic",
        "backbone",
        "popularity",
        "last-item",
        "expert",
    }
    assert len(run_grid(grid, train, here, lambda line: None)) == 1  # the failed cell is retried


def test_a_domain_without_an_expert_ends_the_benchmark(
    bench_place: Path, finished_bench: tuple[Grid, BenchTables, list[str]]
) -> None:
    grid = grid_in(bench_place, "incomplete")
    shutil.copytree(finished_bench[0].folder / "training", grid.folder / "training")
    run = grid.run(Place("main", 0, ""), None)
    experts = read_json(run / "experts.json")
    write_json(run / "experts.json", {name: sha256 for name, sha256 in experts.items() if name != "coffee"})
    with pytest.raises(ClientError, match=r"main-seed0.*coffee"):
        run_grid(grid, train, here, lambda line: None)


def test_ranks_of_too_few_users_never_leave_a_client(
    bench_place: Path, finished_bench: tuple[Grid, BenchTables, list[str]]
) -> None:
    file = next((finished_bench[0].folder / "clients").rglob("*.npz"))
    assert sums_of_ranks({"row": file}, "books", 30)["masked"].num_users == 30
    with pytest.raises(PolicyError, match="books"):
        sums_of_ranks({"row": file}, "books", 31)
    damaged = bench_place / "damaged.npz"
    damaged.write_bytes(file.read_bytes()[:50])
    with pytest.raises(RunDirError, match=r"damaged\.npz"):
        sums_of_ranks({"row": damaged}, "books", 2)


@pytest.mark.e2e
def test_progress_on_ray_names_only_the_cells_that_run(
    bench_place: Path, finished_bench: tuple[Grid, BenchTables, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    grid = grid_in(bench_place, "waiting")
    shutil.copytree(finished_bench[0].folder / "training", grid.folder / "training")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sim.local.bench, "SILENCE_SECONDS", 0.02)
        assert run_bench(bench_place / "bench.toml", grid.folder, REPOSITORY) == 0
    lines = capsys.readouterr().out.splitlines()
    told = [line.partition("; running: ")[2].split("; ") for line in lines if "; running: " in line]
    assert told
    assert {len(titles) for titles in told} <= set(range(1, len(os.sched_getaffinity(0)) + 1))
    ended = {line.partition(": ")[2].rpartition(", ")[0].partition(", about")[0] for line in lines if " of " in line}
    assert all(any(text.startswith(title) for text in ended) for titles in told for title in titles)
    assert read_bench_tables(grid.folder).results == finished_bench[1].results


@pytest.mark.e2e
def test_killed_flower_and_ray_give_the_tables_of_one_process(
    bench_place: Path, finished_bench: tuple[Grid, BenchTables, list[str]]
) -> None:
    text = FILE.replace("[0, 1]", "[1]").replace("leave_one_out = true", "")
    text += '\n[[strategy]]\nname = "flora"\nset = { "rounds.rule" = "flora", "rounds.number" = 2 }\n'
    (bench_place / "one.toml").write_text(text)
    command = [sys.executable, "-m", "fedmerge.cli", "bench", "one.toml", "--out", "one"]
    with subprocess.Popen(
        command, cwd=bench_place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("validation 2"):
                process.kill()
                break
    assert process.returncode == -signal.SIGKILL
    finished = {file: file.stat().st_mtime_ns for file in (bench_place / "one").rglob("*.npz")}
    again = subprocess.run(command, cwd=bench_place, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "training 1 of" not in again.stdout
    assert finished
    assert finished == {file: file.stat().st_mtime_ns for file in finished}
    tables = read_bench_tables(bench_place / "one")
    assert {row["strategy"] for row in tables.results} > {"flora"}
    expected = tuple(row for row in finished_bench[1].results if row["seed"] == 1 and not row["left_out"])
    assert tuple(row for row in tables.results if row["strategy"] != "flora") == expected
    assert (bench_place / "one" / "report.html").stat().st_size > 10_000
