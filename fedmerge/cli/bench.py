"""``fedmerge bench``."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fedmerge.cli.options import add_app, add_overrides, app_folder, config_file

if TYPE_CHECKING:
    from fedmerge.cli.options import Commands


def add_commands(commands: "Commands") -> None:
    """Add the command to the parser."""
    bench = commands.add_parser("bench", help="compare strategies over seeds and datasets, with a report")
    bench.add_argument(
        "file", type=config_file, help="benchmark file, or a name that 'fedmerge configs' lists, as bench/smoke"
    )
    bench.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder of the benchmark; an existing one is resumed"
    )
    add_overrides(bench)
    bench.add_argument(
        "--address", default=None, help="address of a Ray cluster whose nodes share DIR (default: this machine)"
    )
    add_app(bench)
    bench.set_defaults(command=_bench)


def _bench(options: argparse.Namespace) -> int:
    from sim.local.bench import run_bench

    return run_bench(
        options.file,
        options.out,
        app_folder(options),
        options.address,
        options.overrides,
    )
