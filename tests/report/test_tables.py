"""Tables of results: numbers in the right cells, marks, headers, and errors."""

import math
from dataclasses import replace

import numpy as np
import pytest

from fedmerge.errors import LayoutMismatchError
from fedmerge.evaluation.ranks import METRICS, per_user_metrics
from fedmerge.evaluation.sums import MetricSums, metric_sums, paired_difference, paired_difference_of_mean
from fedmerge.report.tables import ResultRow, Role, TableFormat, differences_table, result_rows, results_table
from fedmerge.seeding import generator

ROLES: dict[str, Role] = {"Beauty": "train", "Toys": "train", "Garden": "unseen"}


def row(domain: str, method: str, recall: float, ndcg: float = 0.01) -> ResultRow:
    num_users = {"Beauty": 4000, "Toys": 1500, "Garden": 20}[domain]
    return ResultRow(domain, ROLES[domain], method, num_users, {"recall@10": recall, "ndcg@10": ndcg})


ROWS = (
    row("Garden", "backbone", 0.03),
    row("Beauty", "backbone", 0.05),
    row("Toys", "backbone", 0.04),
    row("Beauty", "expert", 0.09),
    row("Beauty", "average", 0.0612),
    row("Toys", "average", 0.0744),
    row("Garden", "average", 0.041),
    row("Beauty", "ties", 0.0627),
    row("Toys", "ties", 0.0701),
    row("Garden", "ties", 0.041),
)


def plain_cells(text: str, metric: str) -> dict[str, list[str]]:
    """Return first word -> other words of each line of one metric's table."""
    table = next(part for part in text.split("\n\n") if part.startswith(metric))
    return {line.split()[0]: line.split()[1:] for line in table.splitlines()[1:]}


def markdown_cells(text: str, metric: str) -> dict[str, list[str]]:
    """Return first cell -> other cells of each line."""
    table = next(part for part in text.split("\n\n") if part.startswith(f"| {metric}"))
    lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]
    return {line[0]: line[1:] for line in lines}


def test_numbers_are_in_the_right_cells() -> None:
    text = results_table(ROWS, variant="masked", split="test", merged_methods={"average", "ties"})
    cells = plain_cells(text, "recall@10")
    # Training domains first, then unseen ones, then the means over both groups.
    assert cells["users"] == ["4,000", "1,500", "20"]
    assert cells["backbone"] == ["0.0500", "0.0400", "0.0300", "0.0450", "0.0300"]
    assert cells["average"] == ["0.0612", "0.0744*", "0.0410*", "0.0678*", "0.0410*"]
    assert cells["ties"] == ["0.0627*", "0.0701", "0.0410*", "0.0664", "0.0410*"]
    assert plain_cells(text, "ndcg@10")["ties"] == ["0.0100*"] * 5


def test_a_withheld_mean_is_shown_as_absent_and_keeps_its_group_without_one() -> None:
    rows = [replace(one, metrics={**one.metrics, "recall@10": math.nan}) if one == ROWS[3] else one for one in ROWS]
    rows += [row("Toys", "expert", 0.08)]
    text = results_table(rows, variant="masked", split="test", merged_methods={"average", "ties"})
    assert plain_cells(text, "recall@10")["expert"] == ["-", "0.0800", "-", "-", "-"]
    assert "withheld by the client" in text


def test_a_mean_over_only_some_domains_is_omitted() -> None:
    text = results_table(ROWS, variant="masked", split="test")
    assert plain_cells(text, "recall@10")["expert"] == ["0.0900", "-", "-", "-", "-"]
    assert "-: not evaluated" in text
    whole = results_table([one for one in ROWS if one.method != "expert"], variant="masked", split="test")
    assert "not evaluated" not in whole


