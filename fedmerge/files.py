"""Files and folders that exist whole or not at all; an error names the file that cannot be read or written."""

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
_SPACE = "Make space there or check the permissions, then do it again; a run goes on with fedmerge run --resume."


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill; it takes its name, in place of an older one, only when the block ends well.

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
    """Append one line of JSON; one that a killed process left unfinished before it does no harm.

    Raises:
        RunDirError: as :func:`write_text`.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps(data, ensure_ascii=False))
    except OSError as error:
        raise RunDirError(f"{path} cannot be written ({error.strerror}). {_SPACE}") from error


def read_lines(path: Path) -> Iterator[Any]:
    """What :func:`append_line` wrote, without unfinished lines."""
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
    """A JSON file of the run; None where there is none.

    Raises:
        RunDirError: it is damaged or cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunDirError(
            f"{path} cannot be read ({error}). Put the file back as it was, or start a new run: the clients keep their "
            "experts."
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all; see :func:`write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        RunDirError: the disk is full, or the folder is gone or may not be written.
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
    """Write JSON whole or not at all; see :func:`write_text`."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def write_table(path: Path, rows: Iterable[Mapping[str, Any]], schema: Any = None) -> None:
    """Write rows of equal keys as Parquet, whole or not at all; a few thousand at a time are in memory.

    Args:
        path: the file.
        rows: one or more; with a schema also none.
        schema: of pyarrow; None lets the first rows decide the types of the columns.

    Raises:
        RunDirError: as :func:`write_text`.
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
    """Refuse a folder that holds something; RunDirError."""
    if folder.is_symlink() or (folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))):
        raise RunDirError(f"{folder}: exists and is not an empty folder; nothing is overwritten. Choose another.")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder that is there as a whole or not at all: yields a hidden one beside it, which takes its name at the end.

    Args:
        folder: must be absent or empty.

    Raises:
        RunDirError: it holds something, or cannot be written; nothing is left behind.
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
            f"{folder}: cannot be written ({error}). Check the space and the permissions, or choose another folder."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_record(path: Path) -> dict[str, Any]:
    """A JSON object of a run folder; empty where there is no such file.

    Raises:
        RunDirError: the file is damaged.
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
