"""The launcher of `flwr run`: refusals before the start; real runs that succeed, fail, collide, or are interrupted."""

import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fedmerge.config import from_flat
from fedmerge.domain.demo import write_demo
from fedmerge.errors import ClientError, ConfigError, RunDirError
from fedmerge.runs.folder import locked
from sim.local import launch
from sim.local.launch import (
    MARK,
    FederationOutcome,
    end_processes,
    flower_environment,
    marked_processes,
    run_federation,
)
from sim.local.run import run_experiment

REPOSITORY = Path(__file__).resolve().parents[2]
PYPROJECT = """
[project]
name = "trial"
version = "0.1.0"
description = "one message to each node"
license = { text = "Apache-2.0" }
dependencies = []
[tool.flwr.app]
publisher = "nobody"
[tool.flwr.app.components]
serverapp = "trial.server_app:app"
clientapp = "trial.client_app:app"
[tool.flwr.app.config]
gate = ""
fail = false
"""
SERVER_APP = """
import os
import time

from flwr.app import Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()


@app.main()
def main(grid, context):
    print("server starts with", os.environ["TRIAL_VALUE"], "in", os.getcwd())
    gate = context.run_config["gate"]
    for _ in range(600):  # a minute for the reader of the line above to open the gate
        if not gate or os.path.exists(gate):
            break
        time.sleep(0.1)
    else:
        raise TimeoutError("the gate stayed shut")
    if context.run_config["fail"]:
        raise ValueError("fails as told")
    while len(nodes := list(grid.get_node_ids())) < 2:
        time.sleep(0.1)
    messages = [Message(RecordDict(), dst_node_id=node, message_type="query.hello") for node in nodes]
    for reply in grid.send_and_receive(messages):
        print("reply from partition", reply.content["answer"]["partition"])
"""
CLIENT_APP = """
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.query("hello")
def hello(message, context):
    partition = context.node_config["partition-id"]
    print("client", partition, "speaks")
    return Message(RecordDict({"answer": ConfigRecord({"partition": partition})}), reply_to=message)
"""


def write_app(folder: Path, **run_config: str | bool) -> tuple[Path, Path]:
    """Write a Flower app and its run config."""
    (folder / "app" / "trial").mkdir(parents=True)
    (folder / "app" / "pyproject.toml").write_text(PYPROJECT)
    for name, text in {"__init__": "", "server_app": SERVER_APP, "client_app": CLIENT_APP}.items():
        (folder / "app" / "trial" / f"{name}.py").write_text(text)
    lines = [
        f"{key} = {str(value).lower() if isinstance(value, bool) else repr(value)}\n"
        for key, value in run_config.items()
    ]
    (folder / "run.toml").write_text("".join(lines))
    return folder / "app", folder / "run.toml"


def processes_of(home: Path) -> set[int]:
    """Return the processes with this FLWR_HOME, independent of the launcher's own search."""
    found = set()
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"FLWR_HOME={home}".encode() in environ.read_bytes().split(b"\0"):
                found.add(int(environ.parent.name))
        except OSError:
            continue
    return found


def not_called(line: str) -> None:
    raise AssertionError(line)


def test_environment_is_offline_private_and_finds_this_venv_first() -> None:
    variables = flower_environment(
        Path("/h"), 23456, {"PATH": "/usr/bin", "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
    )
    assert variables["FLWR_HOME"] == "/h"
    assert variables["FLWR_LOCAL_SUPERLINK_HTTP_API_PORT"] == "23456"
    assert variables["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == variables["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert variables["FLWR_TELEMETRY_ENABLED"] == variables["RAY_USAGE_STATS_ENABLED"] == "0"
    assert variables["PATH"] == f"{Path(sys.executable).parent}:/usr/bin"
    assert variables["HF_HUB_OFFLINE"] == "1"
    assert "PYTHONDONTWRITEBYTECODE" not in variables


def test_every_process_with_the_mark_is_ended_even_one_that_ignores_sigterm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "GRACE_SECONDS", 0.3)
    stubborn = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
    )
    detached = {"stdout": subprocess.PIPE, "start_new_session": True}
    with (
        subprocess.Popen([sys.executable, "-c", stubborn], env={MARK: "trial-a"}, **detached) as first,  # type: ignore[call-overload]
        subprocess.Popen(["sleep", "60"], env={MARK: "trial-ab"}, **detached) as other,  # type: ignore[call-overload]
    ):
        reaper = threading.Thread(target=first.wait)  # otherwise it stays a zombie
        reaper.start()
        assert first.stdout.readline() == b"1\n"
        assert marked_processes("trial-a") == {first.pid}
        end_processes("trial-a")
        reaper.join(5)
        assert first.returncode == -signal.SIGKILL
        assert other.poll() is None, "a process with another mark was ended"
        other.kill()


