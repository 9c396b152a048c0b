"""Pull replies from Flower: all that have arrived with one request, each unpacked by itself."""

import copy
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import httpx
from flwr.app import Message

from sim.app.flower_internals import PullAppMessagesRequest, PullAppMessagesResponse, RunNotRunningException
from sim.app.server.run import Run

Unpack = Callable[[], Message | str]
"""Return a reply, or the reason why Flower fails to unpack it."""


def pull_replies(run: Run, message_ids: list[str]) -> list[tuple[str, Unpack]]:
    """Take from Flower the replies that have arrived; it hands out each of them once.

    Args:
        run: the run.
        message_ids: of the questions.

    Returns:
        Id of the question and its reply. Between machines a reply is fetched when it is unpacked, so that the server
        need not hold more than one.

    Differs:
        Between machines ``Grid.pull_messages`` unpacks all replies that one request claims, and one that is malformed
        takes the others with it.
    """
    if not message_ids:
        return []
    if run.simulated:
        return [
            (reply.metadata.reply_to_message_id, partial(_itself, reply))
            for reply in run.grid.pull_messages(message_ids)
        ]
    client = run.grid._runtime_client  # type: ignore[attr-defined]  # of Flower's HttpGrid
    claimed = client.PullMessages(PullAppMessagesRequest(message_ids=message_ids))
    pairs = zip(claimed.messages_list, claimed.message_object_trees, strict=True)
    return [
        (
            message.metadata.reply_to_message_id,
            partial(
                _unpack,
                run.grid,
                message.metadata.reply_to_message_id,
                PullAppMessagesResponse(messages_list=[message], message_object_trees=[tree]),
            ),
        )
        for message, tree in pairs
    ]


def _itself(reply: Message) -> Message:
    return reply


def _unpack(grid: Any, message_id: str, claimed: PullAppMessagesResponse) -> Message | str:
    """Let Flower fetch and unpack a reply that it has handed out already."""
    client = grid._runtime_client
    of_one = copy.copy(grid)
    of_one._client = SimpleNamespace(
        PullMessages=lambda request: claimed,
        PullObject=client.PullObject,
        ConfirmMessageReceived=client.ConfirmMessageReceived,
    )
    try:
        (reply,) = of_one.pull_messages([message_id])
    except (httpx.HTTPError, RunNotRunningException):  # a failure of Flower, not of the client
        raise
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return reply  # type: ignore[no-any-return]
