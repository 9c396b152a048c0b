"""Read and write Parquet tables of an exact schema; errors name every defect."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from fedmerge.domain.parquet import Limits, open_parquet, plain_column, read_batches
from fedmerge.errors import DomainError

RESTORE = "Restore the file from a copy or import the domain again."


def read_file(path: Path) -> bytes:
    """Read one file of a domain folder; raise DomainError if it is missing or unreadable."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise DomainError(f"{path}: the file is missing. {RESTORE}") from None
    except OSError as error:
        raise DomainError(
            f"{path}: the file cannot be read ({error.strerror}). Check that it is a file and that you may read it."
        ) from error


def encode_table(table: pa.Table) -> bytes:
    """Encode a table as Parquet bytes (zstd)."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return bytes(sink.getvalue())


def decode_table(data: bytes, where: str, schema: pa.Schema, limits: Limits) -> pa.Table:
    """Decode Parquet bytes to a table of exactly this schema, each column in one chunk, without nulls.

    Args:
        data: Parquet bytes.
        where: name of the data for messages, for example a path.
        schema: the expected columns, in order.
        limits: limits of the table; nothing above them is decoded.

    Raises:
        DomainError: data that is not Parquet, truncated, damaged or above the limits, other columns or types, or a null
            cell.
    """
    try:
        opened = open_parquet(where, data, limits)
        _check_schema(opened.schema, schema, where)
        decoded = [
            pa.record_batch([plain_column(batch.column(name)) for name in schema.names], schema=schema)
            for batch in read_batches(opened, schema.names)
        ]
        table = pa.Table.from_batches(decoded, schema)
        del decoded
        table.validate(full=True)
    except (pa.ArrowException, OSError, UnicodeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DomainError(
            f"{where}: {len(data)} bytes cannot be read as Parquet ({reason}): truncated or damaged. {RESTORE}"
        ) from error
    for field in schema:
        column = table.column(field.name)
        if column.null_count:
            row = column.is_null().index(True).as_py()
            raise DomainError(
                f"{where}: column {field.name!r} has {column.null_count} null cells, the first in row {row}; expected "
                'none (an absent text is ""). Fill the cells, or import the domain again.'
            )
    return table.combine_chunks()


def _check_schema(found: pa.Schema, expected: pa.Schema, where: str) -> None:
    if found.names != expected.names:
        raise DomainError(f"{where}: found columns {found.names}, expected exactly {expected.names}. {RESTORE}")
    for field in expected:
        kind = found.field(field.name).type
        if kind != field.type:
            raise DomainError(
                f"{where}: column {field.name!r} is of type {kind}, expected {field.type}. "
                "Convert the column, or import the domain again."
            )
