"""An HTML parser for tests of pages."""

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "link", "br"}


@dataclass
class Page(HTMLParser):
    """A parsed page: elements with attributes, the text of every table's cells, and mismatched tags."""

    elements: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    tables: dict[str, list[list[str]]] = field(default_factory=dict)
    text: str = ""
    problems: list[str] = field(default_factory=list)
    open_tags: list[str] = field(default_factory=list)
    table: str = ""
    cell: str | None = None

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if tag not in VOID:
            self.open_tags.append(tag)
        if attributes.get("class") == "scroll":
            self.table = str(attributes["id"])
            self.tables[self.table] = []
        if tag == "tr":
            self.tables[self.table].append([])
        if tag in ("td", "th"):
            self.cell = ""

    def handle_endtag(self, tag: str) -> None:
        if not self.open_tags or self.open_tags.pop() != tag:
            self.problems.append(f"</{tag}> at {self.getpos()}")
        if tag in ("td", "th"):
            self.tables[self.table][-1].append(str(self.cell))
            self.cell = None

    def handle_data(self, data: str) -> None:
        if "script" not in self.open_tags and "style" not in self.open_tags:
            self.text += data
        if self.cell is not None:
            self.cell += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def parsed(text: str) -> Page:
    found = Page()
    found.feed(text)
    assert found.problems == []
    assert found.open_tags == []
    return found
