"""Alternatives timed in turn in one process: a slower machine slows all of them, and the ratio counts."""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping

import torch

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Seconds = dict[str, list[float]]


def arguments(description: str, *, repeats: int) -> argparse.ArgumentParser:
    """Return a parser with the arguments of every benchmark."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu (with --threads 1) for a busy machine")
    return parser


def timed_in_turn(
    alternatives: Mapping[str, Callable[[], object]], repeats: int, clock: str, *, warm_up: int = 1
) -> Seconds:
    """Return the seconds of every call: A B C A B C …, after ``warm_up`` rounds that are not counted."""
    now = CLOCKS[clock]
    seconds: Seconds = {name: [] for name in alternatives}
    for turn in range(-warm_up, repeats):
        for name, call in alternatives.items():
            start = now()
            call()
            if torch.cuda.is_available():  # kernels that are queued still run
                torch.cuda.synchronize()
            if turn >= 0:
                seconds[name].append(now() - start)
    return seconds


def print_table(seconds: Seconds, baseline: str, unit: str, amount: float) -> None:
    """Print a row per alternative: median seconds, rate, and median and quartiles of its speed-up over the baseline.

    Args:
        seconds: of :func:`timed_in_turn`.
        baseline: the alternative that the others are compared with, turn by turn.
        unit: of the rate.
        amount: units in one call.
    """
    width = max(len(name) for name in seconds)
    print(f"{'':<{width}}{'median s':>10}{unit:>14}{'times as fast':>15}{'quartiles':>18}")
    for name, times in seconds.items():
        ratios = [theirs / ours for theirs, ours in zip(seconds[baseline], times, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rate = amount / statistics.median(times)
        shown = f"{low:.2f} to {high:.2f}"
        print(f"{name:<{width}}{statistics.median(times):>10.4f}{rate:>14.4g}{middle:>15.2f}{shown:>18}")
