"""Read untrusted Parquet files under limits on their decoded size.

A few kilobytes of Parquet can decode to many gigabytes: compressed pages, a dictionary whose single long text is
repeated in every row, a footer with millions of empty row groups. The footer may also state false sizes. Therefore the
header of every page is read before anything is decoded, and text stays dictionary-encoded until its decoded size is
known.
"""

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pyarrow.types as pt

from fedmerge.errors import DomainError

LONGEST_TEXT = 16_384  # characters of an id or an attribute in a domain folder: more than an encoder reads
CELL_BYTES = 4 * LONGEST_TEXT  # in UTF-8
SOURCE_CELL_BYTES = 1 << 24  # of a file to import, whose longer texts are cut
BATCH_ROWS = 1 << 16
BATCH_BYTES = 1 << 26  # decoded at once; also the largest page
_MAGIC = b"PAR1"
_HEADER_BYTES = (1 << 12, 1 << 20)  # usual and largest size of a page header
_DEEPEST = 8  # structs inside a page header

# Encodings whose decoded size follows from the size of the page or of the batch. The two delta encodings of text are
# excluded, because they state their own lengths.
_ENCODINGS: Mapping[int, str] = {
    0: "PLAIN",
    2: "PLAIN_DICTIONARY",
    3: "RLE",
    4: "BIT_PACKED",
    5: "DELTA_BINARY_PACKED",
    8: "RLE_DICTIONARY",
    9: "BYTE_STREAM_SPLIT",
}
_OF_DICTIONARY = (2, 8)
_PAGE_FIELDS: Mapping[int, tuple[int, int]] = {0: (5, 2), 2: (7, 2), 3: (8, 4)}  # type -> its header, its encoding
_DICTIONARY_PAGE = 2
_INT32, _STRUCT = 5, 12  # types of Thrift


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of a Parquet file.

    Attributes:
        rows: rows of the file.
        decoded_bytes: decoded size of all texts and pages.
        footer_bytes: size of the footer, which is decoded whole; each byte may take some hundreds in memory.
        pages: pages of each column.
        cell_bytes: size of a text.
    """

    rows: int
    decoded_bytes: int
    footer_bytes: int
    pages: int
    cell_bytes: int = CELL_BYTES


def table_limits(rows: int, decoded_bytes: int) -> Limits:
    """Return limits of a table that fedmerge itself writes, for a known number of rows."""
    return Limits(rows, decoded_bytes, footer_bytes=2**18 + rows // 16, pages=1000 + rows // 100)


def file_limits(path: Path) -> Limits:
    """Return limits of an imported file, proportional to its size and ample for real tables, whose texts repeat."""
    size = path.stat().st_size
    return Limits(
        rows=2**40,
        decoded_bytes=decoded_limit(size),
        footer_bytes=2**20 + size // 16,
        pages=2**24,
        cell_bytes=SOURCE_CELL_BYTES,
    )


def decoded_limit(size_bytes: int) -> int:
    """Return the most that a file of somebody's own may decode to; real texts take a tenth of that at most."""
    return 2**29 + 256 * size_bytes


@dataclass(frozen=True, slots=True)
class ParquetTable:
    """An open file whose footer is within its limits; no page is decoded yet.

    Attributes:
        where: name of the file for messages.
        source: path or bytes.
        metadata: the footer.
        schema: names and types.
        limits: limits of the file.
    """

    where: str
    source: Path | bytes
    metadata: pq.FileMetaData
    schema: pa.Schema
    limits: Limits


def open_parquet(where: str, source: Path | bytes, limits: Limits) -> ParquetTable:
    """Open a Parquet file and check its footer.

    Raises:
        DomainError: the footer or the number of rows is above its limit.
        pa.ArrowException, OSError: not Parquet, damaged, or not readable.
    """
    with _opened(source) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 8))
        end = file.read(8)
    footer_bytes = int.from_bytes(end[:4], "little")
    if end[4:] == _MAGIC and footer_bytes > limits.footer_bytes:
        raise _too_much(where, f"a footer of {footer_bytes:,} bytes", f"{limits.footer_bytes:,}")
    with pq.ParquetFile(_arrow_source(source)) as parquet:
        metadata, schema = parquet.metadata, parquet.schema_arrow
    if metadata.num_rows > limits.rows:
        raise _too_much(where, f"{metadata.num_rows:,} rows", f"{limits.rows:,}")
    return ParquetTable(where, source, metadata, schema, limits)


