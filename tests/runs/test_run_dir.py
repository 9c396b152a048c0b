"""A run on disk: nothing is overwritten, every file is there whole or not at all."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from run_folders import full_disk

from fedmerge.config import from_flat, load_config
from fedmerge.errors import ConfigError, RunDirError
from fedmerge.files import (
    ROWS_AT_ONCE,
    append_line,
    read_json,
    read_lines,
    whole_folder,
    write_json,
    write_table,
    write_text,
)
from fedmerge.runs.folder import (
    check_same_config,
    create_run,
    environment,
    is_locked,
    locked,
    new_run_id,
    open_run,
    run_config,
    run_to_resume,
)

REPOSITORY = Path(__file__).resolve().parents[2]


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
    with pytest.raises(RunDirError, match=f"{folder} .*--resume {folder}"):
        create_run(config)
    assert (folder / "config.toml").read_text() == "mine"


def test_a_run_id_whose_run_still_works_is_refused_without_advice_to_resume(tmp_path: Path) -> None:
    config = from_flat({"output_dir": str(tmp_path), "run_id": "once"})
    folder = create_run(config)
    with locked(folder), pytest.raises(RunDirError) as caught:
        create_run(config)
    assert str(folder) in str(caught.value)
    assert f"process {os.getpid()} on " in str(caught.value)
    assert "--resume" not in str(caught.value)


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


def test_a_long_table_is_written_in_parts(tmp_path: Path) -> None:
    count = 2 * ROWS_AT_ONCE + 1
    write_table(tmp_path / "t.parquet", ({"number": number, "half": number / 2} for number in range(count)))
    table = pq.read_table(tmp_path / "t.parquet")
    assert table["number"].to_pylist() == list(range(count))
    assert table["half"].to_pylist() == [number / 2 for number in range(count)]


@pytest.mark.parametrize("write", [write_text, lambda path, _: write_table(path, [{"a": 1}])], ids=["text", "table"])
def test_a_failed_write_is_named_and_leaves_nothing(tmp_path: Path, write: Any) -> None:
    with pytest.raises(RunDirError, match=f"{tmp_path}/gone/x "):
        write(tmp_path / "gone" / "x", "text")
    (tmp_path / "x").mkdir()  # a folder in the place of the file: the last step fails
    (tmp_path / "x" / "inside").write_text("")
    with pytest.raises(RunDirError, match=f"{tmp_path}/x "):
        write(tmp_path / "x", "text")
    assert [path.name for path in tmp_path.rglob("*")] == ["x", "inside"]


# Going on with a run


def begun(tmp_path: Path, **changes: Any) -> Path:
    return create_run(from_flat({"output_dir": str(tmp_path / "runs"), "run_id": "first", **changes}))


def test_a_run_without_an_id_writes_down_the_one_it_got(tmp_path: Path) -> None:
    folder = create_run(from_flat({"output_dir": str(tmp_path), "name": "trial"}))
    assert load_config(folder / "config.toml").run_id == folder.name


def test_a_run_is_found_by_its_path_and_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = begun(tmp_path)
    assert run_to_resume(folder) == run_to_resume("first", tmp_path / "runs") == folder
    monkeypatch.chdir(tmp_path)
    assert run_to_resume("first") == run_to_resume("runs/first") == folder


def test_a_folder_that_is_not_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match=r"run first: .*first and /nowhere/first"):
        run_to_resume("first", "/nowhere")
    with pytest.raises(RunDirError, match=rf"{tmp_path} .*config\.toml"):
        run_to_resume(tmp_path)


def test_a_moved_run_has_its_new_location(tmp_path: Path) -> None:
    folder = begun(tmp_path, seed=3)
    moved = tmp_path / "elsewhere" / "second"
    moved.parent.mkdir()
    folder.rename(moved)
    config = run_config(moved)
    assert (config.output_dir, config.run_id, config.seed) == (str(moved.parent), "second", 3)
    check_same_config(moved, config)


def test_every_setting_that_differs_is_named(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    with pytest.raises(ConfigError) as caught:
        check_same_config(folder, from_flat({"seed": 1, "merge.methods": "average", "output_dir": "other"}))
    assert str(caught.value).splitlines()[1:3] == [
        "  seed: the run has 0, given is 1",
        "  merge.methods: the run has 'average,task-arithmetic,mergerec', given is 'average'",
    ]


def test_relative_paths_are_compared_by_their_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = begun(tmp_path, **{"domains.root": "data"})
    check_same_config(folder, from_flat({"domains.root": str(tmp_path / "data")}))
    with pytest.raises(ConfigError, match=r"domains\.root"):
        check_same_config(folder, from_flat({"domains.root": str(tmp_path / "other")}))


@pytest.mark.parametrize("damage", [b"", b"seed = ", b"seed = -1\n", b"\xff"])
def test_a_damaged_configuration_of_a_run_is_named(tmp_path: Path, damage: bytes) -> None:
    folder = begun(tmp_path)
    (folder / "config.toml").write_bytes(damage)
    if damage:
        with pytest.raises(RunDirError, match=rf"{folder}: config\.toml"):
            run_config(folder)
    else:
        with pytest.raises(ConfigError, match=r"seed: .* 0, .* 7$|seed: .* 0, .* 7\n"):
            check_same_config(folder, from_flat({"seed": 7}))


def test_partially_written_files_are_removed(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    (folder / "adapters" / ".books.partial").mkdir(parents=True)
    (folder / "adapters" / ".books.partial" / "x").write_text("")
    (folder / ".choice.json.partial").write_text("{")
    (folder / "adapters" / "toys").mkdir()
    assert open_run(run_config(folder)) == folder
    found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    assert found == ["adapters", "adapters/toys", "config.toml", "environment.json"]


def test_a_lock_holds_until_its_process_ends_however_that_ends(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from fedmerge.runs.folder import locked\n"
        "with locked(Path(sys.argv[1])): print(1, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPOSITORY) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"1\n"
        assert is_locked(tmp_path)
        with (
            pytest.raises(RunDirError, match=rf"{tmp_path}: process {other.pid} on "),
            locked(tmp_path),
        ):
            pass
        other.kill()
        other.wait()
        assert not is_locked(tmp_path)
        with locked(tmp_path):
            assert is_locked(tmp_path)
            assert f"process {os.getpid()} on " in (tmp_path / "lock").read_text()
    assert not is_locked(tmp_path)
    assert not is_locked(tmp_path / "nowhere")


def test_a_folder_that_cannot_be_locked_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(RunDirError, match=r"gone/lock "),
        locked(tmp_path / "gone"),
    ):
        pass


def write_half(folder: Path) -> None:
    (folder / "a").write_text("new")
    raise LookupError


def test_a_folder_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "x") as folder:
        (folder / "a").write_text("old")
    with pytest.raises(LookupError), whole_folder(tmp_path / "x") as folder:
        write_half(folder)
    assert (tmp_path / "x" / "a").read_text() == "old"
    with whole_folder(tmp_path / "x") as folder:
        (folder / "b").write_text("new")
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_full_disk_is_named_with_the_way_to_go_on_and_leaves_nothing(tmp_path: Path) -> None:
    remedy = "--resume"
    rows = [{"a": number} for number in range(10_000)]
    with full_disk(1000):
        with pytest.raises(RunDirError, match=remedy):
            write_text(tmp_path / "a", "long" * 1000)
        with pytest.raises(RunDirError, match=remedy):
            write_table(tmp_path / "a", rows)
        with pytest.raises(RunDirError, match=remedy):
            append_line(tmp_path / "lines", {"a": "long" * 1000})
        with pytest.raises(RunDirError, match=remedy), whole_folder(tmp_path / "a") as folder:
            (folder / "x").write_text("long" * 1000)
    assert [path.name for path in tmp_path.iterdir()] == ["lines"]


def test_lines_survive_one_that_was_never_finished(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    assert list(read_lines(path)) == []
    append_line(path, {"a": "ü"})
    with path.open("a") as file:
        file.write('\n{"a": "unfini')
    append_line(path, {"a": 2})
    assert list(read_lines(path)) == [{"a": "ü"}, {"a": 2}]
    with pytest.raises(RunDirError, match=str(tmp_path)):
        list(read_lines(tmp_path))


def test_json_that_is_damaged_is_named(tmp_path: Path) -> None:
    assert read_json(tmp_path / "none.json") is None
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(RunDirError, match=r"a\.json"):
        read_json(tmp_path / "a.json")
