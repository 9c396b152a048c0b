"""The page of a benchmark, from its tables: scores, differences, ranks, costs, and what every cell was.

A finished run is shown by the same page, as a benchmark of one seed; see :mod:`fedmerge.report.run_tables`.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from fedmerge.config import flatten
from fedmerge.evaluation.ranks import METRICS
from fedmerge.privacy.attacks import AGAINST_BACKBONE
from fedmerge.report import charts
from fedmerge.report.bench_tables import FINISHED, MEAN, POOLED, BenchTables, Rows
from fedmerge.report.page import (
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
    settings,
    size,
    table,
)
from fedmerge.report.privacy_picture import PrivateRow, Values, utility_and_privacy
from fedmerge.report.statistics import LEVEL

HEADLINE: tuple[str, ...] = ("recall@10", "ndcg@10")
MANY_PICTURES = 12  # more of one kind are folded away
_LEAKS = {  # title -> model, attack and metric
    "Membership AUC, expert": ("expert", AGAINST_BACKBONE, "auc"),
    "Membership AUC, merge": ("merged", AGAINST_BACKBONE, "auc"),
    "Exposure, expert": ("expert", "canaries", "mean_exposure"),
    "Exposure, merge": ("merged", "canaries", "mean_exposure"),
}
_TITLES = {"mrr": "MRR"}
_ROLES = {"train": "training domains", "unseen": "unseen domains"}
_VARIANTS = {
    "unmasked": "Items of a user's history stay candidates (unmasked).",
    "masked": "Items of a user's history are removed from the candidates, except the target (masked).",
}

Key = tuple[str, str]  # left_out, domain


@dataclass(frozen=True)
class Score:
    """Mean over seeds, sample standard deviation over them (None of one seed), and how many they are."""

    mean: float
    spread: float | None
    num_seeds: int


@dataclass(frozen=True)
class _Dataset:
    """One dataset of a benchmark, and what the parts of its page have in common.

    Attributes:
        tables: the rows of this dataset alone; results on test, comparisons with ``baseline``.
        strategies: in the order of the results.
        competing: those that are not for reference.
        baseline: of the comparisons; None without any.
        other_baselines: whose comparisons are not shown.
        variant: "unmasked" where there is such a result.
        roles: of the domains, "train" first.
        series: strategy -> its place, which decides symbol and colour.
        prefix: of anchors.
    """

    tables: BenchTables
    strategies: tuple[str, ...]
    competing: tuple[str, ...]
    baseline: str | None
    other_baselines: tuple[str, ...]
    variant: str
    roles: tuple[str, ...]
    series: Mapping[str, int]
    prefix: str


def _dataset(tables: BenchTables, name: str, series: Mapping[str, int], prefix: str) -> _Dataset:
    def rows(table_name: str) -> list[Mapping[str, Any]]:
        return [row for row in getattr(tables, table_name) if row["dataset"] == name]

    results = [row for row in rows("results") if row["split"] == "test"]
    baselines = list(dict.fromkeys(row["baseline"] for row in rows("comparisons")))
    baseline = baselines[0] if baselines else None
    strategies = tuple(dict.fromkeys(row["strategy"] for row in results))
    found = {row[key] for row in results for key in ("variant", "role")}
    return _Dataset(
        tables=replace(
            tables,
            results=results,
            comparisons=[row for row in rows("comparisons") if row["baseline"] == baseline],
            costs=rows("costs"),
            curves=rows("curves"),
            coefficients=rows("coefficients"),
            leaks=rows("leaks"),
            cells=rows("cells"),
        ),
        strategies=strategies,
        competing=tuple(strategy for strategy in strategies if strategy not in tables.references),
        baseline=baseline,
        other_baselines=tuple(baselines[1:]),
        variant=next((variant for variant in _VARIANTS if variant in found), "unmasked"),
        roles=tuple(role for role in _ROLES if role in found),
        series=series,
        prefix=prefix,
    )


def bench_page(tables: BenchTables, *, kind: str = "Benchmark", lead: str = "", more: Sequence[Section] = ()) -> str:
    """The whole page; equal tables give equal bytes.

    Args:
        tables: of a benchmark.
        kind: what is reported on.
        lead: under the title.
        more: sections before the last one, which is the settings.
    """
    names = dict.fromkeys(
        row["strategy"] for name in ("results", "costs", "curves", "coefficients") for row in getattr(tables, name)
    )
    series = {strategy: place for place, strategy in enumerate(names)}
    datasets = {
        name: _dataset(tables, name, series, f"d{number}-")
        for number, name in enumerate(dict.fromkeys(row["dataset"] for row in tables.results))
    }
    sections = [Section("short", "In short", _in_short(tables, datasets))]
    for name, data in datasets.items():
        where = f"{name}: " if len(datasets) > 1 else ""
        for key, heading, content in (
            ("scores", "Scores", _scores(data)),
            ("differences", f"Differences to {data.baseline}", _differences(data)),
            ("domains", f"{_metric(HEADLINE[0])} by domain", _by_domain(data)),
            ("unseen", "Unseen against seen domains", _unseen(data)),
            ("bytes", "Accuracy against bytes", _bytes(data)),
            ("privacy", "Utility, privacy and bytes", _privacy(data)),
            ("coefficients", "Merging coefficients", _coefficients(data)),
            ("curves", "Training curves", _curves(data)),
            ("costs", "Costs", _costs(data)),
        ):
            if content:
                sections.append(Section(data.prefix + key, where + heading, content))
    if tables.ranks:
        sections.append(Section("ranks", "Ranks over domains and seeds", _ranks(tables, series)))
    sections += more
    if tables.cells:
        sections.append(Section("cells", "Settings and environment", _cells(tables)))
    return page(tables.title, join(lead, *_attacks(tables)), sections, kind=kind, synthetic=tables.synthetic)


def _attacks(tables: BenchTables) -> list[Html]:
    """A warning for every client that poisoned its training on purpose."""
    notes: dict[str, None] = {}
    for cell in tables.cells:
        settings = flatten(cell["config"])
        if settings.get("attack.domain") not in (None, "none"):
            who = f" {cell['dataset']}: {settings['attack.domain']} spoils its own training "
            how = f"({settings['attack.kind']}, strength {settings['attack.strength']:g})"
            notes[f"{who}{how}. Serve none of these models."] = None
    return [
        element("p", element("strong", "Poisoned on purpose."), note, class_="warning", role="note") for note in notes
    ]


# Numbers


def mean_scores(rows: Rows, keys: Sequence[Key]) -> dict[str, Score]:
    """Strategy -> its score: per seed the unweighted mean over all (left_out, domain) of ``keys``, then over seeds.

    A seed counts for a strategy where it has a value everywhere; a strategy without such a seed is absent.

    Args:
        rows: of results, of one dataset, split, variant, role and metric.
        keys: at least one.
    """
    values: dict[tuple[str, int], dict[Key, float]] = {}
    for row in rows:
        if is_number(row["value"]):
            of_seed = values.setdefault((row["strategy"], row["seed"]), {})
            of_seed[row["left_out"], row["domain"]] = row["value"]
    by_strategy: dict[str, list[float]] = {}
    for (strategy, _), of_seed in sorted(values.items()):
        if keys and all(key in of_seed for key in keys):
            by_strategy.setdefault(strategy, []).append(math.fsum(of_seed[key] for key in keys) / len(keys))
    return {
        strategy: Score(math.fsum(means) / len(means), statistics.stdev(means) if len(means) > 1 else None, len(means))
        for strategy, means in by_strategy.items()
    }


def _results(data: _Dataset, variant: str, role: str, metric: str) -> Rows:
    wanted = {"variant": variant, "role": role, "metric": metric}
    return [row for row in data.tables.results if all(row[key] == value for key, value in wanted.items())]


def _keys(rows: Rows, role: str) -> list[Key]:
    """What a mean goes over: training domains of the whole federation; unseen ones, and each where it was left out."""
    keys = list(dict.fromkeys((row["left_out"], row["domain"]) for row in rows))
    return keys if role == "unseen" else [key for key in keys if not key[0]]


def _score_of(data: _Dataset, variant: str, role: str, metric: str) -> dict[str, Score]:
    rows = _results(data, variant, role, metric)
    return mean_scores(rows, _keys(rows, role))


def _shown(score: Score | None) -> Html:
    if score is None:
        return join(ABSENT)
    spread = None if score.spread is None else element("span", f" ± {decimal(score.spread)}", class_="spread")
    return join(decimal(score.mean), spread)


def _difference(row: Mapping[str, Any]) -> str:
    return f"{decimal(row['difference'], sign=True)} ± {decimal(row['half_width'])}"


def _p(value: float | None, equals: bool = False) -> str:
    return "<\u00a00.001" if value is not None and value < 0.001 else ("= " if equals else "") + decimal(value, 3)


def _metric(name: str) -> str:
    return _TITLES.get(name, name.replace("recall", "Recall").replace("ndcg", "NDCG"))


# Sections


def _in_short(tables: BenchTables, datasets: Mapping[str, _Dataset]) -> Html:
    pairs: list[tuple[str, str]] = []
    for name, data in datasets.items():
        where = f" on {name}" if len(datasets) > 1 else ""
        for role in data.roles:
            scores = _score_of(data, data.variant, role, HEADLINE[0])
            if best := _best(data, scores):
                told = (_shown(scores[best]), _against_baseline(data, role, best))
                small = [element("small", text) for text in told if text]
                pairs.append(
                    (f"Highest {_metric(HEADLINE[0])}, {_ROLES[role]}{where}", join(element("strong", best), *small))
                )
    rows = [row for data in datasets.values() for row in data.tables.results]
    users = {
        (row["dataset"], row["domain"]): row["num_users"] for row in sorted(rows, key=lambda row: row["num_users"])
    }
    strategies, seeds = ({row[what] for row in rows} for what in ("strategy", "seed"))
    counts = ((len(strategies), "strategy"), (len(seeds), "seed"), (len(users), "domain"))
    words = ", ".join(_counted(count, what) for count, what in counts)
    on = f"{sum(users.values()):,} test users of {' and '.join(datasets) or 'no dataset'}"
    pairs.append(("Compared", join(words, element("small", on))))
    if len(tables.cells) > 1:
        finished = sum(cell["status"] == FINISHED for cell in tables.cells)
        left = len(tables.cells) - finished
        link = element("small", element("a", f"{left} did not finish", href="#cells")) if left else None
        pairs.append(("Cells", join(f"{finished} finished", link)))
    return facts(pairs)


def _counted(count: int, word: str) -> str:
    plural = {"strategy": "strategies"}.get(word, f"{word}s")
    return f"{count} {word if count == 1 else plural}"


def _against_baseline(data: _Dataset, role: str, strategy: str) -> str | None:
    row = _mean_comparisons(data, data.variant, role, HEADLINE[0]).get(strategy)
    if row is None:
        return "the baseline of the comparisons" if strategy == data.baseline else None
    told = "significant" if row["significant"] else "not significant"
    return f"{_difference(row)} against {row['baseline']}, {told}"


def _mean_comparisons(data: _Dataset, variant: str, role: str, metric: str) -> dict[str, Mapping[str, Any]]:
    return {
        row["strategy"]: row
        for row in data.tables.comparisons
        if (row["domain"], row["variant"], row["role"], row["metric"]) == (MEAN, variant, role, metric)
    }


def _scores(data: _Dataset) -> Html:
    first = data.variant
    parts: list[str] = [_score_table(data, first, "scores-table"), _how_to_read(data, first)]
    others = sorted({row["variant"] for row in data.tables.results} - {first})
    for variant in others:
        parts.append(
            folded(f"The same, {variant}", note(_VARIANTS[variant]), _score_table(data, variant, f"scores-{variant}"))
        )
    for role in data.roles:
        parts.append(folded(f"Every metric, {_ROLES[role]}", _every_metric(data, first, role)))
    return join(*parts)


def _score_table(data: _Dataset, variant: str, key: str) -> Html:
    columns = [(role, metric) for role in data.roles for metric in HEADLINE]
    scores = {column: _score_of(data, variant, *column) for column in columns}
    compared = {column: _mean_comparisons(data, variant, *column) for column in columns}
    best = {column: _best(data, of_column) for column, of_column in scores.items()}
    labels = _labels(data)
    most = max((score.num_seeds for of_column in scores.values() for score in of_column.values()), default=0)
    body = []
    for strategy in data.strategies:
        row = [Cell(_strategy(data, strategy, labels.get(strategy, "")), strategy)]
        for column in columns:
            score = scores[column].get(strategy)
            few = f" {score.num_seeds} of {most} seeds" if score and score.num_seeds < most else None
            shown = join(
                _marks(compared[column].get(strategy), strategy == best[column]) if score else None,
                _shown(score),
                element("small", few) if few else None,
            )
            row.append(number_cell(score.mean if score else None, shown, strategy == best[column]))
        body.append(row)
    roles = data.roles
    heads = [
        Column("Strategy", numeric=False),
        *(Column(_metric(metric) + (f", {_ROLES[role]}" if len(roles) > 1 else "")) for role, metric in columns),
    ]
    caption = f"Mean over {' or '.join(_ROLES[role] for role in roles)}, on test, {variant}"
    return table(
        data.prefix + key, caption + ("; ± is the standard deviation over seeds" if most > 1 else ""), heads, body
    )


def _how_to_read(data: _Dataset, variant: str) -> Html:
    baseline = data.baseline
    parts = [_VARIANTS[variant], " ★ highest of the strategies that compete, before rounding."]
    if baseline:
        parts.append(
            f" ▲ better, ▼ worse than {baseline}, ○ not told apart: paired over users and seeds, corrected for the "
            f"number of strategies (Holm, {100 * LEVEL:g} %)."
        )
    if len(data.competing) < len(data.strategies):
        parts.append(" Reference rows do not compete for the ★.")
    if any(strategy.endswith(POOLED) for strategy in data.strategies):
        parts.append(
            f" Rows that end in{POOLED} break isolation: they were trained on the interactions of all domains "
            "together, which no federation can do."
        )
    return note(*parts)


def _best(data: _Dataset, scores: Mapping[str, Score]) -> str | None:
    competing = [strategy for strategy in data.competing if strategy in scores]
    return max(competing, key=lambda strategy: scores[strategy].mean) if len(competing) > 1 else None


def _marks(comparison: Mapping[str, Any] | None, best: bool) -> Html:
    """Signs before a number; what they mean is told to screen readers and on hovering."""
    marks = [("★", " best", "highest")] if best else []
    if comparison is not None and is_number(comparison["difference"]):
        baseline = comparison["baseline"]
        if not comparison["significant"]:
            marks.append(("○", "", f"not told apart from {baseline}"))
        elif comparison["difference"] > 0:
            marks.append(("▲", " better", f"significantly better than {baseline}"))
        else:
            marks.append(("▼", " worse", f"significantly worse than {baseline}"))
    return join(
        *(
            element(
                "span",
                element("span", sign, aria_hidden="true"),
                element("span", f"{meaning}: ", class_="hidden"),
                class_=f"mark{style}",
                title=meaning,
            )
            for sign, style, meaning in marks
        )
    )


def _strategy(data: _Dataset, strategy: str, label: str = "") -> Html:
    tags = ["baseline"] if strategy == data.baseline else []
    tags += ["reference"] if strategy in data.tables.references else []
    tags += ["breaks isolation"] if strategy.endswith(POOLED) else []
    words = join(
        strategy,
        element("small", f" {label}") if label else None,
        *(element("span", tag, class_="tag") for tag in tags),
    )
    return element("span", charts.symbol(data.series[strategy]), element("span", words), class_="name")


def _labels(data: _Dataset) -> dict[str, str]:
    """Strategy -> the variants that validation chose, where they say more than its name."""
    found: dict[str, dict[str, None]] = {}
    for row in data.tables.results:
        if row["label"] != row["strategy"]:
            found.setdefault(row["strategy"], {})[row["label"].removeprefix(row["strategy"]).strip()] = None
    return {strategy: "chosen: " + ", ".join(labels) for strategy, labels in found.items()}


def _every_metric(data: _Dataset, variant: str, role: str) -> Html:
    used = {row["metric"] for row in data.tables.results}
    metrics = [*(metric for metric in METRICS if metric in used), *sorted(used - set(METRICS))]
    scores = {metric: _score_of(data, variant, role, metric) for metric in metrics}
    best = {metric: _best(data, of_metric) for metric, of_metric in scores.items()}
    body = []
    for strategy in data.strategies:
        row = [Cell(_strategy(data, strategy), strategy)]
        for metric in metrics:
            score = scores[metric].get(strategy)
            is_best = strategy == best[metric]
            row.append(number_cell(score.mean if score else None, decimal(score.mean if score else None), is_best))
        body.append(row)
    heads = [Column("Strategy", numeric=False), *(Column(_metric(metric)) for metric in metrics)]
    return table(f"{data.prefix}every-{role}", f"Means over {_ROLES[role]} and seeds, on test, {variant}", heads, body)


def _differences(data: _Dataset) -> Html | None:
    if not data.tables.comparisons:
        return None
    variant = data.variant
    pictures = []
    for role in data.roles:
        for metric in HEADLINE:
            found = _mean_comparisons(data, variant, role, metric)
            dots = [_difference_dot(data, strategy, found[strategy]) for strategy in data.series if strategy in found]
            pictures.append(charts.dot_chart(f"{_metric(metric)}, {_ROLES[role]}", dots, reference=0.0))
    heads = [
        Column("Strategy", numeric=False),
        Column("Domain", numeric=False),
        Column("Metric", numeric=False),
        *(Column(title) for title in ("Difference", "p", "Corrected p", "Seeds")),
    ]
    body = [
        [
            Cell(_strategy(data, row["strategy"]), row["strategy"]),
            Cell(_domain_name(row), row["domain"]),
            Cell(_metric(row["metric"]), row["metric"]),
            number_cell(row["difference"], join(_marks(row, False), _difference(row))),
            number_cell(row["p_value"], _p(row["p_value"])),
            number_cell(row["p_adjusted"], _p(row["p_adjusted"])),
            number_cell(row["num_seeds"], str(row["num_seeds"])),
        ]
        for row in data.tables.comparisons
        if row["variant"] == variant and row["metric"] in HEADLINE
    ]
    others = sorted({row["baseline"] for row in data.tables.comparisons} - {data.baseline})
    return join(
        charts.grid(*pictures),
        note(
            f"Mean difference to {data.baseline} with its 95 % interval, paired over users; over several seeds their "
            "spread is in it. Filled: significant after Holm's correction; outlined: not; an arrow: outside the "
            "picture. An interval speaks of other "
            "users and seeds of these domains, not of other domains."
            + (f" Differences to {', '.join(others)} are in comparisons.parquet." if others else "")
        ),
        folded(
            "Every difference, by domain",
            table(
                f"{data.prefix}differences-table", f"Differences to {data.baseline}, on test, {variant}", heads, body
            ),
        ),
    )


def _difference_dot(data: _Dataset, strategy: str, row: Mapping[str, Any]) -> charts.Dot:
    difference, half = row["difference"], row["half_width"]
    bounded = is_number(difference) and is_number(half)
    return charts.Dot(
        strategy,
        data.series[strategy],
        difference,
        difference - half if bounded else None,
        difference + half if bounded else None,
        hollow=not row["significant"],
        shown=_difference(row),
        minor=strategy in data.tables.references,
    )


def _domain_name(row: Mapping[str, Any]) -> str:
    if row["domain"] == MEAN:
        return f"mean of {_ROLES[row['role']]}"
    return f"{row['domain']} (unseen)" if row["role"] == "unseen" else str(row["domain"])


def _by_domain(data: _Dataset) -> Html:
    variant, metric, baseline = data.variant, HEADLINE[0], data.baseline
    columns: list[tuple[str, dict[str, Score]]] = []
    for role in data.roles:
        rows = _results(data, variant, role, metric)
        keys = _keys(rows, role)
        for domain in dict.fromkeys(domain for _, domain in keys):
            scores = mean_scores(rows, [key for key in keys if key[1] == domain])
            columns.append((f"{domain} (unseen)" if role == "unseen" else domain, scores))
    pictures = []
    for title, scores in columns:
        dots = [
            charts.Dot(
                strategy,
                data.series[strategy],
                score.mean,
                None if score.spread is None else score.mean - score.spread,
                None if score.spread is None else score.mean + score.spread,
                shown=_shown_plain(score),
                minor=strategy in data.tables.references,
            )
            for strategy in data.strategies
            if (score := scores.get(strategy))
        ]
        reference = scores[baseline].mean if baseline in scores else None
        pictures.append(charts.dot_chart(title, dots, reference=reference))
    shown = charts.grid(*pictures)
    body = []
    for strategy in data.strategies:
        row = [Cell(_strategy(data, strategy), strategy)]
        for _, scores in columns:
            score, is_best = scores.get(strategy), strategy == _best(data, scores)
            row.append(number_cell(score.mean if score else None, join(_marks(None, is_best), _shown(score)), is_best))
        body.append(row)
    heads = [Column("Strategy", numeric=False), *(Column(title) for title, _ in columns)]
    told = f"{_metric(metric)} on test, {variant}"
    line = f" Dashed: {baseline}." if baseline else ""
    return join(
        folded("Pictures", shown) if len(pictures) > MANY_PICTURES else shown,
        note(
            "Mean over seeds, ± their standard deviation where there are several."
            f"{line} Each picture has its own scale; an arrow is outside it."
        ),
        table(f"{data.prefix}domains-table", told, heads, body),
    )


def _shown_plain(score: Score) -> str:
    return decimal(score.mean) + (f" ± {decimal(score.spread)}" if score.spread is not None else "")


def _unseen(data: _Dataset) -> Html | None:
    variant, metric = data.variant, HEADLINE[0]
    unseen = _results(data, variant, "unseen", metric)
    if not unseen:
        return None
    keys = _keys(unseen, "unseen")
    folds = {left_out for left_out, _ in keys}
    of_seen = _score_of(data, variant, "train", metric)
    of_unseen = mean_scores(unseen, keys)
    points = [
        charts.Point(s, data.series[s], of_seen[s].mean, of_unseen[s].mean, of_seen[s].spread, of_unseen[s].spread)
        for s in data.strategies
        if s in of_seen and s in of_unseen
    ]
    how = (
        "Every training domain in turn was left out of the merge and of every choice: the mean over domains where they "
        "took no part, against the mean over the training domains where all were merged."
        if folds != {""}
        else "Unseen domains took no part in training, merging or any choice."
    )
    return _with_legend(
        [charts.scatter_chart(_metric(metric), "training domains", "unseen domains", points)],
        points,
        f"{how} Up and to the right is better; bars are the standard deviation over seeds.",
    )


def _with_legend(pictures: Sequence[Html], points: Sequence[charts.Point], told: str) -> Html | None:
    if not points:
        return None
    legend = charts.legend({point.label: point.series for point in points})
    return charts.grid(*pictures, element("div", legend, note(told), class_="side"))


def _selected(rows: Rows) -> Rows:
    """Those of the whole federation, or of all folds where there is none."""
    return [row for row in rows if not row["left_out"]] or rows


def _mean_of(rows: Rows, strategy: str, value: Callable[[Mapping[str, Any]], float | None]) -> float | None:
    found = [number for row in rows if row["strategy"] == strategy and (number := value(row)) is not None]
    return math.fsum(found) / len(found) if found else None


def _traffic(row: Mapping[str, Any]) -> float | None:
    if row["bytes_up"] is None or row["bytes_down"] is None:
        return None
    return float(row["bytes_up"] + row["bytes_down"])


def _bytes(data: _Dataset) -> Html | None:
    costs = _selected(data.tables.costs)
    traffic = {strategy: _mean_of(costs, strategy, _traffic) for strategy in data.strategies}
    pictures, drawn = [], []
    for role in data.roles:
        scores = _score_of(data, data.variant, role, HEADLINE[0])
        points = [
            charts.Point(strategy, data.series[strategy], bytes_of, score.mean, None, score.spread)
            for strategy, bytes_of in traffic.items()
            if (score := scores.get(strategy)) and bytes_of is not None
        ]
        title = f"{_metric(HEADLINE[0])}, {_ROLES[role]}"
        pictures.append(
            charts.scatter_chart(
                title, "bytes up and down", _metric(HEADLINE[0]), points, x_text=size, x_from_zero=True
            )
        )
        drawn += points
    told = (
        "Bytes of all clients together, up and down, mean over seeds. Up and to the left is better; bars are the "
        "standard deviation over seeds."
    )
    return _with_legend(pictures, drawn, told)


def _privacy(data: _Dataset) -> Html | None:
    configs = {cell["strategy"]: cell["config"] for cell in data.tables.cells}
    costs = _selected(data.tables.costs)
    columns = {
        _metric(metric) + (f", {_ROLES[role]}" if len(data.roles) > 1 else ""): _score_of(
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
            _mean_of(costs, strategy, lambda row: row["bytes_up"]),
            _mean_of(costs, strategy, lambda row: row["bytes_down"]),
        )
        for strategy in data.competing
        if strategy in configs
    ]
    return utility_and_privacy(f"{data.prefix}privacy-table", rows)


def _leak_scores(data: _Dataset, model: str, attack: str, metric: str) -> dict[str, Score]:
    wanted = {"model": model, "attack": attack, "metric": metric}
    rows = [row for row in data.tables.leaks if all(row[key] == value for key, value in wanted.items())]
    return mean_scores(rows, sorted({(row["left_out"], row["domain"]) for row in rows}))


def _costs(data: _Dataset) -> Html | None:
    rows = _selected(data.tables.costs)
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
        cells = [Cell(_strategy(data, strategy), strategy)]
        for name, _, text in columns:
            if name in ("peak_bytes", "rank"):
                peaks = [row[name] for row in rows if row["strategy"] == strategy and row[name] is not None]
                value = max(peaks, default=None)
            else:
                value = _mean_of(rows, strategy, lambda row, name=name: row[name])  # type: ignore[misc]  # a bound name
            cells.append(number_cell(value, text(value)))
        body.append(cells)
    heads = [Column("Strategy", numeric=False), *(Column(title) for _, title, _ in columns)]
    return join(
        table(f"{data.prefix}costs-table", "Means over seeds; of peak memory and rank the largest", heads, body),
        note(
            "Up: from all clients to the server; down: back. Clients: seconds of training, and of votes about experts, "
            "summed over clients; evaluation is not counted. Of a federation of rounds, in its last round: error, how "
            "far what was aggregated is from the exact mean; residual, what a client's start leaves out of it at most; "
            f"both as shares of its norm. {ABSENT}: not measured, or there is none."
        ),
    )


def _coefficients(data: _Dataset) -> Html | None:
    rows = _selected(data.tables.coefficients)
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
        parts.append(charts.heat_table(f"{data.prefix}heat", "One coefficient a domain", domains, single, one))
    for number, (strategy, of_strategy) in enumerate(groups.items()):
        if strategy not in single:
            some = {(d, g): means[strategy, d, g] for d in domains for g in of_strategy if (strategy, d, g) in means}
            key = f"{data.prefix}heat-{number}"
            parts.append(charts.heat_table(key, f"{strategy}, domain by layer", domains, of_strategy, some))
    return join(
        *parts,
        note("Mean over seeds. The stronger the colour, the further from zero; blue is positive, orange negative."),
    )


def _curves(data: _Dataset) -> Html | None:
    """A picture a domain with a line a strategy; of curves of one strategy alone, one picture with a line a domain."""
    rows = [row for row in _selected(data.tables.curves) if row["value"] is not None]
    single: list[Html] = []
    parts: list[Html] = []
    for name in dict.fromkeys(row["name"] for row in rows):
        of_name = [row for row in rows if row["name"] == name]
        several = len({row["strategy"] for row in of_name}) > 1
        panel, line = ("domain", "strategy") if several else ("strategy", "domain")
        series = data.series if several else _places(row["domain"] for row in of_name)
        panels = {
            title: _lines([row for row in of_name if row[panel] == title], line, series)
            for title in dict.fromkeys(row[panel] for row in of_name)
        }
        if len(panels) == 1:
            single += [charts.line_chart(name, "step", lines, with_legend=True) for lines in panels.values()]
            continue
        pictures = [charts.line_chart(title or name, "step", lines) for title, lines in panels.items()]
        shown = charts.grid(*pictures)
        used = dict.fromkeys(line.label for lines in panels.values() for line in lines)
        parts.append(element("h3", name))
        parts.append(folded("Pictures", shown) if len(pictures) > MANY_PICTURES else shown)
        parts.append(charts.legend({label: series[label] for label in used}, with_line=True))
    if not rows:
        return None
    told = "Mean over seeds, within the range of them; " if len({row["seed"] for row in rows}) > 1 else ""
    few = f"{told}of more than {charts.MOST_POINTS} steps, averages of neighbours."
    return join(charts.grid(*single) if single else None, *parts, note(few[0].upper() + few[1:]))


def _lines(rows: Rows, what: str, series: Mapping[str, int]) -> list[charts.Line]:
    return [
        charts.Line(label, series[label], _over_steps([row for row in rows if row[what] == label]))
        for label in dict.fromkeys(row[what] for row in rows)
    ]


def _places(names: Iterable[str]) -> dict[str, int]:
    return {name: place for place, name in enumerate(dict.fromkeys(names))}


def _over_steps(rows: Rows) -> list[tuple[float, float, float, float]]:
    by_step: dict[int, list[float]] = {}
    for row in rows:
        by_step.setdefault(row["step"], []).append(row["value"])
    return [
        (float(step), math.fsum(values) / len(values), min(values), max(values))
        for step, values in sorted(by_step.items())
    ]


def _ranks(tables: BenchTables, series: Mapping[str, int]) -> Html:
    pictures, lines = [], []
    for dataset in dict.fromkeys(row["dataset"] for row in tables.ranks):
        rows = [row for row in tables.ranks if row["dataset"] == dataset and is_number(row["mean_rank"])]
        if not rows:
            continue
        rows.sort(key=lambda row: (row["mean_rank"], series.get(row["strategy"], 0)))
        places = {**series, **{row["strategy"]: len(series) for row in rows if row["strategy"] not in series}}
        ranks = [(row["strategy"], places[row["strategy"]], row["mean_rank"]) for row in rows]
        title = dataset or "all datasets"
        first = rows[0]
        if is_number(first["critical_difference"]):
            pictures.append(charts.rank_chart(title, ranks, first["critical_difference"]))
        p = first["p_friedman"]
        told = (
            "the strategies do not all rank alike"
            if p is not None and p < LEVEL
            else "no evidence that they rank differently"
        )
        lines.append(f"{title}: {first['num_blocks']} blocks; Friedman's test, p {_p(p, equals=True)}: {told}.")
    told = element(
        "div",
        *(element("p", line) for line in lines),
        note(
            "Mean rank over the blocks (dataset, domain, seed), 1 is best. Strategies joined by a bar differ by less "
            "than the critical difference (Nemenyi, 5 %). Seeds of one domain are not quite independent blocks: a "
            "summary, not a proof."
        ),
        class_="side",
    )
    return charts.grid(*pictures, told)


def _cells(tables: BenchTables) -> Html:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for cell in tables.cells:
        groups.setdefault(f"{cell['dataset']} · {cell['strategy']}", []).append(cell)
    if len(tables.cells) == 1:
        return _cell_parts(tables.cells[0])
    parts = []
    for name, cells in groups.items():
        finished = sum(cell["status"] == FINISHED for cell in cells)
        folds = [(cell, f", without {cell['left_out']}" if cell["left_out"] else "") for cell in cells]
        parts.append(
            folded(
                f"{name} – {finished} of {_counted(len(cells), 'cell')} finished",
                *(
                    folded(f"seed {cell['seed']}{fold} – {cell['status']}{_time(cell)}", _cell_parts(cell))
                    for cell, fold in folds
                ),
            )
        )
    return join(*parts)


def _time(cell: Mapping[str, Any]) -> str:
    return f", {seconds(cell['seconds'])}" if is_number(cell["seconds"]) else ""


def _cell_parts(cell: Mapping[str, Any]) -> Html:
    facts_of_cell = {key: value for key, value in cell.items() if key not in {"config", "environment"}}
    return join(
        settings(facts_of_cell),
        folded("Settings", settings(cell["config"])),
        folded("Environment", settings(cell["environment"])),
    )
