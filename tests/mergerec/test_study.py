"""The study script: a grid on tiny domains and its table, without computing anything twice."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import study_mergerec
from adapters import layout_of, random_adapter
from backbones import tiny_bert
from in_process import small_experiment
from learning_on_clients import study_settings

from fedmerge.config import to_toml
from fedmerge.device import resolve_compute
from fedmerge.encoder.backbone import load_backbone
from fedmerge.encoder.peft.folder import write_adapter
from fedmerge.merging.methods import complete_parameters

REPOSITORY = Path(__file__).resolve().parents[2]

GRID = """
[[setting]]
method = ["backbone", "expert", "average"]
[[setting]]
method = "ties"
density = [0.2, 0.5]
[[setting]]
method = "mergerec"
name = "chains"
pseudo_users = "chain"
steps = 3
look_at = [1]
[[setting]]
method = "mergerec"
pseudo_users = "popular"
num_pseudo_users = 5
steps = 1
[[setting]]
method = "mergerec"
name = "contrasts"
pseudo_users = "contrastive-adaptive"
loss = "similarity+kd"
teacher = "contrastive"
steps = 1
[[setting]]
method = "clients"
steps = 2
batch_size = 4
"""


def test_a_grid_is_computed_once_and_tabled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_experiment(tmp_path)
    backbone = load_backbone(str(tiny_bert(tmp_path / "again")), "mean", resolve_compute("cpu", "float32"))
    for seed, domain in enumerate(config.domains.train):
        adapter = random_adapter(layout_of(backbone), rank=2, scaling=0.3, seed=seed)
        write_adapter(adapter, tmp_path / "adapters" / domain, "tiny")
    (tmp_path / "run.toml").write_text(to_toml(config))
    (tmp_path / "grid.toml").write_text(GRID)
    arguments = [tmp_path / "run.toml", tmp_path / "adapters", tmp_path / "grid.toml", "--out", tmp_path / "out"]

    def table(*more: str) -> str:
        monkeypatch.setattr(sys, "argv", ["study", *map(str, arguments), "--users", "20", *more])
        study_mergerec.main()
        return capsys.readouterr().out

    first = table()
    files = sorted((tmp_path / "out").glob("*.json"))
    assert len(files) == 9
    written = [path.stat().st_mtime_ns for path in files]
    assert first[first.index("\nunmasked") :] == table("--table")
    assert table("--baseline", "method ties")  # an unknown name: the first row
    assert [path.stat().st_mtime_ns for path in files] == written
    assert "contrasts " in first
    assert "chains @1 " in first
    assert "chains @3 " in first
    assert "camping" in first  # unseen
    records = [json.loads(path.read_text()) for path in files]
    (chains,) = (record for record in records if record["point"].get("name") == "chains")
    assert [merge["step"] for merge in chains["merges"]] == [1, 3]
    assert np.shape(chains["merges"][0]["coefficients"]) == (3,)
    for record in records:
        for merge in record["merges"]:
            assert all(len(ranks[variant]) == 20 for ranks in merge["ranks"].values() for variant in ranks)
    arguments[-1] = tmp_path / "unseen"
    assert table("--leave-out", "coffee", "--unseen-only", "--split", "test", "--users", "0").count("chains @3") == 2
    (record, *_) = (json.loads(path.read_text()) for path in (tmp_path / "unseen").glob("*.json"))
    assert {*record["merges"][0]["ranks"]} == {"camping", "coffee"}


def test_every_point_of_the_grid_file_is_valid() -> None:
    grids = sorted((REPOSITORY / "benchmarks" / "studies" / "mergerec").glob("study_*.toml"))
    points = [point for grid in grids for point in study_mergerec.points_of(grid)]
    for point in points:
        keys = {key: value for key, value in point.items() if key not in ("method", "look_at", "name")}
        match point["method"]:
            case "mergerec" | "adamerging":
                made = study_mergerec.settings_of(point["method"], keys)
                assert max(point.get("look_at", [0])) <= made.steps
            case "clients":
                assert max(point.get("look_at", [0])) <= study_settings(keys)[1].steps
            case "backbone" | "expert":
                assert not keys
            case method:
                complete_parameters(method, keys)
    assert {"mergerec", "clients", "backbone", "expert", "average", "ties"} <= {p["method"] for p in points}
