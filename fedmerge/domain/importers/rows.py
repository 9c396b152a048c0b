"""Read CSV and Parquet tables row by row, and log rows of user, item, time and rating."""

import csv
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from operator import itemgetter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from fedmerge.domain.importers.bad_rows import BadRows
from fedmerge.domain.importers.events import EventLog
from fedmerge.domain.importers.source_files import Progress, SourceFile, read_lines
from fedmerge.domain.parquet import file_limits, open_parquet, read_batches
from fedmerge.errors import DomainError

SAMPLE_ROWS = 1000
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

Row = tuple[int, Sequence[Any]]  # number of the line or row, values of the selected columns


@dataclass(frozen=True, slots=True)
class Table:
    """A table that can be read once.

    Attributes:
        source: the file.
        columns: column names in the order of the file.
        rows: function that yields each row's values of the given columns, and records malformed lines in bad.
        bad: the table's bad rows.
    """

    source: str
    columns: tuple[str, ...]
    rows: Callable[[Sequence[str]], Iterator[Row]]
    bad: BadRows


def csv_table(
    source: SourceFile, delimiter: str, encoding: str, max_bad_share: float, progress: Progress | None
) -> Table:
    """Open a CSV file with a header; every value is text.

    Args:
        source: plain or gzip file.
        delimiter: one character.
        encoding: utf-8 (a byte order mark is skipped), or an encoding with one byte per character.
        max_bad_share: see BadRows.
        progress: see read_lines.

    Raises:
        DomainError: a delimiter of more than one character, or a header that is unreadable or names a column twice;
            while rows are read, text in another encoding or an error of read_lines.
    """
    if len(delimiter) != 1 or delimiter in '"\r\n':
        raise DomainError(f"{source}: the delimiter is {delimiter!r}, expected one character, such as ',' or a tab.")
    bad = BadRows(str(source), "line", max_bad_share)
    reader = csv.reader(_decode_lines(source, encoding, progress), delimiter=delimiter, strict=True)
    try:
        columns = tuple(name.strip() for name in next(reader))
    except (csv.Error, StopIteration) as error:
        raise DomainError(f"{source}: line 1 is not a header of column names ({error}). Add a header.") from error
    repeated = [name for name in columns if columns.count(name) > 1]
    if repeated:
        raise DomainError(f"{source}: the header names {repeated[0]!r} more than once. Give each column its own name.")

    def rows(names: Sequence[str]) -> Iterator[Row]:
        pick = _picker([columns.index(name) for name in names])
        while True:
            before = reader.line_num
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:  # an unclosed quote swallows many lines, each of which counts
                bad.add(before + 1, f"not CSV: {error}", reader.line_num - before)
                continue
            if len(row) == len(columns):
                yield before + 1, pick(row)
            elif row:
                bad.add(before + 1, "the number of columns differs from the header")

    return Table(str(source), columns, rows, bad)


def parquet_table(path: Path, max_bad_share: float, progress: Progress | None) -> Table:
    """Open a Parquet file; numbers and text are returned unchanged, points in time as whole numbers.

    Raises:
        DomainError: the file is missing, damaged, not Parquet, or above :func:`~fedmerge.domain.parquet.file_limits`;
            while rows are read, a damaged part, or a column of another type than text, numbers or points in time.
    """
    try:
        file = open_parquet(str(path), path, file_limits(path))
    except FileNotFoundError:
        raise DomainError(f"{path}: no such file. Check the path.") from None
    except (pa.ArrowException, OSError, UnicodeError) as error:
        raise _not_parquet(path, error) from error
    bad = BadRows(str(path), "row", max_bad_share)

    def rows(names: Sequence[str]) -> Iterator[Row]:
        for name in names:
            _check_type(path, name, file.schema.field(name).type)
        number = 0
        try:
            for batch in read_batches(file, names):
                values = [_plain(batch.column(name)) for name in names]
                yield from enumerate(zip(*values, strict=True), number)
                number += len(batch)
                if progress:
                    progress(str(path), number, number / file.metadata.num_rows)
        except (pa.ArrowException, OSError, UnicodeError) as error:
            raise _not_parquet(path, error) from error

    return Table(str(path), tuple(file.schema.names), rows, bad)


def check_columns(table: Table, names: Sequence[str]) -> None:
    """Raise DomainError if the table lacks one of the columns; the message lists the existing ones."""
    missing = [name for name in names if name not in table.columns]
    if missing:
        hint = " The delimiter may be wrong." if len(table.columns) == 1 else ""
        raise DomainError(
            f"{table.source}: found the columns {', '.join(map(repr, table.columns))}, expected also "
            f"{', '.join(map(repr, missing))}. Name the columns to use.{hint}"
        )


