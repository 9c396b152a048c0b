"""The page of a run and of a benchmark: structure, escaping, sections."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from report_folders import parsed, some_bench
from run_folders import output

from fedmerge.report.bench.page import bench_page
from fedmerge.report.bench_tables import BenchTables, read_bench_tables

Capsys = pytest.CaptureFixture[str]


@pytest.mark.parametrize("which", ["bench", "private", "run"])
def test_the_page_is_valid_html(
    reported_bench: BenchTables,
    private_bench: BenchTables,
    reported_run: Path,
    capsys: Capsys,
    tmp_path: Path,
    which: str,
) -> None:
    if which != "run":
        text = bench_page(reported_bench if which == "bench" else private_bench)
    else:
        out = tmp_path / "page.html"
        assert output(capsys, "report", reported_run, "--out", out) == f"{out}\n"
        text = out.read_text(encoding="utf-8")
    found = parsed(text)
    ids = Counter(attributes["id"] for _, attributes in found.elements if "id" in attributes)
    assert max(ids.values()) == 1
    links = [str(attributes["href"]) for attributes in found.of("a")]
    assert links
    assert all(link.startswith("#") and link[1:] in ids for link in links)
    for _, attributes in found.elements:
        for name in ("aria-labelledby", "aria-describedby"):
            assert attributes.get(name) is None or attributes[name] in ids
    # nothing is loaded from anywhere
    assert not {"img", "iframe", "object", "audio", "video"} & {tag for tag, _ in found.elements}
    assert [attributes.get("href") for attributes in found.of("link")] == ["data:,"]
    assert not re.search(r"""(src|href)=["']?(https?:|//)|url\(|@import|fetch\(|XMLHttp""", text)
    assert "default-src 'none'" in text
    # tables and pictures have captions and labels
    tables = found.of("table")
    assert len(tables) == len(found.of("caption")) > 5
    assert all(attributes["scope"] in ("row", "col") for attributes in found.of("th"))
    pictures = [attributes for attributes in found.of("svg") if attributes.get("role") == "img"]
    assert len(pictures) > 5
    assert all(len(str(attributes["aria-label"])) > 20 for attributes in pictures)
    assert len(found.of("h1")) == 1
    assert "Synthetic data." in found.text
    # no missing number is printed as such
    assert not re.search(r"\b(nan|inf|None|NaN)\b", re.sub(r"<pre.*?</pre>|<style.*?</style>", "", text, flags=re.S))


def test_equal_tables_give_equal_bytes(reported_bench: BenchTables, bench_folder: Path, capsys: Capsys) -> None:
    assert bench_page(reported_bench) == bench_page(read_bench_tables(bench_folder))
    assert output(capsys, "report", bench_folder) == f"{bench_folder / 'report.html'}\n"
    first = (bench_folder / "report.html").read_bytes()
    output(capsys, "report", bench_folder, "--out", bench_folder / "again.html")
    assert (bench_folder / "again.html").read_bytes() == first


def test_text_from_data_is_escaped() -> None:
    strategies = ("average", '<script>alert("s")</script>', "a & b")
    domains = ('"><img src=x onerror=alert(1)>', "toys' </title>")
    tables = replace(some_bench(strategies, domains, ("<b>bold</b>",), (0, 1)), title="</style><script>x</script>")
    text = bench_page(tables)
    found = parsed(text)
    assert len(found.of("script")) == 1
    assert not found.of("img")
    assert not found.of("b")
    assert not {name for _, attributes in found.elements for name in attributes if name.startswith("on")}
    for name in (*strategies, *domains, "<b>bold</b>"):
        assert name in found.text


def test_without_optional_tables_their_sections_are_absent(reported_bench: BenchTables) -> None:
    bare = BenchTables("bare", False, results=reported_bench.results)
    found = parsed(bench_page(bare))
    keys = [attributes["id"] for attributes in found.of("section")]
    assert keys == ["short", "d0-scores", "d0-domains", "d0-unseen"]
    assert "Synthetic" not in found.text
    assert parsed(bench_page(BenchTables("empty", False))).of("section")


def test_many_figures_are_collapsed_and_many_datasets_named() -> None:
    domains = [f"d{number}" for number in range(14)]
    found = parsed(bench_page(some_bench(("average", "ties"), domains, ("one", "two"), (0,), folds=False)))
    assert "Figures" in found.text
    assert "two: Scores" in found.text
    assert "all datasets" in found.text


def test_absent_numbers_are_dashes_and_never_the_best(reported_bench: BenchTables) -> None:
    def without(row: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**row, "value": None} if (row["strategy"], row["seed"]) in gone else row

    gone = {("mergerec", 0), ("mergerec", 1), ("mergerec", 2), ("backbone", 2)}
    table = parsed(
        bench_page(replace(reported_bench, results=[without(row) for row in reported_bench.results]))
    ).tables["d0-scores-table"]
    assert table[3][1:] == ["–"] * 4
    assert "2 of 3 seeds" in table[1][1]
    assert not any("★" in cell for row in table for cell in row)  # only one strategy still competes


def test_a_row_without_a_model_that_scores_higher_is_named_with_the_best() -> None:
    for strategies, is_named in ((("popularity", "average", "ties"), False), (("average", "ties", "popularity"), True)):
        tables = replace(some_bench(strategies, folds=False), references=("popularity",))
        text = parsed(bench_page(tables)).text
        assert "Highest Recall@10, training domainsties" in text
        assert ("popularity scores higher: 0." in text) == is_named


def test_cells_that_did_not_finish_are_counted(reported_bench: BenchTables) -> None:
    cells = [
        {**reported_bench.cells[0], "status": "failed", "seconds": None, "why": "out of memory"},
        *reported_bench.cells[1:],
    ]
    found = parsed(bench_page(replace(reported_bench, cells=cells)))
    assert "1 did not finish" in found.text
    assert "14 of 15 cells finished" in found.text
    assert "why = out of memory" in found.text
    assert "lora.target_modules = query,value" in found.text
    assert len(found.of("details")) > len(cells)
