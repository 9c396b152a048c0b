"""Run and benchmark folders for tests of the report, computed from random outcomes of users; a parser of pages."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from run_folders import NUM_USERS, TRAIN, UNSEEN, Place, make_run

from fedmerge.config import Split, from_flat
from fedmerge.evaluation.ranks import METRICS, per_user_metrics
from fedmerge.evaluation.sums import VARIANTS, MetricSums, Variant, metric_sums
from fedmerge.files import read_json, write_json, write_table
from fedmerge.report.bench_tables import EVERY_FOLD, BenchTables
from fedmerge.report.run.final_report import metric_rows, product_rows
from fedmerge.report.statistics import comparison_rows, rank_rows
from fedmerge.report.tables import Role
from fedmerge.seeding import generator

STRATEGIES = ("backbone", "average", "mergerec")
DOMAINS = ("books", "camping", "coffee", "toys")
NUM_ITEMS = 80
# Strategy of some_private_bench -> what it sets
PRIVATE: Mapping[str, Mapping[str, Any]] = {
    "average": {"dp.noise_multiplier": 0.0},
    "some": {"dp.epsilon": 8.0},
    "much": {"dp.epsilon": 1.0},
    "summed": {"dp.epsilon": 1.0, "privacy.policy": "aggregate-only"},
    "only-noise": {"dp.noise_multiplier": 2.0},
    "open": {"dp.mode": "none", "dp.delta": "none", "train.negatives": "in-batch"},
}
VOID = {"meta", "link", "br"}
_SPLITS: tuple[Split, ...] = ("valid", "test")


def some_sums(
    strategies: Sequence[str],
    seed: int,
    domain: str,
    split: str,
    variant: Variant,
    num_users: int = 300,
    seeds: Mapping[str, int] | None = None,
) -> MetricSums:
    """Draw metric sums; a domain's users are the same under every seed, and later strategies are better.

    Some strategies may have seeds of their own.
    """
    luck = generator(0, "users", domain, split).random(num_users)
    outcomes = {}
    for number, name in enumerate(strategies):
        own = (seeds or {}).get(name, seed)
        moved = generator(own, name, domain).normal(0.03 * number, 0.01)
        place = luck + generator(own, name, domain, split, "users").normal(0, 0.1, num_users) - moved
        if variant == "masked":
            place = place - 0.02
        outcomes[name] = per_user_metrics(1 + (np.clip(place, 0, 0.999) * NUM_ITEMS).astype(np.int64))
    return metric_sums(outcomes, variant)


def some_bench(
    strategies: Sequence[str] = STRATEGIES,
    domains: Sequence[str] = DOMAINS,
    datasets: Sequence[str] = ("demo",),
    seeds: Sequence[int] = (0, 1, 2),
    num_layers: int = 6,
    folds: bool = True,
) -> BenchTables:
    """Return a benchmark's tables; with ``folds`` every domain in turn is also unseen."""
    left_outs = ("", *(domains if folds else ()))
    places = [(dataset, seed, left_out) for dataset in datasets for seed in seeds for left_out in left_outs]
    reported = {
        (*place, domain, split, variant): some_sums(
            strategies, place[1], f"{place[0]} {domain} {domain == place[2]}", split, variant
        )
        for place in places
        for domain in domains
        for split in _SPLITS
        for variant in VARIANTS
        if not place[2] or (domain == place[2] and split == "test")  # a fold evaluates only the domain left out
    }
    comparisons: list[dict[str, Any]] = []
    for dataset in datasets:
        for variant in VARIANTS:
            seen, unseen = (
                {
                    (seed, domain): sums
                    for (name, seed, left_out, domain, split, of_variant), sums in reported.items()
                    if (name, split, of_variant) == (dataset, "test", variant) and left_out == (domain if fold else "")
                }
                for fold in (False, True)
            )
            comparisons += comparison_rows(seen, dataset=dataset, baseline="average", role="train")
            if unseen:
                comparisons += comparison_rows(
                    unseen, dataset=dataset, baseline="average", role="unseen", left_out=EVERY_FOLD
                )
    cells = [
        {"dataset": dataset, "strategy": strategy, "seed": seed, "left_out": left_out}
        for dataset, seed, left_out in places
        for strategy in strategies
    ]
    learned = [(strategies.index(cell["strategy"]), cell) for cell in cells if cell["strategy"] != "backbone"]
    blocks = {
        (dataset, domain, seed): {strategy: sums.mean(strategy, "ndcg@10") for strategy in strategies}
        for (dataset, seed, left_out, domain, split, variant), sums in reported.items()
        if (left_out, split, variant) == ("", "test", "unmasked")
    }
    return BenchTables(
        title="Smoke",
        synthetic=True,
        results=[row for key, sums in reported.items() for row in _results(sums, *key)],
        comparisons=comparisons,
        costs=[{**cell, **_cost(strategies.index(cell["strategy"]), cell, len(domains))} for cell in cells],
        curves=[
            {**cell, **point}
            for n, cell in learned
            for domain in domains
            if domain != cell["left_out"]
            for point in _curve(n, domain, cell)
        ],
        coefficients=[
            {**cell, **row}
            for n, cell in learned
            for domain in domains
            if domain != cell["left_out"]
            for row in _coefficients(n, domain, cell, num_layers)
        ],
        ranks=rank_rows(blocks),
        cells=[{**cell, "status": "done", "seconds": 12.25, **_settings(cell)} for cell in cells],
        references=("backbone",) if "backbone" in strategies else (),
    )


