"""``fedmerge cache``: what a client's cache holds, and emptying it."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fedmerge.cli.options import add_runs_folder

if TYPE_CHECKING:
    from fedmerge.cli.options import Commands


def add_commands(commands: "Commands") -> None:
    """Add the commands to the parser."""
    cache = commands.add_parser("cache", help="show what this client's cache holds, by kind and size")
    _add_folder(cache, None)
    cache.set_defaults(command=_show)
    actions = cache.add_subparsers(metavar="ACTION")
    clean = actions.add_parser("clean", help="delete what can be made again and is not in use; lists it, unless --yes")
    _add_folder(clean, argparse.SUPPRESS)
    add_runs_folder(clean)
    clean.add_argument(
        "--kind",
        nargs="+",
        default=[],
        metavar="KIND",
        help="delete all entries of these kinds instead, also heads and experts; records of what has left are kept",
    )
    clean.add_argument(
        "--unused-days",
        type=_days,
        default=None,
        metavar="DAYS",
        help="age since the last use, for what can be made again (default: 30)",
    )
    clean.add_argument("--yes", action="store_true", help="delete; without it, list only")
    clean.set_defaults(command=_clean)


def _add_folder(parser: argparse.ArgumentParser, default: object) -> None:
    """Add the option to the command or its action; an action must not reset what was given before its name."""
    told = "cache of this client (default: ~/.cache/fedmerge)"
    parser.add_argument("--cache-dir", type=Path, default=default, metavar="DIR", help=told)


def _days(text: str) -> float:
    days = float(text)
    if not days >= 0:
        raise argparse.ArgumentTypeError(f"found {text}, expected a number of days from 0")
    return days


def _folder(options: argparse.Namespace) -> Path:
    from fedmerge.config import ExperimentConfig

    return Path(options.cache_dir or ExperimentConfig().cache_dir).expanduser()


def _show(options: argparse.Namespace) -> int:
    from fedmerge.client.cache.contents import cache_entries
    from fedmerge.report.cache_text import cache_table

    folder = _folder(options)
    print(cache_table(folder, cache_entries(folder)), end="")
    return 0


def _clean(options: argparse.Namespace) -> int:
    from fedmerge.client.cache.contents import UNUSED_DAYS, adapters_of_runs, delete_entry, entries_to_delete
    from fedmerge.report.cache_text import deletion_text
    from fedmerge.runs.reading import list_runs

    runs = list_runs(options.dir) if options.dir.is_dir() else []
    adapters = adapters_of_runs(runs) if runs else None
    days = UNUSED_DAYS if options.unused_days is None else options.unused_days
    found = entries_to_delete(_folder(options), options.kind, adapters, days)
    if options.yes:
        for entry in found:
            delete_entry(entry)
    print(deletion_text(_folder(options), found, is_deleted=options.yes), end="")
    return 0
