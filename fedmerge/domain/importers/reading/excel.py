"""The first sheet of an Excel workbook as a table; needs openpyxl, the extra "excel"."""

import itertools
import zipfile
from collections.abc import Iterator, Sequence
from datetime import date, datetime, time
from pathlib import Path
from typing import Any

import pyarrow as pa

from fedmerge.domain.importers.bad_rows import BadRows
from fedmerge.domain.importers.reading.table import NUMBER, Table
from fedmerge.domain.importers.source_files import Progress
from fedmerge.errors import DomainError

ROWS_AT_ONCE = 1 << 14
# What a workbook may unpack to. Sheets take five to thirty times their size, a bomb a thousand times.
SMALL_BYTES, MOST_RATIO = 1 << 26, 100


def excel_table(
    path: Path,
    max_bad_share: float = 0.0,
    progress: Progress | None = None,
    column_names: Sequence[str] | None = None,
) -> Table:
    """Open the first sheet of an .xlsx file; its first row that is not empty is the header, unless names are given.

    Every value is text: numbers with all their digits, points in time as ISO 8601. Formulas give their stored values.
    Rows are numbered as the sheet numbers them.

    Raises:
        DomainError: openpyxl is not installed, the file is damaged or unpacks to too much, or the sheet is empty.
    """
    try:
        from openpyxl import load_workbook  # type: ignore[import-untyped]  # noqa: PLC0415  # an optional extra
    except ImportError:
        raise DomainError(
            f"{path}: reading Excel files needs openpyxl. Install it (pip install 'fedmerge[excel]'), or save the "
            "sheet as CSV."
        ) from None
    _check_size(path)
    try:
        workbook = load_workbook(path, read_only=True, data_only=True)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise _unreadable(path, error) from error
    sheet = workbook.worksheets[0]
    sheet.reset_dimensions()  # some programs write wrong ones
    bad = BadRows(str(path), "row", max_bad_share)
    if len(workbook.worksheets) > 1:
        bad.notes.append(f"the first of {len(workbook.worksheets)} sheets was read")
    filled = (
        (number, values)
        for number, values in enumerate(sheet.iter_rows(values_only=True), 1)
        if any(value is not None for value in values)
    )
    if column_names is None:
        _, header = next(filled, (0, ()))
        names = [_text(value) or "" for value in header]
        columns = tuple(names[: max((at for at, name in enumerate(names, 1) if name), default=0)])
    else:
        columns = tuple(column_names)
    rows = ((number, values[: len(columns)]) for number, values in filled)  # a stray cell makes a row of 16,384
    if not any(columns):
        raise DomainError(f"{path}: the first sheet is empty, expected a header and rows. Put the table there.")

    def batches(names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        schema = pa.schema([*((name, pa.string()) for name in names), (NUMBER, pa.int64())])
        positions = [columns.index(name) for name in names]
        while some := list(itertools.islice(rows, ROWS_AT_ONCE)):
            arrays = [
                pa.array([_text(values[at]) if at < len(values) else None for _, values in some], pa.string())
                for at in positions
            ]
            if progress:
                progress(str(path), some[-1][0], 1.0)
            yield pa.record_batch([*arrays, pa.array([number for number, _ in some], pa.int64())], schema=schema)

    return Table(str(path), "Excel", columns, batches, bad)


def _check_size(path: Path) -> None:
    """Raise DomainError for a small file that unpacks to a large one; zipfile reads no more than the sizes stated."""
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
    except (OSError, zipfile.BadZipFile) as error:
        raise _unreadable(path, error) from error
    size = path.stat().st_size
    if unpacked > (most := SMALL_BYTES + MOST_RATIO * size):
        raise DomainError(
            f"{path}: found a workbook of {size:,} bytes that unpacks to {unpacked:,}, expected at most {most:,}. "
            "Check where it comes from; if it is yours, save the sheet as CSV."
        )


def _unreadable(path: Path, error: Exception) -> DomainError:
    return DomainError(f"{path}: cannot be read as an Excel workbook ({error}). Save it again as .xlsx.")


def _text(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    return repr(value) if isinstance(value, float) else str(value).strip()
