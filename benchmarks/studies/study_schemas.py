"""Study: what do item texts lose whose attributes have other names than those of the other domains?

    python benchmarks/studies/study_schemas.py --seeds 0 1 2
    python benchmarks/studies/study_schemas.py configs/amazon3-toys-unseen.toml --set train.max_steps=150

Every training domain calls the attributes of its items by names of its own (title: name, label, product …), or all
call them alike, as `fedmerge data map-attributes` makes them. Experts are trained on both, averaged, and read on the
validation users of every domain; an unseen domain has names that no training domain has. Domains weigh equally, as in
the average. Nothing is selected, and test is never read.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from fedmerge.adapter import Adapter
from fedmerge.bench.ranking import backbone_of
from fedmerge.client.evaluate import model_ranks
from fedmerge.client.local_domain import LocalDomain, open_domain
from fedmerge.client.training.expert import train_expert
from fedmerge.config import ExperimentConfig, load_config
from fedmerge.domain.catalog import make_catalog
from fedmerge.domain.demo import domains_root
from fedmerge.domain.splits import evaluation_examples
from fedmerge.encoder.text import build_token_table
from fedmerge.evaluation.ranks import per_user_metrics
from fedmerge.evaluation.sums import VARIANTS, metric_sums, paired_difference
from fedmerge.merging.training_free import merge_adapters

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "demo.toml"
NAMES = (  # of title, brand, category in one domain after the other
    ("name", "maker", "department"),
    ("label", "vendor", "section"),
    ("product", "manufacturer", "group"),
    ("headline", "producer", "family"),
    ("article", "company", "aisle"),
)
METRICS = ("recall@10", "ndcg@10")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the average merge's scores per domain, with names of its own and with common ones, and the difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", nargs="?", type=Path, default=CONFIG, help="experiment file (default: demo.toml)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--users", type=int, default=1000, help="validation users a domain (default: 1000)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="change the experiment")
    options = parser.parse_args(arguments)
    config = load_config(options.experiment, options.set)
    torch.set_num_threads(config.runtime.threads_per_client)
    print("| seed | domain | variant | own names, Recall@10 / NDCG@10 | common names | difference of NDCG@10 |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    for seed in options.seeds:
        for line in compared(config, seed, options.users):
            print(f"| {seed} | {line} |", flush=True)


def compared(config: ExperimentConfig, seed: int, num_users: int) -> list[str]:
    """Train on both kinds of names, and return a line of the table for each domain and variant."""
    backbone, root = backbone_of(config.backbone, config.runtime), domains_root(config.domains.root, config.cache_dir)
    names = [*config.domains.train, *config.domains.unseen]
    common = {name: open_domain(root / name, backbone, config.text) for name in names}
    own = {name: with_names(domain, NAMES[place % len(NAMES)]) for place, (name, domain) in enumerate(common.items())}
    merged = {
        "common": _merge(config, [common[name] for name in config.domains.train], seed),
        "own": _merge(config, [own[name] for name in config.domains.train], seed),
    }
    lines = []
    for name in names:
        examples = evaluation_examples(common[name].interactions, "valid", num_users, seed)
        ranks = {
            kind: model_ranks(domain, {kind: merged[kind]}, examples)[kind]
            for kind, domain in (("own", own[name]), ("common", common[name]))
        }
        for variant in VARIANTS:
            sums = metric_sums({kind: per_user_metrics(found[variant]) for kind, found in ranks.items()}, variant)
            gain = paired_difference(sums, "common", "own", "ndcg@10")
            scores = [" / ".join(f"{sums.mean(kind, metric):.4f}" for metric in METRICS) for kind in ranks]
            role = "" if name in config.domains.train else " (unseen)"
            difference = f"{gain.mean:+.4f} ± {(gain.high - gain.low) / 2:.4f}"
            lines.append(" | ".join([f"{name}{role}", variant, *scores, difference]))
    return lines


def with_names(domain: LocalDomain, names: Sequence[str]) -> LocalDomain:
    """Return the domain with other names of its attributes, in their order; further attributes keep theirs."""
    old = domain.catalog
    renamed = dict(zip(old.attributes, [*names, *[*old.attributes][len(names) :]], strict=False))
    columns = {renamed[name]: values for name, values in old.attributes.items()}
    limits = {renamed[name]: limit for name, limit in old.limits.items()}
    catalog = make_catalog(old.name, old.item_ids, columns, limits)
    table = build_token_table(catalog, domain.backbone.tokenizer, domain.text.max_attribute_tokens)
    return replace(domain, catalog=catalog, table=table)


def _merge(config: ExperimentConfig, domains: Sequence[LocalDomain], seed: int) -> Adapter:
    experts = {}
    for domain in domains:
        name = domain.manifest.name
        experts[name] = train_expert(domain, config.lora.of(name), config.train, seed)[0]
    return merge_adapters(experts, "average").adapter


if __name__ == "__main__":
    main()
