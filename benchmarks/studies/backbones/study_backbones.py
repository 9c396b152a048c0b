"""Study: backbones without any training, side by side on the same validation users of domains.

    python benchmarks/studies/backbones/study_backbones.py data/amazon/Beauty data/amazon/Pantry \\
        --out study/backbones --backbones sentence-transformers/all-MiniLM-L6-v2 \\
            models/all-mpnet-base-v2 models/SmolLM2-135M-Instruct

Rows of each backbone: the text of the history in both orders, the last item, and whitened recent items, by the
backbone's own vectors. Conventions are those of ``backbone.family = auto``. Differences are paired over users, to the
same row of the first backbone. Vectors are kept in ``--out`` piece by piece, so a killed study resumes with the same
command. Test is never read.
"""

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from fedmerge.bench.ranking import backbone_of
from fedmerge.client.cache.folders import inputs_key
from fedmerge.client.evaluate import seen_items
from fedmerge.client.local_domain import LocalDomain, open_domain
from fedmerge.config import ExperimentConfig, load_config
from fedmerge.domain.splits import Examples, evaluation_examples
from fedmerge.encoder.encode import encode
from fedmerge.encoder.text import Order, Tokens, pack_sequences
from fedmerge.evaluation.ranks import FloatArray, per_user_metrics, rank_targets
from fedmerge.evaluation.sums import (
    LAST_ITEM,
    RECENT_ITEMS,
    VARIANTS,
    Estimate,
    MetricSums,
    Variant,
    metric_sums,
    paired_difference,
    paired_difference_of_mean,
)
from fedmerge.files import make_folder, write_bytes, write_json
from fedmerge.sequence.anchored import recent_items_source

