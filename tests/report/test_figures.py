"""Figures, and the look of a method."""

import doctest
import re
from importlib.resources import files
from typing import get_args

import pytest
from report_folders import parsed

from fedmerge import escaping
from fedmerge.client.baselines.rankers import BASELINE_LABELS
from fedmerge.config import HeadVectors, MergeMethod, RoundRule
from fedmerge.evaluation.sums import (
    BACKBONE,
    EXPERT,
    FEDERATED_FUSED,
    FEDERATED_HEAD,
    LAST_ITEM,
    PERSONAL,
    RECENT_ITEMS,
    WOVEN,
    fused_label,
    head_label,
)
from fedmerge.report import bench_tables, statistics
from fedmerge.report.html import charts, looks, page, svg
from fedmerge.report.html.charts import Dot, Line, Point, dot_chart, line_chart, scatter_chart
from fedmerge.report.html.looks import NUM_COLOURS, NUM_SHAPES, Look, assign_looks, in_order
from fedmerge.server.choice import SERVED

A, B, C = Look(0, 0), Look(1, 0), Look(2, 1)
SYMBOL_CONTRAST = 3.0  # of parts of pictures against their ground, WCAG 2.2 AA (1.4.11)


def test_figures_of_unusual_data() -> None:
    assert dot_chart("t", []) == scatter_chart("t", "x", "y", []) == line_chart("t", "x", []) == ""
    assert dot_chart("t", [Dot("a", A, None)]) == ""
    same = parsed(dot_chart("t", [Dot("a", A, 0.5), Dot("b", B, 0.5)], reference=0.5))
    assert all("nan" not in str(attributes) for _, attributes in same.elements)
    far = [Dot("a", A, 0.5, 0.49, 0.51), Dot("b", B, 0.52), Dot("popularity", C, -40.0, -41.0, -39.0, minor=True)]
    arrows = [attributes for attributes in parsed(dot_chart("t", far)).of("path") if attributes["class"] == "arrow"]
    assert len(arrows) == 1
    for attributes in parsed(scatter_chart("t", "x", "y", [Point("a", A, 0.0, 0.0, 0.0, None)])).of("path"):
        assert "nan" not in str(attributes)
    long = [(float(x), 1.0, 1.0, 1.0) for x in range(1000)]
    (path,) = (a for a in parsed(line_chart("t", "x", [Line("a", B, long)])).of("path") if "line" in str(a["class"]))
    assert str(path["d"]).count("L") < charts.MOST_POINTS
    assert svg.ticks(0.0, 0.0004)[-1] == pytest.approx(0.0004)


# The look of a method


def test_every_method_of_fedmerge_has_a_look_of_its_own_in_the_table() -> None:
    heads = [label(vectors) for vectors in get_args(HeadVectors) for label in (head_label, fused_label)]
    rows = [
        BACKBONE,
        EXPERT,
        PERSONAL,
        WOVEN,
        "weave",
        FEDERATED_HEAD,
        FEDERATED_FUSED,
        LAST_ITEM,
        RECENT_ITEMS,
        SERVED,
        *heads,
    ]
    names = [*get_args(MergeMethod), *get_args(RoundRule), *BASELINE_LABELS.values()]
    listed = [name for of_colour in looks.METHODS.values() for name in of_colour]
    assert {*rows, *names} <= {*listed}
    assert len({*listed}) == len(listed)
    assert all(len(of_colour) <= NUM_SHAPES for of_colour in looks.METHODS.values())
    assert set(looks.METHODS) == set(range(NUM_COLOURS))
    found = assign_looks(listed)
    assert len({*found.values()}) == len(listed)
    first = [found[of_colour[0]] for of_colour in looks.METHODS.values()]
    assert len({look.shape for look in first}) == NUM_COLOURS  # the most frequent ones also differ without colours


def test_a_method_looks_the_same_on_every_page() -> None:
    one = assign_looks(["backbone", "average", "task-arithmetic 0.5", "mergerec domain-wise", "my.module:merge"])
    other = assign_looks(["popularity", "my.module:merge", "task-arithmetic 0.5", "average", "ties"])
    for name in {*one} & {*other}:
        assert one[name] == other[name], name
    assert list(one) == ["backbone", "average", "task-arithmetic 0.5", "mergerec domain-wise", "my.module:merge"]


def test_variants_of_a_method_share_its_colour_and_differ_in_shape() -> None:
    names = [f"task-arithmetic {coefficient}" for coefficient in (0.2, 0.4, 0.6)]
    found = assign_looks(["task-arithmetic", *names])
    assert {look.colour for look in found.values()} == {assign_looks(["task-arithmetic"])["task-arithmetic"].colour}
    assert len({look.shape for look in found.values()}) == 4
    assert assign_looks(["dare-ties 0.3"])["dare-ties 0.3"] == assign_looks(["dare-ties"])["dare-ties"]
    assert assign_looks(["tiespotting"])["tiespotting"] != assign_looks(["ties"])["ties"]  # not a variant of it
    many = assign_looks([f"average {number}" for number in range(2 * NUM_SHAPES)])
    assert len({look.colour for look in many.values()}) == 1  # shapes repeat, the colour does not change


def test_other_names_take_looks_in_their_order() -> None:
    found = in_order(f"domain {number}" for number in range(40))
    assert len({*found.values()}) == 40
    assert found == in_order(found)


def luminance(colour: str) -> float:
    """The relative luminance of WCAG 2.2."""
    channels = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(left: str, right: str) -> float:
    lower, higher = sorted((luminance(left), luminance(right)))
    return (higher + 0.05) / (lower + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_of_the_style_sheet_have_enough_contrast(scheme: int) -> None:
    css = files("fedmerge.report.html").joinpath("page.css").read_text(encoding="utf-8")
    blocks = re.findall(r":root \{(.*?)\}", css, flags=re.DOTALL)
    colours: dict[str, str] = {}
    for block in blocks[: scheme + 1]:  # dark replaces light
        colours |= dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    for ground in ("ground", "paper", "faint"):  # a row under the pointer is faint
        for ink in ("ink", "muted", "accent", "better", "worse"):
            assert contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)
    assert contrast(colours["warn-ink"], colours["warn-ground"]) >= 4.5
    for number in range(NUM_COLOURS):
        assert contrast(colours[f"c{number}"], colours["paper"]) >= SYMBOL_CONTRAST, number
    assert len({colours[f"c{number}"] for number in range(NUM_COLOURS)}) == NUM_COLOURS


def test_every_look_has_its_own_symbol_and_line() -> None:
    every = [Look(colour, shape) for colour in range(NUM_COLOURS) for shape in range(NUM_SHAPES)]
    assert len({svg.symbol(look) for look in every}) == len(every)
    dashes = {re.search(r'stroke-dasharray="([^"]*)"|$', svg.symbol(look, with_line=True)).group() for look in every}  # type: ignore[union-attr]  # matches
    assert len(dashes) == NUM_SHAPES


def test_examples_in_docstrings() -> None:
    for module in (page, charts, looks, svg, statistics, bench_tables, escaping):
        assert doctest.testmod(module).failed == 0
