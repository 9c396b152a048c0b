"""What several commands have in common."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedmerge.config import ExperimentConfig

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def add_overrides(parser: argparse._ActionsContainer) -> None:
    """``--set KEY=VALUE …``."""
    parser.add_argument(
        "--set", dest="overrides", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="change settings"
    )


def add_adapter(parser: argparse.ArgumentParser) -> None:
    """The adapter, and where its settings come from; see :func:`adapter_config`."""
    parser.add_argument("adapter", help="a PEFT folder, or 'none' for the backbone alone")
    parser.add_argument(
        "--config",
        type=Path,
        default=None,
        help="experiment file for backbone, text and runtime (default: that of the run the adapter lies in)",
    )
    add_overrides(parser)


def adapter_config(options: argparse.Namespace) -> "ExperimentConfig":
    """The settings to use an adapter with."""
    from fedmerge.config import load_config
    from fedmerge.encoder.adapter_records import config_of_adapter

    of_run = None if options.adapter == "none" else config_of_adapter(Path(options.adapter))
    return load_config(options.config or of_run, options.overrides)


def add_runs_folder(parser: argparse.ArgumentParser) -> None:
    """``--dir``, where runs are looked for by their id."""
    parser.add_argument(
        "--dir", type=Path, default=Path("runs"), metavar="DIR", help="folder of run folders (default: runs)"
    )
