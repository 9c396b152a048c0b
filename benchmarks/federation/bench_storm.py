"""A hundred organisations at once: a registration storm, a run, a third of the nodes killed in the middle of training.

    python benchmarks/federation/bench_storm.py --num-nodes 100

The operator's side is the one that `fedmerge deploy` writes and starts: SuperLink with SQLite, nginx, TLS, a registered
key for each node. The nodes are real SuperNodes in processes of their own, forked from one that has imported Flower, so
that all of them start at the same moment, as those of separate machines do. One process goes from node to node and
answers as the executor of `fedmerge client` does, since a hundred of those would not fit into the memory. Every tenth
node is slow. Nodes that were killed come back after the waits of their supervisor.
"""

import argparse
import gc
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import flwr.supernode.main  # noqa: F401  # here, so that no forked SuperNode has to
import httpx
from bench_scaling import PHASES, REPOSITORY, SETTINGS, sample
from flwr.supercore.run import RunNotRunningException
from flwr.supernode.cli.flower_supernode import flower_supernode

sys.path.insert(0, str(REPOSITORY / "tests" / "support"))

from deploy_federation import allow_exact_sums
from deploy_hosts import free_port, has_nginx, wait_for

from fedmerge.deploy.clients import add_client
from fedmerge.deploy.folder import create_deployment, read_deployment
from fedmerge.domain.demo import write_demo
from fedmerge.encoder.demo_backbone import write_demo_backbone
from fedmerge.organisation.app import installed_code
from fedmerge.organisation.folder import approve_app, init_client
from sim.app.client.replies import log_to_stderr
from sim.local.launch import OFFLINE
from sim.machines import executor
from sim.machines.app_bundle import submitted_sha256
from sim.machines.supernode import WAITS_SECONDS
from sim.machines.worker import Workers, end_with_parent

SAMPLE_SECONDS = 0.5
MOST_SECONDS = 3600.0
SLOW_EVERY = 10  # one node of so many is slow
PROGRAMS = {"SuperLink": "flower-superlink", "nginx": "nginx: ", "server app": "flwr-serverapp"}
NUM_REQUESTS = "FEDMERGE_STORM_REQUESTS"  # file for the requests of the server app
COUNTING = f'''
import os, time
from pathlib import Path
if b"flwr-serverapp" in Path("/proc/self/cmdline").read_bytes() and "{NUM_REQUESTS}" in os.environ:
    from flwr.supercore.protobuf.client import ProtobufClient
    _send = ProtobufClient._unary_unary
    def _unary_unary(self, *, path, request, **others):
        answer = _send(self, path=path, request=request, **others)
        asked, got = (len(getattr(of, name, ())) for of, name in ((request, "message_ids"), (answer, "messages_list")))
        with open(os.environ["{NUM_REQUESTS}"], "a") as file:
            file.write(f"{{time.time()}} {{path}} {{asked}} {{got}}\\n")
        return answer
    ProtobufClient._unary_unary = _unary_unary
'''

logger = logging.getLogger("fedmerge.client")


@dataclass
class Watched:
    """CPU and memory of the operator's processes, by phase.

    Attributes:
        phase: that is going on.
        seconds: phase -> its seconds.
        cpu: (phase, program) -> CPU seconds.
        peak: program -> MB of all its processes together, at most.
    """

    phase: str = "registration"
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    cpu: dict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))
    peak: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    begins: list[tuple[float, str]] = field(default_factory=list)