def some_private_bench() -> BenchTables:
    """Return the tables of a benchmark of strategies with differential privacy, and one without."""
    tables = some_bench(tuple(PRIVATE), folds=False)
    flat = {"dp.mode": "user", "dp.delta": 1e-4, "train.negatives": "catalog", "merge.methods": "average"}
    configs = {name: from_flat({**flat, **changes}).model_dump(mode="json") for name, changes in PRIVATE.items()}
    return replace(tables, cells=[{**cell, "config": configs[cell["strategy"]]} for cell in tables.cells])


def _cost(number: int, cell: Mapping[str, Any], num_domains: int) -> dict[str, Any]:
    random = generator(cell["seed"], "costs", cell["strategy"], cell["left_out"])
    free = cell["strategy"] == "backbone"
    traffic = 0.0 if free else 1.2e6 * num_domains * (1 + 3 * (number % 3))
    return {
        "bytes_up": traffic,
        "bytes_down": traffic * 1.5,
        "client_seconds": 0.0 if free else 300 + 30 * random.random(),
        "server_seconds": 1 + 100 * (number % 2) + random.random(),
        "peak_bytes": None if free else 1.4e9 + 1e8 * random.random(),
        "rank": 8.0 * (1 + number % 3),
        "error": 0.1 * random.random() if number % 2 else None,
        "residual": 0.3 * random.random() if number % 2 else None,
    }


def _curve(number: int, domain: str, cell: Mapping[str, Any]) -> list[dict[str, Any]]:
    random = generator(cell["seed"], "curve", cell["strategy"], domain)
    rows: list[dict[str, Any]] = []
    for step in range(0, 301, 20):
        loss = 3 + 2 * np.exp(-step / 90) + 0.1 * number + random.normal(0, 0.03)
        rows.append({"domain": domain, "step": step, "name": "loss", "value": float(loss)})
        score = 0.2 - 0.1 * np.exp(-step / 60) + 0.01 * number
        rows.append({"domain": domain, "step": step, "name": "ndcg@10", "value": float(score)})
    return rows


def _coefficients(number: int, domain: str, cell: Mapping[str, Any], num_layers: int) -> list[dict[str, Any]]:
    """Return one value per layer, or a single one."""
    groups = [f"layer {layer}" for layer in range(num_layers)] if number % 2 == 0 else ["all"]
    values = generator(cell["seed"], "coefficients", cell["strategy"], domain).normal(0.25, 0.3, len(groups)).tolist()
    return [{"domain": domain, "group": group, "value": value} for group, value in zip(groups, values, strict=True)]


def _results(
    sums: MetricSums, dataset: str, seed: int, left_out: str, domain: str, split: str, variant: str
) -> list[dict[str, Any]]:
    return [
        {
            "dataset": dataset,
            "strategy": strategy,
            "label": f"{strategy} {0.5 + 0.1 * seed:.1f}" if strategy == "mergerec" else strategy,
            "seed": seed,
            "left_out": left_out,
            "domain": domain,
            "role": "unseen" if domain == left_out else "train",
            "split": split,
            "variant": variant,
            "metric": metric,
            "num_users": sums.num_users,
            "value": sums.mean(strategy, metric),
        }
        for strategy in sums.methods
        for metric in METRICS
    ]


def _settings(cell: Mapping[str, Any]) -> dict[str, Any]:
    merge = {"methods": cell["strategy"]}
    return {
        "config": {"seed": cell["seed"], "merge": merge, "lora": {"rank": 8, "target_modules": "query,value"}},
        "environment": {"python": "3.11.7", "cpus": 2, "packages": {"fedmerge": "0.1.0", "torch": "2.13.0"}},
    }


