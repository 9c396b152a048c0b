"""Cost of privacy settings on demo domains, over seeds: coding of adapters, and local steps in place of exact ones.

    python benchmarks/privacy/bench_privacy.py transport
    python benchmarks/privacy/bench_privacy.py local-steps

Four demo domains train experts on the bundled demo backbone. ``transport``: each expert is packed and unpacked as for
transport, and the average of the received experts is evaluated. ``local-steps``: MergeRec's layer-wise coefficients are
learned with one message per step and with several steps per message; each client's part is computed as on the client.
Means are over the domains' test users; differences are to the first row, paired by seed, ± their standard deviation
over seeds.
"""

import argparse
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from fedmerge.adapter import Adapter
from fedmerge.client.coefficients.pseudo_users import pseudo_user_gradient, take_local_steps
from fedmerge.client.evaluate import evaluate
from fedmerge.client.local_domain import LocalDomain, open_domain
from fedmerge.client.training.expert import train_expert
from fedmerge.config import ExperimentConfig, from_flat
from fedmerge.device import resolve_compute
from fedmerge.domain.demo import write_demo
from fedmerge.encoder.backbone import Backbone, load_backbone
from fedmerge.encoder.demo_backbone import write_demo_backbone
from fedmerge.encoder.lora import fresh_adapter
from fedmerge.mergerec.coefficients import start_coefficients
from fedmerge.mergerec.learn import learn_coefficients, student_vectors
from fedmerge.mergerec.objective import PAPER
from fedmerge.mergerec.pseudo_users import pseudo_users_of
from fedmerge.merging.stack import linear_merge, stack_adapters
from fedmerge.privacy.transport import Coding, decode_as_receiver, pack, residual

DENSITIES = (0.5, 0.25, 0.1)
LOCAL_STEPS = (5, 10, 25)

Made = Mapping[str, tuple[Adapter, Sequence[float]]]
"""Row of the table -> merge, and the two numbers in the row beside its accuracy."""


def by_transport(backbone: Backbone, config: ExperimentConfig, experts: Mapping[str, Adapter], _: object) -> Made:
    """Average the received experts; the numbers are bytes of one adapter and mean residual."""
    start = fresh_adapter(backbone, config.lora, config.seed)
    codings = {"float32": Coding("float32"), "float16": Coding("float16"), "int8": Coding("int8")}
    codings |= {f"top-k {density:g}": Coding("top-k", density, start) for density in DENSITIES}
    made = {}
    for label, coding in codings.items():
        received = {name: decode_as_receiver(expert, coding) for name, expert in experts.items()}
        size = sum(values.nbytes for values in pack(next(iter(experts.values())), coding).values())
        lost = float(np.mean([residual(expert, received[name]) for name, expert in experts.items()]))
        equal = torch.full((len(experts),), 1 / len(experts))
        made[label] = (linear_merge(stack_adapters(received), equal), (size, lost))
    return made


