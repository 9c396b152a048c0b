"""The command line. Nothing heavy is imported before a command needs it."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedmerge import __version__
from fedmerge.errors import FedMergeError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 on success, 1 when something went wrong (with a message on standard error), 2 for wrong usage.
    """
    options = _parser().parse_args(arguments)
    try:
        code = int(options.command(options))
        sys.stdout.flush()
        return code
    except FedMergeError as error:
        print(f"fedmerge: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # whoever reads, `head` say, has had enough; Python's own last flush must not fail, too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("fedmerge: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fedmerge", description="Build one recommender together, without sharing user data."
    )
    parser.add_argument("--version", action="version", version=f"fedmerge {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run an experiment through Flower's simulation engine")
    run.add_argument("config", type=Path, help="experiment file, for example configs/demo.toml")
    run.add_argument(
        "--set", dest="overrides", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="change settings"
    )
    run.add_argument(
        "--app", type=Path, default=None, help="folder with pyproject.toml and sim/ (default: the installed checkout)"
    )
    run.set_defaults(command=_run)

    check = commands.add_parser("check", help="validate an experiment file without running it")
    check.add_argument("config", type=Path)
    check.add_argument("--set", dest="overrides", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    check.set_defaults(command=_check)

    data = commands.add_parser("data", help="make and look at domain folders").add_subparsers(
        required=True, metavar="ACTION"
    )
    importer = data.add_parser("import", help="import a domain").add_subparsers(required=True, metavar="FORMAT")
    mergerec = importer.add_parser(
        "mergerec", help="train.json, val.json, test.json, meta_data.json, smap.json, umap.json"
    )
    mergerec.add_argument("source", type=Path, metavar="SRC")
    mergerec.add_argument(
        "destination", type=Path, metavar="DST", help="folder of domain folders; the domain goes into DST/NAME"
    )
    mergerec.add_argument("--name", default=None, help="the domain's name (default: that of SRC)")
    mergerec.add_argument("--overwrite", action="store_true", help="replace the domain if it exists")
    mergerec.add_argument("--private-catalog", action="store_true", help="the catalog must not leave the client either")
    mergerec.set_defaults(command=_import_mergerec)
    demo = data.add_parser("demo", help="write the bundled synthetic domains")
    demo.add_argument("destination", type=Path, metavar="DST", help="folder for the domain folders")
    demo.add_argument("--num-domains", type=int, default=8)
    demo.add_argument("--overwrite", action="store_true")
    demo.set_defaults(command=_demo)
    info = data.add_parser("info", help="counts, lengths, density, text coverage, problems")
    info.add_argument("folder", type=Path, metavar="DST", help="a domain folder, or a folder of them")
    info.set_defaults(command=_info)

    evaluate = commands.add_parser("evaluate", help="evaluate an adapter on a domain")
    evaluate.add_argument("adapter", help="a PEFT folder, or 'none' for the backbone alone")
    evaluate.add_argument("--domain", type=Path, required=True, metavar="DIR")
    evaluate.add_argument("--split", choices=("valid", "test"), default="valid")
    evaluate.add_argument("--max-users", type=int, default=None, help="default: all")
    evaluate.add_argument(
        "--config",
        type=Path,
        default=None,
        help="experiment file for backbone, text and runtime (default: that of the run the adapter lies in)",
    )
    evaluate.add_argument("--set", dest="overrides", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    evaluate.add_argument("--json", action="store_true", help="machine-readable output")
    evaluate.set_defaults(command=_evaluate)
    return parser


def _run(options: argparse.Namespace) -> int:
    from fedmerge.config import load_config, with_absolute_paths

    config = with_absolute_paths(load_config(options.config, options.overrides), Path.cwd())

    from sim.run import run_experiment

    return run_experiment(config, options.app or Path(__file__).resolve().parent.parent)


def _check(options: argparse.Namespace) -> int:
    from fedmerge.config import load_config

    config = load_config(options.config, options.overrides)
    domains = f"{len(config.domains.train)} training and {len(config.domains.unseen)} unseen domains"
    print(
        f"{options.config}: valid ({config.name}: {domains}, methods {', '.join(config.merge.methods)}, "
        f"seed {config.seed})"
    )
    return 0


def _import_mergerec(options: argparse.Namespace) -> int:
    from fedmerge.domain.importers.mergerec import import_mergerec

    manifest = import_mergerec(
        options.source,
        options.destination,
        name=options.name,
        overwrite=options.overwrite,
        public_catalog=not options.private_catalog,
    )
    print(
        f"{options.destination / manifest.name}: {manifest.num_users} users, {manifest.num_items} items, "
        f"{manifest.num_interactions} interactions"
    )
    return 0


def _demo(options: argparse.Namespace) -> int:
    from fedmerge.domain.demo import write_demo

    names = write_demo(options.destination, num_domains=options.num_domains, overwrite=options.overwrite)
    shown = ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
    print(f"{options.destination}: {len(names)} synthetic domains: {shown}")
    return 0


def _info(options: argparse.Namespace) -> int:
    from fedmerge.domain.folder import list_domains
    from fedmerge.domain.manifest import MANIFEST_FILE
    from fedmerge.report.domains import domain_text

    is_domain = (options.folder / MANIFEST_FILE).exists() or not options.folder.is_dir()
    folders = [options.folder] if is_domain else [options.folder / name for name in list_domains(options.folder)]
    if not folders:
        print(
            f"fedmerge: {options.folder}: no domain folder in it. "
            "Make some with 'fedmerge data demo' or 'fedmerge data import'.",
            file=sys.stderr,
        )
        return 1
    print("\n\n".join(domain_text(folder) for folder in folders))
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from fedmerge.config import load_config

    config = load_config(options.config or _config_of_run(options.adapter), options.overrides)

    import torch

    from fedmerge.client.evaluate import BACKBONE, LAST_ITEM, POPULARITY, evaluate
    from fedmerge.client.local_domain import open_domain
    from fedmerge.device import resolve_compute
    from fedmerge.encoder.backbone import load_backbone
    from fedmerge.encoder.lora import read_adapter
    from fedmerge.report.tables import result_rows, results_table

    torch.set_num_threads(config.runtime.server_threads)
    adapter = None if options.adapter == "none" else read_adapter(Path(options.adapter))
    name = Path(options.adapter).resolve().name
    label = BACKBONE if adapter is None else f"adapter {name}" if name in (BACKBONE, POPULARITY, LAST_ITEM) else name
    compute = resolve_compute(config.runtime.device, config.runtime.precision)
    backbone = load_backbone(config.backbone.source, config.backbone.pooling, compute, config.backbone.weights_sha256)
    domain = open_domain(options.domain, backbone, config.text)
    sums = evaluate(domain, {label: adapter}, options.split, options.max_users, config.seed, baselines=True)
    name = domain.manifest.name
    if options.json:
        result: dict[str, Any] = {
            "domain": name,
            "split": options.split,
            "synthetic": domain.manifest.synthetic,
            "precision": compute.precision,
        }
        for variant, s in sums.items():
            result[variant] = {"num_users": s.num_users, "methods": s.metrics_by_method()}
        print(json.dumps(result, indent=2))
        return 0
    for variant, of_variant in sums.items():
        rows = result_rows({name: of_variant}, {name: "train"})
        print(results_table(rows, variant=variant, split=options.split, synthetic=domain.manifest.synthetic))
    return 0


def _config_of_run(adapter: str) -> Path | None:
    """``runs/<id>/config.toml`` for an adapter in ``runs/<id>/merged/<label>`` or ``runs/<id>/adapters/<domain>``."""
    path = Path(adapter).resolve().parent.parent / "config.toml"
    return path if adapter != "none" and path.is_file() else None


if __name__ == "__main__":
    sys.exit(main())
