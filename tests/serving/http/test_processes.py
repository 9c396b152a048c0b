"""`fedmerge serve` as a process under load: killed, swapped, changed, ended, given malformed requests."""

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from http_calls import Load, ask, listed, right_lists, same_list, send, shelf_of
from malformed_requests import malformed_requests
from run_folders import Place, make_place, make_run

pytestmark = pytest.mark.e2e

REPOSITORY = Path(__file__).resolve().parents[3]
TITLES = ["backbone", "expert", "merge: average"]
KITE = {"items": [{"item_id": "kite", "attributes": {"title": "a blue kite"}}]}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = make_place(tmp_path_factory.mktemp("place"))
    for name in ("first", "second"):
        make_run(place, name, ["merge.methods=average", f"cache_dir={place.root / 'cache'}"])
    return place


@contextlib.contextmanager
def process(place: Place, *arguments: str | Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Yield a server and its address; it is killed at the end if it still runs."""
    command = [sys.executable, "-m", "fedmerge.cli", "serve", place.runs / "first", "--domain", place.domains / "toys"]
    started = subprocess.Popen(
        [*map(str, command), *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=place.root,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    try:
        assert started.stdout is not None
        address = next(line.split()[0] for line in started.stdout if line.startswith("http://"))
        yield started, address
    finally:
        started.kill()
        started.wait()


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def right(place: Place, runs: Sequence[str]) -> dict[str, dict[tuple[str, ...], list[tuple[str, float]]]]:
    return {run: right_lists(shelf_of(place, place.runs / run, popularity=False)) for run in runs}


def test_only_requests_in_a_killed_process_are_lost_and_no_answer_is_wrong(place: Place) -> None:
    port = ("--port", free_port())
    wanted = right(place, ("first", "second"))
    with process(place, *port) as (first, address), Load(address, wanted) as load:
        load.wait_for("first", 50)
        spoiler = threading.Thread(target=send_malformed, args=(address, 1000))
        spoiler.start()
        assert ask(address, "/swap", {"model": str(place.runs / "second")})[0] == 200
        load.wait_for("second", 50)
        spoiler.join()
        assert (load.lost, load.wrong) == ([], [])
        first.send_signal(signal.SIGKILL)
        first.wait()
        with process(place, *port):
            load.wait_for("first", 50)
            lost = len(load.lost)
            load.wait_for("first", 50)
            assert len(load.lost) == lost  # none since it answers again
            assert lost
    assert load.wrong == []


def test_an_item_is_there_after_a_kill_as_soon_as_its_change_was_answered(place: Place) -> None:
    with process(place, "--port", "0") as (server, address):
        assert ask(address, "/items", KITE, "PUT")[0] == 200
        server.send_signal(signal.SIGKILL)
    with process(place, "--port", "0") as (server, address):
        found = ask(address, "/recommend", {"history": [{"title": "a blue kite"}], "k": 1})[1]
        assert same_list(listed(found), [("kite", 1.0)])
    next((place.root / "cache" / "serving").glob("toys-*")).unlink()


def test_a_server_that_is_ended_answers_what_is_in_progress(place: Place) -> None:
    with process(place, "--port", "0") as (server, address):
        asked = [http.client.HTTPConnection(urlsplit(address).netloc, timeout=30) for _ in range(20)]
        for connection in asked:
            connection.request(
                "POST", "/recommend", b'{"history": ["toys-i00003"]}', {"Content-Type": "application/json"}
            )
        answers = [asked[0].getresponse().status]
        server.send_signal(signal.SIGTERM)
        for connection in asked[1:]:
            with contextlib.suppress(ConnectionResetError, http.client.RemoteDisconnected):  # not accepted yet
                answers.append(connection.getresponse().status)
        assert set(answers) == {200}
        assert server.wait(20) == -signal.SIGTERM


def test_addresses_and_keys(place: Place, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret\n")
    (tmp_path / "stock").write_text("toys-i00001\ntoys-i00002\n")
    stock = ("--in-stock", tmp_path / "stock", "--count-popularity")
    with process(place, "--port", "0", "--api-key-file", tmp_path / "key", *stock) as (server, address):
        body = {"history": ["toys-i00003"], "popularity": 0.2}
        assert ask(address, "/recommend", body)[0] == 401
        status, found = ask(address, "/recommend", body, Authorization="Bearer secret")
        assert (status, {item for item, _ in listed(found)}) == (200, {"toys-i00001", "toys-i00002"})
        taken = ("--port", str(urlsplit(address).port))
        again = subprocess.run(
            [
                sys.executable,
                "-m",
                "fedmerge.cli",
                "serve",
                place.runs / "first",
                "--domain",
                place.domains / "toys",
                *taken,
            ],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            check=False,
        )
        assert again.returncode == 1
        assert again.stderr.splitlines()[-1].startswith(f"fedmerge: serve: cannot bind 127.0.0.1:{taken[1]}")
        assert server.poll() is None


def test_with_the_page_all_models_answer_and_a_swap_brings_those_of_the_other_run(place: Place) -> None:
    with process(place, "--port", "0", "--page") as (_, address):
        assert send(address, "GET", "/")[0] == 200
        for run in ("first", "second"):
            about = ask(address, "/page", None, "GET")[1]
            assert (about["run"], [model["title"] for model in about["models"]]) == (run, TITLES)
            status, found = ask(address, "/compare", {"history": ["toys-i00003"], "k": 3})
            assert (status, [len(each["recommendations"]) for each in found["lists"]]) == (200, [3, 3, 3])
            assert [absent["title"] for absent in about["absent"]] == ["head"]
            assert ask(address, "/swap", {"model": str(place.runs / "second")})[0] == 200


def send_malformed(address: str, number: int) -> None:
    for request in malformed_requests(number, "toys-i00001"):
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            status, _ = send(address, request.method, request.path, request.body, request.headers)
            assert 400 <= status < 500, request
