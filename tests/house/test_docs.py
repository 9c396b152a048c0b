"""The documentation holds: commands parse, settings and links exist, quoted errors are those of the program."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedmerge.cli import _parser
from fedmerge.config import ExperimentConfig, load_config, to_flat

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
LANGUAGES = {"sh", "python", "text", "toml", "console", ""}

page_of = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """Language and content of the fenced blocks."""
    for _, language, content in re.findall(r"^( *)```(\w*)\n(.*?)^\1```$", page.read_text(), re.M | re.S):
        yield language, content


def commands(page: Path) -> Iterator[list[str]]:
    """The fedmerge commands of the sh blocks."""
    for language, content in blocks(page):
        for line in content.replace("\\\n", " ").splitlines() if language == "sh" else []:
            words = shlex.split(line, comments=True)
            starts = [index for index, word in enumerate(words) if Path(word).name == "fedmerge" and index < 2]
            if starts:
                end = next((index for index, word in enumerate(words) if word in ("||", "&&", "|", ">")), len(words))
                yield words[starts[0] + 1 : end]


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them."""
    found = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


def messages() -> Iterator[str]:
    """Every text in the code, with … for what is filled in."""
    for package in ("fedmerge", "sim"):
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                    yield "".join(str(part) for part in parts)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


def test_there_is_a_tutorial_for_each_kind_of_user() -> None:
    assert len(list((REPOSITORY / "docs" / "tutorials").glob("*.md"))) >= 4


@page_of
def test_fedmerge_commands_parse_and_their_settings_are_valid(page: Path) -> None:
    for words in commands(page):
        options = _parser().parse_args(words)
        settings = [
            setting.replace("$seed", "1").replace("$domains", "books,coffee")
            for setting in getattr(options, "overrides", [])
        ]
        file = getattr(options, "config", None)
        if "adapter" in [setting.partition("=")[2] for setting in settings] and words[0] == "check":
            continue  # shown because it is refused
        load_config(file and REPOSITORY / file, settings)


@page_of
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in headings(file), target


@page_of
def test_blocks_are_of_known_kinds(page: Path) -> None:
    assert {language for language, _ in blocks(page)} <= LANGUAGES


@page_of
def test_settings_named_in_the_text_exist(page: Path) -> None:
    known = set(to_flat(ExperimentConfig()))
    sections = {key.partition(".")[0] for key in known if "." in key}
    files = (".json", ".parquet", ".toml", ".txt", ".log", ".py", ".md")
    for word in re.findall(r"`([a-z]+\.[a-z_]+)(?:\s*=[^`]*)?`", page.read_text()):
        if word.partition(".")[0] in sections and not word.endswith(files):
            assert word in known, f"{word} is no setting"


def test_the_errors_of_the_page_are_those_of_the_program() -> None:
    text = (REPOSITORY / "docs" / "errors.md").read_text()
    quoted = [beginning for _, beginning in re.findall(r"^### (`+)(.+)\1$", text, re.M)]
    assert len(quoted) >= 25
    found = list(messages())
    assert [beginning for beginning in quoted if not any(message.startswith(beginning) for message in found)] == []
