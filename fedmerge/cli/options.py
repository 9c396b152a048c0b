"""Arguments that several commands share."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedmerge.config import ExperimentConfig

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def config_file(text: str) -> Path:
    """Return the file that an argument names, or the shipped configuration of that name."""
    from fedmerge.errors import ConfigError
    from fedmerge.installation import find_config

    try:
        return find_config(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def app_folder(options: argparse.Namespace) -> Path:
    """Return the folder of the Flower app: that of ``--app``, else that of this installation."""
    from fedmerge.installation import root

    return options.app or root()


def add_app(parser: argparse.ArgumentParser) -> None:
    """Add ``--app`` for :func:`app_folder`."""
    parser.add_argument(
        "--app",
        type=Path,
        metavar="DIR",
        help="folder with pyproject.toml and sim/ (default: the app of this fedmerge)",
    )


def add_overrides(parser: argparse._ActionsContainer) -> None:
    """Add ``--set KEY=VALUE …``."""
    parser.add_argument(
        "--set", dest="overrides", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="change settings"
    )


def add_adapter(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of :func:`adapter_config`: the adapter and its experiment file."""
    parser.add_argument("adapter", help="a PEFT folder, or 'none' for the backbone alone")
    parser.add_argument(
        "--config",
        type=config_file,
        default=None,
        help="experiment file for backbone, text and runtime (default: that of the adapter's run)",
    )
    add_overrides(parser)


def adapter_config(options: argparse.Namespace) -> "ExperimentConfig":
    """Return the settings that an adapter is used with."""
    from fedmerge.config import load_config
    from fedmerge.encoder.adapter_records import config_of_adapter

    of_run = None if options.adapter == "none" else config_of_adapter(Path(options.adapter))
    return load_config(options.config or of_run, options.overrides)


def add_runs_folder(parser: argparse.ArgumentParser) -> None:
    """Add ``--dir``, the folder in which runs are found by their id."""
    parser.add_argument(
        "--dir", type=Path, default=Path("runs"), metavar="DIR", help="folder of run folders (default: runs)"
    )
