"""Names, numbers and marks on a benchmark's page."""

from collections.abc import Mapping
from typing import Any

from fedmerge.report.bench.dataset import Dataset, Score
from fedmerge.report.bench_tables import POOLED
from fedmerge.report.html.page import ABSENT, Html, decimal, element, is_number, join
from fedmerge.report.html.svg import symbol

MANY_PICTURES = 12  # more of one kind are collapsed

_TITLES = {"mrr": "MRR"}


def metric_title(name: str) -> str:
    """Return a metric's title: ``recall@10`` is ``Recall@10``."""
    return _TITLES.get(name, name.replace("recall", "Recall").replace("ndcg", "NDCG"))


def score_html(score: Score | None) -> Html:
    """Return a score with its spread over seeds, or a dash."""
    if score is None:
        return join(ABSENT)
    spread = None if score.spread is None else element("span", f" ± {decimal(score.spread)}", class_="spread")
    return join(decimal(score.mean), spread)


def score_text(score: Score) -> str:
    """Return a score with its spread over seeds, as plain text."""
    return decimal(score.mean) + (f" ± {decimal(score.spread)}" if score.spread is not None else "")


def difference_text(row: Mapping[str, Any]) -> str:
    """Return a comparison's difference with the half-width of its interval."""
    return f"{decimal(row['difference'], sign=True)} ± {decimal(row['half_width'])}"


def p_text(value: float | None, equals: bool = False) -> str:
    """Return a p-value with three decimals, or a bound; ``equals`` puts an equals sign before it."""
    return "<\u00a00.001" if value is not None and value < 0.001 else ("= " if equals else "") + decimal(value, 3)


def counted(count: int, word: str) -> str:
    """Return ``1 seed`` or ``3 seeds``."""
    plural = {"strategy": "strategies"}.get(word, f"{word}s")
    return f"{count} {word if count == 1 else plural}"


def mark_signs(comparison: Mapping[str, Any] | None, best: bool) -> Html:
    """Return the signs before a number; screen readers and tooltips give their meaning."""
    marks = [("★", " best", "highest")] if best else []
    if comparison is not None and is_number(comparison["difference"]):
        baseline = comparison["baseline"]
        if not comparison["significant"]:
            marks.append(("○", "", f"not significantly different from {baseline}"))
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


def strategy_name(data: Dataset, strategy: str, label: str = "") -> Html:
    """Return a strategy's symbol, name and tags."""
    tags = ["baseline"] if strategy == data.baseline else []
    tags += ["reference"] if strategy in data.tables.references else []
    tags += ["breaks isolation"] if strategy.endswith(POOLED) else []
    words = join(
        strategy,
        element("small", f" {label}") if label else None,
        *(element("span", tag, class_="tag") for tag in tags),
    )
    return element("span", symbol(data.looks[strategy]), element("span", words), class_="name")
