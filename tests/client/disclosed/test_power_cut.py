"""A power cut: what was not synced is lost. A release that was handed out is on disk by then, file and folders."""

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fedmerge.client.cache import dp_releases
from fedmerge.client.cache.folders import fill_folder
from fedmerge.client.cache.secure_sums import record_revealed
from fedmerge.files import append_line, new_folder, read_lines, whole_folder, write_json, write_table

Entry = tuple[int, bool]  # inode, is a folder


@dataclass
class Disk:
    """A disk that holds only what was synced below a folder: the entries of folders and the content of files."""

    root: Path
    folders: dict[int, dict[str, Entry]] = field(default_factory=dict)
    files: dict[int, bytes] = field(default_factory=dict)
    syncs: int = 0

    def synced(self, descriptor: int) -> None:
        """Note what a sync of a descriptor makes durable."""
        found = os.fstat(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        self.syncs += 1
        if stat.S_ISDIR(found.st_mode):
            entries = {entry.name: entry.stat(follow_symlinks=False) for entry in os.scandir(path)}
            self.folders[found.st_ino] = {name: (s.st_ino, stat.S_ISDIR(s.st_mode)) for name, s in entries.items()}
        else:
            self.files[found.st_ino] = path.read_bytes()

    def after_a_power_cut(self, to: Path) -> Path:
        """Write what is durable into another folder."""
        self._write(self.root.stat().st_ino, to)
        return to

    def _write(self, folder: int, to: Path) -> None:
        to.mkdir()
        for name, (inode, is_folder) in self.folders.get(folder, {}).items():
            if is_folder:
                self._write(inode, to / name)
            else:
                (to / name).write_bytes(self.files.get(inode, b""))


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    made = Disk(tmp_path / "disk")
    made.root.mkdir()
    sync = os.fsync

    def recorded(descriptor: int) -> None:
        sync(descriptor)
        made.synced(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    return made


def release(cache: Path, made: Any) -> Any:
    """Release a value once, as rounds, experts and answers are released."""

    def write(value: Any, folder: Path) -> dict[str, Any]:
        (folder / "value").write_text(str(value))
        return {"sha256": str(value)}

    def read(folder: Path, record: Any) -> tuple[Any, str]:
        value = (folder / "value").read_text()
        return value, value

    folder = cache / "released" / "books-run" / "1"
    return dp_releases._release_once(folder, "domain books: round 1", "asked", lambda: made, write, read)


def test_a_release_that_was_handed_out_is_the_same_after_a_power_cut(disk: Disk, tmp_path: Path) -> None:
    sent = release(disk.root, "noise 1")
    after = disk.after_a_power_cut(tmp_path / "after")
    assert release(after, "noise 2") == sent == "noise 1"


def test_a_power_cut_before_any_sync_leaves_a_release_whole_or_absent(disk: Disk, tmp_path: Path) -> None:
    """Cut at every sync: before the release returns nothing was sent, so other noise may follow, but no damage."""
    cuts: list[Path] = []
    synced = disk.synced

    def cut(descriptor: int) -> None:
        cuts.append(disk.after_a_power_cut(tmp_path / f"cut {disk.syncs}"))
        synced(descriptor)

    disk.synced = cut  # type: ignore[method-assign]  # the cut is before the sync takes effect
    sent = release(disk.root, "noise 1")
    assert len(cuts) >= 5
    for place in cuts:
        assert release(place, "noise 2") in (sent, "noise 2")


def lines(root: Path) -> Any:
    append_line(root / "released.jsonl", {"a": 1})
    append_line(root / "released.jsonl", {"a": 2})


def json_file(root: Path) -> Any:
    write_json(root / "x.json", {"a": 1})
    write_json(root / "x.json", {"a": 2})


def table(root: Path) -> Any:
    write_table(root / "x.parquet", [{"a": 1}])


def run_folder(root: Path) -> Any:
    for text in ("1", "2"):
        with whole_folder(root / "expert") as folder:
            (folder / "deep").mkdir()
            (folder / "deep" / "x").write_text(text)


def made_folder(root: Path) -> Any:
    with new_folder(root / "new") as folder:
        (folder / "x").write_text("1")


def cached(root: Path) -> Any:
    def write(folder: Path) -> None:
        (folder / "x").write_text("1")

    fill_folder(root / "cache" / "a" / "b", write, lambda: False, "books")


def company(root: Path) -> Any:
    record_revealed(str(root / "cache"), "books", "a" * 64, {"books": 0.5, "toys": 0.5}, 1.0, "run-1")


@pytest.mark.parametrize("write", [lines, json_file, table, run_folder, made_folder, cached, company])
def test_what_was_written_survives_a_power_cut(disk: Disk, tmp_path: Path, write: Callable[[Path], Any]) -> None:
    write(disk.root)
    after = disk.after_a_power_cut(tmp_path / "after")

    def content(root: Path) -> dict[str, bytes]:
        return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}

    assert content(after) == content(disk.root) != {}


def test_lines_survive_one_by_one(disk: Disk, tmp_path: Path) -> None:
    for number in range(3):
        append_line(disk.root / "lines", {"number": number})
        after = disk.after_a_power_cut(tmp_path / str(number))
        assert [line["number"] for line in read_lines(after / "lines")] == list(range(number + 1))
