"""Weaving through whole runs: what travels, what is merged, resuming, refusals, and noise."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from flwr.app import Context, Message, RecordDict
from in_process import small_experiment
from run_folders import output, unlisted_files

from fedmerge.adapter import Adapter, adapter_sha256
from fedmerge.config import ExperimentConfig
from fedmerge.encoder.peft.folder import read_adapter
from fedmerge.errors import ClientError
from fedmerge.evaluation.sums import EXPERT, WOVEN, woven_label
from fedmerge.federated.weaving import MEAN, Weaving, target_merge, woven_merge
from fedmerge.files import read_json
from fedmerge.runs.checkpoints import (
    read_sources,
    read_sums,
    read_target_merge,
    read_weave,
    stored_experts,
    stored_woven,
    woven_folder,
)
from fedmerge.serving.evaluate import evaluate_run
from fedmerge.serving.export import kept_for
from fedmerge.serving.model import load_served, open_run
from sim.app.messages import records
from sim.local.in_process import answer_honestly, run_in_process

pytestmark = pytest.mark.federation

DOMAINS = ("beauty", "books", "coffee", "camping")
TRAINED = DOMAINS[:3]
WEAVING = {
    "merge.methods": "average",
    "privacy.policy": "catalog-private",
    "privacy.min_users": 5,
    "weave.schedule": "all",
    "weave.steps": 4,
    "weave.rate": 1.0,
    "weave.factors": "1.0,1.4",
}

UNSEEN = {"domains.unseen": "coffee,camping"}  # so that every node keeps its domain


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("place")


def experiment(place: Path, tmp_path: Path, **changes: object) -> ExperimentConfig:
    return small_experiment(place, **{"output_dir": str(tmp_path), **WEAVING, **changes})


class Asked:
    """An honest client that notes what it is asked to continue, by whom."""

    def __init__(self) -> None:
        self.weaving: list[Weaving] = []

    def __call__(self, message: Message, context: Context) -> Message | None:
        if message.metadata.message_type == records.WEAVE:
            request, _ = records.read_weave_request(message.content)
            self.weaving.append(Weaving(domain_of(context), request.source))
        return answer_honestly(message, context)


def domain_of(context: Context) -> str:
    return DOMAINS[int(context.node_config["partition-id"])]


def hashes_of(run: Path) -> dict[Weaving, str]:
    woven = read_weave(run)
    assert woven is not None
    return woven


def adapters_of(run: Path) -> tuple[Mapping[str, Adapter], Mapping[Weaving, Adapter]]:
    sources = read_sources(run)
    assert sources is not None
    return stored_experts(run, sources), stored_woven(run, hashes_of(run))


@pytest.fixture(scope="module")
def whole(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, asked = tmp_path_factory.mktemp("whole"), Asked()
    run_in_process(experiment(place, folder), asked)
    assert sorted(asked.weaving) == sorted(Weaving(t, k) for t in TRAINED for k in TRAINED if t != k)
    return folder / "run"


def test_universal_merges_are_candidates_like_others(whole: Path) -> None:
    experts, woven = adapters_of(whole)
    choice = read_json(whole / "choice.json")
    assert {"average", "weave factor 1", "weave factor 1.4"} == choice["validation"].keys()
    assert {"average", "weave"} == choice["best_variants"].keys()
    for factor in (1.0, 1.4):
        folder = whole / "merged" / f"weave-factor-{factor:g}"
        assert adapter_sha256(read_adapter(folder)) == adapter_sha256(woven_merge(experts, woven, factor))
        provenance = read_json(folder / "provenance.json")
        assert provenance["weave"]["kind"].startswith("WeaveRec-style")
        assert provenance["weave"]["woven"]["books"].keys() == {"beauty", "coffee"}
    assert unlisted_files(whole) == []
    assert (whole / "DONE").is_file()


def test_the_training_signals_of_continued_adapters_stay_at_the_client(whole: Path) -> None:
    reports = [read_json(path) for path in sorted((whole / "woven").glob("*/*/training.json"))]
    assert len(reports) == len(TRAINED) * (len(TRAINED) - 1)
    assert all("steps" in report and "signals" not in report for report in reports)


def test_each_target_has_its_own_merge_with_the_factor_that_its_users_chose(place: Path, whole: Path) -> None:
    experts, woven = adapters_of(whole)
    validation, test = read_sums(whole, "valid"), read_sums(whole, "test")
    choice = read_json(whole / "choice.json")
    assert choice["per_domain"].keys() == {*TRAINED}
    for domain in TRAINED:
        scores = validation[domain]["unmasked"].metrics_by_method()
        of_factor = {factor: scores[woven_label(factor)]["ndcg@10"] for factor in (1.0, 1.4)}
        best = max(of_factor, key=lambda factor: of_factor[factor])
        found = read_target_merge(whole, domain)
        assert found is not None
        assert found.provenance.parameters == {"factor": best}
        expected = target_merge(domain, experts[domain], woven, best)
        assert adapter_sha256(found.adapter) == adapter_sha256(expected)
        entry = choice["per_domain"][domain]
        assert entry.keys() == {"serve", "merged", EXPERT, WOVEN}
        assert entry[WOVEN] == of_factor[best]
        assert entry[entry["serve"]] == max(entry[model] for model in ("merged", EXPERT, WOVEN))
        assert WOVEN in test[domain]["unmasked"].methods
        assert woven_label(1.0) not in test[domain]["unmasked"].methods
    assert not any(name.startswith(WOVEN) for name in test["camping"]["unmasked"].methods)


def test_the_merge_of_a_target_is_evaluated_and_served_from_the_run(place: Path, whole: Path) -> None:
    config = experiment(place, whole.parent)
    here = open_run(whole, place / "domains" / "books", config)
    evaluated = evaluate_run(here, "test", config.evaluation.test_users).sums["unmasked"]
    rows = read_sums(whole, "test")["books"]["unmasked"].metrics_by_method()
    assert evaluated.metrics_by_method()[WOVEN] == pytest.approx(rows[WOVEN], abs=1e-6)
    served = load_served(here, WOVEN)
    found = read_target_merge(whole, "books")
    assert found is not None
    assert served.adapter is not None
    assert adapter_sha256(served.adapter) == adapter_sha256(found.adapter)
    assert kept_for(here, served) == "it is the merge of what books alone trained"
    with pytest.raises(ClientError, match="camping has no woven merge"):
        load_served(open_run(whole, place / "domains" / "camping", config), WOVEN)


def test_the_ledger_holds_each_continued_adapter_by_target_and_source(whole: Path) -> None:
    rows = [row for row in pq.read_table(whole / "exposure.parquet").to_pylist() if row["message"] == records.WEAVE]
    _, woven = adapters_of(whole)
    for each, adapter in woven.items():
        label = f"adapter from {each.source}."
        sent = [row for row in rows if row["domain"] == each.target and row["name"].startswith(label)]
        numbers = sum(module.lora_A.numel() + module.lora_B.numel() for module in adapter.modules.values())
        assert len(sent) == 2 * len(adapter.modules)
        assert numbers * 4 <= sum(row["size_bytes"] for row in sent) <= numbers * 4 + 1024 * len(sent)
    others = {row["name"].partition(" from ")[0] for row in rows}
    assert others == {"adapter", "scalings", "facts.report"}


def test_without_steps_all_is_as_it_was(place: Path, tmp_path: Path) -> None:
    run_in_process(experiment(place, tmp_path, **{"weave.steps": 0}))
    run = tmp_path / "run"
    experts, woven = adapters_of(run)
    assert {each: adapter_sha256(woven[each]) for each in woven} == {
        each: adapter_sha256(experts[each.source]) for each in woven
    }
    average, neutral = (read_adapter(run / "merged" / name) for name in ("average", "weave-factor-1"))
    assert adapter_sha256(neutral) == adapter_sha256(average)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("ring", {"beauty": "coffee", "books": "beauty", "coffee": "books"}),
        ("mean", dict.fromkeys(TRAINED, MEAN)),
    ],
)
def test_a_schedule_asks_for_its_trainings_alone(
    place: Path, whole: Path, tmp_path: Path, schedule: str, expected: dict[str, str]
) -> None:
    run_in_process(experiment(place, tmp_path, **{"weave.schedule": schedule}))
    found = hashes_of(tmp_path / "run")
    assert {each.target: each.source for each in found} == expected
    if schedule == "ring":  # an adapter does not depend on which others were asked for
        assert found.items() <= hashes_of(whole).items()


def test_a_relay_walks_through_all_clients(place: Path, whole: Path, tmp_path: Path) -> None:
    run_in_process(experiment(place, tmp_path, **{"weave.schedule": "relay"}))
    found, once = hashes_of(tmp_path / "run"), hashes_of(whole)
    assert found.keys() == once.keys()
    first = [Weaving("books", "beauty"), Weaving("coffee", "books"), Weaving("beauty", "coffee")]
    assert all(found[each] == once[each] for each in first)  # they start from the expert
    assert any(found[each] != once[each] for each in found if each not in first)


def test_a_run_killed_between_two_weavings_resumes_to_the_same_bytes(
    place: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replies = list[str]()

    def killed_at_the_fourth(content: RecordDict, source: str) -> tuple[Adapter, dict[str, Any]]:
        replies.append(source)
        if len(replies) == 4:
            raise KeyboardInterrupt
        return read_woven(content, source)

    read_woven = records.read_woven
    config = experiment(place, tmp_path)
    monkeypatch.setattr(records, "read_woven", killed_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        run_in_process(config)
    assert read_weave(tmp_path / "run") is None
    asked = Asked()
    run_in_process(config.model_copy(update={"resume": True}), asked)
    assert len(asked.weaving) == 3
    assert hashes_of(tmp_path / "run") == hashes_of(whole)
    assert read_json(tmp_path / "run" / "choice.json") == read_json(whole / "choice.json")


def test_a_damaged_adapter_is_sent_again_and_another_one_is_refused(place: Path, whole: Path, tmp_path: Path) -> None:
    config = experiment(place, tmp_path, **{"until": "train"})
    run_in_process(config)
    run, asked = tmp_path / "run", Asked()
    (run / "DONE").unlink()
    (woven_folder(run, Weaving("books", "coffee")) / "adapter_model.safetensors").write_bytes(b"damaged")
    run_in_process(config.model_copy(update={"resume": True}), asked)
    assert asked.weaving == [Weaving("books", "coffee")]
    assert hashes_of(run) == hashes_of(whole)

    def another(message: Message, context: Context) -> Message | None:
        if message.metadata.message_type != records.WEAVE:
            return answer_honestly(message, context)
        request, start = records.read_weave_request(message.content)
        return Message(records.woven_record(request.source, start, {"privacy": None}), reply_to=message)

    (run / "DONE").unlink()
    (woven_folder(run, Weaving("books", "beauty")) / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ClientError, match="adapters that books continued were merged, but are missing or damaged"):
        run_in_process(config.model_copy(update={"resume": True}), another)


def test_a_client_that_fails_is_excluded_and_no_target(place: Path, whole: Path, tmp_path: Path) -> None:
    def failing(message: Message, context: Context) -> Message | None:
        if message.metadata.message_type == records.WEAVE and domain_of(context) == "books":
            return Message(records.error_record("too few users", "books"), reply_to=message)
        return answer_honestly(message, context)

    run_in_process(experiment(place, tmp_path, **{"server.min_train_clients": 2}), failing)
    run = tmp_path / "run"
    clients = read_json(run / "clients.json")
    assert "train.weave failed: too few users" in clients["excluded"]["books"]
    assert clients["excluded_in_phase"]["books"] == "weave"
    others = {each: sha256 for each, sha256 in hashes_of(whole).items() if each.target != "books"}
    assert hashes_of(run) == others
    experts, woven = adapters_of(run)
    targets = {name: experts[name] for name in ("beauty", "coffee")}
    merged = read_adapter(run / "merged" / "weave-factor-1")
    assert adapter_sha256(merged) == adapter_sha256(woven_merge(targets, woven, 1.0))


def test_a_client_that_refuses_adapters_is_excluded_and_the_others_run_is_the_run_without_it(
    place: Path, tmp_path: Path
) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text('policies = "catalog-private"\nmin_users = 5\nmetrics = "exact"\nreceive_adapters = false\n')

    def refusing(message: Message, context: Context) -> Message | None:
        if domain_of(context) == "coffee":
            context.node_config["policy-path"] = str(policy)
        return answer_honestly(message, context)

    two = {"server.min_train_clients": 2}
    run_in_process(experiment(place, tmp_path / "refused", **two), refusing)
    run_in_process(experiment(place, tmp_path / "without", **two, **{"domains.train": "beauty,books", **UNSEEN}))
    refused, without = tmp_path / "refused" / "run", tmp_path / "without" / "run"
    assert "receive_adapters = false" in str(read_json(refused / "clients.json")["excluded"])
    assert hashes_of(refused) == hashes_of(without)
    for label in ("average", "weave-factor-1", "weave-factor-1.4"):
        merges = [read_adapter(run / "merged" / label) for run in (refused, without)]
        assert adapter_sha256(merges[0]) == adapter_sha256(merges[1])


def test_by_user_the_statement_adds_up_all_trainings_of_a_client(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("opacus")
    by_user = {"dp.mode": "user", "dp.epsilon": 8.0, "dp.delta": 1e-4, "dp.accountant": "rdp"}
    private = {**by_user, "train.negatives": "catalog", "weave.steps": 3, "until": "train"}
    run_in_process(experiment(place, tmp_path, **private))
    statement = read_json(tmp_path / "run" / "privacy.json")
    assert statement["guarantee_of_run"]
    for domain in TRAINED:
        of_domain = statement["domains"][domain]
        assert [release["steps"] for release in of_domain["releases"]] == [4, 3, 3]
        assert 7.5 < of_domain["epsilon"] <= 8.0
    rows = pq.read_table(tmp_path / "run" / "exposure.parquet").to_pylist()
    assert {row["noise"] for row in rows if row["message"] == records.WEAVE} == {"Gaussian, by user"}


def test_a_relay_resumes_over_what_a_failed_client_has_left(place: Path, tmp_path: Path) -> None:
    def failing(message: Message, context: Context) -> Message | None:
        asks_books = message.metadata.message_type == records.WEAVE and domain_of(context) == "books"
        if asks_books and records.read_weave_request(message.content)[0].number == 2:
            return Message(records.error_record("out of memory", "books"), reply_to=message)
        return answer_honestly(message, context)

    relay = {"weave.schedule": "relay", "server.min_train_clients": 2, "until": "train"}
    config = experiment(place, tmp_path, **relay)
    run_in_process(config, failing)
    run, asked = tmp_path / "run", Asked()
    once = hashes_of(run)
    assert {each.target for each in once} == {"beauty", "coffee"}
    (run / "DONE").unlink()
    run_in_process(config.model_copy(update={"resume": True}), asked)
    assert asked.weaving == []
    assert hashes_of(run) == once


def test_the_adapter_of_another_source_is_refused(place: Path, tmp_path: Path) -> None:
    def mistaken(message: Message, context: Context) -> Message | None:
        answer = answer_honestly(message, context)
        if message.metadata.message_type != records.WEAVE or domain_of(context) != "coffee":
            return answer
        request, start = records.read_weave_request(message.content)
        wrong = "beauty" if request.source == "books" else "books"
        return Message(records.woven_record(wrong, start, {}), reply_to=message)

    run_in_process(experiment(place, tmp_path, **{"server.min_train_clients": 2}), mistaken)
    excluded = read_json(tmp_path / "run" / "clients.json")["excluded"]
    assert "the message holds no adapter from books" in excluded["coffee"]


def test_a_server_that_asks_in_a_run_without_weaving_is_refused(place: Path, tmp_path: Path) -> None:
    refusals = list[str]()

    def asked_too_much(message: Message, context: Context) -> Message | None:
        if message.metadata.message_type == records.TRAIN:
            start = Adapter({})
            content = records.weave_request_record(records.WeaveRequest(1, "books"), start)
            wrong = answer_honestly(Message(content, dst_node_id=1, message_type=records.WEAVE), context)
            assert isinstance(wrong, Message)
            refusals.append(str(records.read_error(wrong.content)))
        return answer_honestly(message, context)

    run_in_process(experiment(place, tmp_path, **{"weave.schedule": "none", "until": "train"}), asked_too_much)
    assert len(refusals) == 3
    assert all("weave.schedule = 'none'" in refusal for refusal in refusals)


def test_the_audit_attacks_every_continued_adapter(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = {"simulation.held_out_users": 0.5, "weave.schedule": "ring", "privacy.min_users": 2}
    run_in_process(experiment(place, tmp_path, **held_out, **{"until": "train"}))
    found = output(capsys, "privacy", "audit", tmp_path / "run", "--domain", "books", "--shadows", "0", "--json")
    audited = json.loads(found)["domains"]["books"]
    assert {row["model"] for row in audited["membership"]} == {"backbone", "expert", "continued beauty"}
    assert "continued beauty minus backbone" in {row["from"] for row in audited["recovery"]["rows"]}
