"""The smoke benchmark, killed ten times at random moments, gives the same results as one that was not killed."""

import signal
import subprocess
import sys
import time
from bisect import bisect
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from backbones import tiny_bert

from fedmerge.report.bench_tables import BenchTables, read_bench_tables
from sim.local.bench import mark_of
from sim.local.launch import end_processes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

SMOKE = Path(__file__).resolve().parents[2] / "configs" / "bench" / "smoke.toml"
NUM_KILLS = 10
MEASURED = ("server_seconds", "client_seconds", "seconds", "peak_bytes")


def bench(place: Path, folder: str, log: Path) -> "subprocess.Popen[str]":
    """Start `fedmerge bench` on the smoke grid with a tiny backbone."""
    settings = [f"backbone.source={place / 'bert'}", "cache_dir=cache", "runtime.precision=float32"]
    command = [sys.executable, "-m", "fedmerge.cli", "bench", str(SMOKE), "--out", folder, "--set", *settings]
    with log.open("w") as output:
        return subprocess.Popen(command, cwd=place, stdout=output, stderr=subprocess.STDOUT, text=True)


def finished(folder: Path) -> dict[Path, int]:
    """Return the finished files with their times of writing: experts, merges, and ranks of users."""
    patterns = ("training/*/adapters/[!.]*/training.json", "merges/**/merges.json", "clients/**/*.npz")
    return {file: file.stat().st_mtime_ns for pattern in patterns for file in folder.glob(pattern)}


def comparable(tables: BenchTables) -> dict[str, list[dict[str, object]]]:
    """Return the tables without measured times and memory."""
    names = ("results", "comparisons", "curves", "coefficients", "ranks", "costs")
    return {
        name: [{**row, **dict.fromkeys({*row} & {*MEASURED}, 0)} for row in getattr(tables, name)] for name in names
    }


@pytest.fixture
def nothing_left(tmp_path: Path) -> Iterator[None]:
    """End the processes that a failing test leaves running."""
    yield
    for folder in ("whole", "killed"):
        end_processes(mark_of(tmp_path / folder))


@pytest.mark.usefixtures("nothing_left")
def test_the_smoke_grid_killed_ten_times_gives_the_same_tables(tmp_path: Path) -> None:
    tiny_bert(tmp_path / "bert")
    log, started = tmp_path / "whole.log", time.time_ns()
    assert bench(tmp_path, "whole", log).wait(timeout=600) == 0, log.read_text()
    moments = [0, *sorted(when - started for when in finished(tmp_path / "whole").values())]

    kept: dict[Path, int] = {}
    for kill, moment in enumerate(sorted(np.random.default_rng(0).uniform(0, moments[-1], NUM_KILLS))):
        num_files = bisect(moments, moment) - 1  # number of files finished at this moment
        log, reached = tmp_path / f"{kill}.log", 0
        process, asked = bench(tmp_path, "killed", log), time.time_ns()
        while process.poll() is None and time.time_ns() - asked < 600e9:
            there = len(finished(tmp_path / "killed"))
            reached = reached or (time.time_ns() if there >= num_files else 0)
            if there > num_files or (reached and time.time_ns() - reached > moment - moments[num_files]):
                break
            time.sleep(0.02)
        process.kill()
        assert process.wait() == -signal.SIGKILL, log.read_text()
        kept |= {file: when for file, when in finished(tmp_path / "killed").items() if file not in kept}

    log = tmp_path / "last.log"
    assert bench(tmp_path, "killed", log).wait(timeout=600) == 0, log.read_text()
    after = finished(tmp_path / "killed")
    assert {file: after[file] for file in kept} == kept, "a finished cell was done again"
    assert len(after) == len(moments) - 1
    whole, killed = (comparable(read_bench_tables(tmp_path / folder)) for folder in ("whole", "killed"))
    for name, rows in whole.items():
        assert killed[name] == rows, name
    assert (tmp_path / "killed" / "report.html").stat().st_size > 10_000
