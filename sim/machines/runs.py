"""Submit, follow, list and stop runs of a federation on separate machines, through Flower's own commands.

A federation is a connection in Flower's configuration, ``$FLWR_HOME/config.toml``; the operator's folder holds one
(``fedmerge.deploy``). Paths in an experiment are resolved where they are used: ``output_dir`` and ``server.catalogs``
on the server, relative to the operator's folder, in which its SuperLink was started; ``cache_dir`` by each client.
"""

import os
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedmerge.config import ExperimentConfig, to_toml
from fedmerge.deploy.folder import DEPLOYMENT_FILE
from fedmerge.errors import ClientError, ConfigError
from fedmerge.files import append_line, read_lines
from fedmerge.runs.folder import DONE, check_same_config, locked, new_run_id, run_exists
from sim.app_folder import copy_app
from sim.local.launch import COMPLETED, ask_flower, flower_environment, flower_reason, pass_on_log

JOURNAL = "fedmerge-runs.jsonl"
AWAY_SECONDS = 180.0  # a restarted SuperLink is back much sooner
UNUSED_PORT = 0  # port of a local SuperLink, which a federation does not have


@dataclass(frozen=True)
class Connection:
    """The connection to a federation's SuperLink, from Flower's configuration.

    Attributes:
        name: name of the connection.
        home: value of FLWR_HOME.
        operator: the operator's folder; None on a machine other than the SuperLink's.
    """

    name: str
    home: Path
    operator: Path | None


@dataclass(frozen=True)
class SubmittedRun:
    """A run as Flower knows it.

    Attributes:
        run: name of its run folder; empty if `fedmerge run` on this machine did not submit it.
        flower_id: Flower's number of the run.
        status: Flower's status, for example ``running`` or ``finished:completed``.
        details: Flower's reason if the run did not complete.
        started: start time in UTC, in Flower's format.
        seconds: duration so far, or until its end.
        received_bytes: bytes received from clients.
    """

    run: str
    flower_id: str
    status: str
    details: str
    started: str
    seconds: float
    received_bytes: int


def find_connection(name: str) -> Connection:
    """Return the connection to the federation with this name.

    Raises:
        ConfigError: Flower's configuration has no such connection.
    """
    home = Path(os.environ.get("FLWR_HOME", "~/.flwr")).expanduser().resolve()
    path = home / "config.toml"
    try:
        known = tomllib.loads(path.read_text(encoding="utf-8")).get("superlink", {})
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: cannot be read ({error}), expected Flower's configuration with the federation {name}. On the "
            "operator's machine: export FLWR_HOME=DIR/flower, where DIR is the folder of 'fedmerge deploy init'."
        ) from error
    if not isinstance(known.get(name), dict):
        names = [key for key, value in known.items() if isinstance(value, dict)]
        raise ConfigError(
            f"{path}: has no federation {name!r}; it has: {', '.join(names) or 'none'}. Correct the name, or export "
            "FLWR_HOME=DIR/flower, where DIR is the folder of 'fedmerge deploy init'."
        )
    return Connection(name, home, home.parent if (home.parent / DEPLOYMENT_FILE).is_file() else None)


