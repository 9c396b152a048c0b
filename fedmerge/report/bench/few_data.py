"""The section with scores by the number of a domain's users, where datasets cut it to shares of them."""

import math
from collections.abc import Mapping

from fedmerge.report.bench.dataset import HEADLINE, VARIANT_NOTES
from fedmerge.report.bench.notation import metric_title
from fedmerge.report.bench_tables import BenchTables
from fedmerge.report.html import charts
from fedmerge.report.html.looks import Look
from fedmerge.report.html.page import Cell, Column, Html, decimal, join, note, number_cell, table

TRAIN_USERS = "train_users"  # key of a cell's record: domain -> users of its folder

Values = dict[tuple[str, int], list[float]]  # strategy and number of users -> a value per seed


def few_data_section(tables: BenchTables, looks: Mapping[str, Look]) -> Html | None:
    """Return a figure and a table per domain that datasets have with different numbers of users; None without one."""
    users = {
        (cell["dataset"], domain): int(number)
        for cell in tables.cells
        for domain, number in cell.get(TRAIN_USERS, {}).items()
    }
    sizes: dict[str, set[int]] = {}
    for (_, domain), number in users.items():
        sizes.setdefault(domain, set()).add(number)
    variant, metric = "masked", HEADLINE[1]
    pictures: list[Html] = []
    parts: list[Html] = []
    drawn: set[str] = set()
    for domain, numbers in sizes.items():
        values: Values = {}
        for row in tables.results:
            wanted = {"domain": domain, "variant": variant, "metric": metric, "left_out": "", "split": "test"}
            if wanted.items() <= row.items() and row["value"] is not None and (row["dataset"], domain) in users:
                values.setdefault((row["strategy"], users[row["dataset"], domain]), []).append(row["value"])
        if len(numbers) > 1 and values:
            drawn |= {strategy for strategy, _ in values}
            pictures.append(_figure(f"{metric_title(metric)}, {domain}", values, looks))
            parts.append(_table(f"few-data-{len(parts)}", domain, sorted(numbers), values, variant, metric))
    if not pictures:
        return None
    return join(
        charts.grid(*pictures),
        charts.legend({name: look for name, look in looks.items() if name in drawn}, with_line=True),
        note(
            "The domain is cut to the number of users on the axis, who train and select; the other domains stay whole. "
            f"Mean over seeds, within their range. {VARIANT_NOTES[variant]}"
        ),
        *parts,
    )


def _figure(title: str, values: Values, looks: Mapping[str, Look]) -> Html:
    """Return scores over the number of users, on a logarithmic axis."""
    lines = []
    for strategy in dict.fromkeys(strategy for strategy, _ in values):
        found = sorted((number, of_seeds) for (name, number), of_seeds in values.items() if name == strategy)
        points = [
            (math.log10(number), math.fsum(of_seeds) / len(of_seeds), min(of_seeds), max(of_seeds))
            for number, of_seeds in found
        ]
        lines.append(charts.Line(strategy, looks[strategy], points))
    places = {math.log10(number): f"{number:,}" for _, number in values}
    return charts.line_chart(title, "users", lines, x_places=places)


def _table(key: str, domain: str, numbers: list[int], values: Values, variant: str, metric: str) -> Html:
    body = []
    for strategy in dict.fromkeys(strategy for strategy, _ in values):
        row = [Cell(strategy, strategy)]
        for number in numbers:
            of_seeds = values.get((strategy, number))
            mean = math.fsum(of_seeds) / len(of_seeds) if of_seeds else None
            row.append(number_cell(mean, decimal(mean)))
        body.append(row)
    heads = [Column("Strategy", numeric=False), *(Column(f"{number:,} users") for number in numbers)]
    return table(key, f"{metric_title(metric)} of {domain} by number of users, on test, {variant}", heads, body)
