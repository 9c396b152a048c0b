"""Read and write files and folders atomically: they exist complete or not at all. Errors name the file.

Every write is synced, file and folder, before it returns: what was written survives a power cut. State that is read
back has its SHA-256 beside it, see :func:`seal` and :func:`append_line`.
"""

import fcntl
import hashlib
import itertools
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fedmerge.errors import RunDirError

ROWS_AT_ONCE = 10_000
SEAL = "record_sha256"
_SPACE = "Check the free space and the permissions there and try again; fedmerge run --resume continues a run."


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder to fill; it replaces ``folder`` only if the block succeeds.

    Raises:
        RunDirError: the disk is full, or the folder cannot be written.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        yield partial
        sync_tree(partial)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(partial, folder)
        sync(folder.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise RunDirError(f"{folder} cannot be written ({error}). {_SPACE}") from error


@contextmanager
def exclusive(folder: Path, name: str = ".lock", waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Let one process at a time work in a folder, which is created; others wait. A killed process holds nothing.

    Args:
        folder: the folder.
        name: of the file that is locked; processes with other names do not wait for each other.
        waiting: called once if another process has the lock.

    Raises:
        OSError: the folder cannot be created or written.
    """
    make_folder(folder)
    with (folder / name).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def share(path: Path) -> None:
    """Give a file the permissions that the umask says; safetensors writes files that their owner alone can read.

    The umask can be read only by setting it, which other threads would notice, so a file of our own shows it.
    """
    probe = path.with_name(f".{path.name}.mode-{secrets.token_hex(4)}")
    probe.touch()
    try:
        path.chmod(probe.stat().st_mode)
    finally:
        probe.unlink()


def append_line(path: Path, data: Mapping[str, Any]) -> None:
    """Append one line of JSON, sealed and synced; an unfinished line before it, left by a power cut, does no harm.

    A complete line has a line feed before and after it, so that an unfinished one is told from a damaged one.

    Raises:
        RunDirError: as in :func:`write_text`.
    """
    is_new = not path.exists()
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps(seal(data), ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if is_new:
            sync(path.parent)
    except OSError as error:
        raise RunDirError(f"{path} cannot be written ({error.strerror}). {_SPACE}") from error


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines that :func:`append_line` wrote, without unfinished ones.

    Raises:
        RunDirError: the file cannot be read, or a complete line was changed since it was written.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return
    except OSError as error:
        raise RunDirError(f"{path} cannot be read ({error.strerror}). Check the permissions there.") from error
    for number, line in enumerate(lines):
        if not line:
            continue
        try:
            found, end = json.JSONDecoder().raw_decode(line)
            record = unseal(found)
        except (ValueError, RecursionError):
            record, end = None, 0
        if record is not None and end == len(line):
            yield record
        elif record is not None or lines[number + 1 : number + 2] == [""]:
            raise RunDirError(
                f"{path}: line {number + 1} was changed since it was written (its SHA-256 is another). Restore the "
                "file from a copy; without it, start a new run."
            )


def seal(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON object with the SHA-256 of its content as a last entry; :func:`read_json` verifies it.

    >>> sealed = seal({"a": 1})
    >>> unseal(sealed), unseal({**sealed, "a": 2})
    ({'a': 1}, None)
    """
    content = json.loads(json.dumps(record))  # tuples are lists and keys are texts, as they will be read
    return {**content, SEAL: _record_sha256(content)}


def unseal(record: Any) -> dict[str, Any] | None:
    """Return the content of a sealed JSON object; None if it was changed since :func:`seal`, or is not one."""
    if not isinstance(record, dict):
        return None
    content = {key: value for key, value in record.items() if key != SEAL}
    return content if record.get(SEAL) == _record_sha256(content) else None


def read_sealed(path: Path) -> dict[str, Any] | None:
    """Read a JSON object that must have a seal; None if the file does not exist.

    Raises:
        RunDirError: the file is damaged, was changed, or cannot be read.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RunDirError(f"{path} cannot be read ({error.strerror}). Check the permissions there.") from error
    try:
        record = unseal(json.loads(data))
    except (ValueError, RecursionError):
        record = None
    if record is None:
        raise _changed(path)
    return record


def _without_seal(path: Path, found: Any) -> Any:
    if not isinstance(found, dict) or SEAL not in found:
        return found
    record = unseal(found)
    if record is None:
        raise _changed(path)
    return record


def _changed(path: Path) -> RunDirError:
    return RunDirError(
        f"{path}: changed since it was written (its SHA-256 is another). Restore the file from a copy, or start a new "
        "run, which reuses the experts that the clients have cached."
    )


def _record_sha256(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, separators=(",", ":"), sort_keys=True).encode()).hexdigest()


def sync(path: Path) -> None:
    """Sync a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Sync all files and folders below a folder, and the folder itself."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(place) / name)
        sync(Path(place))


def make_folder(folder: Path) -> None:
    """Make a folder with all that are above it, and sync the entries that are new."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for place in missing:
        sync(place.parent)


def folder_size(folder: Path) -> int:
    """Return the bytes of all files below a folder, or of a file; links and what vanishes meanwhile do not count."""
    total = 0
    for path in [folder] if folder.is_file() else folder.rglob("*"):
        try:
            if path.is_file() and not path.is_symlink():
                total += path.stat().st_size
        except OSError:
            continue
    return total


def read_json(path: Path) -> Any:
    """Read a JSON file of a run; None if it does not exist. A seal is verified and removed.

    Raises:
        RunDirError: the file is damaged or cannot be read.
    """
    try:
        return _without_seal(path, json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise RunDirError(
            f"{path} cannot be read ({error}). Restore the file, or start a new run, which reuses the experts that the "
            "clients have cached."
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a file atomically; see :func:`write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically; file and folder are synced. Of several processes that write it, the last one counts.

    Raises:
        RunDirError: the disk is full, or the folder is missing or not writable.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync(path.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise RunDirError(f"{path} cannot be written ({error.strerror}). {_SPACE}") from error


def write_json(path: Path, data: Any) -> None:
    """Write JSON atomically; see :func:`write_bytes`."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def write_table(path: Path, rows: Iterable[Mapping[str, Any]], schema: Any = None) -> None:
    """Write rows with equal keys as Parquet, atomically, with at most ROWS_AT_ONCE in memory.

    Args:
        path: the file.
        rows: at least one; with a schema also none.
        schema: pyarrow schema; None infers the types of the columns from the first rows.

    Raises:
        RunDirError: as in :func:`write_text`.
    """
    import pyarrow as pa  # noqa: PLC0415  # only tables need pyarrow; merging imports this module without it
    import pyarrow.parquet as pq  # noqa: PLC0415  # likewise

    partial = path.with_name(f".{path.name}.partial")
    try:
        remaining = iter(rows)
        with ExitStack() as stack:
            writer = (
                None
                if schema is None
                else stack.enter_context(pq.ParquetWriter(partial, schema, write_page_checksum=True))
            )
            while some := [dict(row) for row in itertools.islice(remaining, ROWS_AT_ONCE)]:
                table = pa.Table.from_pylist(some, schema)
                if writer is None:
                    schema = table.schema
                    writer = stack.enter_context(pq.ParquetWriter(partial, schema, write_page_checksum=True))
                writer.write_table(table)
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    except OSError as error:
        raise RunDirError(f"{path} cannot be written ({error}). {_SPACE}") from error
    finally:
        partial.unlink(missing_ok=True)


def check_free(folder: Path) -> None:
    """Raise unless a folder is absent or empty.

    Raises:
        RunDirError: it is not empty, or not a folder.
    """
    if folder.is_symlink() or (folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))):
        raise RunDirError(f"{folder}: exists and is not an empty folder; nothing is overwritten. Choose another.")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a hidden folder to fill, which is renamed to ``folder`` only if the block succeeds.

    Args:
        folder: must be absent or empty.

    Raises:
        RunDirError: the folder is not empty, or cannot be written; nothing is left behind.
    """
    folder = Path(os.path.abspath(folder))
    check_free(folder)
    partial = folder.parent / f".{folder.name}.partial-{secrets.token_hex(4)}"
    try:
        partial.mkdir(parents=True)
        yield partial
        sync_tree(partial)
        os.rename(partial, folder)
        sync(folder.parent)
    except (OSError, SafetensorError) as error:
        raise RunDirError(
            f"{folder}: cannot be written ({error}). Check free space and permissions, or choose another folder."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def scratch_folder(beside: Path) -> Iterator[Path]:
    """Yield an empty hidden folder on the disk of a path that need not exist; it is removed at the end.

    Raises:
        RunDirError: the folder cannot be written.
    """
    beside = Path(os.path.abspath(beside))
    folder = beside.parent / f".{beside.name}.scratch-{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True)
        yield folder
    except OSError as error:
        raise RunDirError(f"{folder.parent}: cannot be written ({error}). Check free space and permissions.") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def read_record(path: Path) -> dict[str, Any]:
    """Read a JSON object of a run folder; empty if the file does not exist.

    Raises:
        RunDirError: the file is damaged, or not a JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise RunDirError(f"{path}: damaged ({error}). Restore the file.") from error
    if not isinstance(data, dict):
        raise RunDirError(f"{path}: found a JSON {type(data).__name__}, expected an object. Restore the file.")
    record: dict[str, Any] = _without_seal(path, data)
    return record


def table_or_empty(value: Any) -> Mapping[str, Any]:
    """Return a value of a record that should be a table; empty if it is anything else."""
    return value if isinstance(value, dict) else {}


def text_or_none(value: Any) -> str | None:
    """Return a value of a record that should be text; None if it is anything else."""
    return value if isinstance(value, str) else None
