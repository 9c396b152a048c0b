"""Parts of a picture: scales, axes, texts, marks.

A picture is as wide as its place on the page. Horizontal positions are shares of the width between its margins, in per
cent; vertical positions and everything's size are in pixels, so that texts and symbols keep theirs at any width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedmerge.report.html.looks import NUM_SHAPES, Look
from fedmerge.report.html.page import Html, decimal, element, join

STRETCHED = 1000.0  # horizontal units of curves, which are stretched to the picture's width
_SHAPES = (  # of radius 5, closed
    "M-4.6 0a4.6 4.6 0 1 0 9.2 0a4.6 4.6 0 1 0-9.2 0z",
    "M-4.2-4.2h8.4v8.4h-8.4z",
    "M0-5.4L5.2 4H-5.2z",
    "M0-5.8L5.4 0L0 5.8L-5.4 0z",
    "M0 5.4L5.2-4H-5.2z",
    "M-5.4 0L4-5.2V5.2z",
    "M5.4 0L-4-5.2V5.2z",
    "M-1.9-5.3h3.8v3.4h3.4v3.8h-3.4v3.4h-3.8v-3.4h-3.4v-3.8h3.4z",
)
_DASHES = (None, "7 3", "2 2.5", "9 3 2 3", "4 2", "12 4", "1 3 6 3", "9 2 2 2 2 2")


@dataclass(frozen=True)
class Scale:
    """A linear map from data to coordinates; horizontally from 0 to 100 per cent."""

    low: float
    high: float
    start: float = 0.0
    stop: float = 100.0

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)


def scale_of(
    values: Sequence[float], start: float = 0.0, stop: float = 100.0, *, padded: bool = True, pad_low: bool = True
) -> Scale:
    """Return a scale that spans the values, by default with a margin of a twentieth at both ends."""
    low, high = min(values), max(values)
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-6):
        low, high = low - max(abs(low) * 0.05, 1e-3), high + max(abs(high) * 0.05, 1e-3)
    pad = 0.05 * (high - low) if padded else 0.0
    return Scale(low - (pad if pad_low else 0.0), high + pad, start, stop)


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


def tick_text(value: float, places: Sequence[float]) -> str:
    """Return a tick with just enough decimals to distinguish ticks; large numbers in thousands."""
    step = places[1] - places[0] if len(places) > 1 else abs(value) or 1.0
    num_digits = min(max(0, -math.floor(math.log10(step) + 1e-9)), 6)
    return decimal(value, num_digits).replace(",", "") if abs(value) < 10_000 else f"{value / 1000:g}k"


def figure(
    title: str,
    description: str,
    height: float,
    parts: Sequence[Html],
    below: Html | None = None,
    margins: tuple[float, float] = (8.0, 8.0),
) -> Html:
    """Return a picture with its title.

    Args:
        title: above it.
        description: for screen readers.
        height: in pixels.
        parts: of the picture.
        below: under it.
        margins: pixels at the left and at the right, in which texts may stand.
    """
    left, right = margins
    style = f"height:{height:g}px;margin-left:{left:g}px;width:calc(100% - {left + right:g}px)"
    picture = element("svg", *parts, style=style, role="img", aria_label=description)
    return element("figure", element("figcaption", title), picture, below)


def mark(look: Look, x: float, y: float, *, hollow: bool = False, title: str | None = None) -> Html:
    """Return the symbol of a look at a position."""
    return element("svg", _shape(look, hollow=hollow, title=title), x=f"{x:.2f}%", y=f"{y:.1f}", class_="at")


def symbol(look: Look, *, with_line: bool = False) -> Html:
    """Return the symbol for running text, optionally with its line's dashes; hidden from screen readers."""
    width = 28 if with_line else 14
    return element(
        "svg",
        curve(look, "M0 7H28") if with_line else None,
        _shape(look, transform=f"translate({width / 2:g} 7)"),
        viewBox=f"0 0 {width} 14",
        aria_hidden="true",
        class_="symbol wide" if with_line else "symbol",
    )


def _shape(look: Look, *, hollow: bool = False, title: str | None = None, transform: str | None = None) -> Html:
    style = "s open" if hollow else "f point"
    return element(
        "path",
        element("title", title) if title else None,
        class_=f"p{look.colour} {style}",
        transform=transform,
        d=shape_path(look),
    )


def shape_path(look: Look) -> str:
    """Return the path of a look's symbol, of radius 5 around 0 0."""
    return _SHAPES[look.shape % NUM_SHAPES]


def curve(look: Look, path: str, title: str | None = None) -> Html:
    """Return a line in the look's colour and dashes."""
    return element(
        "path",
        element("title", title) if title else None,
        class_=f"p{look.colour} s line",
        stroke_dasharray=_DASHES[look.shape % NUM_SHAPES],
        d=path,
    )


def stretched(height: float, *parts: Html) -> Html:
    """Return paths in units of ``STRETCHED`` by pixels, stretched to the picture's width; their strokes are not."""
    return element(
        "svg",
        *parts,
        viewBox=f"0 0 {STRETCHED:g} {height:g}",
        height=f"{height:g}",
        width="100%",
        preserveAspectRatio="none",
        class_="stretched",
    )


def line(x1: float, y1: float, x2: float, y2: float, style: str, shift: float = 0.0) -> Html:
    """Return a straight line, moved to the right by ``shift`` pixels."""
    return element(
        "line",
        x1=f"{x1:.2f}%",
        y1=f"{y1:.1f}",
        x2=f"{x2:.2f}%",
        y2=f"{y2:.1f}",
        class_=style,
        transform=f"translate({shift:g} 0)" if shift else None,
    )


def text(words: str, x: float, y: float, anchor: str, style: str | None = None, shift: float = 0.0) -> Html:
    """Return a text, moved to the right by ``shift`` pixels."""
    return element(
        "text",
        words,
        x=f"{x:.2f}%",
        y=f"{y:.1f}",
        dx=f"{shift:g}" if shift else None,
        text_anchor=anchor,
        class_=style,
    )


def tick_numbers(scale: Scale, y: float) -> Html:
    """Return the numbers under a horizontal axis."""
    places = ticks(scale.low, scale.high, 5)
    return join(*(text(tick_text(value, places), scale(value), y, "middle", "muted") for value in places))


def rungs(scale: Scale) -> Html:
    """Return the lines of a vertical axis across the picture, with their numbers in its left margin."""
    places = ticks(scale.low, scale.high, 5)
    return join(
        *(line(0, scale(value), 100, scale(value), "grid") for value in places),
        *(text(tick_text(value, places), 0, scale(value) + 4, "end", "muted", -6) for value in places),
    )


def left_margin(scale: Scale) -> float:
    """Return the room for the numbers of :func:`rungs`, in pixels."""
    places = ticks(scale.low, scale.high, 5)
    return 14.0 + 7.4 * max((len(tick_text(value, places)) for value in places), default=0)


def arrow(y: float, left: bool) -> Html:
    """Return an arrow that points at a value outside the picture."""
    path = "M8 0H-4m4 -4l-4 4l4 4" if left else "M-8 0H4m-4 -4l4 4l-4 4"
    return element(
        "svg", element("path", class_="arrow", d=path), x="0%" if left else "100%", y=f"{y:.1f}", class_="at"
    )


def shorten(words: str, most: int) -> str:
    """Return a text of at most ``most`` characters."""
    return words if len(words) <= most else words[: most - 1] + "…"
