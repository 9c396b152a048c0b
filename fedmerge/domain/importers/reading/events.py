"""Rows of interactions: user, item and time of a table, with what is bad recorded by reason and number."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from fedmerge.domain.importers.bad_rows import BadRows
from fedmerge.domain.importers.reading.table import NUMBER, Table
from fedmerge.domain.importers.reading.times import Times
from fedmerge.domain.importers.reading.values import has_lost_digits, is_too_long, to_ids, to_numbers
from fedmerge.domain.importers.store import ROWS
from fedmerge.domain.parquet import LONGEST_TEXT

LOST_DIGITS = "the {} is in scientific notation, so its last digits are lost"
TOO_LONG = f"the {{}} has more than {LONGEST_TEXT:,} characters"


@dataclass(frozen=True, slots=True)
class EventColumns:
    """Names of the columns of interactions; the rating is None if ratings do not matter."""

    user: str
    item: str
    time: str
    rating: str | None = None

    def names(self, others: Sequence[str] = ()) -> list[str]:
        """Return the names of all columns to read, each once."""
        rating = [] if self.rating is None else [self.rating]
        return list(dict.fromkeys([self.user, self.item, self.time, *rating, *others]))


@dataclass(frozen=True, slots=True)
class EventBatch:
    """Good rows of one batch.

    Attributes:
        rows: rows of the schema ROWS.
        others: the other columns that were asked for, row for row.
        num_low: number of rows that are left out for their rating.
    """

    rows: pa.RecordBatch
    others: pa.RecordBatch
    num_low: int


def read_events(
    table: Table,
    columns: EventColumns,
    time_formats: Sequence[str],
    min_rating: float | None,
    others: Sequence[str] = (),
) -> Iterator[EventBatch]:
    """Yield the good rows of interactions; others are recorded in ``table.bad``, each under its first reason.

    Args:
        table: the interactions, whose columns are checked.
        columns: names of its columns.
        time_formats: see Times.
        min_rating: leave out rows with a lower rating; None keeps all.
        others: names of other columns to return.

    Raises:
        DomainError: as for to_ids and Times, or too many bad rows at the start.
        ConfigError: as for Times.
    """
    times = Times(table.bad, time_formats)
    for batch in table.batches(columns.names(others)):
        if not len(batch):
            continue
        numbers = batch.column(NUMBER)
        good = pa.repeat(pa.scalar(True), len(batch))

        ids = {}
        for kind, name in (("user", columns.user), ("item", columns.item)):
            ids[kind] = to_ids(table.source, name, batch.column(name))
            good = refuse(table.bad, numbers, good, pc.is_null(ids[kind]), f"no {kind}")
            good = refuse(table.bad, numbers, good, has_lost_digits(ids[kind]), LOST_DIGITS.format(kind))
            good = refuse(table.bad, numbers, good, is_too_long(ids[kind]), TOO_LONG.format(kind))
        num_low = 0
        if min_rating is not None and columns.rating is not None:
            ratings = to_numbers(batch.column(columns.rating))
            good = refuse(table.bad, numbers, good, pc.is_null(ratings), "the rating is not a number")
            low = pc.and_(good, pc.fill_null(pc.less(ratings, min_rating), False))
            num_low = pc.sum(low).as_py() or 0
            good = pc.and_not(good, low)
        found = times.read(batch.column(columns.time), numbers, good)
        good = pc.and_(good, pc.is_valid(found))
        rows = pa.record_batch([numbers, ids["user"], ids["item"], found], ROWS.names)
        kept = batch.select(list(others))
        if not pc.all(good).as_py():
            rows, kept = rows.filter(good), kept.filter(good)
        yield EventBatch(rows, kept, num_low)


def refuse(bad: BadRows, numbers: pa.Array, good: pa.Array, mask: pa.Array, reason: str) -> pa.Array:
    """Record the rows of a mask that were good so far; return which rows are still good."""
    bad.add_many(numbers.filter(pc.and_(good, mask)), reason)
    return pc.and_not(good, mask)
