"""Whatever a client does, it is named, recorded and left out, and the others go on."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.superlink.grid import InMemoryGrid
from in_process import small_experiment

import sim.app.server.asking
from fedmerge import __version__
from fedmerge.config import ExperimentConfig
from fedmerge.errors import ClientError
from sim.app.messages import records
from sim.app.server.replies import MOST_LOSSES
from sim.local.in_process import Answer, answer_honestly, run_in_process

pytestmark = pytest.mark.federation

DOMAINS = ("beauty", "books", "coffee", "camping")
BAD = "coffee"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Domains, a backbone and the clients' disk: every client trains once for all tests here."""
    place = tmp_path_factory.mktemp("place")
    run_in_process(small_experiment(place, **{"run_id": "first", "merge.methods": "average"}))
    return place


def experiment(place: Path, tmp_path: Path, **changes: object) -> ExperimentConfig:
    return small_experiment(place, **{"output_dir": str(tmp_path), "merge.methods": "average", **changes})


Change = Callable[[Message, Message], Message | None]


def bad_client(message_type: str, change: Change, split: str = "") -> Answer:
    """One client answers one type of message with something else: question and honest answer -> answer."""

    def answer(message: Message, context: Context) -> Message | None:
        honest = answer_honestly(message, context)
        its_turn = DOMAINS[int(context.node_config["partition-id"])] == BAD
        if not its_turn or message.metadata.message_type != message_type or honest is None:
            return honest
        if split and records.read_evaluation_request(message.content)[0].split != split:
            return honest
        return change(message, honest)

    return answer


def raises(question: Message, honest: Message) -> Message:
    return Message(Error(code=1, reason="ValueError: it raised"), reply_to=question)


def garbage(question: Message, honest: Message) -> Message:
    junk = RecordDict({"junk": ConfigRecord({"a": [1.5, 2.5], "b": b"\x00\xff"})})
    return Message(junk, reply_to=question)


def too_much(question: Message, honest: Message) -> Message:
    honest.content["more"] = ArrayRecord({"x": Array(np.zeros(10**6, dtype=np.float64))})
    return honest


def too_many_entries(question: Message, honest: Message) -> Message:
    honest.content["more"] = ConfigRecord({f"entry {i}": i for i in range(200_000)})
    return honest


def of_adapter(change: Callable[[dict[str, np.ndarray]], Any]) -> Change:
    def changed(question: Message, honest: Message) -> Message:
        arrays = {name: array.numpy() for name, array in honest.content.array_records["adapter"].items()}
        change(arrays)
        honest.content["adapter"] = ArrayRecord({name: Array(array) for name, array in arrays.items()})
        return honest

    return changed


def put(value: float) -> Callable[[dict[str, np.ndarray]], None]:
    def change(arrays: dict[str, np.ndarray]) -> None:
        name = sorted(arrays)[0]
        arrays[name] = arrays[name].copy()
        arrays[name][0, 0] = value

    return change


def rename(arrays: dict[str, np.ndarray]) -> None:
    arrays["elsewhere.lora_A"] = arrays.pop(sorted(arrays)[0])


def cut(arrays: dict[str, np.ndarray]) -> None:
    name = sorted(arrays)[0]
    arrays[name] = arrays[name][:1]


def in_float64(arrays: dict[str, np.ndarray]) -> None:
    name = sorted(arrays)[0]
    arrays[name] = arrays[name].astype(np.float64)


def none(values: Any) -> Any:
    return np.zeros_like(values).tolist()


def of_sums(change: Callable[[dict[str, Any]], Any]) -> Change:
    def changed(question: Message, honest: Message) -> Message:
        facts = honest.content.config_records["facts"]
        for variant in ("unmasked", "masked"):
            told = json.loads(str(facts[variant]))
            change(told)
            facts[variant] = json.dumps(told)
        return honest

    return changed


