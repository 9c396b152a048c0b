"""Heads through whole runs: trained over the selected merge, served where they are better, never sent."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message
from in_process import small_experiment
from run_folders import hash_results, unlisted_files

from fedmerge.config import ExperimentConfig
from fedmerge.files import read_json
from fedmerge.report.run.listing import run_text
from fedmerge.report.run.page import run_page
from fedmerge.runs.metric_sums import read_metric_sums
from fedmerge.runs.reading import describe_run
from fedmerge.server.choice import SERVED
from sim.app.messages import records
from sim.local.in_process import Answer, answer_honestly, run_in_process

pytestmark = pytest.mark.federation

TRAIN = ("beauty", "books", "coffee")
DOMAINS = (*TRAIN, "camping")
ROWS = ("head on the merge", "head on the merge, fused", "head on the expert", "head on the expert, fused")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Domains and backbone of all runs here."""
    place = tmp_path_factory.mktemp("place")
    small_experiment(place)
    return place


def experiment(place: Path, name: str, **changes: object) -> ExperimentConfig:
    heads = {
        "head.kind": "local",
        "head.vectors": "merge,expert",
        "head.hidden_size": 8,
        "head.max_epochs": 2,
        "head.max_minutes": "none",
        "merge.methods": "average,task-arithmetic",
    }
    own = {"output_dir": str(place / name), "cache_dir": str(place / f"{name}-cache")}
    return small_experiment(place, **{**heads, **own, **changes})


def domain_of(context: Context) -> str:
    return DOMAINS[int(context.node_config["partition-id"])]


class Recorder:
    """Answers honestly and remembers every question with its stage, and every reply to train heads."""

    def __init__(self) -> None:
        self.asked: Counter[tuple[str, str]] = Counter()
        self.replies: list[Message] = []

    def __call__(self, message: Message, context: Context) -> Message | None:
        what = message.metadata.message_type
        if what == records.EVALUATE:
            request, _ = records.read_evaluation_request(message.content)
            what = f"{request.split} {request.heads}".strip()
        self.asked[what, domain_of(context)] += 1
        reply = answer_honestly(message, context)
        if what == records.TRAIN_HEAD:
            assert reply is not None
            self.replies.append(reply)
        return reply

    def of(self, what: str) -> set[str]:
        return {domain for asked, domain in self.asked if asked == what}


@pytest.fixture(scope="module")
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture(scope="module")
def whole(place: Path, recorder: Recorder) -> Path:
    """An undisturbed run."""
    run_in_process(experiment(place, "whole"), recorder)
    return place / "whole" / "run"


def test_every_client_trains_its_heads_once_and_is_served_its_best(whole: Path, recorder: Recorder) -> None:
    assert set(recorder.asked.values()) == {1}
    for what in ("train", "valid", records.TRAIN_HEAD, "valid merge,expert", "test merge,expert"):
        assert recorder.of(what) == set(TRAIN), what
    assert recorder.of("test") == {"camping"}
    choice = read_json(whole / "choice.json")
    assert list(choice["per_domain"]) == list(TRAIN)
    for entry in choice["per_domain"].values():
        scores = {row: score for row, score in entry.items() if row != "serve"}
        assert list(scores) == ["merged", "expert", *ROWS]
        assert scores[entry["serve"]] == max(scores.values())
    assert {**choice, "per_domain": {}} == read_json(whole / "selection.json")
    assert unlisted_files(whole) == []


def test_the_served_row_on_test_is_that_of_the_choice(whole: Path) -> None:
    choice = read_json(whole / "choice.json")
    test = read_metric_sums(whole, "test", "unmasked")
    assert set(ROWS).isdisjoint(test["camping"].methods)
    report = (whole / "report.txt").read_text()
    for line in (each for each in report.splitlines() if each.startswith(SERVED)):
        assert "-" not in line.replace(SERVED, "").split()[:3]
    for domain, entry in choice["per_domain"].items():
        assert set(ROWS) < set(test[domain].methods)
        if entry["serve"] not in ("merged", "expert"):
            assert f"served their own {entry['serve']} instead, selected on validation: " in report
    page, text = run_page(whole), run_text(describe_run(whole))
    shown = ("In short", "Joined against alone", "Heads of the clients, by the item vectors they read")
    assert sorted(shown, key=page.index) == [*shown]
    for domain, entry in choice["per_domain"].items():
        assert ("merged" if entry["serve"] == "merged" else f"{domain}: its own {entry['serve']}") in (text + "merged")


