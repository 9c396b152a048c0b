"""Similarity averaging over shared items through whole runs: messages, merges, resuming, refusals, audit."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from flwr.app import Context, Message, RecordDict
from in_process import small_experiment
from run_folders import output, unlisted_files
from shops import SHOPS, write_shops

from fedmerge.adapter import adapter_sha256
from fedmerge.client.audit.similarity import CONTROL, LESS, OWN
from fedmerge.config import ExperimentConfig
from fedmerge.domain.catalog import load_catalog
from fedmerge.encoder.peft.folder import read_adapter
from fedmerge.errors import DomainError
from fedmerge.federated.shared_items import find_shared_items, mean_similarity
from fedmerge.federated.weaving import SHARED, Weaving, target_merge, woven_merge
from fedmerge.files import read_json
from fedmerge.runs.checkpoints import (
    read_sources,
    read_target_merge,
    read_weave,
    stored_experts,
    stored_factors,
    stored_woven,
)
from sim.app.messages import records
from sim.local.in_process import answer_honestly, run_in_process

pytestmark = pytest.mark.federation

SIMILARITY = {
    "domains.train": ",".join(SHOPS),
    "domains.unseen": "",
    "merge.methods": "average",
    "privacy.min_users": 5,
    "weave.schedule": "similarity",
    "weave.steps": 2,
    "weave.rate": 1.0,
    "weave.factors": "1.0",
    "weave.similarity_rank": 8,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    write_shops(folder / "shops")
    return folder


def experiment(place: Path, tmp_path: Path, **changes: object) -> ExperimentConfig:
    root = {"domains.root": str(place / "shops"), "output_dir": str(tmp_path)}
    return small_experiment(place, **{**root, **SIMILARITY, **changes})


class Asked:
    """An honest client that notes the types of messages, and what comes with them."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.means: list[Any] = []

    def __call__(self, message: Message, context: Context) -> Message | None:
        self.messages.append(message.metadata.message_type)
        if message.metadata.message_type == records.WEAVE:
            self.means.append(records.read_mean_similarity(message.content, 25))
        return answer_honestly(message, context)


@pytest.fixture(scope="module")
def whole(place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Asked]:
    folder, asked = tmp_path_factory.mktemp("whole"), Asked()
    run_in_process(experiment(place, folder), asked)
    return folder / "run", asked


def test_each_client_is_pulled_to_the_mean_of_all_factors(place: Path, whole: tuple[Path, Asked]) -> None:
    run, asked = whole
    sent = stored_factors(run)
    catalogs = {name: load_catalog(place / "shops" / name).item_ids for name in SHOPS}
    expected = find_shared_items(catalogs)
    assert {name: shared.items.tolist() for name, (shared, _) in sent.items()} == {
        name: shared.items.tolist() for name, shared in expected.items()
    }
    assert asked.messages.count(records.SIMILARITY) == 3
    factors = {name: found for name, (_, found) in sent.items()}
    means = {name: mean_similarity(name, expected, factors) for name in SHOPS}
    for name in SHOPS:
        assert sum(torch.equal(means[name].factors, received.factors) for received in asked.means) >= 1
    assert {tuple(mean.present.sum(dim=0).tolist()) for mean in asked.means} == {(25, 25, 24), (24, 24, 24)}


def test_what_was_continued_is_merged_in_place_of_the_experts(whole: tuple[Path, Asked]) -> None:
    run, _ = whole
    sources, hashes = read_sources(run), read_weave(run)
    assert sources is not None
    assert hashes is not None
    assert {*hashes} == {Weaving(name, SHARED) for name in SHOPS}
    experts, woven = stored_experts(run, sources), stored_woven(run, hashes)
    merged = run / "merged" / "weave-factor-1"
    assert adapter_sha256(read_adapter(merged)) == adapter_sha256(woven_merge(experts, woven, 1.0))
    kind = read_json(merged / "provenance.json")["weave"]
    assert kind["kind"].startswith("FedCIA-style")
    assert (kind["similarity_rank"], kind["similarity_weight"]) == (8, 10.0)
    for name in SHOPS:
        own = read_target_merge(run, name)
        assert own is not None
        assert adapter_sha256(own.adapter) == adapter_sha256(target_merge(name, experts[name], woven, 1.0))
    assert unlisted_files(run) == []


def test_the_ledger_holds_the_factors_and_nothing_else_is_new(whole: tuple[Path, Asked]) -> None:
    ledger = pq.read_table(whole[0] / "exposure.parquet").to_pylist()
    rows = [row for row in ledger if row["message"] == records.SIMILARITY]
    assert {row["name"] for row in rows} == {"similarity.factors"}
    assert {row["domain"]: (row["dtype"], row["shape"]) for row in rows} == {
        "shop-a": ("float16", "25x8"),
        "shop-b": ("float16", "25x8"),
        "shop-c": ("float16", "24x8"),
    }
    for row in rows:
        assert 0 <= row["size_bytes"] - 2 * 8 * (24 if row["domain"] == "shop-c" else 25) <= 256


