"""The clients that take part, and how they are asked: a few at a time, each reply handled and recorded as it comes."""

import logging
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedmerge.config import ExperimentConfig
from fedmerge.errors import ClientError, RunDirError
from fedmerge.files import append_line, read_json, read_lines, write_json, write_table
from fedmerge.privacy.signatures import RegisteredKey, signer, statement
from sim.app.flower_internals import ErrorCode, InMemoryGrid, RunNotRunningException
from sim.app.messages import records

POLL_SECONDS = 0.2  # at most, between two looks for what has come
HEARTBEAT_SECONDS = 60.0
LINES_SECONDS = 10.0  # between two lines of a phase with many clients
FEW_CLIENTS = 20  # up to so many, every one gets its own line
LONGEST_REASON = 2000
LONGEST_NAME = 200
DESCRIBE_SECONDS = 600.0  # time for a client to open its domain and load the backbone, or to send its catalog
LATE_SECONDS = 3600.0  # after its time, an answer is still seen so long
LEDGER = "exposure.jsonl"
NOT_SIGNED: Mapping[str, str] = {"sha256": "", "signed_by": "", "signature": ""}
MOST_LOSSES = 3  # in one phase; a client that is lost more often than this would be lost again
LOOK_SECONDS = 2.0  # between two looks whether a lost client is back

# What Flower says when nobody is to blame: the node's heartbeats have stopped, or the process that worked was killed.
LOSSES = {
    ErrorCode.NODE_UNAVAILABLE: "its machine or network is away",
    ErrorCode.CLIENT_APP_CRASHED: "its work was killed",
}

# How Flower words the death of a simulated client's process; what a client itself raises comes as RayTaskError.
WORKER_DIED = re.compile(r"ray\.exceptions\.(?!RayTaskError)\w+")

logger = logging.getLogger("fedmerge.server")


@dataclass(frozen=True)
class Exclusion:
    """Why a domain (or node) is out: the phase it failed in, the reason, and what its client had said it is."""

    phase: str
    reason: str
    description: records.Description | None = None


@dataclass(frozen=True)
class Question:
    """What one phase asks.

    Attributes:
        message_type: of Flower.
        split: what is evaluated on, else empty; for the ledger.
        noise: what the clients add to their answers, for the ledger, see :func:`own_noise`; "none" for nothing.
        quiet: one of many alike, so that no line of the log tells of its answers.
        timeout_seconds: from sending to the answer.
        request: name -> content of the message.
        limit_bytes: name -> the most bytes that its answer may take; checked before anything of it is read.
        released: called with name and content of every answer but errors as it arrives, late or not, before anything
            can refuse it; with the reason in place of a content that is not read. None where nothing is counted.
    """

    message_type: str
    timeout_seconds: float
    request: Callable[[str], RecordDict] = lambda name: RecordDict()
    limit_bytes: Callable[[str], int] = lambda name: 2**16
    split: str = ""
    noise: str = "none"
    quiet: bool = False
    released: Callable[[str, RecordDict | str], None] | None = None


def own_noise(config: ExperimentConfig) -> str:
    """The noise that clients add to adapters, and to answers about coefficients, as the ledger names it."""
    return {"user": "Gaussian, by user", "domain-local": "Gaussian, by domain"}.get(config.dp.mode, "none")


