"""Parts of the documentation and of pyproject.toml that are written from the code. ``make docs`` writes them all.

A table of a page stands between ``<!-- NAME: written by make docs -->`` and ``<!-- end of NAME -->``.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from fedmerge.merging.descriptions import laws_table, methods_table
from fedmerge.merging.parameters import markdown_table
from fedmerge.report.docs.config_reference import config_reference, with_declared_keys
from fedmerge.report.docs.strategies import strategies_table
from fedmerge.runs.folder import FILES


def files_table() -> str:
    """Return the files of a run folder as a Markdown table."""
    rows = [(", ".join(f"`{name}`" for name in names.split(", ")), meaning) for names, meaning in FILES.items()]
    return markdown_table(("file", "content"), rows)


TABLES: Mapping[str, Mapping[str, Callable[[], str]]] = {
    "docs/reference/merging.md": {"methods": methods_table, "laws": laws_table},
    "docs/reference/run-folder.md": {"files": files_table},
    "docs/strategies.md": {"strategies": strategies_table},
}


def generated_texts(repository: Path) -> dict[str, str]:
    """Return path -> text of every generated file and of every page with generated tables."""
    pyproject = (repository / "pyproject.toml").read_text(encoding="utf-8")
    texts = {"pyproject.toml": with_declared_keys(pyproject), "docs/config.md": config_reference()}
    for page, tables in TABLES.items():
        texts[page] = (repository / page).read_text(encoding="utf-8")
        for name, table in tables.items():
            texts[page] = with_table(texts[page], name, table())
    return texts


def with_table(page: str, name: str, table: str) -> str:
    """Return the page with a table between its two marks.

    Raises:
        ValueError: the page lacks the marks.
    """
    begin, end = f"<!-- {name}: written by make docs -->\n", f"<!-- end of {name} -->"
    found = re.search(f"{re.escape(begin)}(.*?){re.escape(end)}", page, re.DOTALL)
    if found is None:
        raise ValueError(f"the page has no table {name!r}; expected the marks {begin.strip()} and {end}")
    return page[: found.start(1)] + table + page[found.end(1) :]


def main() -> None:
    """Write every generated text into the repository."""
    repository = Path(__file__).resolve().parents[3]
    for path, text in generated_texts(repository).items():
        (repository / path).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
