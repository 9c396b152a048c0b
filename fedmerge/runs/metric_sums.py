"""Read the metric sums of a finished run from its tables."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fedmerge.config import Split
from fedmerge.errors import RunDirError
from fedmerge.evaluation.ranks import METRICS
from fedmerge.evaluation.sums import MetricSums, Variant


def read_metric_sums(
    run_dir: Path | str, split: Split, variant: Variant, only: Collection[str] | None = None
) -> dict[str, MetricSums]:
    """Return the metric sums that each domain of a run reported: enough for every mean, paired difference and interval.

    Args:
        run_dir: run folder.
        split: "valid" or "test".
        variant: "unmasked" or "masked".
        only: methods that are read; None reads all.

    Returns:
        Domain -> metric sums, in the order of the table.

    Raises:
        RunDirError: the tables are missing or damaged, or have no rows of this split and variant.
    """
    folder = Path(run_dir)
    values = _rows(folder / "metrics.parquet", split, variant, {"method": only})
    products = _rows(folder / "products.parquet", split, variant, {"method": only, "other": only})
    methods: dict[str, dict[str, int]] = {}  # domain -> method -> row
    for row in values:
        places = methods.setdefault(row["domain"], {})
        places.setdefault(row["method"], len(places))
    num_users = {row["domain"]: row["num_users"] for row in values}
    noise = {row["domain"]: float(row.get("noise", 0.0)) for row in values}
    metric_index = {metric: index for index, metric in enumerate(METRICS)}
    sums = {domain: np.full((len(places), len(METRICS)), np.nan) for domain, places in methods.items()}
    crossed = {domain: np.full((len(METRICS), len(places), len(places)), np.nan) for domain, places in methods.items()}
    try:
        for row in values:
            sums[row["domain"]][methods[row["domain"]][row["method"]], metric_index[row["metric"]]] = row["sum"]
        for row in products:
            places, m = methods[row["domain"]], metric_index[row["metric"]]
            p, q = places[row["method"]], places[row["other"]]
            crossed[row["domain"]][m, p, q] = crossed[row["domain"]][m, q, p] = row["sum_of_products"]
        return {
            domain: MetricSums(tuple(places), variant, num_users[domain], sums[domain], crossed[domain], noise[domain])
            for domain, places in methods.items()
        }
    except (KeyError, ValueError) as error:
        raise RunDirError(
            f"{run_dir}: metrics.parquet and products.parquet do not match ({error}), expected both of one run. "
            "Copy both files from the same run folder."
        ) from error


def read_domain_roles(run_dir: Path) -> dict[str, Literal["train", "unseen"]]:
    """Return domain -> the role in which a run evaluated it.

    Raises:
        RunDirError: the table is missing or damaged.
    """
    path = run_dir / "metrics.parquet"
    try:
        rows = pq.read_table(path, columns=["domain", "role"]).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise RunDirError(
            f"{path}: cannot be read ({str(error).splitlines()[0]}). Copy the run folder again."
        ) from error
    return {row["domain"]: row["role"] for row in rows}


def _rows(
    path: Path, split: Split, variant: Variant, only: Mapping[str, Collection[str] | None]
) -> list[dict[str, Any]]:
    wanted: list[tuple[str, str, Any]] = [("split", "=", split), ("variant", "=", variant)]
    wanted += [(column, "in", list(names)) for column, names in only.items() if names is not None]
    try:
        rows: list[dict[str, Any]] = pq.read_table(path, filters=wanted).to_pylist()
    except FileNotFoundError as error:
        raise RunDirError(
            f"{path}: not found. Give the folder of a finished run, runs/<id>; {path.name} is written at its end."
        ) from error
    except (OSError, pa.ArrowException, KeyError) as error:
        raise RunDirError(
            f"{path}: cannot be read as a table of metrics ({error}). Copy the run folder again."
        ) from error
    if not rows:
        raise RunDirError(
            f"{path}: found no rows of split {split!r}, variant {variant!r}. Choose a split that "
            "the run evaluated: 'valid' or 'test'."
        )
    return rows
