"""CSV and Parquet imports: content, bad rows by line and reason, defects of files, and no partial results."""

import gzip
import re
from collections.abc import Callable
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_tables import bad_rows, sequences

from fedmerge.domain.catalog import load_catalog
from fedmerge.domain.importers.events import LOW_RATING, ImportSettings
from fedmerge.domain.importers.reading.table import FileOptions
from fedmerge.domain.importers.store import OF_SHORT_USERS, OUTSIDE_CORE, REPEATED
from fedmerge.domain.importers.table import Columns, Reading, import_table
from fedmerge.errors import ConfigError, DomainError

INTERACTIONS = """\
user_id,item_id,timestamp,rating
ann,i2,30,5
bob,i1,10,4
ann,i1,20,1
ann,i2,20,5
bob,i1,10,3
bob,i3,10,4.5
"""
CATALOG = (
    "item_id,title,brand,category\n"
    'i1,"One, ""the first""",Acme,\n'
    "i2,  Two\twords ,,Toys\n"
    "i3,Three,,\n"
    'i4,"Two\nlines",,\n'
)


def write_tables(tmp_path: Path, interactions: str = INTERACTIONS, catalog: str = CATALOG) -> tuple[Path, Path]:
    folder = tmp_path / "shop"
    folder.mkdir(exist_ok=True)
    (folder / "rows.csv").write_text(interactions, encoding="utf-8")
    (folder / "items.csv").write_text(catalog, encoding="utf-8")
    return folder / "rows.csv", folder / "items.csv"


def test_two_small_tables_are_imported_as_by_hand(tmp_path: Path) -> None:
    report = import_table(*write_tables(tmp_path), tmp_path / "domains")
    manifest = report.manifest
    assert (manifest.name, manifest.num_users, manifest.num_items, manifest.num_interactions) == ("shop", 2, 4, 5)
    assert (manifest.public_catalog, manifest.catalog_source) == (False, "given")
    assert not manifest.synthetic
    assert manifest.source == "CSV tables 'rows.csv' and 'items.csv'"
    assert report.dropped == {REPEATED: 1}
    assert [(file.num_rows, file.bad) for file in report.files] == [(6, ()), (4, ())]
    catalog = load_catalog(tmp_path / "domains" / "shop")
    assert catalog.item_ids == ("i1", "i2", "i3", "i4")  # the whole catalog, with items without interactions
    assert catalog.attributes["title"] == ('One, "the first"', "Two words", "Three", "Two lines")
    assert catalog.attributes["brand"] == ("Acme", "", "", "")
    # by time, ties in the order of the file; bob's second i1 at time 10 is the same interaction
    assert sequences(tmp_path / "domains" / "shop") == {"ann": ["i1", "i2", "i2"], "bob": ["i1", "i3"]}


def test_an_import_is_repeatable_and_replaces_only_with_overwrite(tmp_path: Path) -> None:
    tables = write_tables(tmp_path)
    first = import_table(*tables, tmp_path / "domains").manifest
    with pytest.raises(DomainError, match="domains/shop: "):
        import_table(tables[0], tmp_path / "gone.csv", tmp_path / "domains")  # refused before the catalog is read
    assert import_table(*tables, tmp_path / "domains", settings=ImportSettings(overwrite=True)).manifest == first
    other = import_table(*tables, tmp_path / "domains", settings=ImportSettings(name="b", public_catalog=True)).manifest
    assert (other.name, other.public_catalog) == ("b", True)
    assert (other.catalog_sha256, other.interactions_sha256) == (first.catalog_sha256, first.interactions_sha256)


def test_columns_delimiter_encoding_and_compression_can_be_set(tmp_path: Path) -> None:
    rows, items = tmp_path / "rows.tsv.gz", tmp_path / "items.tsv"
    rows.write_bytes(gzip.compress(b"extra\twhen\twho\twhat\r\nx\t2\tann\tA\r\n\r\nx\t1\tann\tB\r\n"))
    items.write_bytes("sku\tname\nA\tCafé\nB\tThé\n".encode("latin-1"))
    columns = Columns(user="who", item="what", time="when", catalog_item="sku", title="name")
    reading = Reading(FileOptions(delimiter="\t"), FileOptions(encoding="latin-1"))
    report = import_table(rows, items, tmp_path / "d", columns, ImportSettings(name="x"), reading)
    assert report.files[0].num_rows == 2
    assert sequences(tmp_path / "d" / "x") == {"ann": ["B", "A"]}
    attributes = load_catalog(tmp_path / "d" / "x").attributes
    assert attributes == {"title": ("Café", "Thé"), "brand": ("", ""), "category": ("", "")}


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    tables = write_tables(tmp_path, "\ufeff" + INTERACTIONS, "\ufeff" + CATALOG)
    assert import_table(*tables, tmp_path / "domains").manifest.num_interactions == 5


