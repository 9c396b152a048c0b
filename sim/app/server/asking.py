"""Ask clients, a few at a time; handle and record each reply as it arrives."""

import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping
from contextlib import closing

from flwr.app import Message, RecordDict

from sim.app.server.members import FEW_CLIENTS, join_names
from sim.app.server.pulling import pull_replies
from sim.app.server.questions import OPEN, Inquiry, Question, State
from sim.app.server.replies import handle_late_reply, handle_reply, note_release
from sim.app.server.run import Run

POLL_SECONDS = 1.0  # longest pause between two looks for replies
HEARTBEAT_SECONDS = 60.0  # between two log lines about clients that are waited for
LINES_SECONDS = 10.0  # between two log lines of a question to many clients
DESCRIBE_SECONDS = 600.0  # time for a client to open its domain and load the backbone, or to send its catalog
LATE_SECONDS = 3600.0  # Flower keeps an answer this long after its time; it is looked for during half of that
LOOK_SECONDS = 2.0  # between two looks for lost clients

logger = logging.getLogger("fedmerge.server")


def ask(
    run: Run,
    nodes: Mapping[str, int],
    question: Question,
    on_reply: Callable[[str, RecordDict], str | None],
    *,
    newcomers: Callable[[], Mapping[str, int]] = dict,
    matters: Callable[[State], bool] = lambda state: True,
) -> dict[str, State]:
    """Ask nodes, ``server.messages_at_once`` at a time, and handle each reply as it arrives.

    A client that fails, is too slow, sends too much, or sends a reply that ``on_reply`` raises on, is excluded by name.
    A client that is lost through no fault of its own is asked again once it is back, within the same time. A reply
    after its time, or after an end by ``matters``, is recorded in the ledger and dropped.

    Args:
        run: the run.
        nodes: domain -> node.
        question: the question.
        on_reply: receives name and content; may return a better name for the ledger.
        newcomers: returns nodes that are to be asked as well, each of them once.
        matters: whether an open question in this state is still waited for.

    Returns:
        Name -> state of the questions that were not waited for.

    Raises:
        ClientError: the process of a simulated client died.
        RunDirError: the run folder cannot be written.
    """
    inquiries = [Inquiry(name, node, question) for name, node in nodes.items()]
    started = heartbeat = last_line = last_reply = time.monotonic()
    last_look = 0.0
    answered = 0
    run.stages.begin(run.current_phase or question.message_type, question.message_type, len(nodes))
    while True:
        looked = time.monotonic()
        inquiries += [Inquiry(name, node, question) for name, node in newcomers().items()]
        # 1. Lost clients that are back are asked again.
        due = time.monotonic() - last_look >= LOOK_SECONDS or not matters(State.LOST)
        if _in_state(inquiries, State.LOST) and due:
            last_look = time.monotonic()
            _look_for_lost(run, inquiries)
        if not any(inquiry.state in OPEN and matters(inquiry.state) for inquiry in inquiries):
            break
        # 2. Send as many messages as may be under way at once.
        free = run.config.server.messages_at_once - len(_in_state(inquiries, State.WAITING))
        for inquiry in _in_state(inquiries, State.TO_ASK)[: max(0, free)]:
            _send(run, inquiry)
        # 3. Handle what has arrived, late answers to earlier questions included.
        with closing(_arrivals(run, inquiries)) as arrivals:
            for inquiry, reply in arrivals:
                last_reply = time.monotonic()
                if inquiry.state is State.LATE:
                    handle_late_reply(run, inquiry, reply)
                    continue
                handle_reply(run, inquiry, reply, on_reply)
                if inquiry.state is State.LOST and matters(State.LOST):
                    patience = inquiry.expected_back - time.monotonic()
                    logger.info("%s: waiting for %s for up to %.0f s", question.message_type, inquiry.name, patience)
                if inquiry.state is not State.ANSWERED:
                    continue
                answered += 1
                now = time.monotonic()
                rest = _in_state(inquiries, State.WAITING) or _in_state(inquiries, State.TO_ASK)
                few = len(inquiries) <= FEW_CLIENTS
                if not question.quiet and (few or now - last_line > LINES_SECONDS or not rest):
                    last_line = now
                    logger.info(
                        "%s: %d of %d answered (%s, %.0f s)",
                        question.message_type,
                        answered,
                        len(inquiries),
                        inquiry.name,
                        now - started,
                    )
        # 4. Exclude the clients whose time is over.
        _give_up_overdue(run, inquiries)
        # 5. Say who is waited for, and pause.
        now, waiting = time.monotonic(), _in_state(inquiries, State.WAITING)
        run.stages.answer(answered, [inquiry.name for inquiry in waiting], len(inquiries))
        if waiting and now - heartbeat > HEARTBEAT_SECONDS:
            heartbeat = now
            names = sorted(inquiry.name for inquiry in waiting)
            logger.info("%s: waiting for %s (%.0f s)", question.message_type, join_names(names), now - started)
        if waiting or _in_state(inquiries, State.LOST):
            pause(last_reply, 0.0 if last_reply > looked else now - looked)
    run.stages.end()
    # 6. Of questions that no longer matter, answers that still come are recorded.
    left = {inquiry.name: inquiry.state for inquiry in inquiries if inquiry.state in OPEN}
    for inquiry in _in_state(inquiries, State.WAITING):
        _listen(run, inquiry)
    return left


