"""`fedmerge client check`: each check against a fault, with a small TLS server in place of the SuperLink."""

import dataclasses
import re
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from time import time
from unittest.mock import ANY

import pytest
from loopback import bundle, certificates, free_port, write_identity

from fedmerge.domain.demo import write_demo
from fedmerge.errors import BackboneError
from fedmerge.organisation import checks
from fedmerge.organisation.checks import Check, check_client
from fedmerge.organisation.folder import Bundle, Client, approve_app, init_client, read_bundle, read_client

APP = "ab" * 32
HERE = ["key", "domain", "policy", "secure sums", "backbone", "disk", "privacy budget", "app"]
WHAT = [*HERE, "address", "certificate", "clock", "registered"]


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    certificates(folder)
    return folder


@pytest.fixture
def client(tmp_path: Path) -> Client:
    write_demo(tmp_path / "domains", num_domains=2, num_users=10, num_items=20)
    init_client(tmp_path / "north", "north", tmp_path / "domains" / "beauty")
    approve_app(tmp_path / "north", APP, "by hand")
    return read_client(tmp_path / "north")


@contextmanager
def server(tls: Path, seconds_ahead: float = 0.0) -> Iterator[int]:
    """A TLS server whose clock may be wrong; yields its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response_only(404)  # as a proxy that lets nothing else through
            self.send_header("Date", formatdate(time() + seconds_ahead, usegmt=True))
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    listening = HTTPServer(("0.0.0.0", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tls / "server.pem", tls / "server.key")
    listening.socket = context.wrap_socket(listening.socket, server_side=True)
    thread = threading.Thread(target=listening.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield listening.server_address[1]
    finally:
        listening.shutdown()
        listening.server_close()


def found(
    client: Client,
    given: Bundle | None,
    backbone: Callable[[], str] = lambda: "tiny",
    registered: Callable[[Bundle], str] = lambda _: "",
) -> dict[str, Check]:
    return {check.what: check for check in check_client(client, given, backbone, registered)}


def test_a_client_that_is_ready_passes_every_check(client: Client, tls: Path, tmp_path: Path) -> None:
    with server(tls) as port:
        given = read_bundle(bundle(tmp_path / "b", tls / "ca.crt", f"localhost:{port}", APP))
        result = found(client, given)
    assert list(result) == WHAT
    assert [check for check in result.values() if not check.holds] == []
    assert result["domain"].found.startswith("beauty: 10 users, 20 items; ")
    assert "min_users = 20" in result["policy"].found
    assert result["app"].found.startswith("1 approved, ")
    assert given.authority_sha256 in result["certificate"].found


def test_without_a_bundle_the_server_is_left_out(client: Client) -> None:
    result = found(client, None)
    assert [check.what for check in result.values() if check.holds] == HERE
    assert result["server"] == Check("server", None, ANY)
    assert "--bundle" in result["server"].found


def test_what_is_wrong_on_this_machine_is_named(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    (client.folder / "key").chmod(0o644)
    (client.folder / "approved.txt").unlink()
    (client.domain / "interactions.parquet").write_bytes(b"damaged")
    client.policy.write_text("min_users = 0")
    monkeypatch.setattr(checks, "FREE_BYTES", 2**60)

    def backbone() -> str:
        raise BackboneError("backbone here: not to be had")

    result = found(client, None, backbone)
    for what, message in {
        "key": f"chmod 600 {client.folder / 'key'}",
        "domain": "interactions.parquet",
        "policy": "min_users",
        "backbone": "backbone here",
        "disk": "cache_dir",
        "app": f"fedmerge client approve {client.folder}",
    }.items():
        assert result[what].holds is False
        assert message in result[what].found


def test_secure_sums_need_keys_of_the_others(client: Client, tmp_path: Path) -> None:
    def told(wanted: Client = client) -> tuple[bool | None, str]:
        check = found(wanted, None)["secure sums"]
        return check.holds, check.found

    assert told()[0]  # policy.toml does not allow secure sums
    text = client.policy.read_text().replace('"adapter+catalog,adapter"', '"aggregate-only"')
    client.policy.write_text(text)
    assert told() == (False, ANY)
    assert re.search("require_peer_keys = true.*identity_key and peer_keys.*ssh-keygen", told()[1])
    client.policy.write_text(text.replace("require_peer_keys = true", "require_peer_keys = false"))
    assert told() == (True, ANY)
    assert "require_peer_keys = false" in told()[1]

    client.policy.write_text(text)
    peers = tmp_path / "peers"
    peers.mkdir()
    for name in ("beauty", "books", "coffee"):
        write_identity(tmp_path / name, peers / f"{name}.pub")
    signing = dataclasses.replace(client, identity_key=tmp_path / "beauty", peer_keys=peers)
    assert told(signing) == (True, ANY)
    assert "books, coffee" in told(signing)[1]
    (peers / "coffee.pub").unlink()
    assert told(signing) == (False, ANY)
    assert "1 other" in told(signing)[1]
    (peers / "books.pub").rename(peers / "beauty.pub")  # another client's key
    assert told(signing) == (False, ANY)
    assert f"{peers / 'beauty.pub'} is missing or not" in told(signing)[1]


def test_a_cache_that_cannot_be_written_is_named(client: Client, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = found(dataclasses.replace(client, cache_dir=tmp_path / "file" / "cache"), None)
    assert result["disk"] == Check("disk", False, ANY)
    assert re.search(r"file/cache: .*\(Not a directory\).*cache_dir", result["disk"].found)


def test_the_check_says_what_the_cache_holds(client: Client) -> None:
    assert found(client, None)["disk"].found.endswith("which holds 0 experts and 0 heads; heads never leave")
    for folder in ("experts/books-1", "heads/books-1", "heads/books-2"):
        (client.cache_dir / folder).mkdir(parents=True)
    (client.cache_dir / "heads" / "books-3.checkpoint").touch()
    assert "holds 1 experts and 2 heads" in found(client, None)["disk"].found


def test_another_app_than_the_operators_is_named(client: Client, tls: Path, tmp_path: Path) -> None:
    given = read_bundle(bundle(tmp_path / "b", tls / "ca.crt", f"127.0.0.1:{free_port()}", "0" * 64))
    result = found(client, given)
    assert "0" * 64 in result["app"].found
    assert given.address in result["address"].found
    assert (result["app"].holds, result["address"].holds) == (False, False)
    assert [result[what].holds for what in WHAT[9:]] == [None, None, None]


def test_a_wrong_certificate_is_named(client: Client, tls: Path, tmp_path: Path) -> None:
    certificates(tmp_path / "other", days=5)
    with server(tls) as port:
        stranger = bundle(tmp_path / "stranger", tmp_path / "other" / "ca.crt", f"127.0.0.1:{port}")
        result = found(client, read_bundle(stranger))["certificate"]
        assert result.holds is False
        assert f"127.0.0.1:{port}" in result.found
        assert str(tmp_path / "stranger" / "ca.crt") in result.found
        other_host = bundle(tmp_path / "other host", tls / "ca.crt", f"127.0.0.2:{port}")
        result = found(client, read_bundle(other_host))["certificate"]
        assert result.holds is False
        assert "(IP address mismatch" in result.found
    with server(tmp_path / "other") as port:
        soon = bundle(tmp_path / "soon", tmp_path / "other" / "ca.crt", f"127.0.0.1:{port}")
        result = found(client, read_bundle(soon))["certificate"]
        assert result.holds is False
        assert re.search(r"127\.0\.0\.1:\d+: .* \d{4}-\d\d-\d\d", result.found)


@pytest.mark.parametrize(("seconds", "word"), [(-30.0, "+30"), (-4000.0, "+4000"), (4000.0, "-4000")])
def test_a_wrong_clock_is_named(client: Client, tls: Path, tmp_path: Path, seconds: float, word: str) -> None:
    with server(tls, seconds) as port:
        result = found(client, read_bundle(bundle(tmp_path / "b", tls / "ca.crt", f"127.0.0.1:{port}")))
    assert result["clock"].holds is False
    assert re.search(rf" \{word[0]}\d+ s ", result["clock"].found)
    assert result["registered"].holds


def test_a_clock_that_is_a_little_late_is_good_enough(client: Client, tls: Path, tmp_path: Path) -> None:
    with server(tls, 60.0) as port:
        result = found(client, read_bundle(bundle(tmp_path / "b", tls / "ca.crt", f"127.0.0.1:{port}")))
    assert result["clock"].holds


def test_a_refused_key_is_named(client: Client, tls: Path, tmp_path: Path) -> None:
    with server(tls) as port:
        given = read_bundle(bundle(tmp_path / "b", tls / "ca.crt", f"127.0.0.1:{port}"))
        result = found(client, given, registered=lambda _: "412 no")
    assert result["registered"].holds is False
    assert "(412 no)" in result["registered"].found
    assert "key.pub" in result["registered"].found
