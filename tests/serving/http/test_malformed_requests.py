"""A thousand malformed requests get a 4xx each, never a 500, and the lists stay right."""

import http.client
import json
import socket
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from http_calls import answering, ask, listed, same_list, service_of
from malformed_requests import malformed_requests
from run_folders import Place, make_place, make_run

from fedmerge.serving.http.service import Service
from fedmerge.serving.recommender import recommend


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def run(place: Place) -> Path:
    return make_run(place, "trial", ["merge.methods=average", f"cache_dir={place.root / 'cache'}"])


@pytest.fixture
def service(place: Place, run: Path, tmp_path: Path) -> Service:
    return service_of(place, run, tmp_path / "items.jsonl")


def test_a_thousand_malformed_requests_never_give_a_500(service: Service) -> None:
    recommender = service.shelf.recommender
    known = recommender.catalog.item_ids[2]
    wanted = [(item.item_id, item.score) for item in recommend(recommender, [known])]
    with answering(service, page=True) as address:
        connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
        for request in malformed_requests(1000, known):
            headers = {"Content-Type": "application/json", **request.headers}
            try:
                connection.request(request.method, request.path, request.body, headers)
                answer = connection.getresponse()
                body = answer.read()
            except (BrokenPipeError, ConnectionResetError):  # the server has closed before the whole body was sent
                assert request.kind == "_too_large"
                connection.close()
                continue
            assert 400 <= answer.status < 500, (request, answer.status, body)
            if request.method != "FROB":  # no method of HTTP, which uvicorn refuses itself
                assert isinstance(json.loads(body)["error"], str), (request, body)
        assert same_list(listed(ask(address, "/recommend", {"history": [known]})[1]), wanted)
        assert ask(address, "/health", None, "GET")[1]["changed"] == 0


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET\r\n\r\n",
        b"POST /recommend HTTP/1.1\r\nContent-Length: many\r\n\r\n{}",
        b"POST /recommend HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST /recommend HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{}",  # the rest never comes
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 200_000 + b"\r\n\r\n",
    ],
    ids=["TLS", "no version", "length", "chunk", "half a body", "long header"],
)
def test_what_is_no_http_ends_the_connection_alone(service: Service, data: bytes) -> None:
    with answering(service) as address:
        parts = urlsplit(address)
        with socket.create_connection((parts.hostname, parts.port), timeout=5) as raw:
            raw.sendall(data)
            raw.shutdown(socket.SHUT_WR)
            answer = b""
            while part := raw.recv(65536):
                answer += part
        assert not answer or answer.startswith(b"HTTP/1.1 4"), answer
        assert ask(address, "/health", None, "GET")[0] == 200
        status, _ = ask(address, "/recommend", {"history": [service.shelf.catalog.item_ids[0]]})
        assert status == 200
