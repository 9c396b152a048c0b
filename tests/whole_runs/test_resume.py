"""A run killed at any point resumes there, repeats nothing, and gives the results of an undisturbed run."""

import json
import os
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from flwr.app import Context, Message
from in_process import killed_at_write, small_experiment
from run_folders import hash_results, unlisted_files

from fedmerge.config import ExperimentConfig
from fedmerge.encoder.peft.contents import TENSOR_FILE
from fedmerge.errors import ClientError, ConfigError, RunDirError
from fedmerge.files import read_json, seal, write_json
from fedmerge.mergerec import learn
from fedmerge.mergerec.objective import batch_terms
from fedmerge.runs.folder import locked
from sim.app.messages import records
from sim.app.server.phases import choosing, merging
from sim.local.in_process import Answer, answer_honestly, run_in_process

pytestmark = pytest.mark.federation

TRAIN = ("beauty", "books", "coffee")
DOMAINS = (*TRAIN, "camping")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Domains and backbone of all runs here."""
    place = tmp_path_factory.mktemp("place")
    small_experiment(place)
    return place


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """An undisturbed run."""
    config = small_experiment(place, output_dir=str(place / "whole"), cache_dir=str(place / "whole-cache"))
    run_in_process(config)
    assert unlisted_files(place / "whole" / "run") == []
    return place / "whole" / "run"


def experiment(place: Path, tmp_path: Path, **changes: object) -> ExperimentConfig:
    own = {"output_dir": str(tmp_path / "runs"), "cache_dir": str(tmp_path / "cache")}
    return small_experiment(place, **{**own, **changes})


def tree(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Return every file except the lock, with content and time."""
    return {
        str(file.relative_to(folder)): (file.read_bytes(), file.stat().st_mtime_ns)
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != "lock"
    }


def resumed(config: ExperimentConfig) -> ExperimentConfig:
    return config.model_copy(update={"resume": True})


class Questions:
    """Answers honestly and remembers who was asked what."""

    def __init__(self) -> None:
        self.asked: Counter[tuple[str, str]] = Counter()

    def __call__(self, message: Message, context: Context) -> Message | None:
        what = message.metadata.message_type
        if what == records.EVALUATE:
            what = records.read_evaluation_request(message.content)[0].split
        self.asked[what, DOMAINS[int(context.node_config["partition-id"])]] += 1
        return answer_honestly(message, context)

    def of(self, what: str) -> set[str]:
        return {domain for (asked, domain) in self.asked if asked == what}


def check_kill_and_resume(config: ExperimentConfig, whole: Path, number: int) -> bool:
    """Kill a run at its n-th write, resume it, compare; return True if it got that far."""
    if not killed_at_write(config, number):
        return False
    run = Path(config.output_dir) / "run"
    if not (run / "config.toml").exists():
        with pytest.raises(RunDirError, match=r"config\.toml"):
            run_in_process(resumed(config))
        return True
    have = {
        "train": {file.parent.name for file in run.glob("adapters/[!.]*/training.json")},
        "valid": {file.stem for file in run.glob("validation/*.json")},
        "test": {file.stem for file in run.glob("test/*.json")},
    }
    merges = {file.parent.name: file.stat().st_mtime_ns for file in run.glob("merged/[!.]*/provenance.json")}
    chosen = (run / "choice.json").exists()
    questions = Questions()
    run_in_process(resumed(config), questions)
    assert hash_results(run) == hash_results(whole)
    assert questions.of("train") == set(TRAIN) - have["train"]
    assert questions.of("valid") == (set() if chosen else set(TRAIN) - have["valid"])
    assert questions.of("test") == set(DOMAINS) - have["test"]
    for label, time in merges.items():
        assert (run / "merged" / label / "provenance.json").stat().st_mtime_ns == time
    assert not [file for file in run.rglob("*") if "partial" in file.name]
    assert (run / "DONE").exists()
    return True


# About 60 writes: experts at the clients, experts at the server, merges, validation, choice, test, tables, report.
@pytest.mark.parametrize("number", [1, 25, 33, 45, 58])
def test_a_run_killed_anywhere_gives_the_same_results(place: Path, tmp_path: Path, whole: Path, number: int) -> None:
    assert check_kill_and_resume(experiment(place, tmp_path), whole, number)


