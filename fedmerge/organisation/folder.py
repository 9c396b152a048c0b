"""An organisation's client folder, which the organisation alone writes, and the operator's bundle, which it is given.

key, key.pub      the client's key pair (ECDSA P-384, OpenSSH); the private key never leaves the folder
client.toml       what the client works with; no run can change it
policy.toml       what may leave (``fedmerge.privacy.client_policy``)
approved.txt      hashes of the apps that may be worked for, one a line
cache/            experts, trainings that are going on, the catalog's tokens
lock, flower.log  of the process that runs the client

The bundle: ca.crt, whom to trust as the server, and federation.toml, where it is.
"""

import os
import re
import tomllib
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from pydantic import Field, ValidationError, model_validator

from fedmerge.config import ExperimentConfig, Section, describe_problem
from fedmerge.deploy.certificates import sha256_fingerprint
from fedmerge.domain.manifest import read_manifest
from fedmerge.errors import ConfigError, DeploymentError
from fedmerge.files import new_folder, write_text
from fedmerge.privacy.client_policy import DEFAULT_POLICY_TOML
from fedmerge.privacy.signatures import fingerprint, read_private_key

KEY, PUBLIC_KEY, CLIENT, POLICY, APPROVED = "key", "key.pub", "client.toml", "policy.toml", "approved.txt"
CA, FEDERATION = "ca.crt", "federation.toml"
NAME = r"^[a-z0-9][a-z0-9-]{0,62}$"
SHA256 = r"^[0-9a-f]{64}$"

T = TypeVar("T", bound=Section)

CLIENT_TOML = """\
# What this organisation's client works with. No run can change it; paths are absolute or start in this folder.

# Its name towards the operator.
name = "{name}"

# Its domain folder: catalog and interactions. The folder's name is the domain's name in experiments.
domain = "{domain}"

# Where experts are kept, and trainings that are going on.
cache_dir = "cache"

# What may leave.
policy = "policy.toml"

# Processor threads for training and evaluating.
threads = {threads}

# For secure sums, that no server can take the place of another client: an Ed25519 key of ssh-keygen, and a folder with
# the NAME.pub of all domains, from elsewhere than the operator. See docs/reference/secure-aggregation.md.
# identity_key = "identity"
# peer_keys = "peers"

# The text encoder: a folder, or an id of the Hugging Face hub. A run for another one is refused by its hash.
backbone = "{backbone}"
"""


class _ClientFile(Section):
    name: str = Field(pattern=NAME)
    domain: str = Field(min_length=1)
    cache_dir: str = "cache"
    policy: str = POLICY
    threads: int = Field(1, ge=1)
    backbone: str = Field(ExperimentConfig().backbone.source, min_length=1)
    identity_key: str | None = Field(None, min_length=1)
    peer_keys: str | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _both_or_none(self) -> "_ClientFile":
        if (self.identity_key is None) != (self.peer_keys is None):
            raise ValueError("identity_key and peer_keys belong together; set both, or neither")
        return self


class _FederationFile(Section):
    address: str = Field(pattern=r"^(\[[0-9a-fA-F:]+\]|[^\s:/]+):\d{1,5}$")
    federation: str = ""
    app: str = Field("", pattern=r"^([0-9a-f]{64})?$")


@dataclass(frozen=True)
class Client:
    """What an organisation's client works with; every path is absolute.

    Attributes:
        folder: the client folder.
        name: towards the operator.
        domain: the domain folder.
        cache_dir: where experts are kept.
        policy: the policy file.
        threads: of PyTorch.
        backbone: where the encoder comes from.
        identity_key: the client's Ed25519 key for secure sums, if any.
        peer_keys: folder of everybody's public ones.
    """

    folder: Path
    name: str
    domain: Path
    cache_dir: Path
    policy: Path
    threads: int
    backbone: str
    identity_key: Path | None
    peer_keys: Path | None


