"""Work in separate processes: one for each request, or one that stays as long as its owner asks."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from fedmerge.errors import PolicyError
from sim.machines.executor import limit_time
from sim.machines.worker import Answer, WhileWaiting, Workers

COUNTED = {"requests": 0}


def count(request: bytes) -> bytes:
    """Return the request, the number of requests that this process has answered, and its id."""
    COUNTED["requests"] += 1
    return b"%s %d %d" % (request, COUNTED["requests"], os.getpid())


def waiting() -> bool:
    return True


def hangs(request: bytes) -> bytes:
    time.sleep(60)
    return request


def wait_for_the_end_of(process: int) -> None:
    deadline = time.monotonic() + 60
    with suppress(FileNotFoundError, ProcessLookupError):
        while " Z " not in Path(f"/proc/{process}/stat").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.02)


def children() -> set[str]:
    """Return the numbers of this process's children, ended ones included."""
    return {number for task in Path("/proc/self/task").iterdir() for number in (task / "children").read_text().split()}


@pytest.fixture
def workers() -> Iterator[Workers]:
    before, made = children(), Workers(count)
    yield made
    made.close()
    assert children() <= before  # no child is left behind


def ask(answer: Answer, request: bytes = b"", while_waiting: WhileWaiting = waiting) -> bytes:
    made = Workers(answer)
    try:
        return made.once(lambda: answer(request), while_waiting)
    finally:
        made.close()


def test_work_has_a_process_of_its_own(workers: Workers) -> None:
    content = b"x" * 3_000_000  # more than a socket holds
    first, second = (workers.once(lambda: count(content), waiting).split() for _ in range(2))
    assert first[:2] == second[:2] == [content, b"1"]
    assert len({first[2], second[2], b"%d" % os.getpid()}) == 3
    assert COUNTED == {"requests": 0}


def test_a_process_stays_for_its_owner_alone(workers: Workers) -> None:
    content = b"x" * 3_000_000

    def asked(owner: str) -> tuple[int, int]:
        same, number, process = workers.ask(content, owner, waiting).split()
        assert same == content
        return int(number), int(process)

    (one, first), (two, again) = asked("run 1"), asked("run 1")
    assert (one, two, first) == (1, 2, again)
    number, other = asked("run 2")
    assert (number, other != first) == (1, True)
    workers.once(lambda: b"", waiting)
    assert asked("run 2")[0] == 1  # it ended before the other work
    workers.close_idle(30.0)
    assert asked("run 2")[0] == 2
    workers.close_idle(0.0)
    assert asked("run 2")[0] == 1


def test_a_process_that_died_between_requests_is_replaced(workers: Workers) -> None:
    _, _, process = workers.ask(b"r", "run", waiting).split()
    os.kill(int(process), signal.SIGKILL)
    wait_for_the_end_of(int(process))
    assert workers.ask(b"r", "run", waiting).split()[1] == b"1"


def test_a_process_ends_with_the_one_that_started_it() -> None:
    reader, writer = os.pipe()
    middle = os.fork()
    if middle == 0:
        os.write(writer, Workers(count).ask(b"r", "run", waiting).split()[2])
        os._exit(0)
    os.waitpid(middle, 0)
    process = int(os.read(reader, 20))
    os.close(reader)
    os.close(writer)
    wait_for_the_end_of(process)


def open_files(process: int | str = "self") -> set[str]:
    """Return what a process has open, as Linux names it; pipes of other tests in this process come and go."""
    found = set()
    for link in Path(f"/proc/{process}/fd").iterdir():
        with suppress(OSError):  # the descriptor that lists the folder is gone
            found.add(os.readlink(link))
    return {link for link in found if not link.startswith("pipe:")}


def test_the_secrets_of_a_secure_sum_are_in_no_file() -> None:
    """A deleted temporary file still has its blocks on the disk; what passes between the processes is in memory."""
    before, parents = open_files(), set()

    def work(request: bytes) -> bytes:
        return request + "\n".join(sorted(open_files() - before)).encode()

    def look() -> bool:
        parents.update(open_files() - before)
        return True

    secret = os.urandom(32)
    answer = ask(work, secret, look)
    assert answer[:32] == secret
    for found in (parents, set(answer[32:].decode().split("\n"))):
        opened = {link.partition(":")[0] for link in found if not link.startswith(("/proc/", "/dev/"))}
        assert opened <= {"socket"}
    assert open_files() == before


def killed(request: bytes) -> bytes:
    os.kill(os.getpid(), signal.SIGKILL)
    return request


def raises(request: bytes) -> bytes:
    raise SystemExit(5)


def test_a_process_that_dies_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ChildProcessError, match="signal 9"):
        ask(killed)
    monkeypatch.setattr(sys, "stderr", open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    with pytest.raises(ChildProcessError, match="exit code 1"):
        ask(raises)


def test_a_run_that_is_stopped_ends_the_work_at_once() -> None:
    before, started = children(), time.monotonic()
    seen: list[int] = []

    def three_times() -> bool:
        seen.append(1)
        return len(seen) < 3

    with pytest.raises(ChildProcessError, match="was stopped"):
        ask(hangs, while_waiting=three_times)
    assert time.monotonic() - started < 20
    assert children() <= before  # no child is left behind


def test_work_ends_when_the_organisations_minutes_are_over() -> None:
    before, started, beats = children(), time.monotonic(), []

    def beat() -> bool:
        beats.append(1)
        return True

    with pytest.raises(PolicyError, match=r"north.*max_minutes = 0\.01.*train\.max_steps"):
        ask(hangs, while_waiting=limit_time(0.01, "north", beat))
    assert 0.6 <= time.monotonic() - started < 20
    assert beats
    assert children() <= before  # no child is left behind
    assert limit_time(None, "north", beat)()
    assert not limit_time(1.0, "north", lambda: False)()


def test_a_process_that_is_gone_is_noticed_though_one_that_it_started_lives() -> None:
    def leaves_a_child(request: bytes) -> bytes:
        if os.fork() == 0:
            time.sleep(5)
            os._exit(0)
        os._exit(3)

    with pytest.raises(ChildProcessError, match="exit code 3"):
        ask(leaves_a_child)
