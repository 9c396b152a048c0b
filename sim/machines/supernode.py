"""Keep an organisation's client running: Flower's SuperNode and its executor (``sim.machines.executor``).

After a crash the server refuses a SuperNode for up to a minute, until it notices the crash; it refuses an unregistered
key with the same answer, and the SuperNode exits in both cases. This supervisor tries again and reports which it is.
"""

import logging
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cryptography.hazmat.primitives.asymmetric import ec

from fedmerge.errors import ClientError, RunDirError
from fedmerge.installation import root
from fedmerge.organisation.folder import (
    KEY,
    Bundle,
    Client,
    approved_apps,
    private_key,
)
from fedmerge.privacy.signatures import fingerprint
from fedmerge.runs.folder import locked
from sim.flower_internals import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    FleetHttpClient,
    NodeAuthHttpInterceptor,
    ProtobufClientInterceptor,
    RuntimeVersionHttpInterceptor,
    public_key_to_bytes,
)
from sim.local.launch import COLOURS, OFFLINE
from sim.machines.worker import end_with_parent

WAITS_SECONDS = (5.0, 10.0, 15.0, 30.0)  # between attempts; the last value repeats
TRAP_SECONDS = 75.0  # until then a refusal can mean that the server has not noticed the end of the last SuperNode
GRACE_SECONDS = 10.0
POLL_SECONDS = 0.2
LARGEST_LOG_BYTES = 10 * 2**20
FLOWER_LOG = "flower.log"

logger = logging.getLogger("fedmerge.client")


@dataclass
class Life:
    """State of a SuperNode according to its log; written by the thread that reads the log."""

    connected: bool = False
    refused: bool = False
    unsafe: bool = False
    unreachable: bool = False


def run_client(client: Client, bundle: Bundle, stop: threading.Event) -> None:
    """Run the client until ``stop`` is set, and restart its processes whenever they end.

    Raises:
        ConfigError: the key is missing or invalid.
        ClientError: the client is already running, or no app is approved.
    """
    name = fingerprint(private_key(client).public_key())
    if not approved_apps(client.folder):
        raise ClientError(
            f"{client.folder}: no app is approved, so every run would be refused. Approve the one that you agreed on: "
            f"fedmerge client approve {client.folder} --bundle BUNDLE, or --app FILE"
        )
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(client.folder))
        except RunDirError as error:
            raise ClientError(f"{client.folder}: this client may already be running. {error}") from error
        logger.info("%s: domain %s, key %s", client.name, client.domain.name, name)
        refused_since: float | None = None
        attempt = 0
        while not stop.is_set():
            life = Life()
            with _processes(client, bundle, life) as (supernode, executor):
                while not stop.wait(POLL_SECONDS) and supernode.poll() is None and executor.poll() is None:
                    pass
                codes = supernode.poll(), executor.poll()
            if stop.is_set():
                break
            if life.connected:
                attempt, refused_since = 0, None
            elif life.refused:
                refused_since = refused_since or time.monotonic()
            wait = WAITS_SECONDS[min(attempt, len(WAITS_SECONDS) - 1)]
            attempt += 1
            trapped = refused_since is None or time.monotonic() - refused_since < TRAP_SECONDS
            logger.warning("%s; trying again in %.0f s", _explain_end(life, codes, bundle, name, trapped), wait)
            stop.wait(wait)
        logger.info("stopped")


def _explain_end(life: Life, codes: tuple[int | None, int | None], bundle: Bundle, name: str, trapped: bool) -> str:
    """Return the reason for which the processes ended, for the log."""
    if life.unsafe:
        return (
            f"{bundle.address} is not the server of this bundle: its certificate is not from the authority in "
            f"{bundle.authority.name}, not for this address, or not valid now (fedmerge client check shows which)"
        )
    if life.refused and trapped:
        return (
            f"{bundle.address} refuses this client for now: it can take a minute to notice that the last process "
            "ended; or the key is not registered"
        )
    if life.refused:
        return (
            f"{bundle.address} still refuses this client: its key {name} is not registered there, or another process "
            "uses it; send key.pub to the operator"
        )
    if codes[0] is None:
        return f"the process that answers messages ended with exit code {codes[1]}"
    if not life.connected:
        return (
            f"{bundle.address} refused this client's signature or did not answer (the SuperNode ended with exit code "
            f"{codes[0]}): check this machine's clock; details are in {FLOWER_LOG}"
        )
    return f"the SuperNode ended with exit code {codes[0]}; details are in {FLOWER_LOG}"


