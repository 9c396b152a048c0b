"""What holds for every strategy of docs/strategies.md that is no merging method and no rule of rounds.

What leaves is what the table names; the order of the clients changes nothing; a killed run resumes to the same bytes.
Methods have these laws in tests/merging and tests/server, rules in tests/federated. The neutral setting of each
strategy, and one domain alone, stand beside its definition.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from in_process import killed_at_write, small_experiment
from shops import SHOPS, write_shops
from tiny_families import causal_llama

from fedmerge.adapter import adapter_sha256
from fedmerge.config import ExperimentConfig
from fedmerge.encoder.peft.folder import read_adapter
from fedmerge.files import read_json
from fedmerge.report.docs.strategies import OTHERS, Strategy
from sim.local.in_process import run_in_process

pytestmark = [pytest.mark.federation, pytest.mark.slow]

SMALL = {
    "merge.methods": "average",
    "privacy.min_users": 5,
    "train.validation_users": 12,
    "evaluation.validation_users": 12,
    "evaluation.baselines": "last-item",
    "head.hidden_size": 8,
    "head.max_epochs": 1,
    "head.rounds": 2,
    "head.steps": 2,
    "mergerec.granularities": "layer",
    "mergerec.steps": 2,
    "personal.steps": 4,
    "rmm.budget": 8,
    "rmm.candidates": "experts",
    "rmm.users": 8,
    "weave.steps": 2,
    "weave.factors": "1.0",
}
SHARED = {"domains.train": ",".join(SHOPS), "domains.unseen": ""}
WRITES = 45  # of the killed run, about half of them
ALWAYS = {"query.describe", "evaluate"}
SENT: Mapping[str, set[str]] = {  # records of the replies
    "query.describe": {"facts"},
    "query.catalog": {"facts"},
    "query.cohort": {"facts"},
    "query.gradient": {"coefficients"},
    "query.layer_map": {"facts"},
    "query.similarity": {"similarity"},
    "train": {"adapter", "scalings", "facts"},
    "train.head": {"facts"},
    "train.head_round": {"adapter", "scalings", "facts"},
    "train.personal": {"facts", "coefficients"},
    "train.weave": {"adapter", "scalings", "facts"},
    "evaluate": {"facts"},
}
Runs = Callable[[Strategy], Path]
EVERY = pytest.mark.parametrize("strategy", OTHERS, ids=lambda strategy: strategy.name)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    write_shops(folder / "shops")
    return folder


def experiment(place: Path, output_dir: Path, strategy: Strategy, **changes: object) -> ExperimentConfig:
    shared = "query.similarity" in strategy.messages
    root = {"domains.root": str(place / "shops"), **SHARED} if shared else {}
    flat = {**SMALL, **root, **strategy.settings, "output_dir": str(output_dir), **changes}
    if "train.objective" in strategy.settings:
        if not (place / "llama").exists():
            causal_llama(place / "llama")
        flat |= {"backbone.source": str(place / "llama"), "lora.target_modules": "q_proj,v_proj"}
        flat |= {key: 2 for key in ("mntp.steps", "simcse.steps") if key in flat}
    return small_experiment(place, **flat)


@pytest.fixture(scope="module")
def whole(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    made: dict[str, Path] = {}

    def run_of(strategy: Strategy) -> Path:
        if strategy.name not in made:
            folder = tmp_path_factory.mktemp("whole")
            run_in_process(experiment(place, folder, strategy))
            made[strategy.name] = folder / "run"
        return made[strategy.name]

    return run_of


def results(run: Path) -> dict[str, Any]:
    """What a run decides: the bytes of its adapters, and its choice."""
    folders = [*run.glob("merged/*"), *run.glob("woven-merges/*"), *run.glob("head"), *run.glob("adapters/*")]
    adapters = {str(folder.relative_to(run)): adapter_sha256(read_adapter(folder)) for folder in folders}
    return {"choice": read_json(run / "choice.json"), **adapters}


@EVERY
def test_what_leaves_is_what_the_table_names(whole: Runs, strategy: Strategy) -> None:
    rows = pq.read_table(whole(strategy) / "exposure.parquet").to_pylist()
    assert {row["message"] for row in rows} == ALWAYS | {*strategy.messages}
    for message in {row["message"] for row in rows}:
        records = {row["name"].partition(".")[0].partition(" from ")[0] for row in rows if row["message"] == message}
        assert records <= SENT[message]
    fitted = {row["name"] for row in rows if row["message"] == "train.personal"} - {"facts.seconds"}
    assert fitted == ({"coefficients.fitted"} if strategy.settings.get("personal.universal") else set())


@EVERY
def test_the_order_of_the_clients_changes_nothing(place: Path, whole: Runs, tmp_path: Path, strategy: Strategy) -> None:
    turned = ",".join(reversed(experiment(place, tmp_path, strategy).domains.train))
    own = {"domains.train": turned, "cache_dir": str(tmp_path / "cache")}  # nothing comes from the caches of before
    run_in_process(experiment(place, tmp_path, strategy, **own))
    assert results(tmp_path / "run") == results(whole(strategy))


@EVERY
def test_a_killed_run_resumes_to_the_same_bytes(place: Path, whole: Runs, tmp_path: Path, strategy: Strategy) -> None:
    expected, own = results(whole(strategy)), {"cache_dir": str(tmp_path / "cache")}
    config = experiment(place, tmp_path, strategy, **own)
    assert killed_at_write(config, WRITES)
    run_in_process(config.model_copy(update={"resume": True}))
    assert results(tmp_path / "run") == expected
