"""Delimited text (CSV, TSV, RecBole's atomic files): its encoding, delimiter and header are recognised or named.

Blocks of regular records, nearly all of most files, are parsed by Arrow. The others are parsed by the csv module,
strictly and line by line, so every line that is left out is counted and numbered.
"""

import csv
import io
import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv as arrow_csv

from fedmerge.domain.importers.bad_rows import BadRows
from fedmerge.domain.importers.reading.table import NUMBER, RECOGNISED, FileOptions, Table
from fedmerge.domain.importers.source_files import (
    MAX_LINE_BYTES,
    Progress,
    SourceFile,
    not_encoded,
    read_blocks,
)
from fedmerge.errors import DomainError

DELIMITERS = (",", "\t", ";", "|")
SAMPLE_RECORDS = 20
WRONG_WIDTH = "the number of columns differs from the header"
_ATOMIC = re.compile(r"(.+):(?:token|float)(?:_seq)?")  # RecBole's names of columns
_SEPARATOR_LINE = re.compile(r'"?sep=(.)"?\r?\n')  # the first line of a file for Excel
SWALLOWED_ROWS = 3


def delimited_table(
    source: SourceFile,
    wanted: Sequence[str],
    max_bad_share: float = 0.0,
    progress: Progress | None = None,
    options: FileOptions = RECOGNISED,
) -> Table:
    """Open a delimited text file; every value is text.

    Args:
        source: plain or gzip file.
        wanted: names of columns looked for, by which the delimiter is recognised.
        max_bad_share: see BadRows.
        progress: see read_blocks.
        options: what is said about the file.

    Raises:
        DomainError: a delimiter of more than one character, an unknown encoding, text that is neither Unicode nor
            Western European if no encoding is named, or an unreadable header; while rows are read, an error of
            read_blocks or text of another encoding.
    """
    delimiter = options.delimiter
    if delimiter is not None and (len(delimiter) != 1 or delimiter in '"\r\n'):
        raise DomainError(f"{source}: the delimiter is {delimiter!r}, expected one character, such as ',' or a tab.")
    bad = BadRows(str(source), "line", max_bad_share)
    if options.encoding is not None:
        check_encoding(source, options.encoding)
    blocks = read_blocks(source, options.encoding, progress)
    start = next(blocks)
    blocks = itertools.chain([start], blocks)
    if options.encoding is None and (guessed := _guess(source, start)):
        bad.notes.append(f"read as {guessed}, which was guessed: name the encoding if texts look wrong")
        blocks = (block.decode(guessed, "replace").encode() for block in blocks)
    lines = _Lines(source, blocks)
    block = lines.next_block()
    lines.put_back(block)
    sample = lines.decode(block, 1)
    if match := _SEPARATOR_LINE.match(sample):
        delimiter = delimiter or match[1]
        lines.next_line()
        sample = sample[match.end() :]
    if delimiter is None:
        delimiter = _find_delimiter(sample, wanted, options.column_names)
    columns = _columns(source, sample, delimiter, options.column_names, lines)

    def batches(names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        return _batches(lines, delimiter, names, len(columns), [columns.index(name) for name in names], bad)

    return Table(str(source), "CSV", columns, batches, bad)


def check_encoding(source: SourceFile, encoding: str) -> None:
    """Raise DomainError unless Python knows the text encoding."""
    try:
        "".encode(encoding)
    except (LookupError, ValueError):
        raise DomainError(
            f"{source}: the encoding is {encoding!r}, expected one that Python knows, such as utf-8, utf-16, cp1252 or "
            "gb18030. Correct the name."
        ) from None


def _guess(source: SourceFile, start: bytes) -> str | None:
    """Return None for UTF-8 text, and cp1252 where one or two letters have accents, as in Western European text."""
    try:
        start.decode()
    except UnicodeDecodeError as error:
        runs = re.findall(rb"[\x80-\xff]+", start)
        undefined = re.search(rb"[\x81\x8d\x8f\x90\x9d]", start)
        if undefined or sum(len(run) <= 2 for run in runs) < 0.95 * len(runs):
            raise not_encoded(source, start[: error.start].count(b"\n") + 1, error) from error
        return "cp1252"
    return None


class _Lines:
    """The lines of a file, taken by line or by block.

    Attributes:
        number: number of lines taken.
    """

    def __init__(self, source: SourceFile, blocks: Iterator[bytes]) -> None:
        self.number = 0
        self._source, self._blocks = source, blocks
        self._block, self._at = b"", 0  # lines up to position _at are taken

    @property
    def at_end_of_block(self) -> bool:
        """True if no line of the current block is left."""
        return self._at == len(self._block)

    def next_line(self) -> bytes:
        """Take one line; b"" at the end of the file."""
        self._fill()
        end = self._block.find(b"\n", self._at) + 1 or len(self._block)
        line = self._block[self._at : end]
        self._at = end
        self.number += line != b""
        return line

    def next_block(self) -> bytes:
        """Take the rest of the current block, else the next block; b"" at the end of the file."""
        self._fill()
        block = self._block[self._at :]
        self._at = len(self._block)
        self.number += _count_lines(block)
        return block

    def put_back(self, taken: bytes) -> None:
        """Put back the lines that were taken last."""
        if len(taken) <= self._at:
            self._at -= len(taken)
        else:
            self._block, self._at = taken + self._block[self._at :], 0
        self.number -= _count_lines(taken)

    def decode(self, data: bytes, first: int) -> str:
        """Return the text of lines; raise DomainError, with the number of the line, if they are not UTF-8."""
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise not_encoded(self._source, first + data[: error.start].count(b"\n"), error) from error

    def _fill(self) -> None:
        if self.at_end_of_block:
            self._block, self._at = next(self._blocks, b""), 0


def _count_lines(block: bytes) -> int:
    return block.count(b"\n") + (block != b"" and not block.endswith(b"\n"))


def _records(text: str, delimiter: str) -> Iterator[list[str]]:
    """Yield the first records that are not blank; the end of the text may cut the last one."""
    with _long_fields():
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        yield from itertools.islice((record for record in reader if record), SAMPLE_RECORDS)


def _find_delimiter(text: str, wanted: Sequence[str], names: Sequence[str] | None) -> str:
    """Return the delimiter that finds the most of the wanted columns in the header, or the named number of columns."""

    def score(delimiter: str) -> tuple[int, int]:
        try:
            records = list(_records(text, delimiter))
        except csv.Error:
            return 0, 0
        if names is not None:
            return sum(len(record) == len(names) for record in records), 0
        header = _clean_names(records[0]) if records else ()
        return len(set(wanted) & set(header)), len(header)

    return max(DELIMITERS, key=score)


def _clean_names(header: Sequence[str]) -> tuple[str, ...]:
    """Return the names of columns without white space, and without types if all have one of RecBole's."""
    names = tuple(name.strip() for name in header)
    typed = [_ATOMIC.fullmatch(name) for name in names]
    return tuple(match[1] for match in typed if match) if all(typed) else names


def _columns(
    source: SourceFile, text: str, delimiter: str, names: Sequence[str] | None, lines: _Lines
) -> tuple[str, ...]:
    """Return the names of the columns, and take the header, if there is one."""
    try:
        records = list(_records(text, delimiter))
        if not records:
            raise csv.Error("no text")
        if names is not None and _clean_names(records[0]) != tuple(names):
            return tuple(names)
        with _long_fields():
            found = _read_record(lines, delimiter)
            while not found:
                found = _read_record(lines, delimiter)
    except csv.Error as error:
        raise DomainError(f"{source}: line 1 is not a header of column names ({error}). Add a header.") from error
    columns = _clean_names(found)
    rows = records[1:-1] or records[1:]
    if rows and all(len(row) == len(columns) + 1 for row in rows):
        # R leaves out the name of the column of row names; others end every row with a delimiter
        return (*columns, "") if all(row[-1] == "" for row in rows) else ("", *columns)
    return columns


def _read_record(lines: _Lines, delimiter: str) -> list[str]:
    return next(csv.reader(_decode(lines, []), delimiter=delimiter, strict=True))


def _decode(lines: _Lines, taken: list[bytes]) -> Iterator[str]:
    """Yield the lines of one record as text, and note them."""
    while line := lines.next_line():
        taken.append(line)
        yield lines.decode(line, lines.number)


@contextmanager
def _long_fields() -> Iterator[None]:
    """Let the csv module read fields as long as a line may be; its limit belongs to the whole process."""
    before = csv.field_size_limit(MAX_LINE_BYTES)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _batches(
    lines: _Lines, delimiter: str, names: Sequence[str], width: int, positions: Sequence[int], bad: BadRows
) -> Iterator[pa.RecordBatch]:
    """Yield the columns at positions, block by block."""
    schema = pa.schema([*((name, pa.string()) for name in names), (NUMBER, pa.int64())])
    while block := lines.next_block():
        columns = None
        if regular := _regular_records(block, delimiter, width):
            if rest := block[regular.size :]:
                lines.put_back(rest)
            block = block[: regular.size]
            first = lines.number - _count_lines(block) + 1
            columns = _parse_regular(block, regular, delimiter, width, positions, first, bad)
        if columns is None:
            lines.put_back(block)
            columns = _parse_strictly(lines, delimiter, width, positions, bad)
        yield pa.record_batch(columns, schema=schema)


@dataclass(frozen=True, slots=True)
class _Regular:
    """The leading records of a block that every parser reads alike.

    Attributes:
        size: their bytes.
        lines: (number of records,) the first line of each, counted from 0.
        spans_lines: True if a quoted value has a line end.
    """

    size: int
    lines: npt.NDArray[np.int64]
    spans_lines: bool


def _regular_records(block: bytes, delimiter: str, width: int) -> _Regular | None:
    """Return the records of a block, up to one that the block does not end; None if it must be read strictly.

    Regular records are not blank and have no lone carriage return. Their quotes stand around whole values, doubled
    inside them, as RFC 4180 has it, and no value has so many lines that a stray quote might have swallowed rows.
    """
    mark = delimiter.encode()
    if width == 1 or len(mark) > 1 or block.count(b"\r") != block.count(b"\r\n"):
        return None
    data = np.frombuffer(b"\n%b%b" % (block, b"" if block.endswith(b"\n") else b"\n"), np.uint8)  # shifted by 1
    breaks = np.flatnonzero(data == ord("\n"))[1:]
    lines = np.arange(len(breaks))  # that end a record
    if b'"' in block:
        quotes = np.flatnonzero(data == ord('"'))
        if len(quotes) % 2:  # the last value goes on in the next block
            breaks = breaks[: np.searchsorted(breaks, quotes[-1])]
            quotes = quotes[:-1]
        opening, closing = quotes[::2], quotes[1::2]
        doubled = np.append(closing[:-1] + 1 == opening[1:], False)
        starts = (data[opening - 1] == mark[0]) | (data[opening - 1] == ord("\n")) | np.roll(doubled, 1)
        after = data[closing + 1]
        if not (starts & ((after == mark[0]) | (after == ord("\n")) | (after == ord("\r")) | doubled)).all():
            return None
        lines = np.flatnonzero(np.searchsorted(quotes, breaks) % 2 == 0)
    if not len(lines) or (num_lines := np.diff(lines, prepend=-1).max()) > SWALLOWED_ROWS + 1:
        return None
    ends = breaks[lines]
    if (np.diff(ends, prepend=0) - (data[ends - 1] == ord("\r")) == 1).any():  # a blank line
        return None
    return _Regular(min(int(ends[-1]), len(block)), np.append(0, lines[:-1] + 1), bool(num_lines > 1))


def _parse_regular(
    block: bytes, regular: _Regular, delimiter: str, width: int, positions: Sequence[int], first: int, bad: BadRows
) -> list[pa.Array] | None:
    """Parse regular records with Arrow; None if they are not UTF-8 text."""
    wrong: list[int] = []

    def skip(row: arrow_csv.InvalidRow) -> str:
        wrong.append(row.number - 1)  # Arrow counts from 1
        return "skip"

    names = list(map(str, range(width)))
    try:
        table = arrow_csv.read_csv(
            pa.BufferReader(block),
            arrow_csv.ReadOptions(use_threads=False, block_size=len(block) + 1, column_names=names),
            arrow_csv.ParseOptions(
                delimiter=delimiter,
                newlines_in_values=regular.spans_lines,
                ignore_empty_lines=False,
                invalid_row_handler=skip,
            ),
            arrow_csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.string()), include_columns=[names[at] for at in positions]
            ),
        )
    except pa.ArrowInvalid:
        return None
    numbers = regular.lines + first
    bad.add_many(pa.array(numbers[wrong]), WRONG_WIDTH)
    return [*(column.combine_chunks() for column in table.columns), pa.array(np.delete(numbers, wrong))]


