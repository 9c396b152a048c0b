"""Processes killed in runs with Flower and Ray: `fedmerge run` reports it, and --resume gives identical results.

One run is killed three times and resumed three times: its server after the first adapter, a client's Ray worker during
training, the SuperLink after validation; it is resumed once more after its end. An undisturbed run in one process is
the reference.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from backbones import tiny_bert
from run_folders import hash_results

from fedmerge.config import load_config
from fedmerge.domain.demo import write_demo
from sim.local.in_process import run_in_process

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

TRAIN = ("beauty", "books", "coffee")
TOKEN = "FEDMERGE_TEST_KILL"
EXPERIMENT = """
name = "killed"

[domains]
train = "beauty,books,coffee"
unseen = "camping"

[text]
max_attribute_tokens = 24
max_items = 3
max_tokens = 96

[lora]
rank = 2
alpha = 4

[train]
learning_rate = 0.03
batch_size = 32
max_steps = 50
validate_every_steps = 10

[merge]
task_arithmetic_coefficients = "0.4"

[mergerec]
steps = 3

[runtime]
device = "cpu"
precision = "float32"
server_threads = 1
"""


class Command:
    """`fedmerge run` in a separate process."""

    def __init__(self, place: Path, *arguments: str) -> None:
        self.log = place / f"{len(list(place.glob('*.log')))}.log"
        self.token = self.log.name
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fedmerge.cli", "run", *arguments],
                cwd=place,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, TOKEN: self.token},
            )

    def output(self) -> str:
        return self.log.read_text()

    def end(self) -> int:
        """Wait for its end, remove the logs that it left, and return its exit code."""
        try:
            code = self.process.wait(timeout=600)
        finally:
            self.process.terminate()  # if it is still running, it ends all processes that it started
        if kept := re.search(r"logs are (?:kept )?in (/.+)$", self.output().strip()):
            for folder in kept.group(1).split(" and "):
                shutil.rmtree(folder, ignore_errors=True)
        return code

    def processes(self, name: str) -> set[int]:
        """Return its processes with this name at the start of their command line."""
        entry, found = f"{TOKEN}={self.token}".encode(), set()
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if name.encode() not in b" ".join((folder / "cmdline").read_bytes().split(b"\0")[:3]):
                    continue
                parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
                environments = [(folder / "environ").read_bytes(), Path(f"/proc/{parent}/environ").read_bytes()]
            except OSError:
                continue
            if any(entry in environment.split(b"\0") for environment in environments):
                found.add(int(folder.name))
        return found

    def kill(self, name: str, when: Callable[[], bool], hold: str = "") -> None:
        """Send SIGKILL to every process with this name as soon as ``when()`` is true.

        The processes are looked up before, since that takes long. Processes named by ``hold`` are stopped first;
        otherwise they could finish before anything notices the kill.
        """
        pids: set[int] = set()
        held: set[int] = set()
        while not (pids and (held or not hold) and when()):
            assert self.process.poll() is None, self.output()
            pids = pids or self.processes(name)
            held = held or (self.processes(hold) if hold else set())
            time.sleep(0.01)
        for pid in held:
            os.kill(pid, signal.SIGSTOP)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Domains, a backbone and the experiment file."""
    place = tmp_path_factory.mktemp("kill")
    write_demo(place / "domains", num_domains=8, num_users=80, num_items=40)
    tiny_bert(place / "backbone")
    (place / "experiment.toml").write_text(EXPERIMENT)
    return place


def settings(place: Path, run_id: str) -> list[str]:
    own = {
        "run_id": run_id,
        "output_dir": place / "runs",
        "cache_dir": place / f"cache-{run_id}",
        "domains.root": place / "domains",
        "backbone.source": place / "backbone",
        "runtime.threads_per_client": len(os.sched_getaffinity(0)),  # one client at a time
    }
    return ["experiment.toml", "--set", *(f"{key}={value}" for key, value in own.items())]


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """An undisturbed run in this process."""
    _, _, *changes = settings(place, "whole")
    run_in_process(load_config(place / "experiment.toml", changes))
    return place / "runs" / "whole"


@pytest.fixture(scope="module")
def killed(place: Path) -> Path:
    """A run that was killed three times."""
    run, cache = place / "runs" / "killed", place / "cache-killed" / "experts"

    first = Command(place, *settings(place, "killed"))
    first.kill("flwr-simulation", lambda: bool(list(run.glob("adapters/[!.]*/training.json"))))
    assert first.end() == 1, first.output()
    assert f"resume with: fedmerge run --resume {run}" in first.output()
    assert re.search("the process of server and simulation died|finished:failed", first.output())
    arrived = {file.parent.name for file in run.glob("adapters/[!.]*/training.json")}
    assert arrived
    assert arrived != set(TRAIN)

    second = Command(place, "--resume", str(run))
    second.kill("ray::ClientAppActor", lambda: bool(list(cache.glob("coffee-*.checkpoint.safetensors"))))
    assert second.end() == 1, second.output()
    assert re.search(r"coffee: the process that simulated it died in train", second.output())
    assert f"resume with: fedmerge run --resume {run}" in second.output()
    assert not any(f"answered ({domain}" in second.output().partition("training:")[2] for domain in arrived)
    assert not (run / "experts.json").exists()

    third = Command(place, "--resume", "killed")
    third.kill("flower-superlink", (run / "choice.json").exists, hold="flwr-simulation")
    assert third.end() == 1, third.output()
    assert f"resume with: fedmerge run --resume {run}" in third.output()
    assert "resuming at step" in third.output()
    assert not (run / "DONE").exists()

    fourth = Command(place, "--resume", "killed", *settings(place, "killed"))
    fourth.kill("flower-superlink", (run / "DONE").exists)  # too late to do harm
    assert fourth.end() == 0, fourth.output()
    assert "resume with" not in fourth.output()
    assert "training:" not in fourth.output().replace("training: already on disk: beauty, books, coffee", "")
    assert "evaluating on valid" not in fourth.output()
    return run


def test_a_run_killed_three_times_has_the_results_of_an_undisturbed_run(whole: Path, killed: Path) -> None:
    assert (killed / "DONE").exists()
    assert hash_results(killed) == hash_results(whole)
    assert len(hash_results(killed)) > 20


def test_a_finished_run_a_second_run_over_it_and_another_configuration_change_nothing(place: Path, whole: Path) -> None:
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in whole.rglob("*") if file.is_file()}
    again = Command(place, "--resume", "whole")
    assert again.end() == 0
    assert "this run is finished; nothing is left to do" in again.output()

    over = Command(place, *settings(place, "whole"))
    assert over.end() == 1
    assert "runs/whole exists" in over.output()

    (whole / "DONE").rename(place / "DONE")
    other = Command(place, "--resume", "whole", *settings(place, "whole"), "train.max_steps=7")
    assert other.end() == 1
    assert "  train.max_steps: the run has 50, given is 7" in other.output()
    (place / "DONE").rename(whole / "DONE")
    after = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in whole.rglob("*") if file.is_file()}
    assert after == before
