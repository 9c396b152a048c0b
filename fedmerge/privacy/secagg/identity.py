"""Ed25519 keys that identify clients to each other, in OpenSSH's files: ``ssh-keygen -t ed25519 -N "" -f NAME``."""

from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from fedmerge.errors import ClientError
from fedmerge.privacy.key_files import private_key_bytes


def read_identity(path: Path) -> Ed25519PrivateKey:
    """Read a client's own private key.

    Raises:
        ClientError: a missing file, or a file without such a key.
        ConfigError: other users of the machine can read it.
    """
    try:
        data = private_key_bytes(path)
    except OSError as error:
        raise _unreadable(path, str(error)) from error
    try:
        key = load_ssh_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise _unreadable(path, str(error)) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise _unreadable(path, f"it is a {type(key).__name__}")
    return key


def read_registered(folder: Path) -> dict[str, Ed25519PublicKey]:
    """Read every client's public key, by name: the files NAME.pub of a folder.

    Raises:
        ClientError: a missing folder, or a file without such a key.
    """
    keys = {}
    files = sorted(folder.glob("*.pub"))
    if not files:
        raise _unreadable(folder, "it holds no file NAME.pub")
    for path in files:
        try:
            key = load_ssh_public_key(path.read_bytes())
        except (OSError, ValueError, UnsupportedAlgorithm) as error:
            raise _unreadable(path, str(error)) from error
        if not isinstance(key, Ed25519PublicKey):
            raise _unreadable(path, f"it is a {type(key).__name__}")
        keys[path.stem] = key
    return keys


def _unreadable(path: Path, why: str) -> ClientError:
    return ClientError(
        f"{path}: cannot be read as an Ed25519 key ({why}), expected a file of ssh-keygen -t ed25519 -N '' -f NAME: "
        "the private key of this client, or a folder with the public key NAME.pub of every client. Create it again"
    )
