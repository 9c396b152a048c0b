"""Whole federations on a tiny decoder: next titles at the clients, titles on the server."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from in_process import killed_at_write, small_experiment
from tiny_families import causal_llama

from fedmerge.adapter import adapter_sha256
from fedmerge.cli import main
from fedmerge.config import ExperimentConfig
from fedmerge.encoder.peft.folder import read_adapter
from fedmerge.files import read_json
from sim.local.in_process import run_in_process

pytestmark = pytest.mark.federation

STAGES = {"mntp.steps": 2, "mntp.batch_size": 4, "simcse.steps": 2, "simcse.batch_size": 4}
REFINED = "llm2rec-style-average"


def experiment(place: Path, **changes: object) -> ExperimentConfig:
    if not (place / "llama").exists():
        causal_llama(place / "llama")
    settings = {
        "backbone.source": str(place / "llama"),
        "backbone.attention": "both-ways",
        "backbone.pooling": "mean",
        "text.max_tokens": 100,
        "text.order": "newest-last",
        "lora.target_modules": "q_proj,v_proj",
        "train.objective": "csft",
        "train.max_steps": 2,
        "train.validation_users": 10,
        "evaluation.validation_users": 20,
        "merge.methods": "average",
        "domains.unseen": "",
    }
    return small_experiment(place, **{**settings, **changes})


def results(run: Path) -> dict[str, str]:
    return {
        folder.name: adapter_sha256(read_adapter(folder)) for folder in [*run.glob("merged/*"), *run.glob("adapters/*")]
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the stages, and one without them."""
    place = tmp_path_factory.mktemp("place")
    run_in_process(experiment(place, run_id="plain"))
    run_in_process(experiment(place, **STAGES))
    return place


def test_the_stages_add_a_merge_and_leave_the_others_as_they_are(place: Path) -> None:
    plain, staged = results(place / "runs" / "plain"), results(place / "runs" / "run")
    assert {*staged} - {*plain} == {REFINED}
    assert {name: sha256 for name, sha256 in staged.items() if name in plain} == plain
    assert staged[REFINED] != staged["average"]
    choice = read_json(place / "runs" / "run" / "choice.json") or {}
    assert {*choice["validation"]} == {"average", "llm2rec-style average"}
    provenance = read_json(place / "runs" / "run" / "merged" / REFINED / "provenance.json") or {}
    assert provenance["stages"]["of"] == "average"
    report = read_json(place / "runs" / "run" / "adapters" / "books" / "training.json") or {}
    assert report["auxiliary"] == {"objective": "csft, LLM2Rec-style (arXiv:2506.21579)"}
    assert not [*(place / "runs" / "run").glob("learning/*.safetensors")]


def test_nothing_travels_but_the_catalogs(place: Path) -> None:
    sent = [pq.read_table(place / "runs" / run / "exposure.parquet").to_pylist() for run in ("plain", "run")]
    kinds = [{(row["message"], row["name"]) for row in rows} for rows in sent]
    assert kinds[1] - kinds[0] == {("query.catalog", "facts.catalog")}
    trained = {row["name"].partition(".")[0] for row in sent[1] if row["message"] == "train"}
    assert trained == {"adapter", "scalings", "facts"}


def test_a_killed_run_resumes_to_the_same_bytes(place: Path, tmp_path: Path) -> None:
    config = experiment(place, output_dir=str(tmp_path), **STAGES)
    killed = False
    for number in (12, 18):  # among the experts, and among the merges
        killed |= killed_at_write(config, number)
        config = config.model_copy(update={"resume": True})
    run_in_process(config)
    assert killed
    assert results(tmp_path / "run") == results(place / "runs" / "run")


def test_rounds_and_secure_sums_are_refined_too(place: Path) -> None:
    run_in_process(experiment(place, run_id="rounds", **STAGES, **{"rounds.rule": "fedit", "rounds.number": 2}))
    assert "llm2rec-style-fedit-2-rounds" in results(place / "runs" / "rounds")
    secure = {"privacy.policy": "aggregate-only", "server.catalogs": str(place / "domains")}
    run_in_process(experiment(place, run_id="secure", **STAGES, **secure))
    assert REFINED in results(place / "runs" / "secure")


def test_experts_are_merged_and_refined_again(place: Path, tmp_path: Path) -> None:
    again = ["merge", str(place / "runs" / "run"), "--catalogs", str(place / "domains"), "--out", str(tmp_path / "out")]
    assert main(again) == 0
    found = adapter_sha256(read_adapter(tmp_path / "out" / REFINED))
    assert found == results(place / "runs" / "run")[REFINED]
