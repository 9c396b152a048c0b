"""Copy a finished folder to an address and back: whole or marked as unfinished, resumable, every file verified.

At the address the folder lies as it is, so that its pages can be opened there, with two more files:

files.json       name of the folder, and SHA-256, size and time of each file; written when all of them are there
UNFINISHED       from the first byte of a push until after files.json; nothing is read from a folder that has it
"""

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any

from fedmerge.errors import StorageError
from fedmerge.files import check_free, exclusive, seal, sync, sync_tree, unseal
from fedmerge.storage.addresses import Place, listing, open_place, reached

LIST_FILE, MARK = "files.json", "UNFINISHED"
AT_ONCE = 8  # files; a storage answers each after some tens of milliseconds
_BLOCK = 1 << 20
_PARTIAL = ".part"


@dataclass(frozen=True)
class Copied:
    """What a copy did.

    Attributes:
        num_files: files of the folder.
        num_sent: files of them that were not there yet.
        sent_bytes: their bytes.
    """

    num_files: int
    num_sent: int
    sent_bytes: int


@dataclass(frozen=True)
class _File:
    sha256: str
    size_bytes: int
    modified_ns: int = field(compare=False)  # kept: it dates a run


def push_folder(folder: Path, address: str, left_out: Collection[str] = ()) -> Copied:
    """Copy a folder to an address. A repeated push sends what is missing or changed there.

    After an interrupted push, files of the right size are read there and compared, so that only others are sent.

    Args:
        folder: must not change meanwhile; hidden files and folders are left out.
        address: of the folder to make, or of the same folder from an earlier push.
        left_out: paths within the folder that are left out.

    Raises:
        StorageError: the address is malformed or not reached, or holds something else; the folder has links.
    """
    place, name = open_place(address), folder.resolve().name
    ours = {path: _facts(folder / path) for path in _paths(folder) if path not in left_out}
    theirs = listing(place)
    known = _known(place, theirs, name)
    unfinished = MARK in theirs

    def is_there(path: str) -> bool:
        if path not in theirs or int(theirs[path]["size"]) != ours[path].size_bytes:
            return False
        return _sha256_at(place, path) == ours[path].sha256 if unfinished else known.get(path) == ours[path]

    with reached(place, "written"), ThreadPoolExecutor(AT_ONCE) as pool:
        present = dict(zip(ours, pool.map(is_there, ours), strict=True))
        missing = [path for path in ours if not present[path]]
        gone = sorted(known.keys() - ours.keys())
        if not missing and not gone and known and not unfinished:
            return Copied(len(ours), 0, 0)
        place.files.pipe_file(place.inside(MARK), json.dumps({"name": name}).encode())
        list(pool.map(lambda path: place.files.put_file(str(folder / path), place.inside(path)), missing))
        list(pool.map(lambda path: place.files.rm_file(place.inside(path)), [path for path in gone if path in theirs]))
        files = {path: [file.sha256, file.size_bytes, file.modified_ns] for path, file in ours.items()}
        place.files.pipe_file(place.inside(LIST_FILE), json.dumps(seal({"name": name, "files": files})).encode())
        place.files.rm_file(place.inside(MARK))
    return Copied(len(ours), len(missing), sum(ours[path].size_bytes for path in missing))


def pull_folder(address: str, folder: Path) -> Copied:
    """Copy what :func:`push_folder` has copied to a folder of this machine, which appears when all of it is there.

    An interrupted pull leaves ``.NAME.pulling`` beside the folder; the next one verifies what it holds and continues.

    Args:
        address: of the folder.
        folder: absent or empty.

    Raises:
        StorageError: the address is malformed, not reached, or holds no whole folder; a file is damaged there.
        RunDirError: the folder is not empty.
    """
    place, folder = open_place(address), Path(os.path.abspath(folder))
    check_free(folder)
    check_finished(place)
    theirs = _known(place, listing(place), None)
    if not theirs:
        raise StorageError(
            f"{place.address}: no {LIST_FILE} there, expected a folder copied by 'fedmerge push'. Check the address."
        )
    partial = folder.parent / f".{folder.name}.pulling"
    try:
        with exclusive(partial):
            check_free(folder)
            _remove_others(partial, theirs)
            fetched = _fetch_all(place, partial, theirs)
            for path, file in theirs.items():
                os.utime(partial / path, ns=(file.modified_ns, file.modified_ns))
            (partial / ".lock").unlink()
            sync_tree(partial)
            os.rename(partial, folder)
            sync(folder.parent)
    except OSError as error:
        raise StorageError(
            f"{folder}: cannot be written ({error.strerror or error}). Check free space and permissions, and repeat "
            "the command: what was copied is kept."
        ) from error
    return Copied(len(theirs), len(fetched), sum(theirs[path].size_bytes for path in fetched))


