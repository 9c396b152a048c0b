"""Figures."""

import doctest

import pytest
from page_parser import parsed

from fedmerge import escaping
from fedmerge.report import bench_tables, statistics
from fedmerge.report.html import charts, page
from fedmerge.report.html.charts import Dot, Line, Point, dot_chart, line_chart, scatter_chart


def test_figures_of_unusual_data() -> None:
    assert dot_chart("t", []) == scatter_chart("t", "x", "y", []) == line_chart("t", "x", []) == ""
    assert dot_chart("t", [Dot("a", 0, None)]) == ""
    same = parsed(dot_chart("t", [Dot("a", 0, 0.5), Dot("b", 1, 0.5)], reference=0.5))
    assert all("nan" not in str(attributes) for _, attributes in same.elements)
    far = [Dot("a", 0, 0.5, 0.49, 0.51), Dot("b", 1, 0.52), Dot("popularity", 2, -40.0, -41.0, -39.0, minor=True)]
    arrows = [attributes for attributes in parsed(dot_chart("t", far)).of("path") if attributes["class"] == "arrow"]
    assert len(arrows) == 1
    for attributes in parsed(scatter_chart("t", "x", "y", [Point("a", 8, 0.0, 0.0, 0.0, None)])).of("path"):
        assert "nan" not in str(attributes)
    long = [(float(x), 1.0, 1.0, 1.0) for x in range(1000)]
    (path,) = (a for a in parsed(line_chart("t", "x", [Line("a", 1, long)])).of("path") if "line" in str(a["class"]))
    assert str(path["d"]).count("L") < charts.MOST_POINTS
    assert charts.ticks(0.0, 0.0004)[-1] == pytest.approx(0.0004)


def test_every_series_of_a_page_has_its_own_symbol() -> None:
    symbols = [str(charts.symbol(number)) for number in range(35)]
    assert len(set(symbols)) == 35
    lines = [str(charts.symbol(number, with_line=True)) for number in range(28)]
    assert len(set(lines)) == 28


def test_examples_in_docstrings() -> None:
    for module in (page, charts, statistics, bench_tables, escaping):
        assert doctest.testmod(module).failed == 0
