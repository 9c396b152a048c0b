"""The operator's server: run SuperLink and proxy together, register keys, report the state of clients.

Flower is used through its own commands, `flower-superlink` and `flwr`. Keys are registered through Flower's client of
the Control API: a command for each takes seconds, which adds up for a hundred.
"""

import itertools
import os
import re
import secrets
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import httpx
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import load_ssh_public_key

from fedmerge.deploy.certificates import expires
from fedmerge.deploy.clients import RegisteredClient, find_client, list_clients, note_nodes, remove_client
from fedmerge.deploy.folder import Deployment
from fedmerge.deploy.texts import LOG_FILE
from fedmerge.errors import DeploymentError
from sim.flower_internals import (
    ControlHttpClient,
    FlowerError,
    RegisterNodeRequest,
    RuntimeVersionHttpInterceptor,
    make_simple_http_retry_invoker,
    public_key_to_bytes,
)
from sim.local.launch import (
    COLOURS,
    GRACE_SECONDS,
    MARK,
    ask_flower,
    ending_processes,
    flower_environment,
    flower_reason,
)

START_SECONDS = 60.0
LARGEST_LOG_BYTES, FORMER_LOGS = 2**20 * 10, 3  # of refused requests
POLL_LINE = re.compile(r'"(POST /v1/|GET /health).* 200$')
SOON_DAYS = 30
NGINX_PLACES = os.pathsep.join(["/usr/sbin", "/usr/local/sbin", "/opt/homebrew/bin"])


@dataclass(frozen=True)
class ClientStatus:
    """An organisation as `deploy status` shows it.

    Attributes:
        client: its name and key.
        state: Flower's status (``online``, ``offline``, ``registered``), or ``not registered``, or ``unknown`` while
            the SuperLink is not running.
        since: time of the last change in Flower's format; empty if Flower reports none.
    """

    client: RegisteredClient
    state: str
    since: str


