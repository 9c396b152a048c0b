"""The page of a benchmark, from its tables. A finished run has the same page; see :mod:`fedmerge.report.run.page`."""

from collections.abc import Mapping, Sequence

from fedmerge.config import flatten
from fedmerge.report.bench.cells import cells_section
from fedmerge.report.bench.costs import bytes_section, costs_section
from fedmerge.report.bench.dataset import (
    HEADLINE,
    ROLE_TITLES,
    Dataset,
    best_strategy,
    dataset_of,
    mean_comparisons,
    scores_of,
)
from fedmerge.report.bench.differences import differences_section
from fedmerge.report.bench.few_data import few_data_section
from fedmerge.report.bench.learning import coefficients_section, curves_section
from fedmerge.report.bench.notation import counted, difference_text, metric_title, score_html, score_text
from fedmerge.report.bench.privacy import privacy_section
from fedmerge.report.bench.ranks import ranks_section
from fedmerge.report.bench.scores import domains_section, scores_section, unseen_section
from fedmerge.report.bench_tables import FINISHED, NOTHING_LEARNED, BenchTables
from fedmerge.report.html.looks import Look, assign_looks
from fedmerge.report.html.page import Html, Section, element, facts, join, page
from fedmerge.report.run.verdict import SIMPLE


def bench_page(
    tables: BenchTables, *, kind: str = "Benchmark", lead: str = "", first: str = "", more: Sequence[Section] = ()
) -> str:
    """Return the HTML page of a benchmark; equal tables give equal bytes.

    Args:
        tables: tables of the benchmark.
        kind: subject of the page, shown above the title.
        lead: content under the title.
        first: the first section; empty: the highest scores and the counts of the benchmark.
        more: sections placed before the last section, the settings.
    """
    looks = looks_of(tables)
    datasets = {
        name: dataset_of(tables, name, looks, f"d{number}-")
        for number, name in enumerate(dict.fromkeys(row["dataset"] for row in tables.results))
    }
    sections = [Section("short", "In short", join(first) or _in_short(tables, datasets))]
    for name, data in datasets.items():
        where = f"{name}: " if len(datasets) > 1 else ""
        for key, heading, content in (
            ("scores", "Scores", scores_section(data)),
            ("differences", f"Differences to {data.baseline}", differences_section(data)),
            ("domains", f"{metric_title(HEADLINE[0])} by domain", domains_section(data)),
            ("unseen", "Unseen against seen domains", unseen_section(data)),
            ("bytes", "Accuracy against bytes", bytes_section(data)),
            ("privacy", "Utility, privacy and bytes", privacy_section(data)),
            ("coefficients", "Merging coefficients", coefficients_section(data)),
            ("curves", "Training curves", curves_section(data)),
            ("costs", "Costs", costs_section(data)),
        ):
            if content:
                sections.append(Section(data.prefix + key, where + heading, content))
    if few := few_data_section(tables, looks):
        sections.append(Section("few-data", "By number of users", few))
    if tables.ranks:
        sections.append(Section("ranks", "Ranks over domains and seeds", ranks_section(tables, looks)))
    sections += more
    if tables.cells:
        sections.append(Section("cells", "Settings and environment", cells_section(tables)))
    return page(
        tables.title,
        join(lead, *_attacks(tables), *_untrained(tables)),
        sections,
        kind=kind,
        synthetic=tables.synthetic,
    )


def looks_of(tables: BenchTables) -> dict[str, Look]:
    """Return strategy -> its look on the page of these tables."""
    drawn = ("results", "costs", "curves", "coefficients", "ranks")
    return assign_looks(row["strategy"] for name in drawn for row in getattr(tables, name))


def _attacks(tables: BenchTables) -> list[Html]:
    """Return a warning for every client that poisoned its training on purpose."""
    notes: dict[str, None] = {}
    for cell in tables.cells:
        settings = flatten(cell["config"])
        if settings.get("simulation.attacker") not in (None, "none"):
            who = f" {cell['dataset']}: {settings['simulation.attacker']} corrupts its own training "
            how = f"({settings['simulation.attack']}, strength {settings['simulation.attack_strength']:g})"
            notes[f"{who}{how}. Serve none of these models."] = None
    return [_warning("Poisoned on purpose.", note) for note in notes]


def _untrained(tables: BenchTables) -> list[Html]:
    """Return a warning for the experts of every training that are zero, with the strategies that merge them."""
    strategies: dict[str, list[str]] = {}
    for cell in tables.cells:
        if domains := cell.get(NOTHING_LEARNED):
            who = f" {cell['dataset']}, seed {cell['seed']}: in {', '.join(domains)} no validation beat the backbone"
            strategies.setdefault(f"{who}, so the expert is zero", []).append(cell["strategy"])
    return [
        _warning("Nothing was learned.", f"{who} in {', '.join(dict.fromkeys(names))}.")
        for who, names in strategies.items()
    ]


def _warning(title: str, text: str) -> Html:
    return element("p", element("strong", title), text, class_="warning", role="note")


def _in_short(tables: BenchTables, datasets: Mapping[str, Dataset]) -> Html:
    pairs: list[tuple[str, str]] = []
    for name, data in datasets.items():
        where = f" on {name}" if len(datasets) > 1 else ""
        for role in data.roles:
            scores = scores_of(data, data.variant, role, HEADLINE[0])
            if best := best_strategy(data, scores):
                higher = [
                    f"{row} scores higher: {score_text(scores[row])}"
                    for row in SIMPLE
                    if row in scores and scores[row].mean > scores[best].mean
                ]
                texts = (score_html(scores[best]), *higher, _against_baseline(data, role, best))
                small = [element("small", text) for text in texts if text]
                pairs.append(
                    (
                        f"Highest {metric_title(HEADLINE[0])}, {ROLE_TITLES[role]}{where}",
                        join(element("strong", best), *small),
                    )
                )
    rows = [row for data in datasets.values() for row in data.tables.results]
    users = {
        (row["dataset"], row["domain"]): row["num_users"] for row in sorted(rows, key=lambda row: row["num_users"])
    }
    strategies, seeds = ({row[what] for row in rows} for what in ("strategy", "seed"))
    counts = ((len(strategies), "strategy"), (len(seeds), "seed"), (len(users), "domain"))
    words = ", ".join(counted(count, what) for count, what in counts)
    on = f"{sum(users.values()):,} test users of {' and '.join(datasets) or 'no dataset'}"
    pairs.append(("Compared", join(words, element("small", on))))
    if len(tables.cells) > 1:
        finished = sum(cell["status"] == FINISHED for cell in tables.cells)
        left = len(tables.cells) - finished
        link = element("small", element("a", f"{left} did not finish", href="#cells")) if left else None
        pairs.append(("Cells", join(f"{finished} finished", link)))
    return facts(pairs)


def _against_baseline(data: Dataset, role: str, strategy: str) -> str | None:
    row = mean_comparisons(data, data.variant, role, HEADLINE[0]).get(strategy)
    if row is None:
        return "the baseline of the comparisons" if strategy == data.baseline else None
    verdict = "significant" if row["significant"] else "not significant"
    return f"{difference_text(row)} against {row['baseline']}, {verdict}"
