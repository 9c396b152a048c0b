"""JSON lines as a table: one object a line; every value is text, as in a CSV file."""

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from fedmerge.domain.importers.bad_rows import BadRows
from fedmerge.domain.importers.reading.json_fields import BadLine, parse_object, read_fields, strings
from fedmerge.domain.importers.reading.table import NUMBER, Table
from fedmerge.domain.importers.reading.values import map_distinct, matching
from fedmerge.domain.importers.source_files import Progress, SourceFile, read_blocks
from fedmerge.errors import DomainError

SAMPLE_LINES = 1000  # whose fields are the columns
WHOLE = r"^-?\d+$"


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
        with suppress(BadLine):
            columns.update(dict.fromkeys(parse_object(line)))

    def batches(names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        for batch in read_fields(itertools.chain([start], blocks), names, bad):
            yield pa.record_batch(
                [*(_texts(batch.column(name)) for name in names), batch.column(NUMBER)], [*names, NUMBER]
            )

    return Table(str(source), "JSON lines", tuple(columns), batches, bad)


def _texts(column: pa.Array) -> pa.Array:
    """Return a column of JSON as text."""
    found = pc.coalesce(strings(column), matching(column, WHOLE))
    others = pc.if_else(pc.is_null(found), column, pa.scalar(None, pa.string()))
    return pc.coalesce(found, map_distinct(others, _text_of_json, pa.string()))


def _text_of_json(value: str) -> str | None:
    try:
        return _text(json.loads(value))
    except RecursionError:
        return None


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, dict):
        return None
    if isinstance(value, list):
        return " ".join(text for part in value if (text := _text(part)))
    if isinstance(value, float):
        return None if math.isnan(value) else repr(value)
    return str(value).encode("utf-8", "replace").decode()  # half of a surrogate pair
