"""``fedmerge client``: an organisation's side of a federation on separate machines."""

import argparse
import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedmerge.cli.options import Commands
    from fedmerge.organisation.folder import Bundle


def add_commands(commands: "Commands") -> None:
    """Add ``client`` to the parser."""
    group = commands.add_parser("client", help="take part in a federation on separate machines with your own data")
    client = group.add_subparsers(required=True, metavar="COMMAND")

    init = client.add_parser("init", help="create a client folder: key pair, client.toml, policy.toml")
    init.add_argument("folder", type=Path, metavar="DIR")
    init.add_argument(
        "--name", required=True, help="name by which the operator knows the client, for example north-shop"
    )
    init.add_argument(
        "--domain", required=True, metavar="PATH", help="the domain folder, or its address on shared storage"
    )
    init.add_argument("--threads", type=int, default=1, help="processor threads (default: 1)")
    init.add_argument("--backbone", default=None, help="folder or id of the text encoder (default: all-MiniLM-L6-v2)")
    init.set_defaults(command=_init)

    approve = client.add_parser("approve", help="approve an app by its hash; without options, list the approved apps")
    approve.add_argument("folder", type=Path, metavar="DIR")
    source = approve.add_mutually_exclusive_group()
    source.add_argument("--bundle", type=Path, help="the operator's bundle, which contains the hash")
    source.add_argument(
        "--app",
        type=Path,
        metavar="FILE",
        help="the app itself, a .fab file; its contents are compared with the installed code",
    )
    approve.set_defaults(command=_approve)

    check = client.add_parser("check", help="check everything that the first run needs")
    check.add_argument("folder", type=Path, metavar="DIR")
    check.add_argument("--bundle", type=Path, default=None, help="the operator's bundle")
    check.set_defaults(command=_check)

    start = client.add_parser("start", help="run the client until SIGTERM or Ctrl-C")
    start.add_argument("folder", type=Path, metavar="DIR")
    start.add_argument("--bundle", type=Path, required=True, help="the operator's bundle")
    start.set_defaults(command=_start)


def _init(options: argparse.Namespace) -> int:
    from fedmerge.organisation.folder import init_client

    key = init_client(options.folder, options.name, options.domain, options.threads, options.backbone)
    folder = options.folder
    print(
        f"{folder}: created for {options.name}, key {key}\n"
        f"Next: read {folder / 'policy.toml'}, which decides what may leave. Send {folder / 'key.pub'} (never "
        f"{folder / 'key'}) to the operator, who sends you a bundle, and compare the key above with them over another "
        f"channel. Then run: fedmerge client approve {folder} --bundle BUNDLE"
    )
    return 0


def _approve(options: argparse.Namespace) -> int:
    from fedmerge.errors import ConfigError
    from fedmerge.organisation.app import app_sha256, check_contents, installed_code
    from fedmerge.organisation.folder import approve_app, approved_apps, read_bundle, read_client

    client = read_client(options.folder)
    if options.app is not None:
        import sim

        try:
            content = options.app.read_bytes()
        except OSError as error:
            raise ConfigError(
                f"{options.app}: cannot be read ({error.strerror}). Give the .fab file that the operator sent."
            ) from error
        check_contents(content, installed_code(Path(str(sim.__file__)).parent))
        sha256, source = app_sha256(content), options.app.name
    elif options.bundle is not None:
        bundle = read_bundle(options.bundle)
        if not bundle.app:
            raise ConfigError(
                f"{options.bundle}: contains no hash of an app. Ask the operator for the app and approve the file: "
                f"fedmerge client approve {options.folder} --app FILE"
            )
        sha256, source = bundle.app, f"from the bundle of {bundle.federation or bundle.address}"
        print(
            f"certificate: {bundle.authority_sha256}\nCompare this hash (of {bundle.authority.name}) and the app's "
            "hash below with the operator over another channel."
        )
    else:
        print("\n".join(sorted(approved_apps(client.folder))) or f"{options.folder}: no app is approved")
        return 0
    approve_app(client.folder, sha256, source)
    print(
        f"approved: {sha256}\nThis client takes part in runs of approved apps and refuses all others. To withdraw "
        f"the approval, delete its line in {client.folder / 'approved.txt'}. Next: fedmerge client check "
        f"{options.folder} --bundle BUNDLE"
    )
    return 0


def _check(options: argparse.Namespace) -> int:
    from fedmerge.organisation.checks import check_client
    from fedmerge.organisation.folder import read_bundle, read_client

    client = read_client(options.folder)
    bundle = None if options.bundle is None else read_bundle(options.bundle)

    def backbone() -> str:
        from fedmerge.device import resolve_compute
        from fedmerge.encoder.backbone import load_backbone

        found = load_backbone(client.backbone, "auto", resolve_compute("cpu", "float32"))
        return f"{found.name}, hash {found.sha256}"

    def registered(bundle: "Bundle") -> str:
        from sim.machines.supernode import is_registered

        return is_registered(client, bundle)

    failed = 0
    for check in check_client(client, bundle, backbone, registered):
        failed += check.holds is False
        word = {True: "ok", False: "FAILED", None: "-"}[check.holds]
        print(f"{word:7} {check.what:12} {check.found}", flush=True)
    if failed:
        print(f"{failed} failed; nothing was sent except the request for admission")
    elif bundle:
        print(f"Next: fedmerge client start {options.folder} --bundle {options.bundle}")
    return int(failed > 0)


def _start(options: argparse.Namespace) -> int:
    from fedmerge.domain.manifest import read_manifest
    from fedmerge.organisation.folder import read_bundle, read_client

    client, bundle = read_client(options.folder), read_bundle(options.bundle)
    read_manifest(client.domain)  # fail now: a client without a domain would wait for ever
    from sim.machines.supernode import run_client

    with _logging_to_stderr(), _event_of_signals() as stop:
        run_client(client, bundle, stop)
    return 0


@contextmanager
def _logging_to_stderr() -> Iterator[None]:
    """Send the library's log to stderr, and restore its logger afterwards."""
    from fedmerge.escaping import RecordFormatter

    library = logging.getLogger("fedmerge")
    level, propagate = library.level, library.propagate
    handler = logging.StreamHandler()
    handler.setFormatter(RecordFormatter("%(asctime)s client %(message)s", "%H:%M:%S"))
    library.addHandler(handler)
    library.setLevel(logging.INFO)
    library.propagate = False
    try:
        yield
    finally:
        library.removeHandler(handler)
        library.setLevel(level)
        library.propagate = propagate


@contextmanager
def _event_of_signals() -> Iterator[threading.Event]:
    """Set an event at SIGTERM and Ctrl-C in place of ending, and restore the signals' handlers afterwards."""
    stop = threading.Event()
    handlers = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
