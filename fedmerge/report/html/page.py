"""One self-contained HTML page: elements that escape their content, tables that sort, and the frame around them.

The page asks the network for nothing, and its Content-Security-Policy would not let it. The same input gives the same
bytes: no time, no random identifiers.
"""

import base64
import hashlib
import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files

from fedmerge.config import flatten
from fedmerge.escaping import printable

ABSENT = "–"


class Html(str):
    """Text that is markup; any other text is escaped when it enters an element."""

    __slots__ = ()


def element(tag: str, *children: str | None, **attributes: str | int | float | bool | None) -> Html:
    """Return ``<tag attributes>children</tag>``.

    Args:
        tag: its name.
        children: escaped unless they are :class:`Html`; None is left out.
        attributes: escaped; ``class_`` is ``class`` and ``aria_sort`` is ``aria-sort``; True is given without a value,
            None and False not at all.

    >>> element("p", "a < b", element("b", "!"), class_="x")
    '<p class="x">a &lt; b<b>!</b></p>'
    """
    given = "".join(
        f" {name.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{_escape(str(value))}"')
        for name, value in attributes.items()
        if value is not None and value is not False
    )
    return Html(f"<{tag}{given}>{join(*children)}</{tag}>")


def join(*children: str | None) -> Html:
    """Return the children one after another, escaped unless they are markup."""
    return Html("".join(child if isinstance(child, Html) else _escape(child) for child in children if child))


def _escape(text: str) -> str:
    return html.escape(printable(text))


# Numbers


def is_number(value: float | None) -> bool:
    """Return True if the value is a finite number."""
    return value is not None and math.isfinite(value)


def decimal(value: float | None, num_digits: int = 4, sign: bool = False) -> str:
    """Return ``0.0573``, with a true minus sign; a dash for None, NaN and infinities.

    >>> decimal(-0.00004), decimal(None), decimal(-1.5, 1, sign=True)
    ('0.0000', '–', '−1.5')
    """
    if value is None or not math.isfinite(value):
        return ABSENT
    rounded = round(value, num_digits) + 0.0  # no "-0.0000"
    return f"{rounded:{'+' if sign else ''},.{num_digits}f}".replace("-", "−")


def size(value: float | None) -> str:
    """Return bytes in the decimal unit that leaves one to three digits before the point.

    >>> size(0), size(1234), size(56_700_000)
    ('0 B', '1.2 kB', '56.7 MB')
    """
    if value is None or not math.isfinite(value):
        return ABSENT
    units = ("B", "kB", "MB", "GB", "TB")
    power = next((power for power in range(len(units)) if abs(value) < 999.5 * 1000**power), len(units) - 1)
    return f"{value / 1000**power:,.{1 if power else 0}f} {units[power]}"


def seconds(value: float | None) -> str:
    """Return ``4.2 s`` or ``310 s``."""
    return ABSENT if value is None or not math.isfinite(value) else f"{value:,.{1 if value < 99.95 else 0}f} s"


# Tables


@dataclass(frozen=True)
class Column:
    """A column: its title, and if it holds numbers, which are aligned right and sort from the largest."""

    title: str
    numeric: bool = True


@dataclass(frozen=True)
class Cell:
    """A cell: its text, its sort key (None sorts last), ``best`` for bold, and ``style`` as CSS."""

    shown: str
    sort: float | str | None = None
    best: bool = False
    style: str | None = None


def number_cell(value: float | None, shown: str, best: bool = False) -> Cell:
    """Return a cell that sorts by its number, or last without one."""
    return Cell(shown, value if is_number(value) else None, best)


