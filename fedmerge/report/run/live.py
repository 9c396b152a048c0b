"""A run at work, as lines of text: its stages, who is waited for, how far trainings are, the time left."""

import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from fedmerge.runs.attempts import LOG_FILE
from fedmerge.runs.folder import DONE, is_locked
from fedmerge.runs.overview.progress import Stage, read_stages

_STEP = re.compile(r"client (\S+): (step \d+|round \d+[^,]*), (\d+) % of the budget")
LEAST_SHARE = 0.05  # of a stage, from which the time left is estimated
LOOK_SECONDS = 1.0
TAIL_BYTES = 4096


@contextmanager
def showing(run: Path) -> Iterator[Callable[[str], None]]:
    """Yield a function that prints a line of the log; a terminal also shows the run's stages below the log.

    Args:
        run: run folder, which need not exist yet.
    """
    steps: dict[str, tuple[str, float]] = {}
    if not sys.stdout.isatty():
        yield lambda line: print(line, flush=True)
        return
    console = Console(highlight=False, soft_wrap=True)
    began = time.time()  # an earlier attempt's stages are over

    def view() -> Group:
        stages = [stage for stage in read_stages(run) if stage.started >= began]
        return Group(*map(Text, stage_lines(stages, steps, time.time())))

    def on_line(line: str) -> None:
        if step := training_step(line):
            steps[step[0]] = step[1:]
        console.print(Text(line))

    with Live(console=console, refresh_per_second=1 / LOOK_SECONDS, transient=True, get_renderable=view):
        yield on_line


def watch(run: Path) -> str:
    """Show a run until it ends; a terminal is refreshed, elsewhere changed lines are printed.

    Args:
        run: run folder, written by a process of this machine or on a shared disk.

    Returns:
        ``done``, or ``interrupted`` if nothing works on it.
    """
    terminal = sys.stdout.isatty()
    printed = 0
    with Live(console=Console(highlight=False, soft_wrap=True), auto_refresh=False, transient=True) as live:
        while True:
            state = "done" if (run / DONE).is_file() else "" if is_locked(run) else "interrupted"
            stages = read_stages(run)
            if terminal:
                lines = [*stage_lines(stages, {}, time.time()), *last_lines(run, 3)]
                live.update(Group(*map(Text, lines)), refresh=True)
            else:
                ended = stage_lines([stage for stage in stages if stage.ended], {}, time.time())
                for line in ended[printed:]:
                    print(line, flush=True)
                printed = max(printed, len(ended))
            if state:
                return state
            time.sleep(LOOK_SECONDS)


def last_lines(run: Path, count: int) -> list[str]:
    """Return the last lines of a run's log."""
    try:
        with (run / LOG_FILE).open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL_BYTES))
            return file.read().decode("utf-8", errors="replace").splitlines()[-count:]
    except OSError:
        return []


def training_step(line: str) -> tuple[str, str, float] | None:
    """Return domain, step and share of the budget in [0, 1] of a client's line about its training; None otherwise."""
    found = _STEP.search(line)
    return None if found is None else (found[1], found[2], int(found[3]) / 100)


def stage_lines(stages: Sequence[Stage], steps: Mapping[str, tuple[str, float]], now: float) -> list[str]:
    """Return a line for every stage, and for each client that trains.

    Args:
        stages: in order.
        steps: domain -> step and share of the budget, where known.
        now: Unix time.
    """
    lines = []
    for stage in stages:
        repeated = f", message {stage.times}" if stage.times > 1 else ""
        seconds = (stage.ended or now) - stage.started
        counts = f"{stage.answered} of {stage.asked}{repeated}"
        left = "" if stage.ended else _left(stage, steps, seconds)
        lines.append(f"{'done' if stage.ended else 'now'}  {stage.phase}: {counts}, {duration(seconds)}{left}")
        if stage.ended is None:
            for name in stage.waiting:
                step = f"  {steps[name][0]}, {100 * steps[name][1]:.0f} % of the budget" if name in steps else ""
                lines.append(f"        {name}{step}")
    return lines


def _left(stage: Stage, steps: Mapping[str, tuple[str, float]], seconds: float) -> str:
    """Return the time left of a stage at its pace so far; empty while that says little."""
    share = (stage.answered + sum(steps[name][1] for name in stage.waiting if name in steps)) / max(1, stage.asked)
    if not LEAST_SHARE <= share < 1:
        return ""
    return f", about {duration(seconds * (1 - share) / share)} left"


def duration(seconds: float) -> str:
    """Return seconds as people say them: ``45 s``, ``12 min``, ``3 h 5 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
