"""``fedmerge export``."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedmerge.cli.options import adapter_config, add_domain, add_model, run_of
from fedmerge.encoder.export.formats import FORMATS

if TYPE_CHECKING:
    from fedmerge.cli.options import Commands
    from fedmerge.config import ExperimentConfig
    from fedmerge.encoder.export.probes import Deviation
    from fedmerge.serving.hub import Push


def add_commands(commands: "Commands") -> None:
    """Add the command to the parser."""
    export = commands.add_parser("export", help="merge an adapter into its backbone, as a model that needs no fedmerge")
    add_model(export)
    export.add_argument("out", type=Path, metavar="OUT", help="folder to create")
    add_domain(export, "with a run, the domain whose served model is exported", required=False)
    export.add_argument("--to", choices=FORMATS, default=FORMATS[0], help="format of the folder (default: %(default)s)")
    export.add_argument(
        "--int8", action="store_true", help="with onnx or openvino: weights of 8 bits, whose deviation is printed"
    )
    export.add_argument("--license", metavar="ID", help="licence for the model card, such as apache-2.0")
    hub = export.add_argument_group("Hugging Face hub")
    hub.add_argument(
        "--push", metavar="ORG/NAME", help="upload OUT to this repository, private unless --public is given"
    )
    visibility = hub.add_mutually_exclusive_group()
    visibility.add_argument("--public", action="store_true", help="everybody may read the repository; needs --license")
    visibility.add_argument(
        "--private", action="store_true", help="say it, for a model that must stay within the organisation"
    )
    export.set_defaults(command=_export)


@dataclass(frozen=True)
class _Exported:
    """What was written, for a person: what it is, why it must stay where it is if so, and its vectors."""

    what: str
    kept_for: str | None
    deviation: "Deviation"


def _export(options: argparse.Namespace) -> int:
    from fedmerge.encoder.export.formats import check_format

    check_format(options.to, options.int8)
    config, run, push = adapter_config(options), run_of(options), _push(options)
    exported = _export_adapter(options, config, push) if run is None else _export_served(options, run, config, push)
    print(f"{options.out}: {exported.what}; its README.md says how to use it")
    deviation = exported.deviation
    found = f"{deviation.num_texts} texts: 1 - cosine to fedmerge's own vectors is at most {deviation.largest:.1e}"
    if deviation.is_large:
        print(f"ATTENTION, {found}, more than {deviation.limit:g}: compare rankings before you use this folder.")
    else:
        print(f"Verified on {found}.")
    if exported.kept_for is not None:
        print(f"{exported.kept_for[0].upper()}{exported.kept_for[1:]}: keep the folder within the organisation.")
    if push is not None:
        from fedmerge import __version__
        from fedmerge.serving.hub import upload

        address = upload(options.out, push, f"fedmerge {__version__}: {exported.what}")
        print(f"Uploaded to {address}, which is {'public' if push.public else 'private'}.")
    return 0


def _export_adapter(options: argparse.Namespace, config: "ExperimentConfig", push: "Push | None") -> _Exported:
    from fedmerge.config import ATTRIBUTES
    from fedmerge.encoder.adapted import load_adapted
    from fedmerge.encoder.export.folder import export_model, provenance_of
    from fedmerge.report.run.model_card import sections_of_adapter

    folder = None if options.adapter == "none" else Path(options.adapter)
    is_expert = folder is not None and provenance_of(folder).get("method") == "expert"
    kept = f"it is the expert of {folder.resolve().name} alone" if folder is not None and is_expert else None
    _check(options, push, kept)
    backbone, adapter = load_adapted(options.adapter, config)
    deviation = export_model(
        backbone,
        adapter,
        options.out,
        config.text,
        {"method": "backbone alone"} if folder is None else provenance_of(folder),
        to=options.to,
        int8=options.int8,
        template=config.domains.attributes or ATTRIBUTES,
        license=options.license,
        sections="" if folder is None else sections_of_adapter(folder),
    )
    return _Exported(f"{backbone.name} merged with {options.adapter}", kept, deviation)


def _export_served(
    options: argparse.Namespace, run: Path, config: "ExperimentConfig", push: "Push | None"
) -> _Exported:
    from fedmerge.errors import ConfigError

    if options.domain is None:
        raise ConfigError(
            f"export: {run} is a run, which serves each domain its own model; found no --domain. Give --domain DIR, "
            "or the folder of a merge."
        )

    from fedmerge.serving.export import export_served, kept_for
    from fedmerge.serving.model import load_served, open_run

    place = open_run(run, options.domain, config)
    served = load_served(place, options.model)
    kept, decision = kept_for(place, served), served.decision
    _check(options, push, kept)
    deviation = export_served(place, served, options.out, to=options.to, int8=options.int8, license=options.license)
    return _Exported(f"what {place.manifest.name} is served: {decision.model} ({decision.reason})", kept, deviation)


def _push(options: argparse.Namespace) -> "Push | None":
    from fedmerge.errors import ConfigError
    from fedmerge.serving.hub import Push

    if options.push is None:
        if options.public or options.private:
            raise ConfigError("export: found --public or --private without --push. Give --push ORG/NAME, or neither.")
        return None
    return Push(options.push, options.public)


def _check(options: argparse.Namespace, push: "Push | None", kept: str | None) -> None:
    """Check, before anything is written, that the export may be uploaded and that the hub takes it."""
    from fedmerge.files import check_free
    from fedmerge.serving.hub import check_repository, check_sharing

    check_free(options.out)
    if push is not None:
        check_sharing(push, options.private, options.license, kept)
        check_repository(push)
