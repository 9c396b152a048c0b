"""``fedmerge evaluate``."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmerge.cli.options import add_overrides

if TYPE_CHECKING:
    from fedmerge.cli.options import Commands


def add_commands(commands: "Commands") -> None:
    """Add it to the parser."""
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
    evaluate.add_argument(
        "--baselines",
        default=None,
        metavar="NAME,…",
        help="reference rows: popularity, last-item, item-knn, sasrec (default: evaluation.baselines)",
    )
    add_overrides(evaluate)
    evaluate.add_argument("--json", action="store_true", help="machine-readable output")
    evaluate.set_defaults(command=_evaluate)


def _evaluate(options: argparse.Namespace) -> int:
    from fedmerge.config import load_config

    chosen = [] if options.baselines is None else [f"evaluation.baselines={options.baselines}"]
    config = load_config(options.config or _config_of_run(options.adapter), [*options.overrides, *chosen])

    import torch

    from fedmerge.client.baselines import BASELINE_LABELS, baseline_rankers
    from fedmerge.client.evaluate import BACKBONE, evaluate
    from fedmerge.client.local_domain import open_domain
    from fedmerge.device import resolve_compute
    from fedmerge.encoder.backbone import load_backbone
    from fedmerge.encoder.lora import read_adapter
    from fedmerge.report.tables import result_rows, results_table

    torch.set_num_threads(config.runtime.server_threads)
    adapter = None if options.adapter == "none" else read_adapter(Path(options.adapter))
    name, taken = Path(options.adapter).resolve().name, {BACKBONE, *BASELINE_LABELS.values()}
    label = BACKBONE if adapter is None else f"adapter {name}" if name in taken else name
    compute = resolve_compute(config.runtime.device, config.runtime.precision)
    backbone = load_backbone(config.backbone.source, config.backbone.pooling, compute, config.backbone.weights_sha256)
    domain = open_domain(options.domain, backbone, config.text)
    baselines = baseline_rankers(domain, config, config.evaluation.baselines, lambda line: print(line, file=sys.stderr))
    sums = evaluate(domain, {label: adapter}, options.split, options.max_users, config.seed, baselines)
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
