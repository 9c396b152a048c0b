"""Copies of folders at addresses in a cache on this machine: fetched once for each state of what lies there."""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from fedmerge.errors import StorageError
from fedmerge.files import exclusive, new_folder
from fedmerge.storage.addresses import Place, is_address, listing, name_of, open_place, reached
from fedmerge.storage.copying import AT_ONCE, LIST_FILE, check_finished, fetch_file, is_inside

Kind = Literal["domains", "adapters"]
_STATE = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "updated", "created")  # the first that a storage has
_REMEDY = "Check the address; a whole run is copied with 'fedmerge pull'."


def local_folder(source: str | Path, cache_dir: str | Path, kind: Kind) -> Path:
    """Return the folder of a path, or the local copy of what lies at an address; it has the address's last name.

    The copy is one of ``CACHE_DIR/KIND/NAME-KEY/NAME``, with a key of the address, and of name, size and ETag or time
    of each file, so what changed there is fetched again. It is complete or absent, and readable by its owner alone.

    Args:
        source: a path, or an address.
        cache_dir: the cache on this machine's own disk.
        kind: what it is.

    Raises:
        StorageError: the address is malformed or not reached; nothing lies there, or no whole folder.
        RunDirError: the copy cannot be written.
    """
    if not is_address(str(source)):
        return Path(source).expanduser()
    place = open_place(str(source))
    check_finished(place)
    state = _state(place)
    key = hashlib.sha256(json.dumps([place.address, state], sort_keys=True).encode()).hexdigest()[:16]
    root = Path(cache_dir).expanduser() / kind
    name = name_of(place.address)
    entry = root / f"{name}-{key}"
    if not entry.is_dir():
        with exclusive(root, f".{name}-{key}.lock"):
            if not entry.is_dir():
                _fetch(place, state, entry, name)
        with suppress(OSError):
            (root / f".{name}-{key}.lock").unlink()
    with suppress(OSError):
        os.utime(entry)  # in use
    return entry / name


def has_file(address: str, name: str) -> bool:
    """Return True if a folder at an address has a file.

    Raises:
        StorageError: the address is malformed or not reached.
    """
    place = open_place(address)
    with reached(place, "read"):
        return bool(place.files.exists(place.inside(name)))


def _fetch(place: Place, state: Mapping[str, Any], entry: Path, name: str) -> None:
    with new_folder(entry) as partial:
        partial.chmod(0o700)

        def fetch(path: str) -> None:
            fetch_file(place, path, partial / name / path)
            found = (partial / name / path).stat().st_size
            if found != state[path][0]:
                raise StorageError(
                    f"{place.address}/{path}: {found} bytes arrived, expected {state[path][0]}. Try again."
                )

        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(fetch, state))
        check_finished(place)
        if _state(place) != state:
            raise StorageError(f"{place.address}: changed while it was copied. Try again.")


def _state(place: Place) -> dict[str, list[Any]]:
    """Return size, and ETag or time, of each file; hidden ones and the list of a push are none of the folder's.

    Raises:
        StorageError: there are none, or one has a name that leads out of the folder.
    """
    found = {
        path: [int(facts["size"]), next((str(facts[key]) for key in _STATE if facts.get(key)), "")]
        for path, facts in listing(place).items()
        if path != LIST_FILE and not any(part.startswith(".") for part in path.split("/"))
    }
    if not found:
        raise StorageError(f"{place.address}: nothing there. {_REMEDY}")
    if strange := [path for path in found if not is_inside(path)]:
        raise StorageError(f"{place.address}: holds {strange[0]!r}, which leads out of the folder. Do not use it.")
    if "DONE" in found or "run.log" in found:
        raise StorageError(f"{place.address}: a run, expected one folder of a domain or an adapter. {_REMEDY}")
    return found