def start(deployment: Deployment, say: Callable[[str], None]) -> int:
    """Run SuperLink and proxy until one of them ends or this process receives a signal.

    Returns:
        1 always: an end without a signal is a failure, after which systemd starts them again.

    Raises:
        DeploymentError: nginx is missing, a port is in use, or one of them does not start.
    """
    nginx = _nginx(deployment)
    for what, port in (("the SuperLink", deployment.superlink_port), ("nginx", deployment.port)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                remedy = (
                    f"The federation may already be running; check with: fedmerge deploy status {deployment.folder}"
                )
                if isinstance(error, PermissionError):
                    remedy = "Only root can use ports below 1024; create the deployment with a higher --port"
                raise DeploymentError(f"port {port} for {what} cannot be used ({error.strerror}). {remedy}") from error
    mark = secrets.token_hex(16)
    variables = operator_environment(deployment) | {MARK: mark}
    server = deployment.folder / "server"
    command = [_program("flower-superlink"), "--host", "127.0.0.1", "--port", str(deployment.superlink_port)]
    command += ["--ssl-ca-certfile", str(deployment.authority), "--ssl-certfile", str(server / "server.crt")]
    command += ["--ssl-keyfile", str(server / "server.key"), "--enable-supernode-auth"]
    command += ["--database", str(deployment.state / "superlink.db"), "--disable-runtime-dependency-installation"]
    with ending_processes(mark):
        superlink = subprocess.Popen(
            command,
            cwd=deployment.folder,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        )
        threading.Thread(target=_pass_on, args=(superlink, say), daemon=True).start()
        _wait(lambda: is_healthy(deployment), superlink, "the SuperLink")
        say(f"SuperLink: answers on 127.0.0.1:{deployment.superlink_port}")
        for name in register_clients(deployment, say):
            say(f"{name}: key registered")
        with _proxy(nginx, deployment, variables) as proxy:
            _wait(lambda: _listens(deployment.port), proxy, "nginx")
            say(f"proxy: clients reach this federation at {deployment.address}")
            while superlink.poll() is None and proxy.poll() is None:
                time.sleep(0.5)
                if rotate_log(deployment.state / "nginx" / LOG_FILE):
                    proxy.send_signal(
                        signal.SIGUSR1
                    )  # nginx opens a new file; until then it writes into the former one
            ended, code = ("the SuperLink", superlink.poll()) if proxy.poll() is None else ("nginx", proxy.poll())
            say(f"{ended} ended with exit code {code}; stopping the other")
    return 1


@contextmanager
def _proxy(
    nginx: list[str], deployment: Deployment, variables: Mapping[str, str]
) -> "Iterator[subprocess.Popen[bytes]]":
    """Run nginx, and end it with its workers afterwards; they overwrite the mark by which other processes are found."""
    process = subprocess.Popen(
        nginx, cwd=deployment.folder, env=variables, stdin=subprocess.DEVNULL, start_new_session=True
    )
    try:
        yield process
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def rotate_log(path: Path, largest_bytes: int = LARGEST_LOG_BYTES) -> bool:
    """Rename a log that is too large, ``refused.log`` -> ``refused.log.1``, and drop the oldest; True if it was."""
    try:
        if path.stat().st_size <= largest_bytes:
            return False
    except FileNotFoundError:
        return False
    names = [path, *(path.with_name(f"{path.name}.{number}") for number in range(1, FORMER_LOGS + 1))]
    for newer, older in reversed(list(itertools.pairwise(names))):
        if newer.exists():
            newer.replace(older)
    return True


def is_healthy(deployment: Deployment) -> bool:
    """Return True if the SuperLink answers and presents the federation's certificate."""
    context = ssl.create_default_context(cafile=str(deployment.authority))
    url = f"https://127.0.0.1:{deployment.superlink_port}/health"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    with suppress(OSError), opener.open(url, timeout=5.0) as response:
        return bool(response.status == 200)
    return False


def register_clients(deployment: Deployment, say_refusal: Callable[[str], None]) -> list[str]:
    """Register every organisation's key that the SuperLink does not know, and return the names of those organisations.

    Args:
        deployment: the federation, which must be running.
        say_refusal: receives a message for each key that Flower refuses; the others are still registered.
    """
    registered = set(_nodes(deployment))
    clients = list_clients(deployment)
    nodes = {client.name: client.node for client in clients if client.node in registered}
    new = [client for client in clients if client.name not in nodes]
    if not new:
        return []
    with ControlHttpClient.from_server_address(
        f"127.0.0.1:{deployment.superlink_port}",
        False,
        deployment.authority.read_bytes(),
        interceptors=[RuntimeVersionHttpInterceptor(component_name="fedmerge")],
        retry_invoker=make_simple_http_retry_invoker(),
    ) as control:
        for client in new:
            # add_client has checked the kind of the key.
            key = cast(EllipticCurvePublicKey, load_ssh_public_key(client.key.read_bytes()))
            request = RegisterNodeRequest(public_key=public_key_to_bytes(key), name=client.name)
            try:
                nodes[client.name] = control.RegisterNode(request).node_id
            except httpx.HTTPStatusError as error:
                reason = FlowerError.from_json(error.response.text) or error
                say_refusal(
                    f"{client.name}: Flower refuses to register {client.key}: {str(reason).rstrip('.')}. A withdrawn "
                    "key cannot be registered again. Remove the client: "
                    f"fedmerge deploy remove-client {deployment.folder} {client.name}, and ask for the key.pub of a "
                    "new client folder (fedmerge client init)."
                )
                continue
            note_nodes(deployment, {name: node for name, node in nodes.items() if node is not None})
    return [client.name for client in new if client.name in nodes]


def withdraw_client(deployment: Deployment, name: str) -> None:
    """Unregister an organisation's key, so that the server refuses its node, and remove the organisation.

    Raises:
        DeploymentError: no client has this name, or the SuperLink is not running.
    """
    client = find_client(deployment, name)
    if client.node is None:  # never registered
        remove_client(deployment, name)
        return
    if not is_healthy(deployment):
        raise DeploymentError(
            f"client {name}: the federation is not running, so its key cannot be withdrawn. Start it: fedmerge deploy "
            f"start {deployment.folder}"
        )
    if client.node in _nodes(deployment):
        answer = _flwr(deployment, "supernode", "unregister", str(client.node), deployment.name)
        if not answer.get("success"):
            raise DeploymentError(
                f"client {name}: Flower refuses to unregister it: {flower_reason(answer)}. Its key is still valid: "
                f"restart the federation, then try again: fedmerge deploy start {deployment.folder}"
            )
    remove_client(deployment, name)


def client_states(deployment: Deployment) -> list[ClientStatus]:
    """Return every organisation with Flower's status of its node."""
    nodes = _nodes(deployment) if is_healthy(deployment) else None
    found = []
    for client in list_clients(deployment):
        if nodes is None:
            found.append(ClientStatus(client, "unknown", ""))
            continue
        node: Mapping[str, Any] = nodes.get(client.node or 0, {})
        state = str(node.get("status", "not registered"))
        since = node.get({"online": "online-at", "offline": "offline-at"}.get(state, ""), "")
        found.append(ClientStatus(client, state, str(since)))
    return found


def expiring(deployment: Deployment) -> list[str]:
    """Return a warning for each certificate that expires within ``SOON_DAYS`` or has expired."""
    lines = []
    paths = ["server/server.crt", "operator/operator.crt", "ca/ca.crt"]
    for path in (deployment.folder / part for part in paths):
        until = expires(path)
        days = (until - datetime.now(UTC)).days
        if days < SOON_DAYS:
            remedy = f"fedmerge deploy renew {deployment.folder}"
            if path.name == "ca.crt":
                remedy = "all certificates depend on it; create a new deployment and send its bundles to all clients"
            lines.append(f"{path} is valid until {until:%Y-%m-%d}: {remedy}")
    return lines


def operator_environment(deployment: Deployment) -> dict[str, str]:
    """Return the environment variables with which Flower's commands use this deployment."""
    return flower_environment(deployment.flower_home, deployment.superlink_port)


def _nodes(deployment: Deployment) -> dict[int, dict[str, Any]]:
    """Return Flower's registered nodes by id."""
    answer = _flwr(deployment, "supernode", "list", deployment.name)
    if not answer.get("success"):
        raise DeploymentError(
            f"the SuperLink does not list its nodes: {flower_reason(answer)}. Read its log, or restart it: "
            f"fedmerge deploy start {deployment.folder}"
        )
    return {int(node["node-id"]): node for node in answer["nodes"] if node["status"] != "unregistered"}


def _flwr(deployment: Deployment, *arguments: str) -> dict[str, Any]:
    return ask_flower([_program("flwr"), *arguments], operator_environment(deployment))


def _program(name: str) -> str:
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise DeploymentError(
            f"{path}: not found, expected Flower to install it. Install fedmerge again in this environment."
        )
    return str(path)


def _nginx(deployment: Deployment) -> list[str]:
    """Return the command that starts the proxy, after nginx has accepted its configuration."""
    program = shutil.which("nginx", path=os.pathsep.join([os.environ.get("PATH", os.defpath), NGINX_PLACES]))
    if program is None:
        raise DeploymentError(
            "nginx: not found. It must be the only public listener, because anyone who reaches Flower's own port can "
            "submit code. Install it, for example with apt-get install nginx, and disable its service."
        )
    config = deployment.folder / "nginx.conf"
    command = [program, "-p", str(deployment.state / "nginx"), "-c", str(config)]
    command += ["-g", "user root;"] if os.geteuid() == 0 else []  # its workers must be able to read this folder
    tested = subprocess.run([*command, "-t", "-q"], capture_output=True, text=True, check=False)
    if tested.returncode:
        raise DeploymentError(
            f"{config}: nginx refuses this configuration: {tested.stderr.strip()}. Write it again: fedmerge deploy "
            f"renew {deployment.folder}"
        )
    return command


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _pass_on(superlink: "subprocess.Popen[str]", say: Callable[[str], None]) -> None:
    """Pass on the SuperLink's log without the lines of polling clients."""
    for line in superlink.stdout or ():
        if not POLL_LINE.search(line):
            say(COLOURS.sub("", line.rstrip()))


def _wait(is_ready: Callable[[], bool], process: "subprocess.Popen[Any]", what: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not is_ready():
        if process.poll() is not None:
            raise DeploymentError(
                f"{what} ended with exit code {process.returncode} during its start. See its output above."
            )
        if time.monotonic() > deadline:
            raise DeploymentError(f"{what} does not answer {START_SECONDS:g} s after its start. See its output above.")
        time.sleep(0.2)
