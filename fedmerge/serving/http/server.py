"""Bind, load, and answer until the process is ended."""

import ipaddress
import socket
from pathlib import Path

import uvicorn

from fedmerge.errors import ConfigError
from fedmerge.serving.http.app import make_app
from fedmerge.serving.http.guard import OPEN_PATHS, guarded
from fedmerge.serving.http.page.routes import ASSETS
from fedmerge.serving.http.service import Service

SECONDS_TO_END = 10  # after SIGTERM, for the requests in progress


def bind(host: str, port: int) -> socket.socket:
    """Return a socket on an address that is free; it does not listen yet.

    Args:
        host: name or address of this machine.
        port: 0 takes any free one.

    Raises:
        ConfigError: the address is taken, or not of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"serve: cannot bind {host}:{port} ({error}). Give another --host or --port.") from error
    return found


def is_loopback(bound: socket.socket) -> bool:
    """Return whether only this machine reaches a socket."""
    return ipaddress.ip_address(bound.getsockname()[0]).is_loopback


def read_key(path: Path) -> str:
    """Read a key: the first line of a file.

    Raises:
        ConfigError: a file that is missing, or whose first line is empty or not ASCII.
    """
    try:
        key = path.read_text(encoding="ascii").partition("\n")[0].strip()
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--api-key-file: {path} cannot be read ({error}), expected a line of ASCII.") from error
    if not key:
        raise ConfigError(f"--api-key-file: the first line of {path} is empty, expected a key. Write one.")
    return key


def make_server(service: Service, bound: socket.socket, key: str | None, page: bool = False) -> uvicorn.Server:
    """Return a server that answers on a socket once it runs; SIGTERM and SIGINT let it finish what is in progress.

    Args:
        service: what is served.
        bound: of :func:`bind`.
        key: that requests must give; None asks for none. Without it, only this machine may change items or models.
        page: with the page at ``/``, which is sent without the key, and asks for it.
    """
    app = make_app(service, has_key=key is not None, is_local=is_loopback(bound), page=page)
    config = uvicorn.Config(
        guarded(app, key, service.metrics, open_paths=(*OPEN_PATHS, *(ASSETS if page else ()))),
        log_level="warning",
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=SECONDS_TO_END,
    )
    return uvicorn.Server(config)
