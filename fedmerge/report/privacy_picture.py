"""Utility, privacy and bytes side by side: the strategies of a benchmark that train with differential privacy."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedmerge.report import charts
from fedmerge.report.page import ABSENT, Cell, Column, Html, decimal, join, note, number_cell, size, table

_UNITS = {
    "user": "user",
    "domain-local": "domain, noise at the clients",
    "domain-central": "domain, noise at the server",
}

Values = tuple[float, float, float]  # mean over seeds, and a standard deviation below and above it


@dataclass(frozen=True)
class PrivateRow:
    """A strategy with differential privacy.

    Attributes:
        strategy: its name.
        config: of one of its cells, nested.
        scores: title of a score -> its values.
        bytes_up, bytes_down: of all clients together, mean over seeds; None where not measured.
    """

    strategy: str
    config: Mapping[str, Any]
    scores: Mapping[str, Values]
    bytes_up: float | None
    bytes_down: float | None


def utility_and_privacy(key: str, rows: Sequence[PrivateRow]) -> Html | None:
    """A picture a score, with a line for each set of strategies that differ in noise alone, and a table; or nothing.

    Of one ε alone there is nothing to compare.


    Args:
        key: identifies the table on the page.
        rows: strategies, in their order; those without differential privacy are left out.
    """
    rows = [row for row in rows if row.config.get("dp", {}).get("mode", "none") != "none"]
    if len({_epsilon(row) for row in rows}) < 2:
        return None
    lines: dict[str, list[PrivateRow]] = {}
    for row in rows:
        lines.setdefault(_all_but_noise(row.config), []).append(row)
    labels = _labels(list(lines.values()))
    pictures = [
        charts.line_chart(
            title,
            "1/ε",
            [
                charts.Line(label, number, _points(of_line, title))
                for number, (label, of_line) in enumerate(zip(labels, lines.values(), strict=True))
            ],
        )
        for title in dict.fromkeys(title for row in rows for title in row.scores)
    ]
    return join(
        charts.grid(*pictures),
        charts.legend({label: number for number, label in enumerate(labels)}, with_line=True),
        note(
            "To the right is more private: 1/ε is 0 without noise (ε = ∞) and 1 at ε = 1. Mean over seeds, within "
            "their standard deviation. Lines that lie on each other merge the same and differ in what travels, and to "
            "whom."
        ),
        _table(key, rows),
        note(
            "ε and δ are those that were asked for, of one run, for the unit named; every further run on the same data "
            "adds to them. The tables above hold exact metric sums, which no (ε, δ) covers."
        ),
    )


def _table(key: str, rows: Sequence[PrivateRow]) -> Html:
    titles = list(dict.fromkeys(title for row in rows for title in row.scores))
    heads = [Column("Strategy", numeric=False), Column("What travels", numeric=False), Column("Unit", numeric=False)]
    heads += [Column(title) for title in ("ε", "δ", *titles, "Up", "Down")]
    body = []
    for row in rows:
        policy, dp = str(row.config["privacy"]["policy"]), row.config["dp"]
        epsilon = _epsilon(row)
        told = ABSENT if epsilon is None else "∞" if epsilon == math.inf else f"{epsilon:g}"
        means = [row.scores[title][0] if title in row.scores else None for title in titles]
        body.append(
            [
                Cell(row.strategy, row.strategy),
                Cell(policy, policy),
                Cell(_unit(row.config), dp["mode"]),
                number_cell(epsilon, told),
                number_cell(dp["delta"], ABSENT if dp["delta"] is None else f"{dp['delta']:g}"),
                *(number_cell(mean, decimal(mean)) for mean in means),
                number_cell(row.bytes_up, size(row.bytes_up)),
                number_cell(row.bytes_down, size(row.bytes_down)),
            ]
        )
    return table(key, "Asked for, reached, and sent by all clients together; means over seeds", heads, body)


def _epsilon(row: PrivateRow) -> float | None:
    """Infinity without noise; None where only the noise was given."""
    dp = row.config["dp"]
    if dp["noise_multiplier"] is not None:
        return math.inf if dp["noise_multiplier"] == 0 else None
    return float(dp["epsilon"])


def _points(rows: Sequence[PrivateRow], title: str) -> list[tuple[float, float, float, float]]:
    """1/ε and a score's values, from left to right."""
    return sorted(
        (1 / epsilon, *row.scores[title])
        for row in rows
        if title in row.scores and (epsilon := _epsilon(row)) is not None
    )


def _all_but_noise(config: Mapping[str, Any]) -> str:
    """What two strategies have in common that differ in the amount of noise alone."""
    others = {section: values for section, values in config.items() if section not in ("dp", "seed")}
    dp = {key: value for key, value in config["dp"].items() if key not in ("epsilon", "noise_multiplier")}
    return json.dumps([others, dp], sort_keys=True)


def _labels(lines: Sequence[Sequence[PrivateRow]]) -> list[str]:
    """What travels, what is merged and whom it protects; where that is the same of two lines, a strategy too."""
    firsts = [of_line[0].config for of_line in lines]
    labels = [f"{first['privacy']['policy']}: {_merged(first)}, by {_unit(first)}" for first in firsts]
    return [
        label if labels.count(label) == 1 else f"{label} ({of_line[0].strategy})"
        for label, of_line in zip(labels, lines, strict=True)
    ]


def _unit(config: Mapping[str, Any]) -> str:
    """Whom it protects, and whether it does."""
    dp = config["dp"]
    return _UNITS[dp["mode"]] + (" (seeded noise: no guarantee)" if dp["randomness"] == "seeded" else "")


def _merged(config: Mapping[str, Any]) -> str:
    return str(config["rounds"]["rule"] or ", ".join(config["merge"]["methods"]))
