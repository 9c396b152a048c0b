"""`fedmerge cache`: sizes by kind, what can go, what is never deleted."""

import os
from pathlib import Path

import pytest
import torch
from run_folders import output, refusal

from fedmerge.client.cache.contents import (
    CacheEntry,
    adapters_of_runs,
    cache_entries,
    delete_entry,
    entries_to_delete,
)
from fedmerge.client.cache.folders import mark_used
from fedmerge.errors import ConfigError
from fedmerge.files import seal, write_json
from fedmerge.tensor_files import read_facts, write_tensors

Capsys = pytest.CaptureFixture[str]
DAY = 86_400.0
NOW = 1_700_000_000.0
OF_RUN, OF_EXPERT, OF_NOBODY = "a" * 64, "b" * 64, "c" * 64


def aged(path: Path, days: float) -> Path:
    os.utime(path, (NOW - days * DAY, NOW - days * DAY))
    return path


def vectors(cache: Path, name: str, adapter: str | None, days: float) -> Path:
    path = cache / "item-vectors" / f"{name}.safetensors"
    facts = {} if adapter is None else {"adapter": adapter}
    write_tensors(path, {"vectors": torch.zeros(3, 2)}, facts, "the vectors")
    return aged(path, days)


def folder(cache: Path, kind: str, name: str, days: float, size: int = 10) -> Path:
    path = cache / kind / name
    path.mkdir(parents=True)
    (path / "file").write_bytes(b"x" * size)
    return aged(path, days)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache with old and new entries of every kind."""
    cache = tmp_path / "cache"
    vectors(cache, "of-run", OF_RUN, 5)
    vectors(cache, "of-expert", OF_EXPERT, 5)
    vectors(cache, "of-nobody", OF_NOBODY, 5)
    vectors(cache, "just-made", OF_NOBODY, 0.1)
    vectors(cache, "of-backbone", "", 5)
    vectors(cache, "not-recorded", None, 5)
    vectors(cache, "old", OF_RUN, 40)
    folder(cache, "tokens", "shop-1", 40, 1000)
    folder(cache, "tokens", "shop-2", 5)
    folder(cache, "heads", "shop-3", 400)
    folder(cache, "released", "shop-4", 400)
    folder(cache, "experts", ".partial-x", 3)
    write_json(folder(cache, "experts", "shop-5", 400) / "training.json", seal({"sha256": OF_EXPERT}))
    (cache / "serving").mkdir()
    aged_file = cache / "serving" / "shop-items.jsonl"
    aged_file.write_text("{}\n")
    aged(aged_file, 400)
    folder(cache, "of-others", "x", 400)
    return cache


def deleted(entries: list[CacheEntry]) -> dict[str, str]:
    return {f"{entry.kind}/{entry.path.name}": entry.why for entry in entries}


def test_what_can_be_made_again_goes_when_it_is_not_in_use(cache: Path) -> None:
    found = entries_to_delete(cache, (), {OF_RUN}, now=NOW)
    assert deleted(found) == {
        "experts/.partial-x": "left over from an interrupted write",
        "item-vectors/of-nobody.safetensors": "no run has its adapter any more",
        "item-vectors/old.safetensors": "not used for 40 days",
        "tokens/shop-1": "not used for 40 days",
    }
    # without knowing any run, age alone decides
    assert "item-vectors/of-nobody.safetensors" not in deleted(entries_to_delete(cache, (), None, now=NOW))
    assert len(entries_to_delete(cache, (), None, 3, now=NOW)) == 9
    for entry in found:
        delete_entry(entry)
        assert not entry.path.exists()
    assert entries_to_delete(cache, (), {OF_RUN}, now=NOW) == []


def test_a_used_entry_is_young(cache: Path) -> None:
    mark_used(cache / "tokens" / "shop-1")
    assert "tokens/shop-1" not in deleted(entries_to_delete(cache, (), None))
    mark_used(cache / "gone")  # deleted by another process; not an error


def test_other_kinds_go_only_by_name_and_records_never(cache: Path) -> None:
    assert deleted(entries_to_delete(cache, ["heads", "serving"], None, now=NOW)) == {
        "heads/shop-3": "named",
        "serving/shop-items.jsonl": "named",
    }
    with pytest.raises(ConfigError, match="released records what has left"):
        entries_to_delete(cache, ["released", "tokens"], None)
    with pytest.raises(ConfigError, match="of-others, expected some of experts, heads"):
        entries_to_delete(cache, ["of-others"], None)


def test_sizes_by_kind(cache: Path) -> None:
    entries = cache_entries(cache)
    by_kind: dict[str, int] = {}
    for entry in entries:
        by_kind[entry.kind] = by_kind.get(entry.kind, 0) + entry.size_bytes
    assert by_kind["tokens"] == 1010
    assert by_kind["of-others"] == 10
    assert by_kind["item-vectors"] == sum(path.stat().st_size for path in (cache / "item-vectors").iterdir())
    assert cache_entries(cache / "gone") == []


def test_facts_are_read_without_the_tensors(cache: Path) -> None:
    assert read_facts(cache / "item-vectors" / "of-run.safetensors") == {"adapter": OF_RUN}
    assert read_facts(cache / "item-vectors" / "gone.safetensors") is None
    (cache / "damaged").write_bytes(b"x")
    assert read_facts(cache / "damaged") is None


def test_adapters_of_runs_are_experts_and_merges(tmp_path: Path) -> None:
    (tmp_path / "run/adapters/shop").mkdir(parents=True)
    write_json(tmp_path / "run/adapters/shop/training.json", seal({"sha256": "e"}))
    for place, sha256 in (("merged/average", "m"), ("remerged/later/average", "r"), ("merged/damaged", None)):
        (tmp_path / "run" / place).mkdir(parents=True)
        path = tmp_path / "run" / place / "provenance.json"
        if sha256 is None:
            path.write_text("{")
        else:
            write_json(path, seal({"sha256": sha256}))
    assert adapters_of_runs([tmp_path / "run"]) == {"e", "m", "r"}


def test_the_command_lists_first_and_deletes_with_yes(cache: Path, tmp_path: Path, capsys: Capsys) -> None:
    table = output(capsys, "cache", "--cache-dir", cache)
    assert table.splitlines()[0].split() == ["kind", "entries", "size", "last", "used", "what", "it", "is"]
    assert "released" in table
    assert "fedmerge cache clean" in table
    clean = ("cache", "clean", "--cache-dir", cache, "--dir", tmp_path / "no-runs")
    told = output(capsys, *clean)
    assert "Nothing was deleted; add --yes" in told
    assert "tokens/shop-1" in told
    assert "nothing to delete" in output(capsys, *clean, "--unused-days", "100000", "--kind", "sasrec")
    assert (cache / "tokens" / "shop-1").exists()
    told = output(capsys, *clean, "--kind", "tokens", "--yes")
    assert told.splitlines()[-1] == "deleted: 2 entries, 1.0 kB"
    assert not any((cache / "tokens").iterdir())
    assert (cache / "heads" / "shop-3").exists()
    assert "released records" in refusal(capsys, *clean, "--kind", "released", "--yes")
    assert "holds nothing" in output(capsys, "cache", "--cache-dir", tmp_path / "gone")
    assert "nothing to delete" in output(capsys, "cache", "clean", "--cache-dir", tmp_path / "gone")
