"""Columns of times as whole numbers whose order is that of the times.

A column has one format, recognised in its first rows or named. A row of another format or unit is a bad row that says
so, because seconds sorted among milliseconds would be wrong without a sign of it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from fedmerge.domain.importers.bad_rows import BadRows
from fedmerge.domain.importers.reading.values import (
    DECIMAL_DIGITS,
    INT64_DIGITS,
    WHOLE_WITH_POINT,
    is_text,
    is_time,
    map_distinct,
    matching,
)
from fedmerge.errors import ConfigError, DomainError

SAMPLE_ROWS = 1000
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
NUMBER, ISO = "number", "iso"


@dataclass(frozen=True, slots=True)
class Unit:
    """Numbers of one unit.

    Attributes:
        words: the unit in words.
        lowest, highest: the numbers of 1980 to 2100, by which the unit is recognised.
        microseconds: microseconds of one unit.
        zero: the number of 1970-01-01.
    """

    words: str
    lowest: float
    highest: float
    microseconds: float
    zero: float = 0.0


UNITS: Mapping[str, Unit] = MappingProxyType(
    {
        "s": Unit("seconds", 315_532_800, 4_102_444_800, 1e6),
        "ms": Unit("milliseconds", 315_532_800e3, 4_102_444_800e3, 1e3),
        "us": Unit("microseconds", 315_532_800e6, 4_102_444_800e6, 1.0),
        "ns": Unit("nanoseconds", 315_532_800e9, 4_102_444_800e9, 1e-3),
        "excel": Unit("days as Excel counts them", 29_221, 73_051, 86_400e6, 25_569.0),
    }
)
CALENDAR: Mapping[str, tuple[float, float]] = MappingProxyType(
    {"%Y%m%d": (19_800_101, 21_000_101), "%Y%m%d%H%M%S": (19_800_101_000_000, 21_000_101_000_000)}
)

# Formats that are recognised by themselves. Where day and month could be swapped in every row, a person must say.
_DATES = ("%Y/%m/%d", "%d.%m.%Y", "%d/%m/%Y", "%m/%d/%Y", "%d-%m-%Y", "%m-%d-%Y")
COMMON = (
    *(f"{date}{time}" for date in _DATES for time in ("", " %H:%M", " %H:%M:%S", " %H:%M:%S.%f", " %I:%M:%S %p")),
    "%d %b %Y",
    "%d %B %Y",
    "%b %d, %Y",
    "%B %d, %Y",
    "%m %d, %Y",
    "%d-%b-%Y",
    "%d-%b-%Y %H:%M:%S",
    "%a, %d %b %Y %H:%M:%S %z",
    "%a, %d %b %Y %H:%M:%S GMT",
    "%a %b %d %H:%M:%S %z %Y",
    "%a %b %d %H:%M:%S %Y",
    "%d/%b/%Y:%H:%M:%S %z",
)
_DATE_PARTS = re.compile(r"%(.)")
_NAIVE = r"^\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d(\.\d{1,6})?)?)?$"
_ZONED = r"^\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d(\.\d{1,6})?)?(Z|[+-]\d\d(:?\d\d)?)$"
_MIXED = "name each format with --time-format to read both"


class Times:
    """The times of one column, read batch by batch.

    Args:
        bad: bad rows of the file.
        formats: names of UNITS, "iso", "number" (any unit; only the order counts), or patterns of strptime; the first
            that fits a value is taken, and of several units the one whose range holds the value. Without any, the
            format of most of the first 1,000 rows.

    Raises:
        ConfigError: a format is none of these.
    """

    def __init__(self, bad: BadRows, formats: Sequence[str] = ()) -> None:
        for name in formats:
            if name not in {*UNITS, NUMBER, ISO} and "%" not in name:
                raise ConfigError(
                    f"The time format is {name!r}, expected {', '.join([*UNITS, ISO, NUMBER])}, or a pattern such as "
                    "'%d/%m/%Y %H:%M'."
                )
        self.bad = bad
        self.formats = tuple(formats)
        self._expected = ""  # set by the first batch, as are the next ones
        self._found = ""
        self._unit: str | None = None
        self._scale = 1.0
        self._point_unit = "us"

    def read(self, column: pa.Array, numbers: pa.Array, wanted: pa.Array) -> pa.Array:
        """Return the times as int64; null where there is none, which is recorded as bad.

        Args:
            column: text, numbers or points in time.
            numbers: number of each row.
            wanted: where a time is wanted; others are not recorded.

        Raises:
            DomainError: none of the first rows has a readable time, or day and month may be swapped.
        """
        if pt.is_dictionary(column.type):
            column = column.dictionary_decode()
        if is_time(column.type):
            found = self._points(column)
            reasons: dict[str, pa.Array] = {}
            self._expected = self._expected or "a point in time"
        else:
            text = _as_text(column)
            if not self._expected:
                self._choose(text, numbers)
            found, reasons = self._texts(text)
        left = pc.and_(pc.is_null(found), wanted)
        for reason, mask in reasons.items():
            self.bad.add_many(numbers.filter(pc.and_(mask, left)), reason)
            left = pc.and_not(left, mask)
        self.bad.add_many(numbers.filter(left), f"the time is not {self._expected}")
        return found

    def _points(self, column: pa.Array) -> pa.Array:
        """Convert points in time to microseconds, or to nanoseconds if the column begins with these."""
        if pt.is_date(column.type):
            column = column.cast(pa.timestamp("s"))
        if not self._expected:
            self._point_unit = "ns" if column.type.unit == "ns" else "us"
        return column.cast(pa.timestamp(self._point_unit, column.type.tz), safe=False).cast(pa.int64())

    def _choose(self, text: pa.Array, numbers: pa.Array) -> None:
        """Recognise the format in the first rows, unless formats are named."""
        sample = text.drop_null()[:SAMPLE_ROWS]
        amounts = _numbers(sample)[1]
        if self.formats:
            units = [name for name in self.formats if name in UNITS]
            self._unit = units[0] if len(units) == 1 else None
            self._expected = "of the format " + " or ".join(map(repr, self.formats))
            if self.formats == ("ns",):
                self._scale = 1.0
            elif NUMBER in self.formats:
                self._scale = _scale(amounts)
            return
        if len(amounts) - np.isnan(amounts).sum() >= max(1, len(sample) / 2):
            self._expected = "a number"
            inside = {name: int(inside.sum()) for name, inside in _by_unit(amounts).items()}
            unit = max(inside, key=lambda name: inside[name])
            self._unit = unit if inside[unit] >= len(sample) / 2 else None
            known = UNITS.get(self._unit or "")
            self._scale = known.microseconds if known and self._unit in ("s", "ms", "us") else _scale(amounts)
            if self._unit == "ns":
                self._scale = 1.0
            return
        fits = {pattern: _count(_strptime(sample, pattern)) for pattern in COMMON} if len(sample) else {}
        fits[ISO] = _count(_iso(sample))
        best = max(fits.values())
        if not best:
            raise DomainError(
                f"{self.bad.source}: none of the first {len(text)} rows has a readable time, beginning with "
                f"{self.bad.unit} {numbers[0]}; expected a whole number, a number, an ISO 8601 time or a common format "
                "of dates. Name the format with --time-format, such as '%d %b %y', or name another column."
            )
        found = [name for name, count in fits.items() if count == best]
        if ISO in found:
            found = [ISO]
        orders = {re.sub("%[^dm]", "", name): name for name in found}
        if len(orders) > 1:
            raise DomainError(
                f"{self.bad.source}: the times fit {' and '.join(map(repr, orders.values()))} alike, so day and month "
                "may be swapped. Name the format with --time-format."
            )
        self._found = found[0]
        self._expected = "an ISO 8601 time" if found[0] == ISO else f"of the format {found[0]!r}"

    def _texts(self, text: pa.Array) -> tuple[pa.Array, dict[str, pa.Array]]:
        """Return the times, null where there is none, and reasons with their rows."""
        whole, amounts = _numbers(text)
        is_numeric = pa.array(~np.isnan(amounts))
        if not self.formats and self._expected == "a number":
            found = _scaled(whole, amounts, self._scale)
            found, reasons = self._refuse_other_units(found, amounts)
            others = pc.if_else(is_numeric, pa.scalar(None, pa.string()), text)
            if others.null_count < len(others):
                reasons[f"the time is an ISO 8601 time, while most are numbers: {_MIXED}"] = pc.is_valid(_iso(others))
            return found, reasons
        if not self.formats:
            found = _iso(text) if self._found == ISO else _strptime(text, self._found)
            reason = (
                f"the time is a number, while most are {'ISO 8601 times' if self._found == ISO else 'dates'}: {_MIXED}"
            )
            return found, {reason: is_numeric}
        return self._named(text, whole, amounts)

    def _named(
        self, text: pa.Array, whole: pa.Array, amounts: npt.NDArray[np.float64]
    ) -> tuple[pa.Array, dict[str, pa.Array]]:
        """Read each value with the first named format that fits."""
        found = pa.nulls(len(text), pa.int64())
        reasons: dict[str, pa.Array] = {}
        units = [name for name in self.formats if name in UNITS]
        inside = _by_unit(amounts)
        for name in self.formats:
            if name == NUMBER:
                more = _scaled(whole, amounts, self._scale)
            elif name == ISO:
                more = _iso(text)
            elif name not in UNITS:
                more = _strptime(text, name)
            else:
                unit = UNITS[name]
                if self.formats == ("ns",):
                    more = _scaled(whole, amounts, 1.0)
                else:
                    more = _scaled(whole, amounts, unit.microseconds, unit.zero)
                if len(units) > 1:
                    more = pc.if_else(pa.array(inside[name]), more, pa.scalar(None, pa.int64()))
                elif self._unit:
                    more, reasons = self._refuse_other_units(more, amounts)
            found = pc.coalesce(found, more)
        return found, reasons

    def _refuse_other_units(
        self, found: pa.Array, amounts: npt.NDArray[np.float64]
    ) -> tuple[pa.Array, dict[str, pa.Array]]:
        """Refuse the numbers that lie in the range of another unit than the column's."""
        reasons: dict[str, pa.Array] = {}
        if self._unit is not None:
            for name, inside in _by_unit(amounts).items():
                if name != self._unit and inside.any():
                    reasons[f"the time is in {_words(name)}, while most are in {_words(self._unit)}: {_MIXED}"] = (
                        mask
                    ) = pa.array(inside)
                    found = pc.if_else(mask, pa.scalar(None, pa.int64()), found)
        out_of_range = pc.and_(pc.is_null(found), pa.array(~np.isnan(amounts)))
        return found, {**reasons, "the time is out of range": out_of_range}


