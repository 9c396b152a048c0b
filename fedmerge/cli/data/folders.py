"""``fedmerge data``: create and inspect domain folders."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fedmerge.cli.data import changes
from fedmerge.cli.data.imports import add_importers

if TYPE_CHECKING:
    from fedmerge.cli.options import Commands


def add_commands(commands: "Commands") -> None:
    """Add the commands to the parser."""
    data = commands.add_parser("data", help="create and inspect domain folders").add_subparsers(
        required=True, metavar="ACTION"
    )
    add_importers(data)
    changes.add_commands(data)
    demo = data.add_parser("demo", help="write the bundled synthetic domains")
    demo.add_argument("destination", type=Path, metavar="DST", help="folder for the domain folders")
    demo.add_argument("--num-domains", type=int, help="1 to 1000 (default: the bundled ones)")
    demo.add_argument("--num-users", type=int, help="users per domain (default: 600; 150 of small shops)")
    demo.add_argument("--num-items", type=int, default=400, help="items per domain, 20 to 20000 (default: 400)")
    demo.add_argument("--overwrite", action="store_true")
    demo.set_defaults(command=_demo)
    backbone = data.add_parser("demo-backbone", help="write a tiny text encoder with random weights, to try things out")
    backbone.add_argument(
        "destination", type=Path, metavar="DST", help="folder for the encoder; use it as backbone.source"
    )
    backbone.set_defaults(command=_demo_backbone)
    cut = data.add_parser("cut", help="write a domain with a share of its users and the whole catalog")
    cut.add_argument("source", type=Path, metavar="SRC", help="a domain folder")
    cut.add_argument("destination", type=Path, metavar="DST", help="folder for the new domain folder")
    cut.add_argument("--share", type=float, required=True, help="share of the users to keep, as 0.05")
    cut.add_argument("--seed", type=int, default=0, help="seed of the draw (default: 0)")
    cut.add_argument("--overwrite", action="store_true")
    cut.set_defaults(command=_cut)
    info = data.add_parser("info", help="show a domain's counts, lengths, density, text coverage and problems")
    info.add_argument("folder", type=Path, metavar="DST", help="a domain folder, or a folder of them")
    info.set_defaults(command=_info)


def _demo(options: argparse.Namespace) -> int:
    from fedmerge.domain.demo import write_demo

    names = write_demo(
        options.destination,
        num_domains=options.num_domains,
        num_users=options.num_users,
        num_items=options.num_items,
        overwrite=options.overwrite,
    )
    shown = ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
    print(f"{options.destination}: {len(names)} synthetic domains: {shown}")
    return 0


def _demo_backbone(options: argparse.Namespace) -> int:
    from fedmerge.encoder.demo_backbone import NOTE, write_demo_backbone

    print(f"{write_demo_backbone(options.destination)}: {NOTE}")
    return 0


def _cut(options: argparse.Namespace) -> int:
    from fedmerge.domain.cut import cut_domain

    made = cut_domain(options.source, options.destination, options.share, options.seed, options.overwrite)
    folder = options.destination / made.name
    print(f"{folder}: {made.num_users} users, {made.num_interactions} interactions, {made.num_items} items")
    return 0


def _info(options: argparse.Namespace) -> int:
    from fedmerge.domain.folder import list_domains
    from fedmerge.domain.manifest import MANIFEST_FILE
    from fedmerge.report.domains import domain_text

    is_domain = (options.folder / MANIFEST_FILE).exists() or not options.folder.is_dir()
    folders = [options.folder] if is_domain else [options.folder / name for name in list_domains(options.folder)]
    if not folders:
        print(
            f"fedmerge: {options.folder}: found no domain folders. "
            "Create them with 'fedmerge data demo' or 'fedmerge data import'.",
            file=sys.stderr,
        )
        return 1
    print("\n\n".join(domain_text(folder) for folder in folders))
    return 0
