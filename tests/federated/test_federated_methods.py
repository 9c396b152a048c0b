"""A federation that tries other methods than the default ones: merged, sent, evaluated, chosen among on validation."""

import json
from pathlib import Path

import pytest
from in_process import small_experiment

from fedmerge.encoder.peft.folder import read_adapter
from fedmerge.runs.folder import DONE
from sim.local.in_process import run_in_process


@pytest.mark.long
def test_training_free_methods_take_part_in_the_choice(tmp_path: Path) -> None:
    settings = {"merge.methods": "average,ties,iso-c", "merge.densities": "0.3,0.6", "merge.coefficients": "0.5,1"}
    run_in_process(small_experiment(tmp_path, **settings))
    run = tmp_path / "runs" / "run"
    assert (run / DONE).is_file()
    labels = {"average", "iso-c coefficient 0.5", "iso-c coefficient 1"}
    labels |= {f"ties density {density} coefficient {factor}" for density in ("0.3", "0.6") for factor in ("0.5", "1")}
    choice = json.loads((run / "choice.json").read_text())
    assert labels <= choice["validation"].keys()
    assert choice["best_variants"].keys() == {"average", "ties", "iso-c"}
    assert choice["best_variants"]["ties"].startswith("ties density ")
    assert {folder.name for folder in (run / "merged").iterdir()} == {label.replace(" ", "-") for label in labels}
    largest = max(m.rank for m in read_adapter(run / "merged" / "ties-density-0.3-coefficient-1").modules.values())
    assert largest > 3 * 2  # more than the experts' ranks together
    assert choice["best_variants"]["iso-c"] in (run / "report.txt").read_text()


@pytest.mark.long
def test_learned_methods_with_settings_of_their_own_take_part(tmp_path: Path) -> None:
    settings = {
        "merge.methods": "average,adamerging,mergerec",
        "adamerging.granularities": "layer",
        "adamerging.steps": 3,
        "mergerec.loss": "self+kd",
        "mergerec.kd_top_k": 5,
        "mergerec.pseudo_users": "contrastive",
        "mergerec.steps": 5,
    }
    run_in_process(small_experiment(tmp_path, **settings))
    run = tmp_path / "runs" / "run"
    assert (run / DONE).is_file()
    choice = json.loads((run / "choice.json").read_text())
    assert choice["best_variants"].keys() == {"average", "adamerging", "mergerec"}
    labels = ("adamerging layer-wise", "mergerec domain-wise", "mergerec layer-wise")
    assert {*labels, "average"} <= choice["validation"].keys()
    for label in labels:
        folder = run / "merged" / label.replace(" ", "-")
        assert {"coefficients.png", "losses.png"} <= {file.name for file in folder.iterdir()}
    provenance = json.loads((run / "merged" / "mergerec-layer-wise" / "provenance.json").read_text())
    assert provenance["losses"][0].keys() == {"total", "self", "kd"}
    assert provenance["chosen_step"] == 5
    assert choice["best_variants"]["adamerging"] in (run / "report.txt").read_text()
