"""Folders on a client's own disk that hold what it trained: named by the inputs, whole or absent."""

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fedmerge.errors import ClientError


def inputs_key(inputs: Mapping[str, Any]) -> str:
    """Sixteen hex digits that name a set of inputs; equal inputs give equal names on every machine.

    Args:
        inputs: everything that the result depends on, as JSON types.
    """
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


def fill_folder(folder: Path, write: Callable[[Path], None], is_whole: Callable[[], bool], what: str) -> None:
    """Fill a folder whole or not at all.

    Args:
        folder: where it shall be; absent before.
        write: fills an empty folder, which is then moved there.
        is_whole: whether another process was faster with the same result, which is as good.
        what: for the message, such as ``domain Beauty: its expert``.

    Raises:
        ClientError: the disk is full, or the folder may not be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder.parent) as partial:
            filled = Path(partial) / "folder"
            filled.mkdir()
            write(filled)
            filled.rename(folder)
    except (OSError, SafetensorError) as error:
        if not is_whole():
            raise ClientError(
                f"{what} cannot be kept under {folder.parent} ({error}). "
                "Check the space and the permissions there, or set cache_dir."
            ) from error
