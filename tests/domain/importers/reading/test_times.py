"""Times of any format are sorted as the moments they mean; two formats in one column are noticed by name."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pytest
from source_tables import import_by_command, sequences

from fedmerge.domain.importers.bad_rows import BadRows
from fedmerge.domain.importers.reading.times import COMMON, Times
from fedmerge.errors import DomainError

Capture = pytest.CaptureFixture[str]
MOMENTS = [datetime(2024, 3, 2, 10, 30, tzinfo=UTC) + timedelta(days=days, seconds=days) for days in (30, 0, -29, 11)]
ORDER = ["i2", "i1", "i3", "i0"]  # of MOMENTS


def write(folder: Path, times: list[str]) -> tuple[Path, Path]:
    rows, items = folder / "rows.csv", folder / "items.csv"
    rows.write_text("user_id;item_id;timestamp\n" + "".join(f"ann;i{at};{time}\n" for at, time in enumerate(times)))
    items.write_text("item_id,title\n" + "".join(f"i{at},Item {at}\n" for at in range(len(times))))
    return rows, items


def excel(moment: datetime) -> float:
    return (moment - datetime(1899, 12, 30, tzinfo=UTC)) / timedelta(days=1)


def seconds(moment: datetime) -> int:
    return int(moment.timestamp())


@pytest.mark.parametrize(
    "times",
    [
        [str(seconds(m)) for m in MOMENTS],
        [f"{seconds(m)}.0" for m in MOMENTS],
        [f"{seconds(m)}000" for m in MOMENTS],
        [f"{seconds(m)}000000.0" for m in MOMENTS],  # pandas: a column of microseconds with gaps
        [f"{seconds(m)}000000000" for m in MOMENTS],
        [f"{seconds(m)}000000000.0" for m in MOMENTS],
        [f"{m.timestamp() * 1e3:.6E}" for m in MOMENTS],
        [repr(excel(m)) for m in MOMENTS],
        [m.strftime("%Y%m%d%H%M%S") for m in MOMENTS],
        [m.isoformat() for m in MOMENTS],
        [m.strftime("%Y-%m-%d %H:%M:%S.%f") for m in MOMENTS],
        [m.strftime("%d/%m/%Y %H:%M") for m in MOMENTS],
        [m.strftime("%m/%d/%Y %I:%M:%S %p") for m in MOMENTS],
        [m.strftime("%d.%m.%Y") for m in MOMENTS],
        [m.strftime("%a, %d %b %Y %H:%M:%S GMT") for m in MOMENTS],
        [m.strftime("%d/%b/%Y:%H:%M:%S +0000") for m in MOMENTS],
        [m.strftime("%m %d, %Y") for m in MOMENTS],
    ],
)
def test_common_formats_are_recognised(tmp_path: Path, times: list[str]) -> None:
    assert import_by_command(tmp_path / "shop", *write(tmp_path, times)) == 0
    assert sequences(tmp_path / "shop") == {"ann": ORDER}


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([1700000000, 1700000001, 1700000002000], "the time is in milliseconds, while most are in seconds"),
        ([1700000000000, 1700000001000, 1700000002], "the time is in seconds, while most are in milliseconds"),
        (["1700000000.5", "1700000001", "45000.5"], "in days as Excel counts them, while most are in seconds"),
        (["1700000000", "1700000001", "20240131"], "in the form %Y%m%d, while most are in seconds"),
        (["1700000000", "1700000001", "2024-01-31"], "the time is an ISO 8601 time, while most are numbers"),
        (["2024-01-31", "2024-02-01T10:00:00Z", "1700000000"], "the time is a number, while most are ISO 8601 times"),
        (["31/01/2024", "01/02/2024", "1700000000"], "the time is a number, while most are dates"),
        (["2024-01-31", "2024-02-01", "2024-02-30"], "the time is not an ISO 8601 time"),
        (["31/01/2024", "28/02/2024", "31/02/2024"], "the time is not of the format '%d/%m/%Y'"),
    ],
)
def test_a_row_of_another_format_or_unit_is_named_and_never_sorted(
    tmp_path: Path, capsys: Capture, times: list[int | str], message: str
) -> None:
    tables = write(tmp_path, list(map(str, times)))
    assert import_by_command(tmp_path / "shop", *tables) == 1
    assert f"{message}" in capsys.readouterr().err
    assert import_by_command(tmp_path / "shop", *tables, "--max-bad-share", "0.5") == 0
    captured = capsys.readouterr()
    assert "(1: line 4)" in captured.out
    assert "WARNING: 33 % of the rows of" in captured.err
    assert sequences(tmp_path / "shop") == {"ann": ["i0", "i1"]}


@pytest.mark.parametrize(
    ("formats", "times"),
    [
        (("s", "ms"), [f"{seconds(m)}{'000' * (at % 2)}" for at, m in enumerate(MOMENTS)]),
        (("s", "excel"), [repr(excel(m)) if at % 2 else str(seconds(m)) for at, m in enumerate(MOMENTS)]),
        (("iso", "us"), [m.isoformat() if at % 2 else f"{seconds(m)}000000" for at, m in enumerate(MOMENTS)]),
        (
            ("%d %m %y", "%Y-%m-%d"),
            [m.strftime("%d %m %y" if at % 2 else "%Y-%m-%d") for at, m in enumerate(MOMENTS)],
        ),
        (("%m/%d/%Y",), [m.strftime("%m/%d/%Y") for m in MOMENTS]),
        (("%Y-%m-%dT%H:%M:%S%z",), [m.strftime("%Y-%m-%dT%H:%M:%S+0000") for m in MOMENTS]),
    ],
)
def test_named_formats_are_read_value_by_value(tmp_path: Path, formats: tuple[str, ...], times: list[str]) -> None:
    options = [word for name in formats for word in ("--time-format", name)]
    assert import_by_command(tmp_path / "shop", *write(tmp_path, times), *options) == 0
    assert sequences(tmp_path / "shop") == {"ann": ORDER}


def test_numbers_of_an_own_unit_are_only_ordered(tmp_path: Path) -> None:
    tables = write(tmp_path, ["400000000000", "1700000000", "-5.5", "7"])  # such as milliseconds since a start
    assert import_by_command(tmp_path / "shop", *tables, "--time-format", "number") == 0
    assert sequences(tmp_path / "shop") == {"ann": ["i2", "i3", "i1", "i0"]}


def test_day_and_month_are_not_guessed(tmp_path: Path, capsys: Capture) -> None:
    tables = write(tmp_path, ["03/02/2024", "01/03/2024"])
    assert import_by_command(tmp_path / "shop", *tables) == 1
    assert "fit '%d/%m/%Y' and '%m/%d/%Y' alike" in capsys.readouterr().err
    for form, order in (("%d/%m/%Y", ["i0", "i1"]), ("%m/%d/%Y", ["i1", "i0"])):
        assert import_by_command(tmp_path / "shop", *tables, "--time-format", form, "--overwrite") == 0
        assert sequences(tmp_path / "shop") == {"ann": order}


def read(column: pa.Array, *formats: str) -> list[int | None]:
    bad = BadRows("t", "row", 1)
    numbers = pa.array(range(len(column)), pa.int64())
    found: list[int | None] = Times(bad, formats).read(column, numbers, pa.repeat(True, len(column))).to_pylist()
    assert bad.count == found.count(None)
    return found


@pytest.mark.parametrize("pattern", [pattern for pattern in COMMON if "GMT" not in pattern])
def test_every_common_pattern_is_read_as_python_reads_it(pattern: str) -> None:
    texts = [m.strftime(pattern) for m in MOMENTS]
    expected = [datetime.strptime(text, pattern).replace(tzinfo=UTC) for text in texts]
    assert read(pa.array(texts), pattern) == [seconds(moment) * 1_000_000 for moment in expected]


def test_typed_columns_keep_their_resolution() -> None:
    moments = pa.array([3, 1, 2, None], pa.timestamp("ns"))
    assert read(moments) == [3, 1, 2, None]
    assert read(moments.dictionary_encode()) == [3, 1, 2, None]
    assert read(pa.array([1, 2], pa.date32())) == [86_400_000_000, 172_800_000_000]
    assert read(pa.array([1.5, float("nan"), None])) == [1_500_000, None, None]
    assert read(pa.array(["0.5", "1.5"]).cast(pa.decimal128(9, 2))) == [500_000, 1_500_000]
    assert read(pa.array([1_700_000_000_000_000_001, 1_700_000_000_000_000_000])) == [
        1_700_000_000_000_000_001,
        1_700_000_000_000_000_000,
    ]


def test_zones_and_fractions_of_iso_times_count() -> None:
    texts = ["1970-01-01T01:00:00+01:00", "1970-01-01", "1970-01-01 00:00:00.000001", "1970-01-01T00:00:00.5Z", "soon"]
    assert read(pa.array(texts)) == [0, 0, 1, 500_000, None]


def test_no_readable_time_is_an_error() -> None:
    with pytest.raises(DomainError, match="none of the first 2 rows has a readable time"):
        read(pa.array(["soon", None]))
