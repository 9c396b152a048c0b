"""Parquet bombs: a few kilobytes that decode to gigabytes are refused before they are decoded."""

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pt
import pytest

from fedmerge.config import ATTRIBUTES
from fedmerge.domain.catalog import (
    MOST_BYTES,
    MOST_ITEMS,
    catalog_from_bytes,
    catalog_limits,
    catalog_schema,
    catalog_to_bytes,
    make_catalog,
)
from fedmerge.domain.importers.reading.parquet import parquet_table
from fedmerge.domain.parquet import (
    CELL_BYTES,
    LONGEST_TEXT,
    file_limits,
    open_parquet,
    plain_column,
    read_batches,
)
from fedmerge.errors import DomainError

MIB = 2**20
SCHEMA = catalog_schema(ATTRIBUTES)

# A process of its own, whose peak memory is measured; the bound on its address space keeps a bomb from filling the
# machine.
READ = r"""
import re, resource, sys
from pathlib import Path
from fedmerge.domain.catalog import catalog_from_bytes
from fedmerge.domain.importers.table import import_table
from fedmerge.errors import DomainError
resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, 4 * 2**30))
path = Path(sys.argv[1])
for read in (
    lambda: catalog_from_bytes(path.read_bytes(), "shop"),
    lambda: import_table(path.parent / "rows.parquet", path, path.parent / "domains"),
):
    try:
        read()
    except DomainError as error:
        print(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1], error)
"""


def repeated(text: str, rows: int) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array([text]))


def dictionary_bomb(path: Path) -> None:
    """Write 49 kB that decode to 20 GB: one text of a megabyte, repeated in 20,000 rows by a dictionary."""
    rows = 20_000
    columns = [pa.array([f"i{row}" for row in range(rows)]), repeated("x" * 10**6, rows), *[repeated("", rows)] * 2]
    pq.write_table(pa.table(columns, names=SCHEMA.names), path, compression="zstd", store_schema=False)


def small_cells_bomb(path: Path) -> None:
    """Write texts below the limit of a cell, which a dictionary repeats until they take 13 GB."""
    rows = 200_000
    columns = [
        pa.array([f"i{row}" for row in range(rows)]),
        repeated("x" * CELL_BYTES, rows),
        *[repeated("", rows)] * 2,
    ]
    pq.write_table(pa.table(columns, names=SCHEMA.names), path, compression="zstd", store_schema=False)


def page_bomb(path: Path) -> None:
    """Write one compressed page of 300 MB, without a dictionary."""
    columns = [pa.array(["i"]), pa.array(["x" * (3 * 10**8)]), pa.array([""]), pa.array([""])]
    pq.write_table(
        pa.table(columns, schema=SCHEMA), path, compression="zstd", use_dictionary=False, write_statistics=False
    )


def delta_bomb(path: Path) -> None:
    """Write texts that share a prefix of a megabyte, stated once: delta encoding needs no compression to repeat it."""
    rows, at_once = 1500, 50
    encoding = {"title": "DELTA_BYTE_ARRAY", **dict.fromkeys(("item_id", "brand", "category"), "PLAIN")}
    with pq.ParquetWriter(
        path, SCHEMA, compression="zstd", use_dictionary=False, column_encoding=encoding, write_statistics=False
    ) as writer:
        for start in range(0, rows, at_once):
            ids = [f"i{row}" for row in range(start, start + at_once)]
            empty = pa.array([""] * at_once)
            writer.write_table(
                pa.table([pa.array(ids), pa.array(["x" * 10**6] * at_once), empty, empty], schema=SCHEMA)
            )


