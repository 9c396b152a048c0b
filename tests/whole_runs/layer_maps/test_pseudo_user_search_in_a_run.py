"""rmm-style by pseudo-users in a run, in a merge of its experts later, and in a benchmark: the same bytes."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from in_process import finish, grid_in, small_experiment, tables_of

from fedmerge.bench.grid import Place
from fedmerge.bench.outcomes import merge_hashes
from fedmerge.cli import main
from fedmerge.config import ExperimentConfig, to_toml
from fedmerge.files import read_json, read_lines
from fedmerge.runs.checkpoints import merge_folder
from sim.app.messages import records
from sim.local.in_process import run_in_process

pytestmark = pytest.mark.federation

SEARCH = {"merge.methods": "rmm-style", "rmm.users": 6, "rmm.shards": 2, "rmm.coefficients": "0.3,0.6", "rmm.budget": 9}

BENCH = """
title = "A search"
experiment = "experiment.toml"
seeds = [0]
baseline = "rmm-style"
[[strategy]]
name = "rmm-style"
set = {}
"""


def experiment(place: Path, **changes: object) -> ExperimentConfig:
    return small_experiment(place, **{**SEARCH, "privacy.min_users": 2, **changes})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("place")
    run_in_process(experiment(place))
    return place


def test_a_run_searches_on_the_server_and_asks_nobody(place: Path) -> None:
    run = place / "runs" / "run"
    provenance = read_json(merge_folder(run, "rmm-style") / "provenance.json")
    assert provenance["search"]["episodes"] == 8
    assert provenance["parameters"]["reward"] == "pseudo-users"
    messages = {row["message"] for row in pq.read_table(run / "exposure.parquet").to_pylist()}
    assert not messages & {records.LAYER_MAP, records.COHORT}
    assert records.CATALOG in messages
    (log,) = (run / "learning").glob("rmm-style-*.jsonl")
    assert len(list(read_lines(log))) == provenance["search"]["readings"]
    assert read_json(run / "choice.json")["best_variants"] == {"rmm-style": "rmm-style"}


def test_a_merge_made_later_finds_the_same(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = place / "runs" / "run"
    assert main(["merge", str(run), "--catalogs", str(place / "domains"), "--out", str(place / "again")]) == 0
    first, again = (
        read_json(folder / "provenance.json")
        for folder in (merge_folder(run, "rmm-style"), place / "again" / "rmm-style")
    )
    assert again["sha256"] == first["sha256"]
    assert again["search"] == first["search"]
    assert (place / "again" / "rmm-style" / "coefficients.png").exists()
    assert "rmm-style" in capsys.readouterr().out


def test_a_benchmark_finds_the_same(place: Path) -> None:
    (place / "experiment.toml").write_text(to_toml(experiment(place)))
    (place / "bench.toml").write_text(BENCH)
    grid = grid_in(place, "bench")
    finish(grid)
    found = merge_hashes(grid, Place("main", 0, ""), "rmm-style")
    first = read_json(merge_folder(place / "runs" / "run", "rmm-style") / "provenance.json")
    assert found == {"rmm-style": first["sha256"]}
    rows = [row for row in tables_of(grid).coefficients if row["strategy"] == "rmm-style" and row["domain"] == "books"]
    assert [row["value"] for row in rows] == pytest.approx(first["coefficients"]["books"])
