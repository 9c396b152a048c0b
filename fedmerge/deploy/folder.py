"""The operator's folder of one federation: create it, read it, renew its certificates.

deployment.toml               name, hosts and ports; the only file to edit; then run ``fedmerge deploy renew``
ca/ca.crt, ca/ca.key          the federation's certificate authority, which signs the next two and nothing else
server/server.crt, .key       certificate for all names of the server
operator/                     certificate for the Control API, and nginx.conf and flower/ to use it on another machine
flower/config.toml            FLWR_HOME on this machine
nginx.conf                    the only public listener: Fleet for everybody, Control for the operator
fedmerge-operator.service     unit for systemd
compose.yaml, image/          for Docker instead; put fedmerge's wheel into image/, beside the tested versions
clients/NAME/                 bundle for the organisation NAME
keys/NAME.pub                 public key of the organisation NAME
state/                        the SuperLink's database, nginx's files, the list of registered keys
runs/                         run folders
"""

import json
import os
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedmerge.deploy import texts
from fedmerge.deploy.certificates import LOCAL_HOSTS, Issued, check_host, issue, new_authority, sha1_fingerprint
from fedmerge.errors import DeploymentError
from fedmerge.files import new_folder, write_bytes
from fedmerge.installation import root

DEPLOYMENT_FILE = "deployment.toml"
NAME_CHARACTERS = set("abcdefghijklmnopqrstuvwxyz0123456789-_")
KEYS = {"name", "hosts", "port", "superlink_port"}


@dataclass(frozen=True)
class Deployment:
    """One federation as its operator runs it.

    Attributes:
        folder: absolute path.
        name: name of the federation, and of the connection in Flower's configuration.
        hosts: names and addresses by which clients reach the server; bundles name the first.
        port: port of nginx, on all addresses.
        superlink_port: port of the SuperLink, on 127.0.0.1.
    """

    folder: Path
    name: str
    hosts: tuple[str, ...]
    port: int
    superlink_port: int

    @property
    def address(self) -> str:
        """HOST:PORT by which clients reach the server."""
        host = self.hosts[0]
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"

    @property
    def authority(self) -> Path:
        """Certificate by which clients verify the server."""
        return self.folder / "ca" / "ca.crt"

    @property
    def flower_home(self) -> Path:
        """Value of FLWR_HOME."""
        return self.folder / "flower"

    @property
    def state(self) -> Path:
        """Folder for files that change while the federation runs."""
        return self.folder / "state"


def create_deployment(folder: Path, name: str, hosts: Sequence[str], port: int, superlink_port: int) -> Deployment:
    """Create the operator's folder, completely or not at all.

    Args:
        folder: absent or empty.
        name, hosts, port, superlink_port: see :class:`Deployment`.

    Raises:
        DeploymentError: the name, a host or a port is invalid.
        RunDirError: the folder is not empty or cannot be written.
    """
    deployment = _checked(Path(os.path.abspath(folder)), name, hosts, port, superlink_port)
    with new_folder(deployment.folder) as partial:
        partial.chmod(0o700)
        for part in ("ca", "server", "operator/flower", "flower", "image", "clients", "keys", "state/nginx", "runs"):
            (partial / part).mkdir(parents=True)
        authority = new_authority(name)
        write_bytes(partial / "ca" / "ca.crt", authority.certificate)
        write_private(partial / "ca" / "ca.key", authority.key)
        _write_settings(partial / DEPLOYMENT_FILE, deployment)
        _issue_all(partial, deployment, authority)
        _write_texts(partial, deployment)
    return deployment


def read_deployment(folder: Path) -> Deployment:
    """Read the deployment in a folder.

    Raises:
        DeploymentError: the settings are missing or damaged.
    """
    path = Path(os.path.abspath(folder)) / DEPLOYMENT_FILE
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DeploymentError(
            f"{path}: cannot be read ({error.strerror}). Give a folder that 'fedmerge deploy init' made."
        ) from error
    except ValueError as error:
        raise DeploymentError(f"{path}: not valid TOML ({error}). Restore the file.") from error
    if found.keys() != KEYS or not isinstance(found["hosts"], list):
        raise DeploymentError(
            f"{path}: found the keys {', '.join(sorted(found))}, expected {', '.join(sorted(KEYS))}, hosts as a "
            "list. Restore the file."
        )
    return _checked(path.parent, found["name"], found["hosts"], found["port"], found["superlink_port"])