def test_min_rating_and_k_core_select_rows(tmp_path: Path) -> None:
    tables = write_tables(tmp_path)
    columns = Columns(rating="rating")
    report = import_table(*tables, tmp_path / "d", columns, ImportSettings(name="rated", min_rating=4))
    assert report.dropped == {LOW_RATING: 2}
    assert sequences(tmp_path / "d" / "rated") == {"ann": ["i2", "i2"], "bob": ["i1", "i3"]}
    report = import_table(*tables, tmp_path / "d", columns, ImportSettings(name="core", k_core=2))
    # i3 has one row; without repeats bob then has one row left, and then i1; ann and i2 stay
    assert report.dropped == {OUTSIDE_CORE: 3, REPEATED: 1}
    assert sequences(tmp_path / "d" / "core") == {"ann": ["i2", "i2"]}
    assert load_catalog(tmp_path / "d" / "core").item_ids == ("i2",)  # only items of the core
    assert report.manifest.catalog_source == "interactions"


def test_after_a_k_core_one_user_decides_which_items_exist_unless_all_are_kept(tmp_path: Path) -> None:
    """Two data sets that differ by the user zoe: with all items kept, nothing else of the domain differs."""
    without = "user_id,item_id,timestamp\nann,i1,1\nann,i2,2\nbob,i1,1\nbob,i3,2\nbob,i2,3\ncy,i2,1\n"
    found: dict[bool, list[tuple[str, ...]]] = {}
    for keep_all_items in (False, True):
        settings = ImportSettings(k_core=2, keep_all_items=keep_all_items)
        for name, text in (("without", without), ("with", f"{without}zoe,i3,1\nzoe,i1,2\n")):
            place = tmp_path / f"{name}-{keep_all_items}"
            place.mkdir()
            report = import_table(*write_tables(place, text), place / "domains", settings=settings)
            folder = place / "domains" / report.manifest.name
            found.setdefault(keep_all_items, []).append(load_catalog(folder).item_ids)
            assert report.manifest.catalog_source == ("given" if keep_all_items else "interactions")
            if keep_all_items:
                kept = sequences(folder)
                assert kept.pop("zoe", ["i3", "i1"]) == ["i3", "i1"]
                assert kept == {"ann": ["i1", "i2"], "bob": ["i1", "i3", "i2"]}  # i3 and i4 stay, whatever zoe does
                assert report.dropped == {OF_SHORT_USERS: 1}
    assert found[False] == [("i1", "i2"), ("i1", "i2", "i3")]
    assert len({*found[True]}) == 1


@pytest.mark.parametrize(
    "times",
    [
        ("9", "10", "8"),
        ("-2", "1e1", "-2.5"),
        ("1500000000.25", "1500000000.5", "1500000000"),
        ("2024-01-31", "2024-02-01", "2023-12-31"),
        ("2024-01-31T10:00:00Z", "2024-01-31T09:30:00-01:00", "2024-01-31 09:59:59.5"),
        ("1700000000000000001", "1700000000000000002", "1700000000000000000"),
    ],
    ids=["whole", "decimal", "some decimal", "dates", "zones", "nanoseconds"],
)
def test_times_are_numbers_or_iso(tmp_path: Path, times: tuple[str, str, str]) -> None:
    lines = ["user_id,item_id,timestamp", *(f"ann,i{n},{time}" for n, time in enumerate(times, 1))]
    import_table(*write_tables(tmp_path, "\n".join(lines)), tmp_path / "domains")
    assert sequences(tmp_path / "domains" / "shop") == {"ann": ["i3", "i1", "i2"]}


