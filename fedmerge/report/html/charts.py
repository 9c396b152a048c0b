"""Figures: legible at the width of a phone and of a screen, in both colour schemes, and never by colour alone.

A series keeps its colour, shape and dash pattern on every page, see :mod:`fedmerge.report.html.looks`. Lines keep off
the texts: what crosses rows is drawn beside the marks only.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fedmerge.report.html import svg
from fedmerge.report.html.looks import Look
from fedmerge.report.html.page import ABSENT, Cell, Column, Html, decimal, element, is_number, join, note, table

MOST_POINTS = 60  # in a line; with more, neighbours are averaged
_ROW = 34.0  # pixels: a text, and below it the mark
_MARK, _TEXT = 26.0, 15.0  # from the top of a row: the middle of its mark, the baseline of its text
_STRETCH = 6.0  # largest factor by which minor rows may lengthen an axis


@dataclass(frozen=True)
class Dot:
    """A row of a dot chart: a value with its bounds.

    ``hollow`` is drawn as an outline; a ``minor`` row far from the others is an arrow, so that others keep their width.
    """

    label: str
    look: Look
    value: float | None
    low: float | None = None
    high: float | None = None
    hollow: bool = False
    shown: str = ""
    minor: bool = False


@dataclass(frozen=True)
class Point:
    """A point of a scatter chart with its half-widths."""

    label: str
    look: Look
    x: float
    y: float
    x_spread: float | None = None
    y_spread: float | None = None


@dataclass(frozen=True)
class Line:
    """A line: (x, y, low, high) from left to right."""

    label: str
    look: Look
    points: Sequence[tuple[float, float, float, float]]


def legend(looks: Mapping[str, Look], *, with_line: bool = False) -> Html:
    """Return every label with its symbol."""
    entries = [element("li", svg.symbol(look, with_line=with_line), label) for label, look in looks.items()]
    return element("ul", *entries, class_="legend")


def dot_chart(title: str, dots: Sequence[Dot], *, reference: float | None = None, num_digits: int = 3) -> Html:
    """Return a chart with one value and its bounds per row, on a common axis; empty without a value.

    Args:
        title: of the figure.
        dots: rows from the top.
        reference: a line, for a baseline or zero.
        num_digits: decimals of the values in the text for screen readers.
    """
    if not any(_numbers(dot) for dot in dots):
        return Html("")
    scale = svg.scale_of(_close_together(dots, [] if reference is None else [reference]))
    bottom = _ROW * len(dots) + 4
    places = [(scale(value), "grid") for value in svg.ticks(scale.low, scale.high, 5)]
    places += [] if reference is None else [(scale(reference), "reference")]
    parts = [svg.tick_numbers(scale, bottom + 14)]
    for number, dot in enumerate(dots):
        top = _ROW * number
        parts += [_beside_mark(x, top, style) for x, style in places]
        parts.append(svg.text(svg.shorten(dot.label, 26), 0, top + _TEXT, "start", shift=-6))
        parts.append(svg.text(dot.shown, 100, top + _TEXT, "end", "muted", 6))
        y = top + _MARK
        if dot.value is not None and not scale.low <= dot.value <= scale.high:
            parts.append(svg.arrow(y, dot.value < scale.low))
        elif dot.value is not None:
            if dot.low is not None and dot.high is not None:
                low, high = max(dot.low, scale.low), min(dot.high, scale.high)
                parts.append(svg.line(scale(low), y, scale(high), y, "stem"))
            shown = f"{dot.label}: {dot.shown or decimal(dot.value, num_digits)}"
            parts.append(svg.mark(dot.look, scale(dot.value), y, hollow=dot.hollow, title=shown))
    description = "; ".join(f"{dot.label} {dot.shown or decimal(dot.value, num_digits)}" for dot in dots)
    return svg.figure(title, f"{title}. {description}", bottom + 20, parts)


def _beside_mark(x: float, top: float, style: str) -> Html:
    """Return the piece of a vertical line that lies beside a row's mark, below its text."""
    return svg.line(x, top + _MARK - 6, x, top + _MARK + 8, style)


def _numbers(dot: Dot) -> list[float]:
    return [number for number in (dot.value, dot.low, dot.high) if number is not None]


def _close_together(dots: Sequence[Dot], more: Sequence[float]) -> list[float]:
    """Return the values that the axis must span: all but minor rows that would lengthen it beyond ``_STRETCH``."""
    held = [number for dot in dots if not dot.minor for number in _numbers(dot)] or [
        number for dot in dots for number in _numbers(dot)
    ]
    held += more
    most = _STRETCH * max(max(held) - min(held), 0.1 * max(map(abs, held)))
    for dot in sorted((dot for dot in dots if dot.minor and dot.value is not None), key=lambda dot: -(dot.value or 0)):
        together = [*held, *_numbers(dot)]
        if max(together) - min(together) <= most:
            held = together
    return held