def _words(unit: str) -> str:
    return UNITS[unit].words if unit in UNITS else f"the form {unit}"


def _scale(amounts: npt.NDArray[np.float64]) -> float:
    """Keep a millionth of numbers of an unknown unit, unless they are too large for that."""
    known = np.abs(amounts[~np.isnan(amounts)])
    return 1e6 if not len(known) or known.max() < 1e12 else 1.0


def _count(found: pa.Array) -> int:
    return len(found) - int(found.null_count)


def _as_text(column: pa.Array) -> pa.Array:
    """Return text without white space around it; null where it is empty, or where a number is NaN."""
    if pt.is_floating(column.type):
        finite = pc.if_else(pc.is_finite(column), column, pa.scalar(None, column.type)).cast(pa.float64())
        return pa.array([None if value is None else repr(value) for value in finite.to_pylist()], pa.string())
    text = column.cast(pa.string())
    if not is_text(column.type):
        return text
    text = pc.utf8_trim_whitespace(text)
    return pc.if_else(pc.not_equal(text, ""), text, pa.scalar(None, pa.string()))


def _numbers(text: pa.Array) -> tuple[pa.Array, npt.NDArray[np.float64]]:
    """Return whole numbers (int64, null elsewhere), and all numbers (float64, NaN elsewhere)."""
    if pc.any(pc.match_substring(text, ".")).as_py():
        text = pc.replace_substring_regex(text, pattern=WHOLE_WITH_POINT, replacement=r"\1")
    whole = matching(text, INT64_DIGITS).cast(pa.int64())
    decimal = matching(text, DECIMAL_DIGITS).cast(pa.float64())
    amounts = decimal.to_numpy(zero_copy_only=False).astype(np.float64)
    return whole, np.where(np.isfinite(amounts), amounts, np.nan)


