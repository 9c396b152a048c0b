"""Source files of imports, read line by line: plain, gzip, or in a zip archive. Errors name every defect of a file."""

import gzip
import io
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fedmerge.errors import DomainError

MAX_LINE_BYTES = 1 << 24
BUFFER_BYTES = 1 << 20
PROGRESS_LINES = 1 << 14

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
    """Yield the lines of a file with their line ends; only one is in memory at a time.

    Args:
        source: the file; gzip is recognised by its first bytes, not by its name.
        progress: called every 16,384 lines.

    Raises:
        DomainError: the file is missing, empty or unreadable, its compressed data is damaged or truncated, or a line is
            longer than 16 MiB.
    """
    number = 0
    try:
        with ExitStack() as stack:
            file, share = _open(source, stack)
            while line := file.readline(MAX_LINE_BYTES):
                number += 1
                if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                    raise DomainError(
                        f"{source}: line {number} is longer than {MAX_LINE_BYTES >> 20} MiB, expected one row a line. "
                        "Write each row on a line of its own, ended by a line feed."
                    )
                if progress and not number % PROGRESS_LINES:
                    progress(str(source), number, share())
                yield line
    except (EOFError, gzip.BadGzipFile, zlib.error, zipfile.BadZipFile) as error:
        raise DomainError(
            f"{source}: the compressed data is damaged or ends early, after line {number} ({error}). "
            "Use a complete copy of the file."
        ) from error
    except FileNotFoundError:
        raise DomainError(f"{source}: no such file. Check the path.") from None
    except (OSError, NotImplementedError, RuntimeError) as error:  # the last two: an encrypted or odd zip archive
        raise DomainError(
            f"{source}: cannot be read ({error}). Check that it is a file and that you may read it."
        ) from (error)
    if not number:
        raise DomainError(f"{source}: the file is empty. Use a complete copy of the file.")


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
    if start[:2] == b"\x1f\x8b":
        return stack.enter_context(gzip.GzipFile(fileobj=raw)), lambda: raw.tell() / size
    return raw, lambda: raw.tell() / size
