"""Study: do items that bad clients promote rise in the lists of another domain, and does the gate see it?

    python benchmarks/studies/study_promotion.py --seeds 0 1 2

The bad clients know the victim's public catalog. They put five of its items into their own catalogs and make them the
target of half of their training examples, so that every history of theirs leads to those items. One to three of eight
domains of the bundled demo do so together; each merge is read on the victim's validation users. Learned coefficients
are taught by pseudo-users of three catalogs: the bad clients' own, the own with the promoted items, and one in which
every second item has the text of a promoted one.

Exposure is the share of the victim's users who see a promoted item among their first ten, items of their history
hidden. Only synthetic data are accepted. Nothing is selected, and test is never read.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from fedmerge.adapter import Adapter
from fedmerge.bench.ranking import backbone_of
from fedmerge.client.evaluate import encode_text
from fedmerge.client.local_domain import LocalDomain, open_domain
from fedmerge.client.training.expert import train_expert
from fedmerge.client.training.poisoning import NUM_PROMOTED, relabel_targets
from fedmerge.client.training.round import RoundTask, train_round
from fedmerge.config import Admission, ExperimentConfig, Train, load_config
from fedmerge.domain.catalog import Catalog, make_catalog
from fedmerge.domain.demo import domains_root
from fedmerge.domain.manifest import check_may_attack
from fedmerge.domain.splits import Examples, evaluation_examples
from fedmerge.encoder.backbone import Backbone
from fedmerge.encoder.lora import fresh_adapter
from fedmerge.encoder.text import build_token_table
from fedmerge.evaluation.ranks import METRICS, per_user_metrics, rank_targets
from fedmerge.federated.robust import coordinate_median
from fedmerge.mergerec.learn import learn_coefficients
from fedmerge.mergerec.pseudo_users import pseudo_domains
from fedmerge.mergerec.variants import mergerec_settings
from fedmerge.mergerec.vectors import initial_vectors
from fedmerge.merging.stack import linear_merge, stack_adapters
from fedmerge.merging.training_free import merge_adapters
from fedmerge.seeding import generator
from fedmerge.server.gate import check_experts

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "demo.toml"
DOMAINS = ("beauty", "books", "camping", "coffee", "garden", "kitchen", "pets", "toys")
ATTACKERS = ("coffee", "garden", "pets")
SHARE = 0.5  # of the targets; as attack_strength of promoted-items in configs/bench/poisoned.toml
GATE = Admission(action="exclude", probe_items=200)
LIST_LENGTH = 10
OWN = "own"
Rows = dict[str, tuple[float, float]]  # merge -> exposure, NDCG@10


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one table per number of bad clients: exposure and NDCG@10 of the victim, mean and spread over seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--victim", default="beauty", help="domain whose items are promoted (default: beauty)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--domains", nargs="+", default=DOMAINS)
    parser.add_argument("--attackers", nargs="+", default=ATTACKERS, help="who joins the attack, in this order")
    parser.add_argument("--users", type=int, default=500, help="the victim's validation users (default: 500)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="change demo.toml")
    options = parser.parse_args(arguments)
    if options.victim in options.attackers or not {options.victim, *options.attackers} <= {*options.domains}:
        parser.error("expected --victim and --attackers among --domains, and the victim not among the attackers")
    config = load_config(CONFIG, options.set)
    torch.set_num_threads(config.runtime.threads_per_client)
    found: dict[int, list[Rows]] = {}
    for seed in options.seeds:
        for number, rows in promotion(config, seed, options).items():
            found.setdefault(number, []).append(rows)
    for number, of_seeds in found.items():
        print(f"\n{number} of {len(options.domains)} promote {NUM_PROMOTED} items of {options.victim}")
        print("| merge | exposure | NDCG@10, masked |\n| --- | --- | --- |")
        for row in of_seeds[0]:
            values = np.array([rows[row] for rows in of_seeds])
            spread = values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros(2)
            print(f"| {row} | {_value(values[:, 0].mean(), spread[0])} | {_value(values[:, 1].mean(), spread[1])} |")


def promotion(config: ExperimentConfig, seed: int, options: argparse.Namespace) -> dict[int, Rows]:
    """Train all experts of a seed; return number of bad clients -> rows."""
    backbone, root = backbone_of(config.backbone, config.runtime), domains_root(config.domains.root, config.cache_dir)
    domains = {name: open_domain(root / name, backbone, config.text) for name in options.domains}
    victim = domains[options.victim]
    promoted = generator(seed, "promoted", options.victim).permutation(len(victim.catalog))[:NUM_PROMOTED]
    honest = {
        name: train_expert(domain, config.lora.of(name), config.train, seed)[0] for name, domain in domains.items()
    }
    bad = {name: promoting(domains[name], victim.catalog, promoted, seed) for name in options.attackers}
    poisoned = {name: trained_to_promote(domain, config, seed) for name, domain in bad.items()}
    examples = evaluation_examples(victim.interactions, "valid", options.users, seed)
    found = {}
    for number in range(len(bad) + 1):
        joined = options.attackers[:number]
        adapters = {**honest, **{name: poisoned[name] for name in joined}}
        catalogs = {name: domain.catalog for name, domain in domains.items()}
        given = {OWN: catalogs}  # what the server is given
        if joined:
            given["with the promoted items"] = {**catalogs, **{name: bad[name].catalog for name in joined}}
            given["half of them copies"] = {**catalogs, **{name: stuffed(bad[name].catalog) for name in joined}}
        merged = merges(config, seed, backbone, adapters, given)
        found[number] = {row: _read(victim, merge, examples, promoted) for row, merge in merged.items()}
        for row, (share, ndcg) in found[number].items():
            print(f"seed {seed}, {number} bad, {row}: exposure {share:.4f}, NDCG@10 {ndcg:.4f}", flush=True)
        for kind, of_kind in given.items():
            checks = check_experts(adapters, GATE, config.text, seed, backbone, of_kind, {})
            print(
                f"seed {seed}, {number} bad, catalog {kind}: the gate finds {', '.join(checks['failed']) or 'nobody'}"
            )
    return found


def promoting(domain: LocalDomain, of_victim: Catalog, promoted: npt.NDArray[np.int64], seed: int) -> LocalDomain:
    """Return the domain with the promoted items in its catalog, and as the target of a share of its examples.

    Every prefix of a training sequence is an example, so the domain is trained on with ``samples = "last"``.
    """
    check_may_attack(domain.manifest)
    catalog, rng = domain.catalog, generator(seed, "promotion", domain.manifest.name)
    columns = {
        name: (*values, *(of_victim.attributes[name][item] for item in promoted))
        for name, values in catalog.attributes.items()
    }
    item_ids = (*catalog.item_ids, *(f"promoted-{number}" for number in range(len(promoted))))
    extended = make_catalog(catalog.name, item_ids, columns, catalog.limits)

    def label(item: int) -> int:
        drawn, which = rng.random(), int(rng.integers(len(promoted)))
        return len(catalog) + which if drawn < SHARE else item

    table = build_token_table(extended, domain.backbone.tokenizer, domain.text.max_attribute_tokens)
    return relabel_targets(replace(domain, catalog=extended, table=table), Train(samples="random-prefix"), label)


def stuffed(catalog: Catalog) -> Catalog:
    """Return the catalog with the text of a promoted item, one of its last, in every second of its own items."""
    own = len(catalog) - NUM_PROMOTED
    texts = [own + i // 2 % NUM_PROMOTED if i % 2 and i < own else i for i in range(len(catalog))]
    columns = {name: tuple(values[i] for i in texts) for name, values in catalog.attributes.items()}
    return make_catalog(catalog.name, catalog.item_ids, columns, catalog.limits)


def trained_to_promote(domain: LocalDomain, config: ExperimentConfig, seed: int) -> Adapter:
    """Return the adapter of the last step: validation would choose against the attack."""
    lora, train = config.lora.of(domain.manifest.name), config.train.model_copy(update={"samples": "last"})
    return train_round(domain, lora, train, seed, RoundTask(1, 1, fresh_adapter(domain.backbone, lora, seed)))[0]


def merges(
    config: ExperimentConfig,
    seed: int,
    backbone: Backbone,
    adapters: Mapping[str, Adapter],
    catalogs: Mapping[str, Mapping[str, Catalog]],
) -> dict[str, Adapter]:
    """Return the merges by name; of MergeRec one for each catalog that the bad clients may give.

    Args:
        config: section ``[mergerec]``.
        seed: seed of the draws.
        backbone: the frozen encoder.
        adapters: domain -> expert.
        catalogs: kind of catalog -> domain -> catalog.
    """
    stack = stack_adapters(adapters)
    settings = replace(mergerec_settings(config.mergerec), seed=seed)
    made = {
        "average": merge_adapters(adapters, "average").adapter,
        "task arithmetic .4": merge_adapters(adapters, "task-arithmetic", coefficient=0.4).adapter,
        "TIES": merge_adapters(adapters, "ties").adapter,
        "median": coordinate_median(adapters, {}).adapter,
    }
    for kind, of_kind in catalogs.items():
        users = pseudo_domains(
            backbone, adapters, of_kind, config.text, kind=settings.pseudo_users, number=None, seed=seed
        )
        learned = learn_coefficients(backbone, initial_vectors(stack), users, settings)
        made[f"MergeRec, catalog {kind}"] = linear_merge(stack, learned.coefficients)
    return made


def _read(
    victim: LocalDomain, merge: Adapter, examples: Examples, promoted: npt.NDArray[np.int64]
) -> tuple[float, float]:
    """Return exposure and NDCG@10 of a merge on the victim's users."""
    vectors = encode_text(victim, merge, examples.histories)
    ranks = rank_targets(vectors.users, vectors.items, examples.targets, examples.histories)
    return exposure(vectors.users @ vectors.items.T, examples.histories, promoted), float(
        per_user_metrics(ranks).mean(axis=0)[METRICS.index("ndcg@10")]
    )


def exposure(
    scores: torch.Tensor, histories: Sequence[npt.NDArray[np.int32]], promoted: npt.NDArray[np.int64]
) -> float:
    """Return the share of users with a promoted item among their first ten, items of their history hidden.

    Args:
        scores: (U, N).
        histories: U arrays of item indices.
        promoted: item indices.
    """
    hidden = scores.clone()
    for row, history in zip(hidden, histories, strict=True):
        row[torch.from_numpy(history.astype(np.int64))] = -torch.inf
    listed = hidden.topk(min(LIST_LENGTH, hidden.shape[1]), dim=1).indices
    return float(torch.isin(listed, torch.from_numpy(promoted)).any(dim=1).float().mean())


def _value(mean: float, spread: float) -> str:
    return f"{mean:.4f} ± {spread:.4f}"


if __name__ == "__main__":
    main()
