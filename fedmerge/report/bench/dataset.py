"""One dataset of a benchmark: its rows, and the means, comparisons and best strategies that the sections show."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedmerge.report.bench_tables import MEAN, BenchTables, Rows
from fedmerge.report.html.looks import Look
from fedmerge.report.html.page import is_number

HEADLINE: tuple[str, ...] = ("recall@10", "ndcg@10")
ROLE_TITLES = {"train": "training domains", "unseen": "unseen domains"}
VARIANT_NOTES = {
    "unmasked": "Items of a user's history stay candidates (unmasked).",
    "masked": "Items of a user's history are removed from the candidates, except the target (masked).",
}

Key = tuple[str, str]  # left_out, domain


@dataclass(frozen=True)
class Score:
    """Mean over seeds, their sample standard deviation (None with one seed), and their number."""

    mean: float
    spread: float | None
    num_seeds: int


@dataclass(frozen=True)
class Dataset:
    """One dataset of a benchmark, with the values that all sections of its page share.

    Attributes:
        tables: the rows of this dataset only: results on test, comparisons with ``baseline``.
        strategies: all strategies, in the order of the results.
        competing: the strategies without the references.
        baseline: baseline of the comparisons; None without comparisons.
        other_baselines: baselines whose comparisons are not shown.
        variant: "unmasked" if there are such results, else "masked".
        roles: roles of the domains, "train" first.
        looks: strategy -> its colour and shape.
        prefix: prefix of this dataset's anchors.
    """

    tables: BenchTables
    strategies: tuple[str, ...]
    competing: tuple[str, ...]
    baseline: str | None
    other_baselines: tuple[str, ...]
    variant: str
    roles: tuple[str, ...]
    looks: Mapping[str, Look]
    prefix: str


def dataset_of(tables: BenchTables, name: str, looks: Mapping[str, Look], prefix: str) -> Dataset:
    """Select one dataset's rows, and collect what its sections share."""

    def rows(table_name: str) -> list[Mapping[str, Any]]:
        return [row for row in getattr(tables, table_name) if row["dataset"] == name]

    results = [row for row in rows("results") if row["split"] == "test"]
    baselines = list(dict.fromkeys(row["baseline"] for row in rows("comparisons")))
    baseline = baselines[0] if baselines else None
    strategies = tuple(dict.fromkeys(row["strategy"] for row in results))
    found = {row[key] for row in results for key in ("variant", "role")}
    return Dataset(
        tables=replace(
            tables,
            results=results,
            comparisons=[row for row in rows("comparisons") if row["baseline"] == baseline],
            costs=rows("costs"),
            curves=rows("curves"),
            coefficients=rows("coefficients"),
            leaks=rows("leaks"),
            cells=rows("cells"),
        ),
        strategies=strategies,
        competing=tuple(strategy for strategy in strategies if strategy not in tables.references),
        baseline=baseline,
        other_baselines=tuple(baselines[1:]),
        variant=next((variant for variant in VARIANT_NOTES if variant in found), "unmasked"),
        roles=tuple(role for role in ROLE_TITLES if role in found),
        looks=looks,
        prefix=prefix,
    )


def mean_scores(rows: Rows, keys: Sequence[Key]) -> dict[str, Score]:
    """Return each strategy's score: the unweighted mean over ``keys`` for each seed, then the mean over seeds.

    A seed counts for a strategy where it has a value everywhere; a strategy without such a seed is absent.

    Args:
        rows: of results, of one dataset, split, variant, role and metric.
        keys: at least one.
    """
    values: dict[tuple[str, int], dict[Key, float]] = {}
    for row in rows:
        if is_number(row["value"]):
            of_seed = values.setdefault((row["strategy"], row["seed"]), {})
            of_seed[row["left_out"], row["domain"]] = row["value"]
    by_strategy: dict[str, list[float]] = {}
    for (strategy, _), of_seed in sorted(values.items()):
        if keys and all(key in of_seed for key in keys):
            by_strategy.setdefault(strategy, []).append(math.fsum(of_seed[key] for key in keys) / len(keys))
    return {
        strategy: Score(math.fsum(means) / len(means), statistics.stdev(means) if len(means) > 1 else None, len(means))
        for strategy, means in by_strategy.items()
    }


def rows_on_test(data: Dataset, variant: str, role: str, metric: str) -> Rows:
    """Select the results on test of one variant, role and metric."""
    wanted = {"variant": variant, "role": role, "metric": metric}
    return [row for row in data.tables.results if all(row[key] == value for key, value in wanted.items())]


def mean_keys(rows: Rows, role: str) -> list[Key]:
    """Return the keys of a mean: training domains without folds; unseen domains, in each fold that left them out."""
    keys = list(dict.fromkeys((row["left_out"], row["domain"]) for row in rows))
    return keys if role == "unseen" else [key for key in keys if not key[0]]


def scores_of(data: Dataset, variant: str, role: str, metric: str) -> dict[str, Score]:
    """Return strategy -> its score over all domains of a role."""
    rows = rows_on_test(data, variant, role, metric)
    return mean_scores(rows, mean_keys(rows, role))


def best_strategy(data: Dataset, scores: Mapping[str, Score]) -> str | None:
    """Return the competing strategy with the highest score; None if fewer than two have a score."""
    competing = [strategy for strategy in data.competing if strategy in scores]
    return max(competing, key=lambda strategy: scores[strategy].mean) if len(competing) > 1 else None


def mean_comparisons(data: Dataset, variant: str, role: str, metric: str) -> dict[str, Mapping[str, Any]]:
    """Return strategy -> its comparison with the baseline, over the mean of a role's domains."""
    return {
        row["strategy"]: row
        for row in data.tables.comparisons
        if (row["domain"], row["variant"], row["role"], row["metric"]) == (MEAN, variant, role, metric)
    }


def whole_federation(rows: Rows) -> Rows:
    """Return the rows without a left-out domain, or all rows if every row has one."""
    return [row for row in rows if not row["left_out"]] or rows


def mean_of(rows: Rows, strategy: str, value: Callable[[Mapping[str, Any]], float | None]) -> float | None:
    """Return the mean of a strategy's values; None without any."""
    found = [number for row in rows if row["strategy"] == strategy and (number := value(row)) is not None]
    return math.fsum(found) / len(found) if found else None