@dataclass
class Federation:
    """The clients that take part; those that fail are taken out, by name and with the reason.

    Attributes:
        grid: Flower's connection to the nodes.
        run_dir: where exclusions and the exposure ledger are written as they come.
        messages_at_once: clients asked at once.
        return_seconds: how long a lost client is waited for.
        phase: what the run is at.
        nodes: domain -> node, of those that take part.
        descriptions: domain -> what its client said it is, of everybody who ever took part.
        excluded: domain (or node) -> why.
        greeted: nodes that were asked what they are.
        num_nodes: how many there are in all, where a simulation says so; else 0.
        late: message id -> whose answer it would be, to what, and until when it is looked for.
        keys: the registered public keys by fingerprint; empty where they are not known.
        signers: node -> the fingerprint of the key that it signs with, empty for none.
    """

    grid: Grid
    run_dir: Path
    messages_at_once: int
    return_seconds: float = 0.0
    phase: str = "gather"
    nodes: dict[str, int] = field(default_factory=dict)
    descriptions: dict[str, records.Description] = field(default_factory=dict)
    excluded: dict[str, Exclusion] = field(default_factory=dict)
    greeted: set[int] = field(default_factory=set)
    num_nodes: int = 0
    late: dict[str, tuple[str, Question, float]] = field(default_factory=dict)
    keys: Mapping[str, RegisteredKey] = field(default_factory=dict)
    signers: dict[int, str] = field(default_factory=dict)

    @property
    def simulated(self) -> bool:
        """Whether the nodes are this machine's own processes; otherwise what they say of themselves is hearsay."""
        return isinstance(self.grid, InMemoryGrid)

    def of(self, role: str) -> list[str]:
        """The domains of one role that are still in, sorted."""
        return sorted(domain for domain in self.nodes if self.descriptions[domain].role == role)

    def exclude(self, name: str, reason: str) -> None:
        """Take a domain out."""
        name, reason = printable(name, LONGEST_NAME), printable(reason, LONGEST_REASON)
        logger.warning("excluded: %s: %s", name, reason)
        self.excluded[name] = Exclusion(self.phase, reason, self.descriptions.get(name))
        self.nodes.pop(name, None)
        self.write_clients()

    def write_clients(self) -> None:
        """Write down who takes part and who does not."""
        participants = {
            domain: asdict(description)
            for domain, description in sorted(self.descriptions.items())
            if domain not in self.excluded
        }
        out = self.excluded.items()
        clients = {
            "participants": participants,
            "excluded": {name: exclusion.reason for name, exclusion in out},
            "excluded_in_phase": {name: exclusion.phase for name, exclusion in out},
            "excluded_participants": {name: asdict(found.description) for name, found in out if found.description},
        }
        write_json(self.run_dir / "clients.json", clients)

    def write_ledger(self) -> None:
        """The exposure ledger as a table: one row for each thing that left a client."""
        replies = sorted(read_lines(self.run_dir / LEDGER), key=lambda reply: str(reply["domain"]))
        if replies:
            rows = (
                {**{key: value for key, value in reply.items() if key != "contents"}, **row}
                for reply in replies
                for row in reply["contents"]
            )
            write_table(self.run_dir / "exposure.parquet", rows)

    def forget_ledger_lines(self) -> None:
        """Remove what the table of the finished run holds as well."""
        (self.run_dir / LEDGER).unlink(missing_ok=True)


def remembered_clients(run_dir: Path) -> tuple[dict[str, records.Description], dict[str, Exclusion]]:
    """Who took part in a run that is resumed, and who had been excluded.

    Raises:
        RunDirError: clients.json is damaged or of another version.
    """
    found: Mapping[str, Any] | None = read_json(run_dir / "clients.json")
    if found is None:  # ended before anybody had answered
        return {}, {}
    try:
        told = {**found["participants"], **found["excluded_participants"]}
        descriptions = {name: records.Description(**facts) for name, facts in told.items()}
        excluded = {
            name: Exclusion(found["excluded_in_phase"][name], reason, descriptions.get(name))
            for name, reason in found["excluded"].items()
        }
    except (LookupError, TypeError) as error:
        raise RunDirError(
            f"{run_dir / 'clients.json'} has another form ({type(error).__name__}: {error}). Put it back as it was."
        ) from error
    return descriptions, excluded


