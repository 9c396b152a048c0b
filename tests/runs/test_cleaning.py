"""`fedmerge runs clean` and `--resume` without a name: what is kept, what is deleted, which run is the latest."""

import shutil
from pathlib import Path

import pytest
from run_folders import contents, make_place, make_run, output, refusal

from fedmerge.cli.run import LATEST, _config_to_resume
from fedmerge.errors import RunDirError
from fedmerge.files import folder_size
from fedmerge.runs.folder import locked
from fedmerge.runs.overview.cleaning import plan_cleaning
from fedmerge.runs.overview.resuming import latest_to_resume, why_not_resumed

Capsys = pytest.CaptureFixture[str]
FAILED = """09:00:09 the run failed
Traceback (most recent call last):
  File "/x/app.py", line 72, in main
    raise {error}(message)
fedmerge.errors.{error}: 1 training clients are left
"""
FIRST, COPY, OTHER = (f"shop-2026010{day}-030405-abcd" for day in (1, 2, 3))
KILLED, WRONG, LATER = (f"shop-2026010{day}-030405-abcd" for day in (4, 5, 6))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(make_place(tmp_path_factory.mktemp("place")), FIRST, ["name=shop"])


@pytest.fixture
def runs(finished: Path, tmp_path: Path) -> Path:
    """A finished run, the same again, one with other results; a killed run, one that would fail again."""
    root = tmp_path / "runs"
    for name in (FIRST, COPY, OTHER, KILLED, WRONG, LATER):
        shutil.copytree(finished, root / name)
    choice = (root / OTHER / "choice.json").read_text()
    (root / OTHER / "choice.json").write_text(choice.replace("0.4", "0.5"))
    for name in (KILLED, WRONG, LATER):
        (root / name / "DONE").unlink()
    (root / KILLED / "run.log").write_text("09:00:00 training\n")
    (root / WRONG / "run.log").write_text(FAILED.format(error="ConfigError"))
    shutil.rmtree(root / WRONG / "adapters")
    (root / LATER / "run.log").write_text(FAILED.format(error="ClientError"))
    return root


def planned(runs: Path, *named: str) -> dict[str, tuple[bool, str]]:
    return {run.folder.name: (run.is_deleted, run.why) for run in plan_cleaning(runs, [runs / name for name in named])}


def test_only_runs_from_which_nothing_is_lost_are_deleted(runs: Path) -> None:
    assert planned(runs) == {
        FIRST: (False, "the only copy of its results"),
        COPY: (True, f"same settings and results as {FIRST}, which is kept"),
        OTHER: (False, "the only copy of its results"),
        KILLED: (False, f"can be resumed: fedmerge run --resume {runs / KILLED}"),
        WRONG: (
            True,
            "nothing was trained, and it would fail in the same way: ConfigError: 1 training clients are left",
        ),
        LATER: (False, f"can be resumed: fedmerge run --resume {runs / LATER}"),
    }


@pytest.mark.parametrize("own", ["remerged/later", "released.jsonl", "head/head.json"])
def test_a_copy_with_something_of_its_own_is_kept(runs: Path, own: str) -> None:
    path = runs / COPY / own
    path.parent.mkdir(exist_ok=True)
    path.write_text("{}")
    assert planned(runs)[COPY] == (False, "the only copy of its results")


def test_what_clients_sent_is_kept_though_it_cannot_be_resumed(runs: Path) -> None:
    shutil.copytree(runs / FIRST / "adapters", runs / WRONG / "adapters")
    is_deleted, why = planned(runs)[WRONG]
    assert not is_deleted
    assert why.endswith("but holds what its clients sent")


def test_the_command_lists_first_and_deletes_with_yes(runs: Path, capsys: Capsys) -> None:
    before = contents(runs)
    told = output(capsys, "runs", "clean", "--dir", runs)
    assert contents(runs) == before
    assert "Nothing was deleted; add --yes to delete them." in told
    size = sum(folder_size(runs / name) for name in (COPY, WRONG))
    assert f"2 of 6 runs, {size / 1000:.1f} kB" in told or f"2 of 6 runs, {size / 1e6:.1f} MB" in told
    told = output(capsys, "runs", "--dir", runs, "clean", "--yes")  # the option may stand before the action
    assert "deleted: 2 of 6 runs" in told
    assert sorted(path.name for path in runs.iterdir()) == [FIRST, OTHER, KILLED, LATER]
    assert "nothing to delete among 4 runs" in output(capsys, "runs", "clean", "--dir", runs)


def test_named_runs_are_deleted_unless_a_process_works_on_them(runs: Path, capsys: Capsys) -> None:
    told = output(capsys, "runs", "clean", OTHER, KILLED[:14], "--dir", runs)
    assert "its merges and results may exist nowhere else" in told
    assert "what it has trained so far may exist nowhere else" in told
    with locked(runs / KILLED):
        assert planned(runs)[KILLED] == (False, "a process is working on it")
        told = output(capsys, "runs", "clean", KILLED, OTHER, "--dir", runs, "--yes")
        assert "a process is working on it; end that first" in told
    assert (runs / KILLED).is_dir()
    assert not (runs / OTHER).exists()
    assert "nothing" in refusal(capsys, "runs", "clean", "nothing", "--dir", runs)


# The latest run


def test_the_latest_run_that_can_be_resumed_is_found(runs: Path) -> None:
    assert why_not_resumed(runs / FIRST) == "it is finished"
    assert why_not_resumed(runs / WRONG).startswith("it would fail in the same way: ConfigError")
    assert latest_to_resume(runs) == runs / LATER
    shutil.rmtree(runs / LATER)
    assert latest_to_resume(runs) == runs / KILLED
    assert latest_to_resume(runs, "shop") == runs / KILLED
    later = shutil.copytree(runs / KILLED, runs / "shop-small-20260109-030405-abcd")  # of another experiment
    (later / "config.toml").write_text((later / "config.toml").read_text().replace('"shop"', '"shop-small"'))
    own = shutil.copytree(runs / KILLED, runs / "first")  # an id of its own
    assert latest_to_resume(runs, "shop-small") == later
    assert latest_to_resume(runs, "shop") in (runs / KILLED, own)
    shutil.rmtree(runs / KILLED)
    assert latest_to_resume(runs, "shop") == own
    shutil.rmtree(later)
    own.rename(runs / KILLED)
    with pytest.raises(RunDirError, match="found 0 runs of sho, none of which"):
        latest_to_resume(runs, "sho")
    (runs / KILLED / "config.toml").unlink()
    with pytest.raises(RunDirError, match="none of which can be resumed"):
        latest_to_resume(runs)


def test_resume_without_a_name_takes_the_latest(runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capsys) -> None:
    monkeypatch.chdir(runs.parent)
    config = _config_to_resume(LATEST, None, [])
    assert (config.run_id, config.resume) == (LATER, True)
    assert f"resuming runs/{LATER}" in capsys.readouterr().out
