"""One federation, driven from outside: `flwr run` with a SuperLink of its own, its log live, nothing left behind.

By itself `flwr run` (Flower 1.41) starts a detached SuperLink that outlives the run, keeps the environment of whoever
started it first and takes the runs of every checkout that finds its port; and it returns at once, with exit code 0
whatever happens. So here every run has

- a FLWR_HOME and a port of its own, and a SuperLink that keeps its state in memory: no stale or foreign one takes it;
- a mark in its environment, which every process that Flower and Ray start inherits: so they, and what they started, are
  found and ended;
- a folder for Flower's and Ray's files, removed unless the run failed;
- a verdict: `finished:completed`, asked of the SuperLink, is success; anything else is not.

Nothing of Flower or Ray is imported.
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
import tomllib
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from fedmerge import errors
from fedmerge.config import flatten
from fedmerge.errors import ClientError, ConfigError, RunDirError

COMPLETED = "finished:completed"
MARK = "FEDMERGE_FEDERATION"
LOST = "lost"
OVER_SECONDS = 20.0  # after the app's own end, for Flower to end
GRACE_SECONDS = 5.0  # between asking the processes of a run to end and ending them
QUIET_LOOKS = 10  # in a row without a process, .1 s apart: one that is just being started or executed shows no mark
START_ATTEMPTS = 3  # flwr gives a SuperLink 15 s to start, which a cold disk or a busy machine can exceed
SOCKET_FOLDER_LENGTH = 20  # of the path of the temporary folder; with a longer one Ray's sockets exceed 107 bytes
# In memory: a database would bring back the unfinished runs of a SuperLink that has ended.
FLOWER_CONFIG = '[superlink]\ndefault = "local"\n\n[superlink.local]\naddress = ":local-in-memory:"\n'
APP_PROJECT = ("name", "version", "description", "license")  # the keys of [project] that travel
PLAIN_PATTERN = re.compile(r"[\w.-]+(/[\w.-]+)*(/\*\*/\*\.\w+)?")  # which Flower, as git, and a glob read alike
COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


@dataclass(frozen=True, slots=True)
class FederationOutcome:
    """How a run ended.

    Attributes:
        run_id: Flower's id of the run.
        status: Flower's word: ``finished:completed``, ``finished:failed`` or ``finished:stopped``; ``lost`` where
            Flower had none: the process of server and simulation died, or did not end after the app.
        details: Flower's reason when the run did not complete, else empty.
        exit_code: 0 only for ``finished:completed``, else 1.
        kept: the folder with the logs of Ray, and of the SuperLink unless they went to ``flower_home``; None after a
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

    ServerApp and clients work in this process's working directory. As many clients work at once as there are CPUs
    (and GPUs) for, and never more than ``num_supernodes``: each is a process that lives for the whole run. A Ray
    cluster named by ``RAY_ADDRESS`` is used as it is. Ctrl-C and SIGTERM end everything that was started, then go on.

    Args:
        app_dir: the folder of the app's pyproject.toml.
        run_config_file: a .toml file; its keys override ``[tool.flwr.app.config]``.
        num_supernodes: simulated clients.
        cpus_per_client: CPUs that Ray counts for a client, and its OMP_NUM_THREADS.
        gpus_per_client: share of a GPU for a client; with 0 Ray hides the GPUs from the clients.
        client_output: whether what clients print is among the lines, as ``(ClientAppActor pid=…) …``.
        flower_home: where Flower's files go, kept; without it they go to a temporary folder.
        on_line: receives the log of Flower, the ServerApp and the clients line by line, without colours, as it comes.
        environment: variables for the run, on top of this process's own.
        is_over: whether the app has done its work; a simulation does not end by itself while a client hangs.
        mark: of the processes that are started, for who wants to end them after this one was killed; None: a new one.

    Raises:
        ConfigError: an argument is wrong, or Flower refused the app or the run config.
        ClientError: Flower could not be started or was lost on the way.
    """
    base = {**os.environ, **(environment or {})}
    num_cpus = None if base.get("RAY_ADDRESS") else len(os.sched_getaffinity(0))
    if num_supernodes < 1 or gpus_per_client < 0:
        raise ConfigError(f"{num_supernodes} supernodes, {gpus_per_client} GPUs per client: expected >= 1 and >= 0")
    if cpus_per_client < 1 or (num_cpus is not None and cpus_per_client > num_cpus):
        most = "the processors of a node" if num_cpus is None else f"the {num_cpus} processors there are"
        raise ConfigError(f"runtime.threads_per_client = {cpus_per_client}: expected 1 to {most}; lower it")
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
        if num_cpus is not None:  # Ray refuses to be told the size of a cluster that is there already
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


def copy_app(app_dir: Path, folder: Path) -> Path:
    """Copy the files that an app's ``fab-include`` names, and of its pyproject.toml what Flower needs.

    The bundle that Flower builds from the copy is the same in a checkout and in an installed wheel, and no tool's
    settings or development dependencies are in its hash. Flower looks at every file of a folder first, and a checkout
    with its virtual environment has sixty thousand.

    Args:
        app_dir: the folder of the app's pyproject.toml.
        folder: gets the copies.

    Returns:
        The folder to give to Flower: that of the copies, or the app's own where its rules are other than files of its
        root and ``folder/**/*.ending``, or where its pyproject.toml cannot be read: Flower then says why.

    Raises:
        RunDirError: the copies cannot be written.
    """
    try:
        settings = tomllib.loads((app_dir / "pyproject.toml").read_text(encoding="utf-8"))
        app = settings["tool"]["flwr"]["app"]
        patterns = app["fab-include"]
        if "fab-exclude" in app or not all(PLAIN_PATTERN.fullmatch(pattern) for pattern in patterns):
            return app_dir
        project = {key: settings["project"][key] for key in APP_PROJECT if key in settings["project"]}
        # Flower wants to see itself there; everything else is installed on every node, together with fedmerge.
        project["dependencies"] = [name for name in settings["project"]["dependencies"] if name.startswith("flwr")]
        reduced = flatten({"project": project, "tool": {"flwr": settings["tool"]["flwr"]}})
    except (OSError, ValueError, LookupError, TypeError):
        return app_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lines = [f"{key} = {json.dumps(value)}\n" for key, value in reduced.items()]
        (folder / "pyproject.toml").write_text("".join(lines), encoding="utf-8")
        for pattern in (".gitignore", *patterns):
            for file in app_dir.glob(pattern):
                if file.is_file() and not file.is_symlink():
                    copied = folder / file.relative_to(app_dir)
                    copied.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, copied)
    except OSError as error:
        raise RunDirError(f"{folder}: cannot be written ({error.strerror}). Make room, or set TMPDIR.") from error
    return folder


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
        "FLWR_HOME": str(home),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(port),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",  # otherwise Ray withholds lines that several clients print alike
        "PYTHONUNBUFFERED": "1",
        # flwr finds flower-superlink, and that one flwr-simulation, on the PATH
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), variables.get("PATH", os.defpath)]),
    }


def marked_processes(mark: str) -> set[int]:
    """The ids of the living processes that carry this mark in their environment, and of all that they started.

    Ray's agents write their title over the mark: each is known by its parent. This process is never among them.
    """
    return {pid for pid, _ in _family(mark, frozenset())}


def _family(mark: str, known: AbstractSet[tuple[int, int]]) -> set[tuple[int, int]]:
    """(id, start time) of the living processes that carry the mark or are known, and of their descendants."""
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
    """Refuse what Flower would run wrongly or refuse in words that do not help; return the path of `flwr`."""
    flwr = Path(sys.executable).parent / "flwr"
    if not flwr.exists():
        raise ConfigError(f"{flwr}: not there; `flwr run` needs it: {sys.executable} -m pip install 'flwr[simulation]'")
    if not Path("/proc/self/environ").exists():
        raise ConfigError(f"/proc: not found on {sys.platform}, needed to end a run's processes; use Linux")
    if not (app_dir / "pyproject.toml").is_file():
        raise ConfigError(f"{app_dir}: no pyproject.toml; expected the folder of a Flower app")
    if run_config_file.suffix != ".toml" or not run_config_file.is_file():
        raise ConfigError(f"{run_config_file}: expected an existing file with the ending .toml")
    # Ray puts the working directory first on the clients' sys.path: a package there hides the one that the server runs.
    packages = {file.parent.name: file.parent for file in app_dir.glob("*/__init__.py")}
    packages["fedmerge"] = Path(errors.__file__).parent
    for name, package in packages.items():
        twin = Path.cwd() / name
        if twin.is_dir() and not twin.samefile(package):
            raise ConfigError(f"{twin}: clients would import it, the server {package}; start from another folder")
    return str(flwr)


def _prepare_home(home: Path) -> Path:
    """Make a FLWR_HOME that leads to a local SuperLink in memory; never change one that somebody else set up."""
    home = home.resolve()
    config = home / "config.toml"
    if config.exists() and config.read_text(encoding="utf-8") != FLOWER_CONFIG:
        raise ConfigError(f"{config}: is somebody's own Flower configuration; expected none; give an empty folder")
    home.mkdir(parents=True, exist_ok=True)
    config.write_text(FLOWER_CONFIG, encoding="utf-8")
    return home


def _start(
    command: list[str], home: Path, base: Mapping[str, str], mark: str, app_dir: Path
) -> tuple[str, dict[str, str]]:
    """Start a SuperLink and submit the run to it; return the run's id and the variables that lead to this SuperLink."""
    for _ in range(START_ATTEMPTS):
        variables = flower_environment(home, _free_port(), base)
        answer = ask_flower(command, variables)
        if answer.get("success"):
            if not marked_processes(mark):
                raise ClientError(f"run {answer['run-id']}: another SuperLink got in first and took it; start again")
            return str(answer["run-id"]), variables
        reason = flower_reason(answer)
        if "start local SuperLink" not in reason:
            remedy = "check [tool.flwr.app] of its pyproject.toml, which must declare every key of the run config"
            told = reason.replace(command[2], str(app_dir.resolve()))
            raise ConfigError(f"{app_dir.resolve()} with {command[4]}: refused by `flwr run`: {told}; {remedy}")
    log = home / "local-superlink" / "superlink.log"
    raise ClientError(f"Flower's SuperLink: {START_ATTEMPTS} attempts to start it failed: {reason}; read {log}")


