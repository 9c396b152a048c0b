"""A poisoned client in a whole experiment: excluded, or flagged and rolled back; also as a benchmark."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message
from in_process import finish, grid_in, small_experiment, tables_of

from fedmerge.adapter import adapter_sha256
from fedmerge.bench.config import load_bench
from fedmerge.bench.grid import Place
from fedmerge.config import ExperimentConfig, to_toml
from fedmerge.domain.catalog import CATALOG_FILE
from fedmerge.encoder.peft.folder import read_adapter
from fedmerge.errors import ClientError, ConfigError
from fedmerge.files import read_json
from fedmerge.report.bench.page import bench_page
from fedmerge.report.run.listing import run_text
from fedmerge.report.run.page import run_page
from fedmerge.runs import checkpoints
from fedmerge.runs.folder import DONE
from fedmerge.runs.reading import describe_run
from fedmerge.server.remerge import experts_of_run
from sim.app.messages import records
from sim.app.server.phases import merging
from sim.local.in_process import answer_honestly, run_in_process

pytestmark = pytest.mark.federation

TRAIN = ("beauty", "books", "camping", "coffee", "garden")
ATTACK = {"simulation.attacker": "coffee", "simulation.attack": "scaled-update", "simulation.attack_strength": 100.0}
FULL = {"admission.action": "exclude", "admission.probe_items": 25, "admission.leave_one_out": True}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("gate")
    experiment(place)
    return place


def experiment(place: Path, **changes: object) -> ExperimentConfig:
    ours = {"domains.train": ",".join(TRAIN), "domains.unseen": "toys", "merge.methods": "average"}
    return small_experiment(place, **{**ours, "evaluation.validation_users": 25, **changes})


def run(place: Path, run_id: str, **changes: object) -> Path:
    run_in_process(experiment(place, run_id=run_id, **changes))
    return place / "runs" / run_id


def test_a_clean_cohort_passes_with_all_checks(place: Path) -> None:
    folder = run(place, "clean", **FULL)
    record = read_json(folder / "admission.json")
    assert record["action"] == "exclude"
    assert record["failed"] == {}
    assert set(record["checks"]) == {"norm", "titles", "categories", "leave-one-out"}
    assert all(set(of_check) == {*TRAIN} for of_check in record["checks"].values())
    assert "admission: all 5 experts pass" in (folder / "run.log").read_text()
    assert set(read_json(folder / "merged/average/provenance.json")["domains"]) == {*TRAIN}
    assert {file.stem for file in (folder / "admission").glob("*.json")} == {*TRAIN}
    report = (folder / "report.txt").read_text()
    assert "POISONED" not in report
    assert "flagged" not in report


def test_a_run_in_which_nothing_was_learned_says_so(place: Path) -> None:
    changes = {"domains.train": "beauty,books,camping", "train.learning_rate": 1e-20}
    folder = run(place, "void", **changes)
    names = ["beauty", "books", "camping"]
    assert [read_json(folder / f"adapters/{name}/training.json")["nothing_learned"] for name in names] == [True] * 3
    record = read_json(folder / "admission.json")
    assert (record["failed"], sorted(record["nothing_learned"])) == ({}, names)
    log = (folder / "run.log").read_text()
    for name in names:
        assert f"{name}: nothing was learned" in log
        assert f"flagged, but still merged: {name}: nothing was learned" in log
    assert "admission: all 3 experts pass, 3 of them without having learned anything" in log
    (line,) = [line for line in (folder / "report.txt").read_text().splitlines() if "nothing was learned" in line]
    assert line.endswith(": beauty, books, camping")
    assert run_page(folder).count("Nothing was learned: ") == 3
    assert run_text(describe_run(folder)).count("nothing was learned") >= 3


@pytest.fixture(scope="module")
def attacked(place: Path) -> Path:
    """A run that finished without the attacked client."""
    return run(place, "attacked", **ATTACK, **FULL)


def test_an_attacked_client_is_excluded_and_the_run_continues(place: Path, attacked: Path) -> None:
    folder = attacked
    assert (folder / DONE).is_file()
    failed = read_json(folder / "admission.json")["failed"]
    assert list(failed) == ["coffee"]
    assert re.match(
        r"its update has norm [\d.e+]+, [\d.]+ times the cohort's median; expected at most", failed["coffee"]
    )
    clients = read_json(folder / "clients.json")
    assert clients["excluded"] == {"coffee": f"admission: {failed['coffee']}"}
    assert clients["excluded_in_phase"] == {"coffee": "admission"}
    assert set(read_json(folder / "merged/average/provenance.json")["domains"]) == {*TRAIN} - {"coffee"}
    report = (folder / "report.txt").read_text()
    assert report.startswith("POISONED ON PURPOSE: coffee")
    assert "(scaled-update, strength 100)" in report.splitlines()[0]
    assert "excluded: coffee: admission: its update has norm" in report
    assert "POISONED ON PURPOSE: coffee" in (folder / "run.log").read_text()
    others = run(place, "without", **{"domains.train": ",".join(sorted({*TRAIN} - {"coffee"}))})
    hashes = [adapter_sha256(read_adapter(of / "merged" / "average")) for of in (folder, others)]
    assert hashes[0] == hashes[1]  # as without that client
    page = run_page(folder)
    assert "Poisoned on purpose." in page
    assert re.search(r"coffee [^<]* \(scaled-update, strength 100\)", page)
    again = experts_of_run(folder)
    assert set(again.adapters) == {*TRAIN} - {"coffee"}
    assert again.excluded == {"coffee": f"not admitted: {failed['coffee']}"}


def test_a_flagged_client_is_merged_and_rolled_back(place: Path) -> None:
    changes = {**ATTACK, "evaluation.fallback": False}
    flagged = run(place, "flagged", **changes)
    report = (flagged / "report.txt").read_text()
    assert "flagged, but still merged: coffee: " in report
    assert set(read_json(flagged / "merged/average/provenance.json")["domains"]) == {*TRAIN}
    assert read_json(flagged / "choice.json")["rollback"] is None
    assert "Flagged, but still merged: coffee. " in run_page(flagged)
    back = run(place, "back", **changes, **{"admission.rollback": True})
    assert {folder.name for folder in (back / "merged").iterdir()} == {"average", "average-without-coffee"}
    choice = read_json(back / "choice.json")
    validation = read_json(back / "validation/books.json")["unmasked"]
    assert {"average", "average without coffee", "expert"} <= set(validation["methods"])
    decided = choice["rollback"]
    assert choice["dropped"] == read_json(flagged / "choice.json")["dropped"]
    if decided is None:  # a model this small hurts no domain significantly
        assert choice["served"] == "average"
    else:
        assert decided["from"] == "average"
        assert f"rolled back from average to {decided['to']}" in (back / "report.txt").read_text()


class Killed(BaseException):
    pass


LEARNED = {"merge.methods": "mergerec", "mergerec.granularities": "layer", "admission.rollback": True}


def test_coefficients_are_learned_through_the_clients_with_and_without_the_flagged_client(place: Path) -> None:
    folder = run(place, "private", **ATTACK, **LEARNED, **{"privacy.policy": "catalog-private"})
    assert (folder / DONE).is_file()
    assert read_json(folder / "clients.json")["excluded"] == {}
    merged = {path.name: len(read_json(path / "provenance.json")["domains"]) for path in (folder / "merged").iterdir()}
    assert merged == {"mergerec-layer-wise": 5, "mergerec-layer-wise-without-coffee": 4}


def test_a_run_killed_in_its_second_learned_merge_resumes(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes: dict[str, Any] = {**ATTACK, **LEARNED, "run_id": "killed-second"}
    kept = checkpoints.write_candidate

    def dying(run_dir: Path, candidate: Any, name: str) -> None:
        if "without" in candidate.label:
            raise Killed
        kept(run_dir, candidate, name)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write_candidate", dying)
        with pytest.raises(Killed):
            run_in_process(experiment(place, **changes))
    run_in_process(experiment(place, **changes, resume=True))
    folder = place / "runs" / "killed-second"
    assert (folder / DONE).is_file()
    assert {path.name for path in (folder / "merged").iterdir()} == {
        "mergerec-layer-wise",
        "mergerec-layer-wise-without-coffee",
    }


@pytest.mark.parametrize("dies_at", ["second vote", "merging"])
def test_a_run_killed_at_the_gate_resumes(
    place: Path, attacked: Path, dies_at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {**ATTACK, **FULL, "run_id": f"killed-{dies_at.replace(' ', '-')}"}
    asked: list[str] = []

    def answer(message: Message, context: Context) -> Message | None:
        if message.metadata.message_type == records.EVALUATE:
            split = records.read_evaluation_request(message.content)[0].split
            models = records.read_evaluation_request(message.content)[1]
            asked.append(f"{split} {len(models)}")
        return answer_honestly(message, context)

    kept = checkpoints.write_sums

    def dying(run_dir: Path, stage: Any, domain: str, sums: Any) -> None:
        if list((run_dir / "admission").glob("*.json")):
            raise Killed
        kept(run_dir, stage, domain, sums)

    with monkeypatch.context() as patch:
        if dies_at == "merging":
            patch.setattr(merging, "merge_experts", lambda *_, **__: (_ for _ in ()).throw(Killed()))
        else:
            patch.setattr(checkpoints, "write_sums", dying)
        with pytest.raises(Killed):
            run_in_process(experiment(place, **changes), answer)
    before = len(asked)
    run_in_process(experiment(place, **changes, resume=True), answer)
    folder = place / "runs" / str(changes["run_id"])
    for name in ("admission.json", "choice.json", "report.txt", "clients.json"):
        assert (folder / name).read_text() == (attacked / name).read_text(), name
    votes = sum(models == "valid 6" for models in asked[before:])
    assert votes == {"second vote": 4, "merging": 0}[dies_at]


def test_too_few_admitted_experts_end_the_run(place: Path) -> None:
    with pytest.raises(ClientError, match=r"\b4 training clients.*min_train_clients is 5\b.*\n  coffee: admission"):
        run(place, "too-few", **ATTACK, **FULL, **{"server.min_train_clients": 5})


def test_a_client_with_impossible_votes_is_excluded(place: Path) -> None:
    def lying(message: Message, context: Context) -> Message | None:
        honest = answer_honestly(message, context)
        books = int(context.node_config["partition-id"]) == TRAIN.index("books")
        if books and message.metadata.message_type == records.EVALUATE and honest is not None:
            facts = honest.content.config_records["facts"]
            for variant in ("unmasked", "masked"):
                sent = json.loads(str(facts[variant]))
                sent["products"] = np.zeros_like(sent["products"], dtype=float).tolist()
                sent["sums"][0] = [9.0] * len(sent["sums"][0])
                facts[variant] = json.dumps(sent)
        return honest

    run_in_process(experiment(place, run_id="lying", **FULL), lying)
    clients = read_json(place / "runs" / "lying" / "clients.json")
    assert list(clients["excluded"]) == ["books"]
    assert "domain books: its unmasked products of outcomes" in clients["excluded"]["books"]
    assert clients["excluded_in_phase"] == {"books": "admission"}


BENCH = """
title = "One bad client"
experiment = "experiment.toml"
seeds = [0]
baseline = "average"

