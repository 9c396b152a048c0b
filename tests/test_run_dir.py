"""A run on disk: nothing is overwritten, every file is there whole or not at all."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from fedmerge.config import from_flat, load_config
from fedmerge.errors import RunDirError
from fedmerge.run_dir import create_run, environment, new_run_id, write_json, write_table, write_text


def test_a_new_run_holds_its_configuration_and_environment(tmp_path: Path) -> None:
    config = from_flat({"output_dir": str(tmp_path / "deep" / "runs"), "run_id": "first", "seed": 7})
    folder = create_run(config)
    assert folder == tmp_path / "deep" / "runs" / "first"
    assert sorted(path.name for path in folder.iterdir()) == ["config.toml", "environment.json"]
    assert load_config(folder / "config.toml") == config
    assert json.loads((folder / "environment.json").read_text()) == environment()


def test_the_environment_names_what_can_change_numbers() -> None:
    found = environment()
    assert {"python", "processor", "cpus", "packages"} <= set(found)
    assert {"torch", "transformers", "peft", "numpy", "fedmerge", "flwr"} <= set(found["packages"])
    assert all(re.match(r"\d", found["packages"][name]) for name in ("torch", "numpy", "fedmerge"))


def test_a_run_never_overwrites_another(tmp_path: Path) -> None:
    config = from_flat({"output_dir": str(tmp_path), "run_id": "once"})
    folder = create_run(config)
    (folder / "config.toml").write_text("mine")
    with pytest.raises(RunDirError, match="never overwrites another") as caught:
        create_run(config)
    assert str(folder) in str(caught.value)
    assert (folder / "config.toml").read_text() == "mine"


def test_runs_without_an_id_get_different_ones(tmp_path: Path) -> None:
    config = from_flat({"output_dir": str(tmp_path), "name": "trial"})
    folders = {create_run(config) for _ in range(3)}
    assert len(folders) == 3
    assert all(re.fullmatch(r"trial-\d{8}-\d{6}-[0-9a-f]{4}", folder.name) for folder in folders)
    assert from_flat({"run_id": new_run_id("a" * 64)}).run_id  # the longest name gives an id that may be asked for


def test_an_output_dir_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirError, match="output_dir") as caught:
        create_run(from_flat({"output_dir": str(tmp_path / "file" / "runs"), "run_id": "x"}))
    assert str(tmp_path / "file" / "runs" / "x") in str(caught.value)
    with pytest.raises(RunDirError):
        create_run(from_flat({"output_dir": str(tmp_path / "file"), "run_id": "x"}))
    assert (tmp_path / "file").read_text() == ""


def test_text_and_json_are_written_whole_and_replace_what_was_there(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "long " * 1000)
    write_text(tmp_path / "a.txt", "Δ\n")
    assert (tmp_path / "a.txt").read_bytes() == "Δ\n".encode()
    data = {"b": [1, 2.5, None], "a": "ü"}
    write_json(tmp_path / "a.json", data)
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == data
    assert list(json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))) == ["b", "a"]  # order is kept
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.txt"]


def test_what_cannot_become_json_leaves_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", [1])
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", [object()])
    assert json.loads((tmp_path / "a.json").read_text()) == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_tables_are_read_back_with_their_types(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"domain": "a", "num_users": 3, "sum": 0.1},
        {"domain": "b", "num_users": 4, "sum": 2.0},
    ]
    write_table(tmp_path / "t.parquet", rows)
    table = pq.read_table(tmp_path / "t.parquet")
    assert table.to_pylist() == rows
    assert [str(field.type) for field in table.schema] == ["string", "int64", "double"]
    assert [path.name for path in tmp_path.iterdir()] == ["t.parquet"]


@pytest.mark.parametrize("write", [write_text, lambda path, _: write_table(path, [{"a": 1}])], ids=["text", "table"])
def test_a_failed_write_is_named_and_leaves_nothing(tmp_path: Path, write: Any) -> None:
    with pytest.raises(RunDirError, match="cannot be written") as caught:
        write(tmp_path / "gone" / "x", "text")
    assert str(tmp_path / "gone" / "x") in str(caught.value)
    (tmp_path / "x").mkdir()  # a folder in the place of the file: the last step fails
    (tmp_path / "x" / "inside").write_text("")
    with pytest.raises(RunDirError, match="cannot be written"):
        write(tmp_path / "x", "text")
    assert [path.name for path in tmp_path.rglob("*")] == ["x", "inside"]
