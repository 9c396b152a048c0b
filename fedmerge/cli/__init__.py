"""The command line: one module for each group of commands. Nothing heavy is imported before a command needs it."""

import argparse
import os
import sys
from collections.abc import Sequence

from fedmerge import __version__
from fedmerge.cli import bench, cache, configs, init, privacy, report, run, runs, storage
from fedmerge.cli.adapters import evaluate, export, extract, merge, recommend, serve
from fedmerge.cli.data import folders
from fedmerge.cli.machines import client, deploy
from fedmerge.errors import FedMergeError
from fedmerge.installation import check_platform, import_flower_side


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 on success, 1 on an error (with a message on standard error), 2 for wrong usage.
    """
    options = make_parser().parse_args(arguments)
    try:
        check_platform()
        import_flower_side()
        code = int(options.command(options))
        sys.stdout.flush()
        return code
    except FedMergeError as error:
        print(f"fedmerge: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader, for example `head`, has closed; Python's last flush must not fail as well
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("fedmerge: interrupted", file=sys.stderr)
        return 130


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="fedmerge", description="Build one recommender together, without sharing user data."
    )
    parser.add_argument("--version", action="version", version=f"fedmerge {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    local = (
        init,
        run,
        cache,
        configs,
        folders,
        runs,
        report,
        merge,
        extract,
        evaluate,
        recommend,
        serve,
        export,
        bench,
        privacy,
        storage,
    )
    for group in (*local, deploy, client):
        group.add_commands(commands)
    return parser