@contextmanager
def _processes(
    client: Client, bundle: Bundle, life: Life
) -> Iterator[tuple["subprocess.Popen[str]", "subprocess.Popen[bytes]"]]:
    """Run a SuperNode and its executor, and end both afterwards; the SuperNode first signs off at the server."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    client.cache_dir.mkdir(parents=True, exist_ok=True)
    secret = client.cache_dir / ".executor-secret"
    secret.unlink(missing_ok=True)
    secret.touch(mode=0o600)
    secret.write_bytes(secrets.token_bytes(32))
    python = Path(sys.executable)
    environment = _environment(client)
    command = [str(python.parent / "flower-supernode"), "--superlink", bundle.address]
    command += ["--root-certificates", str(bundle.authority), "--auth-supernode-private-key", str(client.folder / KEY)]
    command += ["--isolation", "process", "--superexec-auth-secret-file", str(secret)]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    work = [str(python), "-P", "-m", "sim.machines.executor", str(client.folder), f"127.0.0.1:{port}", str(secret)]
    started: list[subprocess.Popen[Any]] = []
    try:
        supernode = subprocess.Popen(
            command,
            cwd=client.cache_dir,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            preexec_fn=_die_with_parent,  # noqa: PLW1509  # the only other thread reads a log
            start_new_session=True,  # Ctrl-C goes to the supervisor, which ends both in order
        )
        started.append(supernode)
        reader = threading.Thread(target=_read_log, args=(supernode.stdout, client, bundle, life), daemon=True)
        reader.start()
        executor = subprocess.Popen(
            work, cwd=client.cache_dir, env=environment, stdin=subprocess.DEVNULL, start_new_session=True
        )
        started.append(executor)
        yield supernode, executor
        reader.join(timeout=1.0)
    finally:
        for process in reversed(started):
            _end(process)
        secret.unlink(missing_ok=True)


def _read_log(lines: IO[str] | None, client: Client, bundle: Bundle, life: Life) -> None:
    """Write the output of Flower's SuperNode to a file, and log the few events that matter."""
    path = client.folder / FLOWER_LOG
    fresh = path.exists() and path.stat().st_size > LARGEST_LOG_BYTES
    with path.open("w" if fresh else "a", encoding="utf-8") as log:
        for line in lines or ():
            text = COLOURS.sub("", line.rstrip())
            with suppress(OSError):  # even on a full disk the pipe must be read, or Flower blocks
                log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
                log.flush()
            if found := re.search(r"SuperNode ID: (\d+)", text):
                life.connected, life.unreachable = True, False
                logger.info("connected to %s as node %s; waiting for runs", bundle.address, found.group(1))
            elif "[code: 2004]" in text:
                life.refused = True
            elif "SSL/TLS handshake error" in text:
                life.unsafe = True
            elif "Connection attempt failed" in text and not life.unreachable:
                life.unreachable = True
                logger.warning("%s cannot be reached; still trying", bundle.address)
            elif "Connection successful" in text and life.unreachable:
                life.unreachable = False
                logger.info("%s can be reached again", bundle.address)


def _end(process: "subprocess.Popen[Any]") -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()


def _environment(client: Client) -> dict[str, str]:
    """Return this process's variables, with this installation's ``sim`` first and Flower's telemetry off."""
    variables = dict(os.environ)
    variables.pop("PYTHONDONTWRITEBYTECODE", None)
    return variables | {
        **OFFLINE,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(root()), variables.get("PYTHONPATH", "")])),
        "FLWR_HOME": str(client.cache_dir / "flower"),
    }


def _die_with_parent() -> None:
    end_with_parent(signal.SIGTERM)


def is_registered(client: Client, bundle: Bundle) -> str:
    """Ask the server to admit this client, and sign off at once.

    Returns:
        Empty if the server admitted it, else the server's answer.
    """
    key: ec.EllipticCurvePrivateKey = private_key(client)
    interceptors: list[ProtobufClientInterceptor] = [
        RuntimeVersionHttpInterceptor(component_name="SuperNode"),
        NodeAuthHttpInterceptor(key, key.public_key()),
    ]
    authority = bundle.authority.read_bytes()
    with FleetHttpClient.from_server_address(bundle.address, False, authority, interceptors) as fleet:
        try:
            public = public_key_to_bytes(key.public_key())
            node = fleet.ActivateNode(ActivateNodeRequest(public_key=public, heartbeat_interval=30.0))
            fleet.DeactivateNode(DeactivateNodeRequest(node_id=node.node_id))
        except Exception as error:  # the HTTP library and Flower raise many kinds
            response = getattr(error, "response", None)
            return f"{error}" if response is None else f"{response.status_code} {response.text[:200]}"
    return ""
