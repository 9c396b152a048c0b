"""Study: personal merges against the expert, the average and task arithmetic, on validation users.

    python benchmarks/studies/study_personal.py configs/amazon3.toml RUN/adapters --users 1500 --out personal.json
    python benchmarks/studies/study_personal.py configs/amazon3.toml RUN/adapters --seeds Beauty=RUN_1/adapters/Beauty

The validation users of a domain are split in three: one part fits the coefficients, one chooses the number of steps,
one is reported; test is never read. ``--seeds`` adds the control that experts of the same domain would gain as
much: coefficients on other seeds of the own expert in place of the other domains.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedmerge.adapter import Adapter
from fedmerge.client.coefficients.personal import PersonalSettings, fit_personal_merge, fitting_sequences
from fedmerge.client.evaluate import outcomes
from fedmerge.client.local_domain import LocalDomain, open_domain
from fedmerge.config import Personal, load_config
from fedmerge.device import resolve_compute
from fedmerge.domain.demo import domains_root
from fedmerge.domain.splits import evaluated_users, evaluation_examples, examples_of
from fedmerge.encoder.backbone import open_backbone
from fedmerge.encoder.peft.folder import read_adapter
from fedmerge.evaluation.sums import EXPERT, metric_sums, paired_difference
from fedmerge.files import write_json
from fedmerge.merging.stack import linear_merge, stack_adapters
from fedmerge.seeding import generator


def main() -> None:
    """Fit and compare the rows of every domain that has an expert."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="the experiment of the experts")
    parser.add_argument("adapters", type=Path, help="folder of PEFT folders, one a domain")
    parser.add_argument("--domains", nargs="+", default=[], help="domains to report; all by default")
    parser.add_argument("--users", type=int, default=1500, help="validation users a domain, for all three parts")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", nargs="+", default=[], metavar="DOMAIN=FOLDER", help="other seeds of an expert")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    config = load_config(options.config)
    torch.set_num_threads(config.runtime.threads_per_client)
    compute = resolve_compute(config.runtime.device, config.runtime.precision)
    backbone = open_backbone(config.backbone, compute)
    adapters = {path.name: read_adapter(path) for path in sorted(options.adapters.iterdir()) if path.is_dir()}
    found: dict[str, Any] = {}
    for name in options.domains or adapters:
        domain = open_domain(domains_root(config.domains.root, config.cache_dir) / name, backbone, config.text)
        seeds = [Path(text.partition("=")[2]) for text in options.seeds if text.partition("=")[0] == name]
        found[name] = _study(domain, adapters, seeds, options.users, options.steps, config.seed)
        if options.out:
            write_json(options.out, found)


def _study(
    domain: LocalDomain, adapters: Mapping[str, Adapter], seeds: list[Path], num_users: int, steps: int, seed: int
) -> dict[str, Any]:
    name, third = domain.manifest.name, num_users // 3
    module, raw = (Personal(directions=directions, steps=steps) for directions in ("module", "raw"))
    settings = PersonalSettings(module, third, third, "exact", seed, torch.get_num_threads())
    stopping = evaluation_examples(domain.interactions, "valid", third, seed).users
    others = np.setdiff1d(evaluated_users(domain.interactions, "valid"), stopping)
    others = generator(seed, "study of personal merges", name).permutation(others)[: 2 * third]
    reported, fitted = others[: len(others) // 2], others[len(others) // 2 :]
    sequences = fitting_sequences(domain, settings, np.setdiff1d(evaluated_users(domain.interactions, "valid"), fitted))
    stack, count = stack_adapters(adapters), len(adapters)
    models: dict[str, Adapter | None] = {
        EXPERT: adapters[name],
        "average": linear_merge(stack, torch.full((count,), 1 / count)),
        "task-arithmetic .6": linear_merge(stack, torch.full((count,), 0.6)),
    }
    cohorts = {"personal, normalised": (adapters, module), "personal, as they are": (adapters, raw)}
    if seeds:
        soup = {name: adapters[name]} | {f"seed-{number}": read_adapter(path) for number, path in enumerate(seeds)}
        cohorts["personal, own seeds"] = (soup, module)
    records = {}
    for label, (cohort, section) in cohorts.items():
        made = fit_personal_merge(domain, cohort, replace(settings, personal=section), sequences, print)
        models[label], records[label] = made.adapter, dict(made.record)
    examples = examples_of(domain.interactions, "valid", np.sort(reported))
    rows: dict[str, Any] = {}
    for variant, of_variant in outcomes(domain, models, examples).items():
        sums = metric_sums(of_variant, variant)
        for label in models:
            difference = paired_difference(sums, label, EXPERT, "ndcg@10")
            rows[f"{label} {variant}"] = {
                "recall@10": sums.mean(label, "recall@10"),
                "ndcg@10": sums.mean(label, "ndcg@10"),
                "against the expert": [difference.mean, difference.low, difference.high],
            }
            print(name, variant, label, json.dumps(rows[f"{label} {variant}"]), flush=True)
    return {"users": {"fitted": len(sequences), "reported": len(examples)}, "rows": rows, "fits": records}


if __name__ == "__main__":
    main()
