"""The store of an import against a slow oracle: repeats, cores, order, codes; its files, and what ends it."""

import os
import signal
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from fedmerge.domain.importers import store as store_module
from fedmerge.domain.importers.bad_rows import BadRows
from fedmerge.domain.importers.store import (
    OF_SHORT_USERS,
    OUTSIDE_CORE,
    REPEATED,
    UNKNOWN_ITEM,
    EventStore,
    scratch_folder,
)
from fedmerge.errors import DomainError

Row = tuple[str, str, int]  # user, item, time
SEVERAL = hypothesis_settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

USERS = ("ann", "Ann", "\u00e9", "e\u0301", "a\x00", "\x00", "\U0001f600", "a\nb", "'; --")
ITEMS = ("x", "X", "\u00e4", "a\u0308", "\x00", "100", "1e2", '"')
some_rows = st.lists(
    st.tuples(st.sampled_from(USERS), st.sampled_from(ITEMS), st.sampled_from([0, 1, -(2**63), 2**63 - 1])), max_size=60
)


def fill(store: EventStore, rows: list[Row], bad: BadRows | None = None) -> None:
    bad = bad or BadRows("a.csv", "line", 1)
    for start in range(0, len(rows), 33):
        users, items, times = zip(*rows[start : start + 33], strict=True)
        columns = [np.arange(len(users)) + start + 1, users, items, times]
        arrays = [pa.array(values, field.type) for values, field in zip(columns, store_module.ROWS, strict=True)]
        store.add(pa.record_batch(arrays, schema=store_module.ROWS), bad)
    store.flush(bad)


def sequences(store: EventStore) -> list[tuple[str, list[str]]]:
    """Return the users in order, each with the ids of the items in order."""
    ids = list(store.items)
    found = []
    for part in store.parts(np.arange(len(ids), dtype=np.int32)):
        ends = np.cumsum(part.lengths)
        for user, start, end in zip(part.user_ids.to_pylist(), ends - part.lengths, ends, strict=True):
            found.append((user, [ids[item] for item in part.items[start:end]]))
    return found


def slow_core(rows: list[Row], k: int, users_only: bool) -> list[Row]:
    """Drop one row at a time while a user or an item has fewer than k."""
    rows = list(rows)
    while True:
        users, items = Counter(row[0] for row in rows), Counter(row[1] for row in rows)
        weak = [row for row in rows if users[row[0]] < k or (not users_only and items[row[1]] < k)]
        if not weak:
            return rows
        rows.remove(weak[0])


def slow_sequences(rows: list[Row], k: int | None, users_only: bool) -> list[tuple[str, list[str]]]:
    """Users by their first row, whether or not it is left; items by time, ties by row."""
    first = list(dict.fromkeys(row[0] for row in rows))
    left = list(dict.fromkeys(rows))  # without repeats
    left = left if k is None else slow_core(left, k, users_only)
    sorted_ = sorted(left, key=lambda row: row[2])
    found = [(user, [row[1] for row in sorted_ if row[0] == user]) for user in first]
    return [(user, items) for user, items in found if items]


@pytest.mark.long
@SEVERAL
@given(some_rows, st.none() | st.integers(1, 4), st.booleans())
def test_what_is_left_matches_the_oracle(tmp_path: Path, rows: list[Row], k: int | None, users_only: bool) -> None:
    with EventStore(tmp_path / "shop") as store:
        fill(store, rows)
        store.select(k, users_only)
        assert list(store.items) == list(dict.fromkeys(row[1] for row in rows))
        found = sequences(store)
        assert found == slow_sequences(rows, k, users_only)
        assert [list(store.items)[code] for code in store.item_codes()] == [
            item for item in store.items if any(item in items for _, items in found)
        ]
        assert store.num_rows == sum(len(items) for _, items in found)
        assert store.num_good == len(rows) == store.num_rows + sum(store.dropped.values())
    assert not list(tmp_path.iterdir())


@hypothesis_settings(SEVERAL, max_examples=10)
@given(some_rows, st.integers(1, 4), st.sets(st.sampled_from(ITEMS)))
def test_items_may_be_excluded_before_or_after_the_core(
    tmp_path: Path, rows: list[Row], k: int, gone: set[str]
) -> None:
    with EventStore(tmp_path / "shop") as store:
        fill(store, rows)
        store.select(k)
        store.keep_items(np.array([item not in gone for item in store.items], bool), "gone")
        store.core(k)
        after = dict(sequences(store))
    assert after == dict(slow_sequences([row for row in rows if row[1] not in gone], k, users_only=False))


