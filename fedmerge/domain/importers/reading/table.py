"""Tables that are read once, in Arrow record batches, and what a person may say about a file."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from fedmerge.domain.importers.bad_rows import BadRows
from fedmerge.errors import DomainError

NUMBER = "\0number"  # the column of line or row numbers; no file has a column of this name


@dataclass(frozen=True, slots=True)
class FileOptions:
    """What is said about a file instead of recognised.

    Attributes:
        delimiter: one character; None takes the one that splits the first line into the columns looked for.
        encoding: a text encoding known to Python; None recognises UTF-8, UTF-16, UTF-32 and Western European text.
        column_names: names of the columns of a file without a header; None reads them from the header.
    """

    delimiter: str | None = None
    encoding: str | None = None
    column_names: tuple[str, ...] | None = None


RECOGNISED = FileOptions()


@dataclass(frozen=True, slots=True)
class Table:
    """A table that can be read once.

    Attributes:
        source: the file.
        form: the format in words, such as "CSV".
        columns: column names in the order of the file.
        batches: function that yields record batches of the given columns (text, numbers or points in time) and NUMBER
            (int64), and records malformed lines in bad.
        bad: the table's bad rows.
    """

    source: str
    form: str
    columns: tuple[str, ...]
    batches: Callable[[Sequence[str]], Iterator[pa.RecordBatch]]
    bad: BadRows


def check_columns(table: Table, names: Sequence[str]) -> None:
    """Raise DomainError if the table lacks one of the columns, or has it twice; the message lists the existing ones."""
    missing = [name for name in dict.fromkeys(names) if name not in table.columns]
    if missing:
        hint = " The delimiter may be wrong." if len(table.columns) == 1 else ""
        if table.form == "CSV":
            hint += " If the file has no header, name all its columns with --column-names."
        raise DomainError(
            f"{table.source}: found the columns {', '.join(map(repr, table.columns))}, expected also "
            f"{', '.join(map(repr, missing))}. Name the columns to use.{hint}"
        )
    repeated = [name for name in names if table.columns.count(name) > 1]
    if repeated:
        raise DomainError(
            f"{table.source}: the header names {repeated[0]!r} more than once. Give each column its own name."
        )


def with_numbers(batch: pa.RecordBatch, first: int) -> pa.RecordBatch:
    """Return the batch with a column NUMBER that counts from first."""
    return batch.append_column(NUMBER, pa.array(np.arange(first, first + len(batch))))
