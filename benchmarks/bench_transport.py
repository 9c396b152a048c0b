"""What the coding of adapters costs: bytes, residual and accuracy of the average, on demo domains, over seeds.

    python benchmarks/bench_transport.py --seeds 3

Four demo domains train experts on the bundled demo backbone; each expert is packed and unpacked as it would travel,
the average of what arrives is evaluated on every domain's test users. Differences are to float32, paired by seed.
"""

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from fedmerge.client.evaluate import evaluate
from fedmerge.client.local_domain import LocalDomain, open_domain
from fedmerge.client.train import train_expert
from fedmerge.config import from_flat
from fedmerge.device import resolve_compute
from fedmerge.domain.demo import write_demo
from fedmerge.encoder.backbone import Backbone, load_backbone
from fedmerge.encoder.demo_backbone import write_demo_backbone
from fedmerge.encoder.lora import Adapter, fresh_adapter
from fedmerge.merging.stack import linear_merge, stack_adapters
from fedmerge.privacy.transport import Coding, as_received, pack, residual


def codings(start: Adapter) -> dict[str, Coding]:
    """Every row of the table."""
    plain = {name: Coding(name) for name in ("float32", "float16", "int8")}  # type: ignore[arg-type]  # literals
    return plain | {f"top-k {density:g}": Coding("top-k", density, start) for density in (0.5, 0.25, 0.1)}


def one_seed(backbone: Backbone, root: Path, seed: int, num_users: int, steps: int) -> Mapping[str, np.ndarray]:
    """Coding -> bytes of an adapter, mean residual, mean Recall@10 and NDCG@10 of the average."""
    names = write_demo(root, num_domains=4, num_users=num_users, num_items=200, seed=seed)
    config = from_flat({"train.max_steps": steps, "train.learning_rate": 0.005, "train.batch_size": 32, "seed": seed})
    domains: list[LocalDomain] = [open_domain(root / name, backbone, config.text) for name in names]
    experts = [train_expert(domain, config.lora, config.train, seed, lambda line: None)[0] for domain in domains]
    rows, merges = {}, {}
    for label, coding in codings(fresh_adapter(backbone, config.lora, seed)).items():
        received = [as_received(expert, coding) for expert in experts]
        size = sum(values.nbytes for values in pack(experts[0], coding).values())
        lost = np.mean([residual(expert, got) for expert, got in zip(experts, received, strict=True)])
        merges[label] = linear_merge(stack_adapters(dict(zip(names, received, strict=True))), torch.full((4,), 0.25))
        rows[label] = [float(size), float(lost)]
    sums = [evaluate(domain, merges, "test", None, seed, {}, lambda line: None)["unmasked"] for domain in domains]
    return {
        label: np.array(
            [*row, *(np.mean([s.mean(label, metric) for s in sums]) for metric in ("recall@10", "ndcg@10"))]
        )
        for label, row in rows.items()
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--users", type=int, default=300)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        source = str(write_demo_backbone(Path(folder) / "backbone"))
        backbone = load_backbone(source, "mean", resolve_compute("cpu", "float32"))
        found = [
            one_seed(backbone, Path(folder) / str(seed), seed, options.users, options.steps)
            for seed in range(options.seeds)
        ]
    print("| travels as | bytes | residual | Recall@10 | difference to float32 | NDCG@10 | difference to float32 |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for label in found[0]:
        values = np.array([seed[label] for seed in found])
        size, lost, recall, ndcg = values.mean(axis=0)
        differences = values - np.array([seed["float32"] for seed in found])
        (_, _, recall_difference, ndcg_difference) = differences.mean(axis=0)
        (_, _, recall_spread, ndcg_spread) = differences.std(axis=0, ddof=1) if len(found) > 1 else np.zeros(4)
        print(
            f"| {label} | {size:,.0f} | {lost:.4f} | {recall:.4f} | {recall_difference:+.4f} ± {recall_spread:.4f} "
            f"| {ndcg:.4f} | {ndcg_difference:+.4f} ± {ndcg_spread:.4f} |"
        )


if __name__ == "__main__":
    main()