def _follow(
    flwr: str,
    run_id: str,
    variables: dict[str, str],
    mark: str,
    is_over: Callable[[], bool],
    on_line: Callable[[str], None],
) -> tuple[str, str]:
    """Hand on the log until the run is finished; return its status and the reason for it."""
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
                    f"run {run_id}: its SuperLink is gone ({flower_reason(answer)}); was it killed, or the memory full?"
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
    """Hand on what `flwr log` prints until it ends, but for so many lines: a stream that broke off begins again.

    Returns:
        How many lines have been seen now.
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
    """End everything when the simulation died, or does not end after the app, which Flower itself may never notice."""
    began, since, reason = False, time.monotonic(), ""
    family: set[tuple[int, int]] = set()
    while not finished.wait(1.0):
        family = _family(mark, family)
        alive = any(_is_simulation(pid) for pid, _ in family)
        began = began or alive
        now_reason = ""
        if began and not alive:
            now_reason = "the process of server and simulation died; was it killed, or the memory full?"
        elif is_over():
            now_reason = "the app had ended, but a client still hung"
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
    """What a flwr command answers as JSON; it exits with 0 on errors too."""
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
            f"`flwr {command[1]}`: ended with {done.returncode}, expected JSON, found: {output}; is it flwr 1.41?"
        ) from None
    return dict(answer)


def flower_reason(answer: dict[str, Any]) -> str:
    """Why flwr could not do it, in one line, without what it said before: that ends with an empty line."""
    text = str(answer.get("error-message", answer))
    return " ".join((f"\n{text}".partition("\n\n")[2] or text).split())


def _free_port() -> int:
    """A free port below those that the system hands out by itself: none of Ray's many sockets will take it."""
    for _ in range(100):
        port = 20000 + secrets.randbelow(12000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise ClientError("127.0.0.1: none of 100 ports between 20000 and 32000 can be bound; allow local sockets")


@contextmanager
def ending_processes(mark: str) -> Iterator[None]:
    """Whatever happens inside, SIGTERM included, no process with this mark is alive afterwards."""

    def leave(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():  # only there signals can be handled
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        for number, handler in before.items():
            if handler is signal.SIG_DFL:  # nohup, and callers with handlers of their own, keep their way
                signal.signal(number, leave)
    try:
        yield
    finally:
        for number in before:
            signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not stop the cleaning
        try:
            end_processes(mark)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def end_processes(mark: str, known: AbstractSet[tuple[int, int]] = frozenset()) -> None:
    """Ask once, then kill until none is left: processes that are being started meanwhile are found in the next turn.

    Args:
        mark: of the processes.
        known: processes that were found before, as (id, start time); their parents may have ended since.
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
            raise ClientError(f"processes {ids}: still there {waited:.0f} s after the run; end them by hand")
        kill = waited > GRACE_SECONDS
        for process in alive if kill else alive - asked:
            with suppress(OSError):  # ended meanwhile; or somebody else's by now, which is named below
                os.kill(process[0], signal.SIGKILL if kill else signal.SIGTERM)
        asked |= alive
        time.sleep(0.1)