def run_on_federation(config: ExperimentConfig, app_dir: Path, to: Connection) -> int:
    """Submit an experiment, or resume a run, and print its log until it ends. Ctrl-C leaves the run running.

    Args:
        config: the experiment with paths as written in its file; to resume a run, with ``resume`` and its ``run_id``.
        app_dir: the folder of the Flower app.
        to: the federation.

    Returns:
        0 if the run finished and, where its folder is on this machine, the folder is complete; else 1.

    Raises:
        ConfigError: Flower refused the app or the run config, or the configuration differs from that of the run.
        RunDirError: the run exists already, or a process is working on it.
        ClientError: the SuperLink does not answer.
    """
    config = config.model_copy(update={"run_id": config.run_id or new_run_id(config.name)})
    folder = None if to.operator is None else to.operator / Path(config.output_dir).expanduser() / str(config.run_id)
    resume = f"fedmerge run --resume {config.run_id} --federation {to.name}"
    if folder is not None and config.resume:
        check_same_config(folder, config)
        if (folder / DONE).is_file():
            print(f"this run is finished; nothing is left to do\nrun folder: {folder}")
            return 0
        with locked(folder):
            pass  # no other process is working on it
    elif folder is not None and folder.exists():
        raise run_exists(folder, resume)
    flower_id = _submit(config, app_dir, to)
    say = f"run {config.run_id}, Flower's number {flower_id}"
    print(f"{say}: submitted to {to.name}", flush=True)
    try:
        status, details = _follow(flower_id, to, lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        stop = f"fedmerge stop {config.run_id} --federation {to.name}"
        print(f"{say}: still running. Stop it with: {stop}", file=sys.stderr)
        raise
    if (folder / DONE).is_file() if folder is not None else status == COMPLETED:
        print(f"run folder: {folder or f'on the server, {config.output_dir}/{config.run_id}'}")
        return 0
    print(f"fedmerge: the run did not finish: {status} {details}\nfedmerge: resume with: {resume}", file=sys.stderr)
    return 1


def list_submitted(to: Connection) -> list[SubmittedRun]:
    """Return all runs that the SuperLink knows, oldest first.

    Raises:
        ClientError: the SuperLink does not answer.
    """
    names = {str(line["flower"]): str(line["run"]) for line in read_lines(to.home / JOURNAL)}
    answer = _ask(to, "list", to.name)
    runs = [
        SubmittedRun(
            run=names.get(found["run-id"], ""),
            flower_id=found["run-id"],
            status=found["status"],
            details=found["status-details"],
            started=found["pending-at"],
            seconds=float(found["elapsed"]),
            received_bytes=int(found["network-traffic"]["inbound-bytes"]),
        )
        for found in answer["runs"]
    ]
    return sorted(runs, key=lambda run: run.started)


def stop_run(run: str, to: Connection) -> str:
    """Stop a run, given the name of its folder or Flower's number, and return the number.

    Raises:
        ConfigError: the run does not exist or has ended.
        ClientError: the SuperLink does not answer.
    """
    for found in reversed(list_submitted(to)):  # a resumed run has several numbers; the last is current
        if run in (found.run, found.flower_id):
            if found.status.startswith("finished"):
                raise ConfigError(f"run {run} has already ended ({found.status}); nothing to stop.")
            _ask(to, "stop", found.flower_id, to.name)
            return found.flower_id
    raise ConfigError(f"run {run}: not found on {to.name}. List its runs: fedmerge runs --federation {to.name}")


def _submit(config: ExperimentConfig, app_dir: Path, to: Connection) -> str:
    """Submit the app and the configuration to the SuperLink and return Flower's number of the run."""
    with tempfile.TemporaryDirectory(prefix="fedmerge-submit-") as folder:
        resolved = Path(folder) / "experiment.toml"
        resolved.write_text(to_toml(config), encoding="utf-8")
        app = copy_app(app_dir.resolve(), Path(folder) / "app")
        answer = _ask(to, "run", str(app), to.name, "--run-config", str(resolved))
    started = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
    append_line(to.home / JOURNAL, {"run": config.run_id, "flower": answer["run-id"], "started": started})
    return str(answer["run-id"])


def _follow(flower_id: str, to: Connection, on_line: Callable[[str], None]) -> tuple[str, str]:
    """Pass on the log until the run ends, across restarts of the SuperLink; return its status and the reason."""
    num_seen, reached, away = 0, time.monotonic(), False
    while True:
        if not away:
            command = [_flwr(), "log", flower_id, to.name, "--stream"]
            num_seen = pass_on_log(command, _environment(to), num_seen, on_line)
        answer = ask_flower([_flwr(), "list", to.name, "--run-id", flower_id], _environment(to))
        away = not answer.get("success")
        if not away:
            reached = time.monotonic()
            run = answer["runs"][0]
            if run["status"].startswith("finished"):
                return run["status"], run["status-details"]
        elif time.monotonic() - reached > AWAY_SECONDS:
            raise ClientError(
                f"run {flower_id}: the SuperLink of {to.name} has not answered for {AWAY_SECONDS:.0f} s "
                f"({flower_reason(answer)}). Start it, then check the run: fedmerge runs --federation {to.name}"
            )
        time.sleep(1.0)


def _ask(to: Connection, *arguments: str) -> dict[str, Any]:
    answer = ask_flower([_flwr(), *arguments], _environment(to))
    if answer.get("success"):
        return answer
    reason = flower_reason(answer)
    if "unavailable" in reason:
        remedy = f"fedmerge deploy start {to.operator}" if to.operator else "nginx in the copied operator folder"
        raise ClientError(f"{to.name}: the SuperLink does not answer ({reason}). If it is not running, start: {remedy}")
    raise ConfigError(f"{to.name}: Flower refused `flwr {arguments[0]}`: {reason}")


def _environment(to: Connection) -> dict[str, str]:
    return flower_environment(to.home, UNUSED_PORT)


def _flwr() -> str:
    return str(Path(sys.executable).parent / "flwr")
