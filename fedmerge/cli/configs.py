"""``fedmerge configs`` and ``fedmerge demo``: the configurations that come with fedmerge."""

import argparse
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from fedmerge.cli.options import add_open, add_overrides, config_file

if TYPE_CHECKING:
    from fedmerge.cli.options import Commands

WIDTH = 120


def add_commands(commands: "Commands") -> None:
    """Add them to the parser."""
    demo = commands.add_parser("demo", help="run the bundled synthetic federation; a few minutes on two cores")
    add_overrides(demo)
    add_open(demo)
    demo.set_defaults(command=_demo)

    configs = commands.add_parser("configs", help="list, show or copy the configurations that come with fedmerge")
    configs.set_defaults(command=_list)
    parts = configs.add_subparsers(metavar="COMMAND")
    show = parts.add_parser("show", help="print a configuration, for example to a file of your own")
    show.add_argument("config", type=config_file, metavar="NAME")
    show.set_defaults(command=_show)
    copy = parts.add_parser("copy", help="copy all of them to a new folder; a benchmark names its experiment beside it")
    copy.add_argument("folder", type=Path, metavar="DIR", help="absent or empty")
    copy.set_defaults(command=_copy)


def _demo(options: argparse.Namespace) -> int:
    from fedmerge.cli.run import run_here
    from fedmerge.config import load_config, with_absolute_paths
    from fedmerge.installation import find_config, root

    config = with_absolute_paths(load_config(find_config("demo"), options.overrides), Path.cwd())
    return run_here(config, root(), then_open=options.open)


def _list(options: argparse.Namespace) -> int:
    from fedmerge.installation import shipped_configs, summary

    found = shipped_configs()
    width = max(map(len, found))
    for name, file in found.items():
        print(f"{name:{width}}  {textwrap.shorten(summary(file), WIDTH - width - 2, placeholder=' …')}")
    return 0


def _show(options: argparse.Namespace) -> int:
    from fedmerge.errors import ConfigError

    try:
        sys.stdout.write(options.config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{options.config}: cannot be read ({error}). 'fedmerge configs' lists the names.") from error
    return 0


def _copy(options: argparse.Namespace) -> int:
    from fedmerge.files import new_folder, write_bytes
    from fedmerge.installation import shipped_configs

    found = shipped_configs()
    with new_folder(options.folder) as partial:
        for name, file in found.items():
            target = partial / f"{name}.toml"
            target.parent.mkdir(exist_ok=True)
            write_bytes(target, file.read_bytes())
    print(f"{options.folder}: {len(found)} configurations; run one with: fedmerge run {options.folder / 'demo.toml'}")
    return 0
