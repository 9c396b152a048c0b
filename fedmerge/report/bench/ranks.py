"""The section with ranks over domains and seeds."""

from collections.abc import Mapping

from fedmerge.report.bench.notation import p_text
from fedmerge.report.bench_tables import BenchTables
from fedmerge.report.html import charts
from fedmerge.report.html.looks import Look
from fedmerge.report.html.page import Html, element, is_number, note
from fedmerge.report.statistics import LEVEL


def ranks_section(tables: BenchTables, looks: Mapping[str, Look]) -> Html:
    """Return mean ranks with their critical difference, and Friedman's test."""
    pictures, lines = [], []
    for dataset in dict.fromkeys(row["dataset"] for row in tables.ranks):
        rows = [row for row in tables.ranks if row["dataset"] == dataset and is_number(row["mean_rank"])]
        if not rows:
            continue
        rows.sort(key=lambda row: row["mean_rank"])
        ranks = [(row["strategy"], looks[row["strategy"]], row["mean_rank"]) for row in rows]
        title = dataset or "all datasets"
        first = rows[0]
        if is_number(first["critical_difference"]):
            pictures.append(charts.rank_chart(title, ranks, first["critical_difference"]))
        p = first["p_friedman"]
        verdict = (
            "the strategies do not all rank alike"
            if p is not None and p < LEVEL
            else "no evidence that they rank differently"
        )
        lines.append(f"{title}: {first['num_blocks']} blocks; Friedman's test, p {p_text(p, equals=True)}: {verdict}.")
    side = element(
        "div",
        *(element("p", line) for line in lines),
        note(
            "Mean rank over blocks (dataset, training domain, seed); 1 is best. Strategies joined by a bar differ by "
            "less than the critical difference (Nemenyi, 5 %). Seeds of one domain are not fully independent blocks, "
            "so this is a summary, not a proof."
        ),
        class_="side",
    )
    return charts.grid(*pictures, side)