LEARNED_STEPS = 3
LEARNED = {
    "merge.methods": "mergerec,adamerging",
    "mergerec.steps": LEARNED_STEPS,
    "mergerec.pseudo_users": "chain",
    "adamerging.steps": 2,
}


def test_a_run_killed_while_it_learns_gives_the_same_results(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the second step of the second learned merge: only the first merge is not repeated."""
    run_in_process(experiment(place, tmp_path / "whole", **LEARNED))
    config, run = experiment(place, tmp_path, **LEARNED), tmp_path / "runs" / "run"
    steps = 0

    def draw_or_die(*arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == LEARNED_STEPS + 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return batch_terms(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(learn, "batch_terms", draw_or_die)
        assert killed_at_write(config, number=10**6)
    assert [folder.name for folder in run.glob("merged/[!.]*")] == ["mergerec-domain-wise"]
    made = tree(run / "merged")
    run_in_process(resumed(config))
    assert made.items() <= tree(run / "merged").items()
    assert hash_results(run) == hash_results(tmp_path / "whole" / "runs" / "run")


@pytest.mark.slow
def test_a_run_killed_at_every_write_gives_the_same_results(place: Path, tmp_path: Path, whole: Path) -> None:
    number = 1
    while check_kill_and_resume(experiment(place, tmp_path / str(number)), whole, number):
        number += 1
    assert number > 50


def test_an_undisturbed_run_asks_every_client_once(place: Path, tmp_path: Path, whole: Path) -> None:
    questions = Questions()
    run_in_process(experiment(place, tmp_path), questions)
    assert hash_results(tmp_path / "runs" / "run") == hash_results(whole)
    assert set(questions.asked.values()) == {1}
    assert questions.of("test") == set(DOMAINS)
    assert questions.of("valid") == questions.of("train") == set(TRAIN)


class Stopped(Exception):
    """Ends a run at a chosen point."""


@contextmanager
def stopping_at(monkeypatch: pytest.MonkeyPatch, module: ModuleType, function: str) -> Iterator[None]:
    """Make the server fail when it calls this function."""

    def stop(*_: Any, **__: Any) -> None:
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(module, function, stop)
        with pytest.raises(Stopped):
            yield


def test_a_damaged_expert_is_requested_again_and_a_damaged_merge_is_repeated(
    place: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = experiment(place, tmp_path)
    run = tmp_path / "runs" / "run"
    with stopping_at(monkeypatch, choosing, "choose"):
        run_in_process(config)
    flip_last_byte(run / "adapters" / "books" / TENSOR_FILE)
    (run / "adapters" / "coffee" / "training.json").unlink()
    flip_last_byte(run / "merged" / "average" / TENSOR_FILE)
    (run / "validation" / "beauty.json").write_text("{")
    questions = Questions()
    run_in_process(resumed(config), questions)
    assert questions.of("train") == {"books", "coffee"}
    assert questions.of("valid") == {"beauty"}
    assert hash_results(run) == hash_results(whole)


def test_a_merged_expert_that_is_lost_is_an_error_with_its_name(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = experiment(place, tmp_path, **{"merge.methods": "average"})
    with stopping_at(monkeypatch, choosing, "choose"):
        run_in_process(config)
    shutil.rmtree(tmp_path / "runs" / "run" / "adapters" / "books")
    with pytest.raises(ClientError, match=r"books"):
        run_in_process(resumed(config), silent("books", "train"))


def silent(domain: str, message_type: str) -> Answer:
    """Return an answer by which one client fails on one type of message."""

    def answer(message: Message, context: Context) -> Message | None:
        its_turn = DOMAINS[int(context.node_config["partition-id"])] == domain
        if its_turn and message.metadata.message_type == message_type:
            return Message(records.error_record("not today", domain), reply_to=message)
        return answer_honestly(message, context)

    return answer


def test_failures_of_finished_phases_stay_and_those_of_a_resumed_phase_are_retried(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = experiment(place, tmp_path, **{"merge.methods": "average"})
    run = tmp_path / "runs" / "run"
    with stopping_at(monkeypatch, choosing, "choose_per_domain"):
        run_in_process(config, silent("coffee", "train"))
    assert json.loads((run / "clients.json").read_text())["excluded_in_phase"] == {"coffee": "train"}
    questions = Questions()
    run_in_process(resumed(config), questions)
    assert not questions.of("train")
    clients = json.loads((run / "clients.json").read_text())
    assert clients["excluded"] == {"coffee": "train failed: not today"}
    assert set(clients["participants"]) == {"beauty", "books", "camping"}
    assert set(json.loads((run / "merged/average/provenance.json").read_text())["domains"]) == {"beauty", "books"}


def test_data_changed_under_a_resumed_run_exclude_their_domain(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = experiment(place, tmp_path, **{"merge.methods": "average"})
    with stopping_at(monkeypatch, merging, "train_experts"):
        run_in_process(config)
    clients = tmp_path / "runs" / "run" / "clients.json"
    reported = read_json(clients)
    reported["participants"]["coffee"]["num_users"] = 29
    write_json(clients, seal(reported))
    run_in_process(resumed(config))
    (reason,) = json.loads(clients.read_text())["excluded"].values()
    assert reason.startswith("its num_users is 30, the server's is 29;")


def test_a_finished_run_does_not_change(whole: Path, place: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = tree(whole)
    config = small_experiment(place, output_dir=str(place / "whole"), cache_dir=str(place / "whole-cache"))
    run_in_process(resumed(config), lambda message, context: None)
    assert tree(whole) == before


def test_another_configuration_is_refused_and_changes_nothing(whole: Path, place: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "run"
    shutil.copytree(whole, run)
    (run / "DONE").unlink()
    before = tree(run)
    config = small_experiment(place, output_dir=str(tmp_path / "runs"), cache_dir=str(place / "whole-cache"))
    changed = config.model_copy(update={"seed": 1, "lora": config.lora.model_copy(update={"rank": 4})})
    with pytest.raises(ConfigError) as caught:
        run_in_process(resumed(changed))
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"{run}: ")
    assert " 2 settings" in lines[0]
    assert lines[1:3] == ["  seed: the run has 0, given is 1", "  lora.rank: the run has 2, given is 4"]
    assert "--set" in lines[3]
    assert tree(run) == before


def test_two_processes_on_one_run_are_refused(whole: Path, place: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "run"
    shutil.copytree(whole, run)
    (run / "DONE").unlink()
    config = small_experiment(place, output_dir=str(tmp_path / "runs"), cache_dir=str(place / "whole-cache"))
    with (
        locked(run),
        pytest.raises(RunDirError, match=rf"{run}: process {os.getpid()} on "),
    ):
        run_in_process(resumed(config))
    run_in_process(resumed(config))  # the lock file of a process that has ended does not count
    assert hash_results(run) == hash_results(whole)


def test_a_second_run_over_the_first_is_refused(whole: Path, place: Path) -> None:
    before = tree(whole)
    with pytest.raises(RunDirError, match=rf"{whole} .*fedmerge run --resume {whole}"):
        run_in_process(small_experiment(place, output_dir=str(place / "whole")))
    assert tree(whole) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with little space."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", disk], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("mounting is not allowed here")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_full_disk_ends_the_run_and_it_resumes_with_more_space(place: Path, whole: Path, small_disk: Path) -> None:
    config = small_experiment(place, output_dir=str(small_disk), cache_dir=str(place / "whole-cache"))
    run = small_disk / "run"
    with pytest.raises(RunDirError, match=r"No space left.*--resume"):
        run_in_process(config)
    assert list(run.glob("adapters/*/training.json"))
    assert not (run / "DONE").exists()
    assert not (run / "merged" / "mergerec-layer-wise").exists()
    subprocess.run(["mount", "-o", "remount,size=10m", small_disk], check=True)
    run_in_process(resumed(config))
    assert hash_results(run) == hash_results(whole)


def test_a_missing_run_cannot_be_resumed(place: Path, tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match=rf"run {tmp_path}/runs/run: "):
        run_in_process(resumed(experiment(place, tmp_path)))


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(bytes(data))
