"""The line of a run in the table of runs, where what is served has been evaluated."""

import json
import shutil
from pathlib import Path

import pytest
from run_folders import TRAIN, output

from fedmerge.files import read_json, write_json
from fedmerge.runs.metric_sums import read_metric_sums

Capsys = pytest.CaptureFixture[str]


@pytest.fixture
def run(reported_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(reported_run, tmp_path / "runs" / reported_run.name))


def lines_of(run: Path, capsys: Capsys) -> list[str]:
    """Return the lines below the header, with single blanks."""
    return [" ".join(line.split()) for line in output(capsys, "runs", "--dir", run.parent).splitlines()[2:]]


def test_a_line_has_the_models_their_score_and_the_verdict(run: Path, capsys: Capsys) -> None:
    sums = read_metric_sums(run, "test", "unmasked")
    served = {"books": "task-arithmetic 0.5", "coffee": "task-arithmetic 0.5", "toys": "expert"}
    score = sum(sums[name].mean(row, "ndcg@10") for name, row in served.items()) / len(served)
    (line,) = lines_of(run, capsys)
    assert f" task-arithmetic 0.5 in 3, own expert in 1 ndcg@10 {score:.4f} above popularity and last item" in line
    (record,) = json.loads(output(capsys, "runs", "--dir", run.parent, "--json"))
    assert record["outcome"]["test"] == pytest.approx(score)
    assert record["served"] == "task-arithmetic 0.5"
    assert record["test"] != pytest.approx(score)  # of the merge in all domains


def test_a_single_model_is_named_without_a_number(run: Path, capsys: Capsys) -> None:
    write_json(run / "choice.json", {**(read_json(run / "choice.json") or {}), "per_domain": {}})
    (line,) = lines_of(run, capsys)
    assert " task-arithmetic 0.5 ndcg@10 " in line


def test_heads_of_all_inputs_count_as_one_kind(run: Path, capsys: Capsys) -> None:
    choice = read_json(run / "choice.json") or {}
    rows = dict(zip(TRAIN, ("head on the merge", "head on the expert, fused", "federated head, fused"), strict=True))
    entries = {name: {**choice["per_domain"][name], "serve": row} for name, row in rows.items()}
    write_json(run / "choice.json", {**choice, "per_domain": entries})
    (line,) = lines_of(run, capsys)
    assert " own head in 2, federated head in 1, task-arithmetic 0.5 in 1 - " in line  # no head was evaluated


def test_absent_domains_are_counted_and_not_listed(run: Path, capsys: Capsys) -> None:
    clients = read_json(run / "clients.json") or {}
    participants = {name: client for name, client in clients["participants"].items() if name != "toys"}
    absent = {"toys": "no client came within 30 s"}
    write_json(run / "clients.json", {"participants": participants, "excluded": {}, "absent": absent})
    (line,) = lines_of(run, capsys)
    assert " books, coffee + 1 unseen, 1 missing " in line


@pytest.mark.parametrize("name", ["metrics.parquet", "products.parquet", "choice.json"])
def test_a_damaged_run_keeps_its_line(run: Path, capsys: Capsys, name: str) -> None:
    (run / name).write_bytes(b"PAR1")
    line, *problems = lines_of(run, capsys)
    assert line.startswith(f"{run.name} done ")
    assert line.endswith(" -")
    assert len(problems) == 1
    assert name in problems[0]
