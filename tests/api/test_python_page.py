"""Every block of docs/python-api.md and every cell of the notebook runs, in order, on a tiny backbone."""

import json
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from backbones import tiny_bert
from nbclient import NotebookClient

from fedmerge.domain.demo import write_demo

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = REPOSITORY / "docs" / "python-api.md"
NOTEBOOK = REPOSITORY / "docs" / "python-api.ipynb"
MINILM = "sentence-transformers/all-MiniLM-L6-v2"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with the demo data in small, a tiny backbone and the shipped configurations."""
    write_demo(tmp_path / "domains", num_domains=8, num_users=30, num_items=25)
    tiny_bert(tmp_path / "backbone")
    shutil.copytree(REPOSITORY / "configs", tmp_path / "configs")
    config = tmp_path / "configs" / "demo.toml"
    text = config.read_text(encoding="utf-8").replace('root = "demo"', f'root = "{tmp_path}/domains"')
    text += f'\n[backbone]\nsource = "{tmp_path}/backbone"\n'
    config.write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def small(text: str, place: Path) -> str:
    """Exchange the backbone and the data for small ones."""
    for name, found in ((MINILM, place / "backbone"), ("demo", place / "domains")):
        for quote in ('"', '\\"'):  # in Python, and in Python within the notebook's JSON
            text = text.replace(f"{quote}{name}{quote}", f"{quote}{found}{quote}")
    return text


def run(blocks: list[str], place: Path) -> dict[str, object]:
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(small(block, place), "block", "exec"), names)
    return names


@pytest.mark.long
def test_every_block_of_the_page_runs(place: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    assert len(blocks) > 5
    names = run(blocks, place)
    assert {"scores", "learned", "run"} <= names.keys()
    assert (place / "learned" / "adapter_model.safetensors").is_file()


@pytest.mark.e2e
@pytest.mark.timeout(1200)
def test_every_cell_of_the_notebook_runs(place: Path) -> None:
    text = small(NOTEBOOK.read_text(encoding="utf-8"), place)
    notebook = nbformat.reads(text, as_version=4)  # type: ignore[no-untyped-call]  # nbformat leaves it untyped
    done = NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    outputs = [output for cell in done.cells if cell.cell_type == "code" for output in cell.outputs]
    assert "Estimate(mean=" in json.dumps(outputs)