def _parse_strictly(
    lines: _Lines, delimiter: str, width: int, positions: Sequence[int], bad: BadRows
) -> list[pa.Array]:
    """Parse the current block, and the lines of the next ones that its last record needs, with the csv module.

    A record that is not CSV costs its first line only; the lines that an unclosed quote swallowed are read again.
    """
    rows: list[list[str]] = []
    numbers: list[int] = []
    taken: list[bytes] = []
    reader = csv.reader(_decode(lines, taken), delimiter=delimiter, strict=True)
    with _long_fields():
        while not lines.at_end_of_block:
            number = lines.number + 1
            taken.clear()
            try:
                row = next(reader)
                if _swallowed_rows(taken, delimiter, width):
                    raise csv.Error("a quote is not closed")
            except csv.Error as error:
                bad.add(number, f"not CSV: {error}")
                lines.put_back(b"".join(taken[1:]))
                reader = csv.reader(_decode(lines, taken), delimiter=delimiter, strict=True)
                continue
            if len(row) == width:
                rows.append(row)
                numbers.append(number)
            elif row:
                bad.add(number, WRONG_WIDTH)
    return [*(pa.array([row[at] for row in rows], pa.string()) for at in positions), pa.array(numbers, pa.int64())]


def _swallowed_rows(taken: Sequence[bytes], delimiter: str, width: int) -> bool:
    """True if the inner lines of a record all look like rows: another stray quote closed what a first one opened."""
    inner = taken[1:-1]
    separator = delimiter.encode()
    return len(inner) >= SWALLOWED_ROWS and width > 2 and all(line.count(separator) == width - 1 for line in inner)
