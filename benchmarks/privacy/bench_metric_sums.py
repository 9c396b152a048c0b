"""Utility of suppressed and noised metric sums on real domains, against exact ones on the same users.

    python benchmarks/privacy/bench_metric_sums.py data/amazon Beauty Pantry Toys

Four rows that need no training (the backbone's text ranking, last item, popularity, item-knn) are evaluated once on
each domain's validation users, so test stays unread. Their outcomes are then disclosed in every way, noised ones with
many draws. For each number of users and each disclosure the table gives, as means over domains:

    error       root mean square error of NDCG@10, relative to its exact mean over the same users
    half-width  of the 95 % interval of a mean, and of the paired difference between the two best rows
    selected    share of draws that select the row that exact sums select
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fedmerge.client.baselines.rankers import baseline_rankers
from fedmerge.client.evaluate import outcomes
from fedmerge.client.local_domain import open_domain
from fedmerge.config import Baseline, ExperimentConfig, load_config
from fedmerge.device import resolve_compute
from fedmerge.domain.splits import evaluation_examples
from fedmerge.encoder.backbone import load_backbone
from fedmerge.evaluation.ranks import FloatArray
from fedmerge.evaluation.sums import BACKBONE, MetricSums, estimate_mean, metric_sums, paired_difference
from fedmerge.privacy.dp.randomness import source
from fedmerge.privacy.metric_sums import add_noise_to_sums, suppress

METRIC = "ndcg@10"
NOISE_MULTIPLIERS = (2.0, 4.0, 8.0)
BASELINES: tuple[Baseline, ...] = ("last-item", "popularity", "item-knn")
MIN_USERS = 20


def outcomes_of(folder: Path, config: ExperimentConfig, max_users: int) -> dict[str, FloatArray]:
    """Return row -> (U, M) unmasked outcomes of validation users in a random order."""
    backbone = load_backbone(
        config.backbone.source,
        config.backbone.pooling,
        resolve_compute("cpu", "float32"),
        config.backbone.weights_sha256,
    )
    domain = open_domain(folder, backbone, config.text)
    examples = evaluation_examples(domain.interactions, "valid", max_users, config.seed)
    rankers = baseline_rankers(domain, BASELINES, config.evaluation, config.seed, config.cache_dir, print)
    found = outcomes(domain, {BACKBONE: None}, examples, rankers, print)["unmasked"]
    order = np.random.default_rng(config.seed).permutation(len(examples))
    return {name: of_row[order] for name, of_row in found.items()}


def best(sums: MetricSums) -> list[str]:
    """Return the rows from the best to the worst; withheld ones last."""
    return sorted(sums.methods, key=lambda row: -np.nan_to_num(sums.mean(row, METRIC), nan=-1.0))


def measured(exact: MetricSums, draws: Sequence[MetricSums]) -> tuple[float, float, float, float]:
    """Return relative error, half-widths of a mean and of a difference, and the share of right selections."""
    first, second = best(exact)[:2]
    truth = exact.mean(first, METRIC)
    errors = [drawn.mean(first, METRIC) / truth - 1 for drawn in draws]
    means = [estimate_mean(drawn, first, METRIC) for drawn in draws]
    differences = [paired_difference(drawn, first, second, METRIC) for drawn in draws]
    return (
        float(np.sqrt(np.mean(np.square(errors)))),
        float(np.mean([found.high - found.mean for found in means])),
        float(np.mean([found.high - found.mean for found in differences])),
        float(np.mean([best(drawn)[0] == first for drawn in draws])),
    )


def rows(found: Mapping[str, Mapping[str, FloatArray]], num_users: int, num_draws: int) -> dict[str, list[float]]:
    """Return disclosure -> its numbers, as means over the domains with so many users."""
    by_disclosure: dict[str, list[tuple[float, float, float, float]]] = {}
    for domain, of_domain in found.items():
        some = {row: of_row[:num_users] for row, of_row in of_domain.items()}
        if len(next(iter(some.values()))) < num_users:
            continue
        exact = metric_sums(some, "unmasked")
        drawn = {"exact": [exact], "suppressed": [suppress(some, "unmasked", MIN_USERS)]}
        for noise in NOISE_MULTIPLIERS:
            drawn[f"noised {noise:g}"] = [
                add_noise_to_sums(some, "unmasked", noise, source("seeded", seed, domain)) for seed in range(num_draws)
            ]
        for disclosure, draws in drawn.items():
            by_disclosure.setdefault(disclosure, []).append(measured(exact, draws))
    return {name: np.mean(numbers, axis=0).tolist() for name, numbers in by_disclosure.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder of domain folders")
    parser.add_argument("domains", nargs="+")
    parser.add_argument("--config", type=Path, default=Path("configs/amazon3.toml"))
    parser.add_argument("--users", default="300,1000,4000")
    parser.add_argument("--draws", type=int, default=200)
    options = parser.parse_args()
    numbers = [int(number) for number in options.users.split(",")]
    config = load_config(options.config)
    found = {name: outcomes_of(options.root / name, config, max(numbers)) for name in options.domains}
    for name, of_domain in found.items():
        exact = metric_sums(of_domain, "unmasked")
        print(
            f"{name}: {exact.num_users} users; "
            + ", ".join(f"{row} {exact.mean(row, METRIC):.4f}" for row in best(exact))
        )
    print("\n| users | metric sums | error | half-width, mean | half-width, difference | selected |")
    print("| --- | --- | --- | --- | --- | --- |")
    for num_users in numbers:
        for disclosure, (error, of_mean, of_difference, selected) in rows(found, num_users, options.draws).items():
            print(
                f"| {num_users:,} | {disclosure} | {error:.1%} | {of_mean:.4f} | {of_difference:.4f} | {selected:.0%} |"
            )


if __name__ == "__main__":
    main()
