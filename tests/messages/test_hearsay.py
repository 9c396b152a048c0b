"""Between machines: one reply that cannot be unpacked does not take others with it, and some words are not believed."""

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
from flwr.app import Error, Message
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.superlink.grid import InMemoryGrid

from sim.app.server.asking import Federation, Question, _accepted, _replies, printable


class Remote:
    """What the server sees of Flower between machines: it unpacks all replies of one call, or raises."""

    def __init__(self, bad: dict[str, Exception]) -> None:
        self.bad = bad

    def pull_messages(self, message_ids: Iterable[str]) -> list[Any]:
        for message_id in message_ids:
            if message_id in self.bad:
                raise self.bad[message_id]
        return [SimpleNamespace(metadata=SimpleNamespace(reply_to_message_id=name)) for name in message_ids]


def federation(grid: object, folder: Path) -> Federation:
    return Federation(cast(Grid, grid), folder, 4)


def test_flower_itself_raises_on_what_it_cannot_unpack() -> None:
    """Which is why each reply is asked for by itself."""
    with pytest.raises((KeyError, ValueError)):
        inflate_object_from_contents("a", {"a": b"Nonsense 0 3\x00abc"})


def test_one_reply_that_cannot_be_unpacked_leaves_the_others(tmp_path: Path) -> None:
    remote = federation(Remote({"b": KeyError("Nonsense")}), tmp_path)
    found = dict(_replies(remote, ["a", "b", "c"]))
    assert found["b"] == "KeyError: 'Nonsense'"
    assert [name for name in found if not isinstance(found[name], str)] == ["a", "c"]


def test_trouble_of_flowers_own_is_nobodys_fault(tmp_path: Path) -> None:
    remote = federation(Remote({"b": httpx.ConnectError("gone")}), tmp_path)
    with pytest.raises(httpx.ConnectError):
        list(_replies(remote, ["a", "b"]))


@pytest.mark.parametrize("reply", ["KeyError: 'Nonsense'", "a worker died"])
def test_between_machines_such_a_reply_excludes_its_client_only(tmp_path: Path, reply: str) -> None:
    remote = federation(Remote({}), tmp_path)
    told: Any = reply
    if reply == "a worker died":  # in a simulation this ends the run, with the way to go on
        error = Error(code=0, reason="<class 'ray.exceptions.ActorDiedError'>")
        told = SimpleNamespace(has_error=lambda: True, error=error)
    assert not _accepted(remote, "north", Question("train", 1.0), cast(Message, told), lambda name, content: None)
    assert list(remote.excluded) == ["north"]


def test_only_this_machines_own_nodes_are_simulated(tmp_path: Path) -> None:
    assert not federation(Remote({}), tmp_path).simulated
    assert federation(InMemoryGrid.__new__(InMemoryGrid), tmp_path).simulated


def test_what_clients_say_is_fit_for_a_terminal() -> None:
    assert printable("a\x1b[31mred\x07 \r\u202eü\n", 99) == "a\\x1b[31mred\\x07 \\r\\u202eü\n"
    assert printable("x" * 10, 4) == "xxxx …"
