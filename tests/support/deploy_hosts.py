"""Machines of a test federation: network namespaces with their own addresses, or the loopback of this machine.

Each namespace has one interface, eth0, connected to a bridge in another namespace, so this machine's network does not
change. Every network has fresh names, and everything is removed at the end.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from sim.local.launch import flower_environment

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAMS = Path(sys.executable).parent
NETWORK = "FEDMERGE_TEST_NETWORK"
GRACE_SECONDS = 15.0


@dataclass(frozen=True)
class Host:
    """A machine.

    Attributes:
        name: name of the machine and of its folder.
        address: its own address, or 127.0.0.1.
        namespace: network namespace; empty on the loopback.
        cable: the bridge's end of its cable.
    """

    name: str
    address: str
    namespace: str = ""
    cable: str = ""

    def command(self, *arguments: str | Path) -> list[str]:
        """Return a command wrapped so that it runs on this machine."""
        inside = ["ip", "netns", "exec", self.namespace] if self.namespace else []
        return [*inside, *map(str, arguments)]


@dataclass
class Network:
    """Connected machines; their processes end with the network.

    Attributes:
        hosts: the machines.
        folder: parent of each machine's folder.
        switch: namespace of the bridge; empty on the loopback.
        mark: mark in the environment of every process on the machines.
        processes: processes started by :meth:`start`.
    """

    hosts: list[Host]
    folder: Path
    switch: str = ""
    mark: str = field(default_factory=lambda: secrets.token_hex(16))
    processes: "list[subprocess.Popen[bytes]]" = field(default_factory=list)

    def home(self, host: Host) -> Path:
        """Return the folder of a machine's files."""
        return self.folder / host.name

    def variables(self, host: Host, more: Mapping[str, str] | None = None) -> dict[str, str]:
        """Return the environment of a machine's processes."""
        home = self.home(host)
        home.mkdir(exist_ok=True)
        own = {"HOME": str(home), "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", NETWORK: self.mark}
        return flower_environment(home / "flower", 1) | own | dict(more or {})

    def run(
        self, host: Host, *arguments: str | Path, more: Mapping[str, str] | None = None
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command on a machine until it ends; return both streams together."""
        return subprocess.run(
            host.command(*arguments),
            cwd=self.home(host),
            env=self.variables(host, more),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )

    def start(
        self, host: Host, log: str, *arguments: str | Path, more: Mapping[str, str] | None = None
    ) -> "subprocess.Popen[bytes]":
        """Start a command on a machine; its output is appended to the log, a file in the machine's folder."""
        variables = self.variables(host, more)
        with (self.home(host) / log).open("ab") as output:
            process = subprocess.Popen(
                host.command(*arguments),
                cwd=self.home(host),
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.processes.append(process)
        return process

    def pull_out(self, host: Host, out: bool = True) -> None:
        """Disconnect a machine from the network, or connect it again."""
        _ip("-n", self.switch, "link", "set", host.cable, "down" if out else "up")


@contextmanager
def network(folder: Path, names: list[str], in_namespaces: bool) -> Iterator[Network]:
    """Create machines with these names and always remove them afterwards."""
    made = Network([Host(name, "127.0.0.1") for name in names], folder)
    if in_namespaces:
        token = secrets.token_hex(3)
        subnet = f"10.{200 + secrets.randbelow(50)}.{secrets.randbelow(256)}"
        made.switch = f"fm{token}sw"
        made.hosts = [
            Host(name, f"{subnet}.{number}", f"fm{token}n{number}", f"port{number}")
            for number, name in enumerate(names, start=1)
        ]
    try:
        if in_namespaces:
            _wire(made)
        yield made
    finally:
        try:
            _end(made)
        finally:
            for namespace in [host.namespace for host in made.hosts] + [made.switch]:
                if namespace:
                    left = subprocess.run(
                        ["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False
                    )
                    kill([int(pid) for pid in left.stdout.split()])  # nginx overwrites its mark
                    subprocess.run(["ip", "netns", "del", namespace], capture_output=True, check=False)


def why_no_namespaces() -> str:
    """Return the reason why network namespaces cannot be used here, or ""."""
    if shutil.which("ip") is None:
        return "iproute2 is not installed"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"fm{secrets.token_hex(3)}try"
    try:
        _ip("netns", "add", name)
        _ip("-n", name, "link", "add", "name", "br0", "type", "bridge")
        _ip("-n", name, "link", "add", "name", "try0", "type", "veth", "peer", "name", "try1")
    except AssertionError as error:
        return f"network namespaces are not permitted: {error}"
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return ""


def has_nginx() -> bool:
    """Return True if nginx is installed."""
    return shutil.which("nginx", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"])) is not None


def free_port() -> int:
    """Return an unused port below the range of ephemeral ports."""
    while True:
        port = 10000 + secrets.randbelow(10000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def wait_for(what: str, is_so: Callable[[], bool], seconds: float = 120.0) -> float:
    """Wait until a condition holds; return the seconds it took."""
    started = time.monotonic()
    while not is_so():
        assert time.monotonic() - started < seconds, f"{what}: not within {seconds:g} s"
        time.sleep(0.1)
    return time.monotonic() - started


def processes_of(mark: str, program: str, under: int | None = None) -> list[int]:
    """Return the network's running processes with this program in the command line, below ``under`` if given."""
    found = []
    for pid in _all(mark):
        with suppress(OSError, IndexError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:4]
            runs = any(word.rpartition(b"/")[2] == program.encode() for word in words)
            if runs and (under is None or under in _ancestors(pid)):
                found.append(pid)
    return found


def workers_of(mark: str) -> list[int]:
    """Return the clients' processes that handle a message: the children of an executor."""
    executors = processes_of(mark, "sim.machines.executor")
    return [
        pid
        for executor in executors
        for pid in processes_of(mark, "sim.machines.executor", executor)
        if pid != executor
    ]


def kill(pids: list[int]) -> int:
    """Send SIGKILL; return the number of processes."""
    killed = 0
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            killed += 1
    return killed


def _all(mark: str) -> list[int]:
    """Return every running process of the network's machines and their descendants."""
    entry, found = f"{NETWORK}={mark}".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if entry in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def _end(made: Network) -> None:
    """Send SIGTERM to every process, then SIGKILL to the remaining ones."""
    for process in made.processes:
        process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    while (alive := _all(made.mark)) and time.monotonic() < deadline:
        for process in made.processes:
            process.poll()
        time.sleep(0.2)
    while alive:
        kill(alive)
        for process in made.processes:
            process.poll()
        time.sleep(0.1)
        alive = _all(made.mark)


def _ancestors(pid: int) -> list[int]:
    found = []
    while pid > 1:
        found.append(pid)
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return found


def _wire(made: Network) -> None:
    _ip("netns", "add", made.switch)
    _ip("-n", made.switch, "link", "add", "name", "br0", "type", "bridge")
    _ip("-n", made.switch, "link", "set", "br0", "up")
    for host in made.hosts:
        _ip("netns", "add", host.namespace)
        _ip("-n", host.namespace, "link", "set", "lo", "up")
        peer = ["type", "veth", "peer", "name", "eth0", "netns", host.namespace]
        _ip("-n", made.switch, "link", "add", "name", host.cable, *peer)
        _ip("-n", made.switch, "link", "set", host.cable, "master", "br0", "up")
        _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", "eth0")
        _ip("-n", host.namespace, "link", "set", "eth0", "up")


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr.strip()}"
