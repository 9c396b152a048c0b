"""Runs of a federation on several machines: submitted, followed, listed and stopped through Flower's own commands.

A federation is a connection in Flower's configuration, ``$FLWR_HOME/config.toml``; the operator's folder holds one
(``fedmerge.deploy``). Paths in an experiment are not resolved here but where they are used: ``output_dir`` and
``server.catalogs`` on the server, from the operator's folder, where its SuperLink was started; ``cache_dir`` by each
client.
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
from fedmerge.runs.folder import DONE, check_same_config, locked, new_run_id
from sim.local.launch import COMPLETED, ask_flower, copy_app, flower_environment, flower_reason, pass_on_log
from sim.local.run import run_exists

JOURNAL = "fedmerge-runs.jsonl"
AWAY_SECONDS = 180.0  # a SuperLink that is started again is back long before
UNUSED_PORT = 0  # of a local SuperLink, which a federation does not have


@dataclass(frozen=True)
class Connection:
    """Where a federation's SuperLink is, as Flower's configuration says.

    Attributes:
        name: of the connection.
        home: FLWR_HOME.
        operator: the operator's folder, None on another machine than the SuperLink's.
    """

    name: str
    home: Path
    operator: Path | None


@dataclass(frozen=True)
class SubmittedRun:
    """A run as Flower knows it.

    Attributes:
        run: name of its run folder, empty where it was not submitted by `fedmerge run` from here.
        flower_id: Flower's number.
        status: Flower's word, for example ``running`` or ``finished:completed``.
        details: Flower's reason where it did not complete.
        started: UTC, as Flower writes it.
        seconds: so far, or to its end.
        received_bytes: what the clients sent.
    """

    run: str
    flower_id: str
    status: str
    details: str
    started: str
    seconds: float
    received_bytes: int


def connection(name: str) -> Connection:
    """The federation of this name.

    Raises:
        ConfigError: Flower's configuration names none such.
    """
    home = Path(os.environ.get("FLWR_HOME", "~/.flwr")).expanduser().resolve()
    path = home / "config.toml"
    try:
        known = tomllib.loads(path.read_text(encoding="utf-8")).get("superlink", {})
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: cannot be read ({error}), expected Flower's configuration with the federation {name}. On the "
            "operator's machine: export FLWR_HOME=DIR/flower, with the folder of 'fedmerge deploy init'."
        ) from error
    if not isinstance(known.get(name), dict):
        names = [key for key, value in known.items() if isinstance(value, dict)]
        raise ConfigError(
            f"{path}: has no federation {name!r}; it has: {', '.join(names) or 'none'}. Correct the name, or export "
            "FLWR_HOME=DIR/flower, with the folder of 'fedmerge deploy init'."
        )
    return Connection(name, home, home.parent if (home.parent / DEPLOYMENT_FILE).is_file() else None)


def run_on_federation(config: ExperimentConfig, app_dir: Path, to: Connection) -> int:
    """Submit an experiment, or go on with one, and print its log until its end. Ctrl-C leaves it running.

    Args:
        config: as it is written in the file, paths included; of a run to resume, with ``resume`` and its ``run_id``.
        app_dir: the folder of the Flower app.
        to: the federation.

    Returns:
        0 if the run finished, and its folder is complete where it can be seen from here; else 1.

    Raises:
        ConfigError: Flower refused the app or the run config, or the configuration differs from that of the run.
        RunDirError: the run is there already, or a process works on it.
        ClientError: the SuperLink is not reached.
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
            pass  # nobody else works on it
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
    """Every run that the SuperLink remembers, oldest first.

    Raises:
        ClientError: the SuperLink is not reached.
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
    """Stop a run by the name of its folder or by Flower's number; the number.

    Raises:
        ConfigError: there is no such run, or it has ended.
        ClientError: the SuperLink is not reached.
    """
    for found in reversed(list_submitted(to)):  # a resumed run has several numbers, of which the last counts
        if run in (found.run, found.flower_id):
            if found.status.startswith("finished"):
                raise ConfigError(f"run {run}: has ended already ({found.status}); there is nothing to stop.")
            _ask(to, "stop", found.flower_id, to.name)
            return found.flower_id
    raise ConfigError(f"run {run}: not known to {to.name}. See fedmerge runs --federation {to.name}")


def _submit(config: ExperimentConfig, app_dir: Path, to: Connection) -> str:
    """Hand the app and the configuration to the SuperLink; Flower's number of the run."""
    with tempfile.TemporaryDirectory(prefix="fedmerge-submit-") as folder:
        resolved = Path(folder) / "experiment.toml"
        resolved.write_text(to_toml(config), encoding="utf-8")
        app = copy_app(app_dir.resolve(), Path(folder) / "app")
        answer = _ask(to, "run", str(app), to.name, "--run-config", str(resolved))
    started = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
    append_line(to.home / JOURNAL, {"run": config.run_id, "flower": answer["run-id"], "started": started})
    return str(answer["run-id"])


def _follow(flower_id: str, to: Connection, on_line: Callable[[str], None]) -> tuple[str, str]:
    """Hand on the log until the run is finished, through restarts of the SuperLink; its status and the reason."""
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
                f"run {flower_id}: the SuperLink of {to.name} has been away for {AWAY_SECONDS:.0f} s "
                f"({flower_reason(answer)}). Start it, then see fedmerge runs --federation {to.name}"
            )
        time.sleep(1.0)


def _ask(to: Connection, *arguments: str) -> dict[str, Any]:
    answer = ask_flower([_flwr(), *arguments], _environment(to))
    if answer.get("success"):
        return answer
    reason = flower_reason(answer)
    if "unavailable" in reason:
        remedy = f"fedmerge deploy start {to.operator}" if to.operator else "start nginx in the operator's folder"
        raise ClientError(f"{to.name}: its SuperLink does not answer ({reason}). Does it run? {remedy}")
    raise ConfigError(f"{to.name}: `flwr {arguments[0]}` was refused: {reason}")


def _environment(to: Connection) -> dict[str, str]:
    return flower_environment(to.home, UNUSED_PORT)


def _flwr() -> str:
    return str(Path(sys.executable).parent / "flwr")
