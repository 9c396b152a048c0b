"""``fedmerge export``."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fedmerge.cli.options import adapter_config, add_adapter

if TYPE_CHECKING:
    from fedmerge.cli.options import Commands


def add_commands(commands: "Commands") -> None:
    """Add the command to the parser."""
    export = commands.add_parser("export", help="merge an adapter into its backbone, as a sentence-transformers model")
    add_adapter(export)
    export.add_argument("out", type=Path, metavar="OUT", help="folder to create")
    export.set_defaults(command=_export)


def _export(options: argparse.Namespace) -> int:
    config = adapter_config(options)

    from fedmerge.encoder.adapted import load_adapted
    from fedmerge.encoder.export import export_model, provenance_of

    backbone, adapter = load_adapted(options.adapter, config)
    provenance = {"method": "backbone alone"} if adapter is None else provenance_of(Path(options.adapter))
    export_model(backbone, adapter, options.out, config.text, provenance)
    print(
        f"{options.out}: {backbone.name} merged with {options.adapter}; load it with "
        f"SentenceTransformer({str(options.out)!r})"
    )
    return 0
