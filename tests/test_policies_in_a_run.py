"""Privacy policies in whole runs: what a client's own file refuses, and whom the run then names."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, Message
from in_process import Answer, answer_honestly, run_in_process, small_experiment

import sim.federation
import sim.server_app
from fedmerge.config import ExperimentConfig
from fedmerge.errors import PolicyError

DOMAINS = ("beauty", "books", "coffee", "camping")
STRICT = "coffee"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (sim.federation, sim.server_app):
        monkeypatch.setattr(module, "POLL_SECONDS", 0.01)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Domains, a backbone and the clients' disk: every client trains once for all tests here."""
    return tmp_path_factory.mktemp("place")


def experiment(place: Path, tmp_path: Path, **changes: object) -> ExperimentConfig:
    return small_experiment(place, **{"output_dir": str(tmp_path), "merge.methods": "average", **changes})


def with_own_policy(path: Path, text: str) -> Answer:
    """One client has a policy file of its own."""
    path.write_text(text)

    def answer(message: Message, context: Context) -> Message | None:
        if DOMAINS[int(context.node_config["partition-id"])] == STRICT:
            context.node_config["policy-path"] = str(path)
        return answer_honestly(message, context)

    return answer


@pytest.mark.parametrize(
    ("text", "phase", "message"),
    [
        ('policies = "adapter"', "gather", "policies = 'adapter', the run has privacy.policy = 'adapter+catalog'"),
        ("min_users = 21", "gather", "min_users = 21, the run has privacy.min_users = 20"),
        ("mni_users = 1", "gather", "policy file …/policy.toml: nothing is sent until this is corrected"),
    ],
)
def test_a_client_with_a_stricter_policy_refuses_and_is_named(
    place: Path, tmp_path: Path, text: str, phase: str, message: str
) -> None:
    run_in_process(experiment(place, tmp_path), with_own_policy(tmp_path / "policy.toml", text))
    clients = json.loads((tmp_path / "run" / "clients.json").read_text())
    ((name, reason),) = clients["excluded"].items()
    assert name.startswith(f"{STRICT} (node ")
    assert message in reason
    assert str(tmp_path) not in reason
    assert clients["excluded_in_phase"][name] == phase
    assert name in (tmp_path / "run" / "report.txt").read_text()


def test_a_catalog_that_is_not_declared_public_is_not_used_before_any_work(place: Path, tmp_path: Path) -> None:
    small_experiment(place)  # writes the domains
    shutil.copytree(place / "domains", tmp_path / "catalogs")
    manifest = tmp_path / "catalogs" / "books" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"public_catalog": true', '"public_catalog": false'))
    catalogs = {"privacy.policy": "adapter", "server.catalogs": str(tmp_path / "catalogs")}
    changes = {"merge.methods": "mergerec", **catalogs}
    with pytest.raises(
        PolicyError, match=r"domain books: its manifest says public_catalog = false, .*catalog-private"
    ):
        run_in_process(experiment(place, tmp_path, **changes))
    assert not (tmp_path / "run" / "adapters").exists()


LEARNED = {
    "merge.methods": "average,mergerec,adamerging",
    "mergerec.steps": 4,
    "mergerec.batch_size": 8,
    "mergerec.learning_rate": 0.01,
    "mergerec.refresh_every": 2,
    "adamerging.steps": 2,
}
LABELS = ("mergerec domain-wise", "mergerec layer-wise", "adamerging domain-wise", "adamerging layer-wise")


def coefficients(run: Path, label: str) -> np.ndarray:
    provenance = json.loads((run / "merged" / label.replace(" ", "-") / "provenance.json").read_text())
    return np.array([provenance["coefficients"][domain] for domain in sorted(provenance["coefficients"])])


@pytest.fixture(scope="module")
def at_the_server(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in which the server has the catalogs."""
    folder = tmp_path_factory.mktemp("server")
    run_in_process(experiment(place, folder, **LEARNED))
    return folder / "run"


@pytest.fixture(scope="module")
def exact(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with catalogs that stay at the clients."""
    folder = tmp_path_factory.mktemp("exact")
    run_in_process(experiment(place, folder, **LEARNED, **{"privacy.policy": "catalog-private"}))
    return folder / "run"


@pytest.mark.parametrize("label", LABELS)
def test_learning_through_the_clients_equals_learning_from_catalogs(
    at_the_server: Path, exact: Path, label: str
) -> None:
    through, before = coefficients(exact, label), coefficients(at_the_server, label)
    start = 0.2 if label.startswith("mergerec") else 0.3
    assert np.abs(before - start).min() > 1e-3
    assert np.abs(through - before).max() < 1e-5
