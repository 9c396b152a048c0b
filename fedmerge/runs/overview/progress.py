"""What a run asks its clients: ``progress.json``, for those who watch it; it decides nothing and ends with the run."""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from fedmerge.errors import RunDirError
from fedmerge.files import read_json, write_json

PROGRESS_FILE = "progress.json"
WRITE_SECONDS = 0.5  # between two writes of one stage
SHOWN = 20  # names of clients


@dataclass(frozen=True)
class Stage:
    """A question to the clients of a run.

    Attributes:
        phase: phase of the run.
        question: type of the message.
        asked: number of clients.
        answered: number of them that have answered.
        waiting: names of those that work on it, at most ``SHOWN``.
        times: how often it was asked, for questions that are asked again and again.
        started: Unix time.
        ended: Unix time; None while answers are missing.
    """

    phase: str
    question: str
    asked: int
    answered: int
    waiting: tuple[str, ...]
    times: int
    started: float
    ended: float | None


@dataclass
class Stages:
    """The stages of a run so far, in the process that works on it."""

    folder: Path
    found: list[Stage] = field(default_factory=list)
    written: float = 0.0  # monotonic clock

    def begin(self, phase: str, question: str, asked: int) -> None:
        """Note that clients are asked; a question that repeats the last one counts with it."""
        stage = Stage(phase, question, asked, 0, (), 1, time.time(), None)
        if self.found and (self.found[-1].phase, self.found[-1].question) == (phase, question):
            last = self.found.pop()
            stage = replace(stage, times=last.times + 1, started=last.started)
        self.found.append(stage)
        self._write(now=stage.times == 1)

    def answer(self, answered: int, waiting: Sequence[str], asked: int | None = None) -> None:
        """Note who has answered, and how many are asked if that has changed."""
        last = self.found[-1]
        asked = last.asked if asked is None else asked
        self.found[-1] = replace(last, asked=asked, answered=answered, waiting=tuple(sorted(waiting)[:SHOWN]))
        self._write(now=False)

    def end(self) -> None:
        """Note that nobody is waited for any more."""
        self.found[-1] = replace(self.found[-1], waiting=(), ended=time.time())
        self._write(now=self.found[-1].times == 1)

    def _write(self, now: bool) -> None:
        if now or time.monotonic() - self.written >= WRITE_SECONDS:
            self.written = time.monotonic()
            with suppress(RunDirError):  # nobody may be watching
                write_json(self.folder / PROGRESS_FILE, [asdict(stage) for stage in self.found])


def read_stages(run: Path) -> list[Stage]:
    """Return the stages of a run that is at work, or was killed; empty if nothing is known."""
    try:
        found = read_json(run / PROGRESS_FILE) or []
        return [Stage(**{**stage, "waiting": tuple(stage["waiting"])}) for stage in found]
    except (RunDirError, TypeError, LookupError):
        return []


def remove_stages(run: Path) -> None:
    """Remove the file, since the run has ended."""
    with suppress(OSError):
        (run / PROGRESS_FILE).unlink(missing_ok=True)
