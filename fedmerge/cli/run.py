"""``fedmerge run`` and ``fedmerge check``."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fedmerge.cli.options import add_overrides

if TYPE_CHECKING:
    from fedmerge.cli.options import Commands


def add_commands(commands: "Commands") -> None:
    """Add them to the parser."""
    run = commands.add_parser("run", help="run an experiment through Flower's simulation engine")
    run.add_argument("config", type=Path, help="experiment file, for example configs/demo.toml")
    add_overrides(run)
    run.add_argument(
        "--app", type=Path, default=None, help="folder with pyproject.toml and sim/ (default: the installed checkout)"
    )
    run.set_defaults(command=_run)

    check = commands.add_parser("check", help="validate an experiment file without running it")
    check.add_argument("config", type=Path)
    add_overrides(check)
    check.set_defaults(command=_check)


def _run(options: argparse.Namespace) -> int:
    from fedmerge.config import load_config, with_absolute_paths

    config = with_absolute_paths(load_config(options.config, options.overrides), Path.cwd())

    from sim.run import run_experiment

    return run_experiment(config, options.app or Path(__file__).resolve().parents[2])


def _check(options: argparse.Namespace) -> int:
    from fedmerge.config import load_config

    config = load_config(options.config, options.overrides)
    domains = f"{len(config.domains.train)} training and {len(config.domains.unseen)} unseen domains"
    print(
        f"{options.config}: valid ({config.name}: {domains}, methods {', '.join(config.merge.methods)}, "
        f"seed {config.seed})"
    )
    return 0
