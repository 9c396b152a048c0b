"""Data frames of pandas, polars, DuckDB or pyarrow as tables, through Arrow's interface for streams."""

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from fedmerge.domain.importers.bad_rows import BadRows
from fedmerge.domain.importers.reading.table import Table, with_numbers
from fedmerge.domain.importers.reading.values import check_type
from fedmerge.errors import DomainError


def is_frame(value: object) -> bool:
    """True for an object that gives its rows as an Arrow stream."""
    return hasattr(value, "__arrow_c_stream__")


def frame_table(frame: Any, name: str, max_bad_share: float = 0.0) -> Table:
    """Open a data frame; rows are numbered from 0.

    Args:
        frame: an object with ``__arrow_c_stream__``.
        name: its name in messages.
        max_bad_share: see BadRows.

    Raises:
        DomainError: a column that Arrow cannot hold, such as one of numbers and texts.
    """
    try:
        reader = pa.RecordBatchReader.from_stream(frame)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise DomainError(
            f"{name}: cannot be read as an Arrow table ({error}). Give each column one type (pandas: astype(str))."
        ) from error
    bad = BadRows(name, "row", max_bad_share)

    def batches(names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        for column in names:
            check_type(name, column, reader.schema.field(column).type)
        number = 0
        for batch in reader:
            yield with_numbers(batch.select(list(names)), number)
            number += len(batch)

    return Table(name, "frame", tuple(reader.schema.names), batches, bad)
