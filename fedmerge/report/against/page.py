"""The page of several runs: what differs in settings, scores, costs and privacy, each against the first run.

Scores are compared by domain, and only where both runs evaluated the same users of the same data; the rest is marked.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from fedmerge.errors import RunDirError
from fedmerge.evaluation.sums import VARIANTS, Estimate, MetricSums, Variant
from fedmerge.files import read_record, table_or_empty
from fedmerge.privacy.dp.statement import PRIVACY_FILE
from fedmerge.report.against.difference import difference_across, difference_of_mean
from fedmerge.report.against.same_data import EvaluatedRun, find_differing_data, read_evaluated_run
from fedmerge.report.bench.notation import counted, mark_signs, metric_title
from fedmerge.report.html import charts
from fedmerge.report.html.looks import Look, assign_looks
from fedmerge.report.html.page import (
    ABSENT,
    Cell,
    Column,
    Html,
    Section,
    decimal,
    element,
    facts,
    folded,
    is_number,
    join,
    note,
    number_cell,
    page,
    seconds,
    size,
    table,
)
from fedmerge.report.html.svg import symbol
from fedmerge.report.run.alone import METRIC
from fedmerge.report.run.first import privacy_fact
from fedmerge.runs.exposure import read_exposure
from fedmerge.runs.folder import LOCATION
from fedmerge.runs.reading import RunDetails

MOST_RUNS = len(ascii_uppercase)
_HOW_BOUNDED = (
    "A run keeps no products of its users' outcomes with those of another run, so these 95 % intervals are not paired: "
    "they use the rows that both runs share (popularity, the last item, the backbone) and the largest value that the "
    "rest can have. They may be too wide, never too narrow. ▲ above, ▼ below, ○ may be chance."
)


@dataclass(frozen=True)
class _Named:
    """A run under the letter that the page gives it."""

    letter: str
    evaluated: EvaluatedRun
    differing: Mapping[str, str]  # domain -> why it cannot be compared with the first run

    @property
    def run(self) -> RunDetails:
        """What its folder says."""
        return self.evaluated.run


def compare_page(folders: Sequence[Path]) -> str:
    """Return the HTML page of two or more finished runs.

    Raises:
        RunDirError: a run is not finished, was not evaluated, is damaged or is given twice; or it has no domain with
            the same data and test users as the first.
    """
    if len(folders) > MOST_RUNS or len({*folders}) < len(folders):
        raise RunDirError(
            f"report: found {len(folders)} runs, {len({*folders})} of them different; expected 2 to {MOST_RUNS}, each "
            "once. Name other runs."
        )
    evaluated = [read_evaluated_run(folder) for folder in folders]
    runs = [
        _Named(letter, each, find_differing_data(evaluated[0], each))
        for letter, each in zip(ascii_uppercase, evaluated, strict=False)
    ]
    for each in runs[1:]:
        if all(each.differing.values()):
            why = "; ".join(f"{domain}: {reason}" for domain, reason in each.differing.items())
            raise RunDirError(
                f"{each.run.summary.folder}: no domain was evaluated on the same data and users as in "
                f"{runs[0].run.summary.folder} ({why}). Compare runs of the same domains."
            )
    looks = assign_looks(method for each in evaluated for sums in _of(each).values() for method in sums.methods)
    sections = [
        ("short", "In short", _in_short(runs)),
        ("domains", f"{metric_title(METRIC)} by domain", _domains(runs, looks)),
        ("methods", "Methods that the runs share", _methods(runs, looks)),
        ("settings", "What differs in the settings", _settings(runs)),
        ("costs", "Costs", _costs(runs)),
        ("privacy", "Privacy", _privacy(runs)),
        ("missing", "Missing", _missing(runs)),
    ]
    parts = [Section(key, heading, content) for key, heading, content in sections if content]
    synthetic = any(each.run.summary.synthetic for each in runs)
    title = " against ".join(each.run.summary.id for each in reversed(runs[:2])) if len(runs) == 2 else "Runs compared"
    return page(title, _lead(runs), parts, kind="Runs compared", synthetic=synthetic)


def _of(run: EvaluatedRun, variant: Variant = "unmasked") -> Mapping[str, MetricSums]:
    return run.sums[variant]


# Differences


def _difference(
    runs: Sequence[_Named], number: int, domain: str, rows: tuple[str, str], variant: Variant = "unmasked"
) -> Estimate | None:
    """Return a row of a run minus a row of the first run on one domain; None where they cannot be compared."""
    if runs[number].differing.get(domain, "absent"):
        return None
    left, right = (_of(each.evaluated, variant)[domain] for each in (runs[0], runs[number]))
    if left.num_users < 2 or rows[0] not in left.methods or rows[1] not in right.methods:
        return None
    if math.isnan(left.mean(rows[0], METRIC)) or math.isnan(right.mean(rows[1], METRIC)):
        return None
    return difference_across(left, right, *rows, METRIC)


def _mean_difference(
    runs: Sequence[_Named], number: int, method: str | None = None, variant: Variant = "unmasked"
) -> tuple[Estimate, int] | None:
    """Return the mean difference of what is served, or of a method, over the domains that train in both runs."""
    found = []
    for domain in runs[number].differing:
        if not all(each.evaluated.roles.get(domain) == "train" for each in (runs[0], runs[number])):
            continue
        rows = (
            (runs[0].evaluated.served(domain), runs[number].evaluated.served(domain))
            if method is None
            else (method, method)
        )
        if (difference := _difference(runs, number, domain, rows, variant)) is not None:
            found.append(difference)
    return (difference_of_mean(found), len(found)) if found else None


def _text(difference: Estimate) -> str:
    return f"{decimal(difference.mean, sign=True)} ± {decimal(difference.high - difference.mean)}"


def _is_clear(difference: Estimate) -> bool:
    return not difference.low <= 0 <= difference.high


def _shown(difference: Estimate, other: str) -> Html:
    marked = {"difference": difference.mean, "significant": _is_clear(difference), "baseline": other}
    spread = element("span", f" ± {decimal(difference.high - difference.mean)}", class_="spread")
    return join(mark_signs(marked, False), decimal(difference.mean, sign=True), spread)


# Sections


def _lead(runs: Sequence[_Named]) -> Html:
    lines = []
    for number, each in enumerate(runs[1:], start=1):
        if found := _mean_difference(runs, number):
            difference, count = found
            clear = "beyond chance" if _is_clear(difference) else "which may be chance"
            over = "one training domain" if count == 1 else f"{count} training domains"
            lines.append(
                f"What {each.letter} serves scores {_text(difference)} {metric_title(METRIC)} against "
                f"{runs[0].letter}, mean over {over} on test, unmasked: {clear}."
            )
        else:
            lines.append(f"{each.letter} and {runs[0].letter} share no training domain with the same data and users.")
    warnings = [
        element("p", f"{each.letter}, {domain}: {why}. Not compared.", class_="warning", role="note")
        for each in runs[1:]
        for domain, why in each.differing.items()
        if why
    ]
    names = [element("li", element("strong", each.letter), f" {each.run.summary.id}") for each in runs]
    return join(element("p", " ".join(lines), class_="verdict"), element("ul", *names, class_="legend"), *warnings)


def _in_short(runs: Sequence[_Named]) -> Html:
    pairs = []
    for number, each in enumerate(runs):
        summary = each.run.summary
        found = _mean_difference(runs, number) if number else None
        small = [
            f"{len(summary.train)} training and {len(summary.unseen)} unseen domains, {len(summary.missing)} missing",
            f"{counted(len(summary.methods), 'method')}: {', '.join(summary.methods)}",
            f"{seconds(summary.seconds)} in all",
        ]
        strong = "the reference" if not number else ABSENT if found is None else _text(found[0])
        title = f"{each.letter}: selected among the merges: {summary.served}"
        pairs.append((title, join(element("strong", strong), *(element("small", text) for text in small))))
    return facts(pairs)


def _domains(runs: Sequence[_Named], looks: Mapping[str, Look]) -> Html:
    first = runs[0].letter
    pictures = []
    for number, each in enumerate(runs[1:], start=1):
        dots = [
            charts.Dot(
                domain,
                looks[each.evaluated.served(domain)],
                difference.mean,
                difference.low,
                difference.high,
                hollow=not _is_clear(difference),
                shown=_text(difference),
            )
            for domain in each.differing
            if (difference := _served_difference(runs, number, domain)) is not None
        ]
        pictures.append(charts.dot_chart(f"{each.letter} − {first}, what is served", dots, reference=0.0))
    tables = [_domain_table(runs, looks, variant) for variant in VARIANTS]
    return join(
        charts.grid(*pictures),
        note(_HOW_BOUNDED, f" The symbol is that of the model that the run serves there; the line: as in {first}."),
        tables[0],
        folded("The same, masked (items of the user's history are not ranked)", tables[1]),
    )


def _served_difference(
    runs: Sequence[_Named], number: int, domain: str, variant: Variant = "unmasked"
) -> Estimate | None:
    rows = (runs[0].evaluated.served(domain), runs[number].evaluated.served(domain))
    return _difference(runs, number, domain, rows, variant)


def _domain_table(runs: Sequence[_Named], looks: Mapping[str, Look], variant: Variant) -> Html:
    domains = list(dict.fromkeys(domain for each in runs for domain in each.differing))
    body = []
    for domain in domains:
        cells = [Cell(domain, domain)]
        for number, each in enumerate(runs):
            cells += _score_cells(each, domain, looks, variant)
            if number:
                difference = _served_difference(runs, number, domain, variant)
                why = each.differing.get(domain) or "withheld, or one user"
                cells.append(
                    Cell(element("small", f"not compared: {why}"))
                    if difference is None
                    else number_cell(difference.mean, _shown(difference, runs[0].letter))
                )
        body.append(cells)
    heads = [Column("Domain", numeric=False)]
    for number, each in enumerate(runs):
        heads += [Column(f"{each.letter} serves", numeric=False), Column(f"{each.letter}, {metric_title(METRIC)}")]
        heads += [Column(f"{each.letter} − {runs[0].letter}")] if number else []
    caption = f"What each domain is served, {metric_title(METRIC)} on test, {variant}"
    return table(f"domains-{variant}", caption, heads, body, sortable=False, stacked=True)


def _score_cells(each: _Named, domain: str, looks: Mapping[str, Look], variant: Variant) -> list[Cell]:
    sums, model = _of(each.evaluated, variant).get(domain), each.evaluated.served(domain)
    if sums is None:
        return [Cell(ABSENT), Cell(ABSENT)]
    score = sums.mean(model, METRIC) if model in sums.methods else math.nan
    role = element("span", "unseen", class_="tag") if each.evaluated.roles.get(domain) == "unseen" else None
    mark = symbol(looks[model]) if model in looks else None
    name = element("span", mark, element("span", join(model, role)), class_="name")
    return [Cell(name, model), number_cell(score, decimal(score) if is_number(score) else "withheld")]


def _methods(runs: Sequence[_Named], looks: Mapping[str, Look]) -> Html | None:
    first = runs[0].letter
    pictures = []
    for number, each in enumerate(runs[1:], start=1):
        dots = []
        for method, look in looks.items():
            if found := _mean_difference(runs, number, method):
                difference, _ = found
                dots.append(
                    charts.Dot(
                        method,
                        look,
                        difference.mean,
                        difference.low,
                        difference.high,
                        hollow=not _is_clear(difference),
                        shown=_text(difference),
                    )
                )
        pictures.append(charts.dot_chart(f"{each.letter} − {first}", dots, reference=0.0))
    if not any(pictures):
        return None
    return join(
        charts.grid(*pictures),
        note(
            f"{metric_title(METRIC)} on test, unmasked, mean over the training domains that can be compared and have "
            "the method in both runs. Filled: beyond chance; outlined: may be chance. Intervals as above."
        ),
        _method_table(runs, looks),
    )


def _method_table(runs: Sequence[_Named], looks: Mapping[str, Look]) -> Html | None:
    """Return the means over the domains that train in every run and can be compared in each."""
    domains = [
        domain
        for domain in runs[0].differing
        if all(not each.differing.get(domain, "absent") for each in runs)
        and all(each.evaluated.roles[domain] == "train" for each in runs)
    ]
    if not domains:
        return None
    body = []
    for method, look in looks.items():
        means = [_mean_of(each, method, domains) for each in runs]
        if any(is_number(mean) for mean in means):
            name = element("span", symbol(look), element("span", method), class_="name")
            body.append([Cell(name, method), *(number_cell(mean, decimal(mean)) for mean in means)])
    heads = [Column("Method", numeric=False), *(Column(each.letter) for each in runs)]
    caption = f"{metric_title(METRIC)} on test, unmasked, mean over {', '.join(domains)}"
    return table("methods-table", caption, heads, body)


def _mean_of(each: _Named, method: str, domains: Sequence[str]) -> float | None:
    sums = [_of(each.evaluated)[domain] for domain in domains]
    if any(method not in of_domain.methods for of_domain in sums):
        return None
    return math.fsum(of_domain.mean(method, METRIC) for of_domain in sums) / len(sums)


def _settings(runs: Sequence[_Named]) -> Html:
    by_run = [{**each.run.settings, **_environment(each)} for each in runs]
    keys = list(dict.fromkeys(key for of_run in by_run for key in of_run))
    body = []
    for key in keys:
        values = [of_run.get(key) for of_run in by_run]
        if key not in LOCATION and any(value != values[0] for value in values):
            shown = [ABSENT if value is None else str(value) for value in values]
            body.append([Cell(key, key), *(Cell(text, text) for text in shown)])
    if not body:
        return element("p", "Nothing: the runs have the same settings, versions and hardware.")
    heads = [Column("Setting", numeric=False), *(Column(each.letter, numeric=False) for each in runs)]
    caption = "Settings, versions and hardware that are not the same everywhere"
    return table("settings-table", caption, heads, body, stacked=True, sortable=False)


def _environment(each: _Named) -> dict[str, Any]:
    environment = read_record(each.run.summary.folder / "environment.json")
    packages = {f"version of {name}": version for name, version in table_or_empty(environment.get("packages")).items()}
    return {key: value for key, value in environment.items() if key != "packages"} | packages


def _costs(runs: Sequence[_Named]) -> Html:
    rows: dict[str, list[tuple[float | None, str]]] = {}
    for each in runs:
        experts = list(each.run.experts.values())
        trained = [of["seconds"] for of in experts if isinstance(of.get("seconds"), (int, float))]
        cached = sum(of.get("cached") is True for of in experts)
        reused = f" ({cached} of {len(experts)} from a cache)" if cached else ""
        whole, of_training = each.run.summary.seconds, math.fsum(trained) if trained else None
        total = float(sum(sent.size_bytes for sent in read_exposure(each.run.summary.folder)))
        rows.setdefault("The run, from start to end", []).append((whole, seconds(whole)))
        rows.setdefault("Training of experts, all clients", []).append((of_training, seconds(of_training) + reused))
        rows.setdefault("Bytes from all clients to the server", []).append((total, size(total)))
    heads = [Column("", numeric=False), *(Column(each.letter) for each in runs)]
    body = [[Cell(name, name), *(number_cell(*value) for value in values)] for name, values in rows.items()]
    return join(
        table("costs-table", "Time and traffic", heads, body, sortable=False, stacked=True),
        note("Times depend on the machine and its load; an expert from a cache costs the time that its training took."),
    )


def _privacy(runs: Sequence[_Named]) -> Html:
    pairs = []
    for each in runs:
        statement = read_record(each.run.summary.folder / PRIVACY_FILE)
        pairs.append((each.letter, privacy_fact(each.run, statement, linked=False)))
    return join(
        facts(pairs), note("The budgets of runs on the same data add up: what each promises holds for it alone.")
    )


def _missing(runs: Sequence[_Named]) -> Html | None:
    lines = [
        element("p", element("strong", f"{each.letter}: {name}. "), reason)
        for each in runs
        for name, reason in each.run.summary.missing.items()
    ]
    return join(*lines) or None
