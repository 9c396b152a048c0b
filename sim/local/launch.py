"""Run one simulation with `flwr run` and its own SuperLink, pass on its log, and leave no process behind.

Alone, `flwr run` (Flower 1.41) starts a detached SuperLink that outlives the run, keeps the environment in which it was
first started and accepts runs of every checkout that finds its port. The command returns at once, always with exit code
0. Therefore every run here has

- its own FLWR_HOME and port, and a SuperLink with its state in memory, so that no other SuperLink takes the run;
- a mark in its environment, which all processes of Flower and Ray inherit and by which they are found and ended;
- a folder for Flower's and Ray's files, removed unless the run failed;
- a result: success if the SuperLink reports `finished:completed`, else failure.

This module imports neither Flower nor Ray.
"""

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from fedmerge import errors
from fedmerge.errors import ClientError, ConfigError
from sim.app_folder import copy_app

COMPLETED = "finished:completed"
MARK = "FEDMERGE_FEDERATION"
LOST = "lost"
OVER_SECONDS = 20.0  # for Flower to end after the app has ended
GRACE_SECONDS = 5.0  # between SIGTERM and SIGKILL
QUIET_LOOKS = 10  # without a process, 0.1 s apart: a process shows no mark while it starts or executes another program
START_ATTEMPTS = 3  # flwr waits 15 s for a SuperLink, which a cold disk or a busy machine can exceed
SOCKET_FOLDER_LENGTH = 20  # longest path of the temporary folder with which Ray's socket paths stay below 108 bytes
# In memory, because a database would restart unfinished runs of an earlier SuperLink.
FLOWER_CONFIG = '[superlink]\ndefault = "local"\n\n[superlink.local]\naddress = ":local-in-memory:"\n'
OFFLINE = {  # variables of every process of Flower
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "PYTHONUNBUFFERED": "1",
}
COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


@dataclass(frozen=True, slots=True)
class FederationOutcome:
    """The end of a run.

    Attributes:
        run_id: Flower's id of the run.
        status: Flower's status: ``finished:completed``, ``finished:failed`` or ``finished:stopped``; ``lost`` if the
            process of server and simulation died, or did not end after the app.
        details: the reason if the run did not complete, else empty.
        exit_code: 0 only for ``finished:completed``, else 1.
        kept: folder with the logs of Ray, and of the SuperLink unless they are in ``flower_home``; None after a
            success.
    """

    run_id: str
    status: str
    details: str
    exit_code: int
    kept: Path | None