def read_batches(table: ParquetTable, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Yield the columns batch by batch; columns of text may be dictionary-encoded, see :func:`plain_column`.

    Raises:
        DomainError: a page, a cell or the decoded columns are above their limits, or a page has another encoding.
        pa.ArrowException, OSError: the file is damaged.
    """
    pages = _check_pages(table, names)
    encoded = [name for name in names if _is_text(table.schema.field(name).type)]
    plain = _safe_as_plain(table, pages, encoded)
    encoded = [name for name in encoded if name not in plain]
    decoded = row = 0
    # pre_buffer, pyarrow's default, keeps the bytes of all row groups read so far: memory would grow with the file.
    source = _arrow_source(table.source)
    with pq.ParquetFile(source, metadata=table.metadata, read_dictionary=encoded, pre_buffer=False) as parquet:
        for batch in parquet.iter_batches(pages.batch_rows, columns=list(dict.fromkeys(names))):
            for name in batch.schema.names:
                column = batch.column(name)
                if name in plain or pt.is_dictionary(column.type):
                    decoded += _text_bytes(table, name, column, row)
                else:
                    decoded += column.nbytes
            if decoded > table.limits.decoded_bytes:
                found = f"rows that decode to more than {decoded:,} bytes"
                raise _too_much(table.where, found, f"{table.limits.decoded_bytes:,}")
            row += len(batch)
            yield batch


def plain_column(column: pa.Array) -> pa.Array:
    """Return a column without dictionary encoding."""
    return column.dictionary_decode() if pt.is_dictionary(column.type) else column


def _text_bytes(table: ParquetTable, name: str, column: pa.Array, first_row: int) -> int:
    """Return the decoded size of a column of text whose cells are within their limit."""
    where, most = table.where, table.limits.cell_bytes
    if not pt.is_dictionary(column.type):
        sizes = pc.binary_length(column).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    else:
        lengths = pc.binary_length(column.dictionary).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
        indices = column.indices.drop_null().to_numpy(zero_copy_only=False)
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(lengths):
            raise _damaged(where, f"a cell of column {name!r} is outside its dictionary of {len(lengths):,} texts")
        sizes = lengths[indices]
    if len(sizes) and (longest := int(sizes.max())) > most:
        row = first_row + int(np.argmax(sizes))
        raise _too_much(where, f"a cell of {longest:,} bytes in column {name!r}, about row {row}", f"{most:,}")
    return int(sizes.sum()) + 8 * len(column)


@dataclass(frozen=True, slots=True)
class _Pages:
    """What the page headers of the columns say.

    Attributes:
        batch_rows: number of rows to decode at once.
        plain: columns with pages that use no dictionary.
        dictionaries: (row group, column) -> number of texts in the dictionary, which the first page of cells uses; -1
            if it does not.
    """

    batch_rows: int
    plain: set[str]
    dictionaries: dict[tuple[int, str], int]


def _check_pages(table: ParquetTable, names: Sequence[str]) -> _Pages:
    """Check the headers of all pages of the columns."""
    where, limits = table.where, table.limits
    decoded, densest = 0, 1.0
    pages = dict.fromkeys(names, 0)
    plain: set[str] = set()
    dictionaries: dict[tuple[int, str], int] = {}
    with _opened(table.source) as file:
        for group in range(table.metadata.num_row_groups):
            row_group = table.metadata.row_group(group)
            for index in range(row_group.num_columns):
                chunk = row_group.column(index)
                name = next((n for n in names if f"{chunk.path_in_schema}.".startswith(f"{n}.")), None)
                if name is None:
                    continue
                for at, page in enumerate(_pages(file, chunk, where)):
                    pages[name] += 1
                    decoded += page.size_bytes
                    if page.size_bytes > BATCH_BYTES:
                        found = f"a page of {page.size_bytes:,} bytes in column {name!r}"
                        raise _too_much(where, found, f"{BATCH_BYTES:,}")
                    if decoded > limits.decoded_bytes or pages[name] > limits.pages:
                        found = f"more than {pages[name]:,} pages in column {name!r}, or {decoded:,} bytes in all"
                        raise _too_much(where, found, f"{limits.pages:,} pages and {limits.decoded_bytes:,} bytes")
                    if page.encoding not in _ENCODINGS:
                        raise DomainError(
                            f"{where}: column {name!r} has Parquet encoding {page.encoding}, expected one of "
                            f"{', '.join(_ENCODINGS.values())}. Write the file again in plain or dictionary encoding, "
                            "the default of pyarrow, pandas and Spark."
                        )
                    if page.is_dictionary:
                        dictionaries[group, name] = page.num_values if at == 0 else -1
                        continue
                    densest = max(densest, page.size_bytes / max(1, page.num_values))
                    if page.encoding not in _OF_DICTIONARY:
                        plain.add(name)
                        if at <= 1 and (group, name) in dictionaries:
                            dictionaries[group, name] = -1
    return _Pages(max(64, min(BATCH_ROWS, int(BATCH_BYTES / densest))), plain, dictionaries)


def _safe_as_plain(table: ParquetTable, pages: _Pages, texts: Sequence[str]) -> set[str]:
    """Return the columns of text that are decoded as such, since no batch can exceed BATCH_BYTES for a dictionary.

    Cells that use no dictionary would all be entered in one, which takes five times as long. Each dictionary is read
    first, with one row; the page headers must confirm that this is all of it.
    """
    safe = pages.plain & set(texts)
    source = _arrow_source(table.source)
    with pq.ParquetFile(source, metadata=table.metadata, read_dictionary=list(texts), pre_buffer=False) as parquet:
        for (group, name), num_texts in pages.dictionaries.items():
            if name not in safe:
                continue
            batch = next(parquet.iter_batches(1, row_groups=[group], columns=[name]), None)
            found = pa.array([], pa.string()) if batch is None else batch.column(0).dictionary
            longest = pc.max(pc.binary_length(found)).as_py() or 0
            if len(found) != num_texts or longest * pages.batch_rows > BATCH_BYTES:
                safe.remove(name)
    return safe


@dataclass(frozen=True, slots=True)
class _Page:
    size_bytes: int  # decompressed
    num_values: int
    encoding: int
    is_dictionary: bool


def _pages(file: BinaryIO, chunk: pq.ColumnChunkMetaData, where: str) -> Iterator[_Page]:
    """Yield the headers of a column chunk's pages, in the order in which they are decoded."""
    start, dictionary = chunk.data_page_offset, chunk.dictionary_page_offset
    if dictionary is not None and 0 < dictionary < start:
        start = dictionary
    end, seen = start + chunk.total_compressed_size, 0
    while start < end and seen < chunk.num_values:
        header, header_bytes = _page_header(file, start, where)
        kind = header.get(1)
        size, compressed = header.get(2), header.get(3)
        inner, encoding_field = _PAGE_FIELDS.get(kind, (0, 0)) if isinstance(kind, int) else (0, 0)
        facts = header.get(inner, {})
        numbers = [size, compressed, facts.get(1, 0), facts.get(encoding_field, 0)] if isinstance(facts, dict) else []
        if not numbers or not all(isinstance(number, int) and 0 <= number < 2**31 for number in numbers):
            raise _damaged(where)
        size, compressed, num_values, encoding = numbers
        yield _Page(size, num_values, encoding, kind == _DICTIONARY_PAGE)
        seen += 0 if kind == _DICTIONARY_PAGE else num_values
        start += header_bytes + compressed


def _page_header(file: BinaryIO, start: int, where: str) -> tuple[dict[int, Any], int]:
    """Return the numbers of a page header by field (Thrift's compact protocol), and its size."""
    for most in _HEADER_BYTES:
        try:
            file.seek(start)
            return _struct(file.read(most), 0, 0)
        except IndexError:  # longer than the bytes read
            continue
        except (ValueError, OverflowError) as error:
            raise _damaged(where) from error
    raise _damaged(where)


def _struct(data: bytes, at: int, depth: int) -> tuple[dict[int, Any], int]:
    """Read a struct of Thrift's compact protocol; return its int32 and structs by field, and its end.

    Only fields that the generated readers of Parquet accept are returned; they skip fields of another type.

    Source: https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
    """
    if depth > _DEEPEST:
        raise ValueError("structs inside structs")
    fields: dict[int, Any] = {}
    field = 0
    while head := data[at]:
        at += 1
        if head >> 4:
            field += head >> 4
        else:
            field, at = _number(data, at)
        value, at = _value(data, at, head & 15, depth, in_list=False)
        if head & 15 in (_INT32, _STRUCT):
            if field in fields:
                raise ValueError(f"field {field} twice")
            fields[field] = value
    return fields, at + 1


def _value(  # noqa: PLR0911  # a case for each type of Thrift
    data: bytes, at: int, kind: int, depth: int, *, in_list: bool
) -> tuple[Any, int]:
    match kind:
        case 1 | 2:  # a truth value: in the field's header, or in a separate byte within a list
            return kind == 1, at + in_list
        case 3:
            return data[at], at + 1
        case 4 | 5 | 6:
            return _number(data, at)
        case 7:
            return None, at + 8
        case 8:
            length, at = _unsigned(data, at)
            return None, at + length
        case 9 | 10:
            if depth > _DEEPEST:
                raise ValueError("lists inside lists")
            head = data[at]
            length, at = _unsigned(data, at + 1) if head >> 4 == 15 else (head >> 4, at + 1)
            for _ in range(length):
                _, at = _value(data, at, head & 15, depth + 1, in_list=True)
                _ = data[at]  # ends with the data, whatever the stated length
            return None, at
        case 12:  # _STRUCT
            return _struct(data, at, depth + 1)
        case _:
            raise ValueError(f"type {kind}")


def _number(data: bytes, at: int) -> tuple[int, int]:
    value, at = _unsigned(data, at)
    return (value >> 1) ^ -(value & 1), at


def _unsigned(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _opened(source: Path | bytes) -> BinaryIO:
    return source.open("rb") if isinstance(source, Path) else io.BytesIO(source)


def _is_text(kind: pa.DataType) -> bool:
    if pt.is_dictionary(kind):
        kind = kind.value_type
    return bool(pt.is_string(kind) or pt.is_large_string(kind) or pt.is_string_view(kind))


def _arrow_source(source: Path | bytes) -> Any:
    return source if isinstance(source, Path) else pa.BufferReader(source)


def _too_much(where: str, found: str, most: str) -> DomainError:
    return DomainError(
        f"{where}: found {found}, expected at most {most}. Check the file; shorten its texts or split the table if it "
        "is correct."
    )


def _damaged(where: str, what: str = "a page header is damaged") -> DomainError:
    return DomainError(f"{where}: cannot be read as Parquet ({what}). Restore the file from a copy.")
