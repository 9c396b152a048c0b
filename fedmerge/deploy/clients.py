"""Organisations registered by the operator: a public key and a bundle for each."""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedmerge.deploy import texts
from fedmerge.deploy.certificates import read_public_key, sha256_fingerprint
from fedmerge.deploy.folder import Deployment
from fedmerge.domain.manifest import check_name
from fedmerge.errors import DeploymentError
from fedmerge.files import new_folder, read_json, write_json, write_text
from fedmerge.privacy.signatures import key_comment

REGISTERED_FILE = "registered.json"
CLIENT_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


@dataclass(frozen=True)
class RegisteredClient:
    """An organisation.

    Attributes:
        name: the operator's name for it.
        key: file with its public key.
        key_sha256: SHA-256 of the key's DER form.
        node: Flower's id of its node; None while its key is not registered.
    """

    name: str
    key: Path
    key_sha256: str
    node: int | None


def add_client(
    deployment: Deployment, name: str, public_key: Path, app_sha256: str | None, domain: str | None = None
) -> Path:
    """Store an organisation's public key and write its bundle; registering the key with Flower is separate.

    Args:
        deployment: the federation.
        name: name of the organisation.
        public_key: the file that it sent.
        app_sha256: hash of the app that its client will be asked to approve; None if not known yet.
        domain: the only domain that its key may sign for; None for any.

    Returns:
        The folder of the bundle.

    Raises:
        DeploymentError: the name or the key is invalid or already in use.
        DomainError: ``domain`` is not a valid domain name.
    """
    if not CLIENT_NAME.fullmatch(name):
        raise DeploymentError(f"client name {name!r}: expected 1 to 63 of a-z, 0-9 and -. Choose another.")
    if domain is not None:
        check_name(domain, "--domain: ")
    line, key_sha256 = read_public_key(public_key)
    for known in list_clients(deployment):
        if known.name == name:
            raise DeploymentError(
                f"client {name}: already added, with key {known.key_sha256[:12]}. To change the key, remove the client "
                f"first: fedmerge deploy remove-client {deployment.folder} {name}"
            )
        if known.key_sha256 == key_sha256:
            raise DeploymentError(
                f"{public_key}: already the key of client {known.name}; every client needs a key of its own. Ask the "
                "organisation for its own key.pub."
            )
    folder = _write_bundle(deployment, name, key_sha256, app_sha256)
    write_text(
        deployment.folder / "keys" / f"{name}.pub", f"{line} {key_comment(name, domain)}\n"
    )  # last: list_clients takes it as the mark of a complete client
    return folder


def write_bundle(deployment: Deployment, name: str, app_sha256: str | None) -> Path:
    """Write an organisation's bundle again, for example after an upgrade that changed the app; keep its key.

    Raises:
        DeploymentError: no client has this name.
    """
    client = find_client(deployment, name)
    shutil.rmtree(deployment.folder / "clients" / name, ignore_errors=True)
    return _write_bundle(deployment, name, client.key_sha256, app_sha256)


def _write_bundle(deployment: Deployment, name: str, key_sha256: str, app_sha256: str | None) -> Path:
    folder = deployment.folder / "clients" / name
    settings = {"address": deployment.address, "federation": deployment.name}
    settings |= {"app": app_sha256} if app_sha256 else {}
    authority_sha256 = sha256_fingerprint(deployment.authority)
    with new_folder(folder) as partial:
        shutil.copyfile(deployment.authority, partial / "ca.crt")
        lines = [f"{key} = {json.dumps(value)}\n" for key, value in settings.items()]
        write_text(partial / "federation.toml", "".join(lines))
        readme = texts.bundle_readme(name, deployment.address, authority_sha256, key_sha256, app_sha256)
        write_text(partial / "README.txt", readme)
    return folder


def remove_client(deployment: Deployment, name: str) -> None:
    """Delete an organisation's key and bundle; its node must be unregistered from Flower first.

    Raises:
        DeploymentError: no client has this name.
    """
    find_client(deployment, name)
    (deployment.folder / "keys" / f"{name}.pub").unlink()
    shutil.rmtree(deployment.folder / "clients" / name, ignore_errors=True)
    note_nodes(deployment, {key: node for key, node in _nodes(deployment).items() if key != name})


def find_client(deployment: Deployment, name: str) -> RegisteredClient:
    """Return the organisation with this name.

    Raises:
        DeploymentError: no client has this name.
    """
    clients = {client.name: client for client in list_clients(deployment)}
    if name not in clients:
        raise DeploymentError(
            f"client {name}: not found; known clients: {', '.join(clients) or 'none'}. Correct the name."
        )
    return clients[name]


def list_clients(deployment: Deployment) -> list[RegisteredClient]:
    """Return all organisations, sorted by name."""
    nodes = _nodes(deployment)
    keys = sorted((deployment.folder / "keys").glob("[!.]*.pub"))
    return [RegisteredClient(key.stem, key, read_public_key(key)[1], nodes.get(key.stem)) for key in keys]


def note_nodes(deployment: Deployment, nodes: Mapping[str, int]) -> None:
    """Store the node of each organisation, since Flower lists nodes without the names they were registered with."""
    write_json(deployment.state / REGISTERED_FILE, dict(sorted(nodes.items())))


def _nodes(deployment: Deployment) -> dict[str, int]:
    return {str(name): int(node) for name, node in (read_json(deployment.state / REGISTERED_FILE) or {}).items()}
