"""Every stage of the benchmark of large catalogs, at a small size."""

from dataclasses import replace
from pathlib import Path

import pytest
from bench_catalog import write_tables
from catalog_stages import STAGES, Sizes, run_stage

from fedmerge.cli import main
from fedmerge.encoder.demo_backbone import write_demo_backbone


@pytest.mark.long
def test_every_stage_of_a_large_catalog_runs(tmp_path: Path) -> None:
    write_tables(tmp_path, 300, 0)
    write_demo_backbone(tmp_path / "backbone")
    tables = ["--interactions", str(tmp_path / "interactions.parquet"), "--catalog", str(tmp_path / "catalog.parquet")]
    options = ["--public-catalog", "--keep-all-items"]
    assert main(["data", "import", "table", str(tmp_path / "domains"), "--name", "north", *tables, *options]) == 0
    sizes = Sizes(users=10, steps=2, sampled=50, draw=False)
    for stage in ("open", *STAGES):
        found = run_stage(stage, tmp_path / "domains" / "north", tmp_path / "backbone", tmp_path / "cache", sizes)
        assert 0 < found["CPU s"] <= found["s"] + 1, stage
        assert found["MB"] > 0, stage
    assert [path.name for path in (tmp_path / "cache").iterdir()] != []
    run_stage(
        "head", tmp_path / "domains" / "north", tmp_path / "backbone", tmp_path / "cache", replace(sizes, sampled=None)
    )
