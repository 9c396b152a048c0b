"""Cache folders on a client's own disk: named by a key of the inputs, complete or absent, and synced."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fedmerge.errors import ClientError
from fedmerge.files import make_folder, sync, sync_tree


def inputs_key(inputs: Mapping[str, Any]) -> str:
    """Return the key of a set of inputs, sixteen hex digits; equal inputs have equal keys on every machine.

    Args:
        inputs: everything that the result depends on, as JSON types.
    """
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


def mark_used(path: Path) -> None:
    """Note that a cache entry is in use: what can be made again is deleted when it was not used for long."""
    with suppress(OSError):  # a cache of somebody else, or on a read-only disk
        os.utime(path)


def fill_folder(folder: Path, write: Callable[[Path], None], is_whole: Callable[[], bool], what: str) -> None:
    """Write a cache folder completely or not at all.

    Args:
        folder: its path; it must not exist.
        write: fills an empty folder, which then gets this path.
        is_whole: returns True if another process has written the same result meanwhile, which is not an error.
        what: subject of the error message, for example ``domain Beauty: its expert``.

    Raises:
        ClientError: the disk is full, or the folder is not writable.
    """
    try:
        make_folder(folder.parent)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder.parent) as partial:
            filled = Path(partial) / "folder"
            filled.mkdir(mode=0o700)  # made from private interactions
            write(filled)
            sync_tree(filled)
            filled.rename(folder)
            sync(folder.parent)
    except (OSError, SafetensorError) as error:
        if not is_whole():
            raise ClientError(
                f"{what} cannot be cached in {folder.parent} ({error}). "
                "Check the free space and the permissions there, or set cache_dir."
            ) from error
