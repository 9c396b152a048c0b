"""From rows to a domain: the k-core against an oracle, repeats, the order in time, and early errors."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmerge.domain.importers.bad_rows import BadRows, reason_text
from fedmerge.domain.importers.events import (
    OUTSIDE_CORE,
    REPEATED,
    EventLog,
    Events,
    ImportSettings,
    k_core,
    prepare,
    select,
    to_interactions,
    without_repeats,
)
from fedmerge.errors import ConfigError, DomainError

Triples = list[tuple[int, int, int]]

rows_of_a_small_world = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7), st.integers(0, 2)), max_size=60)


def events_of(rows: Triples) -> Events:
    users, items, times = zip(*rows, strict=True) if rows else ((), (), ())
    return Events(np.array(users, np.int32), np.array(items, np.int32), np.array(times, np.int64))


def rows_of(events: Events) -> Triples:
    return list(zip(events.users.tolist(), events.items.tolist(), events.times.tolist(), strict=True))


def slow_core(rows: Triples, k: int) -> Triples:
    """Drop one row at a time while a user or an item has fewer than k."""
    rows = list(rows)
    while True:
        users, items = Counter(row[0] for row in rows), Counter(row[1] for row in rows)
        weak = [row for row in rows if users[row[0]] < k or items[row[1]] < k]
        if not weak:
            return rows
        rows.remove(weak[0])


def test_k_core_cascade_by_hand() -> None:
    # item 3 has one row; without it user 2 has one; without that item 2 has one; user 1 still has two
    square = [(0, 0, 1), (0, 1, 2), (1, 0, 3), (1, 1, 4)]
    tail = [(1, 2, 5), (2, 2, 6), (2, 3, 7)]
    core = k_core(events_of([*tail, *square]), 2)
    assert rows_of(core) == square
    assert core.dropped == {OUTSIDE_CORE: 3}
    assert rows_of(k_core(events_of([*tail, *square]), 1)) == [*tail, *square]
    assert rows_of(k_core(events_of([*tail, *square]), None)) == [*tail, *square]
    assert rows_of(k_core(events_of([*tail, *square]), 3)) == []


@given(rows_of_a_small_world, st.integers(1, 4))
def test_k_core_matches_the_oracle(rows: Triples, k: int) -> None:
    core = k_core(events_of(rows), k)
    assert Counter(rows_of(core)) == Counter(slow_core(rows, k))
    assert len(rows) == len(core) + sum(core.dropped.values())


@given(rows_of_a_small_world, st.integers(1, 4))
def test_taking_the_core_first_changes_nothing(rows: Triples, k: int) -> None:
    assert rows_of(select(events_of(rows), k)) == rows_of(k_core(without_repeats(events_of(rows)), k))


@given(rows_of_a_small_world, st.integers(1, 4), st.sets(st.integers(0, 7)))
def test_items_may_be_excluded_before_or_after_the_core(rows: Triples, k: int, gone: set[int]) -> None:
    before = k_core(events_of([row for row in rows if row[1] not in gone]), k)
    core = k_core(events_of(rows), k)
    after = k_core(core.keep(~np.isin(core.items, list(gone)), "gone"), k)
    assert rows_of(after) == rows_of(before)


def test_a_repeat_equals_an_earlier_row_in_user_item_and_time() -> None:
    rows = [(1, 5, 9), (0, 5, 9), (1, 5, 9), (1, 5, 8), (1, 6, 9), (1, 5, 9)]
    single = without_repeats(events_of(rows))
    assert rows_of(single) == [(1, 5, 9), (0, 5, 9), (1, 5, 8), (1, 6, 9)]
    assert single.dropped == {REPEATED: 2}
    assert rows_of(without_repeats(events_of([]))) == []


def test_repeats_do_not_count_towards_the_core() -> None:
    assert rows_of(select(events_of([(0, 0, 1), (0, 0, 1)]), 2)) == []
    assert rows_of(select(events_of([(0, 0, 1), (0, 0, 2)]), 2)) == [(0, 0, 1), (0, 0, 2)]


def test_items_are_in_time_order_and_ties_in_the_order_of_the_file() -> None:
    rows = [(2, 10, 5), (0, 11, 7), (2, 12, -3), (2, 13, 5), (0, 14, 7), (2, 15, 5), (0, 16, 6)]
    index = np.full(20, -1, np.int32)
    index[[10, 11, 12, 13, 14, 15, 16]] = range(7)
    interactions = to_interactions(events_of(rows), ["ann", "nobody", "cy"], index)
    assert interactions.user_ids == ("ann", "cy")
    assert interactions.sequence(0).tolist() == [6, 1, 4]
    assert interactions.sequence(1).tolist() == [2, 0, 3, 5]


@given(rows_of_a_small_world.filter(bool))
def test_sequences_match_a_plain_sort(rows: Triples) -> None:
    interactions = to_interactions(events_of(rows), [f"u{user}" for user in range(8)], np.arange(8, dtype=np.int32))
    expected = {f"u{user}": [i for u, i, _ in sorted(rows, key=lambda row: row[2]) if u == user] for user in range(8)}
    found = {user: interactions.sequence(n).tolist() for n, user in enumerate(interactions.user_ids)}
    assert found == {user: items for user, items in expected.items() if items}


def test_the_log_numbers_ids_in_order_and_adds_nothing_on_overflow() -> None:
    log = EventLog()
    log.add("b", "x", 2)
    log.add("a", "x", 1)
    with pytest.raises(OverflowError):
        log.add("c", "y", 2**63)
    log.add("b", "y", -(2**63))
    log.drop_low_rating()
    assert (log.users, log.items, log.num_good) == ({"b": 0, "a": 1}, {"x": 0, "y": 1}, 4)
    events = log.take()
    assert rows_of(events) == [(0, 0, 2), (1, 0, 1), (0, 1, -(2**63))]
    assert sum(events.dropped.values()) == 1
    assert rows_of(log.take()) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k_core": 0}, "k_core .*0.* 1"),
        ({"max_bad_share": 1.5}, r"max_bad_share .*1\.5.* 0 to 1"),
        ({"max_bad_share": float("nan")}, "max_bad_share .*nan"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ImportSettings(**settings)  # type: ignore[arg-type]


def test_an_unwritable_target_is_refused_before_reading(tmp_path: Path) -> None:
    with pytest.raises(DomainError, match=r"'\.x'"):
        prepare(tmp_path, ImportSettings(), ".x")
    (tmp_path / "toys").write_text("")
    with pytest.raises(DomainError, match=f"{tmp_path}/toys: "):
        prepare(tmp_path, ImportSettings(), "toys")
    assert prepare(tmp_path, ImportSettings(name="books"), "toys") == tmp_path / "books"


# Bad rows


def test_bad_rows_are_counted_by_reason_with_their_first_lines() -> None:
    bad = BadRows("a.csv", "line", 0.5)
    for number in (3, 5, 8, 9, 11, 12, 20):
        bad.add(number, "no user")
    bad.add(4, "not CSV: odd", 3)
    report = bad.report(num_good=10)
    assert (report.num_rows, report.num_bad) == (20, 10)
    assert [reason_text(reason, report.unit) for reason in report.bad] == [
        "no user (7: lines 3, 5, 8, 9, 11, …)",
        "not CSV: odd (3: lines 4, …)",
    ]


def test_too_many_bad_rows_are_refused_with_reasons() -> None:
    bad = BadRows("a.csv", "line", 0.01)
    bad.add(7, "no user")
    assert bad.report(99).num_bad == 1
    with pytest.raises(DomainError, match=r"a\.csv: 1 of the 99 rows.* 1 %.*no user \(1: line 7\)"):
        bad.report(98)


def test_reading_stops_if_the_first_1000_rows_are_bad() -> None:
    bad = BadRows("a.csv", "line", 0.5)
    for number in range(2, 1001):
        bad.add(number, "no user")
    with pytest.raises(DomainError, match="1000 of the 1000 rows"):
        bad.add(1001, "no user")
    tolerant = BadRows("a.csv", "line", 1)
    for number in range(2, 5000):
        tolerant.add(number, "no user")
    assert tolerant.report(0).num_bad == 4998