@dataclass(frozen=True)
class Bundle:
    """What the operator gives an organisation.

    Attributes:
        authority: the file with the certificate of whoever vouches for the server.
        host, port: of the server.
        federation: its name.
        app: SHA-256 of the app that the operator submits; empty where it is not told.
        authority_sha256: the certificate's fingerprint, of the file as it is.
    """

    authority: Path
    host: str
    port: int
    federation: str
    app: str
    authority_sha256: str

    @property
    def address(self) -> str:
        """``host:port``; IPv6 addresses in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def init_client(folder: Path, name: str, domain: Path, threads: int = 1, backbone: str | None = None) -> str:
    """Make a client folder with a new key pair.

    Args:
        folder: absent or empty.
        name: towards the operator: small letters, digits, hyphens.
        domain: an imported domain folder.
        threads: of PyTorch.
        backbone: where the encoder comes from; None for the default of experiments.

    Returns:
        The fingerprint of the public key.

    Raises:
        ConfigError: the name.
        DomainError: no domain folder.
        RunDirError: the folder holds something; nothing is overwritten, a key least of all.
    """
    if not re.fullmatch(NAME, name):
        raise ConfigError(f"--name {name!r}: expected small letters, digits and hyphens, for example north-shop.")
    read_manifest(domain)
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    text = CLIENT_TOML.format(
        name=name,
        domain=_quoted(os.path.abspath(domain)),
        threads=threads,
        backbone=_quoted(backbone or ExperimentConfig().backbone.source),
    )
    with new_folder(folder) as partial:
        partial.chmod(0o700)
        (partial / KEY).touch(mode=0o600)
        (partial / KEY).write_bytes(private)
        (partial / PUBLIC_KEY).write_bytes(public + f" {name}\n".encode())
        (partial / CLIENT).write_text(text, encoding="utf-8")
        (partial / POLICY).write_text(DEFAULT_POLICY_TOML, encoding="utf-8")
    return fingerprint(key.public_key())


def read_client(folder: Path) -> Client:
    """Read client.toml.

    Raises:
        ConfigError: it is missing or wrong.
    """
    folder = Path(os.path.abspath(folder))
    told = _read(folder / CLIENT, _ClientFile, "Make a client folder with fedmerge client init.")

    def place(path: str) -> Path:
        return folder / Path(path).expanduser()  # an absolute path stays as it is

    backbone = str(place(told.backbone)) if place(told.backbone).is_dir() else told.backbone
    return Client(
        folder,
        told.name,
        place(told.domain),
        place(told.cache_dir),
        place(told.policy),
        told.threads,
        backbone,
        None if told.identity_key is None else place(told.identity_key),
        None if told.peer_keys is None else place(told.peer_keys),
    )


def read_bundle(folder: Path) -> Bundle:
    """Read the operator's bundle.

    Raises:
        ConfigError: a file is missing or wrong.
    """
    remedy = "Ask the operator for the folder that 'fedmerge deploy add-client' wrote."
    told = _read(folder / FEDERATION, _FederationFile, remedy)
    authority = Path(os.path.abspath(folder / CA))
    if not authority.is_file():
        raise ConfigError(f"{authority}: not there, expected the certificate of the federation's authority. {remedy}")
    try:
        authority_sha256 = sha256_fingerprint(authority)
    except DeploymentError as error:
        raise ConfigError(f"{authority}: is no certificate ({error.__cause__}). {remedy}") from error
    host, _, port = told.address.rpartition(":")
    if not 0 < int(port) < 2**16:
        raise ConfigError(f"{folder / FEDERATION}: address has the port {port}, expected 1 to 65535. {remedy}")
    return Bundle(authority, host.strip("[]"), int(port), told.federation, told.app, authority_sha256)


def private_key(client: Client) -> ec.EllipticCurvePrivateKey:
    """The client's private key.

    Raises:
        ConfigError: it is missing, readable by others, or no key of this kind.
    """
    return read_private_key(client.folder / KEY)


def approved_apps(folder: Path) -> frozenset[str]:
    """The hashes in approved.txt; none where there is no such file.

    Raises:
        ConfigError: a line that is no hash.
    """
    path = folder / APPROVED
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return frozenset()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}). Correct it, or approve again.") from error
    hashes = [line.partition("#")[0].strip() for line in lines]
    if wrong := next((found for found in hashes if found and not re.fullmatch(SHA256, found)), ""):
        raise ConfigError(f"{path}: holds {wrong[:80]!r}, expected 64 hexadecimal digits a line. Remove the line.")
    return frozenset(found for found in hashes if found)


def approve_app(folder: Path, sha256: str, source: str) -> None:
    """Add a hash to approved.txt; to take it back, delete its line.

    Raises:
        ConfigError: it is no hash, or the file is wrong.
        RunDirError: the file cannot be written.
    """
    if not re.fullmatch(SHA256, sha256):
        raise ConfigError(f"app {sha256[:80]!r}: expected a SHA-256, 64 hexadecimal digits.")
    if sha256 in approved_apps(folder):
        return
    path = folder / APPROVED
    before = path.read_text(encoding="utf-8") if path.exists() else "# Apps that this client works for, by SHA-256.\n"
    write_text(path, f"{before.rstrip()}\n{sha256}  # {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {source}\n")


def _read(path: Path, kind: type[T], remedy: str) -> T:
    try:
        return kind.model_validate(tomllib.loads(path.read_text(encoding="utf-8-sig")))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}). {remedy}") from error
    except ValidationError as error:
        lines = "".join(f"\n  {describe_problem(problem)}" for problem in error.errors(include_url=False))
        raise ConfigError(
            f"{path}: {error.error_count()} wrong; keys: {', '.join(kind.model_fields)}{lines}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid TOML ({error}). {remedy}") from error


def _quoted(text: str) -> str:
    """As it stands between the quotes of a TOML string."""
    return text.replace("\\", "\\\\").replace('"', '\\"')
