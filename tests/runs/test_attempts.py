"""The time of a run is the sum over its attempts, killed ones included."""

import os
import time
from pathlib import Path

import pytest

from fedmerge.files import read_lines
from fedmerge.runs.attempts import ATTEMPTS_FILE, LOG_FILE, start_attempt


def test_a_first_attempt_counts_alone(tmp_path: Path) -> None:
    attempt = start_attempt(tmp_path)
    assert (attempt.number, attempt.earlier_seconds) == (1, 0)
    assert str(attempt) == "0 s"


def test_ended_attempts_are_summed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    for seconds in (20.0, 30.0):
        attempt = start_attempt(tmp_path)
        clock[0] += seconds
        attempt.end()
    third = start_attempt(tmp_path)
    clock[0] += 5
    assert (third.number, third.earlier_seconds, third.total_seconds) == (3, 50.0, 55.0)
    assert str(third) == "55 s (attempt 3 took 5 s)"


def test_a_killed_attempt_counts_until_its_last_line_in_the_log_and_once(tmp_path: Path) -> None:
    start_attempt(tmp_path)  # killed: it never ends
    started = next(iter(read_lines(tmp_path / ATTEMPTS_FILE)))["started"]
    (tmp_path / LOG_FILE).write_text("")
    os.utime(tmp_path / LOG_FILE, (started + 40, started + 40))
    assert start_attempt(tmp_path).earlier_seconds == pytest.approx(40)
    os.utime(tmp_path / LOG_FILE, (1, 1))  # the second is killed before it writes
    third = start_attempt(tmp_path)
    assert third.number == 3
    assert third.earlier_seconds == pytest.approx(40)
