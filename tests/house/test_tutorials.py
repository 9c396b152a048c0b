"""The guides marked in docs/README.md run exactly as written: their sh and python blocks, in a copy of the repository.

Only the backbone is replaced by a tiny one. Each line of a text block must be printed; … stands for anything.
"""

import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from backbones import tiny_bert

from sim.local.launch import MARK, end_processes, flower_environment

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

REPOSITORY = Path(__file__).resolve().parents[2]
MAP = (REPOSITORY / "docs" / "README.md").read_text()
GUIDES = [REPOSITORY / "docs" / path for path in re.findall(r"\]\((guides/\S+\.md)\) \*", MAP)]
TRACKED = ("fedmerge", "sim", "configs", "docs", "pyproject.toml", "LICENSE", "README.md")
PORT = re.compile(r"\b(8000|909\d)\b")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder that the guides share, so that no expert is trained twice, with the tiny backbone."""
    folder = tmp_path_factory.mktemp("home")
    tiny_bert(folder / "backbone")
    return folder


@pytest.fixture
def checkout(home: Path, tmp_path: Path) -> Path:
    """A copy of the repository whose configs/tiny.toml names the tiny backbone."""
    folder = tmp_path / "fedmerge"
    folder.mkdir()
    for name in TRACKED:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    with (folder / "configs" / "tiny.toml").open("a") as file:
        file.write(f'\n[backbone]\nsource = "{home / "backbone"}"\n')
    return folder


@pytest.fixture
def variables(home: Path, checkout: Path) -> Iterator[dict[str, str]]:
    """The environment of a shell in which the copy is installed; processes started in it are ended."""
    programs = checkout.parent / "bin"
    programs.mkdir()
    for name, module in (("fedmerge", " -m fedmerge.cli"), ("python", "")):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}"{module} "$@"\n')
        (programs / name).chmod(0o755)
    scratch = Path(tempfile.mkdtemp(prefix="flwr-", dir="/tmp"))  # Ray's sockets want a short path
    mark = secrets.token_hex(16)
    installed = flower_environment(scratch / "home", free_port())
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), installed["PATH"]])
    try:
        yield installed | {
            "HOME": str(home),
            "PATH": path,
            "PYTHONPATH": str(checkout),
            "RAY_TMPDIR": str(scratch),
            MARK: mark,
        }
    finally:
        end_processes(mark)
        shutil.rmtree(scratch, ignore_errors=True)


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def script(text: str) -> str:
    """Join the sh and python blocks of a page into one shell script, with ports that are free here."""
    lines = ["set -e"]
    for language, content in re.findall(r"^```(\w+)\n(.*?)^```$", text, re.M | re.S):
        if language == "sh":
            lines.append(content)
        elif language == "python":
            lines.append(f"python - <<'PYTHON'\n{content}PYTHON")
    ports = {port: str(free_port()) for port in sorted(set(PORT.findall(text)))}
    return PORT.sub(lambda found: ports[found.group()], "\n".join(lines))


def expected(text: str) -> list[str]:
    """Return the lines of the text blocks."""
    found = re.findall(r"^```text\n(.*?)^```$", text, re.M | re.S)
    return [line for content in found for line in content.splitlines() if line.strip()]


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_a_guide_does_what_it_says(guide: Path, checkout: Path, variables: dict[str, str]) -> None:
    text = guide.read_text()
    done = subprocess.run(
        ["bash", "-c", script(text)],
        cwd=checkout,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    printed = [line.rstrip() for line in done.stdout.splitlines()]
    for line in expected(text):
        pattern = re.compile(".*".join(re.escape(part.strip()) for part in line.split("…")))
        assert any(pattern.search(found) for found in printed), f"{line!r} is not in\n{done.stdout}"
