"""Private key files, readable by their owner only."""

from pathlib import Path

from fedmerge.errors import ConfigError


def private_key_bytes(path: Path) -> bytes:
    """Read a private key file.

    Raises:
        OSError: it cannot be read.
        ConfigError: other users of the machine can read it.
    """
    others, data = path.stat().st_mode & 0o077, path.read_bytes()
    if others:
        raise ConfigError(f"{path}: other users of this machine can read this private key. Run: chmod 600 {path}")
    return data
