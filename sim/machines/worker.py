"""The process that prepares a client's answers, apart from the one that talks with Flower.

Most messages get a process of their own, which ends with its answer. Messages that come by the hundred share one, so
that it loads backbone and domain once. Requests and answers pass through a pair of sockets without a name: no file
holds them, and no other process can reach the worker.
"""

import ctypes
import logging
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Hashable
from typing import NoReturn

POLL_SECONDS = 0.1
PR_SET_PDEATHSIG = 1

logger = logging.getLogger("fedmerge.client")

Answer = Callable[[bytes], bytes]
WhileWaiting = Callable[[], bool]


class Workers:
    """At most one process at a time; it stays only for requests of the same owner, as long as these keep coming."""

    def __init__(self, answer: Answer) -> None:
        """Take the function that answers a request in the process that stays."""
        self._answer = answer
        self._worker: _Worker | None = None
        self._owner: Hashable = None
        self._used = 0.0

    def once(self, work: Callable[[], bytes], while_waiting: WhileWaiting) -> bytes:
        """Return the result of work in a process of its own, which ends with it.

        Args:
            work: changes that it makes in memory are lost.
            while_waiting: called repeatedly; the process is ended if it returns False or raises.

        Raises:
            ChildProcessError: the process died, was ended, or the work raised.
        """
        self.close()  # the new process would inherit its socket, and add to its memory
        worker = _Worker(lambda request: work())
        try:
            return worker.ask(b"", while_waiting)
        finally:
            worker.end()

    def ask(self, request: bytes, owner: Hashable, while_waiting: WhileWaiting) -> bytes:
        """Return the answer to a request from a process that stays for further requests of an equal owner.

        Raises:
            ChildProcessError: as :meth:`once`; the next request gets another process.
        """
        if self._worker is None or owner != self._owner or self._worker.has_ended():
            self.close()
            self._worker, self._owner = _Worker(self._answer), owner
        try:
            answer = self._worker.ask(request, while_waiting)
        except BaseException:
            self.close()
            raise
        self._used = time.monotonic()
        return answer

    def close_idle(self, seconds: float) -> None:
        """End the process if its last answer is older than this."""
        if self._worker is not None and time.monotonic() - self._used > seconds:
            self.close()

    def close(self) -> None:
        """End the process, if there is one."""
        if self._worker is not None:
            self._worker.end()
        self._worker, self._owner = None, None


class _Worker:
    """A forked process that answers one request after the other."""

    def __init__(self, answer: Answer) -> None:
        self._socket, other = socket.socketpair()
        parent = os.getpid()
        self._status: int | None = None
        self._process = os.fork()
        if self._process == 0:
            self._socket.close()
            _serve(answer, other, parent)
        other.close()

    def ask(self, request: bytes, while_waiting: WhileWaiting) -> bytes:
        try:
            _send(self._socket, request)
            while True:
                if not while_waiting():
                    raise ChildProcessError("the run was stopped before this client had answered")
                if select.select([self._socket], [], [], POLL_SECONDS)[0]:
                    break
                if self.has_ended():  # a process that it started may still hold the socket
                    raise EOFError
            return _receive(self._socket)
        except (EOFError, ConnectionError) as error:
            code = self.end()
            how = f"was killed by signal {-code}; out of memory?" if code < 0 else f"ended with exit code {code}"
            raise ChildProcessError(f"the process that prepared the answer {how}") from error

    def has_ended(self) -> bool:
        if self._status is None:
            process, status = os.waitpid(self._process, os.WNOHANG)
            self._status = status if process else None
        return self._status is not None

    def end(self) -> int:
        """End the process, if it has not ended; return its exit code, or -N after signal N."""
        self._socket.close()  # a worker that waits for a request ends by itself
        if not self.has_ended():  # one that is just ending keeps its exit code
            os.kill(self._process, signal.SIGKILL)
            self._status = os.waitpid(self._process, 0)[1]
        return os.waitstatus_to_exitcode(self._status or 0)


def end_with_parent(number: signal.Signals) -> None:
    """Make Linux send this process a signal when its parent dies, however it dies."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number))


def _serve(answer: Answer, requests: socket.socket, parent: int) -> NoReturn:
    code = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        end_with_parent(signal.SIGKILL)
        while os.getppid() == parent:
            _send(requests, answer(_receive(requests)))
        code = 0
    except EOFError:  # no more requests
        code = 0
    except BaseException:
        logger.exception("the process that prepares the answer failed")
    finally:
        logging.shutdown()
        os._exit(code)  # no cleanup code of the parent may run here


def _send(to: socket.socket, content: bytes) -> None:
    to.sendall(len(content).to_bytes(8))
    to.sendall(content)


def _receive(source: socket.socket) -> bytes:
    return bytes(_exactly(source, int.from_bytes(_exactly(source, 8))))


def _exactly(source: socket.socket, size: int) -> bytearray:
    content, done = bytearray(size), 0
    view = memoryview(content)
    while done < size:
        number = source.recv_into(view[done:])
        if number == 0:
            raise EOFError("the other process has ended")
        done += number
    return content
