"""Between machines: one reply that cannot be unpacked does not take others with it, and some words are not believed."""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
from deploy_hosts import free_port
from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.proto.task_pb2 import Task
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
)
from flwr.superlink.grid import HttpGrid, InMemoryGrid
from flwr.superlink.servicer.runtime import runtime_handlers

from fedmerge.config import ExperimentConfig
from fedmerge.escaping import one_line
from sim.app.messages import records
from sim.app.server.phases.training import log_expert
from sim.app.server.pulling import pull_replies
from sim.app.server.questions import Inquiry, Question, State
from sim.app.server.replies import handle_reply
from sim.app.server.run import Run, new_run
from sim.local.in_process import grid_in_memory


class Remote:
    """The server's view of Flower between machines: Flower's own grid, whose requests reach its SuperLink's functions.

    Attributes:
        grid: of the server.
        asked: names of the requests, in order.
    """

    def __init__(self) -> None:
        local, self._turns = grid_in_memory(2)
        self._state, self.asked, self._open = local.state, list[str](), list[Message]()
        self.grid = HttpGrid(token="any")
        self.grid.set_run(local.run)
        self.grid._client = cast(Any, self)

    def __getattr__(self, request_name: str) -> Callable[[Any], Any]:
        name = re.sub(r"(?<!^)(?=[A-Z])", "_", request_name).lower()
        handler = getattr(runtime_handlers, name)

        def request(content: Any) -> Any:
            self.asked.append(name)
            return handler(type(content).FromString(content.SerializeToString()), self._state, Task(run_id=1))

        return request

    def ask(self, number: int) -> list[str]:
        """Send questions to the first node; return their ids."""
        node = next(iter(self._turns))
        messages = [Message(RecordDict(), dst_node_id=node, message_type="train") for _ in range(number)]
        for count, message in enumerate(messages):
            message.content["number"] = MetricRecord({"is": count})
        return list(self.grid.push_messages(messages))

    def answer(self, message_ids: list[str], without: str = "") -> None:
        """Answer questions as a SuperNode does; of ``without`` the parts of the content are not sent."""
        self._open += self._state.get_message_ins(node_id=next(iter(self._turns)), limit=None)
        for question in self._open:
            asked = question.metadata.message_id
            if asked not in message_ids:
                continue
            reply = Message(RecordDict({"of": ConfigRecord({"id": asked})}), reply_to=question)
            reply.metadata.__dict__["_message_id"] = reply.object_id
            tree = get_object_tree(reply)
            if asked == without:
                del tree.children[:]
            session = self._state.start_session(1)
            empty = remove_content_from_message(reply)
            self._state.store_message_and_object_tree(empty, tree, session)
            objects = {found.object_id for found in iterate_object_tree(tree)}
            for object_id, part in get_all_nested_objects(reply).items():
                if object_id in objects:
                    assert self._state.store_object(1, session, object_id, part.deflate())


def run_of(grid: object, folder: Path) -> Run:
    return new_run(ExperimentConfig(), folder, cast(Grid, grid))


def test_flower_itself_loses_all_replies_of_a_request_by_one_that_is_malformed() -> None:
    """Which is why each reply is unpacked by itself."""
    remote = Remote()
    first, second = remote.ask(2)
    remote.answer([first, second], without=second)
    with pytest.raises(KeyError):
        remote.grid.pull_messages([first, second])
    assert next(iter(remote.grid.pull_messages([first]))).has_error()


def test_all_that_has_arrived_comes_with_one_request_and_a_malformed_reply_leaves_the_others(tmp_path: Path) -> None:
    remote = Remote()
    questions = remote.ask(20)
    remote.answer(questions[:4], without=questions[2])
    run = run_of(remote.grid, tmp_path)
    remote.asked.clear()
    arrived = pull_replies(run, questions)
    assert remote.asked == ["pull_messages"]
    found = {question: unpack() for question, unpack in arrived}
    assert set(found) == set(questions[:4])
    assert remote.asked.count("pull_messages") == 1
    assert remote.asked.count("confirm_message_received") == 4
    assert str(found.pop(questions[2])).startswith("KeyError: ")
    for question, reply in found.items():
        assert isinstance(reply, Message)
        assert reply.metadata.reply_to_message_id == question
        assert reply.content["of"] == ConfigRecord({"id": question})
    # each is handed out once; the others are still waited for
    remote.answer(questions[10:11])
    assert [question for question, _ in pull_replies(run, questions[4:])] == [questions[10]]


