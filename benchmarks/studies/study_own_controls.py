"""Study: does joining give more than the own expert's seeds averaged, or the own expert trained longer?

    python benchmarks/studies/study_own_controls.py data/amazon/Beauty --split test --out controls.json \
        --expert RUN_0/adapters/Beauty --joined RUN_0/merged/average \
        --soup RUN_0/adapters/Beauty RUN_1/adapters/Beauty RUN_2/adapters/Beauty --longer LONGER/adapters/Beauty

A merge of three domains is an average of three adapters, made with three trainings. So its controls are the average of
three seeds of the own expert, and the own expert after three times the steps. Each has a head on its item vectors, as
in a run; the heads of expert and merge come from the cache if a run has trained them. Rows: text, the head, and the
head fused with text and recent items; every row is compared with the joined one over the same users.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fedmerge.adapter import Adapter
from fedmerge.bench.ranking import backbone_of
from fedmerge.client.evaluate import Ranks, encode_text, model_ranks
from fedmerge.client.heads.heads import head_ranks, load_or_train_head
from fedmerge.client.heads.vectors import item_vectors
from fedmerge.client.local_domain import LocalDomain, open_domain
from fedmerge.config import ExperimentConfig, load_config
from fedmerge.domain.splits import Examples, evaluation_examples
from fedmerge.encoder.peft.folder import read_adapter
from fedmerge.evaluation.ranks import per_user_metrics
from fedmerge.evaluation.sums import VARIANTS, fused_label, head_label, metric_sums, paired_difference
from fedmerge.files import write_json
from fedmerge.merging.stack import linear_merge, stack_adapters

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "amazon3.toml"
METRICS = ("recall@10", "ndcg@10")


def main(arguments: Sequence[str] | None = None) -> None:
    """Rank the users under every model and print the rows."""
    options = _options(arguments)
    config = load_config(CONFIG, ["head.kind=local", "head.max_minutes=none", *options.set])
    torch.set_num_threads(config.runtime.threads_per_client)
    domain = open_domain(options.domain, backbone_of(config.backbone, config.runtime), config.text)
    examples = evaluation_examples(domain.interactions, options.split, options.users, config.seed)
    seeds = {str(number): read_adapter(folder) for number, folder in enumerate(options.soup)}
    models = {"expert": read_adapter(options.expert), "joined": read_adapter(options.joined)}
    if seeds:
        models["soup"] = linear_merge(stack_adapters(seeds), torch.full((len(seeds),), 1 / len(seeds)))
    if options.longer:
        models["longer"] = read_adapter(options.longer)
    ranks: dict[str, Ranks] = {}
    for name, adapter in models.items():
        ranks |= _rows(name, adapter, domain, config, examples)
    found: dict[str, Any] = {}
    for variant in VARIANTS:
        sums = metric_sums({row: per_user_metrics(of_row[variant]) for row, of_row in ranks.items()}, variant)
        for row in ranks:
            joined = "joined" + row[row.index(":") :]
            gains = [paired_difference(sums, row, joined, metric) for metric in METRICS]
            found[f"{variant} {row}"] = {
                **{metric: sums.mean(row, metric) for metric in METRICS},
                "minus joined": [[gain.mean, gain.low, gain.high] for gain in gains],
            }
            print(domain.manifest.name, variant, row, json.dumps(found[f"{variant} {row}"]), flush=True)
    if options.out:
        write_json(options.out, {"domain": domain.manifest.name, "seed": config.seed, "rows": found})


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("domain", type=Path, help="a domain folder")
    parser.add_argument("--expert", type=Path, required=True, help="PEFT folder of the own expert")
    parser.add_argument("--joined", type=Path, required=True, help="PEFT folder of the merge")
    parser.add_argument("--soup", type=Path, nargs="+", default=[], help="PEFT folders of the own expert's seeds")
    parser.add_argument("--longer", type=Path, help="PEFT folder of the own expert after more steps")
    parser.add_argument("--split", choices=("valid", "test"), default="valid")
    parser.add_argument("--users", type=int, help="largest number of users (default: all)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="change amazon3.toml")
    parser.add_argument("--out", type=Path, help="JSON file of the rows")
    return parser.parse_args(arguments)


def _rows(
    name: str, adapter: Adapter, domain: LocalDomain, config: ExperimentConfig, examples: Examples
) -> dict[str, Ranks]:
    """Rank users by a model's text, its head, and both fused with recent items."""
    users, cache = config.evaluation.validation_users, config.cache_dir
    head = load_or_train_head(domain, adapter, config.head, users, config.seed, cache, print)
    text = encode_text(domain, adapter, examples.histories, item_vectors(domain, adapter, cache))
    ranks = head_ranks(domain, "expert", adapter, head, examples, text)
    return {
        f"{name}: text": model_ranks(domain, {name: adapter}, examples, encoded={name: text})[name],
        f"{name}: head": ranks[head_label("expert")],
        f"{name}: fused": ranks[fused_label("expert")],
    }


if __name__ == "__main__":
    main()