def test_a_domain_that_withholds_everything_is_left_out_of_the_means() -> None:
    withheld = {"recall@10": math.nan, "ndcg@10": math.nan}
    rows = [replace(one, metrics=withheld) if one.domain in ("Beauty", "Garden") else one for one in ROWS]
    text = results_table(rows, variant="masked", split="test")
    assert "mean of training (1 of 2)" in text
    assert "mean of unseen (0 of 1)" in text
    assert plain_cells(text, "recall@10")["ties"] == ["-", "0.0701", "-", "0.0701", "-"]

    rng = generator(1, "withheld")
    outcomes = {name: rng.random((9, len(METRICS))) for name in ("average", "ties")}
    of_one = metric_sums(outcomes, "unmasked")
    nothing = np.full_like(of_one.sums, np.nan), np.full_like(of_one.products, np.nan)
    silent = replace(of_one, sums=nothing[0], products=nothing[1], noise=1.0)
    roles: dict[str, Role] = {"a": "train", "b": "train", "c": "train"}
    found = differences_table({"a": of_one, "b": silent, "c": of_one}, roles, baseline="average", split="test")
    assert "mean of training (2 of 3)" in found
    expected = paired_difference_of_mean([of_one, of_one], "ties", "average", "recall@10")
    cell = f"{expected.mean:+.4f} ± {expected.high - expected.mean:.4f}"
    line = next(line for line in found.splitlines() if line.startswith("ties"))  # recall@10 is the first table
    assert line.rstrip(" *").endswith(cell)
    assert [part.strip() for part in line.split("  ") if part.strip()][-3] == "-"


def test_the_header_names_the_measurement() -> None:
    text = results_table(ROWS, variant="unmasked", split="valid")
    head = text.split("\n\n")[0].splitlines()
    assert head[0].startswith("variant: unmasked")
    assert head[1:] == ["split: valid", "users: 5,520 in 3 domains"]
    assert "SYNTHETIC" not in text
    titles = next(line for line in text.splitlines() if line.startswith("recall@10"))
    assert titles.split("  ")[-1].strip() == "mean of unseen (1)"
    assert "mean of training (2)" in titles
    assert "Garden (unseen)" in titles


def test_many_domains_show_only_means() -> None:
    def rows(num_domains: int) -> list[ResultRow]:
        return [
            ResultRow(f"d{k:02d}", "train" if k else "unseen", method, 10, {"recall@10": recall, "ndcg@10": 0.0})
            for k in range(num_domains)
            for method, recall in (("average", k / 100), ("ties", 0.5))
        ]

    few = results_table(rows(20), variant="masked", split="test", merged_methods={"average", "ties"})
    assert len(plain_cells(few, "recall@10")["average"]) == 22
    assert "columns:" not in few
    many = results_table(rows(21), variant="masked", split="test", merged_methods={"average", "ties"})
    assert plain_cells(many, "recall@10")["average"] == ["0.1050", "0.0000"]
    assert plain_cells(many, "recall@10")["ties"] == ["0.5000*", "0.5000*"]
    assert "the sums of each of the 21 domains are in metrics.parquet" in many
    assert "d00" not in many
    rng = generator(0, "tables")
    sums = {
        f"d{k:02d}": metric_sums({name: rng.random((9, len(METRICS))) for name in ("average", "ties")}, "unmasked")
        for k in range(21)
    }
    roles: dict[str, Role] = dict.fromkeys(sums, "train")
    text = differences_table(sums, roles, baseline="average", split="test")
    assert len(plain_cells(text, "recall@10")["ties"]) == 3  # difference ± half-width
    assert max(map(len, text.splitlines())) < 250


@pytest.mark.parametrize("table_format", ["plain", "markdown"])
def test_generated_data_are_announced_first(table_format: TableFormat) -> None:
    text = results_table(ROWS, variant="masked", split="test", synthetic=True, table_format=table_format)
    assert text.lstrip("*").startswith("SYNTHETIC DATA")


def test_columns_of_plain_text_are_aligned() -> None:
    text = results_table(ROWS, variant="masked", split="test", merged_methods=("average", "ties"))
    table = next(part for part in text.split("\n\n") if part.startswith("recall@10")).splitlines()
    rule, body = table[2], table[3:]
    assert set(rule) == {"-"}
    assert all(len(line) <= len(rule) for line in table)
    points = [[i for i, character in enumerate(line) if character == "."] for line in body if "-" not in line]
    assert len(points) == 3
    assert points[0] == points[1] == points[2]