def table(
    key: str,
    caption: str,
    columns: Sequence[Column],
    rows: Sequence[Sequence[Cell]],
    *,
    sortable: bool = True,
    stacked: bool = False,
) -> Html:
    """Return a table in a box that scrolls sideways if it is too wide; the first cell of a row is its heading.

    Args:
        key: identifies it on the page.
        caption: says what it shows; also the name of the box.
        columns: one a cell of a row.
        rows: cells.
        sortable: with a button in every column's heading.
        stacked: on a phone, each row is a list of its cells with their columns' titles, and nothing scrolls.
    """
    heads = [
        element(
            "th",
            element("button", column.title, type="button") if sortable else column.title,
            scope="col",
            class_="number" if column.numeric else None,
            aria_sort="none" if sortable else None,
        )
        for column in columns
    ]
    body = [
        element(
            "tr",
            *(
                element(
                    "td" if place else "th",
                    element("strong" if cell.best else "span", cell.shown) if cell.best or stacked else cell.shown,
                    scope=None if place else "row",
                    class_="number" if column.numeric else None,
                    data_sort=None if cell.sort is None else cell.sort,
                    style=cell.style,
                    data_column=column.title if stacked and place else None,
                )
                for place, (cell, column) in enumerate(zip(row, columns, strict=True))
            ),
        )
        for row in rows
    ]
    return element(
        "div",
        element(
            "table",
            element("caption", element("span", caption), id=f"{key}-caption"),
            element("thead", element("tr", *heads)),
            element("tbody", *body),
        ),
        class_="scroll stacked" if stacked else "scroll",
        id=key,
        role="region",
        tabindex=0,
        aria_labelledby=f"{key}-caption",
    )


# Blocks


def note(*children: str) -> Html:
    """Return a small line under a table or picture."""
    return element("p", *children, class_="note")


def folded(summary: str, *children: str) -> Html:
    """Return content that is collapsed under a summary."""
    return element("details", element("summary", summary), *children)


def settings(values: Mapping[str, object]) -> Html:
    """Return nested settings as ``key = value`` lines with dotted keys."""
    lines = [f"{key} = {value}" for key, value in flatten(values).items()]
    return element("pre", "\n".join(lines) or ABSENT, tabindex=0)


def facts(pairs: Sequence[tuple[str, str]]) -> Html:
    """Return a list of terms and values, side by side if there is room."""
    return element(
        "dl", *(element("div", element("dt", term), element("dd", meaning)) for term, meaning in pairs), class_="facts"
    )


@dataclass(frozen=True)
class Section:
    """A part of the page: its anchor, heading and content."""

    key: str
    heading: str
    content: Html


def page(title: str, lead: str, sections: Sequence[Section], *, kind: str, synthetic: bool) -> str:
    """Return the whole file.

    Args:
        title: of the page.
        lead: under the title.
        sections: in order.
        kind: what was reported on, above the title.
        synthetic: warn that the data are generated.
    """
    style, script = (
        files("fedmerge.report.html").joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js")
    )
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src '{_digest(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    warning = element(
        "p",
        element("strong", "Synthetic data."),
        " The interactions are generated: these numbers say nothing about real users.",
        class_="warning",
        role="note",
    )
    contents = element(
        "nav",
        element("ul", *(element("li", element("a", part.heading, href=f"#{part.key}")) for part in sections)),
        aria_label="Contents",
    )
    blocks = [
        element(
            "section",
            element("h2", part.heading, id=f"{part.key}-heading"),
            part.content,
            id=part.key,
            aria_labelledby=f"{part.key}-heading",
        )
        for part in sections
    ]
    head = join(
        Html('<meta charset="utf-8">\n'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">\n'),
        Html('<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'),
        element("title", f"{title} – fedmerge"),
        Html(f"\n<style>{style}</style>\n"),
    )
    top = element(
        "header", element("p", kind, class_="kind"), element("h1", title), lead, warning if synthetic else None
    )
    foot = element("footer", element("p", "Written by fedmerge report. Nothing on this page is loaded from elsewhere."))
    body = join(top, contents, element("main", Html("\n".join(blocks))), foot, Html(f"\n<script>{script}</script>\n"))
    return f'<!doctype html>\n<html lang="en">\n<head>\n{head}</head>\n<body>\n{body}</body>\n</html>\n'


def _digest(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
