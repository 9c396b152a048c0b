"""Questions to clients, and the state of each question in flight."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from flwr.app import RecordDict


@dataclass(frozen=True)
class Question:
    """A question that a phase asks its clients.

    Attributes:
        message_type: Flower's type of the message.
        timeout_seconds: from sending to the answer.
        request: name -> content of the message.
        limit_bytes: name -> largest size of its answer; checked before anything of the answer is read.
        split: that is evaluated on, else empty; for the ledger.
        noise: that the clients add to their answers, see :func:`own_noise`; for the ledger.
        quiet: True to log no line for each answer, for questions that are asked many times.
        released: called with name and content of every answer except errors, on arrival, late or not, before anything
            can refuse it; for an answer that is not read, with the reason in place of the content. None if releases
            are not counted.
    """

    message_type: str
    timeout_seconds: float
    request: Callable[[str], RecordDict] = lambda name: RecordDict()
    limit_bytes: Callable[[str], int] = lambda name: 2**16
    split: str = ""
    noise: str = "none"
    quiet: bool = False
    released: Callable[[str, RecordDict | str], None] | None = None


class State(Enum):
    """State of a question to one client."""

    TO_ASK = "to ask"
    WAITING = "waiting"  # sent, no answer yet
    LOST = "lost"  # its node or process is gone; asked again once it is back
    ANSWERED = "answered"
    EXCLUDED = "excluded"  # refused, failed, or away for too long
    LATE = "late"  # no longer waited for; an answer that still comes is recorded and dropped


OPEN = (State.TO_ASK, State.WAITING, State.LOST)


@dataclass
class Inquiry:
    """A question to one client.

    Attributes:
        name: domain, or node while the domain is not known.
        node: Flower's number of the client.
        question: the question.
        state: how far it is.
        message_id: Flower's id of the last message sent.
        deadline: time at which the client is excluded, on the monotonic clock; runs from the first message.
        expected_back: time until which a lost client is awaited.
        listen_until: time until which a late answer is looked for.
        times_lost: number of times the client was lost.
    """

    name: str
    node: int
    question: Question
    state: State = State.TO_ASK
    message_id: str = ""
    deadline: float = math.inf
    expected_back: float = math.inf
    listen_until: float = math.inf
    times_lost: int = 0


def own_noise(dp_mode: str) -> str:
    """Return the ledger's name for the noise that clients add to adapters and to answers about coefficients."""
    return {"user": "Gaussian, by user", "domain-local": "Gaussian, by domain"}.get(dp_mode, "none")
