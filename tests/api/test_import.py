"""fm.import_table writes the domain that the command writes, from files and from frames."""

import logging
from pathlib import Path
from typing import Any

import pandas as pd
import polars as pl
import pytest

import fedmerge as fm
from fedmerge.cli import main
from fedmerge.domain.manifest import Manifest, read_manifest
from fedmerge.errors import ConfigError, DomainError

ORDERS = {
    "customer": ["ann", "ann", "bob", "bob", "cy"],
    "sku": [7, 9, 7, 9, 9],
    "ordered_at": ["03.05.2024", "01.05.2024", "28.05.2024", "28.05.2024", "02.05.2024"],
    "stars": [5, 4, 3, 5, 1],
}
PRODUCTS = {"article": [7, 9, 11], "title": ["Tent", "Stove", "Lamp"], "colour": ["green", "", "red"]}
COLUMNS = {"user": "customer", "item": "sku", "time": "ordered_at", "rating": "stars", "catalog_item": "article"}
OPTIONS: dict[str, Any] = {
    "columns": {**COLUMNS, "texts": ["colour=4", "title"]},
    "time_formats": ["%d.%m.%Y"],
    "min_rating": 2,
    "k_core": 1,
    "keep_all_items": True,
    "public_catalog": True,
}


def hashes(manifest: Manifest) -> tuple[object, ...]:
    return (manifest.catalog_sha256, manifest.interactions_sha256, manifest.attributes, manifest.catalog_source)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    paths = tmp_path / "orders.csv", tmp_path / "products.tsv"
    pd.DataFrame(ORDERS).to_csv(paths[0], index=False, sep=";")
    pd.DataFrame(PRODUCTS).to_csv(paths[1], index=False, sep="\t")
    return paths


def test_files_and_frames_give_the_domain_of_the_command(tmp_path: Path, files: tuple[Path, Path]) -> None:
    orders, products = files
    command = (
        f"data import table {tmp_path} --name a --interactions {orders} --catalog {products} --user-column customer"
    )
    command += " --item-column sku --time-column ordered_at --rating-column stars --catalog-item-column article"
    command += " --text-columns colour=4,title --time-format %d.%m.%Y --min-rating 2 --k-core 1 --keep-all-items"
    assert main([*command.split(), "--public-catalog", "--delimiter", ";"]) == 0
    expected = hashes(read_manifest(tmp_path / "a"))
    found = fm.import_table(
        str(orders), products, str(tmp_path), name="b", interactions_file={"delimiter": ";"}, **OPTIONS
    )
    assert hashes(found.manifest) == expected
    assert found.dropped == {"rated below the minimum": 1}
    for number, frame in enumerate((pd.DataFrame, pl.DataFrame)):
        report = fm.import_table(frame(ORDERS), frame(PRODUCTS), tmp_path, name=f"c{number}", **OPTIONS)
        assert hashes(report.manifest) == expected
        assert hashes(read_manifest(tmp_path / f"c{number}")) == expected


def test_a_frame_alone_and_what_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = pl.DataFrame({"user_id": ["a"] * 5, "item_id": [1] * 5, "timestamp": [3] * 5, "title": ["Tent"] * 5})
    with caplog.at_level(logging.WARNING, "fedmerge"):
        report = fm.import_table(rows, None, tmp_path, name="shop")
    assert (report.manifest.num_interactions, report.manifest.catalog_source) == (1, "interactions")
    assert "shop: 80 % of the rows of interactions repeat" in caplog.text


def test_what_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    orders, products = pd.DataFrame(ORDERS), pd.DataFrame(PRODUCTS)
    with pytest.raises(ConfigError, match=r"columns has no users\. There are: user, item"):
        fm.import_table(orders, products, tmp_path, name="a", columns={"users": "customer"})
    with pytest.raises(ConfigError, match=r"settings has no kcore\. .* k_core"):
        fm.import_table(orders, products, tmp_path, name="a", kcore=5)
    with pytest.raises(ConfigError, match=r"interactions is a LazyFrame, expected .*collect"):
        fm.import_table(pl.LazyFrame(ORDERS), products, tmp_path, name="a")
    with pytest.raises(ConfigError, match="no name"):
        fm.import_table(orders, products, tmp_path, columns=COLUMNS)
    with pytest.raises(DomainError, match=r"interactions: .*'user_id'"):
        fm.import_table(orders, products, tmp_path, name="a")
    assert not list(tmp_path.iterdir())
