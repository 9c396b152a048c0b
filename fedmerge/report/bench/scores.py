"""Sections with scores: means over domains, every domain by itself, unseen against seen domains."""

from fedmerge.evaluation.ranks import METRICS
from fedmerge.report.bench.dataset import (
    HEADLINE,
    ROLE_TITLES,
    VARIANT_NOTES,
    Dataset,
    Score,
    best_strategy,
    mean_comparisons,
    mean_keys,
    mean_scores,
    rows_on_test,
    scores_of,
)
from fedmerge.report.bench.notation import (
    MANY_PICTURES,
    mark_signs,
    metric_title,
    score_html,
    score_text,
    strategy_name,
)
from fedmerge.report.bench_tables import MEAN, POOLED
from fedmerge.report.html import charts
from fedmerge.report.html.page import Cell, Column, Html, decimal, element, folded, join, note, number_cell, table
from fedmerge.report.statistics import LEVEL


def scores_section(data: Dataset) -> Html:
    """Return the means over domains, for every variant and metric."""
    first = data.variant
    parts: list[str] = [_score_table(data, first, "scores-table"), _how_to_read(data, first)]
    others = sorted({row["variant"] for row in data.tables.results} - {first})
    for variant in others:
        parts.append(
            folded(
                f"The same, {variant}", note(VARIANT_NOTES[variant]), _score_table(data, variant, f"scores-{variant}")
            )
        )
    for role in data.roles:
        parts.append(folded(f"Every metric, {ROLE_TITLES[role]}", _every_metric(data, first, role)))
    return join(*parts)


def _score_table(data: Dataset, variant: str, key: str) -> Html:
    columns = [(role, metric) for role in data.roles for metric in HEADLINE]
    scores = {column: scores_of(data, variant, *column) for column in columns}
    compared = {column: mean_comparisons(data, variant, *column) for column in columns}
    best = {column: best_strategy(data, of_column) for column, of_column in scores.items()}
    labels = _labels(data)
    most = max((score.num_seeds for of_column in scores.values() for score in of_column.values()), default=0)
    body = []
    for strategy in data.strategies:
        row = [Cell(strategy_name(data, strategy, labels.get(strategy, "")), strategy)]
        for column in columns:
            score = scores[column].get(strategy)
            few = f" {score.num_seeds} of {most} seeds" if score and score.num_seeds < most else None
            shown = join(
                mark_signs(compared[column].get(strategy), strategy == best[column]) if score else None,
                score_html(score),
                element("small", few) if few else None,
            )
            row.append(number_cell(score.mean if score else None, shown, strategy == best[column]))
        body.append(row)
    roles = data.roles
    heads = [
        Column("Strategy", numeric=False),
        *(
            Column(metric_title(metric) + (f", {ROLE_TITLES[role]}" if len(roles) > 1 else ""))
            for role, metric in columns
        ),
    ]
    caption = f"Mean over {' or '.join(ROLE_TITLES[role] for role in roles)}, on test, {variant}"
    return table(
        data.prefix + key, caption + ("; ± is the standard deviation over seeds" if most > 1 else ""), heads, body
    )


def _how_to_read(data: Dataset, variant: str) -> Html:
    baseline = data.baseline
    parts = [VARIANT_NOTES[variant], " ★ highest of the competing strategies, before rounding."]
    if baseline:
        parts.append(
            f" ▲ better, ▼ worse than {baseline}, ○ not significantly different: paired over users and seeds, "
            f"corrected for the number of strategies (Holm, {100 * LEVEL:g} %)."
        )
    if len(data.competing) < len(data.strategies):
        parts.append(" Reference rows do not compete for the ★.")
    if any(strategy.endswith(POOLED) for strategy in data.strategies):
        parts.append(
            f" Rows that end in{POOLED} break isolation: they were trained on the interactions of all domains "
            "together, which no federation can do."
        )
    return note(*parts)


def _labels(data: Dataset) -> dict[str, str]:
    """Return strategy -> the variants selected on validation, where their names add something to the strategy's."""
    found: dict[str, dict[str, None]] = {}
    for row in data.tables.results:
        if row["label"] != row["strategy"]:
            found.setdefault(row["strategy"], {})[row["label"].removeprefix(row["strategy"]).strip()] = None
    return {strategy: "selected: " + ", ".join(labels) for strategy, labels in found.items()}