def test_a_process_that_has_lost_the_mark_is_ended_with_its_parent_even_one_that_ignores_sigterm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launch, "GRACE_SECONDS", 0.3)
    child = "trap '' TERM; echo ready; for _ in $(seq 60); do sleep 1; done"  # as Ray's agents: no mark
    parent = f"import subprocess; subprocess.run(['sh', '-c', {child!r}], env={{}}, start_new_session=True)"
    variables = {MARK: "trial-parent"}
    with subprocess.Popen([sys.executable, "-c", parent], env=variables, stdout=subprocess.PIPE) as process:
        reaper = threading.Thread(target=process.wait)  # otherwise it stays a zombie
        reaper.start()
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        assert len(marked_processes("trial-parent")) >= 2
        end_processes("trial-parent")
        reaper.join(5)
        assert process.returncode == -signal.SIGTERM
        assert select.select([process.stdout], [], [], 5)[0], "the child lives, and holds the other end of the pipe"


@pytest.mark.long
def test_a_process_that_shows_no_mark_during_exec_is_ended(tmp_path: Path) -> None:
    script = tmp_path / "again.sh"
    script.write_text(f"exec sh {script}\n")  # its environment reads as empty about one time in five
    for turn in range(6):
        with subprocess.Popen(["sh", script], env={MARK: f"again-{turn}"}, start_new_session=True) as process:
            reaper = threading.Thread(target=process.wait)  # otherwise it stays a zombie
            reaper.start()
            try:
                time.sleep(0.2)
                end_processes(f"again-{turn}")
                reaper.join(1)
                assert process.returncode == -signal.SIGTERM
            finally:
                process.kill()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_supernodes": 0}, "0 supernodes"),
        ({"cpus_per_client": 10_000}, r"runtime\.threads_per_client = 10000: .* 1 to "),
        ({"gpus_per_client": -1.0}, "-1.0 GPUs"),
        ({"app_dir": Path("/nowhere")}, r"/nowhere: .*pyproject\.toml"),
        ({"run_config_file": Path("/nowhere.toml")}, r"/nowhere\.toml: "),
    ],
)
def test_wrong_arguments_are_refused_before_anything_starts(
    tmp_path: Path, arguments: dict[str, object], message: str
) -> None:
    app, run_config = write_app(tmp_path)
    given = {
        "app_dir": app,
        "run_config_file": run_config,
        "num_supernodes": 2,
        "cpus_per_client": 1,
        "on_line": not_called,
    }
    with pytest.raises(ConfigError, match=message):
        run_federation(**(given | arguments))  # type: ignore[arg-type]


def test_missing_flwr_is_named_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(ConfigError, match=r"/flwr: .*pip install 'flwr\[simulation\]'"):
        run_federation(*write_app(tmp_path), num_supernodes=2, cpus_per_client=1, on_line=not_called)


def test_a_package_of_the_same_name_in_the_working_directory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app, run_config = write_app(tmp_path)
    (tmp_path / "elsewhere" / "trial").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"elsewhere/trial: .*/trial\."):
        run_federation(app, run_config, num_supernodes=2, cpus_per_client=1, on_line=not_called)


def test_a_flower_home_with_other_connections_is_refused(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "config.toml").write_text('[superlink]\ndefault = "supergrid"\n')
    with pytest.raises(ConfigError, match=r"home/config\.toml: "):
        run_federation(
            *write_app(tmp_path), num_supernodes=2, cpus_per_client=1, flower_home=tmp_path / "home", on_line=not_called
        )


