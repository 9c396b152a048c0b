"""Executor of a SuperNode that replaces Flower's own and never runs code that arrives with a run.

Flower's executor unpacks the app and imports it. This one compares the app with the installed and approved code
(``fedmerge.organisation.app``) and then answers with the installed ``sim.app.client.app``, in a separate process
(``sim.machines.worker``). Settings of client.toml replace those of the run configuration that concern this machine.

    python -P -m sim.machines.executor CLIENT_FOLDER RUNTIME_ADDRESS SECRET_FILE

``fedmerge client start`` starts it, and it ends with that process.
"""

import hashlib
import logging
import resource
import signal
import sys
import time
from collections.abc import Callable, Hashable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import torch
from flwr.app import Context, Error, Message, RecordDict

import fedmerge
from fedmerge.errors import FedMergeError, PolicyError
from fedmerge.organisation.app import check_app, installed_code
from fedmerge.organisation.folder import KEY, Client, approved_apps, read_client
from fedmerge.privacy.client_policy import ClientPolicy, read_client_policy, too_slow_error
from fedmerge.privacy.paths import without_paths
from sim.app.client.app import app as client_app
from sim.app.client.replies import log_to_stderr
from sim.app.messages import records
from sim.flower_internals import (
    AcquireTaskRequest,
    ErrorCode,
    Fab,
    ProtobufClientInterceptor,
    ProtoContext,
    ProtoMessage,
    ProtoRecordDict,
    RuntimeHttpClient,
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SendTaskHeartbeatRequest,
    SubStatus,
    SuperExecAuthHttpInterceptor,
    TaskType,
    context_from_proto,
    context_to_proto,
    make_simple_http_retry_invoker,
    message_from_proto,
    message_to_proto,
    pull_task_input,
    push_message,
    push_task_output,
    recorddict_from_proto,
    recorddict_to_proto,
)
from sim.machines.worker import Workers, end_with_parent

POLL_SECONDS = 0.2
HEARTBEAT_SECONDS = 10.0  # Flower gives a message up after 60
IDLE_SECONDS = 120.0
MANY = (records.COHORT, records.GRADIENT, records.LAYER_MAP)  # of which a run sends hundreds

logger = logging.getLogger("fedmerge.client")


def main(folder: Path, address: str, secret: bytes) -> None:
    """Answer messages from the SuperNode, one after the other, until the SuperNode or the parent ends."""
    end_with_parent(signal.SIGTERM)
    signal.signal(signal.SIGTERM, _leave)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash writes no memory, with its secrets, to the disk
    code = installed_code(Path(__file__).parents[1])  # now: an upgrade changes the files, not what is loaded
    log_to_stderr()
    check_fork()
    logger.info("ready; answers with fedmerge %s from %s", fedmerge.__version__, Path(fedmerge.__file__).parent)
    with connect(address, secret) as runtime, closing(Workers(prepare_for)) as workers:
        while True:
            answer_next(runtime, address, folder, code, workers)
            workers.close_idle(IDLE_SECONDS)
            time.sleep(POLL_SECONDS)


def check_fork() -> None:
    """Exit where an import has initialised CUDA: the processes that answer are forked, and could not use the GPU."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # PyTorch leaves it untyped
        sys.exit(
            "fedmerge: an import has initialised CUDA, as bitsandbytes does, and no process that is forked afterwards "
            "can use the GPU. Uninstall bitsandbytes here, or set CUDA_VISIBLE_DEVICES= to answer on the CPU."
        )


def connect(address: str, secret: bytes) -> RuntimeHttpClient:
    """Return a connection to a SuperNode that takes its tasks."""
    auth = SuperExecAuthHttpInterceptor(
        master_secret=secret, protected_methods=frozenset({"/flwr.proto.Runtime/AcquireTask"})
    )
    return _runtime(address, auth)


def answer_next(
    runtime: RuntimeHttpClient, address: str, folder: Path, code: Mapping[str, str], workers: Workers
) -> bool:
    """Answer the SuperNode's next message, if there is one.

    Args:
        runtime: connection of :func:`connect`.
        address: of the SuperNode.
        folder: the client folder.
        code: the installed code as it was loaded (``fedmerge.organisation.app.installed_code``).
        workers: for the processes that prepare answers.

    Returns:
        True if there was a message.
    """
    # Take tasks of Flower's agents as well and refuse them, since no other process would answer them.
    found = runtime.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP, TaskType.AGENT_APP]))
    if not found.HasField("task") or not found.token:
        return False
    with _runtime(address, RuntimeTokenHttpInterceptor(found.token)) as of_task:
        _work(of_task, folder, code, found.task.type == TaskType.CLIENT_APP, workers)
    return True


def _work(
    runtime: RuntimeHttpClient, folder: Path, code: Mapping[str, str], is_client_app: bool, workers: Workers
) -> None:
    """Answer one message: check the app, then do the work in a separate process."""
    message, context, _, fab = pull_task_input(runtime)
    kind, started = message.metadata.message_type, time.monotonic()
    try:
        client = read_client(folder)  # read each time, so that the owner's changes apply at once
        check(client, fab, code, is_client_app)
        own = read_client_policy(client.policy)
        logger.info("%s: working", kind)
        override_run_config(context, client)
        in_time = limit_time(own.max_minutes, client.domain.name, _heartbeat(runtime))
        owner = owner_of(message, context, fab, own)
        if owner is None:
            answered = workers.once(lambda: prepare(message, context), in_time)
        else:
            answered = workers.ask(request_of(message, context), owner, in_time)
        content, context.state = read_answer(answered)
        summary = "an error" if records.read_error(content) else f"{records.size_bytes(content):,} bytes"
        logger.info("%s: answered after %.0f s (%s)", kind, time.monotonic() - started, summary)
        reply = Message(content, reply_to=message)
    except FedMergeError as error:
        logger.error("%s: refused: %s", kind, error)
        reason = without_paths(f"{type(error).__name__}: {error}", [str(folder)])
        reply = Message(records.error_record(reason, _domain(folder)), reply_to=message)
    except ChildProcessError as error:
        logger.error("%s: %s", kind, error)
        reply = Message(Error(ErrorCode.CLIENT_APP_CRASHED, str(error)), reply_to=message)
    push_message(runtime, reply, context)
    push_task_output(runtime, context, SubStatus.COMPLETED, "")


def owner_of(message: Message, context: Context, fab: Fab, own: ClientPolicy | None) -> Hashable:
    """Return what all messages that share a process have in common; None for a message with a process of its own.

    Args:
        message: the message.
        context: with the settings of client.toml.
        fab: the approved app.
        own: the organisation's policy.
    """
    if message.metadata.message_type not in MANY:
        return None
    settings = [tuple(sorted(each.items())) for each in (context.run_config, context.node_config)]
    return hashlib.sha256(fab.content).hexdigest(), context.run_id, context.node_id, own, *settings


def request_of(message: Message, context: Context) -> bytes:
    """Serialise a message and the context to answer it in."""
    return _joined(message_to_proto(message).SerializeToString(), context_to_proto(context).SerializeToString())


def prepare_for(request: bytes) -> bytes:
    """Answer a message of :func:`request_of`."""
    first, second = _parted(request)
    context = context_from_proto(ProtoContext.FromString(second))
    return prepare(message_from_proto(ProtoMessage.FromString(first)), context)


def prepare(message: Message, context: Context) -> bytes:
    """Answer a message; :func:`read_answer` reads the result."""
    reply = client_app(message, context)
    return _joined(*(recorddict_to_proto(part).SerializeToString() for part in (reply.content, context.state)))


def read_answer(answered: bytes) -> tuple[RecordDict, RecordDict]:
    """Return the reply, and the state that the client app needs for the run's next message: secrets of a secure sum."""
    content, state = (recorddict_from_proto(ProtoRecordDict.FromString(part)) for part in _parted(answered))
    return content, state


