"""Check, record and handle a single reply; nothing that a client sends takes the server down."""

import logging
import re
import time
from collections.abc import Callable, Mapping

from flwr.app import Message, RecordDict

from fedmerge.errors import ClientError, RunDirError
from fedmerge.escaping import one_line
from fedmerge.privacy.signatures import signer, statement
from sim.app.flower_internals import ErrorCode
from sim.app.messages import records
from sim.app.server.ledger import UNSIGNED
from sim.app.server.members import LONGEST_REASON
from sim.app.server.questions import Inquiry, State
from sim.app.server.run import Run

MOST_LOSSES = 3  # of a client, for one question; one that is lost more often is excluded

# Flower's errors for a loss without a faulty client: the node's heartbeats stopped, its process was killed, or its
# connection ended within an upload, which Flower gives up after a while.
LOSSES = {
    ErrorCode.NODE_UNAVAILABLE: "its machine or network is unavailable",
    ErrorCode.CLIENT_APP_CRASHED: "its process was killed",
    ErrorCode.MESSAGE_UNAVAILABLE: "its answer arrived in part",
}

# Flower's text for the death of a simulated client's process; an exception of the client itself is a RayTaskError.
WORKER_DIED = re.compile(r"ray\.exceptions\.(?!RayTaskError)\w+")

logger = logging.getLogger("fedmerge.server")


def handle_reply(
    run: Run, inquiry: Inquiry, reply: Message | str, on_reply: Callable[[str, RecordDict], str | None]
) -> None:
    """Record and handle a reply, and set the state of its inquiry.

    Args:
        run: the run.
        inquiry: that the reply answers.
        reply: from Flower, or the reason why Flower could not unpack it.
        on_reply: receives name and content; may return a better name for the ledger.

    Raises:
        ClientError: the process of a simulated client died.
        RunDirError: the run folder cannot be written.
    """
    if _is_lost(run, inquiry, reply):
        inquiry.state = State.LOST
        return
    inquiry.state = State.ANSWERED if _accept(run, inquiry, reply, on_reply) else State.EXCLUDED


def handle_late_reply(run: Run, inquiry: Inquiry, reply: Message | str) -> None:
    """Record and drop a reply that came after its time."""
    run.late.remove(inquiry)
    if isinstance(reply, str) or reply.has_error():
        return
    question = inquiry.question
    logger.warning("%s: a late answer of %s is dropped", question.message_type, inquiry.name)
    too_large = records.size_bytes(reply.content) > question.limit_bytes(inquiry.name)
    run.ledger.add(inquiry.name, question, reply.content, too_large=too_large, late=True)


def note_release(inquiry: Inquiry, reply: Message | str) -> None:
    """Note what a reply released, before anything can refuse it."""
    name, question = inquiry.name, inquiry.question
    if question.released is None:
        return
    if isinstance(reply, str):
        question.released(name, "its reply cannot be unpacked")
    elif not reply.has_error():
        if (size := records.size_bytes(reply.content)) > question.limit_bytes(name):
            question.released(name, f"its reply takes {size:,} bytes and was not read")
        elif reply.content.array_records or not records.read_error(reply.content):
            question.released(name, reply.content)


def _is_lost(run: Run, inquiry: Inquiry, reply: Message | str) -> bool:
    """Return True if the client was lost and should be asked again."""
    cause = LOSSES.get(reply.error.code) if not isinstance(reply, str) and reply.has_error() else None
    now, patience = time.monotonic(), run.config.server.return_seconds
    if cause is None or inquiry.times_lost >= MOST_LOSSES or patience <= 0 or now > inquiry.deadline:
        return False
    inquiry.times_lost += 1
    inquiry.expected_back = min(now + patience, inquiry.deadline)
    logger.warning("%s: %s was lost: %s", inquiry.question.message_type, inquiry.name, cause)
    return True


def _accept(
    run: Run, inquiry: Inquiry, reply: Message | str, on_reply: Callable[[str, RecordDict], str | None]
) -> bool:
    name, question = inquiry.name, inquiry.question
    message_type = question.message_type
    # 1. Replies without content: malformed, or an error that Flower reports.
    if isinstance(reply, str):
        run.exclude(name, f"{message_type}: its reply cannot be unpacked: {reply}")
        return False
    if reply.has_error():
        _exclude_for_error(run, name, message_type, reply)
        return False
    # 2. Size, then the client's own error, then the signature, then the content; in this order, so that nothing is
    # read of a reply that is too large.
    recorded_as, too_large, signed = name, False, UNSIGNED
    try:
        size, limit = records.size_bytes(reply.content), question.limit_bytes(name)
        if too_large := size > limit:
            raise ClientError(
                f"it takes {size:,} bytes, at most {limit:,} are expected. Use one configuration and one fedmerge "
                "version everywhere, or check its client."
            )
        if error := records.read_error(reply.content):
            domain = records.read_error_domain(reply.content)
            if name not in run.members.nodes and domain:  # a client's claim alone must not exclude another domain
                recorded_as = f"{domain} ({name})"
            run.exclude(recorded_as, f"{message_type} failed: {error}")
            return False
        signed = _check_signature(run, reply)
        recorded_as = on_reply(name, reply.content) or name
        return recorded_as == name or recorded_as in run.members.nodes
    except (RunDirError, OSError):
        raise  # a failure of the server, not of the client
    except Exception as error:
        run.exclude(name, f"{message_type}: its reply is refused: {type(error).__name__}: {error}")
        return False
    finally:
        run.ledger.add(
            one_line(recorded_as, LONGEST_REASON), question, reply.content, too_large=too_large, signed=signed
        )


def _exclude_for_error(run: Run, name: str, message_type: str, reply: Message) -> None:
    reason = f"{reply.error.reason} (Flower error {reply.error.code})"
    # Flower would send all further messages to the dead process. Between machines any client could claim this.
    if run.simulated and WORKER_DIED.search(reply.error.reason or ""):
        raise ClientError(
            f"{name}: the process that simulated it died in {message_type}: {one_line(reason, LONGEST_REASON)}\nIt "
            "was killed, or the memory was full. Everything finished is saved; resume with: "
            f"fedmerge run --resume {run.folder}"
        )
    run.exclude(name, f"{message_type} failed: {reason}")


def _check_signature(run: Run, reply: Message) -> Mapping[str, str]:
    """Return hash, signer and signature of a reply for the ledger.

    Raises:
        ClientError: the signature is not of this reply, is by another key than expected, or is missing although keys
            are registered.
    """
    members, metadata = run.members, reply.metadata
    signature, sha256, key = records.read_signature(reply.content), records.content_sha256(reply.content), ""
    if signature is not None:
        key = signer(signature, statement(metadata.run_id, metadata.reply_to_message_id, sha256))
    if members.keys and key not in members.keys:
        found = f"is signed by the key {key}, which is not" if key else "is not signed; expected one of the keys"
        raise ClientError(f"it {found} in server.client_keys. Start the client with fedmerge client start.")
    if (first := members.signers.setdefault(metadata.src_node_id, key)) != key:
        raise ClientError(
            f"it is signed by the key {key or 'none'}, this client's earlier answers by {first or 'none'}. Start one "
            "client with one key for each domain, then resume the run."
        )
    if signature is None:
        return {**UNSIGNED, "sha256": sha256}
    return {
        "sha256": sha256,
        "signed_by": members.keys[key].name if members.keys else key,
        "signature": signature.data.hex(),
    }
