"""Fields of JSON lines, parsed by DuckDB; the lines that it refuses are parsed one by one and numbered."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fedmerge.domain.importers.bad_rows import BadRows
from fedmerge.domain.importers.reading.table import NUMBER
from fedmerge.domain.importers.reading.values import map_distinct
from fedmerge.domain.importers.store import OFFLINE

LINE = "\0line"  # the column of whole lines; no file has a field of this name


class BadLine(Exception):
    """The reason why a line is left out."""


def parse_object(line: bytes) -> dict[str, Any]:
    """Return the object on a line; raise BadLine if there is none."""
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError:
        raise BadLine("not UTF-8 text") from None
    except (ValueError, RecursionError):
        raise BadLine("not JSON") from None
    if not isinstance(record, dict):
        raise BadLine("not an object")
    return record


def read_fields(
    blocks: Iterable[bytes],
    names: Sequence[str],
    bad: BadRows,
    parse: Callable[[bytes], Mapping[str, Any]] = parse_object,
) -> Iterator[pa.RecordBatch]:
    """Yield some fields of the objects on the lines of a file; blank lines are passed over.

    Args:
        blocks: the file as read_blocks returns it.
        names: names of the fields; of a repeated one the first value counts.
        bad: records the lines without an object.
        parse: function of a line that DuckDB refuses, which returns its object or raises BadLine.

    Yields:
        For each block the JSON of every field (text; null where an object lacks it), LINE (binary) and NUMBER (int64).
    """
    schema = pa.schema([*((name, pa.string()) for name in names), (LINE, pa.binary()), (NUMBER, pa.int64())])
    paths = ", ".join(_sql_text("/" + name.replace("~", "~0").replace("/", "~1")) for name in names)
    fields = ", ".join(f"found[{at}] AS field{at}" for at in range(1, len(names) + 1))
    query = f"SELECT {fields} FROM (SELECT try(json_extract(line, [{paths}])) AS found FROM block)"
    number = 1
    with duckdb.connect(config={**OFFLINE, "threads": 1}) as database:
        for block in blocks:
            lines = _lines(block)
            database.register("block", pa.table({"line": _utf8(lines)}))
            found = database.sql(query).to_arrow_table().combine_chunks()
            columns = [column.chunk(0) if column.num_chunks else pa.nulls(0, pa.string()) for column in found.columns]
            batch = pa.record_batch([*columns, lines, pa.array(np.arange(number, number + len(lines)))], schema=schema)
            number += len(lines)
            yield _with_refused(batch, names, bad, parse)


def strings(column: pa.Array) -> pa.Array:
    """Return the texts of a column of JSON; null where a value is no text, or no valid UTF-8."""
    is_text, has_escape = pc.starts_with(column, '"'), pc.match_substring(column, "\\")
    plain = pc.if_else(pc.and_not(is_text, has_escape), pc.utf8_trim(column, '"'), pa.scalar(None, pa.string()))
    escaped = pc.if_else(pc.and_(is_text, has_escape), column, pa.scalar(None, pa.string()))
    return pc.coalesce(plain, map_distinct(escaped, _unescape, pa.string())) if _any(escaped) else plain


def _unescape(value: str) -> str:
    text: str = json.loads(value)
    text.encode()  # raises ValueError for half of a surrogate pair
    return text


def _any(column: pa.Array) -> bool:
    return bool(column.null_count < len(column))


def _with_refused(
    batch: pa.RecordBatch, names: Sequence[str], bad: BadRows, parse: Callable[[bytes], Mapping[str, Any]]
) -> pa.RecordBatch:
    """Parse the lines of which nothing was found: blank, no object, an object without these fields, or refused."""
    empty = np.logical_and.reduce([batch.column(name).is_null().to_numpy(zero_copy_only=False) for name in names])
    if not empty.any():
        return batch
    kept, values = np.ones(len(batch), bool), []
    for at in np.flatnonzero(empty).tolist():
        line = batch.column(LINE)[at].as_py()
        record: Mapping[str, Any] = {}
        kept[at] = line != b"" and not line.isspace()
        try:
            record = parse(line) if kept[at] else {}
        except BadLine as error:
            bad.add(batch.column(NUMBER)[at].as_py(), str(error))
            kept[at] = False
        values.append([_to_json(record[name]) if name in record else None for name in names])
    columns = [
        pc.replace_with_mask(batch.column(name), pa.array(empty), pa.array(column, pa.string()))
        for name, column in zip(names, zip(*values, strict=True), strict=True)
    ]
    columns += [batch.column(LINE), batch.column(NUMBER)]
    return pa.record_batch(columns, schema=batch.schema).filter(pa.array(kept))


def _to_json(value: Any) -> str:
    return json.dumps(value, skipkeys=True, default=lambda _: {})  # Python literals may hold what JSON lacks


def _lines(block: bytes) -> pa.BinaryArray:
    """Return the lines of a block with their line feeds, without a copy."""
    ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + 1
    if not block.endswith(b"\n"):
        ends = np.append(ends, len(block))
    offsets = np.append(0, ends).astype(np.int32)
    return pa.Array.from_buffers(pa.binary(), len(ends), [None, pa.py_buffer(offsets), pa.py_buffer(block)])


def _utf8(lines: pa.BinaryArray) -> pa.StringArray:
    """Return the lines as text; null where one is no UTF-8."""

    def decode(line: bytes) -> str | None:
        try:
            return line.decode()
        except UnicodeDecodeError:
            return None

    try:
        return lines.cast(pa.string())
    except pa.ArrowInvalid:
        return pa.array(map(decode, lines.to_pylist()), pa.string())


def _sql_text(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