def test_a_failure_of_flower_itself_is_raised(tmp_path: Path) -> None:
    remote = Remote()
    questions = remote.ask(2)
    remote.answer(questions)
    run = run_of(remote.grid, tmp_path)
    (_, unpack), *_ = pull_replies(run, questions)
    gone = HttpGrid(f"127.0.0.1:{free_port()}", insecure=True, token="any")
    gone._retry_invoker.max_tries = 1
    remote.grid._client = gone._runtime_client
    for look in (unpack, lambda: pull_replies(run, questions)):
        with pytest.raises(httpx.ConnectError):
            look()


@pytest.mark.parametrize("reply", ["KeyError: 'Nonsense'", "a worker died"])
def test_between_machines_such_a_reply_excludes_its_client_only(tmp_path: Path, reply: str) -> None:
    run = run_of(HttpGrid(token="any"), tmp_path)
    arrived: Any = reply
    if reply == "a worker died":  # in a simulation this ends the run, with the command that resumes it
        error = Error(code=0, reason="<class 'ray.exceptions.ActorDiedError'>")
        arrived = SimpleNamespace(has_error=lambda: True, error=error)
    inquiry = Inquiry("north", 7, Question("train", 1.0))
    handle_reply(run, inquiry, arrived, lambda name, content: None)
    assert inquiry.state is State.EXCLUDED
    assert list(run.members.excluded) == ["north"]


def test_phases_nest_and_name_the_exclusions(tmp_path: Path) -> None:
    run = run_of(HttpGrid(token="any"), tmp_path)
    with run.phase("train"):
        with run.phase("gather"):
            run.exclude("north", "late")
        run.exclude("south", "NaN")
    assert {name: exclusion.phase for name, exclusion in run.members.excluded.items()} == {
        "north": "gather",
        "south": "train",
    }
    assert run.current_phase == ""


def test_only_this_machines_own_nodes_are_simulated(tmp_path: Path) -> None:
    assert not run_of(HttpGrid(token="any"), tmp_path).simulated
    assert run_of(InMemoryGrid.__new__(InMemoryGrid), tmp_path).simulated


def test_text_from_clients_is_made_printable() -> None:
    assert one_line("a\x1b[31mred\x07 \u202eü", 99) == "a\\x1b[31mred\\x07 \\u202eü"
    assert one_line("x" * 10, 4) == "xxxx …"


def test_no_client_can_forge_a_line_of_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = run_of(HttpGrid(token="any"), tmp_path)
    content = records.error_record("oh\n12:00:00 done in 1 s\r\x1b[2K")
    reply: Any = SimpleNamespace(has_error=lambda: False, content=content)
    inquiry = Inquiry("north", 7, Question("train", 1.0))
    handle_reply(run, inquiry, reply, lambda name, content: None)
    (logged,) = caplog.messages
    assert logged.endswith("oh 12:00:00 done in 1 s \\x1b[2K")
    assert len(logged.splitlines()) == 1
    assert logged == f"excluded: north: {run.members.excluded['north'].reason}"


def test_no_client_can_forge_a_line_of_the_log_by_the_report_of_its_training(caplog: pytest.LogCaptureFixture) -> None:
    forged = "1\n12:00:00 done in 1 s\x1b[2K"
    keys = ("steps", "best_step", "stopped_by")
    report = dict.fromkeys(keys, forged) | {"transport": {"kind": forged, "residual": forged}}
    caplog.set_level("INFO", logger="fedmerge")
    log_expert("north", report, few=True)
    assert len(caplog.messages) == 2
    for logged in caplog.messages:
        assert len(logged.splitlines()) == 1
        assert "\x1b" not in logged
    assert caplog.text.count("1 12:00:00 done in 1 s\\x1b[2K") == 5