def test_bad_rows_are_reported_with_line_and_reason(tmp_path: Path) -> None:
    interactions = (
        INTERACTIONS
        + ",i1,5,1\n"  # 8
        + "cy,,5,1\n"
        + "cy,i9,5,1\n"  # 10
        + "cy,i1,soon,1\n"
        + "cy,i1,5:30,1\n"
        + "cy,i1,,1\n"
        + "cy,i1,99999999999999999999,1\n"
        + "cy,i1,5\n"  # 15
        + "\n"
        + 'cy,"i"1,5,1\n'
        + "cy,i1,5,good\n"
        + "cy,i1,5,nan\n"
        + "cy,i1,5,5\n"  # 20
        + 'cy,"i1,5,5\nnext,i1,5,5\n'
    )
    catalog = CATALOG + ",No id,,\ni1,Again,,\ni5,short\n"
    settings = ImportSettings(max_bad_share=0.8, min_rating=0)
    report = import_table(
        *write_tables(tmp_path, interactions, catalog), tmp_path / "d", Columns(rating="rating"), settings
    )
    assert bad_rows(report) == {
        "the time is not a number": (3, (11, 12, 13)),
        "the rating is not a number": (2, (18, 19)),
        "not CSV: unexpected end of data": (1, (21,)),  # the next line is read again
        "no user": (1, (8,)),
        "no item": (1, (9,)),
        "the item is not in the catalog": (1, (10,)),
        "the time is out of range": (1, (14,)),
        "the number of columns differs from the header": (1, (15,)),
        "not CSV: ',' expected after '\"'": (1, (17,)),
    }
    assert (report.files[0].num_rows, report.files[0].num_bad) == (20, 12)
    assert bad_rows(report, 1) == {
        "no item": (1, (7,)),  # i4 takes lines 5 and 6
        "the item has a row already": (1, (8,)),
        "the number of columns differs from the header": (1, (9,)),
    }
    assert sequences(tmp_path / "d" / "shop")["cy"] == sequences(tmp_path / "d" / "shop")["next"] == ["i1"]
    kept = report.manifest.num_interactions
    assert kept + sum(report.dropped.values()) + report.files[0].num_bad == report.files[0].num_rows


Change = Callable[[Path, Path], object]
TRUNCATED = gzip.compress(INTERACTIONS.encode() * 50)[:-20]


def put(text: str | bytes) -> Change:
    data = text if isinstance(text, bytes) else text.encode()
    return lambda rows, items: rows.write_bytes(data)


def put_catalog(text: str | bytes) -> Change:
    data = text if isinstance(text, bytes) else text.encode()
    return lambda rows, items: items.write_bytes(data)


def make_folder(rows: Path, items: Path) -> None:
    rows.unlink()
    rows.mkdir()