def by_local_steps(
    backbone: Backbone, config: ExperimentConfig, experts: Mapping[str, Adapter], domains: Sequence[LocalDomain]
) -> Made:
    """Learn MergeRec; the numbers are messages to a client, and the distance to the exact coefficients.

    The distance is relative to that between the exact coefficients and the start; nan where they are equal.
    """
    settings = replace(PAPER, granularity="layer", steps=100, learning_rate=1e-2, seed=config.seed)
    vectors = stack_adapters(experts)
    tables = {domain.manifest.name: domain.table for domain in domains}
    pseudo = {
        name: pseudo_users_of(
            name,
            backbone,
            experts,
            tables[name],
            config.text,
            kind=config.mergerec.pseudo_users,
            seed=config.seed,
        )
        for name in vectors.domains
    }
    start = start_coefficients(vectors, "layer", settings.start)
    students = student_vectors(backbone, vectors, pseudo, start)
    exact = learn_coefficients(backbone, vectors, pseudo, settings, students=students).coefficients
    way = float(torch.linalg.norm(exact - start))
    made: dict[str, tuple[Adapter, Sequence[float]]] = {"exact": (linear_merge(vectors, exact), (settings.steps, 0.0))}
    for steps in LOCAL_STEPS:
        at = start
        for first in range(0, settings.steps, steps):
            changes = [
                take_local_steps(
                    pseudo_user_gradient(backbone, vectors, pseudo[name], students[name], settings, first, ()),
                    at,
                    settings,
                    steps,
                )
                for name in vectors.domains
            ]
            at = at + torch.stack(changes).mean(dim=0)  # the demo's catalogs have equal sizes
        away = float(torch.linalg.norm(at - exact)) / way if way else float("nan")
        made[f"{steps} local steps"] = (linear_merge(vectors, at), (settings.steps // steps, away))
    return made


Table = Callable[[Backbone, ExperimentConfig, Mapping[str, Adapter], Sequence[LocalDomain]], Made]

TABLES: dict[str, tuple[Table, tuple[str, str]]] = {
    "transport": (by_transport, ("bytes", "residual")),
    "local-steps": (by_local_steps, ("messages", "distance")),
}


NOTHING_LEARNED = (
    "Nothing was learned with seed {}: the exact coefficients are those of the start, so there is no distance to "
    "compare with. Use more --steps or --users."
)


def one_seed(
    backbone: Backbone, root: Path, seed: int, table: str, options: argparse.Namespace
) -> dict[str, list[float]]:
    """Return row -> its two numbers, and mean Recall@10 and NDCG@10 of its merge."""
    names = write_demo(root, num_domains=4, num_users=options.users, num_items=200, seed=seed)
    training = {"train.max_steps": options.steps, "train.learning_rate": 0.005, "train.batch_size": 32}
    config = from_flat({**training, "seed": seed, "mergerec.preset": "paper"})
    domains = [open_domain(root / name, backbone, config.text) for name in names]
    experts = {
        domain.manifest.name: train_expert(domain, config.lora, config.train, seed, lambda line: None)[0]
        for domain in domains
    }
    made = TABLES[table][0](backbone, config, experts, domains)
    merges = {label: merge for label, (merge, _) in made.items()}
    sums = [evaluate(domain, merges, "test", None, seed)["unmasked"] for domain in domains]
    return {
        label: [*row, *(float(np.mean([s.mean(label, metric) for s in sums])) for metric in ("recall@10", "ndcg@10"))]
        for label, (_, row) in made.items()
    }


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", nargs="?", choices=TABLES, help="default: both")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--users", type=int, default=300)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for table in TABLES if options.table is None else (options.table,):
        print(f"\n{table}\n")
        print_table(table, options)


def print_table(table: str, options: argparse.Namespace) -> None:
    """Measure and print one table."""
    with tempfile.TemporaryDirectory() as folder:
        source = str(write_demo_backbone(Path(folder) / "backbone"))
        backbone = load_backbone(source, "mean", resolve_compute("cpu", "float32"))
        found = [one_seed(backbone, Path(folder) / str(seed), seed, table, options) for seed in range(options.seeds)]
    first, second = TABLES[table][1]
    print(f"| | {first} | {second} | Recall@10 | difference | NDCG@10 | difference |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    labels = list(found[0])
    for label in labels:
        values = np.array([seed[label] for seed in found])  # (seeds, 4)
        differences = values - np.array([seed[labels[0]] for seed in found])
        spread = differences.std(axis=0, ddof=1) if len(found) > 1 else np.zeros(4)
        measured = values[~np.isnan(values[:, 1]), 1]
        shown = [f"{values[:, 0].mean():,.0f}", f"{measured.mean():.4f}" if len(measured) else "-"]
        for column in (2, 3):
            shown += [f"{values[:, column].mean():.4f}", f"{differences[:, column].mean():+.4f} ± {spread[column]:.4f}"]
        print(f"| {label} | " + " | ".join(shown) + " |", flush=True)
    missing = [str(number) for number, seed in enumerate(found) if any(np.isnan(row[1]) for row in seed.values())]
    if missing:
        print(f"\n{NOTHING_LEARNED.format(' and '.join(missing))}")


if __name__ == "__main__":
    main()
