"""A run's tables, read back into the sums that they were written from."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedmerge.config import Split
from fedmerge.errors import RunDirError
from fedmerge.evaluation.ranks import METRICS
from fedmerge.evaluation.sums import VARIANTS, MetricSums, Variant, metric_sums
from fedmerge.files import write_table
from fedmerge.runs.metric_sums import read_metric_sums

SPLITS: tuple[Split, ...] = ("valid", "test")
Sums = dict[tuple[Split, Variant, str], MetricSums]


@pytest.fixture
def reported() -> Sums:
    """Two domains; on test one of them has a method more."""
    rng = np.random.default_rng(0)
    methods = {"books": ("average", "expert"), "toys": ("average", "last item", "expert")}
    return {
        (split, variant, domain): metric_sums({method: rng.random((4, len(METRICS))) for method in of_domain}, variant)
        for split in SPLITS
        for variant in VARIANTS
        for domain, of_domain in methods.items()
    }


def write_tables(folder: Path, reported: Mapping[tuple[Split, Variant, str], MetricSums]) -> None:
    """The tables of a run folder; of the products only one half, as the server writes them."""
    values: list[dict[str, Any]] = []
    products: list[dict[str, Any]] = []
    for (split, variant, domain), sums in reported.items():
        place = {"split": split, "variant": variant, "domain": domain}
        for p, method in enumerate(sums.methods):
            for m, metric in enumerate(METRICS):
                row = {**place, "role": "train", "method": method, "metric": metric, "num_users": sums.num_users}
                values.append({**row, "sum": float(sums.sums[p, m])})
                for q, other in enumerate(sums.methods[p:], start=p):
                    row = {**place, "metric": metric, "method": method, "other": other}
                    products.append({**row, "sum_of_products": float(sums.products[m, p, q])})
    write_table(folder / "metrics.parquet", values)
    write_table(folder / "products.parquet", products)


def test_sums_come_back_exactly(tmp_path: Path, reported: Sums) -> None:
    write_tables(tmp_path, reported)
    for split in SPLITS:
        for variant in VARIANTS:
            found = read_metric_sums(tmp_path, split, variant)
            assert list(found) == ["books", "toys"]
            for domain, sums in found.items():
                assert sums.to_dict() == reported[split, variant, domain].to_dict()


def damage(folder: Path) -> None:
    (folder / "products.parquet").write_bytes(b"PAR1")


def keep_masked_only(folder: Path) -> None:
    write_table(folder / "metrics.parquet", [{"split": "test", "variant": "masked"}])


def mix(folder: Path) -> None:
    rng = np.random.default_rng(1)
    other: Sums = {("test", "unmasked", "music"): metric_sums({"average": rng.random((4, len(METRICS)))}, "unmasked")}
    (folder / "other").mkdir()
    write_tables(folder / "other", other)
    (folder / "other" / "products.parquet").replace(folder / "products.parquet")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda folder: (folder / "metrics.parquet").unlink(), r"/metrics\.parquet: .*runs/<id>"),
        (damage, r"/products\.parquet: "),
        (mix, r"metrics\.parquet and products\.parquet"),
        (
            lambda folder: write_table(folder / "metrics.parquet", [{"split": "test", "variant": "masked"}]),
            r"/metrics\.parquet: .*'test'.*'unmasked'",
        ),
        (
            lambda folder: write_table(folder / "metrics.parquet", [{"a": 1}]),
            r"/metrics\.parquet: .*variant|/metrics\.parquet: .*split",
        ),
    ],
    ids=["missing", "damaged", "of two runs", "of another variant", "another table"],
)
def test_tables_that_cannot_be_used_are_refused(
    tmp_path: Path, reported: Sums, harm: Callable[[Path], object], message: str
) -> None:
    write_tables(tmp_path, reported)
    harm(tmp_path)
    with pytest.raises(RunDirError, match=message):
        read_metric_sums(tmp_path, "test", "unmasked")
