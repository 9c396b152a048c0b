"""The first section of a run's page: what is served where, what joining gave, what is promised, who is missing."""

from collections.abc import Mapping, Sequence
from typing import Any

from fedmerge.evaluation.sums import Estimate
from fedmerge.files import table_or_empty
from fedmerge.privacy.dp.statement import epsilon_text
from fedmerge.report.bench.notation import counted, mark_signs, metric_title
from fedmerge.report.html.looks import Look
from fedmerge.report.html.page import (
    ABSENT,
    Cell,
    Column,
    Html,
    decimal,
    element,
    facts,
    folded,
    is_number,
    join,
    note,
    number_cell,
    table,
)
from fedmerge.report.html.svg import symbol
from fedmerge.report.run.alone import MEAN, METRIC, Comparison, note_on_heads, their
from fedmerge.report.run.many import note_on_shown, only
from fedmerge.report.run.promise import PRIVACY_SECTION, what_leaves
from fedmerge.report.run.verdict import SIMPLE, Judged, ServedModel, join_words
from fedmerge.report.tables import MAX_DOMAIN_COLUMNS
from fedmerge.runs.reading import RunDetails

_MOST_NAMED = 6  # missing domains in the first section


def first_section(
    run: RunDetails,
    compared: Sequence[Comparison],
    judged: Judged,
    statement: Mapping[str, Any],
    looks: Mapping[str, Look],
    shown: Sequence[str] | None = None,
) -> Html:
    """Return the section.

    Args:
        run: the run.
        compared: what each training domain has alone against what it is served, by unmasked scores.
        judged: what is served, by unmasked scores.
        statement: content of ``privacy.json``; empty without differential privacy.
        looks: method -> its look on this page.
        shown: domains of the table, worst first; None for all.
    """
    per_domain = trained_entries(run, judged)
    pairs = [
        ("Joined against alone", _joined(compared)),
        ("Served", _served(run, judged)),
        ("Privacy", privacy_fact(run, statement)),
        ("Missing", missing_fact(run)),
    ]
    by_domain = {model.domain: model for model in judged.models}
    models = [by_domain[domain] for domain in only(by_domain, shown)]
    served = _served_table(models, {row.domain: row for row in compared}, looks, str(run.summary.served))
    few = len(models) <= MAX_DOMAIN_COLUMNS
    return join(
        facts(pairs),
        note_on_shown(len(judged.models), shown),
        served if few else folded(f"What each of these {len(models)} domains is served", served),
        note(
            "Difference ± half-width of its 95 % interval, paired over test users. ▲ above, ▼ below, ○ may be chance. "
            "Alone: the domain's own expert or the head that does not read the merge, whichever was best on its "
            "validation users. Models were selected on validation; scores are on test, unmasked."
        ),
        note(said) if (said := note_on_heads(per_domain)) else None,
    )


def trained_entries(run: RunDetails, judged: Judged) -> dict[str, Any]:
    """Return the entries of the choice of the domains that are in the merge."""
    trained = {model.domain for model in judged.models if model.role == "train"}
    return {name: entry for name, entry in table_or_empty(run.choice.get("per_domain")).items() if name in trained}


def _joined(compared: Sequence[Comparison]) -> Html:
    if not compared:
        return join(ABSENT, element("small", "No domain has a model of its own to compare with."))
    rows = [row for row in compared if row.domain != MEAN]
    if all(row.alone == row.joined for row in rows):
        return join(element("strong", "no difference"), element("small", "Every domain is served what it has alone."))
    mean = compared[-1]
    signs = [(row.scores[1] > row.scores[0]) - (row.scores[1] < row.scores[0]) for row in rows]
    counts = [f"{word} in {number}" for word, number in _counts(signs) if number]
    title = metric_title(METRIC)
    over = (
        f"{title}, mean over {counted(len(rows), 'training domain')}"
        if len(rows) > 1
        else f"{title} of {rows[0].domain}"
    )
    found = mean.difference
    text = decimal(mean.scores[1] - mean.scores[0], sign=True)
    text += f" ± {decimal(found.high - found.mean)}" if found else ""
    return join(
        element("strong", text),
        element("small", f"{over}; {'may be chance' if _may_be_chance(found) else 'beyond chance'}"),
        element("small", f"{', '.join(counts)} of {len(rows)}"),
    )


def _counts(signs: Sequence[int]) -> list[tuple[str, int]]:
    return [("better", signs.count(1)), ("worse", signs.count(-1)), ("the same", signs.count(0))]


def _may_be_chance(difference: Estimate | None) -> bool:
    return difference is None or difference.low <= 0 <= difference.high


def _served(run: RunDetails, judged: Judged) -> Html:
    served, by_model = str(run.summary.served), dict[str, int]()
    for each in judged.models:
        by_model[each.model] = by_model.get(each.model, 0) + 1
    frequent = sorted(by_model.items(), key=lambda item: (-item[1], item[0] != served))
    names = [row if row == served else their(row) for row, _ in frequent]
    first, *others = [f"in {number} of {len(judged.models)} domains" for _, number in frequent]
    beaten = [row for row, against in judged.means.items() if not against.is_above]
    small = [first, *(f"{name} {where}" for name, where in zip(names[1:], others, strict=True))]
    small += ["not above " + " and ".join(beaten)] if beaten else []
    small += [] if names[0] == served else [f"selected among the merges: {served}"]
    return join(element("strong", names[0]), *(element("small", text) for text in small))


