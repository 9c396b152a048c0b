"""Settings and bad rows of imports."""

from pathlib import Path

import pyarrow as pa
import pytest

from fedmerge.domain.importers.bad_rows import BadRows, reason_text
from fedmerge.domain.importers.events import ImportSettings, prepare
from fedmerge.errors import ConfigError, DomainError


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


def test_many_bad_rows_at_once_count_as_one_by_one() -> None:
    reports = []
    for at_once in (False, True):
        bad = BadRows("a.csv", "row", 0.99)
        numbers = [5, 9, *range(2000, 5000)]
        if at_once:
            bad.add_many(pa.array(numbers), "no user")
            bad.add_many(pa.array([7]), "no item")  # an earlier row of another reason is not the end
            bad.add_many(pa.array([], pa.int64()), "no time")
        else:
            for number in numbers:
                bad.add(number, "no user")
            bad.add(7, "no item")
        reports.append(bad.report(100))
    assert reports[0] == reports[1]
    assert [reason.first for reason in reports[0].bad] == [(5, 9, 2000, 2001, 2002), (7,)]