def ask(
    federation: Federation,
    nodes: Mapping[str, int],
    question: Question,
    on_reply: Callable[[str, RecordDict], str | None],
) -> None:
    """Ask nodes, so many at once, and handle each reply as it comes.

    Who fails, is late, sends too much, or sends what ``on_reply`` raises on, is excluded by name. Who is lost on the
    way is asked again when it is back, within the same time. A reply that comes after its time is recorded in the
    ledger and dropped.

    Args:
        nodes: domain -> node.
        question: what they are asked.
        on_reply: receives name and content; returns the name for the ledger where it knows a better one.

    Raises:
        ClientError: the process that simulates a client died.
        RunDirError: the run's own disk.
    """
    message_type, timeout_seconds = question.message_type, question.timeout_seconds
    to_ask = deque(nodes.items())
    waiting: dict[str, tuple[str, float]] = {}  # message id -> name, when its time is over
    deadlines: dict[str, float] = {}  # name -> when its time is over, from the first time that it was asked
    lost = _Lost(federation, message_type)
    started = heartbeat = said = time.monotonic()
    answered = 0

    def arrived(message_id: str, reply: Message | str) -> None:
        if message_id in federation.late:
            _note_release(*federation.late[message_id][:2], reply)
        elif message_id in waiting:
            _note_release(waiting[message_id][0], question, reply)

    while to_ask or waiting or lost.until:
        to_ask.extend((name, nodes[name]) for name in lost.returned(nodes))
        while to_ask and len(waiting) < federation.messages_at_once:
            name, node = to_ask.popleft()
            # Longer than the wait for the answer, so that a late one is seen and recorded.
            content = question.request(name)
            message = Message(content, dst_node_id=node, message_type=message_type, ttl=timeout_seconds + LATE_SECONDS)
            if ids := list(federation.grid.push_messages([message])):
                waiting[ids[0]] = (name, deadlines.setdefault(name, time.monotonic() + timeout_seconds))
            else:
                federation.exclude(name, f"{message_type}: Flower could not send the message")
        # Flower fails when it is asked for a message that it has forgotten.
        federation.late = {key: late for key, late in federation.late.items() if late[2] > time.monotonic()}
        for message_id, reply in _replies(federation, [*waiting, *federation.late], arrived):
            if message_id in federation.late:
                name, asked, _ = federation.late.pop(message_id)
                _record_late(federation, name, asked, reply)
                continue
            name, deadline = waiting.pop(message_id, ("", 0.0))
            if (
                not name
                or lost.takes(name, reply, deadline)
                or not _accepted(federation, name, question, reply, on_reply)
            ):
                continue
            answered += 1
            now = time.monotonic()
            due = len(nodes) <= FEW_CLIENTS or now - said > LINES_SECONDS or not (waiting or to_ask)
            if due and not question.quiet:
                said = now
                seconds = now - started
                logger.info("%s: %d of %d answered (%s, %.0f s)", message_type, answered, len(nodes), name, seconds)
        now = time.monotonic()
        for message_id, (name, deadline) in list(waiting.items()):
            if now > deadline:
                del waiting[message_id]
                federation.late[message_id] = (name, question, now + LATE_SECONDS / 2)
                federation.exclude(
                    name,
                    f"{message_type}: no answer within {timeout_seconds:g} s; its client hangs, is too slow, or its "
                    "answer is larger than Flower carries: see the client's own log",
                )
        if waiting and now - heartbeat > HEARTBEAT_SECONDS:
            heartbeat = now
            names = sorted(name for name, _ in waiting.values())
            logger.info("%s: waiting for %s (%.0f s)", message_type, listed(names), now - started)
        if waiting or lost.until:
            pause(started)


def pause(since: float) -> None:
    """Wait a tenth of the time that was waited already, so that a quick answer is not held up by the looks for it."""
    time.sleep(min(POLL_SECONDS, max(0.005, (time.monotonic() - since) / 10)))