def log_rows(rows: Iterator[Row], log: EventLog, bad: BadRows, min_rating: float | None) -> None:
    """Add rows of user, item, time and, with a minimum, rating; rows with items unknown to the log are bad.

    Times are whole numbers, decimals (to a millionth) or ISO 8601 (without a zone: UTC), whichever fits most of the
    first 1,000 rows. They only determine the order, so any unit will do.

    Raises:
        DomainError: none of the first 1,000 rows has a readable time.
    """
    sample = list(itertools.islice(rows, SAMPLE_ROWS))
    kind, parse_time = _kind_of_time(bad, sample)
    for number, (user, item, time, *rating) in itertools.chain(sample, rows):
        if not user:
            bad.add(number, "no user")
            continue
        if item not in log.items:
            bad.add(number, "the item is not in the catalog" if item else "no item")
            continue
        try:
            if min_rating is not None and not parse_rating(rating[0]) >= min_rating:
                log.drop_low_rating()
                continue
        except (ValueError, TypeError):
            bad.add(number, "the rating is not a number")
            continue
        try:
            log.add(user, item, parse_time(time))
        except (ValueError, TypeError):
            bad.add(number, f"the time is not {kind}")
        except OverflowError:
            bad.add(number, "the time is out of range")


def parse_rating(value: Any) -> float:
    """Convert a value to a finite number; raise ValueError or TypeError otherwise."""
    rating = float(value)
    if not math.isfinite(rating):
        raise ValueError(f"rating {rating}")
    return rating


def _decode_lines(source: SourceFile, encoding: str, progress: Progress | None) -> Iterator[str]:
    for number, line in enumerate(read_lines(source, progress), 1):
        try:
            text = line.decode(encoding)
        except UnicodeDecodeError as error:
            raise DomainError(
                f"{source}: line {number} is not {encoding} text ({error.reason} at byte {error.start}). "
                "Name the file's encoding, or convert the file to utf-8."
            ) from error
        yield text.removeprefix("\ufeff") if number == 1 else text


def _picker(positions: Sequence[int]) -> Callable[[Sequence[str]], Sequence[str]]:
    if len(positions) == 1:
        return lambda row: (row[positions[0]],)
    return itemgetter(*positions)


def _check_type(path: Path, name: str, kind: pa.DataType) -> None:
    """Raise DomainError for a column that :func:`_plain` cannot convert, before any of it is decoded."""
    value = kind.value_type if pt.is_dictionary(kind) else kind
    kinds = (pt.is_string, pt.is_large_string, pt.is_integer, pt.is_floating, pt.is_date, pt.is_timestamp)
    if not any(fits(value) for fits in kinds):
        raise DomainError(
            f"{path}: column {name!r} is of type {value}, expected text, numbers or points in time. Convert the column."
        )


def _plain(column: pa.Array) -> list[Any]:
    """Convert a column to text, numbers, or whole numbers of a time unit; nulls become None."""
    if pt.is_dictionary(column.type):  # repeated texts share one object
        texts = _plain(column.dictionary)
        return [None if index is None else texts[index] for index in column.indices.to_pylist()]
    kind = column.type
    if pt.is_date(kind) or pt.is_timestamp(kind):
        column = pc.cast(column, pa.timestamp("s" if pt.is_date(kind) else kind.unit)).cast(pa.int64())
    values: list[Any] = column.to_pylist()
    return values


def _not_parquet(path: Path, error: Exception) -> DomainError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return DomainError(
        f"{path}: cannot be read as Parquet ({reason}): truncated, damaged, or another format. Replace it."
    )


# Time


def _whole(value: Any) -> int:
    if isinstance(value, float):
        raise ValueError("a decimal")
    return int(value)


def _decimal(value: Any) -> int:
    return round(parse_rating(value) * 1e6)


def _iso(value: Any) -> int:
    if not isinstance(value, str):
        raise ValueError("no text")
    time = datetime.fromisoformat(value.strip())
    return ((time if time.tzinfo else time.replace(tzinfo=UTC)) - EPOCH) // timedelta(microseconds=1)


TIMES: dict[str, Callable[[Any], int]] = {"a whole number": _whole, "a number": _decimal, "an ISO 8601 time": _iso}


def _kind_of_time(bad: BadRows, sample: Sequence[Row]) -> tuple[str, Callable[[Any], int]]:
    """Return the first of TIMES that fits the most rows, with its name."""

    def fits(kind: str, value: object) -> bool:
        try:
            TIMES[kind](value)
        except (ValueError, TypeError):
            return False
        return True

    numbers = {kind: sum(fits(kind, values[2]) for _, values in sample) for kind in TIMES}
    kind = max(numbers, key=numbers.__getitem__)
    if sample and not numbers[kind]:
        raise DomainError(
            f"{bad.source}: none of the first {len(sample)} rows has a readable time, beginning with {bad.unit} "
            f"{sample[0][0]}; expected {', '.join(TIMES)}. Convert the column, or name another."
        )
    return kind, TIMES[kind]
