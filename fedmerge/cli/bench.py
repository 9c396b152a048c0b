"""``fedmerge bench``."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fedmerge.cli.options import add_overrides

if TYPE_CHECKING:
    from fedmerge.cli.options import Commands


def add_commands(commands: "Commands") -> None:
    """Add it to the parser."""
    bench = commands.add_parser("bench", help="compare strategies over seeds and datasets, with a report")
    bench.add_argument("file", type=Path, help="benchmark file, for example configs/bench/smoke.toml")
    bench.add_argument("--out", type=Path, required=True, metavar="DIR", help="where everything goes; goes on with it")
    add_overrides(bench)
    bench.add_argument("--address", default=None, help="of a Ray cluster whose nodes see DIR (default: this machine)")
    bench.add_argument(
        "--app", type=Path, default=None, help="folder with pyproject.toml and sim/ (default: the installed checkout)"
    )
    bench.set_defaults(command=_bench)


def _bench(options: argparse.Namespace) -> int:
    from sim.local.bench import run_bench

    return run_bench(
        options.file,
        options.out,
        options.app or Path(__file__).resolve().parents[2],
        options.address,
        options.overrides,
    )