def run_federation(
    app_dir: Path,
    run_config_file: Path,
    *,
    num_supernodes: int,
    cpus_per_client: int,
    gpus_per_client: float = 0.0,
    client_output: bool = True,
    flower_home: Path | None = None,
    on_line: Callable[[str], None],
    environment: Mapping[str, str] | None = None,
    is_over: Callable[[], bool] = lambda: False,
    mark: str | None = None,
) -> FederationOutcome:
    """Run a Flower app in simulation and wait for its end.

    ServerApp and clients work in this process's working directory. CPUs and GPUs limit the number of clients that work
    at once; each client process lives for the whole run. A Ray cluster named by ``RAY_ADDRESS`` is used unchanged.
    Ctrl-C and SIGTERM first end all processes that were started, then take their usual effect.

    Args:
        app_dir: folder of the app's pyproject.toml.
        run_config_file: a .toml file; its keys override ``[tool.flwr.app.config]``.
        num_supernodes: number of simulated clients.
        cpus_per_client: CPUs that Ray reserves for a client, and its OMP_NUM_THREADS.
        gpus_per_client: share of a GPU for a client; with 0 Ray hides the GPUs from the clients.
        client_output: whether the lines include the output of clients, as ``(ClientAppActor pid=…) …``.
        flower_home: folder for Flower's files, which stay there; None for a temporary folder.
        on_line: receives each line of the log of Flower, the ServerApp and the clients, without colours.
        environment: environment variables for the run, in addition to those of this process.
        is_over: returns True once the app has ended; a simulation does not end by itself while a client hangs.
        mark: mark of the started processes, for callers that end them after this process was killed; None for a new
            one.

    Raises:
        ConfigError: an argument is invalid, or Flower refused the app or the run config.
        ClientError: Flower could not be started, or died during the run.
    """
    base = {**os.environ, **(environment or {})}
    num_cpus = None if base.get("RAY_ADDRESS") else len(os.sched_getaffinity(0))
    if num_supernodes < 1 or gpus_per_client < 0:
        raise ConfigError(f"{num_supernodes} supernodes, {gpus_per_client} GPUs per client: expected >= 1 and >= 0")
    if cpus_per_client < 1 or (num_cpus is not None and cpus_per_client > num_cpus):
        most = "the number of processors of a node" if num_cpus is None else f"{num_cpus}, the number of processors"
        raise ConfigError(f"runtime.threads_per_client = {cpus_per_client}: expected 1 to {most}. Lower it.")
    flwr = _check(app_dir, run_config_file)
    mark = mark or secrets.token_hex(16)
    temporary = tempfile.gettempdir()
    short = temporary if len(temporary) <= SOCKET_FOLDER_LENGTH else "/tmp"
    scratch = Path(tempfile.mkdtemp(prefix="fedmerge-", dir=short))
    keep = False
    try:
        home = _prepare_home(flower_home or scratch / "flower")
        base = {"RAY_TMPDIR": str(scratch), **base, MARK: mark}
        federation: dict[str, int | float] = {
            "num-supernodes": num_supernodes,
            "client-resources-num-cpus": cpus_per_client,
            "client-resources-num-gpus": float(gpus_per_client),
            "init-args-log-to-driver": client_output,
        }
        if num_cpus is not None:  # Ray refuses a size for an existing cluster
            federation["init-args-num-cpus"] = min(num_cpus, num_supernodes * cpus_per_client)
        app = copy_app(app_dir.resolve(), scratch / "app")
        command = [flwr, "run", str(app), "--run-config", str(run_config_file.resolve())]
        command += ["--federation-config", " ".join(f"{key}={json.dumps(value)}" for key, value in federation.items())]
        with ending_processes(mark):
            run_id, variables = _start(command, home, base, mark, app_dir)
            status, details = _follow(flwr, run_id, variables, mark, is_over, on_line)
        keep = status != COMPLETED
    except ClientError:
        keep = True
        on_line(f"logs are kept in {' and '.join(str(path) for path in (home, scratch / 'ray') if path.exists())}")
        raise
    finally:
        shutil.rmtree(scratch / "app", ignore_errors=True)
        if not keep or not any(scratch.iterdir()):
            shutil.rmtree(scratch, ignore_errors=True)
    return FederationOutcome(run_id, status, details if keep else "", int(keep), scratch if keep else None)


