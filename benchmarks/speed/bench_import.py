"""Cost of importing raw Amazon reviews: rows per second and peak memory, against plain DuckDB and plain Python.

    python benchmarks/speed/bench_import.py --gigabytes 3 [--ways fedmerge DuckDB] [--gzip] [--repeats 3] [--folder DIR]

Writes generated reviews with text in the form of the 2018 release (about 850 bytes per row; plain, or gzip level 1) and
their metadata, and imports them as a 5-core. DuckDB reads both with ``read_json`` in memory, with as many threads as
fedmerge's store, and writes Parquet. Python does the same with the standard library alone, all rows in memory:
json.loads of every line into a list of dicts, counters for the core, a sorted list per user. All must keep the same
rows. Each import is a process of its own, and the ways take turns; on a shared machine, compare CPU seconds. Ratios are
those to the last way of the same turn: median, lowest and highest.
"""

import argparse
import gzip
import json
import shutil
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from own_process import compare, measured

BYTES_PER_ROW = 850
CHUNK = 50_000
ROW = (
    b'{"overall": 5.0, "verified": true, "reviewTime": "01 1, 2018", "reviewerID": "A%013d", "asin": "B%09d", '
    b'"style": {"Size:": " Large"}, "reviewerName": "A. Customer", "reviewText": "%b", "summary": "%b", '
    b'"unixReviewTime": %d}\n'
)


def write_source(folder: Path, size_bytes: int, compressed: bool) -> tuple[Path, Path, int]:
    """Write reviews of about ``size_bytes`` before compression, and metadata; return both paths and the rows."""
    rng = np.random.default_rng(0)
    words = ["".join(map(chr, rng.integers(97, 123, size))) for size in rng.integers(2, 10, 5000)]
    texts = [
        json.dumps(" ".join(rng.choice(words, size)) + '\nIt\'s "good".')[1:-1].encode()
        for size in rng.integers(10, 190, 2000)
    ]
    summaries = [text[:30].rsplit(b" ", 1)[0] for text in texts]
    num_rows = size_bytes // BYTES_PER_ROW
    num_users, num_items = num_rows // 5 + 1, num_rows // 40 + 1
    reviews, metadata = folder / f"Made_up.json{'.gz' * compressed}", folder / f"meta_Made_up.json{'.gz' * compressed}"

    def create(path: Path) -> Any:
        return gzip.open(path, "wb", compresslevel=1) if compressed else path.open("wb", 1 << 20)

    with create(reviews) as file:
        for start in range(0, num_rows, CHUNK):
            count = min(CHUNK, num_rows - start)
            users = (
                (num_users * rng.random(count) ** 2).astype(int).tolist()
            )  # few users are far more active than the others
            items = (num_items * rng.random(count) ** 2).astype(int).tolist()
            times = rng.integers(1_000_000_000, 1_500_000_000, count).tolist()
            drawn = rng.integers(0, len(texts), count).tolist()
            file.write(
                b"".join(
                    ROW % (user, item, texts[text], summaries[text], moment)
                    for user, item, text, moment in zip(users, items, drawn, times, strict=True)
                )
            )
    with create(metadata) as file:
        for item in range(num_items):
            entry = {"category": ["Toys"], "title": f"Item {item}", "brand": "Acme", "main_cat": "Toys"}
            file.write(json.dumps({**entry, "asin": f"B{item:09d}", "feature": ["x" * 200]}).encode() + b"\n")
    return reviews, metadata, num_rows


def fedmerge(reviews: Path, metadata: Path, dst: Path) -> int:
    """Import with fedmerge; return the number of interactions kept."""
    from fedmerge.domain.importers.amazon import import_amazon  # noqa: PLC0415  # the alternative must not pay for it

    return import_amazon(reviews, metadata, dst).manifest.num_interactions


def plain_duckdb(reviews: Path, metadata: Path, dst: Path) -> int:
    """Import with a database in memory; return the number of interactions kept."""
    import duckdb  # noqa: PLC0415  # a process pays for its own way only

    database = duckdb.connect(config={"threads": 2})
    names = ("reviewerID", "asin", "unixReviewTime")
    database.execute(
        f"CREATE TABLE rows AS SELECT DISTINCT * FROM read_json('{reviews}', format = 'newline_delimited', "
        "columns = {reviewerID: 'VARCHAR', asin: 'VARCHAR', unixReviewTime: 'BIGINT'})"
    )
    enough = " AND ".join(
        f"{name} IN (SELECT {name} FROM rows GROUP BY {name} HAVING count(*) >= 5)" for name in names[:2]
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
        f"COPY (SELECT reviewerID, asin FROM rows ORDER BY reviewerID, unixReviewTime) TO '{dst / 'rows.parquet'}'"
    )
    database.execute(
        f"COPY (SELECT asin, title, brand, category FROM read_json('{metadata}', format = 'newline_delimited', "
        "columns = {asin: 'VARCHAR', title: 'VARCHAR', brand: 'VARCHAR', category: 'VARCHAR[]'}) "
        f"WHERE asin IN (SELECT asin FROM rows)) TO '{dst / 'items.parquet'}'"
    )
    return int(count)


def plain_python(reviews: Path, metadata: Path, dst: Path) -> int:
    """Import with the standard library, lists and dicts, into one JSON file; return the number of interactions kept."""

    def load(path: Path) -> list[dict[str, Any]]:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return [json.loads(line) for line in file]

    rows, entries = load(reviews), {entry["asin"]: entry for entry in load(metadata)}
    rows = list({(row["reviewerID"], row["asin"], row["unixReviewTime"]): row for row in rows}.values())
    while True:
        users, items = Counter(row["reviewerID"] for row in rows), Counter(row["asin"] for row in rows)
        kept = [row for row in rows if users[row["reviewerID"]] >= 5 and items[row["asin"]] >= 5]
        if len(kept) == len(rows):
            break
        rows = kept
    sequences = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["unixReviewTime"]):
        sequences[row["reviewerID"]].append(row["asin"])
    titles = {row["asin"]: entries[row["asin"]]["title"] for row in rows}
    dst.mkdir()
    (dst / "domain.json").write_text(json.dumps([sequences, titles]))
    return len(rows)


WAYS = {"fedmerge": fedmerge, "Python": plain_python, "DuckDB": plain_duckdb}


def main() -> None:
    """Generate, import, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=0.1)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--gzip", action="store_true")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=None, help="for the files (default: the temporary folder)")
    parser.add_argument("--measure", nargs=4, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measured(WAYS[options.measure[0]], *map(Path, options.measure[1:]))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder, needed = Path(name), 1.2e9 * options.gigabytes
        if (free := shutil.disk_usage(folder).free) < needed:
            sys.exit(
                f"{folder}: {free / 1e9:.1f} GB are free, {needed / 1e9:.1f} GB are needed. Choose another folder."
            )
        reviews, metadata, num_rows = write_source(folder, int(1e9 * options.gigabytes), options.gzip)
        print(f"{reviews.stat().st_size / 1e9:.2f} GB{' gzip' * options.gzip}")
        compare(__file__, options.ways, options.repeats, num_rows, reviews, metadata)


if __name__ == "__main__":
    main()