def pause(since: float, looking: float = 0.0) -> None:
    """Sleep between two looks for replies.

    For a twentieth of the time waited so far, so that an answer is found at most 5 % late; and for four times as long
    as the last look took, so that looking is at most a fifth of the work.

    Args:
        since: begin of the waiting, monotonic clock.
        looking: seconds of the last look, if it found nothing.
    """
    waited = time.monotonic() - since
    time.sleep(min(POLL_SECONDS, max(0.005, waited / 20, 4 * looking)))


def _in_state(inquiries: list[Inquiry], state: State) -> list[Inquiry]:
    return [inquiry for inquiry in inquiries if inquiry.state is state]


def _send(run: Run, inquiry: Inquiry) -> None:
    question = inquiry.question
    message = Message(
        question.request(inquiry.name),
        dst_node_id=inquiry.node,
        message_type=question.message_type,
        ttl=question.timeout_seconds + LATE_SECONDS,  # longer than the timeout, so that a late answer is recorded
    )
    if message_ids := list(run.grid.push_messages([message])):
        inquiry.state, inquiry.message_id = State.WAITING, message_ids[0]
        inquiry.deadline = min(inquiry.deadline, time.monotonic() + question.timeout_seconds)
    else:
        inquiry.state = State.EXCLUDED
        run.exclude(inquiry.name, f"{question.message_type}: Flower could not send the message")


def _listen(run: Run, inquiry: Inquiry) -> None:
    """Wait no longer for an answer; record it if it comes."""
    inquiry.state, inquiry.listen_until = State.LATE, time.monotonic() + LATE_SECONDS / 2
    run.late.append(inquiry)


def _give_up_overdue(run: Run, inquiries: list[Inquiry]) -> None:
    """Exclude the clients whose time is over."""
    for inquiry in _in_state(inquiries, State.WAITING):
        if time.monotonic() <= inquiry.deadline:
            continue
        question = inquiry.question
        _listen(run, inquiry)
        run.exclude(
            inquiry.name,
            f"{question.message_type}: no answer within {question.timeout_seconds:g} s. Its client hangs, is too slow, "
            "or its answer exceeds Flower's message limit; see the client's own log.",
        )


def _look_for_lost(run: Run, inquiries: list[Inquiry]) -> None:
    """Put lost clients that are back up for asking; exclude those that have been away for too long."""
    connected, now = set(run.grid.get_node_ids()), time.monotonic()
    for inquiry in sorted(_in_state(inquiries, State.LOST), key=lambda inquiry: inquiry.name):
        message_type = inquiry.question.message_type
        if inquiry.node in connected:
            inquiry.state = State.TO_ASK
            logger.info("%s: %s is back and is asked again", message_type, inquiry.name)
        elif now > inquiry.expected_back:
            inquiry.state = State.EXCLUDED
            run.exclude(
                inquiry.name,
                f"{message_type}: the connection was lost and did not come back. Start its client again, then resume "
                f"the run: fedmerge run --resume {run.folder}",
            )


def _arrivals(run: Run, inquiries: list[Inquiry]) -> Generator[tuple[Inquiry, Message | str], None, None]:
    """Yield the replies that have arrived; for a reply that Flower fails to unpack, the reason in its place.

    What a reply releases is noted before it is yielded, and of the others when the iterator is closed early, since
    handling one may end the run.
    """
    # Flower raises if it is asked for a message that it has forgotten.
    run.late = [inquiry for inquiry in run.late if inquiry.listen_until > time.monotonic()]
    by_id = {inquiry.message_id: inquiry for inquiry in [*_in_state(inquiries, State.WAITING), *run.late]}
    arrived = deque((by_id[found], unpack) for found, unpack in pull_replies(run, list(by_id)) if found in by_id)
    try:
        while arrived:
            inquiry, unpack = arrived.popleft()
            reply = unpack()
            note_release(inquiry, reply)
            yield inquiry, reply
    finally:
        for inquiry, unpack in arrived:
            note_release(inquiry, unpack() if run.simulated else "the run ended before its reply was read")
