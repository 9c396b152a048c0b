"""The proxy under strangers: a real nginx with the configuration of fedmerge deploy, and many keyless requests."""

import http.client
import shutil
import ssl
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from deploy_hosts import free_port, has_nginx

from fedmerge.deploy.folder import Deployment, create_deployment
from fedmerge.deploy.texts import LOG_FILE, LONGEST_PATH
from sim.machines.superlink import FORMER_LOGS, _nginx, _proxy, rotate_log

REQUESTS = 500

needs_nginx = pytest.mark.skipif(not has_nginx(), reason="nginx is not installed: apt-get install nginx")


@pytest.fixture
def proxied(tmp_path: Path) -> Iterator[Deployment]:
    """A deployment whose proxy runs, without a SuperLink behind it."""
    made = create_deployment(tmp_path / "operator", "prod", ["localhost"], free_port(), free_port())
    with _proxy(_nginx(made), made, {}):
        for _ in range(100):
            with suppress(OSError):
                request(made, "/")
                break
            time.sleep(0.05)
        yield made


def connection(deployment: Deployment) -> http.client.HTTPSConnection:
    context = ssl.create_default_context(cafile=str(deployment.authority))
    return http.client.HTTPSConnection("localhost", deployment.port, context=context, timeout=20)


def request(deployment: Deployment, path: str, body: bytes = b"") -> int:
    opened = connection(deployment)
    try:
        opened.request("POST", path, body=body)
        return opened.getresponse().status
    finally:
        opened.close()


def log(deployment: Deployment) -> Path:
    return deployment.state / "nginx" / LOG_FILE


def logged(deployment: Deployment, least: str = "") -> str:
    """The log once it holds ``least``: nginx writes a line after its answer, and a worker reopens a moved file late."""
    for _ in range(200):
        text = log(deployment).read_text() if log(deployment).exists() else ""
        if text and least in text:
            return text
        time.sleep(0.05)
    raise AssertionError(f"{log(deployment)} never held {least!r}")


@needs_nginx
@pytest.mark.parametrize("path", ["/scan/", "/v1/control/list-runs/", "/v1/fleet/%2e%2e/"])
def test_keyless_requests_are_limited_and_fill_no_disk(proxied: Deployment, path: str) -> None:
    """500 requests with paths of 3,500 characters, as fast as they go, wrote 1.8 MB, and paths of 7,500 3.8 MB."""
    opened = connection(proxied)
    statuses: Counter[int] = Counter()
    for number in range(REQUESTS):
        opened.request("POST", f"{path}{number}" + "x" * 3500, body=b"")
        answer = opened.getresponse()
        answer.read()
        statuses[answer.status] += 1
        if answer.getheader("Connection") == "close":
            opened.close()
    assert set(statuses) <= {403, 404, 429}
    assert statuses[429] > REQUESTS / 2
    text = logged(proxied)
    assert len(text) < REQUESTS * 100
    lines = text.splitlines()
    assert len(lines) < REQUESTS / 2
    assert max(map(len, lines)) < LONGEST_PATH + 120
    assert " 429 " not in text


@needs_nginx
def test_longer_request_lines_and_bodies_are_refused_before_they_are_read(proxied: Deployment) -> None:
    assert request(proxied, "/" + "x" * 7500) == 414
    assert request(proxied, "/other", b"x" * 5000) == 413
    assert max(map(len, logged(proxied, " 413 ").splitlines())) < LONGEST_PATH + 120


@needs_nginx
def test_clients_requests_are_delayed_at_most(proxied: Deployment) -> None:
    """Requests to Fleet are never refused for their number; here they meet no SuperLink (502)."""
    opened = connection(proxied)
    statuses: Counter[int] = Counter()
    for _ in range(REQUESTS):
        opened.request("POST", "/v1/fleet/pull-messages", body=b"")
        answer = opened.getresponse()
        answer.read()
        statuses[answer.status] += 1
        if answer.getheader("Connection") == "close":
            opened.close()
    assert statuses == {502: REQUESTS}
    assert log(proxied).stat().st_size < REQUESTS * 150


@needs_nginx
def test_control_says_no_to_a_stranger_and_nothing_else_exists(proxied: Deployment) -> None:
    refused = {"/v1/control/list-runs": 403, "/refused-403": 403, "/v1/runtime/x": 404, "/refused-404": 404}
    assert {path: request(proxied, path) for path in refused} == refused
    assert request(proxied, "/v1/fleet/" + "a" * 65) == 404


def test_a_large_log_is_rotated_and_the_oldest_dropped(tmp_path: Path) -> None:
    path = tmp_path / LOG_FILE
    assert not rotate_log(path)
    for number in range(FORMER_LOGS + 2):
        path.write_text(f"{number}" * 11)
        assert rotate_log(path, largest_bytes=10)
        assert not path.exists()
    path.write_text("small")
    assert not rotate_log(path, largest_bytes=10)
    former = [(tmp_path / f"{LOG_FILE}.{number}").read_text()[0] for number in range(1, FORMER_LOGS + 1)]
    assert former == [str(FORMER_LOGS + 1 - number) for number in range(FORMER_LOGS)]
    assert len(list(tmp_path.iterdir())) == FORMER_LOGS + 1


@needs_nginx
def test_nginx_writes_on_in_a_new_file_after_rotation(proxied: Deployment) -> None:
    request(proxied, "/before")
    logged(proxied, "/before")
    assert rotate_log(log(proxied), largest_bytes=1)
    pid = int((proxied.state / "nginx" / "nginx.pid").read_text())
    subprocess.run([shutil.which("kill") or "kill", "-USR1", str(pid)], check=True)
    for _ in range(200):  # until the worker, too, writes to the new file
        request(proxied, "/after")
        if log(proxied).exists() and "/after" in log(proxied).read_text():
            break
        time.sleep(0.05)
    assert "/after" in logged(proxied, "/after")
    assert "/before" in log(proxied).with_name(f"{LOG_FILE}.1").read_text()