def privacy_fact(run: RunDetails, statement: Mapping[str, Any], *, linked: bool = True) -> Html:
    """Return ε and δ of the worst domain with what they hold for, or that nothing is promised.

    Args:
        run: the run.
        statement: content of ``privacy.json``; empty without differential privacy.
        linked: with a link to the section of :mod:`fedmerge.report.run.promise`.
    """
    policy = str(run.settings.get("privacy.policy", ABSENT))
    kinds = join_words(what_leaves(run.settings))
    leaves = f"Under the policy {policy}, {kinds} may leave a client, never interactions."
    link = element("a", "Assumptions and details", href=f"#{PRIVACY_SECTION}")
    more = element("small", link) if linked else None
    if not statement:
        none = "No (ε, δ) is promised: nothing that left a client has noise, so nothing of it is covered."
        return join(
            element("strong", "No differential privacy"), element("small", none), element("small", leaves), more
        )
    by_replacement = statement.get("adjacency") == "replace"
    found = [of.get("epsilon") for of in table_or_empty(statement.get("domains")).values()]
    epsilon = None if not found or None in found else max(found)
    strong = f"{'' if epsilon is None or len(found) < 2 else 'at most '}{epsilon_text(epsilon, statement.get('delta'))}"
    holds = f"for one {statement.get('unit')} {'replaced' if by_replacement else 'added or removed'}"
    limits = "" if statement.get("guarantee_of_run") else "It does not hold for the run as a whole."
    if not statement.get("guarantee"):
        strong, limits = "Guarantees nothing", " ".join(map(str, statement.get("why_not", ())))
        holds = epsilon_text(epsilon, statement.get("delta")) + f" {holds}"
    uncovered = [str(what).partition(",")[0] for what in statement.get("not_covered", ())]
    texts = (f"{holds}; covers {statement.get('covers')}", limits, f"Not covered: {'; '.join(uncovered)}.")
    return join(element("strong", strong), *(element("small", text) for text in texts if text), more)


def missing_fact(run: RunDetails) -> Html:
    """Name the missing domains with their reasons."""
    missing = run.summary.missing
    if not missing:
        return join(element("strong", "Nobody"), element("small", "Every domain of the experiment took part."))
    named = [element("small", f"{name}: {reason}") for name, reason in list(missing.items())[:_MOST_NAMED]]
    rest = len(missing) - _MOST_NAMED
    more = element("small", element("a", f"and {rest} more", href="#clients")) if rest > 0 else None
    return join(element("strong", str(len(missing))), *named, more)


def _served_table(
    models: Sequence[ServedModel], alone: Mapping[str, Comparison], looks: Mapping[str, Look], served: str
) -> Html:
    body = []
    for model in models:
        unseen = element("span", "unseen", class_="tag") if model.role == "unseen" else None
        body.append(
            [
                Cell(join(model.domain, unseen), model.domain),
                Cell(_model_name(model.model, looks, served), model.model),
                number_cell(model.score, decimal(model.score) if is_number(model.score) else "withheld"),
                _alone_cell(alone.get(model.domain)),
                *(_against_cell(model, row) for row in SIMPLE),
            ]
        )
    heads = [
        *(Column(title, numeric=False) for title in ("Domain", "Served")),
        Column(metric_title(METRIC)),
        *(Column(f"Against {other}") for other in ("alone", *SIMPLE)),
    ]
    caption = "What each domain is served, against what it has without joining and without a model"
    return table("served-table", caption, heads, body, sortable=False, stacked=True)


def _model_name(model: str, looks: Mapping[str, Look], served: str) -> Html:
    whose = "the merge" if model == served else "of all" if their(model).startswith("the ") else "its own"
    words = join(model, element("small", f" {whose}"))
    mark = symbol(looks[model]) if model in looks else None
    return element("span", mark, element("span", words), class_="name")


def _alone_cell(row: Comparison | None) -> Cell:
    if row is None:
        return Cell(ABSENT)
    if row.alone == row.joined:
        return Cell(element("small", "the same model"), 0.0)
    mean = row.scores[1] - row.scores[0]
    return number_cell(mean, join(_difference(mean, row.difference, row.alone), element("small", f" {row.alone}")))


def _against_cell(model: ServedModel, row: str) -> Cell:
    against = model.against.get(row)
    if against is None:
        return Cell(ABSENT)
    mean = against.served - against.other
    return number_cell(mean, _difference(mean, against.difference, row))


def _difference(mean: float, difference: Estimate | None, other: str) -> Html:
    marked = {"difference": mean, "significant": not _may_be_chance(difference), "baseline": other}
    spread = f" ± {decimal(difference.high - difference.mean)}" if difference else ""
    return join(mark_signs(marked, False), decimal(mean, sign=True), element("span", spread, class_="spread"))
