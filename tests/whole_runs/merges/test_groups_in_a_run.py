"""Groups of domains through whole runs: the merges, the choice, what is served, what travels, and resuming."""

from pathlib import Path

import pytest
from in_process import small_experiment
from run_folders import output, unlisted_files

from fedmerge.adapter import adapter_sha256
from fedmerge.config import ExperimentConfig
from fedmerge.encoder.peft.folder import read_adapter
from fedmerge.evaluation.sums import GROUP
from fedmerge.files import read_json
from fedmerge.merging.training_free import merge_adapters
from fedmerge.runs.checkpoints import read_sources, read_sums, stored_experts
from fedmerge.server import groups
from fedmerge.server.groups import group_domains
from fedmerge.serving.decision import decide, group_of
from fedmerge.serving.evaluate import evaluate_run
from fedmerge.serving.export import kept_for
from fedmerge.serving.model import load_served, open_run
from sim.local.in_process import run_in_process

pytestmark = pytest.mark.federation

TRAINED = ("beauty", "books", "coffee")
LABEL = "average in 2 groups"


def experiment(place: Path, folder: Path, **changes: object) -> ExperimentConfig:
    chosen = {"merge.methods": "average", "merge.groups": "2", "evaluation.fallback": False, "privacy.min_users": 5}
    return small_experiment(place, **{"output_dir": str(folder), **chosen, **changes})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("place")


@pytest.fixture
def easily_convinced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirty users prove nothing: let any gain count, so that a run serves groups."""
    monkeypatch.setattr(groups, "SIGNIFICANCE", 0.5)


def test_each_domain_is_evaluated_and_served_with_the_merge_of_its_group(
    place: Path, tmp_path: Path, easily_convinced: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run_in_process(experiment(place, tmp_path))
    run = tmp_path / "run"
    sources = read_sources(run)
    assert sources is not None
    experts = stored_experts(run, sources)
    choice = read_json(run / "choice.json")
    entry = choice["groups"]
    assert entry["number"] == 2
    assert [tuple(group) for group in entry["groups"]] == list(group_domains(experts, (2,))[2])
    for group in entry["groups"]:
        merged = merge_adapters({name: experts[name] for name in group}, "average").adapter
        for domain in group:
            assert decide(run, domain).model == GROUP
            found = group_of(run, domain)
            assert found is not None
            assert found[0].name == entry["merges"][domain].replace(" ", "-")
            assert found[1] == tuple(group)
            assert adapter_sha256(read_adapter(found[0])) == adapter_sha256(merged)
            here = open_run(run, place / "domains" / domain, experiment(place, tmp_path))
            served = load_served(here)
            assert served.adapter is not None
            assert adapter_sha256(served.adapter) == adapter_sha256(merged)
            alone = f"it is the expert of {domain} alone"
            assert kept_for(here, served) == (alone if len(group) == 1 else None)
            rows = evaluate_run(here, "test", None).sums["unmasked"].metrics_by_method()
            stored = read_sums(run, "test")[domain]["unmasked"].metrics_by_method()
            assert rows[GROUP] == pytest.approx(stored[GROUP], abs=1e-6)
            assert choice["per_domain"][domain]["serve"] == GROUP
            assert LABEL not in stored
            assert LABEL in read_sums(run, "valid")[domain]["unmasked"].methods
    assert decide(run, "camping").model == "merged"  # unseen: the merge of all
    assert group_of(run, "camping") is None
    assert GROUP not in read_sums(run, "test")["camping"]["unmasked"].methods
    assert choice["validation"].keys() == {"average"}
    assert unlisted_files(run) == []
    assert GROUP in (run / "report.txt").read_text()
    page = Path(output(capsys, "report", run).strip())
    assert GROUP in page.read_text()


def test_a_run_that_stopped_before_its_choice_resumes_to_the_same(
    place: Path, tmp_path: Path, easily_convinced: None
) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run_in_process(experiment(place, whole))
    run_in_process(experiment(place, resumed))
    for name in ("DONE", "choice.json"):
        (resumed / "run" / name).unlink()
    for folder in ("test", "validation"):
        for file in (resumed / "run" / folder).glob("*.json"):
            file.unlink()
    run_in_process(experiment(place, resumed).model_copy(update={"resume": True}))
    for name in ("choice.json", "test/books.json", "validation/books.json"):
        assert (resumed / "run" / name).read_bytes() == (whole / "run" / name).read_bytes(), name


def test_without_a_clear_gain_there_is_one_merge(place: Path, tmp_path: Path) -> None:
    run_in_process(experiment(place, tmp_path, **{"merge.groups": "2,3", "merge.methods": "average,mergerec"}))
    choice = read_json(tmp_path / "run" / "choice.json")
    entry = choice["groups"]
    assert entry["number"] == 1
    labels = ("average", "mergerec domain-wise", "mergerec layer-wise")
    assert entry["scores"].keys() == {f"{label} in {number} groups" for label in labels for number in (2, 3)}
    assert GROUP not in read_sums(tmp_path / "run", "test")["books"]["unmasked"].methods
    assert {entry["serve"] for entry in choice["per_domain"].values()} == {"merged"}
