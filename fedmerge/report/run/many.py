"""The parts of a run's page that stand for tables by domain where there are too many domains to show all of them.

Up to MOST_DOMAINS, every table has them all. With more, tables have the WORST of them, worst first; percentiles and a
search say how the others fare; the tables of the run folder have everything.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fedmerge.escaping import printable
from fedmerge.evaluation.ranks import METRICS
from fedmerge.evaluation.sums import MetricSums
from fedmerge.report.bench.notation import metric_title
from fedmerge.report.bench_tables import MEAN
from fedmerge.report.html.page import (
    ABSENT,
    Cell,
    Column,
    Html,
    decimal,
    element,
    join,
    note,
    number_cell,
    table,
)
from fedmerge.report.run.alone import METRIC, Comparison
from fedmerge.report.run.verdict import SIMPLE, Judged, ServedModel
from fedmerge.report.tables import Role

MOST_DOMAINS = 200
WORST = 50
_BY_SCORE = "those whose served model is least above popularity and the last item, worst first"
MOST_NAMED = 20  # domains in a sentence
_SHARES = {"lowest": 0, "5 %": 5, "25 %": 25, "median": 50, "75 %": 75, "95 %": 95, "highest": 100}


def worst_domains(judged: Judged) -> list[str] | None:
    """Return the domains that tables show, worst first; None if there are few enough to show all.

    The worst are served the model that is least above, or furthest below, what needs no model; without such rows, the
    model with the lowest score. Domains that withhold their scores come last.
    """
    if len(judged.models) <= MOST_DOMAINS:
        return None
    return [model.domain for model in sorted(judged.models, key=_margin)[:WORST]]


def first_domains(domains: Iterable[str]) -> list[str] | None:
    """Return the first domains by name, for a run without scores; None if there are few enough to show all."""
    known = sorted(domains)
    return known[:WORST] if len(known) > MOST_DOMAINS else None


def _margin(model: ServedModel) -> tuple[float, str]:
    margins = [against.served - against.other for against in model.against.values()] or [model.score]
    margin = min(margins)
    return (math.inf if math.isnan(margin) else margin), model.domain


def only(domains: Iterable[str], shown: Sequence[str] | None) -> list[str]:
    """Return the domains that a table shows: all in their order, or those of ``shown`` in its order."""
    if shown is None:
        return list(domains)
    there = {*domains}
    return [domain for domain in shown if domain in there]


def note_on_shown(number: int, shown: Sequence[str] | None, which: str = _BY_SCORE) -> Html | None:
    """Say which of so many domains the tables of the page have; None if they have all."""
    if shown is None:
        return None
    return note(
        f"Tables by domain show {len(shown)} of {number:,} domains: {which}. Everything about the others is in the "
        "run folder."
    )


def listed(domains: Sequence[str]) -> str:
    """Return the names in a sentence; of many, the first and how many more."""
    more = len(domains) - MOST_NAMED
    return ", ".join(domains[:MOST_NAMED]) + (f" and {more:,} more" if more > 0 else "")


def mean_rows(sums: Mapping[str, MetricSums], roles: Mapping[str, Role]) -> Iterator[dict[str, Any]]:
    """Yield the results over the domains of a role: the unweighted mean where every domain has a value.

    A domain that withholds all of its scores is left out.

    Args:
        sums: domain -> its sums.
        roles: domain -> "train" or "unseen".
    """
    for role in ("train", "unseen"):
        members = [
            of_domain
            for domain, of_domain in sums.items()
            if roles[domain] == role and not np.isnan(of_domain.sums).all()
        ]
        for method in dict.fromkeys(method for of_domain in members for method in of_domain.methods):
            if any(method not in of_domain.methods for of_domain in members):
                continue
            for metric in METRICS:
                values = [of_domain.mean(method, metric) for of_domain in members]
                if not any(map(math.isnan, values)):
                    yield {
                        "strategy": method,
                        "label": method,
                        "domain": MEAN,
                        "role": role,
                        "metric": metric,
                        "num_users": sum(of_domain.num_users for of_domain in members),
                        "value": math.fsum(values) / len(values),
                    }


def percentiles_table(sums: Mapping[str, MetricSums], roles: Mapping[str, Role]) -> Html:
    """Return for each row of the results how its scores are spread over the domains of a role.

    Args:
        sums: domain -> its sums on test, unmasked.
        roles: domain -> "train" or "unseen".
    """
    scores: dict[tuple[Role, str], list[float]] = {}
    for domain, of_domain in sums.items():
        for method in of_domain.methods:
            if not math.isnan(score := of_domain.mean(method, METRIC)):
                scores.setdefault((roles[domain], method), []).append(score)
    body = []
    for role in ("train", "unseen"):
        for (of_role, method), values in scores.items():
            if of_role == role:
                at = np.percentile(values, list(_SHARES.values())).tolist()
                numbers = [number_cell(len(values), f"{len(values):,}"), *(number_cell(n, decimal(n)) for n in at)]
                body.append([Cell(method, method), Cell(role, role), *numbers])
    heads = [
        *(Column(title, numeric=False) for title in ("Row", "Role")),
        *(Column(title) for title in ("Domains", *_SHARES)),
    ]
    return table("percentiles", f"{metric_title(METRIC)} over domains, on test, unmasked", heads, body)


def search_box(judged: Judged, compared: Mapping[str, Comparison]) -> Html:
    """Return a field that finds a domain by a part of its name, with what it is served.

    Args:
        judged: what is served, by unmasked scores.
        compared: domain -> its comparison of alone and joined.
    """
    rows = [
        [
            printable(model.domain),
            model.role,
            printable(model.model),
            decimal(model.score),
            *(_difference(model, row) for row in SIMPLE),
            _against_alone(compared.get(model.domain)),
        ]
        for model in judged.models
    ]
    data = json.dumps(rows, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    heads = [
        *(Column(title, numeric=False) for title in ("Domain", "Role", "Served")),
        *(Column(title) for title in (metric_title(METRIC), *(f"Against {row}" for row in SIMPLE), "Against alone")),
    ]
    return join(
        element(
            "p",
            element("label", "Part of a domain's name ", for_="find"),
            element("input", id="find", type="search", autocomplete="off", spellcheck="false"),
            element("span", id="find-status", role="status", class_="note"),
        ),
        table("found", "Domains with this in their names", heads, [], sortable=False),
        element("script", Html(data), type="application/json", id="find-data"),
    )


def _difference(model: ServedModel, row: str) -> str:
    against = model.against.get(row)
    return ABSENT if against is None else decimal(against.served - against.other, sign=True)


def _against_alone(row: Comparison | None) -> str:
    return ABSENT if row is None else decimal(row.scores[1] - row.scores[0], sign=True)
