"""``fedmerge export``."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fedmerge.cli.options import adapter_config, add_model, run_of
from fedmerge.encoder.export.formats import FORMATS

if TYPE_CHECKING:
    from fedmerge.cli.options import Commands
    from fedmerge.config import ExperimentConfig
    from fedmerge.encoder.export.probes import Deviation


def add_commands(commands: "Commands") -> None:
    """Add the command to the parser."""
    export = commands.add_parser("export", help="merge an adapter into its backbone, as a model that needs no fedmerge")
    add_model(export)
    export.add_argument("out", type=Path, metavar="OUT", help="folder to create")
    export.add_argument(
        "--domain", type=Path, metavar="DIR", help="with a run, the domain whose served model is exported"
    )
    export.add_argument("--to", choices=FORMATS, default=FORMATS[0], help="format of the folder (default: %(default)s)")
    export.add_argument("--int8", action="store_true", help="with onnx or openvino: weights of 8 bits; see docs")
    export.set_defaults(command=_export)


def _export(options: argparse.Namespace) -> int:
    config, run = adapter_config(options), run_of(options)
    if run is not None:
        return _export_served(options, run, config)

    from fedmerge.config import ATTRIBUTES
    from fedmerge.encoder.adapted import load_adapted
    from fedmerge.encoder.export.folder import export_model, provenance_of

    backbone, adapter = load_adapted(options.adapter, config)
    provenance = {"method": "backbone alone"} if adapter is None else provenance_of(Path(options.adapter))
    template = config.domains.attributes or ATTRIBUTES
    deviation = export_model(
        backbone, adapter, options.out, config.text, provenance, to=options.to, int8=options.int8, template=template
    )
    print(f"{options.out}: {backbone.name} merged with {options.adapter}; its README.md says how to use it")
    _say(deviation)
    return 0


def _export_served(options: argparse.Namespace, run: Path, config: "ExperimentConfig") -> int:
    from fedmerge.errors import ConfigError

    if options.domain is None:
        raise ConfigError(
            f"export: {run} is a run, which serves each domain its own model; found no --domain. Give --domain DIR, "
            "or the folder of a merge."
        )

    from fedmerge.evaluation.sums import PERSONAL
    from fedmerge.serving.decision import VECTORS_OF
    from fedmerge.serving.export import export_served
    from fedmerge.serving.model import load_served, open_run

    place = open_run(run, options.domain, config)
    served = load_served(place, options.model)
    deviation = export_served(place, served, options.out, to=options.to, int8=options.int8)
    print(f"{options.out}: what {place.manifest.name} is served: {served.decision.model} ({served.decision.reason})")
    _say(deviation)
    if served.decision.model in VECTORS_OF:
        print(f"Its head was trained on the users of {place.manifest.name}: keep the folder within the organisation.")
    elif served.decision.model == PERSONAL:
        print(f"It was fitted to the users of {place.manifest.name}: keep the folder within the organisation.")
    return 0


def _say(deviation: "Deviation") -> None:
    found = f"{deviation.num_texts} texts: 1 - cosine to fedmerge's own vectors is at most {deviation.largest:.1e}"
    if deviation.is_large:
        print(f"ATTENTION, {found}, more than {deviation.limit:g}: compare rankings before you use this folder.")
    else:
        print(f"Verified on {found}.")
