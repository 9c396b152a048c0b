"""The section with utility, privacy and bytes: strategies trained with differential privacy, or audited."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedmerge.privacy.attacks import AGAINST_BACKBONE
from fedmerge.report.bench.dataset import (
    HEADLINE,
    ROLE_TITLES,
    Dataset,
    Score,
    mean_of,
    mean_scores,
    scores_of,
    whole_federation,
)
from fedmerge.report.bench.notation import (
    metric_title,
)
from fedmerge.report.html import charts
from fedmerge.report.html.looks import in_order
from fedmerge.report.html.page import (
    ABSENT,
    Cell,
    Column,
    Html,
    decimal,
    join,
    note,
    number_cell,
    size,
    table,
)

_UNITS = {
    "none": "none: no guarantee",
    "user": "user",
    "domain-local": "domain, noise at the clients",
    "domain-central": "domain, noise at the server",
}

_LEAKS = {  # title -> model, attack and metric
    "Membership AUC, expert": ("expert", AGAINST_BACKBONE, "auc"),
    "Membership AUC, merge": ("merged", AGAINST_BACKBONE, "auc"),
    "Exposure, expert": ("expert", "canaries", "mean_exposure"),
    "Exposure, merge": ("merged", "canaries", "mean_exposure"),
}

Values = tuple[float, float, float]  # mean over seeds, minus and plus a standard deviation


@dataclass(frozen=True)
class PrivateRow:
    """A strategy with its privacy settings, scores and audits.

    Attributes:
        strategy: its name.
        config: configuration of one of its cells, nested.
        scores: title of a score -> its values.
        leaks: title of a measure of an audit -> its values; empty without an audit.
        bytes_up, bytes_down: bytes of all clients, mean over seeds; None if not measured.
    """

    strategy: str
    config: Mapping[str, Any]
    scores: Mapping[str, Values]
    leaks: Mapping[str, Values]
    bytes_up: float | None
    bytes_down: float | None


def utility_and_privacy(key: str, rows: Sequence[PrivateRow]) -> Html | None:
    """Return a table, and a figure per score with a line for each set of strategies that differ in noise alone.

    Without audits and with a single ε there is nothing to compare, and the result is None.

    Args:
        key: anchor of the table.
        rows: strategies, in their order; those without differential privacy and audit are left out.
    """
    noised = [row for row in rows if _is_noised(row)]
    rows = [row for row in rows if row.leaks or _is_noised(row)]
    several = len({_epsilon(row) for row in noised}) > 1
    audited = any(row.leaks for row in rows)
    if not several and not audited:
        return None
    return join(
        *(_pictures(noised) if several else ()),
        _table(key, rows),
        note(
            "ε and δ are the configured ones of one run, for the named unit; each further run on the same data adds to "
            "them. The tables above hold exact metric sums, which no (ε, δ) covers."
        ),
        note(
            "Membership: AUC of an attack that separates training users from held-out users by their loss against the "
            "backbone's (0.5 by chance). Exposure: how strongly the model prefers planted users with random items, in "
            "bits (1.44 by chance). An attack that finds nothing does not prove that nothing can be found; "
            "leaks.parquet has all attacks. These are exact figures about users, for a simulation or for the domains' "
            "owners."
        )
        if audited
        else None,
    )


def _pictures(rows: Sequence[PrivateRow]) -> tuple[Html, ...]:
    lines: dict[str, list[PrivateRow]] = {}
    for row in rows:
        lines.setdefault(_all_but_noise(row.config), []).append(row)
    labels = _labels(list(lines.values()))
    looks = in_order(labels)
    pictures = [
        charts.line_chart(
            title,
            "1/ε",
            [
                charts.Line(label, looks[label], _points(of_line, title))
                for label, of_line in zip(labels, lines.values(), strict=True)
            ],
        )
        for title in dict.fromkeys(title for row in rows for title in {**row.scores, **row.leaks})
    ]
    return (
        charts.grid(*pictures),
        charts.legend(looks, with_line=True),
        note(
            "Further right is more private: 1/ε is 0 without noise (ε = ∞) and 1 at ε = 1. Mean over seeds, within "
            "their standard deviation. Strategies on coinciding lines merge the same adapters and differ in what is "
            "sent to whom. Bytes are those of all clients, up and down; noise does not change them."
        ),
    )


def _table(key: str, rows: Sequence[PrivateRow]) -> Html:
    titles = list(dict.fromkeys(title for row in rows for title in {**row.scores, **row.leaks}))
    heads = [Column("Strategy", numeric=False), Column("What travels", numeric=False), Column("Unit", numeric=False)]
    heads += [Column(title) for title in ("ε", "δ", *titles, "Up", "Down")]
    body = []
    for row in rows:
        policy, dp = str(row.config["privacy"]["policy"]), row.config["dp"]
        epsilon, delta = _epsilon(row), dp["delta"] if dp["mode"] != "none" else None
        shown = ABSENT if epsilon is None else "∞" if epsilon == math.inf else f"{epsilon:g}"
        measured = {**row.scores, **row.leaks}
        means = [measured[title][0] if title in measured else None for title in titles]
        body.append(
            [
                Cell(row.strategy, row.strategy),
                Cell(policy, policy),
                Cell(_unit(row.config), dp["mode"]),
                number_cell(epsilon, shown),
                number_cell(delta, ABSENT if delta is None else f"{delta:g}"),
                *(number_cell(mean, decimal(mean)) for mean in means),
                number_cell(row.bytes_up, size(row.bytes_up)),
                number_cell(row.bytes_down, size(row.bytes_down)),
            ]
        )
    return table(key, "Configured privacy, scores, and bytes of all clients; means over seeds", heads, body)


def _is_noised(row: PrivateRow) -> bool:
    return bool(row.config.get("dp", {}).get("mode", "none") != "none")


def _epsilon(row: PrivateRow) -> float | None:
    """Return ε: infinity without noise, None if only the noise multiplier is configured."""
    dp = row.config["dp"]
    if dp["mode"] == "none":
        return math.inf
    if dp["noise_multiplier"] is not None:
        return math.inf if dp["noise_multiplier"] == 0 else None
    return float(dp["epsilon"])


def _points(rows: Sequence[PrivateRow], title: str) -> list[tuple[float, float, float, float]]:
    """Return (1/ε, *values of a score), from left to right."""
    return sorted(
        (1 / epsilon, *values)
        for row in rows
        if (values := row.scores.get(title) or row.leaks.get(title)) and (epsilon := _epsilon(row)) is not None
    )


def _all_but_noise(config: Mapping[str, Any]) -> str:
    """Return a key that is equal for strategies that differ in the amount of noise alone."""
    others = {section: values for section, values in config.items() if section not in ("dp", "seed")}
    dp = {key: value for key, value in config["dp"].items() if key not in ("epsilon", "noise_multiplier")}
    return json.dumps([others, dp], sort_keys=True)


def _labels(lines: Sequence[Sequence[PrivateRow]]) -> list[str]:
    """Return a label per line: policy, merge, unit of privacy and bytes, and a strategy where two would be equal."""
    firsts = [of_line[0].config for of_line in lines]
    labels = [f"{first['privacy']['policy']}: {_merged(first)}, by {_unit(first)}" for first in firsts]
    return [
        (label if labels.count(label) == 1 else f"{label} ({of_line[0].strategy})") + _bytes(of_line[0])
        for label, of_line in zip(labels, lines, strict=True)
    ]


def _bytes(row: PrivateRow) -> str:
    """Return bytes up and down together; noise does not change them."""
    return "" if row.bytes_up is None or row.bytes_down is None else f"; {size(row.bytes_up + row.bytes_down)}"


def _unit(config: Mapping[str, Any]) -> str:
    """Return the unit of privacy, and a warning where the noise gives no guarantee."""
    dp = config["dp"]
    is_seeded = dp["mode"] != "none" and dp["randomness"] == "seeded"
    return _UNITS[dp["mode"]] + (" (seeded noise: no guarantee)" if is_seeded else "")


def _merged(config: Mapping[str, Any]) -> str:
    return str(config["rounds"]["rule"] or ", ".join(config["merge"]["methods"]))


def privacy_section(data: Dataset) -> Html | None:
    """Return utility, privacy and bytes of the strategies with differential privacy or an audit; None without."""
    configs = {cell["strategy"]: cell["config"] for cell in data.tables.cells}
    costs = whole_federation(data.tables.costs)
    columns = {
        metric_title(metric) + (f", {ROLE_TITLES[role]}" if len(data.roles) > 1 else ""): scores_of(
            data, data.variant, role, metric
        )
        for role in data.roles
        for metric in HEADLINE
    }
    leaks = {title: _leak_scores(data, *wanted) for title, wanted in _LEAKS.items()}

    def values(of_columns: Mapping[str, Mapping[str, Score]], strategy: str) -> dict[str, Values]:
        return {
            title: (score.mean, score.mean - (score.spread or 0.0), score.mean + (score.spread or 0.0))
            for title, scores in of_columns.items()
            if (score := scores.get(strategy))
        }

    rows = [
        PrivateRow(
            strategy,
            configs[strategy],
            values(columns, strategy),
            values(leaks, strategy),
            mean_of(costs, strategy, lambda row: row["bytes_up"]),
            mean_of(costs, strategy, lambda row: row["bytes_down"]),
        )
        for strategy in data.competing
        if strategy in configs
    ]
    return utility_and_privacy(f"{data.prefix}privacy-table", rows)


def _leak_scores(data: Dataset, model: str, attack: str, metric: str) -> dict[str, Score]:
    wanted = {"model": model, "attack": attack, "metric": metric}
    rows = [row for row in data.tables.leaks if all(row[key] == value for key, value in wanted.items())]
    return mean_scores(rows, sorted({(row["left_out"], row["domain"]) for row in rows}))
