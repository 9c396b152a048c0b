"""Small pictures as inline SVG: legible at the width of a phone, in both colour schemes, and never by colour alone.

A series keeps its colour, shape and dash pattern on the whole page. Colours are those of Okabe and Ito, which people
with any colour vision tell apart; the style sheet has them for light and for dark. Coordinates are units of a picture
320 wide.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fedmerge.report.html.page import ABSENT, Cell, Column, Html, decimal, element, is_number, join, note, table

WIDTH = 320.0
MOST_POINTS = 60  # in a line; with more, neighbours are averaged
_COLOURS, _ROW = 7, 34.0
_STRETCH = 6.0  # largest factor by which minor rows may lengthen an axis
_SHAPES = (  # of radius 5, closed
    "M-4.6 0a4.6 4.6 0 1 0 9.2 0a4.6 4.6 0 1 0-9.2 0z",
    "M-4.2-4.2h8.4v8.4h-8.4z",
    "M0-5.4L5.2 4H-5.2z",
    "M0-5.8L5.4 0L0 5.8L-5.4 0z",
    "M0 5.4L5.2-4H-5.2z",
)
_DASHES = (None, "7 3", "2 2.5", "9 3 2 3")


@dataclass(frozen=True)
class Dot:
    """A row of a dot chart: a value with its bounds.

    ``hollow`` is drawn as an outline; a ``minor`` row far from the others is an arrow, so that others keep their width.
    """

    label: str
    series: int
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
    series: int
    x: float
    y: float
    x_spread: float | None = None
    y_spread: float | None = None


@dataclass(frozen=True)
class Line:
    """A line: (x, y, low, high) from left to right."""

    label: str
    series: int
    points: Sequence[tuple[float, float, float, float]]


@dataclass(frozen=True)
class _Scale:
    """A linear map from data to coordinates."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return at most ``most`` round numbers from ``low`` to ``high``, in steps of 1, 2 or 5 times a power of ten.

    >>> ticks(0.0, 1.0), ticks(-3, 8)
    ([0.0, 0.5, 1.0], [0.0, 5.0])
    """
    exponent = math.floor(math.log10((high - low) / most))
    steps = [factor * 10.0 ** (exponent + shift) for shift in range(3) for factor in (1, 2, 5)]
    for step in steps:
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first + 1 <= most:
            return [round(number * step, 12) + 0.0 for number in range(first, last + 1)]
    return []


def mark(series: int, x: float, y: float, *, hollow: bool = False, title: str | None = None) -> Html:
    """Return the symbol of a series at a position."""
    style = "s open" if hollow else "f point"
    return element(
        "path",
        element("title", title) if title else None,
        class_=f"p{series % _COLOURS} {style}",
        transform=f"translate({x:.1f} {y:.1f})",
        d=_SHAPES[series % len(_SHAPES)],
    )


def symbol(series: int, *, with_line: bool = False) -> Html:
    """Return the symbol for running text, optionally with its line's dashes; hidden from screen readers."""
    width = 28 if with_line else 14
    stroke = _stroke(series, "M0 7H28") if with_line else None
    return element(
        "svg",
        stroke,
        mark(series, width / 2, 7),
        viewBox=f"0 0 {width} 14",
        aria_hidden="true",
        class_="symbol wide" if with_line else "symbol",
    )


def legend(series: Mapping[str, int], *, with_line: bool = False) -> Html:
    """Return every label with its symbol."""
    entries = [element("li", symbol(number, with_line=with_line), label) for label, number in series.items()]
    return element("ul", *entries, class_="legend")


