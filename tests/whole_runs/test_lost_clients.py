"""Clients that answer late or are lost: asked again within the limits, then excluded."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from bad_answers import BAD, DOMAINS, bad_client, experiment
from flwr.app import Context, Error, Message
from flwr.superlink.grid import InMemoryGrid

import sim.app.server.asking
import sim.app.server.phases.joining
from fedmerge.errors import ClientError
from fedmerge.runs.folder import REPORT_PAGE
from fedmerge.runs.reading import summarise_run
from sim.app.server.replies import MOST_LOSSES
from sim.local.in_process import Answer, answer_honestly, run_in_process

pytestmark = pytest.mark.federation


def test_a_hanging_client_is_excluded_in_time_and_its_late_answer_is_recorded_and_dropped(
    place: Path, tmp_path: Path
) -> None:
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


def test_the_death_of_a_simulated_clients_process_ends_the_run_with_a_remedy(place: Path, tmp_path: Path) -> None:
    died = "<class 'ray.exceptions.ActorDiedError'>:<'The actor died unexpectedly before finishing this task.'>"
    bad = bad_client("train", lambda question, honest: Message(Error(code=0, reason=died), reply_to=question))
    with pytest.raises(ClientError, match=rf"(?s)coffee: .* train\b.*fedmerge run --resume {tmp_path}/run"):
        run_in_process(experiment(place, tmp_path), bad)
    assert not json.loads((tmp_path / "run" / "clients.json").read_text())["excluded"]  # it will be asked again
    config = experiment(place, tmp_path)
    run_in_process(config.model_copy(update={"resume": True}))
    assert (tmp_path / "run" / "DONE").exists()


def lost(times: int, code: int) -> Answer:
    """Return an answer by which one client is lost the given number of times while it trains."""
    left = [times]

    def lose(question: Message, honest: Message) -> Message:
        left[0] -= 1
        return honest if left[0] < 0 else Message(Error(code=code, reason="lost"), reply_to=question)

    return bad_client("train", lose)


@pytest.mark.parametrize("code", [5, 8, 3], ids=["machine", "process", "upload"])
def test_a_client_that_returns_is_asked_again(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(sim.app.server.asking, "LOOK_SECONDS", 0.05)
    run_in_process(experiment(place, tmp_path), lost(MOST_LOSSES, code))
    assert not json.loads((tmp_path / "run" / "clients.json").read_text())["excluded"]
    log = (tmp_path / "run" / "run.log").read_text()
    assert log.count("train: coffee was lost: ") == 3
    assert log.count("train: coffee is back and is asked again") == 3
    run_in_process(experiment(place, tmp_path / "whole"))
    for name in ("metrics.parquet", "choice.json", "report.txt"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / "run" / name).read_bytes()


def test_a_client_lost_repeatedly_or_with_no_time_to_return_is_excluded(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sim.app.server.asking, "LOOK_SECONDS", 0.05)
    run_in_process(experiment(place, tmp_path / "a"), lost(99, 8))
    run_in_process(experiment(place, tmp_path / "b", **{"server.return_seconds": 0}), lost(1, 8))
    for name in "ab":
        excluded = json.loads((tmp_path / name / "run" / "clients.json").read_text())["excluded"]
        assert excluded == {BAD: "train failed: lost (Flower error 8)"}


def test_a_client_that_stays_lost_is_excluded_in_time(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sim.app.server.asking, "LOOK_SECONDS", 0.05)
    away: list[int] = []
    seen = InMemoryGrid.get_node_ids
    monkeypatch.setattr(InMemoryGrid, "get_node_ids", lambda grid: [node for node in seen(grid) if node not in away])

    def leave(question: Message, honest: Message) -> Message:
        away.append(question.metadata.dst_node_id)
        return gone(question)

    run_in_process(experiment(place, tmp_path, **{"server.return_seconds": 0.3}), bad_client("train", leave))
    excluded = json.loads((tmp_path / "run" / "clients.json").read_text())["excluded"]
    assert re.fullmatch(rf"train: .* lost .* --resume {tmp_path}/run", excluded[BAD])
    assert (tmp_path / "run" / "DONE").exists()


SPARE = len(DOMAINS)  # turn of a node that the experiment has no domain for


def with_a_spare(away: set[int], lose: Callable[[Message], Message | None]) -> Answer:
    """Return answers of all domains, and of a node without a domain that is gone at its first question."""

    def answer(message: Message, context: Context) -> Message | None:
        if context.node_config["partition-id"] != SPARE:
            return answer_honestly(message, context)
        away.add(SPARE)
        return lose(message)

    return answer


def gone(question: Message) -> Message:
    return Message(Error(code=5, reason="lost"), reply_to=question)


@pytest.mark.parametrize("lose", [gone, lambda question: None], ids=["lost", "silent"])
def test_a_node_that_trains_nothing_delays_nobody(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lose: Callable[[Message], Message | None]
) -> None:
    monkeypatch.setattr(sim.app.server.phases.joining, "IDLE_SECONDS", 0.5)
    away: set[int] = set()
    config = experiment(place, tmp_path, **{"server.return_seconds": 1e6, "server.wait_seconds": 1e6})
    run_in_process(config, with_a_spare(away, lose), num_nodes=SPARE + 1, away=away)
    clients = json.loads((tmp_path / "run" / "clients.json").read_text())
    assert not clients["excluded"]
    assert not clients["absent"]
    log = (tmp_path / "run" / "run.log").read_text()
    assert log.count("not waited for, without a known part in this experiment: node ") == 1
    run_in_process(experiment(place, tmp_path / "without"))
    for name in ("metrics.parquet", "choice.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "without" / "run" / name).read_bytes()


def test_while_a_lost_node_is_waited_for_others_join(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sim.app.server.phases.joining, "LOOK_SECONDS", 0.05)
    away = {DOMAINS.index(BAD)}

    def lose(question: Message) -> Message:
        away.discard(DOMAINS.index(BAD))  # the last domain connects when the other node is lost already
        return gone(question)

    config = experiment(place, tmp_path, **{"server.return_seconds": 1e6})
    run_in_process(config, with_a_spare(away, lose), num_nodes=SPARE + 1, away=away)
    clients = json.loads((tmp_path / "run" / "clients.json").read_text())
    assert sorted(clients["participants"]) == sorted(DOMAINS)
    assert not clients["excluded"]


def test_a_node_that_may_be_a_missing_domain_is_waited_for(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sim.app.server.asking, "LOOK_SECONDS", 0.05)
    times = [2]

    def lose(question: Message, honest: Message) -> Message:
        times[0] -= 1
        return honest if times[0] < 0 else gone(question)

    run_in_process(experiment(place, tmp_path), bad_client("query.describe", lose), away=set())
    clients = json.loads((tmp_path / "run" / "clients.json").read_text())
    assert sorted(clients["participants"]) == sorted(DOMAINS)
    assert (tmp_path / "run" / "run.log").read_text().count(" is back and is asked again") == 2


def test_a_late_client_is_evaluated_as_unseen(place: Path, tmp_path: Path) -> None:
    away = {DOMAINS.index(BAD)}

    def answer(message: Message, context: Context) -> Message | None:
        if message.metadata.message_type == "evaluate":
            away.clear()
        return answer_honestly(message, context)

    run_in_process(experiment(place, tmp_path, **{"server.wait_seconds": 0.5}), answer, away=away)
    log = (tmp_path / "run" / "run.log").read_text()
    assert "as unseen: coffee" in log
    rows = pq.read_table(tmp_path / "run" / "metrics.parquet").to_pylist()
    roles = {(row["split"], row["role"]) for row in rows if row["domain"] == BAD}
    assert roles == {("test", "unseen")}
    assert not json.loads((tmp_path / "run" / "clients.json").read_text())["excluded"]
    summary = summarise_run(tmp_path / "run")
    assert BAD not in summary.train
    assert summary.missing == {BAD: "absent: its client came after the merge; evaluated as unseen"}


def test_a_late_node_that_is_lost_delays_nobody(place: Path, tmp_path: Path) -> None:
    away = {DOMAINS.index(BAD), SPARE}  # a domain is missing until the end

    def answer(message: Message, context: Context) -> Message | list[Message] | None:
        if message.metadata.message_type == "evaluate":
            away.discard(SPARE)
        return with_a_spare(away, gone)(message, context)

    config = experiment(place, tmp_path, **{"server.return_seconds": 1e6, "server.wait_seconds": 0.5})
    run_in_process(config, answer, num_nodes=SPARE + 1, away=away)
    assert "not waited for, without a known part" in (tmp_path / "run" / "run.log").read_text()
    clients = json.loads((tmp_path / "run" / "clients.json").read_text())
    assert clients["absent"] == {BAD: "no client came within 0.5 s"}
    assert not clients["excluded"]


def test_fewer_nodes_than_domains_are_not_waited_for(place: Path, tmp_path: Path) -> None:
    run_in_process(experiment(place, tmp_path, **{"server.wait_seconds": 1e6}), num_nodes=3)
    assert not json.loads((tmp_path / "run" / "clients.json").read_text())["excluded"]
    summary = summarise_run(tmp_path / "run")
    assert summary.missing == {
        name: f"absent: the simulation has 3 nodes for {len(DOMAINS)} domains" for name in DOMAINS[3:]
    }
    assert {*summary.train, *summary.unseen} == {*DOMAINS[:3]}
    page = (tmp_path / "run" / REPORT_PAGE).read_text(encoding="utf-8")
    assert f"{DOMAINS[3]}: absent: the simulation has 3 nodes" in page
    assert (tmp_path / "run" / "report.txt").read_text().startswith("What is served ranks ")


def test_one_client_at_a_time_gives_the_same_results(place: Path, tmp_path: Path) -> None:
    run_in_process(experiment(place, tmp_path / "many"))
    run_in_process(experiment(place, tmp_path / "one", **{"server.messages_at_once": 1}))
    for name in ("metrics.parquet", "choice.json", "report.txt"):
        assert (tmp_path / "one/run" / name).read_bytes() == (tmp_path / "many/run" / name).read_bytes()