def _every_metric(data: Dataset, variant: str, role: str) -> Html:
    used = {row["metric"] for row in data.tables.results}
    metrics = [*(metric for metric in METRICS if metric in used), *sorted(used - set(METRICS))]
    scores = {metric: scores_of(data, variant, role, metric) for metric in metrics}
    best = {metric: best_strategy(data, of_metric) for metric, of_metric in scores.items()}
    body = []
    for strategy in data.strategies:
        row = [Cell(strategy_name(data, strategy), strategy)]
        for metric in metrics:
            score = scores[metric].get(strategy)
            is_best = strategy == best[metric]
            row.append(number_cell(score.mean if score else None, decimal(score.mean if score else None), is_best))
        body.append(row)
    heads = [Column("Strategy", numeric=False), *(Column(metric_title(metric)) for metric in metrics)]
    return table(
        f"{data.prefix}every-{role}", f"Means over {ROLE_TITLES[role]} and seeds, on test, {variant}", heads, body
    )


def domains_section(data: Dataset) -> Html | None:
    """Return a figure per domain, and a table of all domains; None if the results are means over domains alone."""
    if all(row["domain"] == MEAN for row in data.tables.results):
        return None
    variant, metric, baseline = data.variant, HEADLINE[0], data.baseline
    columns: list[tuple[str, dict[str, Score]]] = []
    for role in data.roles:
        rows = rows_on_test(data, variant, role, metric)
        keys = mean_keys(rows, role)
        for domain in dict.fromkeys(domain for _, domain in keys):
            scores = mean_scores(rows, [key for key in keys if key[1] == domain])
            columns.append((f"{domain} (unseen)" if role == "unseen" else domain, scores))
    pictures = []
    for title, scores in columns:
        dots = [
            charts.Dot(
                strategy,
                data.looks[strategy],
                score.mean,
                None if score.spread is None else score.mean - score.spread,
                None if score.spread is None else score.mean + score.spread,
                shown=score_text(score),
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
        row = [Cell(strategy_name(data, strategy), strategy)]
        for _, scores in columns:
            score, is_best = scores.get(strategy), strategy == best_strategy(data, scores)
            row.append(
                number_cell(score.mean if score else None, join(mark_signs(None, is_best), score_html(score)), is_best)
            )
        body.append(row)
    heads = [Column("Strategy", numeric=False), *(Column(title) for title, _ in columns)]
    caption = f"{metric_title(metric)} on test, {variant}"
    line = f" The vertical line: {baseline}." if baseline else ""
    return join(
        folded("Figures", shown) if len(pictures) > MANY_PICTURES else shown,
        note(
            "Mean over seeds, ± their standard deviation if there are several."
            f"{line} Each figure has its own scale; an arrow marks a value outside it."
        ),
        table(f"{data.prefix}domains-table", caption, heads, body),
    )


def unseen_section(data: Dataset) -> Html | None:
    """Return the scores on unseen domains against those on training domains; None without unseen domains."""
    variant, metric = data.variant, HEADLINE[0]
    unseen = rows_on_test(data, variant, "unseen", metric)
    if not unseen:
        return None
    keys = mean_keys(unseen, "unseen")
    folds = {left_out for left_out, _ in keys}
    of_seen = scores_of(data, variant, "train", metric)
    of_unseen = mean_scores(unseen, keys)
    points = [
        charts.Point(s, data.looks[s], of_seen[s].mean, of_unseen[s].mean, of_seen[s].spread, of_unseen[s].spread)
        for s in data.strategies
        if s in of_seen and s in of_unseen
    ]
    how = (
        "Each training domain in turn was left out of the merge and of every selection: the mean over domains "
        "where they took no part, against the mean over the training domains where all were merged."
        if folds != {""}
        else "Unseen domains took no part in training, merging or selection."
    )
    return charts.with_legend(
        [charts.scatter_chart(metric_title(metric), "training domains", "unseen domains", points)],
        points,
        f"{how} Up and to the right is better; bars are the standard deviation over seeds.",
    )
