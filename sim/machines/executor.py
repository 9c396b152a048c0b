"""Executor of a SuperNode that replaces Flower's own and never runs code that arrives with a run.

Flower's executor unpacks the app and imports it. This one compares the app with the installed and approved code
(``fedmerge.organisation.app``) and then answers with the installed ``sim.app.client.app``, in a separate process for
each message. Settings of client.toml replace those of the run configuration that concern this machine.

    python -P -m sim.machines.executor CLIENT_FOLDER RUNTIME_ADDRESS SECRET_FILE

``fedmerge client start`` starts it, and it ends with that process.
"""

import ctypes
import logging
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import httpx
from flwr.app import Context, Error, Message, RecordDict

import fedmerge
from fedmerge.errors import FedMergeError, PolicyError
from fedmerge.organisation.app import check_app, installed_code
from fedmerge.organisation.folder import KEY, Client, approved_apps, read_client
from fedmerge.privacy.client_policy import read_client_policy, too_slow_error
from fedmerge.privacy.paths import without_paths
from sim.app.client.app import app as client_app
from sim.app.client.replies import log_to_stderr
from sim.app.messages import records
from sim.flower_internals import (
    AcquireTaskRequest,
    ErrorCode,
    Fab,
    ProtobufClientInterceptor,
    ProtoRecordDict,
    RuntimeHttpClient,
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SendTaskHeartbeatRequest,
    SubStatus,
    SuperExecAuthHttpInterceptor,
    TaskType,
    make_simple_http_retry_invoker,
    pull_task_input,
    push_message,
    push_task_output,
    recorddict_from_proto,
    recorddict_to_proto,
)

POLL_SECONDS = 0.2
HEARTBEAT_SECONDS = 10.0  # Flower gives a message up after 60
PR_SET_PDEATHSIG = 1

logger = logging.getLogger("fedmerge.client")


def main(folder: Path, address: str, secret: bytes) -> None:
    """Answer messages from the SuperNode, one after the other, until the SuperNode or the parent ends."""
    end_with_parent(signal.SIGTERM)
    signal.signal(signal.SIGTERM, _leave)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash writes no memory, with its secrets, to the disk
    code = installed_code(Path(__file__).parents[1])  # now: an upgrade changes the files, not what is loaded
    log_to_stderr()
    logger.info("ready; answers with fedmerge %s from %s", fedmerge.__version__, Path(fedmerge.__file__).parent)
    auth = SuperExecAuthHttpInterceptor(
        master_secret=secret, protected_methods=frozenset({"/flwr.proto.Runtime/AcquireTask"})
    )
    # Take tasks of Flower's agents as well and refuse them, since no other process would answer them.
    request = AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP, TaskType.AGENT_APP])
    with _runtime(address, auth) as runtime:
        while True:
            found = runtime.AcquireTask(request)
            if found.HasField("task") and found.token:
                with _runtime(address, RuntimeTokenHttpInterceptor(found.token)) as of_task:
                    _work(of_task, folder, code, found.task.type == TaskType.CLIENT_APP)
            time.sleep(POLL_SECONDS)


def _work(runtime: RuntimeHttpClient, folder: Path, code: Mapping[str, str], is_client_app: bool) -> None:
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
        content, context.state = in_own_process(lambda: _answer(message, context), in_time)
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


def _answer(message: Message, context: Context) -> tuple[RecordDict, RecordDict]:
    """Return the reply, and the state that the client app needs for the run's next message: secrets of a secure sum."""
    reply = client_app(message, context)
    return reply.content, context.state


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


def in_own_process(
    work: Callable[[], tuple[RecordDict, RecordDict]], while_waiting: Callable[[], bool]
) -> tuple[RecordDict, RecordDict]:
    """Do ``work`` in a forked process that ends afterwards, and return its result.

    Args:
        work: returns the result; changes that it makes in memory are lost.
        while_waiting: called repeatedly; the work is ended if it returns False or raises.

    Raises:
        ChildProcessError: the process died, was ended, or raised.
    """
    # In memory and not in a temporary file: the state holds the secrets of a secure sum.
    with os.fdopen(os.memfd_create("fedmerge-answer"), "w+b") as answer:
        parent = os.getpid()
        child = os.fork()
        if child == 0:
            _answer_and_exit(work, answer, parent)
        try:
            while not (done := os.waitpid(child, os.WNOHANG))[0]:
                if not while_waiting():
                    raise ChildProcessError("the run was stopped before this client had answered")
                time.sleep(POLL_SECONDS / 2)
        except BaseException:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise
        if done[1] != 0:
            code = os.waitstatus_to_exitcode(done[1])
            how = f"was killed by signal {-code}; out of memory?" if code < 0 else f"ended with exit code {code}"
            raise ChildProcessError(f"the process that prepared the answer {how}")
        answer.seek(0)
        first = answer.read(int.from_bytes(answer.read(8)))
        content, state = (recorddict_from_proto(ProtoRecordDict.FromString(data)) for data in (first, answer.read()))
        return content, state


def _answer_and_exit(work: Callable[[], tuple[RecordDict, RecordDict]], answer: IO[bytes], parent: int) -> None:
    code = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        end_with_parent(signal.SIGKILL)
        if os.getppid() == parent:
            content, state = (recorddict_to_proto(part).SerializeToString() for part in work())
            answer.write(len(content).to_bytes(8) + content + state)
            answer.flush()
            code = 0
    except BaseException:
        logger.exception("the process that prepares the answer failed")
    finally:
        logging.shutdown()
        os._exit(code)  # no cleanup code of the parent may run here


def end_with_parent(number: signal.Signals) -> None:
    """Make Linux send this process a signal when its parent dies, however it dies."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number))


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
