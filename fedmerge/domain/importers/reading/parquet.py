"""Parquet files, and folders of Parquet parts, as tables."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import pyarrow as pa

from fedmerge.domain.importers.bad_rows import BadRows
from fedmerge.domain.importers.reading.table import Table, check_columns, with_numbers
from fedmerge.domain.importers.reading.values import check_type
from fedmerge.domain.importers.source_files import Progress, first_bytes
from fedmerge.domain.parquet import ParquetTable, file_limits, open_parquet, read_batches
from fedmerge.errors import DomainError


def parquet_table(path: Path, max_bad_share: float = 0.0, progress: Progress | None = None) -> Table:
    """Open a Parquet file or a folder of parts; numbers, text and points in time are returned unchanged.

    The parts of a folder are read in the order of their paths, and rows are numbered through. A folder ``day=3`` gives
    its parts a column ``day``, as Hive and Spark write it. Names that begin with ``.`` or ``_`` are passed over.

    Raises:
        DomainError: the file is missing, damaged, not Parquet, or above :func:`~fedmerge.domain.parquet.file_limits`;
            while rows are read, a damaged part, a part without a column, or a column of another type.
    """
    if path.is_dir():
        parts = [
            part
            for part in sorted(path.rglob("*"))
            if not any(name.startswith((".", "_")) for name in part.relative_to(path).parts)
            and part.is_file()
            and (part.suffix == ".parquet" or first_bytes(part, 4) == b"PAR1")
        ]
        if not parts:
            raise DomainError(f"{path}: a directory without Parquet parts. Give a file or such a folder.")
    else:
        parts = [path]
    first = _open(parts[0])
    bad = BadRows(str(path), "row", max_bad_share)
    columns = (*first.schema.names, *_folder_values(path, parts[0]))

    def batches(names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        number = 0
        for index, part in enumerate(parts):
            file, values = _open(part), _folder_values(path, part)
            have = Table(str(part), "Parquet", (*file.schema.names, *values), batches, bad)
            check_columns(have, names)
            for batch in _read(file, [name for name in names if name not in values]):
                constants = {name: pa.repeat(pa.scalar(values[name]), len(batch)) for name in names if name in values}
                yield with_numbers(
                    pa.record_batch({name: constants.get(name, _column(batch, name)) for name in names}), number
                )
                number += len(batch)
                if progress:
                    progress(str(path), number, (index + 1) / len(parts))

    return Table(str(path), "Parquet", columns, batches, bad)


def _column(batch: pa.RecordBatch, name: str) -> pa.Array | None:
    return batch.column(name) if name in batch.schema.names else None


def _folder_values(root: Path, part: Path) -> dict[str, str]:
    """Return the columns that the folders above a part name, such as ``day=3``."""
    folders = part.relative_to(root).parts[:-1] if root != part else ()
    return dict(folder.split("=", 1) for folder in folders if "=" in folder)


def _open(path: Path) -> ParquetTable:
    try:
        return open_parquet(str(path), path, file_limits(path))
    except FileNotFoundError:
        raise DomainError(f"{path}: no such file. Check the path.") from None
    except (pa.ArrowException, OSError, UnicodeError) as error:
        _refuse(path, error)


def _read(file: ParquetTable, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
    for name in names:
        check_type(file.where, name, file.schema.field(name).type)
    try:
        yield from read_batches(file, names)
    except (pa.ArrowException, OSError, UnicodeError) as error:
        _refuse(Path(file.where), error)


def _refuse(path: Path, error: Exception) -> NoReturn:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise DomainError(
        f"{path}: cannot be read as Parquet ({reason}): truncated, damaged, or another format. Replace it."
    ) from error