def test_markdown_has_one_cell_per_column_and_bold_marks() -> None:
    text = results_table(
        ROWS, variant="masked", split="test", merged_methods=["average", "ties"], table_format="markdown"
    )
    cells = markdown_cells(text, "recall@10")
    assert "\n| --- | ---: | ---: | ---: | ---: | ---: |\n| users |" in text
    assert cells["average"] == ["0.0612", "**0.0744**", "**0.0410**", "**0.0678**", "**0.0410**"]
    assert cells["expert"] == ["0.0900", "-", "-", "-", "-"]
    widths = {line.count(" | ") for line in text.splitlines() if line.startswith("| ")}
    assert widths == {5}


def test_a_pipe_or_a_line_break_in_a_name_cannot_break_the_table() -> None:
    rows = [replace(ROWS[0], method="a|b\nc")]
    text = results_table(rows, variant="masked", split="test", table_format="markdown")
    assert "| a\\|b c | 0.0300 | 0.0300 |" in text
    assert "\na|b c " in results_table(rows, variant="masked", split="test")


def test_nothing_is_marked_without_competition() -> None:
    for merged in ((), ("average",)):
        text = results_table(ROWS, variant="masked", split="test", merged_methods=merged)
        assert "*" not in text


def test_the_best_is_found_before_rounding() -> None:
    rows = [row("Beauty", "average", 0.06124), row("Beauty", "ties", 0.06121)]
    text = results_table(rows, variant="masked", split="test", merged_methods=["average", "ties"])
    cells = plain_cells(text, "recall@10")
    assert cells["average"] == ["0.0612*", "0.0612*"]
    assert cells["ties"] == ["0.0612", "0.0612"]


def test_only_the_roles_in_use_have_a_mean() -> None:
    rows = [one for one in ROWS if one.role == "train"]
    assert "unseen" not in results_table(rows, variant="masked", split="test")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "results table"),
        ([ROWS[0], ROWS[0]], f"{ROWS[0].method!r} on {ROWS[0].domain!r}"),
        ([ROWS[0], replace(ROWS[6], role="train")], "'train'"),
        ([ROWS[0], replace(ROWS[6], num_users=21)], "21"),
        ([replace(ROWS[0], metrics={"recall@10": 0.1})], "ndcg@10.*None"),
        ([replace(ROWS[0], metrics={"recall@10": float("inf"), "ndcg@10": 0.1})], "recall@10.*inf"),
        ([replace(ROWS[0], role="both")], "'both'"),  # type: ignore[arg-type]  # what a caller could pass
    ],
)
def test_rows_of_different_evaluations_are_refused(rows: list[ResultRow], message: str) -> None:
    with pytest.raises(LayoutMismatchError, match=message):
        results_table(rows, variant="masked", split="test")


def test_unknown_options_are_refused() -> None:
    with pytest.raises(LayoutMismatchError, match=r"\['tise'\]"):
        results_table(ROWS, variant="masked", split="test", merged_methods=["ties", "tise"])
    with pytest.raises(LayoutMismatchError, match="'train'"):
        results_table(ROWS, variant="masked", split="train")  # type: ignore[arg-type]  # what a caller could pass
    with pytest.raises(ValueError, match="'html'"):
        results_table(ROWS, variant="masked", split="test", table_format="html")  # type: ignore[arg-type]  # as above


# From sums


def some_sums(domain: str, num_users: int = 300) -> MetricSums:
    rng = generator(0, "test-tables", domain)
    backbone = rng.integers(5, 60, num_users)
    ranks = {"backbone": backbone, "average": np.maximum(1, backbone - 20), "same": backbone}
    return metric_sums({method: per_user_metrics(of_method) for method, of_method in ranks.items()}, "masked")


SUMS = {"Garden": some_sums("Garden"), "Beauty": some_sums("Beauty"), "Toys": some_sums("Toys")}