def scatter_chart(
    title: str,
    x_title: str,
    y_title: str,
    points: Sequence[Point],
    *,
    x_text: Callable[[float], str] | None = None,
    x_from_zero: bool = False,
) -> Html:
    """Return a chart of two numbers of every series with their spread; empty without a point."""
    if not points:
        return Html("")
    top, bottom = 26.0, 226.0
    xs = [x for point in points for x in (point.x - (point.x_spread or 0), point.x + (point.x_spread or 0))]
    ys = [y for point in points for y in (point.y - (point.y_spread or 0), point.y + (point.y_spread or 0))]
    up = svg.scale_of(ys, bottom, top)
    left = svg.left_margin(up)
    across = svg.scale_of([*xs, *([0.0] if x_from_zero else [])], pad_low=not x_from_zero)
    parts = [svg.rungs(up)]
    places = svg.ticks(across.low, across.high, 4 if x_text else 5)
    for value in places:
        words = x_text(value).replace(".0 ", " ") if x_text else svg.tick_text(value, places)
        parts += _tick(across(value), bottom, words)
    parts.append(svg.line(0, bottom, 100, bottom, "axis"))
    parts.append(svg.text(f"↑ {y_title}", 0, 12.0, "start", "muted", 2 - left))
    parts.append(svg.text(f"{x_title} →", 100, bottom + 35, "end", "muted"))
    for point in points:
        x, y = across(point.x), up(point.y)
        if point.x_spread:
            parts.append(svg.line(across(point.x - point.x_spread), y, across(point.x + point.x_spread), y, "stem"))
        if point.y_spread:
            parts.append(svg.line(x, up(point.y - point.y_spread), x, up(point.y + point.y_spread), "stem"))
    described = []
    for point in points:
        shown = x_text(point.x) if x_text else decimal(point.x)
        words = f"{point.label}: {x_title} {shown}, {y_title} {decimal(point.y)}"
        parts.append(svg.mark(point.look, across(point.x), up(point.y), title=words))
        described.append(f"{point.label} {shown}, {decimal(point.y)}")
    description = f"{title}: {x_title}, {y_title}. {'; '.join(described)}"
    return svg.figure(title, description, bottom + 40, parts, margins=(left, 12.0))


def _tick(x: float, bottom: float, words: str) -> list[Html]:
    return [svg.line(x, bottom, x, bottom + 4, "axis"), svg.text(words, x, bottom + 17, "middle", "muted")]


def line_chart(
    title: str,
    x_title: str,
    lines: Sequence[Line],
    *,
    with_legend: bool = False,
    x_places: Mapping[float, str] | None = None,
) -> Html:
    """Return values over steps, each line with the band between its bounds; empty without a line.

    Args:
        title: caption.
        x_title: name of the horizontal axis.
        lines: the lines.
        with_legend: add a legend below.
        x_places: positions on the horizontal axis with their texts; None: round numbers.
    """
    lines = [Line(line.label, line.look, _thinned(line.points)) for line in lines if line.points]
    if not lines:
        return Html("")
    top, bottom = 8.0, 160.0
    up = svg.scale_of([value for line in lines for _, *values in line.points for value in values], bottom, top)
    left = svg.left_margin(up)
    across = svg.scale_of([x for line in lines for x, *_ in line.points], padded=False)
    parts = [svg.rungs(up)]
    round_places = svg.ticks(across.low, across.high, 5)
    for value, words in (x_places or {value: svg.tick_text(value, round_places) for value in round_places}).items():
        parts += _tick(across(value), bottom, words)
    parts.append(svg.line(0, bottom, 100, bottom, "axis"))
    parts.append(svg.text(f"{x_title} →", 100, bottom + 34, "end", "muted"))
    bands, curves, ends = [], [], []

    def at(x: float, y: float) -> str:
        return f"{across(x) * svg.STRETCHED / 100:.1f} {up(y):.1f}"

    for line in lines:
        upper = [at(x, high) for x, _, _, high in line.points]
        lower = [at(x, low) for x, _, low, _ in reversed(line.points)]
        if any(high > low for _, _, low, high in line.points):
            path = "M" + "L".join([*upper, *lower]) + "z"
            bands.append(element("path", class_=f"p{line.look.colour} f band", d=path))
        curves.append(svg.curve(line.look, "M" + "L".join(at(x, y) for x, y, _, _ in line.points), line.label))
        x, y, *_ = line.points[-1]
        where = (x_places or {}).get(x, f"{x:g}")
        ends.append(svg.mark(line.look, across(x), up(y), title=f"{line.label}: {decimal(y)} at {where}"))
    parts += [svg.stretched(bottom, *bands, *curves), *ends]
    description = "; ".join(f"{line.label} ends at {decimal(line.points[-1][1])}" for line in lines)
    below = legend({line.label: line.look for line in lines if line.label}, with_line=True) if with_legend else None
    return svg.figure(title, f"{title} over {x_title}. {description}", bottom + 40, parts, below, (left, 10.0))