DEFECTS: dict[str, tuple[str, Change, str]] = {
    "no file": ("rows", lambda rows, items: rows.unlink(), r"rows\.csv"),
    "a folder": ("rows", make_folder, "directory"),
    "empty": ("rows", put(""), r"rows\.csv"),
    "empty gzip": ("rows", put(gzip.compress(b"")), r"rows\.csv"),
    "truncated gzip": ("rows", put(TRUNCATED), r"line \d+"),
    "damaged gzip": ("rows", put(TRUNCATED[:40] + b"\0\0\0\0" + TRUNCATED[44:]), r"line \d+"),
    "zip": ("rows", put(b"PK\x03\x04rest"), "zip"),
    "japanese": ("items", put_catalog("item_id,title\ni1,こんにちは\n".encode("shift-jis")), "line 2 .*utf-8"),
    "cut utf-16": ("rows", put(INTERACTIONS.encode("utf-16")[:-1]), "line 7 .*utf-16"),
    "other delimiter": (
        "rows",
        put(INTERACTIONS.replace(",", "~")),
        r"'user_id~item_id~timestamp~rating'.*'user_id', 'item_id', 'timestamp'.*delimiter",
    ),
    "missing column": ("rows", put("user_id,item,timestamp\n"), "'user_id', 'item', 'timestamp'.*'item_id'"),
    "a name twice": ("rows", put("user_id,item_id,user_id\n"), "'user_id'"),
    "a broken header": ("rows", put('"user_id,item_id\n'), "line 1"),
    "only a header": ("rows", put("user_id,item_id,timestamp\n"), "0 rows.* 0 bad"),
    "no time": (
        "rows",
        put("user_id,item_id,timestamp\nann,i1,soon\nann,i2,\n"),
        " 2 rows.* line 2; expected .*a number, an ISO 8601 time",
    ),
    "bad rows": ("rows", put(INTERACTIONS + "cy,i9,5,1\n"), r"1 of the 7 rows.* 1 %.*\(1: line 8\)"),
    "bad catalog": ("items", put_catalog(CATALOG + "i1,Again,,\n"), r"1 of the 5 rows.*\(1: line 7\)"),
    "no attribute": ("items", put_catalog("item_id,name\ni1,x\n"), "item_id, name, .*title, brand and category"),
    "no items": ("items", put_catalog("item_id,title\n"), r"items\.csv"),
    "no item column": ("items", put_catalog("sku,title\ni1,x\n"), "'sku', 'title'.*'item_id'"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_an_error_with_file_and_values_and_writes_nothing(tmp_path: Path, defect: str) -> None:
    stem, change, message = DEFECTS[defect]
    rows, items = write_tables(tmp_path)
    change(rows, items)
    with pytest.raises(DomainError, match=message) as error:
        import_table(rows, items, tmp_path / "domains")
    assert str(error.value).startswith(str(rows if stem == "rows" else items))
    assert not re.search(r"\b(ann|bob|cy)\b", str(error.value))
    assert not (tmp_path / "domains").exists()


def test_a_failed_import_keeps_the_existing_domain(tmp_path: Path) -> None:
    rows, items = write_tables(tmp_path)
    import_table(rows, items, tmp_path / "domains")
    before = {path.name: path.read_bytes() for path in (tmp_path / "domains" / "shop").iterdir()}
    rows.write_bytes(TRUNCATED)
    with pytest.raises(DomainError, match=r"rows\.csv: .*line \d+"):
        import_table(rows, items, tmp_path / "domains", settings=ImportSettings(overwrite=True))
    assert {path.name: path.read_bytes() for path in (tmp_path / "domains" / "shop").iterdir()} == before
    assert [path.name for path in (tmp_path / "domains").iterdir()] == ["shop"]


def test_invalid_options_are_refused(tmp_path: Path) -> None:
    tables = write_tables(tmp_path)
    with pytest.raises(ConfigError, match=r"min_rating .* 4"):
        import_table(*tables, tmp_path / "d", settings=ImportSettings(min_rating=4))
    with pytest.raises(DomainError, match=r"rows\.csv: .*'::'"):
        import_table(*tables, tmp_path / "d", reading=Reading(FileOptions(delimiter="::")))
    with pytest.raises(DomainError, match=r"items\.csv: .*'utf-42'"):
        import_table(*tables, tmp_path / "d", reading=Reading(catalog=FileOptions(encoding="utf-42")))
    with pytest.raises(ConfigError, match="'days'"):
        import_table(*tables, tmp_path / "d", reading=Reading(time_formats=("days",)))
    with pytest.raises(DomainError, match=r"items\.csv: .*'brandname'"):
        import_table(*tables, tmp_path / "d", Columns(brand="brandname"))


def test_an_endless_line_does_not_exhaust_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmerge.domain.importers.source_files.MAX_LINE_BYTES", 1 << 20)
    tables = write_tables(tmp_path, INTERACTIONS + "x" * (1 << 20))
    with pytest.raises(DomainError, match=r"rows\.csv: line 8 .* 1 MiB"):
        import_table(*tables, tmp_path / "d")


def test_progress_is_reported(tmp_path: Path) -> None:
    calls: list[tuple[str, int, float]] = []
    lines = ["user_id,item_id,timestamp", *(f"u{n},i1,{n}" for n in range(40_000))]
    tables = write_tables(tmp_path, "\n".join(lines))
    settings = ImportSettings(progress=lambda *state: calls.append(state))
    assert import_table(*tables, tmp_path / "d", settings=settings).manifest.num_users == 40_000
    assert [(file, rows) for file, rows, _ in calls] == [(str(tables[0]), 40_000), (str(tables[1]), 6)]
    assert all(0 < share <= 1 for _, _, share in calls)


# Parquet


def write_parquet(
    tmp_path: Path, interactions: dict[str, Any], catalog: dict[str, Any] | None = None
) -> tuple[Path, Path]:
    folder = tmp_path / "shop"
    folder.mkdir(exist_ok=True)
    catalog = {"item_id": [1, 2, 3], "title": ["One", "Two", None]} if catalog is None else catalog
    pq.write_table(pa.table(interactions), folder / "rows.parquet")
    pq.write_table(pa.table(catalog), folder / "items.parquet")
    return folder / "rows.parquet", folder / "items.parquet"


TIME_COLUMNS: dict[str, Any] = {
    "int": [3, 1, 2, 2],
    "float": [0.3, 0.1, 0.2, 0.2],
    "text": ["2024-01-03", "2024-01-01", "2024-01-02", "2024-01-02"],
    "date": [date(2024, 1, 3), date(2024, 1, 1), date(2024, 1, 2), date(2024, 1, 2)],
    "nanoseconds": pa.array([3, 1, 2, 2], pa.timestamp("ns")),
    "zone": [datetime(2024, 1, day, tzinfo=UTC) for day in (3, 1, 2, 2)],
}


@pytest.mark.parametrize("kind", TIME_COLUMNS)
def test_parquet_tables_are_imported_as_by_hand(tmp_path: Path, kind: str) -> None:
    users = pa.array(["ann", "bob", "ann", "ann"]).dictionary_encode()
    tables = write_parquet(tmp_path, {"user_id": users, "item_id": [1, 1, 3, 2], "timestamp": TIME_COLUMNS[kind]})
    report = import_table(*tables, tmp_path / "domains")
    assert report.manifest.source == "Parquet tables 'rows.parquet' and 'items.parquet'"
    assert sequences(tmp_path / "domains" / "shop") == {"ann": ["3", "2", "1"], "bob": ["1"]}
    assert load_catalog(tmp_path / "domains" / "shop").attributes["title"] == ("One", "Two", "")


def test_csv_and_parquet_give_the_same_domain(tmp_path: Path) -> None:
    lines = [line.split(",") for line in INTERACTIONS.splitlines()]
    rows = {name: [line[n] for line in lines[1:]] for n, name in enumerate(lines[0])}
    texts = ['One, "the first"', "Two words", "Three", "Two lines"]
    items = {"item_id": ["i1", "i2", "i3", "i4"], "title": texts, "brand": ["Acme", "", "", ""], "category": [""] * 4}
    items["category"][1] = "Toys"
    parquet = import_table(*write_parquet(tmp_path, rows, items), tmp_path / "p").manifest
    text = import_table(*write_tables(tmp_path), tmp_path / "c").manifest
    assert parquet.catalog_sha256 == text.catalog_sha256
    assert parquet.interactions_sha256 == text.interactions_sha256


def test_bad_rows_of_parquet_are_reported_with_row_and_reason(tmp_path: Path) -> None:
    rows = {"user_id": [7.0, None, 8.0, 7.0, 7.5], "item_id": [1, 2, None, 9, 1], "timestamp": [1, 2, 3, 4, 5]}
    report = import_table(*write_parquet(tmp_path, rows), tmp_path / "d", settings=ImportSettings(max_bad_share=0.9))
    assert report.files[0].unit == "row"
    assert bad_rows(report) == {
        "no user": (2, (1, 4)),
        "no item": (1, (2,)),
        "the item is not in the catalog": (1, (3,)),
    }
    assert sequences(tmp_path / "d" / "shop") == {"7": ["1"]}  # pandas stores whole numbers with gaps as floats


GOOD = {"user_id": ["a"], "item_id": [1], "timestamp": [1]}


@pytest.mark.parametrize(
    ("rows", "change", "message"),
    [
        (GOOD, lambda path: path.unlink(), "rows.parquet: "),
        (GOOD, lambda path: path.write_bytes(b""), "rows.parquet: .*Parquet"),
        (GOOD, lambda path: path.write_text(INTERACTIONS), "rows.parquet: .*Parquet"),
        (GOOD, lambda path: path.write_bytes(path.read_bytes()[:-9]), "rows.parquet: .*Parquet"),
        ({"user_id": ["a"], "item_id": [1]}, lambda path: None, "'user_id', 'item_id'.*'timestamp'"),
        ({**GOOD, "item_id": [[1]]}, lambda path: None, "'item_id' .*list<.*>"),
        ({**GOOD, "timestamp": [True]}, lambda path: None, "'timestamp' .*bool"),
    ],
    ids=["no file", "empty", "text", "truncated", "no column", "list", "boolean"],
)
def test_a_parquet_defect_is_refused_and_nothing_is_written(
    tmp_path: Path, rows: dict[str, Any], change: Callable[[Path], object], message: str
) -> None:
    tables = write_parquet(tmp_path, rows)
    change(tables[0])
    with pytest.raises(DomainError, match=message):
        import_table(*tables, tmp_path / "domains")
    assert not (tmp_path / "domains").exists()
