"""Source files of imports, read in blocks of lines: plain, gzip, or in a zip archive; every defect is an error."""

import codecs
import gzip
import io
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fedmerge.domain.parquet import SOURCE_CELL_BYTES
from fedmerge.errors import DomainError

MAX_LINE_BYTES = SOURCE_CELL_BYTES
BUFFER_BYTES = 1 << 22
GZIP = b"\x1f\x8b"
_MARKS = {  # UTF-32 before UTF-16, whose mark it begins with
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}

Progress = Callable[[str, int, float], None]  # file, lines or rows read, share of the file read


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file to read.

    Attributes:
        path: the file, or the zip archive that holds it; a plain file may be compressed with gzip.
        member: its name in the archive; None if path is the file itself.
    """

    path: Path
    member: str | None = None

    def __str__(self) -> str:
        """Return the name for messages."""
        return str(self.path) if self.member is None else f"{self.path}:{self.member}"


def read_lines(source: SourceFile, progress: Progress | None = None) -> Iterator[bytes]:
    """Yield the lines of a file with their line feeds; a byte order mark is skipped.

    Args:
        source: the file, see read_blocks.
        progress: see read_blocks.

    Raises:
        DomainError: as for read_blocks.
    """
    for block in read_blocks(source, progress=progress):
        yield from io.BytesIO(block)


def read_blocks(source: SourceFile, encoding: str | None = None, progress: Progress | None = None) -> Iterator[bytes]:
    """Yield a text file in blocks of whole lines, which end in line feeds, some mebibytes at a time.

    A byte order mark is skipped. Carriage returns that end the lines of a file without line feeds become line feeds.

    Args:
        source: the file; gzip is recognised by its first bytes, not by its name.
        encoding: the encoding of the file, which is converted to UTF-8; None returns the bytes as they are, unless
            they begin as UTF-16 or UTF-32 do.
        progress: called after each block.

    Raises:
        DomainError: the file is missing, empty or unreadable, its compressed data is damaged or truncated, a line is
            longer than 16 MiB, or its text is not of the encoding.
    """
    number, rest = 0, b""
    ends_in_returns: bool | None = None
    try:
        with ExitStack() as stack:
            file, share = _open(source, stack)
            for decoded in _decoded(file, encoding):
                if ends_in_returns is None:
                    ends_in_returns = b"\r" in decoded and b"\n" not in decoded
                data = decoded.replace(b"\r", b"\n") if ends_in_returns else decoded
                first, end = data.find(b"\n"), data.rfind(b"\n") + 1
                if len(rest) + (first if end else len(data)) >= MAX_LINE_BYTES:
                    raise _too_long(source, number + 1)
                if not end:
                    rest += data
                    continue
                block, rest = rest + data[:end], data[end:]
                number += block.count(b"\n")
                if progress:
                    progress(str(source), number, share())
                yield block
            if rest:
                number += 1
                if len(rest) >= MAX_LINE_BYTES:
                    raise _too_long(source, number)
                yield rest
    except (EOFError, gzip.BadGzipFile, zlib.error, zipfile.BadZipFile) as error:
        raise DomainError(
            f"{source}: the compressed data is damaged or ends early, after line {number} ({error}). "
            "Use a complete copy of the file."
        ) from error
    except UnicodeDecodeError as error:
        before = error.object[: error.start].decode(error.encoding, "ignore").count("\n")
        raise not_encoded(source, number + 1 + before, error) from error
    except FileNotFoundError:
        raise DomainError(f"{source}: no such file. Check the path.") from None
    except (OSError, NotImplementedError, RuntimeError) as error:  # the last two: an encrypted or odd zip archive
        raise DomainError(
            f"{source}: cannot be read ({error}). Check that it is a file and that you may read it."
        ) from (error)
    if not number:
        raise DomainError(f"{source}: the file is empty. Use a complete copy of the file.")


def _too_long(source: SourceFile, line: int) -> DomainError:
    return DomainError(
        f"{source}: line {line} is longer than {MAX_LINE_BYTES >> 20} MiB, expected one row a line. Write each row on "
        "a line of its own, ended by a line feed."
    )


def not_encoded(source: SourceFile, line: int, error: UnicodeDecodeError) -> DomainError:
    """Return the error about text of another encoding."""
    return DomainError(
        f"{source}: line {line} is not {error.encoding} text ({error.reason} at byte {error.start}). "
        "Name the file's encoding, or convert the file to utf-8."
    )


def _decoded(file: IO[bytes] | gzip.GzipFile, encoding: str | None) -> Iterator[bytes]:
    """Yield the bytes of a file as UTF-8 without a byte order mark, or as they are if the encoding is not known."""
    start = file.read(BUFFER_BYTES)
    if encoding is None:
        encoding = unicode_encoding(start)
    if encoding is None or codecs.lookup(encoding).name == "utf-8":
        yield start.removeprefix(codecs.BOM_UTF8)
        while data := file.read(BUFFER_BYTES):
            yield data
        return
    decoder = codecs.getincrementaldecoder(encoding)()
    yield decoder.decode(start).removeprefix("\ufeff").encode()
    while data := file.read(BUFFER_BYTES):
        yield decoder.decode(data).encode()
    yield decoder.decode(b"", final=True).encode()


def unicode_encoding(start: bytes) -> str | None:
    """Return the encoding of text that begins with a byte order mark, or that has a zero beside most characters."""
    for mark, encoding in _MARKS.items():
        if start.startswith(mark):
            return encoding
    pairs = len(start) // 2
    if pairs > 4 and 0 in start:
        if start[1::2].count(0) > 0.4 * pairs and start[::2].count(0) == 0:
            return "utf-16-le"
        if start[::2].count(0) > 0.4 * pairs and start[1::2].count(0) == 0:
            return "utf-16-be"
    return None


def _open(source: SourceFile, stack: ExitStack) -> tuple[IO[bytes] | gzip.GzipFile, Callable[[], float]]:
    """Open the decompressed bytes; return them with a function that returns the share of the file read."""
    if source.member is not None:
        archive = stack.enter_context(zipfile.ZipFile(source.path))
        member = stack.enter_context(archive.open(source.member))
        total = max(1, archive.getinfo(source.member).file_size)
        return member, lambda: member.tell() / total
    raw = stack.enter_context(io.BufferedReader(io.FileIO(source.path), BUFFER_BYTES))
    size = max(1, source.path.stat().st_size)
    start = raw.peek(4)[:4]
    if start == b"PK\x03\x04":
        raise DomainError(f"{source}: found a zip archive, expected a plain or gzip file. Unpack it.")
    file = stack.enter_context(gzip.GzipFile(fileobj=raw)) if start[:2] == GZIP else raw
    return file, lambda: raw.tell() / size if raw.seekable() else 0.0  # a pipe has no position


def first_bytes(path: Path, size: int = 64) -> bytes:
    """Return the first bytes of a file, decompressed if it is gzip; b"" if it cannot be read."""
    try:
        with path.open("rb") as file:
            start = file.read(size)
            if start[:2] != GZIP:
                return start
            file.seek(0)
            return gzip.GzipFile(fileobj=file).read(size)
    except (OSError, EOFError, zlib.error):
        return b""
