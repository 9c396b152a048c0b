"""Run a command and measure it: time, CPU time, and the peak of its own resident memory."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
GIB = 2**30
# A process inherits the peak of the one that starts it, so a small one stands between the benchmark and the command.
_START = """
import json, os, sys, time
start = time.perf_counter()
pid = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ)
_, status, used = os.wait4(pid, 0)
seconds = time.perf_counter() - start
print()
print(json.dumps([os.waitstatus_to_exitcode(status), seconds, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024]))
"""


@dataclass(frozen=True)
class Measured:
    """What a command printed and used.

    Attributes:
        printed: output and errors.
        seconds: wall clock.
        cpu_seconds: of all its threads.
        peak_gib: largest resident memory.
    """

    printed: str
    seconds: float
    cpu_seconds: float
    peak_gib: float


def measure(command: Sequence[str], folder: Path, variables: Mapping[str, str] | None = None) -> Measured:
    """Run a command with one thread in a folder; exit with its output if it fails.

    Args:
        command: program and arguments.
        folder: working directory.
        variables: further environment variables.
    """
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **(variables or {})}
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _START, *command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
    )
    printed, _, last = done.stdout.rstrip("\n").rpartition("\n")
    code, seconds, cpu_seconds, peak = json.loads(last)
    if code:
        raise SystemExit(f"{' '.join(command[:4])} … ended with {code}:\n{printed[-3000:]}")
    return Measured(printed, seconds, cpu_seconds, peak / GIB)
