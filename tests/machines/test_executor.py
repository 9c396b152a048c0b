"""The executor of an organisation's client: settings that a run cannot decide, and work in a separate process."""

import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Context, RecordDict

import sim.machines.executor
from fedmerge.config import ExperimentConfig, from_flat, to_flat
from fedmerge.domain.demo import write_demo
from fedmerge.errors import PolicyError
from fedmerge.organisation.folder import Client, init_client, read_client
from sim.machines.executor import in_own_process, limit_time, override_run_config


@pytest.fixture
def client(tmp_path: Path) -> Client:
    write_demo(tmp_path / "domains", num_domains=2, num_users=10, num_items=20)
    init_client(tmp_path / "north", "north", tmp_path / "domains" / "beauty", threads=2, backbone="own/encoder")
    return read_client(tmp_path / "north")


def test_settings_of_client_toml_override_those_of_a_run(client: Client, tmp_path: Path) -> None:
    wanted: dict[str, str | int | float | bool] = {
        "cache_dir": "/srv/elsewhere",
        "domains.root": "/srv/other",
        "backbone.source": "evil/encoder",
        "runtime.threads_per_client": 64,
        "seed": 3,
    }
    run_config: dict[str, str | int | float | bool] = {**to_flat(ExperimentConfig()), **wanted}
    context = Context(1, 2, {"domain-path": "/elsewhere", "more": 1}, RecordDict(), run_config)
    override_run_config(context, client)
    config = from_flat(context.run_config)
    assert config.cache_dir == str(client.cache_dir)
    assert config.domains.root == str(tmp_path / "domains")
    assert (config.backbone.source, config.runtime.threads_per_client, config.seed) == ("own/encoder", 2, 3)
    assert context.node_config == {
        "domain-path": str(tmp_path / "domains" / "beauty"),
        "policy-path": str(client.folder / "policy.toml"),
        "key-path": str(client.folder / "key"),
        "disclosed-path": str(client.disclosed),
    }
    named = replace(client, identity_key=tmp_path / "identity", peer_keys=tmp_path / "peers")
    override_run_config(context, named)
    assert context.node_config["identity-key"] == str(tmp_path / "identity")
    assert context.node_config["peer-keys"] == str(tmp_path / "peers")


def test_the_work_is_done_in_another_process_and_its_answer_comes_back() -> None:
    before = {"value": 1}

    def work() -> tuple[RecordDict, RecordDict]:
        before["value"] = 2
        facts = ConfigRecord({"pid": os.getpid(), "data": b"x" * 100_000})
        return RecordDict({"facts": facts}), RecordDict({"secrets": ConfigRecord({"state": "kept"})})

    content, state = in_own_process(work, lambda: True)
    assert state.config_records["secrets"]["state"] == "kept"
    assert content.config_records["facts"]["pid"] != os.getpid()
    assert content.config_records["facts"]["data"] == b"x" * 100_000
    assert before == {"value": 1}


def open_files(process: int | str = "self") -> set[str]:
    """Return what a process has open, as Linux names it."""
    found = set()
    for link in Path(f"/proc/{process}/fd").iterdir():
        with suppress(OSError):  # the descriptor that lists the folder is gone
            found.add(os.readlink(link))
    return found


def test_the_secrets_of_a_secure_sum_are_in_no_file_on_disk() -> None:
    """A deleted temporary file still has its blocks on the disk; what passes between the processes is in memory."""
    before, parents = open_files(), set()
    secret = os.urandom(32)

    def work() -> tuple[RecordDict, RecordDict]:
        found = "\n".join(sorted(open_files() - before))
        secrets = RecordDict({"secure sum": ConfigRecord({"state": secret})})
        return RecordDict({"facts": ConfigRecord({"open": found})}), secrets

    def look() -> bool:
        parents.update(open_files() - before)
        return True

    content, state = in_own_process(work, look)
    assert state.config_records["secure sum"]["state"] == secret
    children = set(str(content.config_records["facts"]["open"]).split("\n"))
    for found in (parents, children):
        named = {link for link in found if link.startswith("/") and not link.startswith(("/proc/", "/dev/"))}
        assert {link.partition(":")[0] for link in named} == {"/memfd"}, named
    assert open_files() == before


def killed() -> tuple[RecordDict, RecordDict]:
    os.kill(os.getpid(), signal.SIGKILL)
    return RecordDict(), RecordDict()


def raises() -> tuple[RecordDict, RecordDict]:
    raise SystemExit(5)


def test_a_process_that_dies_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ChildProcessError, match="signal 9"):
        in_own_process(killed, lambda: True)
    monkeypatch.setattr(sys, "stderr", open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    with pytest.raises(ChildProcessError, match="exit code 1"):
        in_own_process(raises, lambda: True)


def test_a_run_that_is_stopped_ends_the_work_at_once() -> None:
    started = time.monotonic()
    seen: list[int] = []

    def hangs() -> tuple[RecordDict, RecordDict]:
        time.sleep(60)
        return RecordDict(), RecordDict()

    def three_times() -> bool:
        seen.append(1)
        return len(seen) < 3

    with pytest.raises(ChildProcessError):
        in_own_process(hangs, three_times)
    assert time.monotonic() - started < 20
    with pytest.raises(ChildProcessError):  # no child is left behind
        os.waitpid(-1, os.WNOHANG)


def test_work_ends_when_the_organisations_minutes_are_over() -> None:
    started, beats = time.monotonic(), []

    def hangs() -> tuple[RecordDict, RecordDict]:
        time.sleep(60)
        return RecordDict(), RecordDict()

    def beat() -> bool:
        beats.append(1)
        return True

    with pytest.raises(PolicyError, match=r"north.*max_minutes = 0\.01.*train\.max_steps"):
        in_own_process(hangs, limit_time(0.01, "north", beat))
    assert 0.6 <= time.monotonic() - started < 20
    assert beats
    with pytest.raises(ChildProcessError):  # no child is left behind
        os.waitpid(-1, os.WNOHANG)
    assert limit_time(None, "north", beat)()
    assert not limit_time(1.0, "north", lambda: False)()


def test_the_executor_takes_the_installed_code_only() -> None:
    """It imports nothing that could unpack or load an app."""
    text = Path(sim.machines.executor.__file__).read_text()
    assert "install_from_fab" not in text
    assert "load_client_app" not in text
