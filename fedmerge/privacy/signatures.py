"""Who sent what: a client signs the hash of each answer with its key, and the server checks the signature.

What is signed names the run, the question that is answered and the answer's hash: an answer can be given neither again,
nor in another run, nor by somebody else.
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

LONGEST_KEY = 1000  # of a public key in one line
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
    """Whose a public key is.

    Attributes:
        name: of the client, as the operator calls it.
        domain: the one domain that it may be; None: any.
    """

    name: str
    domain: str | None


def key_comment(name: str, domain: str | None) -> str:
    """What follows the key in a registered NAME.pub, where OpenSSH has a comment."""
    return name if domain is None else f"{name} {_DOMAIN}{domain}"


def statement(run_id: int, message_id: str, content_sha256: str) -> bytes:
    """What is signed."""
    return f"fedmerge answer 1\nrun {run_id}\nto {message_id}\nsha256 {content_sha256}\n".encode()


def sign(key: ec.EllipticCurvePrivateKey, stated: bytes) -> Signature:
    """Sign a statement."""
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    return Signature(public, key.sign(stated, ec.ECDSA(hashes.SHA384())))


def signer(signature: Signature, stated: bytes) -> str:
    """The fingerprint of the key that signed a statement.

    Raises:
        ClientError: it did not, or is no key.
    """
    key = _public_key(signature.key)
    if key is None:
        raise ClientError("its signature comes with what is no public key of ECDSA. Use fedmerge client init.")
    try:
        key.verify(signature.data, stated, ec.ECDSA(hashes.SHA384()))
    except InvalidSignature:
        raise ClientError(
            f"its signature by the key {fingerprint(key)} is not of this answer. It was changed on the way, or is not "
            "what the client sent: look into it before its client takes part again."
        ) from None
    return fingerprint(key)


def registered_keys(folder: Path) -> Mapping[str, RegisteredKey]:
    """The public keys (NAME.pub) in a folder, by fingerprint.

    Raises:
        ConfigError: there is no such folder, none in it, or one is no key.
    """
    paths = sorted(folder.glob("[!.]*.pub"))
    if not paths:
        raise ConfigError(
            f"server.client_keys = {folder}: no *.pub in it. Give the folder keys/ of fedmerge deploy add-client."
        )
    keys = {}
    for path in paths:
        line = path.read_text(encoding="utf-8", errors="replace")
        key = _public_key(line)
        if key is None:
            raise ConfigError(f"{path}: is no public key of ECDSA in one line. Register the client again.")
        domains = [word.removeprefix(_DOMAIN) for word in line.split()[2:] if word.startswith(_DOMAIN)]
        keys[fingerprint(key)] = RegisteredKey(path.stem, domains[-1] if domains else None)
    return keys


def read_private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """A private key file.

    Raises:
        ConfigError: it is missing, readable by others, or no elliptic-curve key in OpenSSH's form.
    """
    remedy = "Put the file back, or make a new client folder with fedmerge client init and have its key registered."
    try:
        data = private_key_bytes(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}). {remedy}") from error
    try:
        key = load_ssh_private_key(data, None)
    except Exception as error:  # of several libraries; none of them quotes the key
        raise ConfigError(f"{path}: is no OpenSSH private key ({type(error).__name__}). {remedy}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path}: is a {type(key).__name__}, expected an elliptic-curve key. {remedy}")
    return key


def fingerprint(key: ec.EllipticCurvePublicKey) -> str:
    """SHA-256 of a public key's DER form, hexadecimal: for two people to compare over the telephone."""
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def _public_key(line: str) -> ec.EllipticCurvePublicKey | None:
    if len(line) > LONGEST_KEY:
        return None
    try:
        key = load_ssh_public_key(line.encode())
    except Exception:  # of several libraries
        return None
    return key if isinstance(key, ec.EllipticCurvePublicKey) else None
