"""Between machines: one reply that cannot be unpacked does not take others with it, and some words are not believed."""

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
from flwr.app import Error
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.superlink.grid import InMemoryGrid

from fedmerge.config import ExperimentConfig
from fedmerge.escaping import one_line
from sim.app.messages import records
from sim.app.server.asking import pull_replies
from sim.app.server.phases.training import log_expert
from sim.app.server.questions import Inquiry, Question, State
from sim.app.server.replies import handle_reply
from sim.app.server.run import Run, new_run


class Remote:
    """The server's view of Flower between machines: it unpacks all replies of one call, or raises."""

    def __init__(self, bad: dict[str, Exception]) -> None:
        self.bad = bad

    def pull_messages(self, message_ids: Iterable[str]) -> list[Any]:
        for message_id in message_ids:
            if message_id in self.bad:
                raise self.bad[message_id]
        return [SimpleNamespace(metadata=SimpleNamespace(reply_to_message_id=name)) for name in message_ids]


def run_of(grid: object, folder: Path) -> Run:
    return new_run(ExperimentConfig(), folder, cast(Grid, grid))


def test_flower_itself_raises_on_what_it_cannot_unpack() -> None:
    """Which is why each reply is asked for by itself."""
    with pytest.raises((KeyError, ValueError)):
        inflate_object_from_contents("a", {"a": b"Nonsense 0 3\x00abc"})


def test_one_reply_that_cannot_be_unpacked_leaves_the_others(tmp_path: Path) -> None:
    run = run_of(Remote({"b": KeyError("Nonsense")}), tmp_path)
    found = dict(pair for batch in pull_replies(run, ["a", "b", "c"]) for pair in batch)
    assert found["b"] == "KeyError: 'Nonsense'"
    assert [name for name in found if not isinstance(found[name], str)] == ["a", "c"]


def test_a_failure_of_flower_itself_is_raised(tmp_path: Path) -> None:
    run = run_of(Remote({"b": httpx.ConnectError("gone")}), tmp_path)
    with pytest.raises(httpx.ConnectError):
        list(pull_replies(run, ["a", "b"]))


@pytest.mark.parametrize("reply", ["KeyError: 'Nonsense'", "a worker died"])
def test_between_machines_such_a_reply_excludes_its_client_only(tmp_path: Path, reply: str) -> None:
    run = run_of(Remote({}), tmp_path)
    arrived: Any = reply
    if reply == "a worker died":  # in a simulation this ends the run, with the command that resumes it
        error = Error(code=0, reason="<class 'ray.exceptions.ActorDiedError'>")
        arrived = SimpleNamespace(has_error=lambda: True, error=error)
    inquiry = Inquiry("north", 7, Question("train", 1.0))
    handle_reply(run, inquiry, arrived, lambda name, content: None)
    assert inquiry.state is State.EXCLUDED
    assert list(run.members.excluded) == ["north"]


def test_phases_nest_and_name_the_exclusions(tmp_path: Path) -> None:
    run = run_of(Remote({}), tmp_path)
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
    assert not run_of(Remote({}), tmp_path).simulated
    assert run_of(InMemoryGrid.__new__(InMemoryGrid), tmp_path).simulated


def test_text_from_clients_is_made_printable() -> None:
    assert one_line("a\x1b[31mred\x07 \u202eü", 99) == "a\\x1b[31mred\\x07 \\u202eü"
    assert one_line("x" * 10, 4) == "xxxx …"


def test_no_client_can_forge_a_line_of_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = run_of(Remote({}), tmp_path)
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