def of_description(**changes: Any) -> Change:
    def changed(question: Message, honest: Message) -> Message:
        facts = {**honest.content.config_records["facts"], **changes}
        return Message(RecordDict({"facts": ConfigRecord(facts)}), reply_to=question)

    return changed


CASES: dict[str, tuple[str, Change, str, str]] = {
    "raises": ("train", raises, "train", r"train failed: ValueError: it raised \(Flower error 1\)"),
    "garbage": ("train", garbage, "train", r"ClientError: its message has no record 'facts'"),
    "too much": ("train", too_much, "train", r"it takes 8,\d{3},\d{3} bytes, at most 1,\d{3},\d{3} are expected"),
    "too many entries": ("train", too_many_entries, "train", r"it takes \d,\d{3},\d{3} bytes, at most"),
    "NaN": ("train", of_adapter(put(np.nan)), "train", r"1 of 64 values NaN or infinite"),
    "infinite": ("train", of_adapter(put(-np.inf)), "train", r"1 of 64 values NaN or infinite"),
    "huge": ("train", of_adapter(put(1e30)), "train", r"holds a value of 1e\+30, expected at most 10000"),
    "names": ("train", of_adapter(rename), "train", r"tensors do not match its modules: .*elsewhere\.lora_A"),
    "shapes": ("train", of_adapter(cut), "train", r"LayoutMismatchError: domain coffee: module .* expected"),
    "dtypes": ("train", of_adapter(in_float64), "train", r"is float64 of shape \(2, 32\), expected a float32 matrix"),
    "garbage as a description": ("query.describe", garbage, "gather", r"has no record 'facts'"),
    "wrong domain": (
        "query.describe",
        of_description(domain="shoes"),
        "gather",
        r"'shoes' \(train\)",
    ),
    "a domain that is taken": (
        "query.describe",
        of_description(domain="beauty"),
        "gather",
        "already is beauty",
    ),
    "another backbone": (
        "query.describe",
        of_description(backbone_sha256="0" * 64),
        "gather",
        "backbone is 0{64}",
    ),
    "another version": (
        "query.describe",
        of_description(fedmerge_version="0.0.0"),
        "gather",
        rf"version is 0\.0\.0, .* {re.escape(__version__)};",
    ),
    "another precision": (
        "query.describe",
        of_description(precision="bfloat16"),
        "gather",
        r"precision is bfloat16, .* float32; .*runtime\.precision",
    ),
    "another layout": (
        "query.describe",
        of_description(layout_sha256="0" * 64),
        "gather",
        "LoRA layout is 0{64}, .* [0-9a-f]{64};",
    ),
    "no users": (
        "query.describe",
        of_description(num_users=0),
        "gather",
        " 0 users",
    ),
    "another policy": (
        "query.describe",
        of_description(policy="adapter"),
        "gather",
        r"policy is adapter, .* adapter\+catalog; .*privacy\.policy",
    ),
    "sums of other models": (
        "evaluate",
        of_sums(lambda told: told.update(methods=["expert", "mine"])),
        "validation",
        r"domain coffee: its metric sums lack \['average'\]",
    ),
    "more than all users": (
        "evaluate",
        of_sums(lambda told: told.update(num_users=31)),
        "validation",
        r"its metric sums are over 31 users, but it has only 30",
    ),
    "fewer than enough users": (
        "evaluate",
        of_sums(lambda told: told.update(num_users=19, **{name: none(told[name]) for name in ("sums", "products")})),
        "validation",
        r"are over 19 users, fewer than privacy\.min_users \(20\)",
    ),
    "outcomes beyond 1": (
        "evaluate",
        of_sums(lambda told: told.update(sums=[[100.0] * len(row) for row in told["sums"]])),
        "validation",
        r"its metric sums run from 100 to 100, expected 0 to 30",
    ),
    "products beyond 1": (
        "evaluate",
        of_sums(lambda told: told.update(products=np.full_like(told["products"], 100.0).tolist())),
        "validation",
        r"domain coffee: its unmasked products of outcomes exceed 30",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_bad_client_is_named_recorded_and_left_out(
    place: Path, tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    message_type, change, phase, reason = CASES[case]
    run_in_process(experiment(place, tmp_path), bad_client(message_type, change))
    run = tmp_path / "run"
    clients = json.loads((run / "clients.json").read_text())
    ((name, told),) = clients["excluded"].items()
    assert BAD in name or phase == "gather"
    assert clients["excluded_in_phase"] == {name: phase}
    assert BAD not in clients["participants"]
    assert re.search(reason, told), told
    assert name in (run / "report.txt").read_text()
    assert f"excluded: {name}: " in (run / "run.log").read_text()
    merged = json.loads((run / "merged/average/provenance.json").read_text())["domains"]
    assert set(merged) == {"beauty", "books"} | ({BAD} if phase == "validation" else set())
    assert {row["domain"] for row in pq.read_table(run / "metrics.parquet").to_pylist()} == set(DOMAINS) - {BAD}
    assert (run / "DONE").exists()


def test_a_training_domain_that_fails_in_evaluation_stays_merged_and_the_report_says_so(
    place: Path, tmp_path: Path
) -> None:
    run_in_process(experiment(place, tmp_path), bad_client("evaluate", raises, split="test"))
    run = tmp_path / "run"
    merged = json.loads((run / "merged/average/provenance.json").read_text())["domains"]
    assert set(merged) == {"beauty", "books", BAD}
    assert set(json.loads((run / "choice.json").read_text())["domains"]) == {"beauty", "books", BAD}  # it had its say
    assert f"excluded, but its expert is still merged: {BAD}: evaluate failed: " in (run / "report.txt").read_text()
    rows = pq.read_table(run / "metrics.parquet").to_pylist()
    assert {row["domain"] for row in rows if row["split"] == "test"} == set(DOMAINS) - {BAD}
    assert {row["domain"] for row in rows if row["split"] == "valid"} == {"beauty", "books", BAD}


def test_too_much_is_not_listed_entry_by_entry(place: Path, tmp_path: Path) -> None:
    run_in_process(experiment(place, tmp_path), bad_client("train", too_many_entries))
    rows = pq.read_table(tmp_path / "run" / "exposure.parquet").to_pylist()
    (row,) = (row for row in rows if row["domain"] == BAD and row["message"] == "train")
    assert row["name"] == "(too much)"
    assert row["size_bytes"] > 1_000_000


def test_who_hangs_is_left_out_in_time_and_a_late_answer_is_recorded_and_dropped(place: Path, tmp_path: Path) -> None:
    late: list[Message] = []

    def answer(message: Message, context: Context) -> Message | list[Message] | None:
        honest = answer_honestly(message, context)
        assert honest is not None
        its_turn = DOMAINS[int(context.node_config["partition-id"])] == BAD
        if its_turn and message.metadata.message_type == "train":
            late.append(honest)
            return None
        if message.metadata.message_type == "evaluate" and late:  # the others are asked to evaluate: training is over
            return [late.pop(), honest]
        return honest

    run_in_process(experiment(place, tmp_path, **{"server.timeout_seconds": 8}), answer)
    clients = json.loads((tmp_path / "run" / "clients.json").read_text())
    assert clients["excluded"][BAD].startswith("train: no answer within 8 s")
    assert clients["excluded_in_phase"][BAD] == "train"
    rows = pq.read_table(tmp_path / "run" / "exposure.parquet").to_pylist()
    assert {row["late"] for row in rows if (row["domain"], row["message"]) == (BAD, "train")} == {True}
    assert not (tmp_path / "run" / "adapters" / BAD).exists()
    assert f"a late answer of {BAD} is dropped" in (tmp_path / "run" / "run.log").read_text()


BY_USER = {
    "dp.mode": "user",
    "dp.noise_multiplier": 2.0,
    "dp.delta": 1e-3,
    "dp.accountant": "rdp",
    "train.negatives": "catalog",
}
IN_ROUNDS = {"rounds.rule": "fedit", "rounds.number": 2}


def steps_counted(run: Path) -> dict[str, list[int]]:
    """Domain -> the steps of each release that the statement counts."""
    told = json.loads((run / "privacy.json").read_text())
    return {domain: [release["steps"] for release in of["releases"]] for domain, of in told["domains"].items()}


@pytest.mark.parametrize(
    ("changes", "after", "expected"),
    [({}, "evaluate", {BAD: [4]}), (IN_ROUNDS, "train", {"beauty": [2, 2], "books": [2, 2], BAD: [2]})],
    ids=["expert", "round"],
)
def test_a_late_answer_with_noise_is_counted_once(
    place: Path, tmp_path: Path, changes: dict[str, object], after: str, expected: dict[str, list[int]]
) -> None:
    late: list[Message] = []
    asked: list[str] = []

    def answer(message: Message, context: Context) -> Message | list[Message] | None:
        honest = answer_honestly(message, context)
        assert honest is not None
        asked.append(message.metadata.message_type)
        if DOMAINS[int(context.node_config["partition-id"])] == BAD and asked[-1] == "train":
            late.append(honest)
            return None
        if late and asked[-1] == after and (after == "evaluate" or asked.count("train") > 3):
            return [late.pop(), honest]
        return honest

    own = {"cache_dir": str(tmp_path / "cache"), "server.timeout_seconds": 8}
    config = experiment(place, tmp_path, **BY_USER, **changes, **own)
    run_in_process(config, answer)
    run = tmp_path / "run"
    assert not late
    assert BAD in json.loads((run / "clients.json").read_text())["excluded"]
    assert expected.items() <= steps_counted(run).items()
    told = json.loads((run / "privacy.json").read_text())
    assert told["guarantee"]
    of_books, of_bad = (told["domains"][domain]["epsilon"] for domain in ("books", BAD))
    assert of_bad < of_books if changes else of_bad == of_books  # one round of two


def half_the_noise(question: Message, honest: Message) -> Message:
    report = records.read_report(honest.content)
    report["privacy"]["noise_multiplier"] /= 2
    honest.content["facts"] = ConfigRecord({"report": json.dumps(report)})
    return honest


@pytest.mark.parametrize(
    ("change", "why_not"),
    [
        (of_adapter(cut), ""),
        (half_the_noise, "noise_multiplier 1.0 instead of 2.0"),
        (too_much, "bytes and was not read"),
        (garbage, "its message has no record 'facts'"),
    ],
    ids=["shapes", "noise", "size", "garbage"],
)
def test_a_refused_answer_with_noise_is_counted(place: Path, tmp_path: Path, change: Change, why_not: str) -> None:
    """At what it says, if that was agreed on; else no number holds for its users."""
    run_in_process(experiment(place, tmp_path, **BY_USER, run_id="refused"), bad_client("train", change))
    run = tmp_path / "refused"
    told = json.loads((run / "privacy.json").read_text())
    assert told["domains"].keys() == {"beauty", "books", BAD}
    assert told["guarantee"] == (not why_not)
    if why_not:
        assert told["domains"][BAD]["epsilon"] is None
        (problem,) = told["why_not"]
        assert problem.startswith("something that coffee sent cannot be counted, so no ε holds for it: ")
        assert why_not in problem
        assert "coffee: ε = ∞ (one unit replaced: ε = ∞; not known)" in (run / "report.txt").read_text()
    else:
        assert steps_counted(run)[BAD] == [4]
        assert told["domains"][BAD]["epsilon"] == told["domains"]["books"]["epsilon"]
    assert told["domains"]["books"]["epsilon"] is not None


def test_what_a_run_released_that_fails_is_counted_and_once_after_it_goes_on(place: Path, tmp_path: Path) -> None:
    died = "<class 'ray.exceptions.ActorDiedError'>:<'The actor died unexpectedly before finishing this task.'>"
    bad = bad_client("train", lambda question, honest: Message(Error(code=0, reason=died), reply_to=question))
    config = experiment(place, tmp_path, **BY_USER, **IN_ROUNDS, run_id="failed", **{"server.messages_at_once": 1})
    with pytest.raises(ClientError, match=r"coffee: the process .* died in train"):
        run_in_process(config, bad)
    run = tmp_path / "failed"
    assert steps_counted(run) == {"beauty": [2], "books": [2]}
    failed = json.loads((run / "privacy.json").read_text())
    assert not any("metric sums" in line for line in failed["not_covered"])  # nothing was evaluated
    shutil.rmtree(run / "rounds" / "1" / "books")  # as if it was killed before the reply was kept
    run_in_process(config.model_copy(update={"resume": True}))
    assert steps_counted(run) == {domain: [2, 2] for domain in ("beauty", "books", BAD)}
    told = json.loads((run / "privacy.json").read_text())
    assert any("metric sums" in line for line in told["not_covered"])
    assert told["domains"]["books"]["epsilon"] > failed["domains"]["books"]["epsilon"]


def test_an_error_that_travels_names_no_folder_of_the_client(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "cache", tmp_path / "own cache")

    def answer(message: Message, context: Context) -> Message | list[Message] | None:
        if DOMAINS[int(context.node_config["partition-id"])] == BAD and message.metadata.message_type == "evaluate":
            shutil.rmtree(tmp_path / "own cache" / "experts")
        return answer_honestly(message, context)

    changes = {"cache_dir": str(tmp_path / "own cache"), "server.min_train_clients": 1}
    with pytest.raises(ClientError):  # nobody has an expert any more
        run_in_process(experiment(place, tmp_path, **changes), answer)
    told = (tmp_path / "run" / "clients.json").read_text()
    reason = json.loads(told)["excluded"][BAD]
    assert re.fullmatch(
        r"evaluate failed: ClientError: domain coffee: its expert [0-9a-f]{12} is not in …/coffee-[0-9a-f]{16}\. "
        "Keep cache_dir between training and evaluation\\.",
        reason,
    )
    assert "cache/" not in told
    assert str(tmp_path) not in told


def test_the_ledger_names_the_split(place: Path, tmp_path: Path) -> None:
    run_in_process(experiment(place, tmp_path))
    rows = pq.read_table(tmp_path / "run" / "exposure.parquet").to_pylist()
    found = {(row["domain"], row["message"], row["split"], row["late"]) for row in rows}
    trained = {(domain, "train", "", False) for domain in DOMAINS[:3]}
    described = {(domain, "query.describe", "", False) for domain in DOMAINS}
    validated = {(domain, "evaluate", "valid", False) for domain in DOMAINS[:3]}
    tested = {(domain, "evaluate", "test", False) for domain in DOMAINS}
    assert found == trained | described | validated | tested


def test_the_death_of_a_simulated_clients_process_ends_the_run_with_the_way_to_go_on(
    place: Path, tmp_path: Path
) -> None:
    died = "<class 'ray.exceptions.ActorDiedError'>:<'The actor died unexpectedly before finishing this task.'>"
    bad = bad_client("train", lambda question, honest: Message(Error(code=0, reason=died), reply_to=question))
    with pytest.raises(
        ClientError, match=rf"(?s)coffee: the process .* died in train.*fedmerge run --resume {tmp_path}/run"
    ):
        run_in_process(experiment(place, tmp_path), bad)
    assert not json.loads((tmp_path / "run" / "clients.json").read_text())["excluded"]  # it is asked again
    config = experiment(place, tmp_path)
    run_in_process(config.model_copy(update={"resume": True}))
    assert (tmp_path / "run" / "DONE").exists()


def lost(times: int, code: int) -> Answer:
    """One client is lost so many times while it trains."""
    left = [times]

    def lose(question: Message, honest: Message) -> Message:
        left[0] -= 1
        return honest if left[0] < 0 else Message(Error(code=code, reason="lost"), reply_to=question)

    return bad_client("train", lose)


@pytest.mark.parametrize("code", [5, 8], ids=["machine", "process"])
def test_a_client_that_was_lost_and_comes_back_is_asked_again(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(sim.app.server.asking, "LOOK_SECONDS", 0.05)
    run_in_process(experiment(place, tmp_path), lost(MOST_LOSSES, code))
    assert not json.loads((tmp_path / "run" / "clients.json").read_text())["excluded"]
    told = (tmp_path / "run" / "run.log").read_text()
    assert told.count("train: coffee was lost: ") == 3
    assert told.count("train: coffee is back and is asked again") == 3
    run_in_process(experiment(place, tmp_path / "whole"))
    for name in ("metrics.parquet", "choice.json", "report.txt"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / "run" / name).read_bytes()


def test_a_client_that_is_lost_again_and_again_or_not_waited_for_is_left_out(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sim.app.server.asking, "LOOK_SECONDS", 0.05)
    run_in_process(experiment(place, tmp_path / "a"), lost(99, 8))
    run_in_process(experiment(place, tmp_path / "b", **{"server.return_seconds": 0}), lost(1, 8))
    for name in "ab":
        excluded = json.loads((tmp_path / name / "run" / "clients.json").read_text())["excluded"]
        assert excluded == {BAD: "train failed: lost (Flower error 8)"}


def test_a_lost_client_that_stays_away_is_left_out_in_time(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sim.app.server.asking, "LOOK_SECONDS", 0.05)
    gone: list[int] = []
    seen = InMemoryGrid.get_node_ids
    monkeypatch.setattr(InMemoryGrid, "get_node_ids", lambda grid: [node for node in seen(grid) if node not in gone])

    def leave(question: Message, honest: Message) -> Message:
        gone.append(question.metadata.dst_node_id)
        return Message(Error(code=5, reason="lost"), reply_to=question)

    run_in_process(experiment(place, tmp_path, **{"server.return_seconds": 0.3}), bad_client("train", leave))
    excluded = json.loads((tmp_path / "run" / "clients.json").read_text())["excluded"]
    assert re.fullmatch(rf"train: .* lost .* --resume {tmp_path}/run", excluded[BAD])
    assert (tmp_path / "run" / "DONE").exists()


def test_who_comes_late_is_tested_as_unseen(place: Path, tmp_path: Path) -> None:
    away = {DOMAINS.index(BAD)}

    def answer(message: Message, context: Context) -> Message | None:
        if message.metadata.message_type == "evaluate":
            away.clear()
        return answer_honestly(message, context)

    run_in_process(experiment(place, tmp_path, **{"server.wait_seconds": 0.5}), answer, away=away)
    told = (tmp_path / "run" / "run.log").read_text()
    assert "as unseen: coffee" in told
    rows = pq.read_table(tmp_path / "run" / "metrics.parquet").to_pylist()
    roles = {(row["split"], row["role"]) for row in rows if row["domain"] == BAD}
    assert roles == {("test", "unseen")}
    assert not json.loads((tmp_path / "run" / "clients.json").read_text())["excluded"]


def test_fewer_nodes_than_domains_are_not_waited_for(place: Path, tmp_path: Path) -> None:
    run_in_process(experiment(place, tmp_path, **{"server.wait_seconds": 1e6}), num_nodes=3)
    assert not json.loads((tmp_path / "run" / "clients.json").read_text())["excluded"]


def test_one_client_at_a_time_gives_the_same(place: Path, tmp_path: Path) -> None:
    run_in_process(experiment(place, tmp_path / "many"))
    run_in_process(experiment(place, tmp_path / "one", **{"server.messages_at_once": 1}))
    for name in ("metrics.parquet", "choice.json", "report.txt"):
        assert (tmp_path / "one/run" / name).read_bytes() == (tmp_path / "many/run" / name).read_bytes()
