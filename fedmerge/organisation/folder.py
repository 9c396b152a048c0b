"""An organisation's client folder, which only the organisation writes, and the bundle that the operator sends it.

key, key.pub      the client's key pair (ECDSA P-384, OpenSSH); the private key never leaves the folder
client.toml       data, encoder and resources of the client; no run can change them
policy.toml       what may leave (``fedmerge.privacy.client_policy``)
approved.txt      hashes of the approved apps, one a line
cache/            experts, heads, checkpoints of unfinished trainings, tokens and vectors of the catalog's items
disclosed/        what was disclosed about its users over all runs: evaluated users, noised sums, account of ε; keep it
lock              held by the process that runs the client
flower.log        log of Flower's SuperNode

The bundle holds ca.crt, the certificate of the federation's authority, and federation.toml, the server's address.
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
from fedmerge.domain.manifest import MANIFEST_FILE, read_manifest
from fedmerge.errors import ConfigError, DeploymentError, DomainError
from fedmerge.files import new_folder, write_text
from fedmerge.privacy.client_policy import DEFAULT_POLICY_TOML
from fedmerge.privacy.signatures import fingerprint, read_private_key
from fedmerge.storage.addresses import is_address
from fedmerge.storage.fetching import has_file, local_folder

KEY, PUBLIC_KEY, CLIENT, POLICY, APPROVED = "key", "key.pub", "client.toml", "policy.toml", "approved.txt"
DISCLOSED = "disclosed"
CA, FEDERATION = "ca.crt", "federation.toml"
NAME = r"^[a-z0-9][a-z0-9-]{0,62}$"
SHA256 = r"^[0-9a-f]{64}$"

T = TypeVar("T", bound=Section)

CLIENT_TOML = """\
# Settings of this organisation's client. No run can change them. Paths are absolute or relative to this folder.

# Name by which the operator knows the client.
name = "{name}"

# Domain folder: catalog and interactions. The folder's name is the domain's name in experiments. An address of shared
# storage (s3://bucket/NAME) is copied to cache_dir/domains, and again when it has changed.
domain = "{domain}"

# Folder for experts and for checkpoints of unfinished trainings.
cache_dir = "cache"

# File that says what may leave.
policy = "policy.toml"

# Processor threads for training and evaluation.
threads = {threads}

# For secure sums, so that no server can impersonate another client: an Ed25519 key made by ssh-keygen, and a folder
# with NAME.pub of every domain, obtained from the organisations and not from the operator. See
# docs/reference/privacy/secure-aggregation.md.
# identity_key = "identity"
# peer_keys = "peers"

# Text encoder: a folder, or an id on the Hugging Face hub. Its hash must equal that of the run.
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
            raise ValueError("identity_key and peer_keys belong together; set both or neither")
        return self


class _FederationFile(Section):
    address: str = Field(pattern=r"^(\[[0-9a-fA-F:]+\]|[^\s:/]+):\d{1,5}$")
    federation: str = ""
    app: str = Field("", pattern=r"^([0-9a-f]{64})?$")