def dot_chart(title: str, dots: Sequence[Dot], *, reference: float | None = None, num_digits: int = 3) -> Html:
    """Return a chart with one value and its bounds per row, on a common axis; empty without a value.

    Args:
        title: of the figure.
        dots: rows from the top.
        reference: a dashed line, for a baseline or zero.
        num_digits: decimals of the values in the text for screen readers.
    """
    if not any(_numbers(dot) for dot in dots):
        return Html("")
    scale = _scale(_close_together(dots, [] if reference is None else [reference]), 8.0, WIDTH - 8)
    bottom = _ROW * len(dots) + 4
    parts = [_vertical_axis_lines(scale, 4.0, bottom)]
    if reference is not None:
        parts.append(_line(scale(reference), 2.0, scale(reference), bottom, "reference"))
    for number, dot in enumerate(dots):
        y = _ROW * number + 26
        parts.append(_text(_short(dot.label, 26), 2.0, y - 11, "start", "over"))
        parts.append(_text(dot.shown, WIDTH - 2, y - 11, "end", "over muted"))
        if dot.value is not None and not scale.low <= dot.value <= scale.high:
            parts.append(_arrow(y, dot.value < scale.low))
        elif dot.value is not None:
            if dot.low is not None and dot.high is not None:
                parts.append(_line(scale(max(dot.low, scale.low)), y, scale(min(dot.high, scale.high)), y, "stem"))
            text = f"{dot.label}: {dot.shown or decimal(dot.value, num_digits)}"
            parts.append(mark(dot.series, scale(dot.value), y, hollow=dot.hollow, title=text))
    description = "; ".join(f"{dot.label} {dot.shown or decimal(dot.value, num_digits)}" for dot in dots)
    return _figure(title, f"{title}. {description}", bottom + 20, parts)


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
    up = _scale(ys, bottom, top)
    left = _left_margin(up)
    across = _scale([*xs, *([0.0] if x_from_zero else [])], left, WIDTH - 12, pad_low=not x_from_zero)
    parts = [_horizontal_axis_lines(up, left, WIDTH - 4)]
    places = ticks(across.low, across.high, 4 if x_text else 5)
    for value in places:
        parts.append(_line(across(value), bottom, across(value), bottom + 4, "axis"))
        text = x_text(value).replace(".0 ", " ") if x_text else _tick_text(value, places)
        parts.append(_text(text, across(value), bottom + 17, "middle", "muted"))
    parts.append(_line(left, bottom, WIDTH - 4, bottom, "axis"))
    parts.append(_text(f"↑ {y_title}", 2.0, 12.0, "start", "muted"))
    parts.append(_text(f"{x_title} →", WIDTH - 4, bottom + 35, "end", "muted"))
    for point in points:
        x, y = across(point.x), up(point.y)
        if point.x_spread:
            parts.append(_line(across(point.x - point.x_spread), y, across(point.x + point.x_spread), y, "stem"))
        if point.y_spread:
            parts.append(_line(x, up(point.y - point.y_spread), x, up(point.y + point.y_spread), "stem"))
    for point in points:
        shown = x_text(point.x) if x_text else decimal(point.x)
        text = f"{point.label}: {x_title} {shown}, {y_title} {decimal(point.y)}"
        parts.append(mark(point.series, across(point.x), up(point.y), title=text))
    description = "; ".join(
        f"{point.label} {x_text(point.x) if x_text else decimal(point.x)}, {decimal(point.y)}" for point in points
    )
    return _figure(title, f"{title}: {x_title}, {y_title}. {description}", bottom + 40, parts)


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
    lines = [Line(line.label, line.series, _thinned(line.points)) for line in lines if line.points]
    if not lines:
        return Html("")
    top, bottom = 8.0, 160.0
    up = _scale([value for line in lines for _, *values in line.points for value in values], bottom, top)
    left = _left_margin(up)
    across = _scale([x for line in lines for x, *_ in line.points], left, WIDTH - 10, padded=False)
    parts = [_horizontal_axis_lines(up, left, WIDTH - 4)]
    round_places = ticks(across.low, across.high, 5)
    for value, text in (x_places or {value: _tick_text(value, round_places) for value in round_places}).items():
        parts.append(_line(across(value), bottom, across(value), bottom + 4, "axis"))
        parts.append(_text(text, across(value), bottom + 17, "middle", "muted"))
    parts.append(_line(left, bottom, WIDTH - 4, bottom, "axis"))
    parts.append(_text(f"{x_title} →", WIDTH - 4, bottom + 34, "end", "muted"))
    for line in lines:
        upper = [f"{across(x):.1f} {up(high):.1f}" for x, _, _, high in line.points]
        lower = [f"{across(x):.1f} {up(low):.1f}" for x, _, low, _ in reversed(line.points)]
        if any(high > low for _, _, low, high in line.points):
            band = "M" + "L".join([*upper, *lower]) + "z"
            parts.append(element("path", class_=f"p{line.series % _COLOURS} f band", d=band))
    for line in lines:
        path = "M" + "L".join(f"{across(x):.1f} {up(y):.1f}" for x, y, _, _ in line.points)
        parts.append(_stroke(line.series, path, line.label))
        x, y, *_ = line.points[-1]
        where = (x_places or {}).get(x, f"{x:g}")
        parts.append(mark(line.series, across(x), up(y), title=f"{line.label}: {decimal(y)} at {where}"))
    description = "; ".join(f"{line.label} ends at {decimal(line.points[-1][1])}" for line in lines)
    below = legend({line.label: line.series for line in lines if line.label}, with_line=True) if with_legend else None
    return _figure(title, f"{title} over {x_title}. {description}", bottom + 40, parts, below)


