"""Sections with bytes, seconds and memory."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from fedmerge.report.bench.dataset import HEADLINE, ROLE_TITLES, Dataset, mean_of, scores_of, whole_federation
from fedmerge.report.bench.notation import metric_title, strategy_name
from fedmerge.report.html import charts
from fedmerge.report.html.page import ABSENT, Cell, Column, Html, decimal, join, note, number_cell, seconds, size, table


def bytes_section(data: Dataset) -> Html | None:
    """Return scores against bytes; None if no bytes were measured."""
    costs = whole_federation(data.tables.costs)
    traffic = {strategy: mean_of(costs, strategy, _traffic) for strategy in data.strategies}
    pictures, drawn = [], []
    for role in data.roles:
        scores = scores_of(data, data.variant, role, HEADLINE[0])
        points = [
            charts.Point(strategy, data.looks[strategy], bytes_of, score.mean, None, score.spread)
            for strategy, bytes_of in traffic.items()
            if (score := scores.get(strategy)) and bytes_of is not None
        ]
        title = f"{metric_title(HEADLINE[0])}, {ROLE_TITLES[role]}"
        pictures.append(
            charts.scatter_chart(
                title, "bytes up and down", metric_title(HEADLINE[0]), points, x_text=size, x_from_zero=True
            )
        )
        drawn += points
    caption = (
        "Bytes of all clients together, up and down, mean over seeds. Up and to the left is better; bars are the "
        "standard deviation over seeds."
    )
    return charts.with_legend(pictures, drawn, caption)


def _traffic(row: Mapping[str, Any]) -> float | None:
    if row["bytes_up"] is None or row["bytes_down"] is None:
        return None
    return float(row["bytes_up"] + row["bytes_down"])


def costs_section(data: Dataset) -> Html | None:
    """Return the table of costs; None without any."""
    rows = whole_federation(data.tables.costs)
    if not rows:
        return None
    columns: list[tuple[str, str, Callable[[float | None], str]]] = [
        ("bytes_up", "Up", size),
        ("bytes_down", "Down", size),
        ("client_seconds", "Clients", seconds),
        ("server_seconds", "Server", seconds),
        ("peak_bytes", "Peak memory", size),
        ("rank", "Rank", partial(decimal, num_digits=0)),
        ("error", "Error", decimal),
        ("residual", "Residual", decimal),
    ]
    body = []
    for strategy in dict.fromkeys(row["strategy"] for row in rows):
        cells = [Cell(strategy_name(data, strategy), strategy)]
        for name, _, text in columns:
            if name in ("peak_bytes", "rank"):
                peaks = [row[name] for row in rows if row["strategy"] == strategy and row[name] is not None]
                value = max(peaks, default=None)
            else:
                value = mean_of(rows, strategy, lambda row, name=name: row[name])  # type: ignore[misc]  # a bound name
            cells.append(number_cell(value, text(value)))
        body.append(cells)
    heads = [Column("Strategy", numeric=False), *(Column(title) for _, title, _ in columns)]
    return join(
        table(f"{data.prefix}costs-table", "Means over seeds; peak memory and rank: the largest", heads, body),
        note(
            "Up: from all clients to the server; down: the reverse. Clients: seconds of training and of leave-one-out "
            "votes, summed over clients, without evaluation. In the last round of a federation of rounds, error is the "
            "distance of the aggregate from the exact mean, and residual the largest part of it that a client's start "
            f"leaves out; both are shares of its norm. {ABSENT}: not measured, or not applicable."
        ),
    )
