"""Sections with merging coefficients and training curves."""

import math
from collections.abc import Mapping

from fedmerge.report.bench.dataset import (
    Dataset,
    whole_federation,
)
from fedmerge.report.bench.notation import (
    MANY_PICTURES,
)
from fedmerge.report.bench_tables import Rows
from fedmerge.report.html import charts
from fedmerge.report.html.looks import Look, in_order
from fedmerge.report.html.page import (
    Html,
    element,
    folded,
    join,
    note,
)


def coefficients_section(data: Dataset) -> Html | None:
    """Return the merging coefficients by domain and layer; None without any."""
    rows = whole_federation(data.tables.coefficients)
    if not rows:
        return None
    values: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        if row["value"] is not None:
            values.setdefault((row["strategy"], row["domain"], row["group"]), []).append(row["value"])
    means = {key: math.fsum(numbers) / len(numbers) for key, numbers in values.items()}
    domains = list(dict.fromkeys(row["domain"] for row in rows))
    groups: dict[str, list[str]] = {}
    for row in rows:
        of_strategy = groups.setdefault(row["strategy"], [])
        if row["group"] not in of_strategy:
            of_strategy.append(row["group"])
    single = [strategy for strategy, of_strategy in groups.items() if len(of_strategy) == 1]
    parts = []
    if single:
        one = {(d, s): means[s, d, groups[s][0]] for s in single for d in domains if (s, d, groups[s][0]) in means}
        parts.append(charts.heat_table(f"{data.prefix}heat", "One coefficient per domain", domains, single, one))
    for number, (strategy, of_strategy) in enumerate(groups.items()):
        if strategy not in single:
            some = {(d, g): means[strategy, d, g] for d in domains for g in of_strategy if (strategy, d, g) in means}
            key = f"{data.prefix}heat-{number}"
            parts.append(charts.heat_table(key, f"{strategy}, domain by layer", domains, of_strategy, some))
    return join(
        *parts,
        note("Mean over seeds. The stronger the colour, the further from zero; blue is positive, orange negative."),
    )


def curves_section(data: Dataset) -> Html | None:
    """Return a figure per domain with a line per strategy; with one strategy, a figure with a line per domain."""
    rows = [row for row in whole_federation(data.tables.curves) if row["value"] is not None]
    single: list[Html] = []
    parts: list[Html] = []
    for name in dict.fromkeys(row["name"] for row in rows):
        of_name = [row for row in rows if row["name"] == name]
        several = len({row["strategy"] for row in of_name}) > 1
        panel, line = ("domain", "strategy") if several else ("strategy", "domain")
        looks = data.looks if several else in_order(row["domain"] for row in of_name)
        if not several and list(looks) == [""]:  # of the merge itself, not of a domain
            looks = {"": data.looks[of_name[0]["strategy"]]}
        panels = {
            title: _lines([row for row in of_name if row[panel] == title], line, looks)
            for title in dict.fromkeys(row[panel] for row in of_name)
        }
        if len(panels) == 1:
            ((title, lines),) = panels.items()
            named = name if any(line.label for line in lines) else f"{name}: {title}"
            single.append(charts.line_chart(named, "step", lines, with_legend=True))
            continue
        pictures = [charts.line_chart(title or name, "step", lines) for title, lines in panels.items()]
        shown = charts.grid(*pictures)
        used = dict.fromkeys(line.label for lines in panels.values() for line in lines)
        parts.append(element("h3", name))
        parts.append(folded("Figures", shown) if len(pictures) > MANY_PICTURES else shown)
        parts.append(charts.legend({label: looks[label] for label in used}, with_line=True))
    if not rows:
        return None
    spread = "Mean over seeds, within their range; " if len({row["seed"] for row in rows}) > 1 else ""
    text = f"{spread}with more than {charts.MOST_POINTS} steps, averages of neighbours."
    return join(charts.grid(*single) if single else None, *parts, note(text[0].upper() + text[1:]))


def _lines(rows: Rows, what: str, looks: Mapping[str, Look]) -> list[charts.Line]:
    return [
        charts.Line(label, looks[label], _over_steps([row for row in rows if row[what] == label]))
        for label in dict.fromkeys(row[what] for row in rows)
    ]


def _over_steps(rows: Rows) -> list[tuple[float, float, float, float]]:
    by_step: dict[int, list[float]] = {}
    for row in rows:
        by_step.setdefault(row["step"], []).append(row["value"])
    return [
        (float(step), math.fsum(values) / len(values), min(values), max(values))
        for step, values in sorted(by_step.items())
    ]
