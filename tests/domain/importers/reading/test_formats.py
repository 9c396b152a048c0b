"""Tables of every format give the same domain; ids and texts keep their value, whatever their type."""

import json
import re
import zipfile
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import openpyxl  # type: ignore[import-untyped]
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_tables import bad_rows, import_by_command, sequences

from fedmerge.cli import main
from fedmerge.domain.catalog import load_catalog
from fedmerge.domain.importers.bad_rows import BadRows
from fedmerge.domain.importers.events import ImportSettings
from fedmerge.domain.importers.reading.excel import excel_table
from fedmerge.domain.importers.reading.table import NUMBER
from fedmerge.domain.importers.reading.values import to_ids, to_texts
from fedmerge.domain.importers.table import import_table
from fedmerge.domain.manifest import read_manifest
from fedmerge.errors import ConfigError, DomainError

Capture = pytest.CaptureFixture[str]
DAYS = [datetime(2024, 1, day) for day in (3, 1, 2)]  # as spreadsheets hold them
ROWS: dict[str, list[Any]] = {"user_id": ["ann", "ann", "bob"], "item_id": [1, 2, 1], "timestamp": DAYS}
ITEMS: dict[str, list[Any]] = {"item_id": [1, 2], "title": ["One", "Two"]}
RIGHT = {"ann": ["2", "1"], "bob": ["1"]}


def write_excel(path: Path, table: dict[str, list[Any]]) -> Path:
    book = openpyxl.Workbook()
    sheet = book.worksheets[0]
    for row in (list(table), *zip(*table.values(), strict=True)):
        sheet.append(row)
    book.create_sheet("notes")
    book.save(path)
    return path


def write_json(path: Path, table: dict[str, list[Any]], mark: bytes = b"") -> Path:
    rows = [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
    path.write_bytes(mark + b"".join(json.dumps(row, default=str).encode() + b"\n" for row in rows))
    return path


def write_csv(path: Path, table: dict[str, list[Any]]) -> Path:
    pd.DataFrame(table).to_csv(path, index=False)
    return path


def error_of(capsys: Capture) -> str:
    return capsys.readouterr().err


def write_parquet(path: Path, table: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table), path)
    return path


@pytest.mark.parametrize(
    ("write", "name"),
    [(write_excel, "t.xlsx"), (write_json, "t.jsonl"), (write_json, "t.json"), (write_parquet, "t.parquet")],
)
def test_files_of_other_formats(tmp_path: Path, write: Any, name: str) -> None:
    rows, items = write(tmp_path / f"rows-{name}", ROWS), write(tmp_path / f"items-{name}", ITEMS)
    assert import_by_command(tmp_path / "shop", rows, items) == 0
    assert sequences(tmp_path / "shop") == RIGHT
    assert load_catalog(tmp_path / "shop").attributes["title"] == ("One", "Two")


def test_json_lines_with_a_mark_and_with_bad_lines(tmp_path: Path, capsys: Capture) -> None:
    rows = write_json(tmp_path / "rows.jsonl", ROWS, b"\xef\xbb\xbf")
    items = write_json(
        tmp_path / "items.jsonl", {**ITEMS, "category": [["Toys", "Cars"], float("nan")]}, b"\xef\xbb\xbf"
    )
    rows.write_bytes(rows.read_bytes() + b'\n{"user_id": "cy"\n[1]\n')
    assert import_by_command(tmp_path / "shop", rows, items, "--max-bad-share", "0.5") == 0
    assert sequences(tmp_path / "shop") == RIGHT
    assert load_catalog(tmp_path / "shop").attributes["category"] == ("Toys Cars", "")
    out = capsys.readouterr().out
    assert "not JSON (1: line 5)" in out
    assert "not an object (1: line 6)" in out
    rows.write_text(json.dumps([{"user_id": 1}]))
    assert import_by_command(tmp_path / "b", rows, items) == 1
    assert "lines=True" in capsys.readouterr().err