[[dataset]]
name = "clean"

[[dataset]]
name = "scaled"
[dataset.set]
simulation = { held_out_users = 0.5, attacker = "coffee", attack = "scaled-update", attack_strength = 100.0 }

[[strategy]]
name = "average"
set = { "merge.methods" = "average" }

[[strategy]]
name = "average+gate"
[strategy.set]
merge = { methods = "average" }
admission = { action = "exclude", probe_items = 25, leave_one_out = true }

[[strategy]]
name = "median"
set = { "rounds.rule" = "median", "rounds.number" = 1 }

[[strategy]]
name = "krum"
set = { "rounds.rule" = "krum", "rounds.number" = 1 }
"""


def test_a_benchmark_of_a_bad_client(place: Path) -> None:
    (place / "experiment.toml").write_text(to_toml(experiment(place, **{"privacy.min_users": 2})))
    (place / "bench.toml").write_text(BENCH)
    grid = grid_in(place, "bench")
    lines = finish(grid)
    assert sum(line.startswith("training") for line in lines) == 2  # the robust rules merge the same experts
    clean, scaled = Place("clean", 0, ""), Place("scaled", 0, "")
    assert grid.excluded_by_gate(clean, "average+gate") == {}
    assert list(grid.excluded_by_gate(scaled, "average+gate")) == ["coffee"]
    assert grid.excluded_by_gate(scaled, "average") == {}
    tables = tables_of(grid)
    values = {
        (row["dataset"], row["strategy"], row["domain"]): row["value"]
        for row in tables.results
        if (row["variant"], row["metric"]) == ("unmasked", "ndcg@10")
    }
    for domain in (*TRAIN, "toys"):
        assert values["clean", "average+gate", domain] == values["clean", "average", domain]
    provenance = read_json(grid.merges(scaled, "krum") / "merged" / "krum-1-round" / "provenance.json")
    (taken,) = provenance["rounds"][0]["selected"]
    assert taken != "coffee"
    cells = {(cell["dataset"], cell["strategy"]): cell for cell in tables.cells}
    assert list(cells["scaled", "average+gate"]["excluded"]) == ["coffee"]
    assert "excluded" not in cells["scaled", "average"]
    audited = {(row["strategy"], row["domain"]) for row in tables.leaks if row["model"] == "expert"}
    assert audited == {
        (name, domain) for name in grid.strategies for domain in TRAIN
    }  # excluded clients have sent bytes, too
    costs = {(row["dataset"], row["strategy"]): row for row in tables.costs}
    assert costs["clean", "average+gate"]["bytes_down"] > costs["clean", "average"]["bytes_down"]
    catalogs = sum((place / "domains" / domain / CATALOG_FILE).stat().st_size for domain in TRAIN)
    for dataset in ("clean", "scaled"):  # excluded clients have trained and sent, too
        gated, plain = costs[dataset, "average+gate"], costs[dataset, "average"]
        assert gated["bytes_up"] == plain["bytes_up"] + catalogs
        assert gated["client_seconds"] > plain["client_seconds"]
    page = bench_page(tables)
    assert "Poisoned on purpose." in page
    assert re.search(r"coffee [^<]* \(scaled-update, strength 100\)", page)
    finished = {file: file.stat().st_mtime_ns for file in (place / "bench").rglob("*.json")}
    finish(grid)
    assert finished == {file: file.stat().st_mtime_ns for file in finished}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            'baseline = "average"',
            'baseline = "average"\nleave_one_out = true',
            r"krum.*leave_one_out = true.*\b4 clients",
        ),
        (
            '"rounds.rule" = "krum", "rounds.number" = 1',
            '"rounds.rule" = "krum", "rounds.parameters" = "num_malicious=2"',
            r"krum: 1 problem\n.*\b5 clients.*\b7\b",
        ),
        (
            "leave_one_out = true }",
            "rollback = true }",
            r"average\+gate: admission\.rollback = true",
        ),
        (
            '"rounds.rule" = "median"',
            'simulation.attacker = "books", "rounds.rule" = "median"',
            r"strategy median: simulation\.attack",
        ),
    ],
)
def test_an_invalid_benchmark_is_refused(place: Path, old: str, new: str, message: str) -> None:
    (place / "experiment.toml").write_text(to_toml(experiment(place)))
    assert old in BENCH
    (place / "wrong.toml").write_text(BENCH.replace(old, new, 1))
    with pytest.raises(ConfigError, match=message):
        load_bench(place / "wrong.toml")


@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_an_attacked_client_is_excluded_through_flower(place: Path) -> None:
    folder = place / "runs" / "flower"
    shutil.rmtree(folder, ignore_errors=True)
    (place / "attacked.toml").write_text(to_toml(experiment(place, run_id="flower", **ATTACK, **FULL)))
    command = [sys.executable, "-m", "fedmerge.cli", "run", "attacked.toml"]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / DONE).is_file()
    clients = read_json(folder / "clients.json")
    assert list(clients["excluded"]) == ["coffee"]
    assert clients["excluded"]["coffee"].startswith("admission: its update has norm")
    assert set(read_json(folder / "merged/average/provenance.json")["domains"]) == {*TRAIN} - {"coffee"}
    assert "POISONED ON PURPOSE: coffee" in done.stdout