def make_reported_run(place: Place, run_id: str, more: Sequence[str] = ()) -> Path:
    """Write a finished run with tables of sums and products, curves, layer-wise coefficients and a ledger."""
    folder = make_run(place, run_id, more)
    methods = ("popularity", "last item", "backbone", "expert", "average", "task-arithmetic 0.5")
    roles: dict[str, Role] = dict.fromkeys(TRAIN, "train")
    splits = {}
    for split in _SPLITS:
        domains = TRAIN if split == "valid" else (*TRAIN, UNSEEN)
        splits[split] = {
            domain: {
                variant: some_sums(
                    [m for m in methods if m != "expert" or domain != UNSEEN], 0, domain, split, variant, NUM_USERS * 10
                )
                for variant in VARIANTS
            }
            for domain in domains
        }
    roles[UNSEEN] = "unseen"
    write_table(folder / "metrics.parquet", metric_rows(splits, roles))
    write_table(folder / "products.parquet", product_rows(splits))
    for name in TRAIN:
        random = generator(0, "curve", name)
        validations = [
            {"step": step, "loss": 4.0 - step / 100 + random.random() if step else None, "ndcg": random.random()}
            for step in range(0, 61, 20)
        ]
        report = {"steps": 60, "best_step": 40, "seconds": 12.0, "validations": validations}
        write_json(folder / "adapters" / name / "training.json", report)
    per_domain = {
        name: {"serve": "expert", "merged": 0.1, "expert": 0.2}
        if name == "toys"
        else {"serve": "merged", "merged": 0.2, "expert": 0.1}
        for name in TRAIN
    }
    write_json(
        folder / "choice.json",
        {
            "metric": "ndcg@10",
            "validation": {"average": 0.21, "task-arithmetic 0.5": 0.24},
            "served": "task-arithmetic 0.5",
            "per_domain": per_domain,
        },
    )
    ledger = [
        {"domain": name, "message": message, "name": "x", "dtype": "float32", "shape": "", "size_bytes": size}
        for name in TRAIN
        for message, size in (("query.describe", 321), ("train", 1_234_567))
    ]
    write_table(folder / "exposure.parquet", ledger)
    return folder


def give_many_domains(folder: Path, number: int) -> list[str]:
    """Replace the domains of a finished run by so many; the first has markup in its name."""
    names = ["</script><b>shop", *(f"shop-{i}" for i in range(1, number))]
    methods = ("popularity", "last item", "backbone", "expert", "average", "task-arithmetic 0.5")
    splits: dict[Split, dict[str, dict[Variant, MetricSums]]] = {"valid": {}, "test": {}}
    for name in names:
        for split, of_split in splits.items():
            of_split[name] = {
                variant: some_sums(methods, 0, name, split, variant, num_users=40) for variant in VARIANTS
            }
    roles: dict[str, Role] = dict.fromkeys(names, "train")
    write_table(folder / "metrics.parquet", metric_rows(splits, roles))
    write_table(folder / "products.parquet", product_rows(splits))
    choice = read_json(folder / "choice.json")
    entries = ({"serve": "merged", "merged": 0.2, "expert": 0.1}, {"serve": "expert", "merged": 0.1, "expert": 0.2})
    choice["per_domain"] = {name: entries[place % 10 == 5] for place, name in enumerate(names)}
    write_json(folder / "choice.json", choice)
    clients = read_json(folder / "clients.json")
    clients["participants"] = {name: {**clients["participants"]["books"], "domain": name} for name in names}
    write_json(folder / "clients.json", clients)
    for place, name in enumerate(names[1:]):
        (folder / "adapters" / name).mkdir()  # the first has no folder: its name is not that of one
        points = [{"step": step, "loss": 4.0 - step / 100, "ndcg": (place % 7 + step) / 100} for step in (0, 20, 40)]
        write_json(folder / "adapters" / name / "training.json", {"steps": 60, "seconds": 12.0, "validations": points})
    ledger = [
        {"domain": name, "message": "train", "name": f"t{i}", "dtype": "float32", "shape": "", "size_bytes": 1000}
        for name in names
        for i in range(3)
    ]
    write_table(folder / "exposure.parquet", ledger)
    return names


@dataclass
class Page(HTMLParser):
    """A parsed page: elements with attributes, the text of every table's cells, and mismatched tags."""

    elements: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    tables: dict[str, list[list[str]]] = field(default_factory=dict)
    text: str = ""
    problems: list[str] = field(default_factory=list)
    open_tags: list[str] = field(default_factory=list)
    table: str = ""
    cell: str | None = None

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if tag not in VOID:
            self.open_tags.append(tag)
        if "scroll" in str(attributes.get("class")).split():
            self.table = str(attributes["id"])
            self.tables[self.table] = []
        if tag == "tr":
            self.tables[self.table].append([])
        if tag in ("td", "th"):
            self.cell = ""

    def handle_endtag(self, tag: str) -> None:
        if not self.open_tags or self.open_tags.pop() != tag:
            self.problems.append(f"</{tag}> at {self.getpos()}")
        if tag in ("td", "th"):
            self.tables[self.table][-1].append(str(self.cell))
            self.cell = None

    def handle_data(self, data: str) -> None:
        if "script" not in self.open_tags and "style" not in self.open_tags:
            self.text += data
        if self.cell is not None:
            self.cell += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def parsed(text: str) -> Page:
    found = Page()
    found.feed(text)
    assert found.problems == []
    assert found.open_tags == []
    return found