def test_numbers_and_points_in_time_of_excel_are_noticed_when_mixed(tmp_path: Path, capsys: Capture) -> None:
    rows = write_excel(tmp_path / "rows.xlsx", {**ROWS, "timestamp": [DAYS[0], 45292, DAYS[2]]})
    items = write_excel(tmp_path / "items.xlsx", ITEMS)
    assert import_by_command(tmp_path / "shop", rows, items) == 1
    assert "the time is a number, while most are ISO 8601 times" in capsys.readouterr().err
    assert import_by_command(tmp_path / "shop", rows, items, "--time-format", "iso", "--time-format", "excel") == 0
    assert sequences(tmp_path / "shop") == RIGHT  # 45292 is 2024-01-01
    assert "the first of 2 sheets was read" in capsys.readouterr().out


def test_a_workbook_that_unpacks_to_gigabytes_is_refused_unread(tmp_path: Path, capsys: Capture) -> None:
    rows = write_excel(tmp_path / "rows.xlsx", ROWS)
    with zipfile.ZipFile(rows, "a", zipfile.ZIP_DEFLATED) as archive, archive.open("xl/more.xml", "w") as file:
        for _ in range(80):
            file.write(bytes(1 << 20))
    assert rows.stat().st_size < 100_000
    assert import_by_command(tmp_path / "shop", rows, write_excel(tmp_path / "items.xlsx", ITEMS)) == 1
    assert re.search(
        r"rows.xlsx: found a workbook of \S+ bytes that unpacks to 83,\S+, expected at most 7", error_of(capsys)
    )
    rows.write_bytes(b"PK\x03\x04")
    assert import_by_command(tmp_path / "shop", rows, tmp_path / "items.xlsx") == 1
    assert "cannot be read as an Excel workbook" in error_of(capsys)


def test_a_stray_cell_far_to_the_right_costs_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "rows.xlsx"
    book = openpyxl.Workbook()
    sheet = book.worksheets[0]
    for row in (("user_id", "", "item_id", None), ("ann", None, 1), ("bob",)):
        sheet.append(row)
    sheet.cell(2, 16_384, "stray")
    book.save(path)
    table = excel_table(path)
    assert table.columns == ("user_id", "", "item_id")
    [batch] = table.batches(["item_id", "user_id"])
    assert batch.to_pydict() == {"item_id": ["1", None], "user_id": ["ann", "bob"], NUMBER: [2, 3]}


def test_long_texts_are_cut_and_counted_and_long_ids_are_bad_rows(tmp_path: Path, capsys: Capture) -> None:
    long = "word " * 4000 + "x" * 3_000_000
    kept = long[:16_384].rstrip()
    ids = ["1", "2", "y" * 20_000]
    rows = {**ROWS, "item_id": ids, "timestamp": [3, 1, 2]}
    items = {"item_id": ids, "title": [long, "Two", "none"], "brand": ["b" * 16_384, "", ""]}
    for name, write in (("csv", write_csv), ("jsonl", write_json), ("parquet", write_parquet)):
        shop = tmp_path / name
        tables = write(tmp_path / f"rows.{name}", rows), write(tmp_path / f"items.{name}", items)
        assert import_by_command(shop, *tables, "--max-bad-share", "0.5") == 0
        out = capsys.readouterr().out
        assert "1 texts were cut after 16,384 characters; encoders read fewer" in out
        assert out.count("the item has more than 16,384 characters (1: ") == 2
        assert load_catalog(shop).item_ids == ("1", "2")
        assert load_catalog(shop).attributes["title"] == (kept, "Two")
        assert load_catalog(shop).attributes["brand"] == ("b" * 16_384, "")
    again = write_json(
        tmp_path / "again.jsonl", {"item_id": [1, 3], "title": [long, long], "brand": ["b" * 16_384, ""]}
    )
    assert main(["data", "add-items", str(shop), "--catalog", str(again)]) == 0
    assert "again.jsonl: 1 texts were cut" in capsys.readouterr().out
    assert load_catalog(shop).attributes["title"] == (kept, "Two", kept)


