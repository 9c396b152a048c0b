"""The section with differences to the baseline."""

from collections.abc import Mapping
from typing import Any

from fedmerge.report.bench.dataset import HEADLINE, ROLE_TITLES, Dataset, mean_comparisons
from fedmerge.report.bench.notation import difference_text, mark_signs, metric_title, p_text, strategy_name
from fedmerge.report.bench_tables import MEAN
from fedmerge.report.html import charts
from fedmerge.report.html.page import Cell, Column, Html, folded, is_number, join, note, number_cell, table


def differences_section(data: Dataset) -> Html | None:
    """Return differences to the baseline with their intervals; None without a comparison."""
    if not data.tables.comparisons:
        return None
    variant = data.variant
    pictures = []
    for role in data.roles:
        for metric in HEADLINE:
            found = mean_comparisons(data, variant, role, metric)
            dots = [_difference_dot(data, strategy, found[strategy]) for strategy in data.looks if strategy in found]
            pictures.append(charts.dot_chart(f"{metric_title(metric)}, {ROLE_TITLES[role]}", dots, reference=0.0))
    heads = [
        Column("Strategy", numeric=False),
        Column("Domain", numeric=False),
        Column("Metric", numeric=False),
        *(Column(title) for title in ("Difference", "p", "Corrected p", "Seeds")),
    ]
    body = [
        [
            Cell(strategy_name(data, row["strategy"]), row["strategy"]),
            Cell(_domain_name(row), row["domain"]),
            Cell(metric_title(row["metric"]), row["metric"]),
            number_cell(row["difference"], join(mark_signs(row, False), difference_text(row))),
            number_cell(row["p_value"], p_text(row["p_value"])),
            number_cell(row["p_adjusted"], p_text(row["p_adjusted"])),
            number_cell(row["num_seeds"], str(row["num_seeds"])),
        ]
        for row in data.tables.comparisons
        if row["variant"] == variant and row["metric"] in HEADLINE
    ]
    others = sorted({row["baseline"] for row in data.tables.comparisons} - {data.baseline})
    return join(
        charts.grid(*pictures),
        note(
            f"Mean difference to {data.baseline} with its 95 % interval, paired over users; with several seeds it "
            "includes their spread. Filled: significant after Holm's correction; outlined: not significant; arrow: "
            "outside the figure. An interval covers other users and seeds of these domains, not other domains."
            + (f" Differences to {', '.join(others)} are in comparisons.parquet." if others else "")
        ),
        folded(
            "Every difference, by domain",
            table(
                f"{data.prefix}differences-table", f"Differences to {data.baseline}, on test, {variant}", heads, body
            ),
        ),
    )


def _difference_dot(data: Dataset, strategy: str, row: Mapping[str, Any]) -> charts.Dot:
    difference, half = row["difference"], row["half_width"]
    bounded = is_number(difference) and is_number(half)
    return charts.Dot(
        strategy,
        data.looks[strategy],
        difference,
        difference - half if bounded else None,
        difference + half if bounded else None,
        hollow=not row["significant"],
        shown=difference_text(row),
        minor=strategy in data.tables.references,
    )


def _domain_name(row: Mapping[str, Any]) -> str:
    if row["domain"] == MEAN:
        return f"mean of {ROLE_TITLES[row['role']]}"
    return f"{row['domain']} (unseen)" if row["role"] == "unseen" else str(row["domain"])