def main() -> None:
    """Run the storm and print the table; with a hidden first argument, one of its processes."""
    if sys.argv[1:2] == ["nodes"]:
        keep_nodes(Path(sys.argv[2]))
        return
    if sys.argv[1:2] == ["answers"]:
        keep_answering(Path(sys.argv[2]), float(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-nodes", type=int, default=8)
    parser.add_argument("--lose", type=float, default=1 / 3, help="part of the nodes that is killed")
    parser.add_argument("--slow-seconds", type=float, default=15.0, help="between two looks at a slow node")
    parser.add_argument("--folder", type=Path, default=None, help="for the files (default: temporary)")
    options = parser.parse_args()
    if not has_nginx():
        print("nothing is measured: nginx is not installed")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends what it has started
    with tempfile.TemporaryDirectory(prefix="fedmerge-storm-") as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        print("\n".join(run_storm(folder, options.num_nodes, options.lose, options.slow_seconds)))


def run_storm(folder: Path, num_nodes: int, lose: float, slow_seconds: float) -> list[str]:
    """Run it; return the lines to print.

    Args:
        folder: absent or empty.
        num_nodes: number of organisations, each with a domain.
        lose: part of the nodes that is killed after a sixth of the experts has arrived.
        slow_seconds: between two looks at a slow node.
    """
    domains = _prepare(folder, num_nodes)
    watched, over = Watched(), threading.Event()
    requests = folder / "requests.log"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(folder / "counting"), str(REPOSITORY)]),
        "FLWR_HOME": str(folder / "deployment" / "flower"),
        "OMP_NUM_THREADS": "1",
        NUM_REQUESTS: str(requests),
    }
    fedmerge = [sys.executable, "-m", "fedmerge.cli"]
    myself = [sys.executable, str(Path(__file__).resolve())]
    deployment = str(folder / "deployment")
    with _process(folder / "operator.log", [*fedmerge, "deploy", "start", deployment], environment) as operator:
        sampler = threading.Thread(target=_sample, args=(operator.pid, watched, over), daemon=True)
        sampler.start()
        _wait("the operator's side", lambda: "proxy: clients" in (folder / "operator.log").read_text(), operator)
        with (
            _process(folder / "nodes.log", [*myself, "nodes", str(folder)], environment) as nodes,
            _process(folder / "answers.log", [*myself, "answers", str(folder), str(slow_seconds)], environment),
        ):
            # 1. The storm.
            _wait("the SuperNodes are imported", (folder / "ready").exists, nodes)
            watched.phase = "storm"
            (folder / "go").touch()
            _wait("all nodes are online", lambda: all(map(_is_online, (folder / "nodes").iterdir())), nodes)
            watched.phase = "idle"
            time.sleep(min(20.0, num_nodes))
            # 2. The run, and the loss.
            watched.phase = "submission"
            command = [*fedmerge, "run", str(folder / "experiment.toml"), "--federation", "prod"]
            with _process(folder / "run.log", command, environment) as run:
                lost, killed_at = _lose(folder, domains, lose, watched, run)
                _wait("the run ends", lambda: _follow(folder, watched, run), nodes)
        over.set()
        sampler.join()
    return _table(folder, domains, lost, killed_at, watched, requests)


def _prepare(folder: Path, num_nodes: int) -> tuple[str, ...]:
    """Write data, the operator's folder, and a client folder with an approved app for each domain."""
    domains = write_demo(folder / "domains", num_domains=num_nodes, num_users=60, num_items=40)
    write_demo_backbone(folder / "backbone")
    app = submitted_sha256(REPOSITORY)
    ports: set[int] = set()
    while len(ports) < num_nodes + 2:
        ports.add(free_port())
    deployment = create_deployment(folder / "deployment", "prod", ["127.0.0.1"], ports.pop(), ports.pop())
    for domain in domains:
        client = folder / "nodes" / domain
        init_client(client, domain, folder / "domains" / domain, backbone=str(folder / "backbone"))
        allow_exact_sums(client)
        approve_app(client, app, "of the benchmark")
        add_client(deployment, domain, client / "key.pub", app, domain)
        (client / "port").write_text(str(ports.pop()))
        (client / "secret").write_bytes(os.urandom(32))
    config = deployment.folder / "nginx.conf"
    log = f"log_format all_of_it '$msec $status $request_time $uri'; access_log {folder}/fleet.log all_of_it;"
    config.write_text(config.read_text().replace("limit_req_zone", f"{log}\n    limit_req_zone", 1))
    (folder / "counting").mkdir()
    (folder / "counting" / "sitecustomize.py").write_text(COUNTING)
    settings = SETTINGS | {
        "run_id": "storm",
        "backbone.source": str(folder / "backbone"),
        "domains.train": ",".join(domains),
        "domains.unseen": "",
        "server.wait_seconds": 600.0,
    }
    text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items())
    (folder / "experiment.toml").write_text(text)
    return domains


def keep_nodes(folder: Path) -> None:
    """Fork a SuperNode for each client folder once the file ``go`` exists; fork it again when it has ended."""
    os.environ.update(OFFLINE)
    deployment = read_deployment(folder / "deployment")
    clients = sorted((folder / "nodes").iterdir())

    def start(client: Path) -> int:
        if pid := os.fork():
            (client / "pid").write_text(str(pid))
            return pid
        end_with_parent(signal.SIGKILL)
        with (client / "flower.log").open("ab") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        os.environ["FLWR_HOME"] = str(client / "flower")
        sys.argv = ["flower-supernode", "--superlink", deployment.address]
        sys.argv += ["--root-certificates", str(deployment.authority), "--isolation", "process"]
        sys.argv += ["--auth-supernode-private-key", str(client / "key"), "--host", "127.0.0.1"]
        sys.argv += ["--port", (client / "port").read_text(), "--superexec-auth-secret-file", str(client / "secret")]
        try:
            flower_supernode()
        finally:
            os._exit(1)

    gc.freeze()  # collections would touch, and so copy, the memory that the forked processes share
    (folder / "ready").touch()
    while not (folder / "go").exists():
        time.sleep(0.05)
    running = {start(client): client for client in clients}
    attempts: dict[Path, int] = defaultdict(int)
    due: list[tuple[float, Path]] = []
    while True:
        while running and (ended := os.waitpid(-1, os.WNOHANG)[0]):
            client = running.pop(ended)
            wait = WAITS_SECONDS[min(attempts[client], len(WAITS_SECONDS) - 1)]
            attempts[client] += 1
            print(f"{time.time():.1f} {client.name} ended; again in {wait:.0f} s", flush=True)
            due.append((time.time() + wait, client))
        for entry in [entry for entry in due if entry[0] <= time.time()]:
            due.remove(entry)
            running[start(entry[1])] = entry[1]
        time.sleep(0.1)


