"""What a client's cache holds, by kind, and what of it can go without a loss."""

import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from fedmerge.client.cache.dependents import LEARNED, RECORDS, REMADE
from fedmerge.domain.demo import BUNDLE_FOLDER
from fedmerge.errors import ClientError, ConfigError, RunDirError
from fedmerge.files import folder_size, read_record, table_or_empty, text_or_none
from fedmerge.tensor_files import read_facts

EDITED = ("serving",)  # by those who serve
KINDS: Mapping[str, str] = {
    "experts": "trained adapters; trained again by the next run with the same settings",
    "heads": "trained heads, which are nowhere else; what a run serves may need them",
    "personal": "coefficients of personal merges, which are nowhere else; what a run serves may need them",
    "woven": "adapters of others that were continued; trained again by the next run with the same settings",
    "sasrec": "trained baselines; trained again by the next run",
    "released": "what was sent with noise, once; keep",
    "sums": "what secure sums have revealed; keep",
    "disclosed": "metric sums that have left; keep",
    "tokens": "tokens of catalogs; made again in seconds",
    "item-vectors": "vectors of catalogs under an adapter; encoded again when needed",
    "indexes": "approximate indexes of item vectors; built again when needed",
    "cohorts": "adapters received from others; sent again by the server",
    "domains": "copies of domains at addresses of shared storage; fetched again when needed",
    "adapters": "copies of adapters at addresses of shared storage; fetched again when needed",
    "serving": "items that were added or changed while serving; nowhere else",
    BUNDLE_FOLDER: "the bundled demo data; written again when needed",
}
UNUSED_DAYS = 30.0  # after which what can be made again is deleted
_DAY = 86_400.0
_PARTIAL = (".partial-", ".demo-partial-")


@dataclass(frozen=True)
class CacheEntry:
    """A file or folder of the cache.

    Attributes:
        path: where it lies.
        kind: name of the folder it lies in.
        size_bytes: of all its files.
        used: Unix time of its last use or, if that is not recorded, of its last change.
        why: reason to delete it; empty to keep it.
    """

    path: Path
    kind: str
    size_bytes: int
    used: float
    why: str = ""


def cache_entries(cache_dir: Path) -> list[CacheEntry]:
    """Return everything in the cache, sorted by path; the bundled demo and what is of no known kind count as one each.

    Raises:
        ClientError: the folder cannot be read.
    """
    root = cache_dir.expanduser()
    entries = []
    try:
        for folder in sorted(root.iterdir()) if root.is_dir() else ():
            split = folder.is_dir() and folder.name in (*LEARNED, *RECORDS, *REMADE, *EDITED)
            for path in sorted(folder.iterdir()) if split else [folder]:
                entries.append(CacheEntry(path, folder.name, folder_size(path), path.lstat().st_mtime))
    except OSError as error:
        raise ClientError(f"{root}: cannot be read ({error.strerror}). Check the permissions there.") from error
    return entries


def entries_to_delete(
    cache_dir: Path,
    kinds: Collection[str],
    used_adapters: Collection[str] | None,
    unused_days: float = UNUSED_DAYS,
    now: float | None = None,
) -> list[CacheEntry]:
    """Return the entries that can go, each with the reason.

    Without kinds: what can be made again and was not used for ``unused_days``; item vectors of an adapter that no run
    and no cached expert has; leftovers of writes that were interrupted. With kinds: all entries of these.

    Args:
        cache_dir: folder on the client's own disk.
        kinds: names of folders of the cache; empty: see above.
        used_adapters: hashes of the adapters of all runs, see :func:`adapters_of_runs`; None if they are not known.
        unused_days: days without use.
        now: Unix time; None is the present.

    Raises:
        ConfigError: a kind is unknown, or a record of what has left.
        ClientError: the cache cannot be read.
    """
    if wrong := sorted({*kinds} - {*KINDS}):
        raise ConfigError(f"cache: found the kinds {', '.join(wrong)}, expected some of {', '.join(KINDS)}.")
    if kept := sorted({*kinds} & {*RECORDS}):
        raise ConfigError(
            f"cache: {', '.join(kept)} records what has left this client, and later answers are checked against it, "
            "so it is not deleted. Name other kinds."
        )
    entries, now = cache_entries(cache_dir), time.time() if now is None else now
    if kinds:
        return [replace(entry, why="named") for entry in entries if entry.kind in kinds]
    own = {*_adapters_of_experts(cache_dir)}
    found = []
    for entry in entries:
        unused = (now - entry.used) / _DAY
        adapter = _adapter_of(entry.path) if entry.kind == "item-vectors" else None
        if entry.path.name.startswith(_PARTIAL) or entry.path.name.endswith(".partial"):
            if unused >= 1:
                found.append(replace(entry, why="left over from an interrupted write"))
        elif entry.kind in REMADE and unused >= unused_days:
            found.append(replace(entry, why=f"not used for {unused:.0f} days"))
        elif adapter and used_adapters is not None and adapter not in {*used_adapters} | own and unused >= 1:
            found.append(replace(entry, why="no run has its adapter any more"))
    return found


def delete_entry(entry: CacheEntry) -> None:
    """Delete a file or folder of the cache.

    Raises:
        ClientError: it cannot be deleted.
    """
    try:
        if entry.path.is_dir() and not entry.path.is_symlink():
            shutil.rmtree(entry.path)
        else:
            entry.path.unlink(missing_ok=True)
    except OSError as error:
        raise ClientError(
            f"{entry.path}: cannot be deleted ({error.strerror}). Check the permissions there."
        ) from error


def adapters_of_runs(folders: Collection[Path]) -> set[str]:
    """Return the hashes of all adapters in run folders: experts, merges, merges made later."""
    patterns = ("adapters/*/training.json", "merged/*/provenance.json", "remerged/*/*/provenance.json")
    return {
        sha256
        for folder in folders
        for pattern in patterns
        for path in folder.glob(pattern)
        if (sha256 := _hash_in(path)) is not None
    }


def _adapters_of_experts(cache_dir: Path) -> Iterator[str]:
    for path in (cache_dir.expanduser() / "experts").glob("*/training.json"):
        if (sha256 := _hash_in(path)) is not None:
            yield sha256


def _hash_in(path: Path) -> str | None:
    try:
        return text_or_none(read_record(path).get("sha256"))
    except RunDirError:
        return None


def _adapter_of(path: Path) -> str | None:
    """Return the hash of the adapter of item vectors; empty for the backbone's, None if it is not recorded."""
    return text_or_none(table_or_empty(read_facts(path)).get("adapter"))
