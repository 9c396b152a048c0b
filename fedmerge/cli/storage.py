"""``fedmerge push`` and ``fedmerge pull``."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fedmerge.cli.options import add_runs_folder

if TYPE_CHECKING:
    from fedmerge.cli.options import Commands
    from fedmerge.storage.copying import Copied


def add_commands(commands: "Commands") -> None:
    """Add the commands to the parser."""
    push = commands.add_parser(
        "push",
        help="copy a finished run, an adapter or a domain to shared storage",
        description="Copy a folder to an address of shared storage. Repeat an interrupted push to continue it. Nobody "
        "takes a half-copied folder for a whole one.",
    )
    push.add_argument(
        "folder",
        metavar="FOLDER",
        help="a finished run (its folder or the beginning of its id), a PEFT folder, a domain",
    )
    push.add_argument("address", metavar="ADDRESS", help="of the folder to make, for example s3://bucket/runs/first")
    add_runs_folder(push)
    push.set_defaults(command=_push)
    pull = commands.add_parser(
        "pull",
        help="copy a pushed folder from shared storage, and verify it",
        description="Copy what 'fedmerge push' has copied to a folder here, and verify every file. Repeat an "
        "interrupted pull to continue it.",
    )
    pull.add_argument("address", metavar="ADDRESS", help="of the folder, for example s3://bucket/runs/first")
    pull.add_argument("folder", type=Path, metavar="FOLDER", help="absent or empty")
    pull.set_defaults(command=_pull)


def _push(options: argparse.Namespace) -> int:
    from fedmerge.domain.manifest import MANIFEST_FILE
    from fedmerge.errors import RunDirError, StorageError
    from fedmerge.files import folder_size
    from fedmerge.runs.folder import DONE, LOCK_FILE, is_locked
    from fedmerge.runs.reading import find_run
    from fedmerge.storage.addresses import address_problem
    from fedmerge.storage.copying import push_folder

    if problem := address_problem(options.address):
        raise StorageError(f"address: {problem}.")
    folder = Path(options.folder)
    if (folder / "adapter_config.json").is_file() or (folder / MANIFEST_FILE).is_file():
        copied = push_folder(folder, options.address)
    else:
        try:
            folder = find_run(options.folder, options.dir)
        except RunDirError as error:
            raise RunDirError(f"{error} An adapter has adapter_config.json, a domain has {MANIFEST_FILE}.") from error
        if not (folder / DONE).is_file() or is_locked(folder):
            raise RunDirError(
                f"{folder}: not finished, expected a run with {DONE}. Complete it: fedmerge run --resume {folder}"
            )
        copied = push_folder(folder, options.address, (LOCK_FILE,))
    print(f"{options.address.rstrip('/')}: {_told(copied)}, {folder_size(folder) / 1e6:.1f} MB in all")
    return 0


def _pull(options: argparse.Namespace) -> int:
    from fedmerge.storage.copying import pull_folder

    print(f"{options.folder}: {_told(pull_folder(options.address, options.folder))}")
    return 0


def _told(copied: "Copied") -> str:
    there = copied.num_files - copied.num_sent
    return f"{copied.num_sent} files copied ({copied.sent_bytes / 1e6:.1f} MB), {there} were there"
