"""Start-up time of ``fedmerge --help``, against Python alone and the libraries that a command needs.

    python benchmarks/speed/bench_startup.py

Whole processes are timed in turn, after a first one of each that is not counted.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from interleaved import print_table, timed_in_turn

REPOSITORY = Path(__file__).resolve().parents[2]
ALTERNATIVES = {
    "import torch, transformers, flwr": ["-c", "import torch, transformers, flwr"],
    "fedmerge --help": ["-m", "fedmerge.cli", "--help"],
    "python alone": ["-c", "pass"],
}


def process(arguments: list[str]) -> Callable[[], None]:
    """Return a call that runs one Python process to its end."""

    def run() -> None:
        subprocess.run([sys.executable, *arguments], cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)

    return run


def main() -> None:
    """Time the processes and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    calls = {name: process(arguments) for name, arguments in ALTERNATIVES.items()}
    print_table(timed_in_turn(calls, options.repeats, "wall"), next(iter(calls)), "starts/s", 1)


if __name__ == "__main__":
    main()