def flower_environment(home: Path, port: int, base: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables under which `flwr` uses a SuperLink of its own, offline, from this Python environment.

    Args:
        home: FLWR_HOME.
        port: where the SuperLink listens, on 127.0.0.1.
        base: the variables to start from; without it those of this process.
    """
    variables = dict(os.environ if base is None else base)
    variables.pop("PYTHONDONTWRITEBYTECODE", None)  # nearly doubles the start-up of every process
    variables.setdefault("PYTHONWARNINGS", "ignore::FutureWarning:ray._private.worker")  # on every start of Ray
    return variables | {
        **OFFLINE,
        "FLWR_HOME": str(home),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(port),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",  # otherwise Ray withholds lines that several clients print alike
        # flwr finds flower-superlink, and that one flwr-simulation, on the PATH
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), variables.get("PATH", os.defpath)]),
    }


def marked_processes(mark: str) -> set[int]:
    """Return the ids of living processes with this mark in their environment, and of their descendants.

    Ray's agents overwrite the mark with their title, so they are found through their parents. This process is excluded.
    """
    return {pid for pid, _ in _family(mark, frozenset())}


def _family(mark: str, known: AbstractSet[tuple[int, int]]) -> set[tuple[int, int]]:
    """Return (id, start time) of living processes that have the mark or are known, and of their descendants."""
    entry = f"{MARK}={mark}".encode()
    found = set()
    children: dict[int, list[tuple[int, int]]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # ended meanwhile, or somebody else's
            fields = (folder / "stat").read_bytes().rpartition(b")")[2].split()
            process = (int(folder.name), int(fields[19]))
            if fields[0] in (b"Z", b"X") or process[0] == os.getpid():
                continue
            children.setdefault(int(fields[1]), []).append(process)
            if process in known or entry in (folder / "environ").read_bytes().split(b"\0"):
                found.add(process)
    parents = list(found)
    while parents:
        new = {child for child in children.get(parents.pop()[0], ()) if child not in found}
        found |= new
        parents += new
    return found


def _check(app_dir: Path, run_config_file: Path) -> str:
    """Refuse arguments that Flower would misinterpret or refuse without a remedy; return the path of `flwr`."""
    flwr = Path(sys.executable).parent / "flwr"
    if not flwr.exists():
        raise ConfigError(f"{flwr}: not found. Install it: {sys.executable} -m pip install 'flwr[simulation]'")
    if not Path("/proc/self/environ").exists():
        raise ConfigError(f"/proc: not found on {sys.platform}, but needed to end the processes of a run. Use Linux.")
    if not (app_dir / "pyproject.toml").is_file():
        raise ConfigError(f"{app_dir}: has no pyproject.toml. Give the folder of a Flower app.")
    if run_config_file.suffix != ".toml" or not run_config_file.is_file():
        raise ConfigError(f"{run_config_file}: not found, expected an existing .toml file. Correct the path.")
    # Ray puts the working directory first on the clients' sys.path, so a package there hides the one of the server.
    packages = {file.parent.name: file.parent for file in app_dir.glob("*/__init__.py")}
    packages["fedmerge"] = Path(errors.__file__).parent
    for name, package in packages.items():
        twin = Path.cwd() / name
        if twin.is_dir() and not twin.samefile(package):
            raise ConfigError(
                f"{twin}: clients would import it, but the server imports {package}. Start from another folder."
            )
    return str(flwr)


def _prepare_home(home: Path) -> Path:
    """Make a FLWR_HOME with a local SuperLink in memory; refuse a folder with another Flower configuration."""
    home = home.resolve()
    config = home / "config.toml"
    if config.exists() and config.read_text(encoding="utf-8") != FLOWER_CONFIG:
        raise ConfigError(f"{config}: found another Flower configuration, expected none. Give an empty folder.")
    home.mkdir(parents=True, exist_ok=True)
    config.write_text(FLOWER_CONFIG, encoding="utf-8")
    return home


def _start(
    command: list[str], home: Path, base: Mapping[str, str], mark: str, app_dir: Path
) -> tuple[str, dict[str, str]]:
    """Start a SuperLink and submit the run; return the run's id and the environment for commands to the SuperLink."""
    for _ in range(START_ATTEMPTS):
        variables = flower_environment(home, _free_port(), base)
        answer = ask_flower(command, variables)
        if answer.get("success"):
            if not marked_processes(mark):
                raise ClientError(f"run {answer['run-id']}: another SuperLink took this run. Start the run again.")
            return str(answer["run-id"]), variables
        reason = flower_reason(answer)
        if "start local SuperLink" not in reason:
            remedy = "Check [tool.flwr.app] of its pyproject.toml, which must declare every key of the run config."
            reason = reason.replace(command[2], str(app_dir.resolve()))
            raise ConfigError(f"{app_dir.resolve()} with {command[4]}: refused by `flwr run`: {reason}. {remedy}")
    log = home / "local-superlink" / "superlink.log"
    raise ClientError(f"Flower's SuperLink did not start in {START_ATTEMPTS} attempts: {reason}. Read {log}")


def _follow(
    flwr: str,
    run_id: str,
    variables: dict[str, str],
    mark: str,
    is_over: Callable[[], bool],
    on_line: Callable[[str], None],
) -> tuple[str, str]:
    """Pass on the log until the run ends; return its status and the reason."""
    num_seen = 0
    finished = threading.Event()
    lost: list[str] = []
    watcher = threading.Thread(target=_watch, args=(mark, is_over, finished, lost), daemon=True)
    watcher.start()
    try:
        while not lost:
            num_seen = pass_on_log([flwr, "log", run_id, "--stream"], variables, num_seen, on_line)
            answer = ask_flower([flwr, "ls", "--run-id", run_id], variables) if not lost else {}
            if lost:
                break
            if not answer.get("success"):
                raise ClientError(
                    f"run {run_id}: its SuperLink died ({flower_reason(answer)}); was it killed, or out of memory?"
                )
            run = answer["runs"][0]
            if run["status"].startswith("finished"):
                return run["status"], run["status-details"]
            time.sleep(1.0)
        return LOST, lost[0]
    finally:
        finished.set()
        watcher.join()


def pass_on_log(command: list[str], variables: dict[str, str], num_seen: int, on_line: Callable[[str], None]) -> int:
    """Pass on the output of `flwr log` until it ends, without the first ``num_seen`` lines, which a new stream repeats.

    Returns:
        The number of lines seen so far.
    """
    log = subprocess.Popen(
        command,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )
    with log:
        try:
            for number, line in enumerate(log.stdout or ()):
                if number >= num_seen:
                    num_seen += 1
                    on_line(COLOURS.sub("", line.rstrip()))
        finally:
            log.kill()
    return num_seen


def _watch(mark: str, is_over: Callable[[], bool], finished: threading.Event, lost: list[str]) -> None:
    """End all processes if the simulation died or does not end after the app, which Flower itself may never notice."""
    began, since, reason = False, time.monotonic(), ""
    family: set[tuple[int, int]] = set()
    while not finished.wait(1.0):
        family = _family(mark, family)
        alive = any(_is_simulation(pid) for pid, _ in family)
        began = began or alive
        now_reason = ""
        if began and not alive:
            now_reason = "the process of server and simulation died; was it killed, or out of memory?"
        elif is_over():
            now_reason = "the app ended, but a client hangs"
        if now_reason != reason:
            reason, since = now_reason, time.monotonic()
        if reason and time.monotonic() - since > (OVER_SECONDS if alive else GRACE_SECONDS):
            lost.append(reason)
            end_processes(mark, family)
            return


def _is_simulation(pid: int) -> bool:
    with suppress(OSError):
        return b"flwr-simulation" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def ask_flower(command: list[str], variables: dict[str, str]) -> dict[str, Any]:
    """Run a flwr command and return its answer in JSON; its exit code is 0 even on errors."""
    done = subprocess.run(
        [*command, "--format", "json"],
        env=variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
        check=False,
    )
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        output = (done.stdout + done.stderr).strip()[-2000:]
        raise ClientError(
            f"`flwr {command[1]}`: expected JSON, found (exit {done.returncode}): {output}. Check that flwr is 1.41."
        ) from None
    return dict(answer)


def flower_reason(answer: dict[str, Any]) -> str:
    """Return why a flwr command failed, in one line, without the text before the first empty line."""
    text = str(answer.get("error-message", answer))
    return " ".join((f"\n{text}".partition("\n\n")[2] or text).split())


def _free_port() -> int:
    """Return a free port below the range of ephemeral ports, so that none of Ray's many sockets takes it."""
    for _ in range(100):
        port = 20000 + secrets.randbelow(12000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise ClientError("127.0.0.1: none of 100 ports between 20000 and 32000 can be bound. Allow local sockets.")


@contextmanager
def ending_processes(mark: str) -> Iterator[None]:
    """End all processes with this mark on exit, however the block ends, also by SIGTERM."""

    def leave(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():  # signals can be handled only there
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        for number, handler in before.items():
            if handler is signal.SIG_DFL:  # keep the handlers of nohup and of callers
                signal.signal(number, leave)
    try:
        yield
    finally:
        for number in before:
            signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not interrupt the cleanup
        try:
            end_processes(mark)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def end_processes(mark: str, known: AbstractSet[tuple[int, int]] = frozenset()) -> None:
    """Send SIGTERM once, then SIGKILL until no process is left; each turn also finds processes started meanwhile.

    Args:
        mark: mark of the processes.
        known: processes found before, as (id, start time), whose parents may have ended since.

    Raises:
        ClientError: processes are still alive after several grace periods.
    """
    start = time.monotonic()
    asked: set[tuple[int, int]] = set()
    quiet = 0
    while quiet < QUIET_LOOKS:
        alive = _family(mark, known | asked)
        quiet = 0 if alive else quiet + 1
        waited = time.monotonic() - start
        if alive and waited > 4 * GRACE_SECONDS:
            ids = sorted(pid for pid, _ in alive)
            raise ClientError(f"processes {ids}: still alive {waited:.0f} s after the run. End them by hand.")
        kill = waited > GRACE_SECONDS
        for process in alive if kill else alive - asked:
            with suppress(OSError):  # ended meanwhile, or of another user, which the error above reports
                os.kill(process[0], signal.SIGKILL if kill else signal.SIGTERM)
        asked |= alive
        time.sleep(0.1)