def check_finished(place: Place) -> None:
    """Raise if a push to the folder, or to one that it lies in, is under way or was interrupted.

    Raises:
        StorageError: see above, or the storage cannot be read.
    """
    path = place.path
    with reached(place, "read"):
        while "/" in path.strip("/"):
            if place.files.exists(f"{path}/{MARK}"):
                raise StorageError(
                    f"{place.address}: not whole: a push to it is under way, or was interrupted ({MARK} is there). "
                    "Wait, or repeat the push."
                )
            path = path.rpartition("/")[0]


def fetch_file(place: Place, path: str, target: Path) -> None:
    """Copy one file, which appears under its name when it is there; its folder is made.

    Raises:
        StorageError: it cannot be read.
        OSError: it cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + _PARTIAL)
    with reached(place, "read"):
        source = place.files.open(place.inside(path), "rb")
    with source, partial.open("wb") as file:
        while block := _read(place, source):
            file.write(block)
    os.replace(partial, target)


def _read(place: Place, source: IO[bytes]) -> bytes:
    with reached(place, "read"):
        return source.read(_BLOCK)


def _fetch_all(place: Place, partial: Path, theirs: Mapping[str, _File]) -> list[str]:
    """Copy the files that are not yet in the partial folder; return their paths."""

    def fetch(path: str) -> bool:
        target = partial / path
        if target.is_file() and _facts(target) == theirs[path]:
            return False
        fetch_file(place, path, target)
        if _facts(target) != theirs[path]:
            target.unlink()
            raise StorageError(
                f"{place.address}/{path}: changed since it was pushed (its SHA-256 is another). Repeat the push."
            )
        return True

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return [path for path, new in zip(theirs, pool.map(fetch, theirs), strict=True) if new]


def _remove_others(partial: Path, theirs: Mapping[str, _File]) -> None:
    for path in sorted(partial.rglob("*")):
        if path.is_symlink() or (path.is_file() and path.relative_to(partial).as_posix() not in {*theirs, ".lock"}):
            path.unlink()
    for path in sorted(partial.iterdir()):
        if path.is_dir() and not any(name.startswith(f"{path.name}/") for name in theirs):
            shutil.rmtree(path)


def _known(place: Place, theirs: Mapping[str, Any], name: str | None) -> dict[str, _File]:
    """Return the files that a finished push has listed; empty if none has.

    Raises:
        StorageError: something else lies at the address, or the list was changed.
    """
    if LIST_FILE not in theirs:
        if name is not None and theirs and MARK not in theirs:
            raise StorageError(
                f"{place.address}: holds other files ({', '.join([*theirs][:3])}, …); nothing is overwritten. Choose "
                "another address."
            )
        return {}
    with reached(place, "read"):
        data = place.files.cat_file(place.inside(LIST_FILE))
    try:
        record = unseal(json.loads(data)) or {}
        found, files = record["name"], record["files"]
        known = {str(path): _File(str(sha256), int(size), int(time)) for path, (sha256, size, time) in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(
            f"{place.address}/{LIST_FILE}: damaged, expected the list of a push. Delete it there and repeat the push."
        ) from error
    if strange := [path for path in known if not is_inside(path)]:
        raise StorageError(f"{place.address}/{LIST_FILE}: lists {strange[0]!r}, outside the folder. Do not use it.")
    if name is not None and found != name:
        raise StorageError(
            f"{place.address}: holds {found}, found {name} to push; nothing is overwritten. Choose another address."
        )
    return known


def is_inside(path: str) -> bool:
    """Return True for a path within a folder, without ``..`` or anything that another system reads in another way."""
    parts = PurePosixPath(path).parts
    return bool(parts) and path == "/".join(parts) and not {"..", "/"} & {*parts} and "\\" not in path


def _paths(folder: Path) -> list[str]:
    """Return the files of a folder, sorted, without hidden ones.

    Raises:
        StorageError: it holds a link, a name that the list needs, or nothing.
    """
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if any(part.startswith(".") for part in name.split("/")):
            continue
        if path.is_symlink():
            raise StorageError(f"{path}: a link, expected files and folders alone. Replace it by what it points to.")
        if name in (LIST_FILE, MARK):
            raise StorageError(f"{path}: has the name of a file that a push writes. Rename it.")
        if path.is_file():
            found.append(name)
    if not found:
        raise StorageError(f"{folder}: no files there, expected a run, an adapter or a domain. Check the path.")
    return found


def _facts(path: Path) -> _File:
    with path.open("rb") as file:
        facts = os.fstat(file.fileno())
        return _File(hashlib.file_digest(file, "sha256").hexdigest(), facts.st_size, facts.st_mtime_ns)


def _sha256_at(place: Place, path: str) -> str:
    digest = hashlib.sha256()
    with place.files.open(place.inside(path), "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
