"""Unusable rows: their count, reasons and first lines. An import fails if their share is too large.

Reasons are fixed texts without values, because a value could be a user's id; the owner can look up the line.
"""

from dataclasses import dataclass

import pyarrow as pa

from fedmerge.domain.parquet import LONGEST_TEXT
from fedmerge.errors import DomainError

NUM_SHOWN = 5
ALL_BAD = 1000


@dataclass(frozen=True, slots=True)
class Reason:
    """One reason why rows of a file were left out.

    Attributes:
        text: the reason.
        count: number of these rows.
        first: numbers of the first such rows, at most 5.
    """

    text: str
    count: int
    first: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FileReport:
    """The result of reading one file.

    Attributes:
        source: the file.
        unit: unit of the row numbers: "line" (from 1, the header included) or "row" (of a Parquet file, from 0).
        num_rows: good and bad rows; blank lines and the header do not count.
        bad: the reasons, most frequent first.
        notes: what its owner should know besides, such as an encoding that was guessed.
    """

    source: str
    unit: str
    num_rows: int
    bad: tuple[Reason, ...]
    notes: tuple[str, ...] = ()

    @property
    def num_bad(self) -> int:
        """Return the number of rows that were left out as bad."""
        return sum(reason.count for reason in self.bad)


class BadRows:
    """The bad rows of one file, collected while it is read.

    Args:
        source: the file, for messages.
        unit: "line" or "row".
        max_share: largest share of bad rows, in [0, 1].
    """

    def __init__(self, source: str, unit: str, max_share: float) -> None:
        self.source, self.unit, self.max_share = source, unit, max_share
        self.count = self._leading = 0
        self.notes: list[str] = []
        self._reasons: dict[str, tuple[int, list[int]]] = {}
        self._cut: set[int] = set()  # hashes of the texts, which may be read many times

    def add(self, number: int, text: str, count: int = 1) -> None:
        """Record one or more consecutive bad rows.

        Args:
            number: number of the first line or row.
            text: the reason.
            count: number of rows.

        Raises:
            DomainError: the first 1,000 rows are all bad.
        """
        before, first = self._reasons.get(text, (0, []))
        self._reasons[text] = (before + count, [*first, number] if len(first) < NUM_SHOWN else first)
        self.count += count
        if number <= ALL_BAD + 1:  # a header is line 1
            self._leading += count
            if self._leading >= ALL_BAD and self.max_share < 1:
                raise self._refusal(self.count)

    def add_many(self, numbers: pa.Array, text: str) -> None:
        """Record bad rows of one reason, in the order of the file; errors as for add.

        Args:
            numbers: (n,) integers, the number of each row.
            text: the reason.
        """
        if len(numbers):
            shown = numbers[:ALL_BAD].to_pylist()
            for number in shown:
                self.add(number, text)
            rest = len(numbers) - len(shown)
            if rest:
                self.add(numbers[ALL_BAD].as_py(), text, rest)

    def cut(self, text: str) -> str:
        """Return the part of a text that a catalog holds; the report says how many were longer."""
        if len(text) <= LONGEST_TEXT:
            return text
        self._cut.add(hash(text))
        return text[:LONGEST_TEXT].rstrip()

    def report(self, num_good: int) -> FileReport:
        """Return the file's report.

        Args:
            num_good: number of good rows.

        Raises:
            DomainError: more than max_share of the rows are bad.
        """
        num_rows = num_good + self.count
        if self.count > self.max_share * num_rows:
            raise self._refusal(num_rows)
        notes = list(self.notes)
        if self._cut:
            notes.append(f"{len(self._cut)} texts were cut after {LONGEST_TEXT:,} characters; encoders read fewer")
        return FileReport(self.source, self.unit, num_rows, self._sorted(), tuple(notes))

    def _sorted(self) -> tuple[Reason, ...]:
        reasons = [Reason(text, count, tuple(first)) for text, (count, first) in self._reasons.items()]
        return tuple(sorted(reasons, key=lambda reason: -reason.count))

    def _refusal(self, num_rows: int) -> DomainError:
        found = "; ".join(reason_text(reason, self.unit) for reason in self._sorted())
        return DomainError(
            f"{self.source}: {self.count} of the {num_rows} rows read are bad, expected at most "
            f"{100 * self.max_share:g} %: {found}. Correct the file, or allow a larger max_bad_share."
        )


def reason_text(reason: Reason, unit: str) -> str:
    """Return a reason with its lines, such as ``the time is not a whole number (3: lines 4, 7, 9)``."""
    numbers = ", ".join(map(str, reason.first)) + (", …" if reason.count > len(reason.first) else "")
    return f"{reason.text} ({reason.count}: {unit}{'s' if reason.count > 1 else ''} {numbers})"
