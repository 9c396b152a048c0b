"""The results of a benchmark as tidy tables: their columns, a writer and a reader.

results.parquet       every score: strategy, seed, left-out domain, evaluated domain, split, variant, metric
comparisons.parquet   every strategy against a baseline, over seeds (fedmerge.report.statistics.comparison_rows)
costs.parquet         bytes, seconds and memory of every cell
curves.parquet        losses and validation scores over steps or rounds
coefficients.parquet  merging coefficients by domain and group of tensors
leaks.parquet         results of audits of experts and merges, for strategies that left users out of training
ranks.parquet         mean ranks with their critical difference (fedmerge.report.statistics.rank_rows)
cells.json            every cell's status, exact configuration and environment
bench.json            title, synthetic or real data, reference strategies; written last
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fedmerge.errors import RunDirError
from fedmerge.files import write_json, write_table

BENCH_FILE = "bench.json"
CELLS_FILE = "cells.json"
EVERY_FOLD = "any"  # left_out of a comparison over all leave-one-domain-out folds
FINISHED = "done"  # status of a finished cell; any other status counts as unfinished
NOTHING_LEARNED = "nothing_learned"  # key of a cell: merged domains whose experts are zero
POOLED = " (pooled)"  # suffix of a row that was trained on pooled data, which breaks isolation
MEAN = "mean"  # in the column "domain": a comparison of unweighted means over domains

# Table -> column -> type. A "number" may be absent (null or NaN), "text" and "count" never are.
COLUMNS: Mapping[str, Mapping[str, str]] = {
    "results": {
        "dataset": "text",
        "strategy": "text",
        "label": "text",  # the variant selected on validation, "task-arithmetic 0.7"
        "seed": "count",
        "left_out": "text",  # the unseen domain of a leave-one-domain-out fold, or ""
        "domain": "text",
        "role": "text",
        "split": "text",
        "variant": "text",
        "metric": "text",
        "num_users": "count",
        "value": "number",  # mean over users
    },
    "comparisons": {
        "dataset": "text",
        "strategy": "text",
        "baseline": "text",
        "left_out": "text",  # "" or EVERY_FOLD
        "domain": "text",  # or MEAN
        "role": "text",
        "variant": "text",
        "metric": "text",
        "num_seeds": "count",
        "difference": "number",  # strategy minus baseline
        "half_width": "number",  # of the 95 % interval
        "p_value": "number",
        "p_adjusted": "number",
        "significant": "flag",
    },
    "costs": {
        "dataset": "text",
        "strategy": "text",
        "seed": "count",
        "left_out": "text",
        "bytes_up": "number",  # from all clients to the server
        "bytes_down": "number",
        "client_seconds": "number",  # summed over clients
        "server_seconds": "number",
        "peak_bytes": "number",  # of the largest process
        "rank": "number",  # largest of any module
        "error": "number",  # of the last round: distance of its merge from the exact mean, as a share of the norm
        "residual": "number",  # of the last round: largest share of the merge's norm that a client's start lacks
    },
    "curves": {
        "dataset": "text",
        "strategy": "text",
        "seed": "count",
        "left_out": "text",
        "domain": "text",
        "step": "count",
        "name": "text",  # "loss", "ndcg@10"
        "value": "number",
    },
    "coefficients": {
        "dataset": "text",
        "strategy": "text",
        "seed": "count",
        "left_out": "text",
        "domain": "text",
        "group": "text",  # "layer 0"
        "value": "number",
    },
    "leaks": {
        "dataset": "text",
        "strategy": "text",
        "seed": "count",
        "left_out": "text",
        "domain": "text",
        "model": "text",  # attacked model: "expert", "merged", "backbone"; for pairs, their source
        "attack": "text",  # "loss", "loss against the backbone's", "canaries", "pairs"
        "metric": "text",  # "auc", "tpr_at_fpr_0.01", "mean_exposure", "precision@100"
        "value": "number",
        "error": "number",  # standard error, of an "auc"
    },
    "ranks": {
        "dataset": "text",  # "" for all datasets
        "strategy": "text",
        "mean_rank": "number",  # 1 is best
        "num_blocks": "count",
        "critical_difference": "number",
        "p_friedman": "number",
    },
}
CELL_KEYS = ("strategy", "seed", "dataset", "left_out", "status", "config", "environment", "seconds")
ALLOWED: Mapping[str, tuple[str, ...]] = {
    "role": ("train", "unseen"),
    "split": ("valid", "test"),
    "variant": ("unmasked", "masked"),
}
_TYPES = {"text": pa.string(), "count": pa.int64(), "number": pa.float64(), "flag": pa.bool_()}
_AGAIN = "Run the benchmark again; finished cells are not repeated."

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class BenchTables:
    """A benchmark's tables; each row is a mapping with the columns of ``COLUMNS``.

    Attributes:
        title: of the page.
        synthetic: True if any data are generated.
        results, comparisons, costs, curves, coefficients, leaks, ranks: rows; each may be empty. Strategies are
            shown in the order of ``results``.
        cells: one record per cell, with at least ``CELL_KEYS``; ``status`` is ``FINISHED`` or a description of the
            failure, ``config`` and ``environment`` are nested, ``seconds`` may be None; further keys are shown too.
        references: strategies that do not compete for the mark of the best: backbone, solo experts, joint training.
    """

    title: str
    synthetic: bool
    results: Rows = ()
    comparisons: Rows = ()
    costs: Rows = ()
    curves: Rows = ()
    coefficients: Rows = ()
    leaks: Rows = ()
    ranks: Rows = ()
    cells: Rows = ()
    references: tuple[str, ...] = ()


def is_bench(folder: Path) -> bool:
    """Return True if the folder holds the tables of a benchmark."""
    return (folder / BENCH_FILE).is_file()


def write_bench_tables(folder: Path, tables: BenchTables) -> None:
    """Write every table atomically, ``bench.json`` last; existing tables are replaced.

    Args:
        folder: of the benchmark; must exist.
        tables: NaN and infinite numbers are written as absent.

    Raises:
        RunDirError: rows have other columns or types, or the folder cannot be written.
    """
    for name in COLUMNS:
        write_table(folder / f"{name}.parquet", _checked(name, getattr(tables, name), folder), _schema(name))
    _check_cells(tables.cells, folder / CELLS_FILE)
    write_json(folder / CELLS_FILE, [dict(cell) for cell in tables.cells])
    head = {"title": tables.title, "synthetic": tables.synthetic, "references": list(tables.references)}
    write_json(folder / BENCH_FILE, head)


def read_bench_tables(folder: Path) -> BenchTables:
    """Read what :func:`write_bench_tables` wrote.

    Raises:
        RunDirError: a file is missing or damaged, or its columns, types or values are not as expected.
    """
    head = _json(folder / BENCH_FILE)
    if (
        not isinstance(head, dict)
        or not isinstance(head.get("title"), str)
        or not isinstance(head.get("synthetic"), bool)
    ):
        raise RunDirError(
            f"{folder / BENCH_FILE}: found {head!r}; expected a title and whether data are synthetic. {_AGAIN}"
        )
    cells = _json(folder / CELLS_FILE)
    _check_cells(cells, folder / CELLS_FILE)
    rows = {name: tuple(_checked(name, _read(folder / f"{name}.parquet", name), folder)) for name in COLUMNS}
    references = tuple(str(name) for name in head.get("references", ()))
    return BenchTables(head["title"], head["synthetic"], cells=tuple(cells), references=references, **rows)


def _schema(name: str) -> Any:
    return pa.schema([pa.field(column, _TYPES[kind], kind == "number") for column, kind in COLUMNS[name].items()])


def _read(path: Path, name: str) -> Rows:
    try:
        table = pq.read_table(path)
    except FileNotFoundError as error:
        if name == "leaks":  # older benchmarks have no audits
            return ()
        raise RunDirError(f"{path}: the file does not exist. {_AGAIN}") from error
    except (OSError, pa.ArrowException) as error:
        raise RunDirError(f"{path}: damaged ({str(error).splitlines()[0]}). {_AGAIN}") from error
    expected = _schema(name)
    found = {field.name: field.type for field in table.schema}
    if found != {field.name: field.type for field in expected}:
        raise RunDirError(
            f"{path}: found the columns {_columns(found)}; expected {_columns({f.name: f.type for f in expected})}. "
            "Use the version that wrote the benchmark, or run it again."
        )
    rows: Rows = table.to_pylist()
    return rows


def _checked(name: str, rows: Rows, folder: Path) -> list[dict[str, Any]]:
    """Return the rows with columns in order, and None for NaN and infinities; raise RunDirError for a wrong row."""
    columns = COLUMNS[name]
    checked = []
    for number, row in enumerate(rows):
        where = f"{folder / name}.parquet, row {number}"
        if set(row) != set(columns):
            raise RunDirError(f"{where}: found the columns {sorted(row)}; expected {sorted(columns)}. {_AGAIN}")
        for column, kind in columns.items():
            if not _fits(row[column], kind) or (column in ALLOWED and row[column] not in ALLOWED[column]):
                wanted = " or ".join(map(repr, ALLOWED[column])) if column in ALLOWED else f"a {kind}"
                raise RunDirError(f"{where}: {column} is {row[column]!r}; expected {wanted}. {_AGAIN}")
        checked.append({column: _plain(row[column], kind) for column, kind in columns.items()})
    return checked


def _fits(value: Any, kind: str) -> bool:
    if kind == "text":
        return isinstance(value, str)
    if kind == "flag" or isinstance(value, bool | np.bool_):
        return kind == "flag" and isinstance(value, bool | np.bool_)
    return isinstance(value, Integral) if kind == "count" else value is None or isinstance(value, Real)


def _plain(value: Any, kind: str) -> Any:
    """Convert NumPy's types to Python's; NaN and infinities become None."""
    if kind == "number":
        return None if value is None or not math.isfinite(value) else float(value)
    return {"text": str, "count": int, "flag": bool}[kind](value)


def _check_cells(cells: Any, path: Path) -> None:
    if not isinstance(cells, list | tuple):
        raise RunDirError(f"{path}: found a JSON {type(cells).__name__}; expected a list of cells. {_AGAIN}")
    for number, cell in enumerate(cells):
        missing = [key for key in CELL_KEYS if not isinstance(cell, Mapping) or key not in cell]
        if missing:
            raise RunDirError(f"{path}: cell {number} lacks {', '.join(missing)}. {_AGAIN}")
        if not _fits(cell["seconds"], "number"):
            raise RunDirError(
                f"{path}: cell {number} took {cell['seconds']!r}; expected a number of seconds or null. {_AGAIN}"
            )


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunDirError(
            f"{path}: the file does not exist. Give the folder of a finished benchmark. {_AGAIN}"
        ) from error
    except (OSError, ValueError) as error:
        raise RunDirError(f"{path}: damaged ({error}). {_AGAIN}") from error


def _columns(types: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} ({kind})" for name, kind in types.items())