@dataclass
class _Lost:
    """Clients that were lost in one phase through nobody's fault, and are waited for.

    Attributes:
        federation: who takes part.
        message_type: what they were asked.
        until: name -> how long it is waited for.
        times: name -> how often it was lost.
        looked: when it was last seen who is there.
    """

    federation: Federation
    message_type: str
    until: dict[str, float] = field(default_factory=dict)
    times: Counter[str] = field(default_factory=Counter)
    looked: float = 0.0

    def takes(self, name: str, reply: Message | str, deadline: float) -> bool:
        """Whether this reply says that the client was lost, and it is to be waited for."""
        cause = LOSSES.get(reply.error.code) if isinstance(reply, Message) and reply.has_error() else None
        now = time.monotonic()
        if cause is None or self.times[name] >= MOST_LOSSES or self.federation.return_seconds <= 0 or now > deadline:
            return False
        self.times[name] += 1
        self.until[name] = min(now + self.federation.return_seconds, deadline)
        seconds = self.until[name] - now
        logger.warning("%s: %s was lost: %s; waiting for it, at most %.0f s", self.message_type, name, cause, seconds)
        return True

    def returned(self, nodes: Mapping[str, int]) -> list[str]:
        """Who is back now, to be asked again; who has been away for too long is excluded."""
        now = time.monotonic()
        if not self.until or now - self.looked < LOOK_SECONDS:
            return []
        self.looked = now
        there = set(self.federation.grid.get_node_ids())
        back = sorted(name for name in self.until if nodes[name] in there)
        for name in back:
            del self.until[name]
            logger.info("%s: %s is back and is asked again", self.message_type, name)
        for name in [name for name, until in self.until.items() if now > until]:
            del self.until[name]
            self.federation.exclude(
                name,
                f"{self.message_type}: it was lost and did not come back; start its client again, and go on with the "
                "run: --resume",
            )
        return back


def _replies(
    federation: Federation,
    message_ids: list[str],
    arrived: Callable[[str, Message | str], None] = lambda message_id, reply: None,
) -> Iterator[tuple[str, Message | str]]:
    """Message id and reply of whatever has come; the reason in place of a reply that Flower itself fails to unpack.

    Between machines Flower unpacks what clients have packed, and one malformed reply would take all others of the same
    call with it. So each is asked for by itself there.

    Args:
        federation: the clients.
        message_ids: that are waited for.
        arrived: called with all that one call of Flower's gives, before any of it is handled, which may end the run.
    """
    for some in [message_ids] if federation.simulated else [[message_id] for message_id in message_ids]:
        try:
            came = list(federation.grid.pull_messages(some))
        except (httpx.HTTPError, RunNotRunningException):  # Flower's own trouble, not the client's
            raise
        except Exception as error:
            if len(some) != 1 or federation.simulated:
                raise
            reason = f"{type(error).__name__}: {error}"
            arrived(some[0], reason)
            yield some[0], reason
        else:
            for reply in came:
                arrived(reply.metadata.reply_to_message_id, reply)
            yield from ((reply.metadata.reply_to_message_id, reply) for reply in came)


def printable(text: str, longest: int) -> str:
    """What a client says, fit for a log and a terminal: control characters escaped, cut to a length."""
    shown = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text[:longest])
    return shown if len(text) <= longest else f"{shown} …"


def listed(names: list[str]) -> str:
    """Names for a line of the log: the first few, and how many more."""
    more = len(names) - FEW_CLIENTS
    return ", ".join(names[:FEW_CLIENTS]) + (f" and {more} more" if more > 0 else "")


def require_quorum(federation: Federation, config: ExperimentConfig, domains: list[str]) -> None:
    """Fail the run when too few training domains are left.

    Raises:
        ClientError: naming everybody who was excluded.
    """
    if len(domains) < config.server.min_train_clients:
        named = [*config.domains.train, *config.domains.unseen]
        absent = [domain for domain in named if domain not in federation.descriptions]
        nobody = f" nobody; never connected: {listed(absent) or 'nobody'}"
        reasons = "".join(f"\n  {name}: {exclusion.reason}" for name, exclusion in federation.excluded.items())
        raise ClientError(
            f"{len(domains)} training clients are left ({', '.join(domains) or 'none'}), server.min_train_clients is "
            f"{config.server.min_train_clients}. Excluded:{reasons or nobody}"
        )


