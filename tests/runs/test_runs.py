"""`fedmerge runs` and `fedmerge show`: what a run was, also where its folder is damaged or unfinished."""

import json
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from run_folders import TRAIN, UNSEEN, Place, make_place, make_run, output, refusal

from fedmerge.adapter import adapter_sha256
from fedmerge.encoder.adapter_records import adapter_record, config_of_adapter
from fedmerge.encoder.peft.folder import read_adapter
from fedmerge.errors import RunDirError
from fedmerge.runs.reading import describe_run, find_run, list_runs, summarise_run

REPOSITORY = Path(__file__).resolve().parents[2]
Capsys = pytest.CaptureFixture[str]
HEADER = "run state started (UTC) seconds domains served on test verdict"
RUN_ID = "trial-20260102-030405-abcd"
FAILED_LOG = """09:00:00 run folder: /somewhere
09:00:09 the run failed
Traceback (most recent call last):
  File "/x/server_app.py", line 72, in main
    _experiment(config, federation, run_dir)
  File "/x/server_app.py", line 90, in _experiment
    raise ClientError(message)
fedmerge.errors.ClientError: 1 training clients are left (books), server.min_train_clients is 2. Excluded:
  coffee (node 4): train failed: ClientError: the loss is nan
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def finished(place: Place) -> Path:
    return make_run(place, RUN_ID)


@pytest.fixture
def runs(finished: Path, tmp_path: Path) -> Path:
    """A folder with a run that is done, one that failed and one that was killed; and something else."""
    root = tmp_path / "runs"
    shutil.copytree(finished, root / RUN_ID)
    for name, log in (("trial-failed", FAILED_LOG), ("trial-killed", FAILED_LOG.splitlines()[0])):
        shutil.copytree(finished, root / name)
        for file in ("DONE", "choice.json", "metrics.parquet", "report.txt"):
            (root / name / file).unlink()
        (root / name / "run.log").write_text(log)
    (root / "notes").mkdir()
    (root / "notes" / "config.toml").write_text("seed = 1\n")
    (root / "file").write_text("")
    return root


# Finding


def test_a_run_is_found_by_its_path_its_id_or_a_prefix_of_its_id(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [folder.name for folder in list_runs(runs)] == [RUN_ID, "trial-failed", "trial-killed"]
    for name in (str(runs / RUN_ID), RUN_ID, "trial-2026"):
        assert find_run(name, runs) == runs / RUN_ID
    monkeypatch.chdir(runs)
    assert find_run("trial-failed", Path("elsewhere")) == runs / "trial-failed"
    monkeypatch.chdir(runs / RUN_ID)
    assert find_run(".", Path("elsewhere")) == runs / RUN_ID


def test_a_name_that_matches_no_run_or_several_runs_is_refused(runs: Path) -> None:
    with pytest.raises(RunDirError, match=f"'trial'.* 3 runs in {runs} .*: {RUN_ID}, trial-failed, trial-killed"):
        find_run("trial", runs)
    with pytest.raises(RunDirError, match=rf"'x'.* {runs}.* trial-failed.*--dir"):
        find_run("x", runs)
    with pytest.raises(RunDirError, match=rf"'x'.* {runs}/notes.*--dir"):
        find_run("x", runs / "notes")
    with pytest.raises(RunDirError, match=rf"{runs}/notes: .*environment\.json, run\.log, clients\.json, DONE"):
        find_run(str(runs / "notes"), runs)
    with pytest.raises(RunDirError, match=r"^run: "):
        find_run("", runs)
    with pytest.raises(RunDirError, match=rf"{runs}/gone: .*--dir"):
        list_runs(runs / "gone")


# Summaries


def test_a_finished_run_in_a_line(runs: Path) -> None:
    run = summarise_run(runs / RUN_ID)
    assert (run.id, run.folder, run.state, run.seconds) == (RUN_ID, runs / RUN_ID, "done", 90.0)
    assert run.started == datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    assert (run.train, run.unseen) == (TRAIN, (UNSEEN,))
    assert run.methods == ("average", "task-arithmetic", "mergerec")
    assert (run.metric, run.served, run.synthetic, run.problems) == ("ndcg@10", "average", True, ())
    assert run.test == pytest.approx((0.25 + 0.5 + 0.75) / 3)  # the unseen domain has no part in it


def test_failed_and_unfinished_runs_are_told_apart(runs: Path) -> None:
    failed, killed = describe_run(runs / "trial-failed"), describe_run(runs / "trial-killed")
    assert (failed.summary.state, killed.summary.state) == ("failed", "incomplete")
    assert failed.failure == (
        "ClientError: 1 training clients are left (books), server.min_train_clients is 2. Excluded:\n"
        "  coffee (node 4): train failed: ClientError: the loss is nan"
    )
    assert killed.failure is None
    assert failed.summary.test is None
    assert failed.summary.problems == ()
    log = runs / "trial-failed" / "run.log"
    log.write_text(f"{FAILED_LOG}09:10:00 training: books, coffee\n")  # taken up again
    assert summarise_run(runs / "trial-failed").state == "incomplete"


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("config.toml", b"seed = [", "config.toml is not valid TOML"),
        ("config.toml", None, "config.toml is missing"),
        ("choice.json", b"{", "choice.json: damaged"),
        ("choice.json", b"[]", "choice.json: found a JSON list, expected an object"),
        ("clients.json", b"\xff", "clients.json: damaged"),
        ("metrics.parquet", b"PAR1", "metrics.parquet: damaged"),
        ("run.log", b"\xff\xfe", "run.log cannot be read"),
        ("adapters/toys/training.json", b"{", "training.json: damaged"),
        ("merged/average/provenance.json", b"", "provenance.json: damaged"),
    ],
)
def test_a_damaged_file_is_named_and_the_rest_is_shown(
    runs: Path, capsys: Capsys, file: str, content: bytes | None, problem: str
) -> None:
    path = runs / RUN_ID / file
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    (runs / RUN_ID / "DONE").unlink()
    for text in (output(capsys, "show", RUN_ID, "--dir", runs), output(capsys, "runs", "--dir", runs)):
        assert RUN_ID in text
        if "/" not in file:
            assert problem in text
    assert problem in output(capsys, "show", RUN_ID, "--dir", runs)
    assert problem in " ".join(json.loads(output(capsys, "show", RUN_ID, "--dir", runs, "--json"))["problems"])


def test_records_of_another_shape_are_survived(runs: Path, capsys: Capsys) -> None:
    folder = runs / RUN_ID
    (folder / "clients.json").write_text('{"participants": [1], "excluded": 3}')
    (folder / "choice.json").write_text('{"served": ["a"], "validation": 4, "metric": null}')
    (folder / "merged" / "average" / "provenance.json").write_text('{"coefficients": 3}')
    (folder / "config.toml").write_text('domains = 3\nmerge = "x"\n')
    assert "coefficients not recorded" in output(capsys, "show", folder)
    assert RUN_ID in output(capsys, "runs", "--dir", runs)


# Adapters


def test_an_adapter_knows_its_run_and_its_record(place: Place, finished: Path, tmp_path: Path) -> None:
    expert, merge = finished / "adapters" / "toys", finished / "merged" / "average"
    backbone = place.backbone().sha256
    for folder in (expert, merge):
        assert config_of_adapter(folder) == finished / "config.toml"
        record = adapter_record(folder)
        assert (record.sha256, record.backbone_sha256) == (adapter_sha256(read_adapter(folder)), backbone)
    shutil.copytree(merge, tmp_path / "mine")
    (tmp_path / "mine" / "provenance.json").unlink()
    assert config_of_adapter(tmp_path / "mine") is None
    record = adapter_record(tmp_path / "mine")
    assert (record.sha256, record.backbone_sha256) == (None, None)


# Commands


def test_runs_prints_a_table_or_json(runs: Path, capsys: Capsys) -> None:
    lines = output(capsys, "runs", "--dir", runs).splitlines()
    assert lines[0].split() == HEADER.split()
    row = f"{RUN_ID} done 2026-01-02 03:04 90 books, coffee, toys + 1 unseen, 1 missing "
    row += "average ndcg@10 0.5000 -"
    assert " ".join(lines[2].split()) == row
    assert [line.split()[:2] for line in lines[3:5]] == [["trial-failed", "failed"], ["trial-killed", "incomplete"]]
    assert lines[5].startswith(f"{RUN_ID}: {runs / RUN_ID}/products.parquet: not found")  # so there is no verdict
    assert len(lines) == 6
    records = json.loads(output(capsys, "runs", "--dir", runs, "--json"))
    assert [record["state"] for record in records] == ["done", "failed", "incomplete"]
    assert records[0]["started"] == "2026-01-02T03:04:05+00:00"
    assert records[0]["test"] == pytest.approx(0.5)
    assert records[0]["outcome"] == {"served": "average", "test": records[0]["test"], "verdict": None}
    (runs / "empty").mkdir()
    assert output(capsys, "runs", "--dir", runs / "empty") == f"{runs / 'empty'}: no runs\n"
    assert f"{runs}/gone: " in refusal(capsys, "runs", "--dir", runs / "gone")


@pytest.mark.long
def test_show_tells_what_a_run_was(runs: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fedmerge.cli", "show", "trial-2026", "--dir", str(runs)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    text = done.stdout
    for wanted in (
        f"run           {RUN_ID}  (SYNTHETIC DATA)",
        "state         done in 90 s, started 2026-01-02 03:04 UTC",
        "books (train): 12 users, 20 items, 1,234 interactions; 7 steps, best at 6, 12 s",
        "camping (unseen): 12 users",
        "missing       garden (node 7): excluded: query.describe failed",
        "merged/average: books 0.333, coffee 0.333, toys 0.333",
        "served        average (ndcg@10 0.4000 on validation, ndcg@10 0.5000 on test; mean over training",
        f"{runs / RUN_ID / 'adapters'}  (each domain's expert)",
        "\nSYNTHETIC DATA\nthe tables",
    ):
        assert wanted in text


def test_show_as_json_holds_everything_but_the_loss_curves(runs: Path, capsys: Capsys) -> None:
    output(capsys, "merge", runs / RUN_ID, "--exclude", "toys", "--set", "merge.methods=average")
    record = json.loads(output(capsys, "show", RUN_ID, "--dir", runs, "--json"))
    assert record["settings"]["text.max_tokens"] == 96
    assert set(record["participants"]) == {*TRAIN, UNSEEN}
    assert record["experts"]["toys"]["best_step"] == 6
    assert [merge["method"] for merge in record["merges"]] == ["average", "mergerec", "task-arithmetic"]
    assert all("losses" not in merge for merge in record["merges"])
    (remerge,) = record["remerges"]
    assert list(remerge["excluded"]) == ["toys"]
    assert record["choice"]["served"] == "average"
    text = output(capsys, "show", RUN_ID, "--dir", runs)
    assert "/average: books 0.500, coffee 0.500; without toys" in text
    assert "ClientError: 1 training clients are left" in output(capsys, "show", "trial-failed", "--dir", runs)
    assert "state         incomplete: " in output(capsys, "show", runs / "trial-killed")
    assert "2 runs in" in refusal(capsys, "show", "trial-", "--dir", runs).replace("3 runs in", "2 runs in")