def test_a_folder_of_parquet_parts(tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "rows"
    for at, kind in enumerate((pa.timestamp("ms"), pa.timestamp("us"), pa.timestamp("s"))):
        row: dict[str, Any] = {name: values[at : at + 1] for name, values in ROWS.items() if name != "item_id"}
        row["timestamp"] = pa.array(row["timestamp"], kind)  # parts may differ in units
        write_parquet(folder / f"item_id={ROWS['item_id'][at]}" / f"part-{at}.parquet", row)
    (folder / "_SUCCESS").write_bytes(b"")
    (folder / "_temporary").mkdir()
    (folder / "_temporary" / "x.parquet").write_bytes(b"")
    items = write_parquet(tmp_path / "items.parquet", ITEMS)
    assert import_by_command(tmp_path / "shop", folder, items) == 0
    assert sequences(tmp_path / "shop") == RIGHT
    assert import_by_command(tmp_path / "b", tmp_path / "empty", items) == 1
    assert import_by_command(tmp_path / "b", folder, items, "--delimiter", "tab") == 1
    assert "found the format Parquet, which has no delimiter" in capsys.readouterr().err
    write_parquet(folder / "item_id=7" / "part-9.parquet", {"user_id": ["x"]})
    assert import_by_command(tmp_path / "b", folder, items) == 1
    assert "part-9.parquet: found the columns 'user_id', 'item_id', expected also" in capsys.readouterr().err


FRAMES: dict[str, Any] = {"pandas": pd.DataFrame, "polars": pl.DataFrame, "pyarrow": pa.table}


@pytest.mark.parametrize("library", FRAMES)
def test_data_frames(tmp_path: Path, library: str) -> None:
    make = FRAMES[library]
    settings = ImportSettings(name="shop")
    report = import_table(make(ROWS), make(ITEMS), tmp_path, settings=settings)
    assert sequences(tmp_path / "shop") == RIGHT
    assert report.manifest.source.startswith("frame tables of ")
    with pytest.raises(ConfigError, match="no name"):
        import_table(make(ROWS), make(ITEMS), tmp_path)


def test_a_frame_of_mixed_types_is_refused(tmp_path: Path) -> None:
    mixed = pd.DataFrame({**ROWS, "item_id": pd.Series([1, "x", 2], dtype=object)})
    with pytest.raises(DomainError, match=r"interactions: .*astype"):
        import_table(mixed, pd.DataFrame(ITEMS), tmp_path, settings=ImportSettings(name="shop"))


BIG = 10**17 + 1
TYPES: dict[str, pa.Array] = {
    "int64": pa.array([101, BIG, None]),
    "uint64": pa.array([101, BIG, None], pa.uint64()),
    "decimal": pa.array([Decimal("101.00"), Decimal(BIG), None], pa.decimal128(30, 2)),
    "text": pa.array(["101.0", str(BIG), ""]),
    "text with spaces": pa.array([" 101 ", f"{BIG}.", "\u00a0"]),
    "large text": pa.array(["101", str(BIG), None], pa.large_string()),
    "text views": pa.array(["101", str(BIG), None], pa.string_view()),
    "dictionary": pa.array(["101", str(BIG), None]).dictionary_encode(),
    "dictionary of large text": pa.array(["101", str(BIG), None], pa.large_string()).dictionary_encode(),
    "dictionary of numbers": pa.array([101, BIG, None]).dictionary_encode(),
}


@pytest.mark.parametrize("kind", TYPES)
def test_ids_of_every_type_are_the_same(kind: str) -> None:
    assert to_ids("t", "c", TYPES[kind]).to_pylist() == ["101", str(BIG), None]


def test_decimals_are_ids_only_if_no_digit_is_lost() -> None:
    assert to_ids("t", "c", pa.array([101.0, 7.5, float("nan"), None, -0.0])).to_pylist() == [
        "101",
        None,
        None,
        None,
        "0",
    ]
    assert to_ids("t", "c", pa.array(["007", "1.50", "v1.0", "x.0"])).to_pylist() == ["007", "1.50", "v1.0", "x.0"]
    with pytest.raises(DomainError, match=r"'c' holds whole numbers above 2\^53"):
        to_ids("t", "c", pa.array([float(BIG)]))


def texts_of(column: pa.Array) -> list[str]:
    return to_texts(column, BadRows("t", "row", 0))


def test_words_for_no_value_are_none() -> None:
    assert (
        to_ids("t", "c", pa.array(["nan", "None", "NULL", "<NA>", r"\N", "none", "Nan"])).to_pylist()[:5] == [None] * 5
    )
    assert texts_of(pa.array(["nan", r"\N", "None", "Null"])) == ["", "", "None", "Null"]


def test_ids_in_scientific_notation_are_bad_rows(tmp_path: Path) -> None:
    rows, items = tmp_path / "rows.csv", tmp_path / "items.csv"
    rows.write_text("user_id,item_id,timestamp\nann,1.23457E+17,1\nann,5,2\n")  # a spreadsheet cut the digits
    items.write_text("item_id,title\n5,Five\n1.23457E+17,A\n1.23457E+17,B\n")
    report = import_table(rows, items, tmp_path, settings=ImportSettings(name="shop", max_bad_share=0.9))
    reason = "the item is in scientific notation, so its last digits are lost"
    assert bad_rows(report) == {reason: (1, (2,))}
    assert bad_rows(report, 1) == {reason: (2, (3, 4))}


def test_zero_is_a_text_and_nan_is_none(tmp_path: Path) -> None:
    items: dict[str, Any] = {"item_id": [1, 2, 3], "title": ["a", None, "c"]}
    items |= {"brand": [float("nan"), 1.0, 0.0], "category": [0, 1, 2]}
    rows = write_parquet(tmp_path / "rows.parquet", {**ROWS, "timestamp": [3, 1, 2]})
    assert import_by_command(tmp_path / "shop", rows, write_parquet(tmp_path / "items.parquet", items)) == 0
    assert load_catalog(tmp_path / "shop").attributes == {
        "title": ("a", "", "c"),
        "brand": ("", "1", "0"),
        "category": ("0", "1", "2"),
    }
    assert texts_of(pa.array([["a", "b"], None, []])) == ["a b", "", ""]
    assert texts_of(pa.array([1.5, 1e300])) == ["1.5", "1e+300"]


def test_one_flat_table_gives_items_and_texts(tmp_path: Path, capsys: Capture) -> None:
    orders = tmp_path / "orders.csv"
    orders.write_text(
        "user_id,item_id,timestamp,title,brand\n"
        "ann,b,2,,Acme\nann,a,1,A,\nbob,b,soon,Not read,\nbob,b,3,B,Acme\ncy,b,4,B two,Acme\n"
    )
    assert import_by_command(tmp_path / "shop", orders, None, "--max-bad-share", "0.2") == 0
    assert sequences(tmp_path / "shop") == {"ann": ["a", "b"], "bob": ["b"], "cy": ["b"]}
    catalog = load_catalog(tmp_path / "shop")
    assert catalog.item_ids == ("b", "a")  # in the order of their first rows
    assert catalog.attributes == {"title": ("B", "A"), "brand": ("Acme", ""), "category": ("", "")}
    assert read_manifest(tmp_path / "shop").catalog_source == "interactions"
    assert "1 items have different texts in different rows" in capsys.readouterr().out
    orders.write_text("user_id,item_id,timestamp\nann,b,2\n")
    assert import_by_command(tmp_path / "b", orders) == 1
    assert "expected at least one of title, brand and category" in capsys.readouterr().err


COLUMNS: dict[str, pa.Array] = {
    "text": pa.array(["A", "B", None]),
    "large text": pa.array(["A", "B", None], pa.large_string()),
    "text views": pa.array(["A", "B", None], pa.string_view()),
    "dictionary": pa.array(["A", "B", None]).dictionary_encode(),
    "dictionary of large text": pa.array(["A", "B", None], pa.large_string()).dictionary_encode(),
    "lists": pa.array([["A"], [None, "B"], None]),
    "lists of views": pa.array([["A"], ["B"], []], pa.list_(pa.string_view())),
    "large lists": pa.array([["A"], ["B"], []], pa.large_list(pa.string())),
    "numbers": pa.array([0, 1, None]),
    "dictionary of numbers": pa.array([0, 1, None]).dictionary_encode(),
    "decimals": pa.array([Decimal(0), Decimal(1), None]),
    "floats": pa.array([0.0, 1.0, float("nan")]),
    "points in time": pa.array(DAYS),
    "nothing": pa.nulls(3),
}
NUMBERS = ("numbers", "dictionary of numbers", "decimals", "floats")
TEXTS: dict[str, tuple[str, ...]] = {kind: ("0", "1", "") if kind in NUMBERS else ("A", "B", "") for kind in COLUMNS}
TEXTS |= {"points in time": tuple(map(str, DAYS)), "nothing": ("", "", "")}


@pytest.mark.parametrize("kind", COLUMNS)
@pytest.mark.parametrize("flat", [True, False], ids=["flat", "catalog"])
def test_attributes_of_every_type_are_texts(tmp_path: Path, kind: str, flat: bool) -> None:
    catalog = pa.table({"item_id": [1, 2, 3], "title": ["x"] * 3, "brand": COLUMNS[kind]})
    rows = catalog.append_column("user_id", pa.array(["ann"] * 3)).append_column("timestamp", pa.array(DAYS))
    import_table(rows, None if flat else catalog, tmp_path, settings=ImportSettings(name="shop"))
    assert load_catalog(tmp_path / "shop").attributes["brand"] == TEXTS[kind]


def test_times_of_frames_with_zones(tmp_path: Path) -> None:
    moments = [day.replace(tzinfo=UTC) for day in DAYS]
    import_table(
        pd.DataFrame({**ROWS, "timestamp": moments}),
        pd.DataFrame(ITEMS),
        tmp_path,
        settings=ImportSettings(name="shop"),
    )
    assert sequences(tmp_path / "shop") == RIGHT


def test_repeats_of_dates_are_said(tmp_path: Path, capsys: Capture) -> None:
    rows = write_parquet(
        tmp_path / "rows.parquet", {"user_id": ["a"] * 3, "item_id": [1, 1, 1], "timestamp": DAYS[:1] * 3}
    )
    assert import_by_command(tmp_path / "shop", rows, write_parquet(tmp_path / "items.parquet", ITEMS)) == 0
    assert "67 % of the rows" in capsys.readouterr().err


def test_texts_are_the_columns_that_a_shop_names(tmp_path: Path, capsys: Capture) -> None:
    rows = write_json(tmp_path / "rows.jsonl", ROWS)
    items = write_json(tmp_path / "items.jsonl", {**ITEMS, "colour": ["red", None], "price": [0, 2.5]})
    assert import_by_command(tmp_path / "shop", rows, items, "--text-columns", "price, colour=4,title") == 0
    catalog = load_catalog(tmp_path / "shop")
    assert list(catalog.attributes.items()) == [
        ("price", ("0", "2.5")),
        ("colour", ("red", "")),
        ("title", ("One", "Two")),
    ]
    assert catalog.limits == {"colour": 4}
    assert import_by_command(tmp_path / "b", rows, items, "--text-columns", "size") == 1
    assert "expected also 'size'" in capsys.readouterr().err
