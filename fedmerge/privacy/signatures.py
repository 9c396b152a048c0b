"""Signatures: a client signs the hash of each answer with its key, and the server checks the signature.

The signed statement names the run, the message that is answered and the hash of the answer, so an answer can be neither
replayed, nor used in another run, nor sent by somebody else.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_private_key,
    load_ssh_public_key,
)

from fedmerge.errors import ClientError, ConfigError
from fedmerge.privacy.key_files import private_key_bytes

REGISTERED_KEYS = "keys"  # folder in the operator's folder
LONGEST_KEY = 1000  # prefix of a public key in one line
_DOMAIN = "domain="


@dataclass(frozen=True)
class Signature:
    """A signature and the public key that checks it.

    Attributes:
        key: OpenSSH, in one line.
        data: ECDSA over SHA-384, DER.
    """

    key: str
    data: bytes


@dataclass(frozen=True)
class RegisteredKey:
    """A registered public key and its owner.

    Attributes:
        name: the operator's name for the client.
        domain: the only domain that it may claim; None is any.
    """

    name: str
    domain: str | None


def key_comment(name: str, domain: str | None) -> str:
    """Make the comment behind the key in a registered NAME.pub."""
    return name if domain is None else f"{name} {_DOMAIN}{domain}"


def statement(run_id: int, message_id: str, content_sha256: str) -> bytes:
    """Make the bytes that are signed."""
    return f"fedmerge answer 1\nrun {run_id}\nto {message_id}\nsha256 {content_sha256}\n".encode()


def sign(key: ec.EllipticCurvePrivateKey, stated: bytes) -> Signature:
    """Sign a statement."""
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    return Signature(public, key.sign(stated, ec.ECDSA(hashes.SHA384())))


def signer(signature: Signature, stated: bytes) -> str:
    """Return the fingerprint of the key that signed a statement.

    Raises:
        ClientError: the signature does not match, or the key is not an ECDSA key.
    """
    key = _public_key(signature.key)
    if key is None:
        raise ClientError("the key sent with its signature is not an ECDSA key. Make one with fedmerge client init.")
    try:
        key.verify(signature.data, stated, ec.ECDSA(hashes.SHA384()))
    except InvalidSignature:
        raise ClientError(
            f"its signature by the key {fingerprint(key)} does not match this answer. The answer was changed on the "
            "way, or is not the client's: find out which before this client takes part again."
        ) from None
    return fingerprint(key)


def find_client_keys(given: str | None, simulated: bool, place: Path) -> Path | None:
    """Return the folder of the keys by which clients are known; None in a simulation that names none.

    Between machines names are bound to keys: without a folder in the configuration it is ``keys`` of the operator's
    folder, in which the server works.

    Args:
        given: ``server.client_keys``.
        simulated: True if all clients are processes of this machine.
        place: folder in which the server works.

    Raises:
        ConfigError: clients are on other machines, and there are no keys.
    """
    if given is not None:
        return Path(given)
    if simulated:
        return None
    if not (place / REGISTERED_KEYS).is_dir():
        raise ConfigError(
            f"server.client_keys is 'none' and {place} has no folder {REGISTERED_KEYS}; without registered keys any "
            "client of a federation could claim another's domain. Start the server with fedmerge deploy start, or set "
            "server.client_keys to a folder of NAME.pub files."
        )
    return place / REGISTERED_KEYS


def read_registered_keys(folder: Path) -> Mapping[str, RegisteredKey]:
    """Read the public keys (NAME.pub) of a folder, by fingerprint.

    Raises:
        ConfigError: the folder is missing or has no key, or a file is not a key.
    """
    paths = sorted(folder.glob("[!.]*.pub"))
    if not paths:
        raise ConfigError(
            f"server.client_keys = {folder}: no *.pub file in this folder. Give the folder keys/ that fedmerge "
            "deploy add-client fills."
        )
    keys = {}
    for path in paths:
        line = path.read_text(encoding="utf-8", errors="replace")
        key = _public_key(line)
        if key is None:
            raise ConfigError(f"{path}: not an ECDSA public key in one line. Register the client again.")
        domains = [word.removeprefix(_DOMAIN) for word in line.split()[2:] if word.startswith(_DOMAIN)]
        keys[fingerprint(key)] = RegisteredKey(path.stem, domains[-1] if domains else None)
    return keys


def read_private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read an elliptic-curve private key in OpenSSH format.

    Raises:
        ConfigError: the file is missing, readable by others, or holds another kind of key.
    """
    remedy = "Restore the file, or make a new client folder with fedmerge client init and have its key registered."
    try:
        data = private_key_bytes(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}). {remedy}") from error
    try:
        key = load_ssh_private_key(data, None)
    except Exception as error:  # several libraries raise; none of them quotes the key
        raise ConfigError(f"{path}: not an OpenSSH private key ({type(error).__name__}). {remedy}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path}: is a {type(key).__name__}, expected an elliptic-curve key. {remedy}")
    return key


def fingerprint(key: ec.EllipticCurvePublicKey) -> str:
    """Return the SHA-256 of a public key's DER form as hexadecimal, for comparison by telephone."""
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def _public_key(line: str) -> ec.EllipticCurvePublicKey | None:
    if len(line) > LONGEST_KEY:
        return None
    try:
        key = load_ssh_public_key(line.encode())
    except Exception:  # several libraries raise
        return None
    return key if isinstance(key, ec.EllipticCurvePublicKey) else None
