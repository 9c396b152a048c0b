"""Study: the expert contrasted with its own backbone at serving time, (1 + a) S_expert - a S_backbone; a probe.

    python benchmarks/studies/study_serving_contrast.py configs/demo.toml RUN/adapters
    python benchmarks/studies/study_serving_contrast.py configs/amazon3.toml RUN/adapters --set domains.root=DOMAINS

CONFIG is the experiment file of the run, ADAPTERS its folder with a PEFT adapter per domain, DOMAINS another folder of
the domains. Nothing is trained. Serving would need both encoders, twice the cost, so this only asks how much there is
to gain. One half of a domain's validation users selects its weight a, by NDCG@10, unmasked; the other half is reported,
with paired 95 % intervals of the difference to the expert. Intervals are not corrected for the number of weights. Test
is never read.

Source: Taesar-style, after arXiv:2602.22743, which contrasts decoders of one mixed model.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from study_adapter_under_head import halves, vectors_of

from fedmerge.bench.ranking import backbone_of
from fedmerge.client.local_domain import LocalDomain, open_domain
from fedmerge.config import load_config
from fedmerge.domain.demo import domains_root
from fedmerge.domain.splits import Examples, evaluation_examples
from fedmerge.encoder.lora import applied
from fedmerge.encoder.peft.folder import read_verified
from fedmerge.evaluation.ranks import METRICS, SELECTION_METRIC, IntArray, per_user_metrics, rank_targets
from fedmerge.evaluation.sums import VARIANTS, Variant, metric_sums, paired_difference
from fedmerge.files import write_json

WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.5, 1.0)
REPORTED = ("recall@10", "ndcg@10")
Scored = tuple[torch.Tensor, torch.Tensor]  # vectors of users (U, d) and of items (N, d) under one model


def main(arguments: Sequence[str] | None = None) -> None:
    """Rank the users of every domain under every weight, and print the rows."""
    options = _options(arguments)
    config = load_config(options.config, options.set)
    torch.set_num_threads(config.runtime.server_threads)
    backbone = backbone_of(config.backbone, config.runtime)
    root, weights = domains_root(config.domains.root, config.cache_dir), sorted({0.0, *options.weights})
    found: dict[str, Any] = {}
    for name in sorted(config.domains.train):
        domain = open_domain(Path(root) / name, backbone, config.text)
        examples = halves(evaluation_examples(domain.interactions, "valid", options.users or None, config.seed))
        under = []
        for adapter in (read_verified(options.adapters / name), None):
            with applied(backbone, adapter):
                items, users = vectors_of(domain, examples)
            under.append([(of_half, items) for of_half in users])
        select, report = ((expert, plain, of) for expert, plain, of in zip(*under, examples, strict=True))
        scores = {weight: _selection(*select, weight) for weight in weights}
        chosen = max(weights, key=lambda weight: (scores[weight], -abs(weight)))
        found[name] = {"chosen": chosen, "select": scores, "report": _rows(domain, report, weights, chosen)}
    if options.out:
        write_json(options.out, {"split": "valid", "users": options.users, "seed": config.seed, "domains": found})


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("adapters", type=Path)
    parser.add_argument("--weights", nargs="+", type=float, default=WEIGHTS, metavar="A", help="of the contrast")
    parser.add_argument("--users", type=int, default=4000, help="validation users a domain, both halves; 0: all")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="change the experiment")
    parser.add_argument("--out", type=Path, help="JSON file of the rows")
    return parser.parse_args(arguments)


def contrasted_ranks(expert: Scored, backbone: Scored, weight: float, examples: Examples, masked: bool) -> IntArray:
    """Rank the targets by (1 + a) S_expert - a S_backbone, as inner products of the vectors side by side."""
    (users, items), (plain_users, plain_items) = expert, backbone
    if weight:
        users = torch.cat([(1 + weight) * users, -weight * plain_users], dim=1)  # (U, 2d)
        items = torch.cat([items, plain_items], dim=1)  # (N, 2d)
    return rank_targets(users, items, examples.targets, examples.histories if masked else None)


def _selection(expert: Scored, backbone: Scored, examples: Examples, weight: float) -> float:
    outcomes = per_user_metrics(contrasted_ranks(expert, backbone, weight, examples, masked=False))
    return float(outcomes[:, METRICS.index(SELECTION_METRIC)].mean())


def _rows(
    domain: LocalDomain, report: tuple[Scored, Scored, Examples], weights: Sequence[float], chosen: float
) -> dict[Variant, Mapping[str, Any]]:
    """Print and return the rows of one domain's other half of users."""
    rows: dict[Variant, Mapping[str, Any]] = {}
    expert, backbone, examples = report
    for variant in VARIANTS:
        ranks = {f"{a:g}": contrasted_ranks(expert, backbone, a, examples, variant == "masked") for a in weights}
        sums = metric_sums({label: per_user_metrics(of_label) for label, of_label in ranks.items()}, variant)
        of_variant = {}
        for label in ranks:
            gains = {metric: paired_difference(sums, label, "0", metric) for metric in REPORTED}
            of_variant[label] = {
                metric: [sums.mean(label, metric), gain.mean, gain.low, gain.high] for metric, gain in gains.items()
            }
            cells = [
                f"{metric} {sums.mean(label, metric):.4f} ({gain.mean:+.4f}, {gain.low:+.4f} to {gain.high:+.4f})"
                for metric, gain in gains.items()
            ]
            mark = " selected" if float(label) == chosen else ""
            print(domain.manifest.name, variant, f"a = {label}{mark}", *cells, sep=" | ", flush=True)
        rows[variant] = of_variant
    return rows


if __name__ == "__main__":
    main()
