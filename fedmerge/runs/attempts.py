"""The attempts of a run and how long each took, in ``attempts.jsonl``.

An attempt writes one line when it starts and one when it ends. A killed attempt writes no second line; its time counts
up to its last line in ``run.log``.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from fedmerge.files import append_line, read_lines

ATTEMPTS_FILE = "attempts.jsonl"
LOG_FILE = "run.log"


@dataclass(frozen=True)
class Attempt:
    """The work of one process on a run, since :func:`start_attempt`.

    Attributes:
        folder: run folder.
        number: 1 for the first attempt.
        earlier_seconds: total time of earlier attempts.
        started: start time on the monotonic clock.
    """

    folder: Path
    number: int
    earlier_seconds: float
    started: float

    @property
    def seconds(self) -> float:
        """Seconds of this attempt so far."""
        return time.monotonic() - self.started

    @property
    def total_seconds(self) -> float:
        """Seconds of all attempts so far."""
        return self.earlier_seconds + self.seconds

    def end(self) -> None:
        """Record how long this attempt took.

        Raises:
            RunDirError: the file cannot be written.
        """
        append_line(self.folder / ATTEMPTS_FILE, {"attempt": self.number, "seconds": round(self.seconds, 1)})

    def __str__(self) -> str:
        """Return the total time, and for a resumed run that of this attempt: ``90 s (attempt 2 took 30 s)``."""
        this = f" (attempt {self.number} took {self.seconds:.0f} s)" if self.number > 1 else ""
        return f"{self.total_seconds:.0f} s{this}"


def start_attempt(folder: Path) -> Attempt:
    """Start an attempt and record it; call this before anything else is written to a resumed run.

    Raises:
        RunDirError: the file cannot be read or written.
    """
    seconds: dict[int, float] = {}
    started_at: dict[int, float] = {}
    for line in read_lines(folder / ATTEMPTS_FILE):
        if "started" in line:
            started_at[line["attempt"]] = line["started"]
        else:
            seconds[line["attempt"]] = line["seconds"]
    killed = max(started_at, default=0)
    if killed and killed not in seconds:
        seconds[killed] = round(max(0.0, _last_logged(folder) - started_at[killed]), 1)
        append_line(folder / ATTEMPTS_FILE, {"attempt": killed, "seconds": seconds[killed]})
    number = killed + 1
    append_line(folder / ATTEMPTS_FILE, {"attempt": number, "started": round(time.time(), 1)})
    return Attempt(folder, number, sum(seconds.values()), time.monotonic())


def _last_logged(folder: Path) -> float:
    try:
        return (folder / LOG_FILE).stat().st_mtime
    except OSError:
        return 0.0
