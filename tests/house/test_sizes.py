"""No file, no folder is too large to read, and no modules import each other in a circle."""

import ast
import subprocess
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from test_imports import REPOSITORY, module_name

LONGEST_FILE = 500  # lines
LARGEST_FOLDER = 12  # files
GENERATED = {"docs/config.md"}
DATA = {".ipynb", ".css", ".js"}
LAZY = {"fedmerge"}  # its __init__ offers the names of fedmerge.api on first use


def files() -> list[Path]:
    """Every file of the repository, without what git ignores."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    return [path for line in listed.splitlines() if (path := REPOSITORY / line).is_file()]


def test_no_file_is_longer_than_a_reader_bears() -> None:
    long = {}
    for path in files():
        name = path.relative_to(REPOSITORY).as_posix()
        if name not in GENERATED and path.suffix in {".py", ".md", ".toml"}:
            num_lines = len(path.read_text(encoding="utf-8").splitlines())
            if num_lines > LONGEST_FILE:
                long[name] = num_lines
    assert long == {}


def test_no_folder_holds_more_files_than_a_reader_surveys() -> None:
    counts = Counter(path.parent.relative_to(REPOSITORY).as_posix() for path in files())
    assert {folder: count for folder, count in counts.items() if count > LARGEST_FOLDER} == {}


def test_no_two_files_of_tests_share_a_name() -> None:
    """They are modules without packages: pytest and mypy refuse a second one."""
    names = Counter(path.name for path in files() if path.suffix == ".py" and "tests" in path.parts)
    assert [name for name, number in names.items() if number > 1] == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    paths = [path for top in ("fedmerge", "sim") for path in sorted((REPOSITORY / top).rglob("*.py"))]
    modules = {module_name(path): path for path in paths}
    edges = {name: imported_modules(path, modules.keys()) - {name} - LAZY for name, path in modules.items()}
    finished: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above[above.index(name) :], name])
        if name not in finished:
            for other in sorted(edges[name]):
                visit(other, (*above, name))
            finished.add(name)

    for name in sorted(modules):
        visit(name, ())


def imported_modules(path: Path, known: Collection[str]) -> set[str]:
    """The modules that a file imports when it is loaded or in a function; imports for types alone do not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node not in for_types:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & {*known}) or ({str(node.module)} & {*known})
    return found