def _joined(first: bytes, second: bytes) -> bytes:
    return len(first).to_bytes(8) + first + second


def _parted(content: bytes) -> tuple[bytes, bytes]:
    end = 8 + int.from_bytes(content[:8])
    return content[8:end], content[end:]


def check(client: Client, fab: Fab, code: Mapping[str, str], is_client_app: bool = True) -> None:
    """Refuse everything but the approved app.

    Args:
        client: the client, whose approvals are read each time.
        fab: the app that arrived.
        code: the installed code as it was loaded (``fedmerge.organisation.app.installed_code``).
        is_client_app: False for a task of Flower's agents.

    Raises:
        PolicyError: the app is refused.
        ConfigError: the list of approvals cannot be read.
    """
    if not is_client_app:
        raise PolicyError("the run is one of Flower's agents, not an app for clients; it was not run.")
    check_app(fab.content, approved_apps(client.folder), code)


def override_run_config(context: Context, client: Client) -> None:
    """Replace the settings that a run must not decide for this machine by those of client.toml."""
    context.node_config = {
        "domain-path": str(client.domain),
        "policy-path": str(client.policy),
        "key-path": str(client.folder / KEY),
        "disclosed-path": str(client.disclosed),
        **({} if client.identity_key is None else {"identity-key": str(client.identity_key)}),
        **({} if client.peer_keys is None else {"peer-keys": str(client.peer_keys)}),
    }
    context.run_config = dict(context.run_config) | {
        "cache_dir": str(client.cache_dir),
        "backbone.source": client.backbone,
        "domains.root": str(client.domain.parent),
        "runtime.threads_per_client": client.threads,
    }


def limit_time(max_minutes: float | None, domain: str, beat: Callable[[], bool]) -> Callable[[], bool]:
    """Return ``beat`` with a time limit: it raises PolicyError after ``max_minutes`` of the organisation's policy."""
    started = time.monotonic()

    def in_time() -> bool:
        if max_minutes is not None and time.monotonic() - started > 60.0 * max_minutes:
            raise too_slow_error(max_minutes, domain)
        return beat()

    return in_time


def _heartbeat(runtime: RuntimeHttpClient) -> Callable[[], bool]:
    last = time.monotonic()

    def beat() -> bool:
        nonlocal last
        if time.monotonic() - last < HEARTBEAT_SECONDS:
            return True
        last = time.monotonic()
        try:
            return bool(runtime.SendTaskHeartbeat(SendTaskHeartbeatRequest()).success)
        except httpx.TransportError:
            return True

    return beat


def _runtime(address: str, interceptor: ProtobufClientInterceptor) -> RuntimeHttpClient:
    return RuntimeHttpClient.from_server_address(
        server_address=address,
        insecure=True,  # the loopback of this machine
        root_certificates=None,
        interceptors=[RuntimeVersionHttpInterceptor(component_name="fedmerge"), interceptor],
        retry_invoker=make_simple_http_retry_invoker(),
    )


def _domain(folder: Path) -> str:
    try:
        return read_client(folder).domain.name
    except FedMergeError:  # the reply reports an error already
        return ""


def _leave(number: int, _: Any) -> None:
    raise SystemExit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]).read_bytes())
