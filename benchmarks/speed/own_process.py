"""Measure one import in a process of its own: wall clock, CPU time and peak memory."""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path


def measure(script: str, way: str, *paths: Path, environment: Mapping[str, str] | None = None) -> dict[str, float]:
    """Run a script that calls :func:`measured` for its arguments ``--measure way paths``.

    Args:
        script: its ``__file__``.
        way: name of the way to import.
        paths: of sources and destination.
        environment: further variables.

    Returns:
        ``kept`` rows, ``seconds``, ``cpu`` seconds, ``peak_mb``.
    """
    command = [sys.executable, script, "--measure", way, *map(str, paths)]
    of_child = {**os.environ, **(environment or {})}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=of_child)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def measured(importing: Callable[..., int], *paths: Path) -> None:
    """Import in this process, and print time and memory."""
    start, cpu = time.perf_counter(), time.process_time()
    kept = importing(*paths)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts KiB
    seconds = time.perf_counter() - start
    print(json.dumps({"kept": kept, "seconds": seconds, "cpu": time.process_time() - cpu, "peak_mb": peak}))
