"""A benchmark's tables on disk."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from report_folders import parsed
from run_folders import refusal

from fedmerge.errors import RunDirError
from fedmerge.report import bench_tables
from fedmerge.report.bench.page import bench_page
from fedmerge.report.bench_tables import BenchTables, is_bench, read_bench_tables, write_bench_tables

Capsys = pytest.CaptureFixture[str]


def test_tables_round_trip(reported_bench: BenchTables, bench_folder: Path) -> None:
    assert is_bench(bench_folder)
    found = read_bench_tables(bench_folder)
    assert json.dumps(found.__dict__, sort_keys=True, default=list) == json.dumps(
        reported_bench.__dict__, sort_keys=True, default=list
    )
    assert pq.read_table(bench_folder / "results.parquet").schema.field("num_users").type == pa.int64()


def test_empty_tables_and_numpy_numbers_round_trip(tmp_path: Path) -> None:
    row: dict[str, Any] = dict.fromkeys(bench_tables.COLUMNS["costs"], "x")
    cost = {
        **row,
        "seed": np.int64(3),
        **dict.fromkeys(("bytes_up", "peak_bytes", "rank"), np.float32(0.5)),
        **dict.fromkeys(("error", "residual")),
        "bytes_down": None,
    }
    cost |= {"client_seconds": float("nan"), "server_seconds": float("inf")}
    write_bench_tables(tmp_path, BenchTables("t", False, costs=[cost]))
    found = read_bench_tables(tmp_path)
    assert (found.results, found.cells, found.references) == ((), (), ())
    assert found.costs[0]["seed"] == 3
    assert [found.costs[0][key] for key in ("bytes_up", "bytes_down", "client_seconds", "server_seconds")] == [
        0.5,
        None,
        None,
        None,
    ]
    assert parsed(bench_page(found)).text.count("Scores") == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"role": "seen"}, r"results\.parquet, row 0: role .*'seen'.*'train'.*'unseen'"),
        ({"seed": 1.5}, r"row 0: seed .*1\.5"),
        ({"seed": True}, r"row 0: seed .*True"),
        ({"value": "high"}, r"row 0: value .*'high'"),
        ({"domain": None}, r"row 0: domain .*None"),
        ({"more": 1}, r"row 0: .*'dataset', .*'more'"),
    ],
)
def test_rows_that_do_not_fit_are_refused(
    reported_bench: BenchTables, tmp_path: Path, change: Mapping[str, Any], message: str
) -> None:
    with pytest.raises(RunDirError, match=message):
        write_bench_tables(tmp_path, replace(reported_bench, results=[{**reported_bench.results[0], **change}]))
    assert not is_bench(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "results.parquet",
            b"PAR1",
            r"results\.parquet: ",
        ),
        ("costs.parquet", None, r"costs\.parquet: "),
        ("cells.json", b"{}", r"cells\.json: .*dict"),
        ("cells.json", b'[{"seed": 1}]', r"cells\.json: cell 0 .*strategy, dataset, left_out"),
        ("cells.json", b"[", r"cells\.json: "),
        ("bench.json", b"[]", r"bench\.json: .*\[\]"),
    ],
)
def test_a_damaged_benchmark_is_an_error_with_its_path(
    bench_folder: Path, capsys: Capsys, file: str, content: bytes | None, message: str
) -> None:
    (bench_folder / file).unlink()
    if content is not None:
        (bench_folder / file).write_bytes(content)
    assert re.search(message, refusal(capsys, "report", bench_folder))
    assert not (bench_folder / "report.html").exists()


def test_other_columns_and_cells_are_refused(bench_folder: Path) -> None:
    pq.write_table(pq.read_table(bench_folder / "ranks.parquet").drop(["num_blocks"]), bench_folder / "ranks.parquet")
    with pytest.raises(RunDirError, match=r"ranks\.parquet: .*dataset \(string\), .*num_blocks"):
        read_bench_tables(bench_folder)
    with pytest.raises(RunDirError, match=r"elsewhere.bench\.json"):
        read_bench_tables(bench_folder / "elsewhere")
    cells = [{**dict.fromkeys(bench_tables.CELL_KEYS, ""), "seconds": "long"}]
    with pytest.raises(RunDirError, match=r"cell 0 .*'long'"):
        write_bench_tables(bench_folder, BenchTables("t", False, cells=cells))
