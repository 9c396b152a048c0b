"""Compare ways to import, each import in a process of its own: wall clock, CPU time and peak memory."""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

Result = dict[str, float]  # kept rows, seconds, cpu seconds, peak_mb


def compare(
    script: str,
    ways: Sequence[str],
    repeats: int,
    num_rows: int,
    *source: Path,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Import a source in every way, in turns, and print a row for each; exit if two ways keep different rows.

    Args:
        script: its ``__file__``; called with ``--measure way paths`` it must call :func:`measured`.
        ways: names of the ways to import; ratios are those to the last.
        repeats: number of turns.
        num_rows: rows of the source.
        source: its files.
        environment: further variables.
    """
    found: dict[str, list[Result]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way in ways:
            dst = source[0].parent / way
            found[way].append(_measure(script, way, *source, dst, environment=environment or {}))
            shutil.rmtree(dst)
    print("| rows | way | CPU s | rows/CPU s | CPU ratio | wall s | peak MB | memory ratio | kept |")
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for way, turns in found.items():
        if len({turn["kept"] for turn in (*turns, *found[ways[0]])}) > 1:
            sys.exit(f"{way} and {ways[0]} kept different rows.")
        cpu, wall, peak = (statistics.median(turn[key] for turn in turns) for key in ("cpu", "seconds", "peak_mb"))
        print(
            f"| {num_rows:,} | {way} | {cpu:.1f} | {num_rows / cpu:,.0f} | {_ratio(turns, found[ways[-1]], 'cpu')} | "
            f"{wall:.1f} | {peak:.0f} | {_ratio(turns, found[ways[-1]], 'peak_mb')} | {int(turns[0]['kept']):,} |",
            flush=True,
        )


def _ratio(ours: list[Result], theirs: list[Result], key: str) -> str:
    """Return median, lowest and highest ratio, turn by turn."""
    ratios = [a[key] / b[key] for a, b in zip(ours, theirs, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def _measure(script: str, way: str, *paths: Path, environment: Mapping[str, str]) -> Result:
    command = [sys.executable, script, "--measure", way, *map(str, paths)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **environment})
    result: Result = json.loads(done.stdout)
    return result


def measured(importing: Callable[..., int], *paths: Path) -> None:
    """Import in this process, and print time and memory."""
    start, cpu = time.perf_counter(), time.process_time()
    kept = importing(*paths)
    found = {"kept": kept, "seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
    # ru_maxrss may be that of the process that started this one
    [peak] = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    print(json.dumps({**found, "peak_mb": int(peak) / 1024}))
