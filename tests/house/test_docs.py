"""The documentation holds: tables render, links and paths lead somewhere, commands parse, settings and names exist."""

import argparse
import functools
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedmerge.cli import make_parser
from fedmerge.config import ExperimentConfig, load_config, to_flat
from fedmerge.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / "README.md", *sorted(DOCS.rglob("*.md"))]
LANGUAGES = {"sh", "python", "text", "toml", "console", ""}
MAX_FILES = 12
PAGE_NAME = re.compile(r"docs/[\w/-]+\.(?:md|ipynb)")
MEASURED = {"results.md", "findings.md"}  # commands as they were given; their settings may have become constants since
OF_THE_READER = {"configs/mine.toml"}  # stands for a file of the reader's
REFUSED_ON_PURPOSE = "privacy.policy=adapter"  # the privacy guide shows that `check` refuses it with MergeRec

page_of = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """Yield language and content of the fenced blocks."""
    for _, language, content in re.findall(r"^( *)```(\w*)\n(.*?)^\1```$", page.read_text(), re.M | re.S):
        yield language, content


def prose(page: Path) -> list[str]:
    """Return the lines outside fenced blocks; those inside are empty."""
    text = re.sub(
        r"^( *)```.*?^\1```$", lambda block: "\n" * block.group().count("\n"), page.read_text(), flags=re.M | re.S
    )
    return text.splitlines()


def words_of_commands(page: Path) -> Iterator[list[str]]:
    """Yield the arguments of every fedmerge command in an sh, console or indented block."""
    indented = "\n".join(line[4:] for line in prose(page) if line.startswith("    "))
    shells = [content for language, content in blocks(page) if language in ("sh", "console")]
    for line in "\n".join([*shells, indented]).replace("\\\n", " ").splitlines():
        if not re.match(r"(export \S+ )?(\S+=\S+ )*(\S*/)?fedmerge ", line):
            continue
        for command in re.split(r" (?:&&|\|\||\||>|;) ", line.removesuffix(" &")):
            words = shlex.split(command, comments=True)
            names = [index for index, word in enumerate(words) if Path(word).name == "fedmerge" and index < 3]
            if names:
                yield words[names[0] + 1 :]


def cells(row: str) -> int:
    r"""Count the cells of a table row; ``\|`` and a bar in code are none of its borders only if escaped, as in GFM."""
    return len(re.split(r"(?<!\\)\|", row.strip().strip("|")))


@functools.cache
def headings(page: Path) -> set[str]:
    """Return the anchors of a page, as GitHub makes them."""
    found = re.findall(r"^#+ (.+)$", "\n".join(prose(page)), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


def test_no_folder_of_the_documentation_is_crowded() -> None:
    for folder in (DOCS, *(path for path in DOCS.rglob("*") if path.is_dir())):
        names = sorted(path.name for path in folder.iterdir() if path.is_file())
        assert len(names) <= MAX_FILES, f"{folder}: {names}"


def test_the_map_names_every_page() -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", (DOCS / "README.md").read_text())
    named = {(DOCS / target).resolve() for target in targets}
    assert [page for page in PAGES if page not in named and page != DOCS / "README.md"] == []


@page_of
def test_tables_render(page: Path) -> None:
    lines = ["", *prose(page), ""]
    starts = [n for n in range(1, len(lines)) if lines[n].startswith("|") and not lines[n - 1].startswith("|")]
    for start in starts:
        end = next(n for n in range(start, len(lines)) if not lines[n].startswith("|"))
        rows = lines[start:end]
        where = f"{page.name}, line {start}: {rows[0]}"
        assert len(rows) > 1, f"{where}: a row alone; is there a blank line inside the table?"
        assert re.fullmatch(r"\|( ?:?-+:? ?\|)+", rows[1]), f"{where}: no separator below the header"
        assert {cells(row) for row in rows} == {cells(rows[0])}, f"{where}: rows of unequal length"
        assert lines[start - 1] == "" or lines[start - 1].startswith("<!--"), f"{where}: no blank line before the table"


@page_of
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", "\n".join(prose(page))):
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
def test_fedmerge_commands_parse_and_their_settings_are_valid(page: Path) -> None:
    for words in words_of_commands(page):
        options = make_parser().parse_args(words)
        settings = [
            setting.replace("$seed", "1").replace("$domains", "books,coffee").replace("=S", "=0")
            for setting in getattr(options, "overrides", [])
        ]
        file = getattr(options, "config", None)
        if page.name in MEASURED or (file and not (REPOSITORY / file).exists()):
            continue
        try:
            load_config(file and REPOSITORY / file, settings)
        except ConfigError:
            assert words[0] == "check", words
            assert REFUSED_ON_PURPOSE in settings, words


@page_of
def test_commands_named_in_the_text_parse(page: Path) -> None:
    for words in re.findall(r"`fedmerge ((?:[a-z][a-z-]*)(?: [a-z][a-z-]*)*)", " ".join(prose(page))):
        known = make_parser()
        for word in words.split():
            groups = [action for action in known._actions if isinstance(action, argparse._SubParsersAction)]
            if not groups:
                break
            assert word in groups[0].choices, f"fedmerge {words}"
            known = groups[0].choices[word]


@page_of
def test_settings_named_in_the_text_exist(page: Path) -> None:
    messages = {"train.head", "train.head_round", "train.personal", "train.weave"}
    known = set(to_flat(ExperimentConfig())) | messages
    sections = {key.partition(".")[0] for key in known if "." in key}
    files = (".json", ".jsonl", ".parquet", ".toml", ".txt", ".log", ".py", ".md", ".key", ".db")
    for word in re.findall(r"`([a-z_]+\.[a-z_]+)(?:\s*=[^`]*)?`", "\n".join(prose(page))):
        if word.partition(".")[0] in sections and not word.endswith(files):
            assert word in known, f"{word} is no setting"


@page_of
def test_paths_and_modules_named_in_the_text_exist(page: Path) -> None:
    text = page.read_text()
    rooms = "fedmerge|sim|tests|configs|benchmarks|docs"
    for path in re.findall(rf"(?<![\w/.-])((?:{rooms})/[\w./-]*\w)", text):
        assert path in OF_THE_READER or any(REPOSITORY.glob(path)), path
    for name in re.findall(r"(?<![\w/.-])(fedmerge(?:\.[A-Za-z_]\w*)+)", text):
        if name.partition(".")[2] not in ("toml", "service"):
            _resolve(name)


def _resolve(name: str) -> None:
    """Import the longest prefix of a dotted name that is a module, and look the rest up in it."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return


def test_pages_named_in_code_and_configurations_exist() -> None:
    files = [
        path for room in ("fedmerge", "sim", "configs", "benchmarks") for path in sorted((REPOSITORY / room).rglob("*"))
    ]
    for file in [*files, REPOSITORY / "CHANGELOG.md", REPOSITORY / "Makefile"]:
        if file.is_file() and file.suffix in {".py", ".toml", ".md", ""}:
            for page in PAGE_NAME.findall(file.read_text()):
                assert (REPOSITORY / page).exists(), f"{file}: {page}"