def _by_unit(amounts: npt.NDArray[np.float64]) -> dict[str, npt.NDArray[np.bool_]]:
    """Return where numbers lie in the range of each unit."""
    ranges = {name: (unit.lowest, unit.highest) for name, unit in UNITS.items()} | dict(CALENDAR)
    return {name: (amounts >= lowest) & (amounts < highest) for name, (lowest, highest) in ranges.items()}


def _scaled(whole: pa.Array, amounts: npt.NDArray[np.float64], scale: float, zero: float = 0.0) -> pa.Array:
    """Return (number - zero) * scale, rounded; exact for whole numbers; null beyond 64 bits."""
    values = np.nan_to_num(amounts - zero) * scale
    fits = ~np.isnan(amounts) & (np.abs(values) < 2.0**63)
    rounded = np.rint(np.where(fits, values, 0)).astype(np.int64)
    if zero == 0 and scale >= 1:
        integers = pc.fill_null(whole, 0).to_numpy(zero_copy_only=False)
        exact = pc.is_valid(whole).to_numpy(zero_copy_only=False) & fits
        rounded = np.where(exact, np.where(exact, integers, 0) * int(scale), rounded)
    return pa.array(rounded, mask=~fits)


def _iso(text: pa.Array) -> pa.Array:
    """Return ISO 8601 times as microseconds since 1970 (without a zone: UTC); null elsewhere."""
    naive, zoned = matching(text, _NAIVE), matching(text, _ZONED)
    try:
        fast = pc.coalesce(
            naive.cast(pa.timestamp("us")).cast(pa.int64()), zoned.cast(pa.timestamp("us", "UTC")).cast(pa.int64())
        )
    except pa.ArrowInvalid:  # one impossible date, such as February 30th, refuses a whole column
        return map_distinct(text, _iso_of_one)
    rest = pc.if_else(pc.is_null(fast), text, pa.scalar(None, pa.string()))
    return pc.coalesce(fast, map_distinct(rest, _iso_of_one)) if rest.null_count < len(rest) else fast


def _iso_of_one(text: str) -> int:
    if text.isdigit():
        raise ValueError("a number")
    return _microseconds(datetime.fromisoformat(text))


def _strptime(text: pa.Array, pattern: str) -> pa.Array:
    """Return times of a pattern of strptime as microseconds since 1970 (without a zone: UTC); null elsewhere."""

    def of_one(value: str) -> int:
        return _microseconds(datetime.strptime(value, pattern))  # the zone is added

    if not set(_DATE_PARTS.findall(pattern)) <= set("YmdHMS"):
        return map_distinct(text, of_one)
    times = pc.strptime(text, format=pattern, unit="us", error_is_null=True)
    # Arrow reads February 30th as March 1st or 2nd: what falls on the first days of a month is read again
    # and the year 24 where Python expects four digits
    early = pc.fill_null(pc.or_(pc.less_equal(pc.day(times), 3), pc.less(pc.year(times), 1000)), False)
    again = map_distinct(pc.if_else(early, text, pa.scalar(None, pa.string())), of_one)
    return pc.if_else(early, again, times.cast(pa.int64()))


def _microseconds(time: datetime) -> int:
    return ((time if time.tzinfo else time.replace(tzinfo=UTC)) - EPOCH) // timedelta(microseconds=1)