def test_rows_hold_the_means_of_the_sums() -> None:
    rows = result_rows(SUMS, ROLES)
    assert len(rows) == 9
    assert rows[0] == ResultRow(
        "Garden", "unseen", "backbone", 300, dict(zip(METRICS, SUMS["Garden"].means()[0], strict=True))
    )
    text = results_table(rows, variant="masked", split="valid", metrics=("mrr",))
    expected = [SUMS[domain].mean("average", "mrr") for domain in ("Beauty", "Toys", "Garden")]
    shown = [*expected, (expected[0] + expected[1]) / 2, expected[2]]
    assert plain_cells(text, "mrr")["average"] == [f"{value:.4f}" for value in shown]


def test_differences_are_in_the_right_cells() -> None:
    text = differences_table(SUMS, ROLES, baseline="backbone", split="test", metrics=("mrr",), table_format="markdown")
    cells = markdown_cells(text, "mrr, difference to backbone")
    found = [
        *(paired_difference(SUMS[domain], "average", "backbone", "mrr") for domain in ("Beauty", "Toys", "Garden")),
        paired_difference_of_mean([SUMS["Beauty"], SUMS["Toys"]], "average", "backbone", "mrr"),
        paired_difference(SUMS["Garden"], "average", "backbone", "mrr"),
    ]
    assert all(difference.low > 0 for difference in found)
    assert cells["average"] == [f"**+{one.mean:.4f} ± {1.96 * one.standard_error:.4f}**" for one in found]
    assert cells["same"] == ["+0.0000 ± 0.0000"] * 5
    assert "backbone" not in cells
    assert "variant: masked" in text
    assert "bold: the interval excludes 0" in text


def test_differences_below_zero_are_marked_and_signed() -> None:
    text = differences_table(SUMS, ROLES, baseline="average", split="test", metrics=("mrr",))
    line = next(line for line in text.splitlines() if line.startswith("backbone"))
    assert line.count("*") == 5
    assert line.count(" -0.") == 5


def test_a_difference_that_rounds_to_zero_has_no_minus_sign() -> None:
    ranks = np.full(3000, 40)
    worse = ranks.copy()
    worse[0] = 41
    sums = metric_sums({"old": per_user_metrics(ranks), "new": per_user_metrics(worse)}, "masked")
    assert paired_difference(sums, "new", "old", "mrr").mean < 0
    text = differences_table({"Beauty": sums}, ROLES, baseline="old", split="test", metrics=("mrr",))
    assert "+0.0000 ± 0.0000" in text
    assert "-0.0000" not in text


def test_domains_without_the_method_or_with_one_user_have_no_difference() -> None:
    without = metric_sums({"backbone": np.zeros((5, len(METRICS)))}, "masked")
    for toys in (without, some_sums("Toys", num_users=1)):
        sums = {"Beauty": SUMS["Beauty"], "Toys": toys}
        text = differences_table(
            sums, ROLES, baseline="backbone", split="test", metrics=("mrr",), table_format="markdown"
        )
        cells = markdown_cells(text, "mrr")["average"]
        assert cells[1] == "-"
        assert cells[0] == cells[2] != "-"  # the mean is of Beauty alone, and says so
        assert "mean of training (1 of 2)" in text
        assert "-: not evaluated" in text


def test_sums_of_different_evaluations_are_refused() -> None:
    with pytest.raises(LayoutMismatchError, match="'none'"):
        differences_table(SUMS, ROLES, baseline="none", split="test")
    with pytest.raises(LayoutMismatchError, match=r"\['masked', 'unmasked'\]"):
        differences_table(
            {**SUMS, "Toys": replace(SUMS["Toys"], variant="unmasked")}, ROLES, baseline="same", split="test"
        )
    with pytest.raises(LayoutMismatchError, match=r"\['Toys'\]"):
        result_rows(SUMS, {"Beauty": "train", "Garden": "unseen"})
    with pytest.raises(LayoutMismatchError, match=r"\[\]"):
        differences_table({}, {}, baseline="same", split="test")