def test_nothing_of_a_head_and_no_id_is_in_a_reply_or_in_the_run(whole: Path, recorder: Recorder) -> None:
    for reply in recorder.replies:
        assert not reply.content.array_records
        (heads,) = (record["heads"] for key, record in reply.content.config_records.items() if "heads" in record)
        for report in json.loads(str(heads)).values():
            assert set(report) <= set(records.HEAD_REPORT_FIELDS)
    files = [file.relative_to(whole).parts for file in whole.rglob("*") if file.is_file()]
    of_heads = {parts for parts in files if parts[0].startswith("heads")}
    assert of_heads == {(folder, f"{name}.json") for folder in ("heads", "heads-validation") for name in TRAIN}


class Killed(BaseException):
    """Ends a run as a signal does."""


def stops_after(what: str, count: int) -> Answer:
    """Return an answer that replies to some questions of a kind, then to none."""
    recorder = Recorder()

    def answer(message: Message, context: Context) -> Message | None:
        if sum(number for (asked, _), number in recorder.asked.items() if asked.startswith(what)) >= count:
            return None
        return recorder(message, context)

    return answer


@pytest.mark.parametrize(("what", "asked_again"), [(records.TRAIN_HEAD, 2), ("valid merge", 0)])
def test_a_run_that_is_killed_between_replies_asks_only_the_others_again(
    place: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, what: str, asked_again: int
) -> None:
    config = experiment(place, f"killed {what}", cache_dir=str(place / "whole-cache"))
    run = place / f"killed {what}" / "run"
    monkeypatch.setattr("sim.app.server.asking.pause", lambda *_: _die_if(run, what))
    with pytest.raises(Killed):
        run_in_process(config, stops_after(what, 1))
    monkeypatch.undo()
    assert not (run / "choice.json").exists()
    recorder = Recorder()
    run_in_process(config.model_copy(update={"resume": True}), recorder)
    assert len(recorder.of(records.TRAIN_HEAD)) == asked_again
    assert not recorder.of("valid")
    assert len(recorder.of("valid merge,expert")) == (3 if what == records.TRAIN_HEAD else 2)
    for file in ("choice.json", "metrics.parquet", "products.parquet"):
        assert (run / file).read_bytes() == (whole / file).read_bytes()
    assert hash_results(run) == hash_results(whole)


def _die_if(run: Path, what: str) -> None:
    folder = "heads" if what == records.TRAIN_HEAD else "heads-validation"
    if list((run / folder).glob("*.json")):
        raise Killed


def test_a_client_that_fails_at_its_head_is_excluded_by_name(place: Path, whole: Path) -> None:
    def answer(message: Message, context: Context) -> Message | None:
        if domain_of(context) == "coffee" and message.metadata.message_type == records.TRAIN_HEAD:
            return Message(records.error_record("not today", "coffee"), reply_to=message)
        return answer_honestly(message, context)

    run_in_process(experiment(place, "failing", cache_dir=str(place / "whole-cache")), answer)
    run = place / "failing" / "run"
    clients: dict[str, Any] = read_json(run / "clients.json")
    assert clients["excluded"] == {"coffee": "train.head failed: not today"}
    assert clients["excluded_in_phase"] == {"coffee": "heads"}
    per_domain = read_json(run / "choice.json")["per_domain"]
    assert set(per_domain["coffee"]) == {"serve", "merged", "expert"}
    undisturbed = read_json(whole / "choice.json")["per_domain"]
    assert {name: per_domain[name] for name in ("beauty", "books")} == {
        name: undisturbed[name] for name in ("beauty", "books")
    }
    assert "coffee" not in read_metric_sums(run, "test", "unmasked")