def keep_answering(folder: Path, slow_seconds: float) -> None:
    """Go from node to node and answer with the executor's code; between two answers, kill what ``lose.json`` names."""
    log_to_stderr()
    code = installed_code(REPOSITORY / "sim")
    clients = sorted((folder / "nodes").iterdir())
    addresses = [("127.0.0.1", int((client / "port").read_text())) for client in clients]
    connections = [
        executor.connect(f"{host}:{port}", (client / "secret").read_bytes())
        for client, (host, port) in zip(clients, addresses, strict=True)
    ]
    workers, looked = Workers(executor.prepare_for), [0.0] * len(clients)
    for connection in connections:
        connection._retry_invoker.max_tries = 1  # type: ignore[union-attr]  # a node that is away holds nobody up
    while True:
        for number, client in enumerate(clients):
            if (folder / "lose.json").exists():
                for name in json.loads((folder / "lose.json").read_text()):
                    os.kill(int((folder / "nodes" / name / "pid").read_text()), signal.SIGKILL)
                (folder / "lose.json").rename(folder / "lost.json")
            if number % SLOW_EVERY == SLOW_EVERY - 1 and time.monotonic() - looked[number] < slow_seconds:
                continue
            looked[number] = time.monotonic()
            host, port = addresses[number]
            try:
                socket.create_connection((host, port), 1.0).close()
                executor.answer_next(connections[number], f"{host}:{port}", client, code, workers)
            except (OSError, httpx.HTTPError, RunNotRunningException) as error:  # a node that is away, or an ended run
                logger.debug("%s: %s", client.name, error)
        time.sleep(0.1)


