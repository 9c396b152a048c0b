"""JSON lines as a table: one object a line; every value is text, as in a CSV file."""

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from fedmerge.domain.importers.bad_rows import BadRows
from fedmerge.domain.importers.reading.table import NUMBER, Table
from fedmerge.domain.importers.source_files import Progress, SourceFile, read_blocks
from fedmerge.errors import DomainError

SAMPLE_LINES = 1000  # whose fields are the columns


def json_lines_table(source: SourceFile, max_bad_share: float = 0.0, progress: Progress | None = None) -> Table:
    """Open a file of one JSON object a line, plain or gzip, in UTF-8 or, with a byte order mark, UTF-16.

    Numbers keep their digits. The texts of a list are joined with spaces; an object inside an object is no value.

    Raises:
        DomainError: a JSON array, or no objects at all; while rows are read, an error of read_blocks.
    """
    bad = BadRows(str(source), "line", max_bad_share)
    blocks = read_blocks(source, progress=progress)
    start = next(blocks)
    if start.lstrip().startswith(b"["):
        raise DomainError(
            f"{source}: found a JSON array, expected one object a line. Write JSON lines "
            "(pandas: to_json(orient='records', lines=True))."
        )
    columns: dict[str, None] = {}
    for line in itertools.islice(start.split(b"\n"), SAMPLE_LINES):
        record = _parse(line)
        if isinstance(record, dict):
            columns.update(dict.fromkeys(record))

    def batches(names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        schema = pa.schema([*((name, pa.string()) for name in names), (NUMBER, pa.int64())])
        number = 0
        for block in itertools.chain([start], blocks):
            rows: list[tuple[Any, ...]] = []
            for line in block.removesuffix(b"\n").split(b"\n"):
                number += 1
                if not line or line.isspace():
                    continue
                record = _parse(line)
                if isinstance(record, dict):
                    rows.append((*(_text(record.get(name)) for name in names), number))
                else:
                    bad.add(number, str(record))
            arrays = zip(*rows, strict=True) if rows else ([] for _ in schema)
            yield pa.record_batch([pa.array(a, f.type) for a, f in zip(arrays, schema, strict=True)], schema=schema)

    return Table(str(source), "JSON lines", tuple(columns), batches, bad)


def _parse(line: bytes) -> dict[str, Any] | str:
    """Return the object on a line, or why there is none."""
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError:
        return "not UTF-8 text"
    except (ValueError, RecursionError):
        return "not JSON"
    return record if isinstance(record, dict) else "not an object"


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, dict):
        return None
    if isinstance(value, list):
        return " ".join(text for part in value if (text := _text(part)))
    if isinstance(value, float):
        return None if math.isnan(value) else repr(value)
    text = value if isinstance(value, str) else str(value)
    return text if text.isascii() else text.encode("utf-8", "replace").decode()  # half of a surrogate pair
