"""Study: do augmented histories or an auxiliary loss make a better expert, at equal encodings?

    python benchmarks/studies/study_augmentation.py configs/demo.toml
    python benchmarks/studies/study_augmentation.py configs/amazon3.toml --set domains.root=FOLDER --out rows.json

Rows of one seed: the expert of the configuration; histories with inserted and substituted items, which cost no
encoding; and the losses sp and coserec, which encode each history twice more, at half the steps and validations. Half
the steps alone are their control. Test is never read: some validation users end the trainings, others are reported, and
every row is compared with the expert over the same users. A row is worth a second seed if the mean over domains gains
at least .0005 NDCG@10. Experts are cached as those of a run, so an interrupted study goes on where it ended.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedmerge.bench.ranking import domain_of
from fedmerge.client.cache.experts import load_or_train_expert
from fedmerge.client.evaluate import outcomes
from fedmerge.client.local_domain import LocalDomain
from fedmerge.client.training.settings import training_settings
from fedmerge.config import ExperimentConfig, load_config
from fedmerge.domain.splits import Examples, evaluated_users, evaluation_examples, examples_of
from fedmerge.evaluation.sums import (
    VARIANTS,
    MetricSums,
    Variant,
    metric_sums,
    paired_difference,
    paired_difference_of_mean,
)
from fedmerge.files import write_json
from fedmerge.seeding import generator

PLAIN, METRIC, WORTH_A_SEED = "expert", "ndcg@10", 0.0005
ROWS: dict[str, tuple[dict[str, Any], int]] = {  # row -> changes of [train], and by how much steps are divided
    PLAIN: ({}, 1),
    "insert .3, substitute .1, half the users": ({"augment": ("insert=0.3", "substitute=0.1")}, 1),
    "half the steps": ({}, 2),
    "sp .1, half the steps": ({"objectives": ("sp=0.1",)}, 2),
    "coserec .1, half the steps": ({"objectives": ("coserec=0.1",)}, 2),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Train every row in every domain and print the differences."""
    options = _options(arguments)
    config = load_config(options.config, options.set)
    if config.train.max_steps is None:
        raise SystemExit("train.max_steps is 'none', but rows are compared at equal steps. Set train.max_steps.")
    torch.set_num_threads(config.runtime.threads_per_client)
    found: dict[Variant, list[MetricSums]] = {variant: [] for variant in VARIANTS}
    for name in config.domains.train:
        for variant, sums in _of_domain(config, name, options.rows, options.users).items():
            found[variant].append(sums)
    tables: dict[str, dict[str, Any]] = {}
    for variant, of_domains in found.items():
        print(f"\n{variant}, {METRIC}, minus the expert's, in brackets the interval of 95 %")
        tables[variant] = {row: _differences(config, of_domains, row) for row in of_domains[0].methods if row != PLAIN}
        for row, cells in tables[variant].items():
            mean = cells["mean"]
            worth = "" if mean[0] >= WORTH_A_SEED else f"; below {WORTH_A_SEED}, no second seed"
            print(
                row,
                *(f"{where} {d:+.4f} [{low:+.4f}, {high:+.4f}]" for where, (d, low, high) in cells.items()),
                sep=" | ",
                end=f"{worth}\n",
            )
    if options.out:
        write_json(options.out, {"seed": config.seed, "differences": tables})


def _of_domain(config: ExperimentConfig, name: str, rows: Sequence[str], users: int) -> dict[Variant, MetricSums]:
    """Train a domain's rows and rank validation users whom no training has read."""
    domain = domain_of(config, name)
    stopping_users, examples = stopping_and_reported(domain, config, users)
    models = {}
    for row in dict.fromkeys([PLAIN, *rows]):
        changes, divisor = ROWS[row]
        steps, every = config.train.max_steps or 1, config.train.validate_every_steps
        budget = {"max_steps": max(1, steps // divisor), "validate_every_steps": max(1, every // divisor)}
        train = config.train.model_copy(update={**changes, **budget, "validation_users": stopping_users})
        settings = training_settings(config.model_copy(update={"train": train}))
        models[row], report = load_or_train_expert(
            domain, settings, config.cache_dir, None, lambda line: print(line, flush=True)
        )
        print(
            f"{name} | {row} | steps {report['steps']}, best {report['best_step']}, {report['seconds']:.0f} s",
            flush=True,
        )
    return {variant: metric_sums(each, variant) for variant, each in outcomes(domain, models, examples).items()}


def stopping_and_reported(domain: LocalDomain, config: ExperimentConfig, users: int) -> tuple[int, Examples]:
    """Return how many validation users end the trainings, at most half of them, and those of the rest to report."""
    everyone = evaluated_users(domain.interactions, "valid")
    number = min(config.train.validation_users or len(everyone), len(everyone) // 2)
    stopping = evaluation_examples(domain.interactions, "valid", number, config.seed).users
    rng = generator(config.seed, "study", "augmentation", domain.manifest.name)
    drawn = rng.permutation(np.setdiff1d(everyone, stopping))[:users]
    return number, examples_of(domain.interactions, "valid", np.sort(drawn))


def _differences(config: ExperimentConfig, of_domains: Sequence[MetricSums], row: str) -> dict[str, list[float]]:
    """Return domain, or ``mean`` -> difference to the expert, and the ends of its interval."""
    named = zip(config.domains.train, of_domains, strict=True)
    found = {name: paired_difference(sums, row, PLAIN, METRIC) for name, sums in named}
    found["mean"] = paired_difference_of_mean(of_domains, row, PLAIN, METRIC)
    return {where: [gain.mean, gain.low, gain.high] for where, gain in found.items()}


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="experiment whose training domains and [train] are used")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW")
    parser.add_argument("--users", type=int, default=4000, help="validation users reported a domain (default: 4000)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="change the experiment")
    parser.add_argument("--out", type=Path, help="JSON file of the differences")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