def _lose(
    folder: Path, domains: tuple[str, ...], part: float, watched: Watched, run: "subprocess.Popen[bytes]"
) -> tuple[set[str], float]:
    """Kill a part of the nodes when a sixth of the experts has arrived: first of those that have not answered."""
    arrived: set[str] = set()

    def enough() -> bool:
        nonlocal arrived
        over = _follow(folder, watched, run)
        arrived = {path.parent.name for path in _experts(folder)}
        return over or len(arrived) >= max(1, len(domains) // 6)

    number = round(part * len(domains))
    if not number:
        return set(), 0.0
    wait_for("the first experts", enough, MOST_SECONDS)
    lost = sorted(domains, key=lambda domain: (domain in arrived, domain))[:number]
    (folder / "lose.part").write_text(json.dumps(lost))
    (folder / "lose.part").rename(folder / "lose.json")
    wait_for("the nodes are killed", (folder / "lost.json").exists, MOST_SECONDS)
    return set(lost), time.time()


def _experts(folder: Path) -> list[Path]:
    return list((folder / "deployment" / "runs" / "storm").glob("adapters/[!.]*/training.json"))


def _follow(folder: Path, watched: Watched, run: "subprocess.Popen[bytes]") -> bool:
    """Note the phase that the run is in; return True if it has ended."""
    log = folder / "deployment" / "runs" / "storm" / "run.log"
    if log.exists():
        lines = [line[9:] for line in log.read_text().splitlines()]
        reached = [phase for phase, words in PHASES.items() if any(line.startswith(words) for line in lines)]
        if "train" in reached and "merge" in reached and "validate" not in reached:
            reached.remove("merge")  # its words are those of every answer to a training
        watched.phase = reached[-1] if reached else watched.phase
    return run.poll() is not None


def _is_online(client: Path) -> bool:
    log = client / "flower.log"
    return log.exists() and "SuperNode ID" in log.read_text()


def _sample(operator: int, watched: Watched, over: threading.Event) -> None:
    """Add up CPU and memory of the operator's processes until the end."""
    last: dict[int, float] = {}
    before = time.time()
    while not over.wait(SAMPLE_SECONDS):
        phase, now = watched.phase, time.time()
        if not watched.begins or watched.begins[-1][1] != phase:
            watched.begins.append((before, phase))
        watched.seconds[phase] += now - before
        before = now
        sizes: dict[str, float] = defaultdict(float)
        for pid in _below(operator):
            with suppress(OSError, ProcessLookupError):
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                program = next((name for name, words in PROGRAMS.items() if words in command), "")
                values = sample(pid)[1]
                watched.cpu[phase, program] += values["cpu"] - last.get(pid, 0.0)
                last[pid] = values["cpu"]
                sizes[program] += values.get("rss", 0.0)
        for program, size in sizes.items():
            watched.peak[program] = max(size, watched.peak[program])


def _below(pid: int) -> list[int]:
    """Return the descendants of a process."""
    children: dict[int, list[int]] = defaultdict(list)
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            children[int(path.read_text().rpartition(")")[2].split()[1])].append(int(path.parent.name))
    found, left = [], [pid]
    while left:
        left += children[left[0]]
        found.append(left.pop(0))
    return found[1:]


def _table(
    folder: Path, domains: tuple[str, ...], lost: set[str], killed_at: float, watched: Watched, requests: Path
) -> list[str]:
    of_fleet = [line.split() for line in (folder / "fleet.log").read_text().splitlines()]
    of_server = [line.split() for line in requests.read_text().splitlines()] if requests.exists() else []

    def in_phase(moment: float) -> str:
        return next((phase for begin, phase in reversed(watched.begins) if moment >= begin), "")

    fleet: dict[str, int] = defaultdict(int)
    server: dict[str, int] = defaultdict(int)
    looks: dict[str, int] = defaultdict(int)
    for line in of_fleet:
        fleet[in_phase(float(line[0]))] += 1
    for line in of_server:
        server[in_phase(float(line[0]))] += 1
        looks[in_phase(float(line[0]))] += line[1] == "/v1/runtime/pull-messages"
    lines = [f"{'phase':<13}{'s':>7}" + "".join(f"{f'CPU s {name}':>18}" for name in PROGRAMS) + f"{'nodes, 1/s':>12}"
             f"{'server, 1/s':>13}{'looks':>7}"]  # fmt: skip
    for _, phase in watched.begins:
        seconds = watched.seconds[phase]
        cells = "".join(f"{watched.cpu[phase, name]:>18.1f}" for name in PROGRAMS)
        rates = f"{fleet[phase] / seconds:>12.1f}{server[phase] / seconds:>13.1f}"
        lines.append(f"{phase:<13}{seconds:>7.1f}{cells}{rates}{looks[phase]:>7}")
    lines.append("peak MB: " + ", ".join(f"{name} {watched.peak[name]:.0f}" for name in PROGRAMS))
    asked = [int(line[2]) for line in of_server if line[1] == "/v1/runtime/pull-messages"]
    taken = [int(line[3]) for line in of_server if line[1] == "/v1/runtime/pull-messages"]
    lines.append(
        f"the server looked {len(asked)} times for {sum(asked) / max(1, len(asked)):.1f} answers on average, and took "
        f"{sum(taken)}, at most {max(taken, default=0)} at once"
    )
    statuses: dict[str, int] = defaultdict(int)
    for line in of_fleet:
        statuses[line[1]] += 1
    longest = max((float(line[2]) for line in of_fleet), default=0.0)
    lines.append(f"answers of nginx to nodes: {dict(sorted(statuses.items()))}, the slowest after {longest:.1f} s")
    arrived = {path.parent.name: path.stat().st_mtime for path in _experts(folder)}
    if lost:
        first, second = (
            max((arrived[domain] for domain in domains if domain in arrived and (domain in lost) == those), default=0.0)
            for those in (False, True)
        )
        lines.append(
            f"{len(lost)} nodes killed; the last expert of the others came {first - killed_at:.0f} s later, of those "
            f"{second - killed_at:.0f} s later"
        )
    run = folder / "deployment" / "runs" / "storm"
    clients = json.loads((run / "clients.json").read_text()) if (run / "clients.json").exists() else {}
    tested = sorted(path.stem for path in run.glob("test/*"))
    lines.append(
        f"{'complete' if (run / 'DONE').exists() else 'NOT COMPLETE'}: {len(arrived)} experts, test results of "
        f"{len(set(tested) & set(domains))} of {len(domains)} domains, excluded: "
        f"{', '.join(clients.get('excluded', {})) or 'none'}; load {os.getloadavg()[1]:.1f} on "
        f"{len(os.sched_getaffinity(0))} CPUs"
    )
    return lines


@contextmanager
def _process(log: Path, command: list[str], environment: dict[str, str]) -> Iterator["subprocess.Popen[bytes]"]:
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=log.parent / "deployment", env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(what: str, is_so: Callable[[], bool], process: "subprocess.Popen[bytes]") -> None:
    wait_for(what, lambda: is_so() or process.poll() is not None, MOST_SECONDS)
    if process.poll() is not None:
        raise SystemExit(f"{what}: {process.args!r} ended with exit code {process.returncode}")


if __name__ == "__main__":
    main()