def rank_chart(title: str, ranks: Sequence[tuple[str, int, float]], critical_difference: float) -> Html:
    """Return mean ranks, best first; a bar at the side joins ranks that differ by less than the critical difference.

    Args:
        title: of the figure.
        ranks: (label, series, mean rank), sorted.
        critical_difference: in ranks.
    """
    groups = cliques([rank for _, _, rank in ranks], critical_difference)
    stop = WIDTH - 14 - 9 * len(groups)
    scale = _Scale(1.0, max(float(len(ranks)), 2.0), 8.0, stop)
    top = 34.0
    bottom = top + _ROW * len(ranks) + 4
    reach = min(scale(1 + critical_difference), stop)
    parts = [
        _text(f"critical difference {decimal(critical_difference, 2)}", 8.0, 11.0, "start", "muted"),
        _line(8.0, 21.0, reach, 21.0, "stem"),
        *(_line(x, 17.0, x, 25.0, "stem") for x in (8.0, reach)),
    ]
    for value in range(1, len(ranks) + 1):
        parts.append(_line(scale(value), top, scale(value), bottom, "grid"))
        if len(ranks) <= 12 or value % 2:
            parts.append(_text(str(value), scale(value), bottom + 14, "middle", "muted"))
    for number, (label, series, rank) in enumerate(ranks):
        y = top + _ROW * number + 26
        parts.append(_text(_short(f"{label}  {decimal(rank, 2)}", 34), 2.0, y - 11, "start", "over"))
        parts.append(mark(series, scale(rank), y, title=f"{label}: mean rank {decimal(rank, 2)}"))
    for number, (first, last) in enumerate(groups):
        x = stop + 14 + 9 * number
        parts.append(_line(x, top + _ROW * first + 10, x, top + _ROW * last + 28, "bar"))
    names = [label for label, _, _ in ranks]
    joined = "; ".join(", ".join(names[first : last + 1]) for first, last in groups) or "none"
    description = "; ".join(f"{label} {decimal(rank, 2)}" for label, _, rank in ranks)
    return _figure(title, f"{title}. Mean ranks: {description}. Not told apart: {joined}", bottom + 20, parts)


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
    """Return scatter charts with one legend and a caption; None without a point."""
    if not points:
        return None
    entries = legend({point.label: point.series for point in points})
    return grid(*pictures, element("div", entries, note(caption), class_="side"))


def _figure(title: str, description: str, height: float, parts: Sequence[Html], below: Html | None = None) -> Html:
    picture = element("svg", *parts, viewBox=f"0 0 {WIDTH:g} {height:g}", role="img", aria_label=description)
    return element("figure", element("figcaption", title), picture, below)


def _scale(values: Sequence[float], start: float, stop: float, *, padded: bool = True, pad_low: bool = True) -> _Scale:
    low, high = min(values), max(values)
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-6):
        low, high = low - max(abs(low) * 0.05, 1e-3), high + max(abs(high) * 0.05, 1e-3)
    pad = 0.05 * (high - low) if padded else 0.0
    return _Scale(low - (pad if pad_low else 0.0), high + pad, start, stop)


def _vertical_axis_lines(scale: _Scale, top: float, bottom: float) -> Html:
    places = ticks(scale.low, scale.high, 5)
    return join(
        *(_line(scale(value), top, scale(value), bottom, "grid") for value in places),
        *(_text(_tick_text(value, places), scale(value), bottom + 14, "middle", "muted") for value in places),
    )


def _horizontal_axis_lines(scale: _Scale, left: float, right: float) -> Html:
    places = ticks(scale.low, scale.high, 5)
    return join(
        *(_line(left, scale(value), right, scale(value), "grid") for value in places),
        *(_text(_tick_text(value, places), left - 6, scale(value) + 4, "end", "muted") for value in places),
    )


def _left_margin(scale: _Scale) -> float:
    """Return the room for the numbers beside a vertical axis."""
    places = ticks(scale.low, scale.high, 5)
    return 14.0 + 7.4 * max((len(_tick_text(value, places)) for value in places), default=0)


def _tick_text(value: float, places: Sequence[float]) -> str:
    """Return a tick with just enough decimals to distinguish ticks; large numbers in thousands."""
    step = places[1] - places[0] if len(places) > 1 else abs(value) or 1.0
    num_digits = min(max(0, -math.floor(math.log10(step) + 1e-9)), 6)
    return decimal(value, num_digits).replace(",", "") if abs(value) < 10_000 else f"{value / 1000:g}k"


def _thinned(points: Sequence[tuple[float, float, float, float]]) -> list[tuple[float, float, float, float]]:
    size = math.ceil(len(points) / MOST_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [
        tuple(math.fsum(point[part] for point in group) / len(group) for part in range(4))  # type: ignore[misc]  # 4
        for group in groups
    ]


def _stroke(series: int, path: str, title: str | None = None) -> Html:
    return element(
        "path",
        element("title", title) if title else None,
        class_=f"p{series % _COLOURS} s line",
        stroke_dasharray=_DASHES[series % len(_DASHES)],
        d=path,
    )


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> Html:
    return element("line", x1=f"{x1:.1f}", y1=f"{y1:.1f}", x2=f"{x2:.1f}", y2=f"{y2:.1f}", class_=style)


def _arrow(y: float, left: bool) -> Html:
    """Return an arrow that points at a value outside the picture."""
    path = f"M14 {y:.1f}H2m4 -4l-4 4l4 4" if left else f"M{WIDTH - 14:g} {y:.1f}h12m-4 -4l4 4l-4 4"
    return element("path", class_="arrow", d=path)


def _text(text: str, x: float, y: float, anchor: str, style: str | None = None) -> Html:
    return element("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor, class_=style)


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