def footer_bomb(path: Path) -> None:
    """Write a footer that states 900,000 row groups without columns, each a few hundred bytes once read."""
    group = b"\x19\x0c\x16\x00\x16\x00\x00"  # columns: none; total_byte_size and num_rows: 0
    number = 900_000
    length = bytes([number & 127 | 128, number >> 7 & 127 | 128, number >> 14])
    root = b"\x48\x06schema\x15\x00\x00"
    footer = b"\x15\x02\x19\x1c" + root + b"\x16\x00\x19\xfc" + length + group * number + b"\x00"
    path.write_bytes(b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1")


BOMBS = {
    "dictionary": dictionary_bomb,
    "small cells": small_cells_bomb,
    "page": page_bomb,
    "delta encoding": delta_bomb,
    "footer": footer_bomb,
}


@pytest.fixture(scope="module")
def bombs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that returns the file of a bomb, beside interactions; each is written once."""

    @functools.cache
    def write(bomb: str) -> Path:
        path = tmp_path_factory.mktemp(bomb.replace(" ", "-")) / "items.parquet"
        BOMBS[bomb](path)
        pq.write_table(pa.table({"user_id": ["u"], "item_id": ["i0"], "timestamp": [1]}), path.parent / "rows.parquet")
        return path

    return write


@pytest.mark.long
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_parquet_bomb_is_refused_before_it_takes_memory(bombs: Callable[[str], Path], bomb: str) -> None:
    path = bombs(bomb)
    done = subprocess.run(
        [sys.executable, "-c", READ, str(path)], capture_output=True, text=True, env=os.environ, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    of_server, of_import = (line.split(" ", 1) for line in done.stdout.splitlines())
    assert int(of_import[0]) < 400 * 1024, done.stdout  # KiB, of both; the imports of modules alone take 200 MiB
    assert "shop" in of_server[1]
    assert str(path) in of_import[1]


def test_the_bomb_of_49_kilobytes_is_one(bombs: Callable[[str], Path]) -> None:
    assert bombs("dictionary").stat().st_size < 50_000


def test_a_false_size_in_the_footer_does_not_help(tmp_path: Path, bombs: Callable[[str], Path]) -> None:
    """The footer may state any size of a column; the sizes of the pages count, which decompression enforces."""
    path = tmp_path / "items.parquet"
    data = bombs("page").read_bytes()
    honest = pq.ParquetFile(bombs("page")).metadata.row_group(0).column(1).total_uncompressed_size
    assert honest > 3 * 10**8
    stated = b"\x16" + varint(2 * honest)
    assert data.count(stated) == 1
    path.write_bytes(data.replace(stated, b"\x16" + bytes([200 & 127 | 128, 1 | 128, *[128] * (len(stated) - 4), 0])))
    assert pq.ParquetFile(path).metadata.row_group(0).column(1).total_uncompressed_size == 100
    with pytest.raises(DomainError) as caught:
        catalog_from_bytes(path.read_bytes(), "shop")
    assert "300,000,0" in str(caught.value)


def test_a_cell_outside_its_dictionary_is_damage() -> None:
    ids = [f"item {number}" for number in range(40)]
    data = catalog_to_bytes(make_catalog("shop", ids, {"title": ids, "brand": ["a", "b"] * 20, "category": [""] * 40}))
    named = 0
    for place in range(30, 60):  # in the first dictionary page, which then has other texts or fewer
        try:
            catalog_from_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :], "shop")
        except DomainError as error:
            named += "dictionary of 39 texts" in str(error)
    assert named


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def test_more_rows_than_announced_are_not_decoded() -> None:
    columns = {attribute: ["x"] * 30 for attribute in ("title", "brand", "category")}
    data = catalog_to_bytes(make_catalog("shop", [str(row) for row in range(30)], columns))
    assert len(catalog_from_bytes(data, "shop", 30)) == 30
    with pytest.raises(DomainError) as caught:
        catalog_from_bytes(data, "shop", 29)
    assert "30" in str(caught.value)
    assert "29" in str(caught.value)


def test_whatever_number_of_items_a_client_claims_there_is_a_bound() -> None:
    assert catalog_limits(2**62).rows == MOST_ITEMS
    assert catalog_limits(2**62).decoded_bytes == MOST_BYTES
    assert catalog_limits(10).decoded_bytes < 2 * MIB


@pytest.mark.parametrize("character", ["x", "é", "你", "🛒"])
def test_the_longest_texts_travel_and_longer_ones_are_refused_where_they_are_made(character: str) -> None:
    def shop(length: int) -> tuple[list[str], dict[str, list[str]]]:
        ids = [str(row) for row in range(20)]
        return ids, {"title": [character * length] * 20, "brand": [""] * 20, "category": ["a"] * 20}

    catalog = make_catalog("shop", *shop(LONGEST_TEXT))
    assert catalog_from_bytes(catalog_to_bytes(catalog), "shop", 10**6) == catalog
    with pytest.raises(DomainError) as caught:
        make_catalog("shop", *shop(LONGEST_TEXT + 1))
    assert f"{LONGEST_TEXT:,}" in str(caught.value)
    assert f"{LONGEST_TEXT + 1:,}" in str(caught.value)


def test_a_large_catalog_of_many_pages_reads_back() -> None:
    rows = 70_000
    ids = [f"item {row}" for row in range(rows)]
    columns = {
        "title": [f"title {row} " + "word " * 12 for row in range(rows)],
        "brand": [f"brand {row % 999}" for row in range(rows)],
        "category": [""] * rows,
    }
    catalog = make_catalog("shop", ids, columns)
    assert catalog_from_bytes(catalog_to_bytes(catalog), "shop", rows) == catalog


def test_text_outside_dictionaries_is_decoded_plain_unless_one_could_repeat_long_texts(
    tmp_path: Path,
) -> None:
    short = [f"text {row}" for row in range(9000)]
    columns = {"few": ["a", "b", "c"] * 3000, "many": short, "long": ["x" * 2000, *short[1:]]}
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table(columns), path, dictionary_pagesize_limit=5000, data_page_size=5000, row_group_size=4000)
    table = open_parquet("t", path, file_limits(path))
    batches = list(read_batches(table, list(columns)))
    kinds = {(name, pt.is_dictionary(batch.column(name).type)) for batch in batches for name in columns}
    assert kinds == {("few", True), ("many", False), ("long", True)}
    for name, values in columns.items():
        assert [value for batch in batches for value in plain_column(batch.column(name)).to_pylist()] == values


def test_a_column_name_that_is_not_text_is_refused(tmp_path: Path) -> None:
    columns = {attribute: ["x"] for attribute in ("title", "brand", "category")}
    data = catalog_to_bytes(make_catalog("shop", ["1"], columns)).replace(b"title", b"t\xe5tle")
    with pytest.raises(DomainError):
        catalog_from_bytes(data, "shop")
    (tmp_path / "items.parquet").write_bytes(data)
    with pytest.raises(DomainError) as caught:
        parquet_table(tmp_path / "items.parquet", 0.01, None)
    assert str(tmp_path / "items.parquet") in str(caught.value)
