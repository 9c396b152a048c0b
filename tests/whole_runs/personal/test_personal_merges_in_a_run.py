"""Personal merges through whole runs: what travels, what is chosen, resuming, and refusals."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from in_process import small_experiment
from run_folders import unlisted_files

import fedmerge.client.coefficients.personal
from fedmerge.adapter import adapter_sha256
from fedmerge.client.coefficients.personal import find_personal_merge, personal_settings
from fedmerge.config import ExperimentConfig
from fedmerge.encoder.peft.folder import read_adapter
from fedmerge.evaluation.sums import BACKBONE, EXPERT, PERSONAL
from fedmerge.files import read_json
from fedmerge.runs.checkpoints import read_sources, read_sums
from fedmerge.server.candidates import UNIVERSAL
from sim.app.messages import records
from sim.local.in_process import answer_honestly, run_in_process

pytestmark = pytest.mark.federation

DOMAINS = ("beauty", "books", "coffee", "camping")
PERSONAL_MERGES = {
    "merge.methods": "average",
    "privacy.policy": "catalog-private",
    "privacy.min_users": 5,
    "train.validation_users": 12,
    "evaluation.validation_users": 12,
    "personal.directions": "module",
    "personal.steps": 4,
    "personal.learning_rate": 0.2,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("place")


def experiment(place: Path, tmp_path: Path, **changes: object) -> ExperimentConfig:
    return small_experiment(place, **{"output_dir": str(tmp_path), **PERSONAL_MERGES, **changes})


class Asked:
    """An honest client that counts what it is asked."""

    def __init__(self) -> None:
        self.counts = Counter[tuple[str, str]]()

    def __call__(self, message: Message, context: Context) -> Message | None:
        self.counts[DOMAINS[int(context.node_config["partition-id"])], message.metadata.message_type] += 1
        return answer_honestly(message, context)


@pytest.fixture(scope="module")
def whole(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, asked = tmp_path_factory.mktemp("whole"), Asked()
    run_in_process(experiment(place, folder), asked)
    once = {message: asked.counts["books", message] for message in (records.COHORT, records.FIT_PERSONAL)}
    assert once == {records.COHORT: 1, records.FIT_PERSONAL: 1}
    assert asked.counts["camping", records.FIT_PERSONAL] == 0
    return folder / "run"


def test_training_domains_have_a_row_and_may_be_served_it(whole: Path) -> None:
    for stage in ("valid", "test"):
        sums = read_sums(whole, stage)
        for domain, of_domain in sums.items():
            assert (PERSONAL in of_domain["unmasked"].methods) == (domain != "camping")
    choice = read_json(whole / "choice.json")
    for entry in choice["per_domain"].values():
        assert entry.keys() == {"serve", "merged", EXPERT, PERSONAL}
        assert entry[entry["serve"]] == max(entry[model] for model in ("merged", EXPERT, PERSONAL))
    assert unlisted_files(whole) == []
    assert (whole / "DONE").is_file()


def test_nothing_of_a_personal_merge_leaves_but_its_sums(whole: Path) -> None:
    rows = pq.read_table(whole / "exposure.parquet").to_pylist()
    sent = {(row["name"], row["dtype"]) for row in rows if row["message"] == records.FIT_PERSONAL}
    assert sent == {("facts.seconds", "float")}
    assert {row["message"] for row in rows if row["shape"]} == {records.TRAIN}


def test_the_merge_is_found_on_the_clients_disk(place: Path, whole: Path) -> None:
    config, sources = experiment(place, whole.parent), read_sources(whole)
    assert sources is not None
    for domain in DOMAINS[:3]:
        found = find_personal_merge(domain, sources, personal_settings(config), config.cache_dir)
        assert found is not None
        assert found.modules.keys() == read_adapter(whole / "adapters" / domain).modules.keys()
    assert find_personal_merge("camping", sources, personal_settings(config), config.cache_dir) is None


def test_a_killed_run_finds_the_fits_that_are_done(
    place: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit, fits, replies = fedmerge.client.coefficients.personal.fit_personal_merge, list[str](), list[float]()

    def counted(domain: Any, *given: Any) -> Any:
        fits.append(domain.manifest.name)
        return fit(domain, *given)

    def killed_at_the_second(content: RecordDict) -> float:
        replies.append(read_fitted(content))
        if len(replies) == 2:
            raise KeyboardInterrupt
        return replies[-1]

    read_fitted = records.read_fitted
    config = experiment(place, tmp_path, cache_dir=str(tmp_path / "cache"))
    monkeypatch.setattr(fedmerge.client.coefficients.personal, "fit_personal_merge", counted)
    monkeypatch.setattr(records, "read_fitted", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        run_in_process(config)
    run_in_process(config.model_copy(update={"resume": True}))
    assert sorted(fits) == sorted(DOMAINS[:3])
    assert read_json(tmp_path / "run" / "choice.json") == read_json(whole / "choice.json")
    sources = read_sources(whole)
    assert sources is not None
    for domain in DOMAINS[:3]:
        before, after = (
            find_personal_merge(domain, sources, personal_settings(config), cache)
            for cache in (str(place / "cache"), config.cache_dir)
        )
        assert before is not None
        assert after is not None
        assert adapter_sha256(before) == adapter_sha256(after)


def test_an_attacker_that_scales_its_update_changes_no_personal_merge_of_others(
    place: Path, whole: Path, tmp_path: Path
) -> None:
    attack = {"simulation.attacker": "coffee", "simulation.attack": "scaled-update", "simulation.attack_strength": 8.0}
    run_in_process(experiment(place, tmp_path, **attack, **{"admission.action": "none"}))
    honest, attacked = (read_sums(folder, "test") for folder in (whole, tmp_path / "run"))
    for domain in ("beauty", "books"):
        before, after = (sums[domain]["unmasked"].metrics_by_method() for sums in (honest, attacked))
        assert before[PERSONAL] == pytest.approx(after[PERSONAL], abs=1e-6)
        assert before[BACKBONE] == after[BACKBONE]
    assert (
        honest["books"]["unmasked"].metrics_by_method()["average"]
        != (attacked["books"]["unmasked"].metrics_by_method()["average"])
    )


@pytest.mark.parametrize("directions", ["module", "rank-one"])
def test_a_universal_merge_is_one_more_candidate(place: Path, tmp_path: Path, directions: str) -> None:
    config = experiment(place, tmp_path, **{"personal.universal": True, "personal.directions": directions})
    run_in_process(config)
    run = tmp_path / "run"
    rows = pq.read_table(run / "exposure.parquet").to_pylist()
    sent = [(row["name"], row["dtype"], row["shape"]) for row in rows if row["message"] == records.FIT_PERSONAL]
    groups = read_json(run / "merged" / UNIVERSAL / "provenance.json")["coefficient_groups"]
    per_client = [("coefficients.fitted", "float32", f"3x{len(groups)}"), ("facts.seconds", "float", "")]
    assert sorted(sent) == sorted(3 * per_client)
    experts = {domain: read_adapter(run / "adapters" / domain) for domain in DOMAINS[:3]}
    sources = read_sources(run)
    assert sources is not None
    own = {name: find_personal_merge(name, sources, personal_settings(config), config.cache_dir) for name in experts}
    found = read_adapter(run / "merged" / UNIVERSAL)
    for name, module in found.modules.items():
        mean = sum(each.modules[name].delta_weight() for each in own.values() if each is not None) / 3
        assert torch.allclose(module.delta_weight(), torch.as_tensor(mean), atol=1e-5)
    assert UNIVERSAL in read_sums(run, "test")["camping"]["unmasked"].methods  # unseen domains are tested on it

    before = adapter_sha256(found)
    run_in_process(config.model_copy(update={"run_id": "again"}))  # from the cached fits
    assert adapter_sha256(read_adapter(tmp_path / "again" / "merged" / UNIVERSAL)) == before


def test_coefficients_of_few_users_stay(place: Path, tmp_path: Path) -> None:
    few = {"personal.universal": True, "evaluation.validation_users": 27}  # three of 30 users are left to fit on
    run_in_process(experiment(place, tmp_path, **few))
    rows = pq.read_table(tmp_path / "run" / "exposure.parquet").to_pylist()
    assert {row["name"] for row in rows if row["message"] == records.FIT_PERSONAL} == {"facts.seconds"}
    universal, average = (read_adapter(tmp_path / "run" / "merged" / label) for label in (UNIVERSAL, "average"))
    assert adapter_sha256(universal) == adapter_sha256(average)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.ones((3, 9), np.float32), "have shape"),
        (np.full((3, 2), np.inf, np.float32), "not finite"),
        (np.full((3, 2), 1e3, np.float32), "farther than 8 from their start"),
        (np.ones((3, 2)), "float64"),
    ],
)
def test_malformed_coefficients_exclude_their_client(
    place: Path, tmp_path: Path, values: np.ndarray, reason: str
) -> None:
    def malformed(message: Message, context: Context) -> Message | None:
        honest = answer_honestly(message, context)
        is_bad = DOMAINS[int(context.node_config["partition-id"])] == "coffee"
        if is_bad and honest is not None and message.metadata.message_type == records.FIT_PERSONAL:
            honest.content["coefficients"] = ArrayRecord({"fitted": Array(values)})
        return honest

    run_in_process(experiment(place, tmp_path, **{"personal.universal": True}), malformed)
    excluded = read_json(tmp_path / "run" / "clients.json")["excluded"]
    assert excluded.keys() == {"coffee"}
    assert reason in str(excluded["coffee"])


def test_a_learned_merge_shares_the_cohort(place: Path, tmp_path: Path) -> None:
    asked = Asked()
    learned = {"merge.methods": "mergerec", "mergerec.granularities": "domain", "mergerec.steps": 1}
    run_in_process(experiment(place, tmp_path, **learned), asked)
    assert asked.counts["books", records.COHORT] == 1
    assert asked.counts["books", records.GRADIENT] == 1
    assert PERSONAL in read_sums(tmp_path / "run", "test")["books"]["unmasked"].methods


def test_a_server_that_asks_for_a_personal_merge_of_a_run_without_one_is_refused(place: Path, tmp_path: Path) -> None:
    refusals = list[str]()

    def asked_too_much(message: Message, context: Context) -> Message | None:
        if message.metadata.message_type == records.TRAIN:
            content = records.personal_request_record(records.PersonalRequest("0" * 64, ""))
            wrong = answer_honestly(Message(content, dst_node_id=1, message_type=records.FIT_PERSONAL), context)
            assert isinstance(wrong, Message)
            refusals.append(str(records.read_error(wrong.content)))
        return answer_honestly(message, context)

    run_in_process(experiment(place, tmp_path, **{"personal.directions": "none"}), asked_too_much)
    assert len(refusals) == 3
    assert all("personal.directions = 'none'" in refusal for refusal in refusals)
