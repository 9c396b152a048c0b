"""Cost of importing tables of interactions: rows per second and peak memory, against plain DuckDB and plain Polars.

    python benchmarks/speed/bench_tables.py --rows 2000000 [--repeats 5] [--forms parquet csv jsonl] [--folder DIR]
    python benchmarks/speed/bench_tables.py --rows 100000000 --forms parquet --ways fedmerge

Writes generated interactions (text ids, whole seconds, in no order, 2 % of the rows repeated) and a catalog. All ways
do the same: read the table, remove repeats, take the 5-core, sort by user and time, write Parquet. DuckDB and Polars do
it in memory, with as many threads as fedmerge's store; they check no value, number no line, and write neither catalog
nor hash. All must keep the same number of rows. Each import is a process of its own, and the ways take turns; on a
shared machine, compare CPU seconds. Ratios are those to the last way of the same turn: median, lowest and highest.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from own_process import compare, measured

CHUNK = 1_000_000
THREADS = 2
NAMES = ("user_id", "item_id", "timestamp")


class JsonLinesWriter:
    """Writes tables as one object a line; a context manager."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("wb")

    def __enter__(self) -> "JsonLinesWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write_table(self, table: pa.Table) -> None:
        """Append the rows."""
        self.file.writelines(json.dumps(row).encode() + b"\n" for row in table.to_pylist())


def write_source(folder: Path, num_rows: int, form: str) -> tuple[Path, Path]:
    """Write interactions and catalog; return both paths. Texts of CSV are quoted, as pyarrow writes them."""
    draw = np.random.default_rng(0)
    num_users, num_items = num_rows // 10 + 1, min(num_rows // 100, 1_000_000) + 1
    schema = pa.schema([("user_id", pa.string()), ("item_id", pa.string()), ("timestamp", pa.int64())])
    interactions, catalog = folder / f"interactions.{form}", folder / f"catalog.{form}"

    def writer(path: Path, schema: pa.Schema) -> Any:
        if form == "jsonl":
            return JsonLinesWriter(path)
        return pq.ParquetWriter(path, schema) if form == "parquet" else pyarrow.csv.CSVWriter(path, schema)

    def ids(letter: str, numbers: "np.ndarray[tuple[int], np.dtype[np.int64]]", digits: int) -> pa.Array:
        text = pa.array(numbers).cast(pa.string())
        return pa.compute.binary_join_element_wise(letter, pa.compute.utf8_lpad(text, digits, "0"), "")

    with writer(interactions, schema) as file:
        for start in range(0, num_rows, CHUNK):
            count = min(CHUNK, num_rows - start)
            # squares: few users and items are far more active than the others
            users = (num_users * draw.random(count) ** 2).astype(np.int64)
            items = (num_items * draw.random(count) ** 2).astype(np.int64)
            times = draw.integers(1_000_000_000, 1_500_000_000, count)
            copies = draw.integers(0, count, count // 50)
            for column in (users, items, times):
                column[: len(copies)] = column[copies]
            file.write_table(pa.table([ids("A", users, 13), ids("B", items, 9), pa.array(times)], schema=schema))
    names = ids("B", np.arange(num_items), 9)
    table = pa.table({"item_id": names, "title": pa.compute.binary_join_element_wise("Item", names, " ")})
    with writer(catalog, table.schema) as file:
        file.write_table(table)
    return interactions, catalog


def fedmerge(interactions: Path, catalog: Path, dst: Path) -> int:
    """Import with fedmerge; return the number of interactions kept."""
    from fedmerge.domain.importers.events import ImportSettings  # noqa: PLC0415  # a process pays for its own way only
    from fedmerge.domain.importers.table import import_table  # noqa: PLC0415  # a process pays for its own way only

    report = import_table(interactions, catalog, dst, settings=ImportSettings("shop", k_core=5))
    return report.manifest.num_interactions


def plain_duckdb(interactions: Path, _: Path, dst: Path) -> int:
    """Import with a database in memory; return the number of interactions kept."""
    import duckdb  # noqa: PLC0415  # a process pays for its own way only

    database = duckdb.connect(config={"threads": THREADS})
    database.execute(f"CREATE TABLE rows AS SELECT DISTINCT {', '.join(NAMES)} FROM '{interactions}'")
    enough = " AND ".join(
        f"{name} IN (SELECT {name} FROM rows GROUP BY {name} HAVING count(*) >= 5)" for name in NAMES[:2]
    )
    before = -1
    while True:
        [(count,)] = database.execute("SELECT count(*) FROM rows").fetchall()
        if count == before:
            break
        before = count
        database.execute(f"CREATE OR REPLACE TABLE rows AS SELECT * FROM rows WHERE {enough}")
    dst.mkdir()
    database.execute(
        f"COPY (SELECT user_id, item_id FROM rows ORDER BY user_id, timestamp) TO '{dst / 'rows.parquet'}' "
        "(COMPRESSION zstd)"
    )
    return int(count)


def plain_polars(interactions: Path, _: Path, dst: Path) -> int:
    """Import with data frames; return the number of interactions kept."""
    import polars as pl  # noqa: PLC0415  # a process pays for its own way only

    scans: dict[str, Any] = {".parquet": pl.scan_parquet, ".csv": pl.scan_csv, ".jsonl": pl.scan_ndjson}
    rows = scans[interactions.suffix](interactions).select(NAMES).unique().collect()
    before = -1
    while len(rows) != before:
        before = len(rows)
        for name in NAMES[:2]:
            few = rows.group_by(name).len().filter(pl.col("len") < 5)
            rows = rows.join(few, on=name, how="anti")
    dst.mkdir()
    rows.sort("user_id", "timestamp").select("user_id", "item_id").write_parquet(dst / "rows.parquet")
    return len(rows)


WAYS = {"fedmerge": fedmerge, "Polars": plain_polars, "DuckDB": plain_duckdb}
FORMS = ("parquet", "csv", "jsonl")


def main() -> None:
    """Generate, import, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[300_000])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--folder", type=Path, default=None, help="for the files (default: the temporary folder)")
    parser.add_argument("--measure", nargs=4, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measured(WAYS[options.measure[0]], *map(Path, options.measure[1:]))
        return
    for num_rows in options.rows:
        for form in options.forms:
            with tempfile.TemporaryDirectory(dir=options.folder) as name:
                free, needed = shutil.disk_usage(name).free, 220 * num_rows
                if free < needed:
                    sys.exit(f"{name}: {free / 1e9:.1f} GB are free, {needed / 1e9:.1f} GB are needed. Give --folder.")
                print(f"\n{form}", flush=True)
                environment = {"POLARS_MAX_THREADS": str(THREADS)}
                source = write_source(Path(name), num_rows, form)
                compare(__file__, options.ways, options.repeats, num_rows, *source, environment=environment)


if __name__ == "__main__":
    main()