def _accepted(
    federation: Federation,
    name: str,
    question: Question,
    reply: Message | str,
    on_reply: Callable[[str, RecordDict], str | None],
) -> bool:
    """Record and handle one reply; whatever a client sends, it does not take the server down."""
    message_type = question.message_type
    if isinstance(reply, str):
        federation.exclude(name, f"{message_type}: its reply cannot be unpacked: {reply}")
        return False
    if reply.has_error():
        reason = f"{reply.error.reason} (Flower error {reply.error.code})"
        # Flower would give the dead process all further messages. Between machines anybody could say so of himself.
        if federation.simulated and WORKER_DIED.search(reply.error.reason or ""):
            raise ClientError(
                f"{name}: the process that simulated it died in {message_type}: {reason[:LONGEST_REASON]}\nWas it "
                "killed, or the memory full? Nothing that is finished is lost: "
                f"fedmerge run --resume {federation.run_dir}"
            )
        federation.exclude(name, f"{message_type} failed: {reason}")
        return False
    recorded_as, size, limit, signed = name, 0, question.limit_bytes(name), NOT_SIGNED
    try:
        size = records.size_bytes(reply.content)
        if size > limit:
            raise ClientError(
                f"it takes {size:,} bytes, at most {limit:,} are expected. Use one configuration and one fedmerge "
                "version everywhere, or look into its client."
            )
        if error := records.read_error(reply.content):
            domain = records.read_error_domain(reply.content)
            if name not in federation.nodes and domain:  # its word alone must not exclude another domain
                recorded_as = f"{domain} ({name})"
            federation.exclude(recorded_as, f"{message_type} failed: {error}")
            return False
        signed = _checked_signature(federation, reply)
        recorded_as = on_reply(name, reply.content) or name
        return recorded_as == name or recorded_as in federation.nodes
    except (RunDirError, OSError):
        raise  # the server's own trouble, not the client's
    except Exception as error:
        federation.exclude(name, f"{message_type}: its reply is refused: {type(error).__name__}: {error}")
        return False
    finally:
        _record(federation, recorded_as, question, reply, size <= limit, signed=signed)


def _checked_signature(federation: Federation, reply: Message) -> Mapping[str, str]:
    """Who signed a reply, for the ledger.

    Raises:
        ClientError: it is not of this reply, or of another key than expected, or missing where keys are known.
    """
    content, told = reply.content, reply.metadata
    signature, sha256, key = records.read_signature(content), records.content_sha256(content), ""
    if signature is not None:
        key = signer(signature, statement(told.run_id, told.reply_to_message_id, sha256))
    if federation.keys and key not in federation.keys:
        found = f"is signed by the key {key}, which is not" if key else "is not signed; expected one of the keys"
        raise ClientError(f"it {found} in server.client_keys. Start the client with fedmerge client start.")
    if (first := federation.signers.setdefault(told.src_node_id, key)) != key:
        raise ClientError(
            f"it is signed by the key {key or 'none'}, this client's answers so far by {first or 'none'}. Start "
            "one client with one key a domain, then resume the run."
        )
    if signature is None:
        return {**NOT_SIGNED, "sha256": sha256}
    return {
        "sha256": sha256,
        "signed_by": federation.keys[key].name if federation.keys else key,
        "signature": signature.data.hex(),
    }


def _note_release(name: str, question: Question, reply: Message | str) -> None:
    if question.released is None:
        return
    if isinstance(reply, str):
        question.released(name, "its reply cannot be unpacked")
    elif not reply.has_error():
        if (size := records.size_bytes(reply.content)) > question.limit_bytes(name):
            question.released(name, f"its reply takes {size:,} bytes and was not read")
        elif reply.content.array_records or not records.read_error(reply.content):
            question.released(name, reply.content)


def _record_late(federation: Federation, name: str, question: Question, reply: Message | str) -> None:
    if isinstance(reply, str) or reply.has_error():
        return
    logger.warning("%s: a late answer of %s is dropped", question.message_type, name)
    _record(
        federation, name, question, reply, records.size_bytes(reply.content) <= question.limit_bytes(name), late=True
    )


def _record(
    federation: Federation,
    name: str,
    question: Question,
    reply: Message,
    in_detail: bool,
    late: bool = False,
    signed: Mapping[str, str] = NOT_SIGNED,
) -> None:
    """Put into the ledger what a reply holds; of one that is too large, its size."""
    rows = [{"name": "(too much)", "dtype": "", "shape": "", "size_bytes": records.size_bytes(reply.content)}]
    if in_detail:
        rows = list(records.contents(reply.content))
    entry = {
        "domain": name,
        "message": question.message_type,
        "split": question.split,
        "noise": question.noise,
        "late": late,
        **signed,
        "contents": rows,
    }
    append_line(federation.run_dir / LEDGER, entry)
