"""Read the metric sums of a finished run from its tables."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from fedmerge.config import Split
from fedmerge.errors import RunDirError
from fedmerge.evaluation.ranks import METRICS
from fedmerge.evaluation.sums import MetricSums, Variant

Codes = npt.NDArray[np.int64]


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
    values = _columns(folder / "metrics.parquet", split, variant, {"method": only})
    products = _columns(folder / "products.parquet", split, variant, {"method": only, "other": only})
    try:
        return _assemble(values, products, variant)
    except (KeyError, ValueError) as error:
        raise RunDirError(
            f"{run_dir}: metrics.parquet and products.parquet do not match ({error}), expected both of one run. "
            "Copy both files from the same run folder."
        ) from error


def _assemble(values: pa.Table, products: pa.Table, variant: Variant) -> dict[str, MetricSums]:
    """Put the sums of every domain together, without a Python object for each of their rows."""
    domains, domain_of = _coded(values, "domain")
    names, name_of = _coded(values, "method")
    row_of = np.full((len(domains), len(names)), -1)  # of a method in the sums of its domain
    methods: list[list[str]] = [[] for _ in domains]
    pairs = domain_of * len(names) + name_of
    for first in np.sort(np.unique(pairs, return_index=True)[1]):
        domain, name = domain_of[first], name_of[first]
        row_of[domain, name] = len(methods[domain])
        methods[domain].append(names[name])

    sums = [np.full((len(rows), len(METRICS)), np.nan) for rows in methods]
    number, metric = values["sum"].to_numpy(), _known(values, "metric", METRICS)
    for domain, where in enumerate(_places(domain_of, len(domains))):
        sums[domain][row_of[domain, name_of[where]], metric[where]] = number[where]
    num_users = dict(zip(domain_of.tolist(), values["num_users"].to_pylist(), strict=True))
    noises = values["noise"].to_pylist() if "noise" in values.column_names else [0.0] * values.num_rows
    noise = dict(zip(domain_of.tolist(), noises, strict=True))

    crossed = [np.full((len(METRICS), len(rows), len(rows)), np.nan) for rows in methods]
    number, metric = products["sum_of_products"].to_numpy(), _known(products, "metric", METRICS)
    domain_of = _known(products, "domain", domains)
    left, right = (row_of[domain_of, _known(products, column, names)] for column in ("method", "other"))
    if (np.minimum(left, right) < 0).any():
        raise ValueError("products of a method that its domain has no sums of")
    for domain, where in enumerate(_places(domain_of, len(domains))):
        m, p, q = metric[where], left[where], right[where]
        crossed[domain][m, p, q] = crossed[domain][m, q, p] = number[where]
    return {
        domain: MetricSums(tuple(methods[i]), variant, num_users[i], sums[i], crossed[i], float(noise[i]))
        for i, domain in enumerate(domains)
    }


def _places(codes: Codes, number: int) -> list[Codes]:
    """Return for each code below ``number`` the places that have it, in order."""
    order = np.argsort(codes, kind="stable")
    return np.split(order, np.searchsorted(codes[order], np.arange(1, number)))


def _coded(table: pa.Table, column: str) -> tuple[list[str], Codes]:
    """Return the texts of a column in order of appearance, and for each row the place of its text among them."""
    encoded = table[column].combine_chunks().dictionary_encode()
    return encoded.dictionary.to_pylist(), encoded.indices.to_numpy().astype(np.int64)


def _known(table: pa.Table, column: str, known: Sequence[str]) -> Codes:
    """Return for each row the place of its text in ``known``.

    Raises:
        KeyError: a text is not among them.
    """
    texts, codes = _coded(table, column)
    place = {text: index for index, text in enumerate(known)}
    return np.array([place[text] for text in texts], dtype=np.int64)[codes]


def read_domain_roles(run_dir: Path) -> dict[str, Literal["train", "unseen"]]:
    """Return domain -> the role in which a run evaluated it.

    Raises:
        RunDirError: the table is missing or damaged.
    """
    path = run_dir / "metrics.parquet"
    try:
        rows = pq.read_table(path, columns=["domain", "role"])
    except (OSError, pa.ArrowException) as error:
        raise RunDirError(
            f"{path}: cannot be read ({str(error).splitlines()[0]}). Copy the run folder again."
        ) from error
    pairs = rows.group_by(["domain", "role"], use_threads=False).aggregate([])
    return dict(zip(pairs["domain"].to_pylist(), pairs["role"].to_pylist(), strict=True))


def _columns(path: Path, split: Split, variant: Variant, only: Mapping[str, Collection[str] | None]) -> pa.Table:
    wanted: list[tuple[str, str, Any]] = [("split", "=", split), ("variant", "=", variant)]
    wanted += [(column, "in", list(names)) for column, names in only.items() if names is not None]
    try:
        table = pq.read_table(path, filters=wanted)
    except FileNotFoundError as error:
        raise RunDirError(
            f"{path}: not found. Give the folder of a finished run, runs/<id>; {path.name} is written at its end."
        ) from error
    except (OSError, pa.ArrowException, KeyError) as error:
        raise RunDirError(
            f"{path}: cannot be read as a table of metrics ({error}). Copy the run folder again."
        ) from error
    if not table.num_rows:
        raise RunDirError(
            f"{path}: found no rows of split {split!r}, variant {variant!r}. Choose a split that "
            "the run evaluated: 'valid' or 'test'."
        )
    return table
