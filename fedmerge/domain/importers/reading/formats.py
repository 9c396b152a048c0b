"""Open a table of any format, recognised by its first bytes, whatever its name."""

import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmerge.domain.importers.reading.delimited import delimited_table
from fedmerge.domain.importers.reading.excel import excel_table
from fedmerge.domain.importers.reading.frames import frame_table, is_frame
from fedmerge.domain.importers.reading.json_lines import json_lines_table
from fedmerge.domain.importers.reading.parquet import parquet_table
from fedmerge.domain.importers.reading.table import RECOGNISED, FileOptions, Table
from fedmerge.domain.importers.source_files import Progress, SourceFile, first_bytes
from fedmerge.errors import ConfigError, DomainError


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be opened: a path, the columns looked for, and how to read them."""

    path: Path
    wanted: Sequence[str]
    max_bad_share: float
    progress: Progress | None
    options: FileOptions


@dataclass(frozen=True, slots=True)
class Format:
    """One format of tables.

    Attributes:
        name: the format in words.
        fits: function of a path and its first bytes, decompressed, that recognises the format.
        open: function that opens a file of the format.
        options: the fields of FileOptions that mean something.
    """

    name: str
    fits: Callable[[Path, bytes], bool]
    open: Callable[[Request], Table]
    options: tuple[str, ...] = ()


def _is_parquet(path: Path, start: bytes) -> bool:
    return path.is_dir() or start.startswith(b"PAR1") or path.suffix in (".parquet", ".pq")


def _is_excel(path: Path, start: bytes) -> bool:
    return start.startswith(b"PK\x03\x04") and (path.suffix in (".xlsx", ".xlsm") or _holds(path, "xl/workbook.xml"))


def _holds(path: Path, member: str) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return member in archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return False


def _is_json(path: Path, start: bytes) -> bool:
    text = start.replace(b"\0", b"").lstrip(b"\xef\xbb\xbf\xff\xfe \t\r\n")
    return text.startswith((b'{"', b"{}", b"[{")) or path.name.removesuffix(".gz").endswith((".jsonl", ".ndjson"))


# The first that fits is taken. RecBole's atomic files are delimited text whose header names types.
FORMATS = (
    Format("Parquet", _is_parquet, lambda r: parquet_table(r.path, r.max_bad_share, r.progress)),
    Format(
        "Excel",
        _is_excel,
        lambda r: excel_table(r.path, r.max_bad_share, r.progress, r.options.column_names),
        ("column_names",),
    ),
    Format("JSON lines", _is_json, lambda r: json_lines_table(SourceFile(r.path), r.max_bad_share, r.progress)),
    Format(
        "CSV",
        lambda path, start: True,
        lambda r: delimited_table(SourceFile(r.path), r.wanted, r.max_bad_share, r.progress, r.options),
        ("delimiter", "encoding", "column_names"),
    ),
)
OLD_EXCEL = b"\xd0\xcf\x11\xe0"


def open_table(
    source: Path | Any,
    wanted: Sequence[str],
    max_bad_share: float = 0.0,
    progress: Progress | None = None,
    options: FileOptions = RECOGNISED,
    name: str = "frame",
) -> Table:
    """Open a file, a folder of Parquet parts, or a data frame.

    Args:
        source: path, or an object with ``__arrow_c_stream__``.
        wanted: names of the columns looked for.
        max_bad_share: see BadRows.
        progress: see read_blocks.
        options: what is said about the file.
        name: the name of a data frame in messages.

    Raises:
        DomainError: as for the function of the format.
        ConfigError: an option that means nothing for the format.
    """
    if is_frame(source):
        return frame_table(source, name, max_bad_share)
    path = Path(source)
    start = first_bytes(path) if path.is_file() else b""
    if start.startswith(OLD_EXCEL):
        raise DomainError(f"{path}: found a workbook of Excel 97, expected .xlsx. Save it again as .xlsx or CSV.")
    form = next(form for form in FORMATS if form.fits(path, start))
    given = {name for name in ("delimiter", "encoding", "column_names") if getattr(options, name) is not None}
    if unused := sorted(given - set(form.options)):
        raise ConfigError(f"{path}: found the format {form.name}, which has no {', '.join(unused)}. Leave it out.")
    return form.open(Request(path, wanted, max_bad_share, progress, options))
