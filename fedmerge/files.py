"""Read and write files and folders atomically: they exist complete or not at all. Errors name the file."""

import itertools
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fedmerge.errors import RunDirError

ROWS_AT_ONCE = 10_000
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
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(partial, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise RunDirError(f"{folder} cannot be written ({error}). {_SPACE}") from error


def append_line(path: Path, data: Any) -> None:
    """Append one line of JSON and sync it; an unfinished line before it, left by a killed process, does no harm.

    Raises:
        RunDirError: as in :func:`write_text`.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps(data, ensure_ascii=False))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise RunDirError(f"{path} cannot be written ({error.strerror}). {_SPACE}") from error


def read_lines(path: Path) -> Iterator[Any]:
    """Yield the lines that :func:`append_line` wrote, without unfinished ones.

    Raises:
        RunDirError: the file cannot be read.
    """
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    yield json.loads(line)
                except ValueError:
                    continue
    except FileNotFoundError:
        return
    except OSError as error:
        raise RunDirError(f"{path} cannot be read ({error.strerror}). Check the permissions there.") from error


def read_json(path: Path) -> Any:
    """Read a JSON file of a run; None if it does not exist.

    Raises:
        RunDirError: the file is damaged or cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunDirError(
            f"{path} cannot be read ({error}). Restore the file, or start a new run, which reuses the experts that the "
            "clients have cached."
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a file atomically; see :func:`write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically and sync it.

    Raises:
        RunDirError: the disk is full, or the folder is missing or not writable.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
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
            writer = None if schema is None else stack.enter_context(pq.ParquetWriter(partial, schema))
            while some := [dict(row) for row in itertools.islice(remaining, ROWS_AT_ONCE)]:
                table = pa.Table.from_pylist(some, schema)
                if writer is None:
                    schema = table.schema
                    writer = stack.enter_context(pq.ParquetWriter(partial, schema))
                writer.write_table(table)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise RunDirError(f"{path} cannot be written ({error}). {_SPACE}") from error


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
        os.rename(partial, folder)
    except (OSError, SafetensorError) as error:
        raise RunDirError(
            f"{folder}: cannot be written ({error}). Check free space and permissions, or choose another folder."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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
    return data


def table_or_empty(value: Any) -> Mapping[str, Any]:
    """Return a value of a record that should be a table; empty if it is anything else."""
    return value if isinstance(value, dict) else {}


def text_or_none(value: Any) -> str | None:
    """Return a value of a record that should be text; None if it is anything else."""
    return value if isinstance(value, str) else None
