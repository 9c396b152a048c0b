"""The operator's folder of one federation: what lies where, making it, reading it, renewing its certificates.

deployment.toml               name, hosts and ports; the only file to edit, followed by ``fedmerge deploy renew``
ca/ca.crt, ca/ca.key          the federation's own certificate authority; the key signs nothing but the next two
server/server.crt, .key       for all the server's names
operator/operator.crt, .key   opens the Control API, also from another machine; with nginx.conf and flower/ for there
flower/config.toml            FLWR_HOME on this machine
nginx.conf                    the only thing that listens to the outside: Fleet for everybody, Control for the operator
fedmerge-operator.service     for systemd
compose.yaml, image/          for Docker, instead; the wheel of fedmerge goes to image/, beside the tested versions
clients/NAME/                 what the organisation NAME gets; its public key beside it in keys/NAME.pub
state/                        the SuperLink's database, nginx's files, which keys are registered
runs/                         the runs
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
        folder: absolute.
        name: of the federation: of the connection in Flower's configuration.
        hosts: names and addresses of the server as clients know it; the first is written into bundles.
        port: where nginx listens, on all addresses.
        superlink_port: where the SuperLink listens, on 127.0.0.1.
    """

    folder: Path
    name: str
    hosts: tuple[str, ...]
    port: int
    superlink_port: int

    @property
    def address(self) -> str:
        """HOST:PORT for clients."""
        host = self.hosts[0]
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"

    @property
    def authority(self) -> Path:
        """The certificate by which clients know the server."""
        return self.folder / "ca" / "ca.crt"

    @property
    def flower_home(self) -> Path:
        """FLWR_HOME."""
        return self.folder / "flower"

    @property
    def state(self) -> Path:
        """What changes while it runs."""
        return self.folder / "state"


def create_deployment(folder: Path, name: str, hosts: Sequence[str], port: int, superlink_port: int) -> Deployment:
    """Make the operator's folder, whole or not at all.

    Args:
        folder: absent or empty.
        name: of the federation.
        hosts: names and addresses of the server.
        port, superlink_port: see :class:`Deployment`.

    Raises:
        DeploymentError: a name, host or port that cannot be.
        RunDirError: the folder holds something, or cannot be written.
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
    """The deployment in a folder.

    Raises:
        DeploymentError: there is none, or its settings are damaged.
    """
    path = Path(os.path.abspath(folder)) / DEPLOYMENT_FILE
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DeploymentError(
            f"{path}: cannot be read ({error.strerror}), expected a folder made by 'fedmerge deploy init'. Give that "
            "folder."
        ) from error
    except ValueError as error:
        raise DeploymentError(f"{path}: is no TOML ({error}). Put the file back as it was.") from error
    if found.keys() != KEYS or not isinstance(found["hosts"], list):
        raise DeploymentError(
            f"{path}: holds {', '.join(sorted(found))}, expected {', '.join(sorted(KEYS))} with a list of hosts. Put "
            "the file back as it was."
        )
    return _checked(path.parent, found["name"], found["hosts"], found["port"], found["superlink_port"])


def renew(deployment: Deployment) -> None:
    """Issue new server and operator certificates and write all configuration files again; the authority stays.

    The operator's certificate of before opens nothing any more, as soon as nginx is started again.
    """
    try:
        authority = Issued(*((deployment.folder / "ca" / f"ca.{end}").read_bytes() for end in ("crt", "key")))
    except OSError as error:
        raise DeploymentError(
            f"{error.filename}: cannot be read ({error.strerror}), and without it no certificate can be issued. Put it "
            "back from where you keep it."
        ) from error
    _issue_all(deployment.folder, deployment, authority)
    _write_texts(deployment.folder, deployment)


def write_private(path: Path, data: bytes) -> None:
    """Write a file whole or not at all that nobody but its owner ever can read."""
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
        raise DeploymentError("no host given, expected the server's name as clients reach it: --host fl.example.org")
    for what, number in (("port", port), ("superlink_port", superlink_port)):
        if type(number) is not int or not 0 < number < 65536:
            raise DeploymentError(f"{what} = {number!r}: expected a number between 1 and 65535")
    if port == superlink_port:
        raise DeploymentError(
            f"port and superlink_port are both {port}: nginx and the SuperLink need one each. Change one."
        )
    if any(character in str(folder) for character in "\"'\\$;{}\n") or " " in str(folder):
        raise DeploymentError(
            f"{folder}: nginx and systemd cannot have quotes, spaces or any of \\ $ ; {{ }} in a path. Choose another "
            "folder."
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