def test_without_steps_the_merge_is_the_average_to_the_bit(place: Path, tmp_path: Path) -> None:
    run_in_process(experiment(place, tmp_path, **{"weave.steps": 0}))
    average, neutral = (read_adapter(tmp_path / "run" / "merged" / name) for name in ("average", "weave-factor-1"))
    assert adapter_sha256(neutral) == adapter_sha256(average)


@pytest.mark.parametrize("reader", ["read_similarity", "read_woven"])
def test_a_killed_run_resumes_to_the_same_bytes(
    place: Path, whole: tuple[Path, Asked], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: str
) -> None:
    replies, honest = list[RecordDict](), getattr(records, reader)

    def killed_at_the_second(content: RecordDict, expected: Any) -> Any:
        replies.append(content)
        if len(replies) == 2:
            raise KeyboardInterrupt
        return honest(content, expected)

    config, asked = experiment(place, tmp_path), Asked()
    monkeypatch.setattr(records, reader, killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        run_in_process(config)
    run_in_process(config.model_copy(update={"resume": True}), asked)
    run, once = tmp_path / "run", whole[0]
    assert asked.messages.count(records.SIMILARITY) == (2 if reader == "read_similarity" else 0)
    for file in ("weave.json", "choice.json", "similarity/averaged.json"):
        assert read_json(run / file) == read_json(once / file)
    merged = [read_adapter(folder / "merged" / "weave-factor-1") for folder in (run, once)]
    assert adapter_sha256(merged[0]) == adapter_sha256(merged[1])


def test_without_shared_items_nothing_is_trained(place: Path, tmp_path: Path) -> None:
    asked = Asked()
    root = {"domains.root": str(place / "domains"), "domains.train": "beauty,books,coffee"}
    with pytest.raises(DomainError, match="no shared items: found fewer than 2 item ids of beauty, books, coffee"):
        run_in_process(experiment(place, tmp_path, **root), asked)
    assert {*asked.messages} == {records.DESCRIBE, records.CATALOG}


def test_an_organisation_that_shares_no_similarity_is_excluded_by_name(place: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text('policies = "adapter+catalog"\nmin_users = 5\nmetrics = "exact"\nshare_similarity = false\n')

    def refusing(message: Message, context: Context) -> Message | None:
        if context.node_config["partition-id"] == 2:
            context.node_config["policy-path"] = str(policy)
        return answer_honestly(message, context)

    run_in_process(experiment(place, tmp_path, **{"until": "train"}), refusing)
    assert "share_similarity = false" in str(read_json(tmp_path / "run" / "clients.json")["excluded"])
    assert {each.target for each in read_weave(tmp_path / "run") or ()} == {"shop-a", "shop-b"}


def test_by_user_factors_are_of_the_noised_expert_and_both_trainings_are_counted(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("opacus")
    by_user = {"dp.mode": "user", "dp.epsilon": 8.0, "dp.delta": 1e-4, "dp.accountant": "rdp"}
    run_in_process(experiment(place, tmp_path, **by_user, **{"train.negatives": "catalog", "until": "train"}))
    statement = read_json(tmp_path / "run" / "privacy.json")
    assert statement["guarantee_of_run"]
    for domain in SHOPS:
        assert [release["steps"] for release in statement["domains"][domain]["releases"]] == [4, 2]
    rows = pq.read_table(tmp_path / "run" / "exposure.parquet").to_pylist()
    assert {row["noise"] for row in rows if row["message"] == records.SIMILARITY} == {"Gaussian, by user"}


def test_a_server_that_asks_without_the_schedule_is_refused(place: Path, tmp_path: Path) -> None:
    refusals = list[str]()

    def asked_too_much(message: Message, context: Context) -> Message | None:
        if message.metadata.message_type == records.TRAIN:
            request = records.SimilarityRequest("e" * 64, 8)
            content = records.similarity_request_record(request, torch.arange(3).numpy())
            wrong = answer_honestly(Message(content, dst_node_id=1, message_type=records.SIMILARITY), context)
            assert isinstance(wrong, Message)
            refusals.append(str(records.read_error(wrong.content)))
        return answer_honestly(message, context)

    run_in_process(experiment(place, tmp_path, **{"weave.schedule": "none", "until": "train"}), asked_too_much)
    assert len(refusals) == 3
    assert all("weave.schedule is not 'similarity'" in refusal for refusal in refusals)


def test_the_audit_reads_the_factors_beside_those_of_other_users(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = {"simulation.held_out_users": 0.5, "privacy.min_users": 2, "until": "train"}
    run_in_process(experiment(place, tmp_path, **held_out))
    found = output(capsys, "privacy", "audit", tmp_path / "run", "--domain", "shop-a", "--shadows", "0", "--json")
    audited = json.loads(found)["domains"]["shop-a"]
    labels = [OWN, *(CONTROL.format(name) for name in SHOPS[1:])]
    wanted = {name + end for name in labels for end in ("", LESS)}
    assert wanted <= {row["model"] for row in audited["membership"]}
    assert wanted <= {row["from"] for row in audited["recovery"]["rows"]}
    assert "similarity factors of shop-b (control)" in (tmp_path / "run" / "privacy-audit.txt").read_text()
