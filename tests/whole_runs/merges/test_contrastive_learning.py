"""Contrasts of experts in whole runs: as pseudo-users and as a teacher, at the server and at clients; similarity."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from in_process import small_experiment

from sim.local.in_process import run_in_process

pytestmark = pytest.mark.federation

CONTRASTIVE = {
    "merge.methods": "mergerec",
    "mergerec.granularities": "layer",
    "mergerec.steps": 3,
    "mergerec.learning_rate": 0.01,
    "mergerec.pseudo_users": "contrastive-adaptive",
    "mergerec.teacher": "contrastive",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Domains, a backbone and the clients' disk: every client trains once for all tests here."""
    return tmp_path_factory.mktemp("place")


def provenance(place: Path, folder: Path, **changes: object) -> dict[str, Any]:
    """Run an experiment, and return the provenance of its layer-wise merge."""
    run_in_process(small_experiment(place, **{"output_dir": str(folder), **CONTRASTIVE, **changes}))
    assert (folder / "run" / "DONE").is_file()
    found: dict[str, Any] = json.loads((folder / "run" / "merged/mergerec-layer-wise/provenance.json").read_text())
    return found


def coefficients(record: dict[str, Any]) -> np.ndarray:
    return np.array([record["coefficients"][domain] for domain in sorted(record["coefficients"])])


def test_clients_learn_from_the_contrast_what_the_server_learns(place: Path, tmp_path: Path) -> None:
    at_server = provenance(place, tmp_path / "server")
    at_clients = provenance(place, tmp_path / "clients", **{"privacy.policy": "catalog-private"})
    plain = provenance(place, tmp_path / "plain", **{"mergerec.teacher": "expert"})
    assert np.abs(coefficients(at_server) - 1 / 3**0.5).max() > 1e-3
    assert np.abs(coefficients(at_clients) - coefficients(at_server)).max() < 1e-5
    assert np.abs(coefficients(plain) - coefficients(at_server)).max() > 1e-4
    for record in (at_server, at_clients, plain):
        assert record["reconstructions"] == ["Taesar-style (arXiv:2602.22743)"]
        assert record["parameters"]["pseudo_users"] == "contrastive-adaptive"
    rows = pq.read_table(tmp_path / "clients" / "run" / "exposure.parquet").to_pylist()
    assert {row["name"] for row in rows if row["message"] == "query.gradient"} == {"coefficients.answer"}


def test_the_server_learns_from_the_similarity_of_all_items(place: Path, tmp_path: Path) -> None:
    changes = {"mergerec.teacher": "expert", "mergerec.pseudo_users": "one-item", "mergerec.loss": "similarity+kd"}
    record = provenance(place, tmp_path, **changes)
    assert record["reconstructions"] == ["FedCIA-style (arXiv:2504.14208)"]
    assert record["losses"][0].keys() == {"total", "similarity", "kd"}
    assert np.abs(coefficients(record) - 1 / 3**0.5).max() > 1e-3