def renew(deployment: Deployment) -> None:
    """Issue new server and operator certificates and write all configuration files again; keep the authority.

    Once nginx is restarted, the previous operator certificate is refused.

    Raises:
        DeploymentError: the authority's files cannot be read.
    """
    try:
        authority = Issued(*((deployment.folder / "ca" / f"ca.{end}").read_bytes() for end in ("crt", "key")))
    except OSError as error:
        raise DeploymentError(
            f"{error.filename}: cannot be read ({error.strerror}), but issuing certificates needs it. Restore it from "
            "your copy."
        ) from error
    _issue_all(deployment.folder, deployment, authority)
    _write_texts(deployment.folder, deployment)


def write_private(path: Path, data: bytes) -> None:
    """Write a file, completely or not at all, that only its owner can read at any time."""
    partial = path.with_name(f".{path.name}.private")
    partial.unlink(missing_ok=True)
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _checked(folder: Path, name: str, hosts: Sequence[str], port: int, superlink_port: int) -> Deployment:
    if not isinstance(name, str) or not 0 < len(name) <= 40 or not set(name) <= NAME_CHARACTERS:
        raise DeploymentError(
            f"federation name {name!r}: expected 1 to 40 of a-z, 0-9, - and _, for example prod. Choose another."
        )
    if not hosts:
        raise DeploymentError(
            "no host given, expected the name by which clients reach the server. Give one: --host fl.example.org"
        )
    for what, number in (("port", port), ("superlink_port", superlink_port)):
        if type(number) is not int or not 0 < number < 65536:
            raise DeploymentError(f"{what} = {number!r}: expected a number between 1 and 65535. Correct it.")
    if port == superlink_port:
        raise DeploymentError(
            f"port and superlink_port are both {port}: nginx and the SuperLink need different ones. Change one."
        )
    if any(character in str(folder) for character in "\"'\\$;{}\n") or " " in str(folder):
        raise DeploymentError(
            f"{folder}: the path has quotes, spaces or one of \\ $ ; {{ }}, which nginx and systemd refuse. Choose "
            "another folder."
        )
    names = tuple(dict.fromkeys(check_host(str(host)) for host in hosts))
    return Deployment(folder, name, names, port, superlink_port)


def _write_settings(path: Path, deployment: Deployment) -> None:
    settings = {
        "name": deployment.name,
        "hosts": list(deployment.hosts),
        "port": deployment.port,
        "superlink_port": deployment.superlink_port,
    }
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    write_bytes(path, ("\n".join([texts.SETTINGS_HEAD, *lines]) + "\n").encode())


def _issue_all(folder: Path, deployment: Deployment, authority: Issued) -> None:
    hosts = tuple(dict.fromkeys([*deployment.hosts, *LOCAL_HOSTS]))
    issued = {
        "server": issue(authority, f"fedmerge server {deployment.name}", "server", hosts),
        "operator": issue(authority, f"fedmerge operator {deployment.name}", "client"),
    }
    for role, pair in issued.items():
        write_private(folder / role / f"{role}.key", pair.key)
        write_bytes(folder / role / f"{role}.crt", pair.certificate)
    write_bytes(folder / "operator" / "ca.crt", authority.certificate)


def _write_texts(folder: Path, deployment: Deployment) -> None:
    home, name = deployment.folder, deployment.name
    operator = sha1_fingerprint(folder / "operator" / "operator.crt")
    files = {
        "nginx.conf": texts.nginx(home, deployment.port, deployment.superlink_port, operator),
        "flower/config.toml": texts.flower_config(name, f"127.0.0.1:{deployment.superlink_port}", deployment.authority),
        "fedmerge-operator.service": texts.systemd_unit(home, name),
        "image/constraints.txt": (root() / "constraints.txt").read_text(encoding="utf-8"),
        "compose.yaml": texts.compose(home, deployment.port),
        "operator/nginx.conf": texts.operator_door(deployment.address, deployment.superlink_port),
        "operator/flower/config.toml": texts.flower_config(name, f"127.0.0.1:{deployment.superlink_port}", None),
    }
    for path, text in files.items():
        write_bytes(folder / path, text.encode())