def test_counts_by_hand(tmp_path: Path) -> None:
    # item 3 has one row; without it user c has one; without that item 2 has one; user b still has two
    square = [("a", "0", 1), ("a", "1", 2), ("b", "0", 3), ("b", "1", 4)]
    tail = [("b", "2", 5), ("c", "2", 6), ("c", "3", 7)]
    for k, users_only, dropped in (
        (2, False, {OUTSIDE_CORE: 3, REPEATED: 1}),
        (3, False, {OUTSIDE_CORE: 8}),
        (3, True, {OF_SHORT_USERS: 4, REPEATED: 1}),
        (None, False, {REPEATED: 1}),
    ):
        with EventStore(tmp_path / "shop") as store:
            fill(store, [*tail, *square, square[0]])
            store.select(k, users_only)
            assert store.dropped == dropped


def test_repeats_do_not_count_towards_the_core(tmp_path: Path) -> None:
    for second, left in ((1, []), (2, [("a", ["x", "x"])])):
        with EventStore(tmp_path / "shop") as store:
            fill(store, [("a", "x", 1), ("a", "x", second)])
            store.select(2)
            assert sequences(store) == left


def test_rows_of_unknown_items_are_bad_with_their_numbers(tmp_path: Path) -> None:
    bad = BadRows("a.csv", "line", 0.5)
    with EventStore(tmp_path / "shop", {"y": 0, "x": 1}) as store:
        store.drop("rated below", 2)
        fill(store, [("a", "x", 2), ("a", "z", 1), ("b", "y", 1), ("c", "w", 3)], bad)
        assert list(store.items) == ["y", "x"]
        report = bad.report(store.num_good)
        store.select(None)
        assert sequences(store) == [("a", ["x"]), ("b", ["y"])]
    assert [(reason.text, reason.count, reason.first) for reason in report.bad] == [(UNKNOWN_ITEM, 2, (2, 4))]
    assert (report.num_rows, store.dropped) == (6, {"rated below": 2})


def test_many_batches_and_parts_are_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    rows = [(f"u{user}", f"i{item}", int(time)) for user, item, time in draw.integers(0, [90, 20, 50], (3000, 3))]
    for name, value in (("ROWS_AT_ONCE", 100), ("USERS_AT_ONCE", 7)):
        monkeypatch.setattr(store_module, name, value)
    with EventStore(tmp_path / "shop") as store:
        fill(store, rows)
        store.select(3)
        assert sequences(store) == slow_sequences(rows, 3, users_only=False)


# Its files


def test_the_files_are_removed_after_an_error(tmp_path: Path) -> None:
    with suppress(KeyboardInterrupt), EventStore(tmp_path / "new" / "shop") as store:
        [folder] = tmp_path.iterdir()
        assert folder.name.startswith(".shop.import-")
        assert folder.stat().st_mode & 0o077 == 0
        fill(store, [("a", "x", 1)])
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_a_killed_import_leaves_files_that_the_next_one_removes(tmp_path: Path) -> None:
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom fedmerge.domain.importers.store import EventStore\n"
        "with EventStore(Path(sys.argv[1])):\n    print('ready', flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "shop")], stdout=subprocess.PIPE, env=os.environ
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        [running] = tmp_path.iterdir()
        with EventStore(tmp_path / "shop"):  # of the same name, at the same time
            assert len(list(tmp_path.iterdir())) == 2
        assert list(tmp_path.iterdir()) == [running]
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert list(tmp_path.iterdir()) == [running]
    with EventStore(tmp_path / "shops"):  # another name
        assert running.exists()
    with EventStore(tmp_path / "shop"):
        assert not running.exists()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_ends_in_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {**store_module.SETTINGS, "memory_limit": "12MB", "max_temp_directory_size": "1MB"}
    monkeypatch.setattr(store_module, "SETTINGS", small)
    count = 1_000_000
    batch = pa.record_batch(
        [np.arange(count), pa.array(np.arange(count).astype("U20")), pa.array(["x"] * count), np.arange(count)],
        schema=store_module.ROWS,
    )

    bad = BadRows("a.csv", "line", 0)

    def sort() -> None:
        with EventStore(tmp_path / "shop") as store:
            store.add(batch, bad)
            store.flush(bad)
            store.select(None)
            list(store.parts(np.zeros(1, np.int32)))

    with pytest.raises(DomainError, match=r"shop: the rows .*; nothing was changed\. .* try again\.$") as error:
        sort()
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_may_not_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DomainError, match="permissions"), EventStore(Path("/proc/no/shop")):
        pass


def test_nothing_is_fetched_from_the_network(tmp_path: Path) -> None:
    with EventStore(tmp_path / "shop") as store:
        for name in ("autoinstall_known_extensions", "autoload_known_extensions"):
            assert store_module.SETTINGS[name] is False
        with pytest.raises(duckdb.Error):
            store._database.execute("SELECT * FROM read_csv('https://example.com/a.csv')")


def test_scratch_folders_lie_beside_the_nearest_parent_that_exists(tmp_path: Path) -> None:
    with scratch_folder(tmp_path / "a" / "b" / "shop") as folder:
        assert folder.parent == tmp_path
    assert not list(tmp_path.iterdir())
