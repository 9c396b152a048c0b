"""``fedmerge evaluate``."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmerge.cli.options import adapter_config, add_domain, add_model, run_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fedmerge.cli.options import Commands
    from fedmerge.client.baselines.rankers import Ranker
    from fedmerge.evaluation.sums import MetricSums, Variant


def add_commands(commands: "Commands") -> None:
    """Add the command to the parser."""
    evaluate = commands.add_parser("evaluate", help="evaluate an adapter, or the models of a run, on a domain")
    add_model(evaluate)
    add_domain(evaluate, "a domain folder")
    evaluate.add_argument("--split", choices=("valid", "test"), default="valid")
    evaluate.add_argument("--max-users", type=int, default=None, help="users to evaluate (default: all)")
    evaluate.add_argument(
        "--baselines",
        default=None,
        metavar="NAME,…",
        help="baselines: popularity, last-item, item-knn, sasrec (default: evaluation.baselines)",
    )
    evaluate.add_argument("--json", action="store_true", help="machine-readable output")
    evaluate.set_defaults(command=_evaluate)


def _evaluate(options: argparse.Namespace) -> int:
    if options.baselines is not None:
        options.overrides = [*options.overrides, f"evaluation.baselines={options.baselines}"]
    config = adapter_config(options)

    import torch

    from fedmerge.client.baselines.rankers import BASELINE_LABELS, baseline_rankers
    from fedmerge.client.evaluate import evaluate
    from fedmerge.client.local_domain import LocalDomain, open_domain
    from fedmerge.encoder.adapted import load_adapted
    from fedmerge.evaluation.sums import BACKBONE
    from fedmerge.report.tables import result_rows, results_table
    from fedmerge.serving.evaluate import evaluate_run
    from fedmerge.serving.model import open_run

    torch.set_num_threads(config.runtime.server_threads)

    def progress(line: str) -> None:
        print(line, file=sys.stderr)

    def rankers(domain: LocalDomain) -> "dict[str, Ranker]":
        names = config.evaluation.baselines
        return baseline_rankers(domain, names, config.evaluation, config.seed, config.cache_dir, progress)

    run, decision = run_of(options), None
    if run is None:
        backbone, adapter = load_adapted(options.adapter, config)
        name, taken = Path(options.adapter).resolve().name, {BACKBONE, *BASELINE_LABELS.values()}
        label = BACKBONE if adapter is None else f"adapter {name}" if name in taken else name
        domain = open_domain(options.domain, backbone, config.text)
        sums: Mapping[Variant, MetricSums] = evaluate(
            domain, {label: adapter}, options.split, options.max_users, config.seed, rankers(domain)
        )
    else:
        place = open_run(run, options.domain, config)
        domain, backbone = place.local, place.backbone
        found = evaluate_run(place, options.split, options.max_users, options.model, rankers(domain), progress)
        sums, decision = found.sums, found.decision
    name = domain.manifest.name
    if options.json:
        result: dict[str, Any] = {
            "domain": name,
            "split": options.split,
            "synthetic": domain.manifest.synthetic,
            "precision": backbone.compute.precision,
        }
        if decision is not None:
            result |= {"run": str(decision.run), "model": decision.model, "reason": decision.reason}
        for variant, s in sums.items():
            result[variant] = {"num_users": s.num_users, "methods": s.metrics_by_method()}
        print(json.dumps(result, indent=2))
        return 0
    if decision is not None:
        print(f"served: {decision.model} ({decision.reason})")
    for variant, of_variant in sums.items():
        rows = result_rows({name: of_variant}, {name: "train"})
        print(results_table(rows, variant=variant, split=options.split, synthetic=domain.manifest.synthetic))
    return 0
