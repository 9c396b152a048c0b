"""``fedmerge deploy``: the operator's side of a federation on separate machines."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedmerge.cli.options import Commands


def add_commands(commands: "Commands") -> None:
    """Add ``deploy`` to the parser."""
    deploy = commands.add_parser("deploy", help="run the server of a federation on separate machines")
    parts = deploy.add_subparsers(required=True, metavar="COMMAND")

    init = parts.add_parser("init", help="create the operator's folder: certificates and all configuration files")
    init.add_argument("folder", type=Path, metavar="DIR", help="absent or empty")
    init.add_argument(
        "--host",
        dest="hosts",
        action="append",
        required=True,
        metavar="NAME",
        help="name or address by which clients reach the server; repeatable; bundles name the first",
    )
    init.add_argument("--port", type=int, default=8443, help="port for clients (default: 8443)")
    init.add_argument(
        "--superlink-port", type=int, default=8000, help="port of the SuperLink, on this machine only (default: 8000)"
    )
    init.add_argument("--name", default="prod", help="name of the federation, for --federation (default: prod)")
    init.set_defaults(command=_init)

    start = _with_folder(parts, "start", "run SuperLink and proxy in the foreground")
    start.set_defaults(command=_start)

    add = _with_folder(parts, "add-client", "register an organisation's public key and write its bundle")
    add.add_argument("client", metavar="NAME")
    add.add_argument(
        "--public-key", type=Path, required=True, metavar="key.pub", help="the key.pub that the organisation sent"
    )
    add.add_argument("--domain", help="the only domain that its key may sign for (default: NAME)")
    add.add_argument(
        "--any-domain",
        action="store_true",
        help="its key may sign for every domain that no other key is registered for",
    )
    add.set_defaults(command=_add_client)

    remove = _with_folder(parts, "remove-client", "withdraw an organisation's key and delete its bundle")
    remove.add_argument("client", metavar="NAME")
    remove.set_defaults(command=_remove_client)

    bundle = _with_folder(parts, "bundle", "write an organisation's bundle again, for example after an upgrade")
    bundle.add_argument("client", metavar="NAME")
    bundle.set_defaults(command=_bundle)

    app = parts.add_parser("app", help="write the app that runs submit, for organisations that approve it by file")
    app.add_argument("--out", type=Path, required=True, metavar="FILE", help="the file to write, for example app.fab")
    app.set_defaults(command=_app)

    chart = parts.add_parser("chart", help="write the Helm chart for Kubernetes: server, client, simulation on Ray")
    chart.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to create")
    chart.set_defaults(command=_chart)

    status = _with_folder(parts, "status", "show health, clients, certificates and the last run")
    status.add_argument("--json", action="store_true", help="machine-readable output")
    status.set_defaults(command=_status)

    renew = _with_folder(parts, "renew", "issue new certificates and write the configuration files again")
    renew.set_defaults(command=_renew)


def _with_folder(parts: "Commands", name: str, text: str) -> argparse.ArgumentParser:
    parser = parts.add_parser(name, help=text)
    parser.add_argument("folder", type=Path, metavar="DIR", help="the operator's folder")
    return parser


def _init(options: argparse.Namespace) -> int:
    from fedmerge.deploy.folder import create_deployment

    made = create_deployment(options.folder, options.name, options.hosts, options.port, options.superlink_port)
    print(
        f"{made.folder}: created for federation {made.name}, which clients reach at {made.address}\n"
        f"ca/ca.key signs the certificates of this federation: keep a copy elsewhere and never share it\n"
        f"next: fedmerge deploy start {made.folder}"
    )
    return 0


def _start(options: argparse.Namespace) -> int:
    from fedmerge.deploy.folder import read_deployment
    from sim.machines.superlink import start

    return start(read_deployment(options.folder), lambda line: print(line, flush=True))


def _add_client(options: argparse.Namespace) -> int:
    from fedmerge.deploy.clients import add_client, find_client, remove_client
    from fedmerge.deploy.folder import read_deployment
    from fedmerge.errors import DeploymentError
    from fedmerge.installation import root
    from sim.machines.app_bundle import submitted_sha256
    from sim.machines.superlink import is_healthy, register_clients

    deployment = read_deployment(options.folder)
    if options.any_domain and options.domain is not None:
        raise DeploymentError(f"--any-domain and --domain {options.domain}: give one of them.")
    domain = None if options.any_domain else options.domain or options.client
    bundle = add_client(deployment, options.client, options.public_key, submitted_sha256(root()), domain)
    running = is_healthy(deployment)
    refusals: list[str] = []
    if running and options.client not in register_clients(deployment, refusals.append):
        remove_client(deployment, options.client)
        raise DeploymentError("\n".join(refusals))
    for refusal in refusals:
        print(f"warning: {refusal}")
    print(
        f"{bundle}: send this folder to {options.client}; its README.txt has the next steps and the hashes to compare"
        f"\n{options.client}: key {find_client(deployment, options.client).key_sha256}, which may sign for "
        f"{'any domain without a key of its own' if domain is None else f'domain {domain}'}\n"
        + ("its key is registered" if running else "its key will be registered when the federation starts")
    )
    return 0


def _bundle(options: argparse.Namespace) -> int:
    from fedmerge.deploy.clients import write_bundle
    from fedmerge.deploy.folder import read_deployment
    from fedmerge.installation import root
    from sim.machines.app_bundle import submitted_sha256

    bundle = write_bundle(read_deployment(options.folder), options.client, submitted_sha256(root()))
    print(f"{bundle}: written again; send this folder to {options.client}, which approves the app that it names")
    return 0


def _chart(options: argparse.Namespace) -> int:
    from fedmerge.deploy.kubernetes import write_chart

    write_chart(options.out)
    print(
        f"{options.out}: the chart of this version; values.yaml says what to set. Next: build the image in "
        f"{options.out / 'image'}, push it to your registry, and helm install NAME {options.out} --set …"
    )
    return 0


def _app(options: argparse.Namespace) -> int:
    from fedmerge.errors import DeploymentError
    from fedmerge.installation import root
    from fedmerge.organisation.app import app_sha256
    from sim.machines.app_bundle import build_app

    content = build_app(root())
    try:
        with options.out.open("xb") as file:
            file.write(content)
    except FileExistsError as error:
        raise DeploymentError(f"{options.out} exists and is not overwritten. Choose another file.") from error
    except OSError as error:
        raise DeploymentError(f"{options.out}: cannot be written ({error.strerror}). Choose another file.") from error
    print(
        f"{options.out}: app {app_sha256(content)}\n"
        f"Send it to the organisations; each approves it with: fedmerge client approve DIR --app {options.out.name}"
    )
    return 0


def _remove_client(options: argparse.Namespace) -> int:
    from fedmerge.deploy.folder import read_deployment
    from sim.machines.superlink import withdraw_client

    withdraw_client(read_deployment(options.folder), options.client)
    print(f"{options.client}: its key is refused from now on")
    return 0


def _status(options: argparse.Namespace) -> int:
    from fedmerge.deploy.folder import read_deployment
    from fedmerge.report.run.listing import summary_record
    from fedmerge.runs.reading import list_runs, summarise_run
    from sim.machines.superlink import client_states, expiring, is_healthy

    deployment = read_deployment(options.folder)
    healthy = is_healthy(deployment)
    states = client_states(deployment)
    summaries = [summarise_run(folder) for folder in list_runs(deployment.folder / "runs")]
    last = max(summaries, key=lambda summary: str(summary.started), default=None)
    warnings = expiring(deployment)
    if options.json:
        record = {
            "federation": deployment.name,
            "address": deployment.address,
            "healthy": healthy,
            "clients": [
                {"name": each.client.name, "state": each.state, "since": each.since, "key": each.client.key_sha256}
                for each in states
            ],
            "last_run": summary_record(last) if last else None,
            "warnings": warnings,
        }
        print(json.dumps(record, indent=2, ensure_ascii=False))
        return 0 if healthy else 1
    print(f"federation {deployment.name} at {deployment.address}: {'running' if healthy else 'not running'}")
    for each in states:
        print(f"  {each.client.name}: {each.state}{f' since {each.since}' if each.since else ''}")
    if not states:
        print(f"  no client yet: fedmerge deploy add-client {deployment.folder} NAME --public-key key.pub")
    print(f"last run: {f'{last.id}, {last.state}' if last else 'none'}")
    for line in warnings:
        print(f"warning: {line}")
    return 0 if healthy else 1


def _renew(options: argparse.Namespace) -> int:
    from fedmerge.deploy.folder import read_deployment, renew

    deployment = read_deployment(options.folder)
    renew(deployment)
    print(f"{deployment.folder}: new certificates written; restart the federation to use them")
    return 0