def test_cpus_and_gpus_of_the_experiment_reach_flower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_demo(tmp_path / "domains", num_domains=3, num_users=20, num_items=20)
    flat = {
        "domains.root": str(tmp_path / "domains"),
        "domains.train": "beauty,books",
        "domains.unseen": "camping",
        "output_dir": str(tmp_path / "runs"),
        "runtime.gpus_per_client": 0.25,
    }
    flwr = tmp_path / "bin" / "flwr"  # notes how it is called, and refuses
    flwr.parent.mkdir()
    refusal = "import json, sys; print(json.dumps({'success': False, 'error-message': ' '.join(sys.argv)}))"
    flwr.write_text(f"#!{sys.executable}\n{refusal}\n")
    flwr.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError) as refused:
        run_experiment(from_flat(flat), REPOSITORY)
    assert "client-resources-num-gpus=0.25 " in str(refused.value)
    assert "num-supernodes=3 client-resources-num-cpus=1 " in str(refused.value)
    assert f"init-args-num-cpus={min(len(os.sched_getaffinity(0)), 3)}" in str(refused.value)


LOG = '09:00:09 the run failed\nTraceback (most recent call last):\n  File "app.py", line 1, in main\n'


@pytest.mark.parametrize(
    ("log", "resumable"), [("", True), (LOG + "fedmerge.errors.ConfigError: 3 > 2\n", False)], ids=["killed", "failed"]
)
@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_an_interrupted_run_names_its_remedy(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    raised: type[BaseException],
    log: str,
    resumable: bool,
) -> None:
    folder = tmp_path / "runs" / "x"
    flwr = tmp_path / "bin" / "flwr"  # acts like a server that has started, then sends the signal
    flwr.parent.mkdir()
    flwr.write_text(
        f"#!{sys.executable}\nimport os, pathlib, signal, time\nfolder = pathlib.Path({str(folder)!r})\n"
        f"folder.mkdir(parents=True)\n(folder / 'config.toml').touch()\n(folder / 'run.log').write_text({log!r})\n"
        f"os.kill(os.getppid(), {int(number)})\ntime.sleep(60)\n"
    )
    flwr.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    # Tests in the background ignore SIGINT, and an earlier test may have left a handler of SIGTERM.
    usual: dict[signal.Signals, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {each: signal.signal(each, handler) for each, handler in usual.items()}
    settings = {"run_id": "x", "output_dir": str(tmp_path / "runs")}
    try:
        with pytest.raises(raised):
            run_experiment(from_flat(settings), REPOSITORY)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    printed = capsys.readouterr().err
    assert str(folder) in printed
    assert (f"fedmerge run --resume {folder}" in printed) == resumable


def test_resuming_an_existing_run_is_advised_only_if_no_process_works_on_it(tmp_path: Path) -> None:
    config = from_flat({"run_id": "x", "output_dir": str(tmp_path)})
    (tmp_path / "x").mkdir()
    with pytest.raises(RunDirError) as caught:
        run_experiment(config, REPOSITORY)
    assert f"fedmerge run --resume {tmp_path / 'x'}" in str(caught.value)
    with locked(tmp_path / "x"), pytest.raises(RunDirError) as caught:
        run_experiment(config, REPOSITORY)
    assert "--resume" not in str(caught.value)
    assert str(tmp_path / "x") in str(caught.value)


@pytest.mark.e2e
def test_two_runs_at_once_one_of_which_fails(tmp_path: Path) -> None:
    lines: dict[str, list[str]] = {"good": [], "bad": []}
    gate = tmp_path / "gate"

    def run(name: str) -> FederationOutcome:
        def on_line(line: str) -> None:
            lines[name].append(line)
            if all(any("server starts" in line for line in seen) for seen in lines.values()):
                gate.touch()  # both servers wait for it: this proves that lines come while the runs are going on

        app, run_config = write_app(tmp_path / name, gate=str(gate), fail=name == "bad")
        home = tmp_path / name / "home"
        environment = {"TRIAL_VALUE": f"value-of-{name}"}
        return run_federation(
            app,
            run_config,
            num_supernodes=2,
            cpus_per_client=1,
            flower_home=home,
            on_line=on_line,
            environment=environment,
        )

    with ThreadPoolExecutor(2) as pool:
        good, bad = pool.map(run, ["good", "bad"])

    assert (good.status, good.exit_code, good.details, good.kept) == ("finished:completed", 0, "", None)
    assert f"server starts with value-of-good in {os.getcwd()}" in lines["good"]
    assert {"reply from partition 0", "reply from partition 1"} <= set(lines["good"])
    assert {line.rpartition(")")[2] for line in lines["good"] if "speaks" in line} == {
        " client 0 speaks",
        " client 1 speaks",
    }
    assert not any("\x1b" in line for line in lines["good"])

    assert (bad.status, bad.exit_code) == ("finished:failed", 1)
    assert "fails as told" in bad.details
    assert "ValueError: fails as told" in lines["bad"]
    assert any(line.startswith("Traceback") for line in lines["bad"])
    assert bad.kept is not None
    assert list(bad.kept.glob("ray/session_*/logs"))
    shutil.rmtree(bad.kept)
    assert good.run_id != bad.run_id
    for name in lines:
        assert (tmp_path / name / "home" / "local-superlink" / "superlink.log").exists()
        assert not processes_of(tmp_path / name / "home")


@pytest.mark.e2e
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing_behind(tmp_path: Path, number: signal.Signals) -> None:
    app, run_config = write_app(tmp_path, gate=str(tmp_path / "never"))
    program = (
        "import signal, sys; from pathlib import Path; from sim.local.launch import run_federation\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored when tests run in the background\n"
        "app, run_config, home = map(Path, sys.argv[1:])\n"
        "show = lambda line: print(line, flush=True)\n"
        "run_federation(app, run_config, num_supernodes=2, cpus_per_client=1, flower_home=home, on_line=show)\n"
    )
    temporary = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))  # short, for Ray's sockets
    command = [sys.executable, "-c", program, str(app), str(run_config), str(tmp_path / "home")]
    variables = {**os.environ, "TRIAL_VALUE": "x", "TMPDIR": str(temporary)}
    with subprocess.Popen(
        command, env=variables, stdout=subprocess.PIPE, text=True, stderr=subprocess.STDOUT
    ) as process:
        try:
            assert process.stdout is not None
            output = []
            for line in process.stdout:
                output.append(line)
                if "server starts" in line:
                    break
            assert len(processes_of(tmp_path / "home")) >= 4, output  # flwr log, SuperLink, SuperExec, simulation, …
            time.sleep(2)  # well into the start of Ray
            start = time.monotonic()
            process.send_signal(number)
            rest = process.stdout.read()
        finally:
            process.kill()
    assert process.returncode == {signal.SIGINT: -signal.SIGINT, signal.SIGTERM: 128 + signal.SIGTERM}[number], rest
    assert time.monotonic() - start < 15
    assert not processes_of(tmp_path / "home")
    assert not list(temporary.glob("fedmerge-*"))
    temporary.rmdir()


@pytest.mark.e2e
def test_what_flower_refuses_is_passed_on(tmp_path: Path) -> None:
    app, run_config = write_app(tmp_path, undeclared=True)
    with pytest.raises(ConfigError, match=r"run\.toml: .*Invalid run configuration.*\[tool\.flwr\.app\]"):
        run_federation(
            app, run_config, num_supernodes=2, cpus_per_client=1, flower_home=tmp_path / "home", on_line=not_called
        )
    assert not processes_of(tmp_path / "home")


@pytest.mark.e2e
def test_a_superlink_that_cannot_start_is_reported_with_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        monkeypatch.setattr(launch, "_free_port", lambda: busy.getsockname()[1])
        monkeypatch.setattr(launch, "START_ATTEMPTS", 2)
        with pytest.raises(ClientError, match=r" 2 attempts.*/superlink\.log"):
            run_federation(
                *write_app(tmp_path),
                num_supernodes=2,
                cpus_per_client=1,
                flower_home=tmp_path / "home",
                on_line=lines.append,
            )
    assert len(lines) == 1
    assert lines[0].endswith(str(tmp_path / "home"))
    assert not processes_of(tmp_path / "home")