def rank_chart(title: str, ranks: Sequence[tuple[str, Look, float]], critical_difference: float) -> Html:
    """Return mean ranks, best first; a bar at the side joins ranks that differ by less than the critical difference.

    Args:
        title: of the figure.
        ranks: (label, look, mean rank), sorted.
        critical_difference: in ranks.
    """
    groups = cliques([rank for _, _, rank in ranks], critical_difference)
    scale = svg.Scale(1.0, max(float(len(ranks)), 2.0))
    head = 30.0
    bottom = head + _ROW * len(ranks) + 4
    reach = min(scale(1 + critical_difference), 100.0)
    parts = [
        svg.text(f"critical difference {decimal(critical_difference, 2)}", 0, 12.0, "start", "muted"),
        svg.line(0, 21.0, reach, 21.0, "stem"),
        *(svg.line(x, 17.0, x, 25.0, "stem") for x in (0.0, reach)),
    ]
    numbers = range(1, len(ranks) + 1)
    for value in numbers:
        if len(ranks) <= 12 or value % 2:
            parts.append(svg.text(str(value), scale(value), bottom + 14, "middle", "muted"))
    for number, (label, look, rank) in enumerate(ranks):
        top = head + _ROW * number
        parts += [_beside_mark(scale(value), top, "grid") for value in numbers]
        parts.append(svg.text(svg.shorten(f"{label}  {decimal(rank, 2)}", 34), 0, top + _TEXT, "start", shift=-6))
        parts.append(svg.mark(look, scale(rank), top + _MARK, title=f"{label}: mean rank {decimal(rank, 2)}"))
    for number, (first, last) in enumerate(groups):
        ends = (head + _ROW * first + 10, head + _ROW * last + 28)
        parts.append(svg.line(100, ends[0], 100, ends[1], "bar", 14 + 9 * number))
    names = [label for label, _, _ in ranks]
    joined = "; ".join(", ".join(names[first : last + 1]) for first, last in groups) or "none"
    description = "; ".join(f"{label} {decimal(rank, 2)}" for label, _, rank in ranks)
    told = f"{title}. Mean ranks: {description}. Not told apart: {joined}"
    return svg.figure(title, told, bottom + 20, parts, margins=(8.0, 14.0 + 9 * len(groups)))


def cliques(ranks: Sequence[float], critical_difference: float) -> list[tuple[int, int]]:
    """Return the largest runs (first, last) of two or more sorted ranks within the critical difference.

    >>> cliques([1.0, 1.5, 2.2, 4.0], 1.0)
    [(0, 1), (1, 2)]
    """
    found: list[tuple[int, int]] = []
    for first, rank in enumerate(ranks):
        last = max(place for place, other in enumerate(ranks) if other - rank < critical_difference)
        if last > first and (not found or last > found[-1][1]):
            found.append((first, last))
    return found


def heat_table(
    key: str, caption: str, rows: Sequence[str], columns: Sequence[str], values: Mapping[tuple[str, str], float]
) -> Html:
    """Return a table of numbers on a ground that darkens with size, blue if positive and orange if negative.

    Args:
        key, caption: of the table.
        rows, columns: names, in order.
        values: (row, column) -> number; others are absent.
    """
    largest = max([abs(value) for value in values.values() if is_number(value)], default=0.0) or 1.0

    def cell(row: str, column: str) -> Cell:
        value = values.get((row, column))
        if value is None or not math.isfinite(value):
            return Cell(ABSENT)
        share, colour = round(100 * abs(value) / largest), "positive" if value >= 0 else "negative"
        ground = f"background:color-mix(in oklab,var(--heat-{colour}) {share}%,var(--paper))"
        return Cell(decimal(value, 2), value, style=ground)

    body = [[Cell(row), *(cell(row, column) for column in columns)] for row in rows]
    heads = [Column("Domain", numeric=False), *(Column(column) for column in columns)]
    return element("div", table(key, caption, heads, body, sortable=False), class_="heat")


def grid(*pictures: Html) -> Html:
    """Return pictures side by side if there is room; four are two pairs, not three and one."""
    return element("div", *pictures, class_="charts pairs" if len(pictures) == 4 else "charts")


def with_legend(pictures: Sequence[Html], points: Sequence[Point], caption: str) -> Html | None:
    """Return scatter charts over one legend and a caption; None without a point."""
    if not points:
        return None
    return join(grid(*pictures), legend({point.label: point.look for point in points}), note(caption))


def _thinned(points: Sequence[tuple[float, float, float, float]]) -> list[tuple[float, float, float, float]]:
    size = math.ceil(len(points) / MOST_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [
        tuple(math.fsum(point[part] for point in group) / len(group) for part in range(4))  # type: ignore[misc]  # 4
        for group in groups
    ]