CONFIG = Path(__file__).resolve().parents[3] / "configs" / "amazon3.toml"
PIECE = 500  # texts that are encoded before their vectors are kept
ORDERS: tuple[Order, ...] = ("newest-first", "newest-last")
ROWS = (*(f"text, {order}" for order in ORDERS), LAST_ITEM, RECENT_ITEMS)
SHOWN = ("recall@10", "ndcg@10")
Outcomes = dict[Variant, dict[str, FloatArray]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table for each domain, one of means over domains, and what encoding costs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("domains", nargs="+", type=Path, help="domain folders")
    parser.add_argument("--backbones", nargs="+", required=True, help="ids or folders; the first is compared with")
    parser.add_argument("--users", type=int, default=1000, help="validation users a domain (default: 1000)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="change amazon3.toml")
    parser.add_argument("--out", type=Path, required=True, help="folder for vectors and results.json")
    options = parser.parse_args(arguments)
    config = load_config(CONFIG, options.set)
    torch.set_num_threads(config.runtime.threads_per_client)
    names = [Path(source).name for source in options.backbones]
    outcomes: dict[str, Outcomes] = {folder.name: {variant: {} for variant in VARIANTS} for folder in options.domains}
    costs: dict[str, Any] = {}
    for name, source in zip(names, options.backbones, strict=True):
        for folder in options.domains:
            found, costs[f"{name}, {folder.name}"] = rows_of(source, folder, config, options.users, options.out)
            for variant, of_rows in found.items():
                outcomes[folder.name][variant] |= {f"{name}: {row}": array for row, array in of_rows.items()}
    sums = {
        domain: {variant: metric_sums(found[variant], variant) for variant in VARIANTS}
        for domain, found in outcomes.items()
    }
    for variant in VARIANTS:
        for line in table({domain: of_variants[variant] for domain, of_variants in sums.items()}, names):
            print(line)
    for label, cost in costs.items():
        print(label, cost, sep=" | ")
    sums_as_json = {domain: [of_variant.to_dict() for of_variant in found.values()] for domain, found in sums.items()}
    write_json(options.out / "results.json", {"costs": costs, "sums": sums_as_json})


def rows_of(
    source: str, folder: Path, config: ExperimentConfig, users: int, out: Path
) -> tuple[Outcomes, dict[str, float]]:
    """Return one backbone's outcomes of all rows on a domain's validation users, and what its items cost to encode."""
    section = config.backbone.model_copy(update={"source": source})
    backbone = backbone_of(section, config.runtime)
    domain = open_domain(folder, backbone, config.text)
    examples = evaluation_examples(domain.interactions, "valid", users, config.seed)
    of_items = {
        "backbone": backbone.sha256,
        "catalog": domain.manifest.catalog_sha256,
        "text": config.text.cache_inputs(),
        "precision": str(backbone.compute.autocast_dtype),
    }
    of_users = [domain.manifest.interactions_sha256, users, config.seed]
    kept = out / f"{Path(source).name}-{folder.name}-{inputs_key(of_items)}"
    items, cost = vectors(kept / "items", domain, domain.item_sequences)
    print(f"{Path(source).name}, {folder.name}: {len(items)} items encoded, {cost}", flush=True)
    found = dict(sources(kept / f"users-{inputs_key({'users': of_users})}", domain, examples, items))
    outcomes: Outcomes = {
        variant: {
            row: per_user_metrics(rank_targets(*vectors_of, examples.targets, seen_items(examples, variant)))
            for row, vectors_of in found.items()
        }
        for variant in VARIANTS
    }
    return outcomes, cost


def sources(
    kept: Path, domain: LocalDomain, examples: Examples, items: torch.Tensor
) -> Iterator[tuple[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Yield each row with the vectors of users (U, d) and items (N, d)."""
    text = domain.text
    for order in ORDERS:
        packed = pack_sequences(
            domain.table, examples.histories, domain.backbone.special, text.max_items, text.max_tokens, order
        )
        yield f"text, {order}", (vectors(kept / order, domain, packed)[0], items)
    last = torch.tensor([int(history[-1]) for history in examples.histories])
    yield LAST_ITEM, (items[last], items)
    recent = recent_items_source(items, examples.histories, RECENT_ITEMS)
    yield RECENT_ITEMS, (recent.user_vectors, recent.item_vectors)


def vectors(folder: Path, domain: LocalDomain, texts: Sequence[Tokens]) -> tuple[torch.Tensor, dict[str, float]]:
    """Encode texts into (n, d) piece by piece, or read the pieces that are kept; also their cost in CPU seconds."""
    make_folder(folder)
    pieces = []
    for start in range(0, len(texts), PIECE):
        file, of_piece = folder / f"{start:06}.safetensors", texts[start : start + PIECE]
        if not file.is_file():
            started = time.process_time()
            encoded = encode(domain.backbone, of_piece)
            seconds = torch.tensor([time.process_time() - started])
            write_bytes(file, save({"vectors": encoded, "seconds": seconds}))
        pieces.append(load_file(file))
    spent = sum(float(piece["seconds"]) for piece in pieces)
    tokens = sum(len(text) for text in texts) / len(texts)
    cost = {"tokens a text": round(tokens, 1), "texts a CPU second": round(len(texts) / spent, 1)}
    return torch.cat([piece["vectors"] for piece in pieces]), cost


def table(sums: Mapping[str, MetricSums], names: Sequence[str]) -> Iterator[str]:
    """Yield the lines of one variant: each row's means, and its differences to the first backbone's."""
    of_domains = list(sums.values())
    yield f"{of_domains[0].variant}, {[found.num_users for found in of_domains]} users | " + " | ".join([*sums, "mean"])
    for row in ROWS:
        for name in names:
            label, first = f"{name}: {row}", f"{names[0]}: {row}"
            means = [[found.mean(label, metric) for metric in SHOWN] for found in of_domains]
            means.append([sum(column) / len(means) for column in zip(*means, strict=True)])
            yield " | ".join([label, *(" / ".join(f"{mean:.4f}" for mean in pair) for pair in means)])
            if name == names[0]:
                continue
            gains = [[paired_difference(found, label, first, metric) for metric in SHOWN] for found in of_domains]
            gains.append([paired_difference_of_mean(of_domains, label, first, metric) for metric in SHOWN])
            yield " | ".join(["difference", *(" / ".join(map(_difference, pair)) for pair in gains)])


def _difference(estimate: Estimate) -> str:
    return f"{estimate.mean:+.4f} ± {(estimate.high - estimate.low) / 2:.4f}"


if __name__ == "__main__":
    main()