@dataclass(frozen=True)
class Client:
    """Settings of an organisation's client; every path is absolute, also that of a domain copied from an address.

    Attributes:
        folder: the client folder.
        name: name by which the operator knows the client.
        domain: the domain folder.
        cache_dir: folder for experts and checkpoints.
        policy: the policy file.
        threads: number of PyTorch threads.
        backbone: folder or hub id of the text encoder.
        identity_key: the client's Ed25519 key for secure sums, if any.
        peer_keys: folder with the public Ed25519 keys of all domains, if any.
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

    @property
    def disclosed(self) -> Path:
        """Return the folder of what this client has disclosed about its users, over all runs."""
        return self.folder / DISCLOSED


@dataclass(frozen=True)
class Bundle:
    """The bundle that an operator gives an organisation.

    Attributes:
        authority: file with the certificate of the federation's authority.
        host, port: address of the server.
        federation: name of the federation.
        app: SHA-256 of the app that the operator submits; empty if the bundle does not name one.
        authority_sha256: fingerprint of the certificate, computed from the file.
    """

    authority: Path
    host: str
    port: int
    federation: str
    app: str
    authority_sha256: str

    @property
    def address(self) -> str:
        """``host:port``, with brackets around an IPv6 address."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def init_client(folder: Path, name: str, domain: str | Path, threads: int = 1, backbone: str | None = None) -> str:
    """Make a client folder with a new key pair.

    Args:
        folder: absent or empty.
        name: name by which the operator knows the client: lower-case letters, digits and hyphens.
        domain: an imported domain folder, or the address of one.
        threads: number of PyTorch threads.
        backbone: folder or hub id of the text encoder; None for the default of experiments.

    Returns:
        The fingerprint of the public key.

    Raises:
        ConfigError: the name is malformed.
        DomainError: ``domain`` is not a domain folder.
        RunDirError: the folder is not empty; nothing is overwritten.
    """
    if not re.fullmatch(NAME, name):
        raise ConfigError(f"--name {name!r}: expected lower-case letters, digits and hyphens, for example north-shop.")
    if not is_address(str(domain)):
        read_manifest(Path(domain))
        domain = os.path.abspath(domain)
    elif not has_file(str(domain), MANIFEST_FILE):
        raise DomainError(f"{domain}: no {MANIFEST_FILE} there, expected a domain folder. Correct the address.")
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    text = CLIENT_TOML.format(
        name=name,
        domain=_quoted(str(domain)),
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
        ConfigError: the file is missing or invalid.
        StorageError: its domain is at an address and cannot be copied.
    """
    folder = Path(os.path.abspath(folder))
    settings = _read(folder / CLIENT, _ClientFile, "Make a client folder with fedmerge client init.")

    def place(path: str) -> Path:
        return folder / Path(path).expanduser()  # an absolute path stays as it is

    cache_dir, domain = place(settings.cache_dir), settings.domain
    backbone = str(place(settings.backbone)) if place(settings.backbone).is_dir() else settings.backbone
    return Client(
        folder,
        settings.name,
        local_folder(domain, cache_dir, "domains") if is_address(domain) else place(domain),
        cache_dir,
        place(settings.policy),
        settings.threads,
        backbone,
        None if settings.identity_key is None else place(settings.identity_key),
        None if settings.peer_keys is None else place(settings.peer_keys),
    )


def read_bundle(folder: Path) -> Bundle:
    """Read the operator's bundle.

    Raises:
        ConfigError: a file is missing or invalid.
    """
    remedy = "Ask the operator for the folder that 'fedmerge deploy add-client' wrote."
    settings = _read(folder / FEDERATION, _FederationFile, remedy)
    authority = Path(os.path.abspath(folder / CA))
    if not authority.is_file():
        raise ConfigError(f"{authority}: not found, expected the certificate of the federation's authority. {remedy}")
    try:
        authority_sha256 = sha256_fingerprint(authority)
    except DeploymentError as error:
        raise ConfigError(f"{authority}: not a certificate ({error.__cause__}). {remedy}") from error
    host, _, port = settings.address.rpartition(":")
    if not 0 < int(port) < 2**16:
        raise ConfigError(f"{folder / FEDERATION}: the address has port {port}, expected 1 to 65535. {remedy}")
    return Bundle(authority, host.strip("[]"), int(port), settings.federation, settings.app, authority_sha256)


def private_key(client: Client) -> ec.EllipticCurvePrivateKey:
    """Return the client's private key.

    Raises:
        ConfigError: the key is missing, readable by others, or of another kind.
    """
    return read_private_key(client.folder / KEY)


def approved_apps(folder: Path) -> frozenset[str]:
    """Return the hashes in approved.txt; empty if the file does not exist.

    Raises:
        ConfigError: a line is not a hash.
    """
    path = folder / APPROVED
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return frozenset()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: cannot be read ({error}). Correct the file, or delete it and approve again."
        ) from error
    hashes = [line.partition("#")[0].strip() for line in lines]
    if wrong := next((found for found in hashes if found and not re.fullmatch(SHA256, found)), ""):
        raise ConfigError(f"{path}: found {wrong[:80]!r}, expected 64 hexadecimal digits a line. Remove the line.")
    return frozenset(found for found in hashes if found)


def approve_app(folder: Path, sha256: str, source: str) -> None:
    """Add a hash to approved.txt; deleting its line withdraws the approval.

    Raises:
        ConfigError: not a hash, or the file is invalid.
        RunDirError: the file cannot be written.
    """
    if not re.fullmatch(SHA256, sha256):
        raise ConfigError(f"app {sha256[:80]!r}: expected a SHA-256, 64 hexadecimal digits.")
    if sha256 in approved_apps(folder):
        return
    path = folder / APPROVED
    before = path.read_text(encoding="utf-8") if path.exists() else "# Approved apps, by SHA-256.\n"
    write_text(path, f"{before.rstrip()}\n{sha256}  # {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {source}\n")


def _read(path: Path, kind: type[T], remedy: str) -> T:
    try:
        return kind.model_validate(tomllib.loads(path.read_text(encoding="utf-8-sig")))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}). {remedy}") from error
    except ValidationError as error:
        lines = "".join(f"\n  {describe_problem(problem)}" for problem in error.errors(include_url=False))
        raise ConfigError(
            f"{path}: {error.error_count()} invalid; keys: {', '.join(kind.model_fields)}{lines}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid TOML ({error}). {remedy}") from error


def _quoted(text: str) -> str:
    """Escape text for a TOML string in double quotes."""
    return text.replace("\\", "\\\\").replace('"', '\\"')
