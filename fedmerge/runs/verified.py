"""Read and hash the adapters of a run folder, once per process.

An adapter is read again only if its files changed: same inode, size, modification and change time of every file means
the same content. The hashes of all adapters are cached, the adapters themselves up to ``CACHE_BYTES``.
"""

import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from fedmerge.adapter import Adapter, adapter_sha256
from fedmerge.encoder.peft.folder import read_adapter

CACHE_BYTES = 2**29  # so that memory does not grow with the number of domains

T = TypeVar("T")
Stamp = tuple[tuple[str, int, int, int, int, int], ...]

_lock = threading.Lock()
_hashes: dict[Path, tuple[Stamp, str]] = {}
_adapters: OrderedDict[Path, tuple[Stamp, Adapter]] = OrderedDict()  # least recently used first


def read_verified(folder: Path) -> tuple[Adapter, str]:
    """Return an adapter and its hash. Callers share the tensors and must not change them.

    Raises:
        FedMergeError, OSError: as :func:`fedmerge.encoder.peft.folder.read_adapter`.
    """
    folder = folder.resolve()
    stamp = _stamp(folder)
    with _lock:
        adapter = _cached(_adapters, folder, stamp)
        sha256 = _cached(_hashes, folder, stamp)
        if adapter is not None:
            _adapters.move_to_end(folder)
    if adapter is None:
        adapter = read_adapter(folder)
    if sha256 is None:
        sha256 = adapter_sha256(adapter)
    if stamp and _stamp(folder) == stamp:  # else the folder changed while it was read
        with _lock:
            _hashes[folder] = (stamp, sha256)
            _adapters[folder] = (stamp, adapter)
            while sum(map(_size_bytes, _adapters.values())) > CACHE_BYTES:
                _adapters.popitem(last=False)
    return adapter, sha256


def forget_adapters() -> None:
    """Empty the cache."""
    with _lock:
        _hashes.clear()
        _adapters.clear()


def _cached(cache: Mapping[Path, tuple[Stamp, T]], folder: Path, stamp: Stamp) -> T | None:
    found = cache.get(folder)
    return found[1] if found is not None and found[0] == stamp else None


def _stamp(folder: Path) -> Stamp:
    try:
        files = [(path.name, path.stat()) for path in sorted(folder.glob("adapter_*"))]
    except OSError:
        return ()
    return tuple((name, s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in files)


def _size_bytes(entry: tuple[Stamp, Adapter]) -> int:
    return sum(file[3] for file in entry[0])
