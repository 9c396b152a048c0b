"""The operator's folder: its files, their permissions, its certificates, and what is refused."""

import hashlib
import os
import re
import shutil
import ssl
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from run_folders import full_disk

from fedmerge.cli import main
from fedmerge.deploy.certificates import CERTIFICATE_DAYS, check_host, expires, issue, new_authority, sha1_fingerprint
from fedmerge.deploy.clients import add_client, find_client, list_clients, note_nodes, remove_client
from fedmerge.deploy.folder import Deployment, create_deployment, read_deployment, renew
from fedmerge.errors import DeploymentError, DomainError, RunDirError
from fedmerge.privacy.signatures import read_registered_keys
from sim.machines.app_bundle import submitted_sha256

REPOSITORY = Path(__file__).resolve().parents[2]
HOSTS = ["fl.example.org", "10.1.2.3"]
SECRETS = {"ca/ca.key", "server/server.key", "operator/operator.key"}


@pytest.fixture
def deployment(tmp_path: Path) -> Deployment:
    return create_deployment(tmp_path / "operator", "prod", HOSTS, 8443, 8000)


def public_key(path: Path, key: Any = None) -> Path:
    """Write an OpenSSH public key as an organisation sends it."""
    public = (key or ec.generate_private_key(ec.SECP384R1())).public_key()
    line = public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    path.write_bytes(line + b" me@shop\n")
    return path


def handshake(server: ssl.SSLContext, client: ssl.SSLContext, host: str) -> None:
    """Do a TLS handshake in memory; raise what a connection would."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname=host),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(6):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    ends[0].write(b"x")
    assert ends[1].read(1) == b"x"


def server_context(deployment: Deployment) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(deployment.folder / "server/server.crt", deployment.folder / "server/server.key")
    context.load_verify_locations(deployment.authority)
    return context


def test_the_folder_is_complete_and_only_its_owner_can_read_a_key(deployment: Deployment) -> None:
    files = {str(path.relative_to(deployment.folder)) for path in deployment.folder.rglob("*") if path.is_file()}
    assert files == SECRETS | {
        "deployment.toml",
        "nginx.conf",
        "compose.yaml",
        "image/constraints.txt",
        "fedmerge-operator.service",
        "flower/config.toml",
        "ca/ca.crt",
        "server/server.crt",
        "operator/operator.crt",
        "operator/ca.crt",
        "operator/nginx.conf",
        "operator/flower/config.toml",
    }
    assert deployment.folder.stat().st_mode & 0o777 == 0o700
    assert {path for path in files if (deployment.folder / path).stat().st_mode & 0o077 == 0} == SECRETS
    private = {path for path in files if b"PRIVATE KEY" in (deployment.folder / path).read_bytes()}
    assert private == SECRETS
    assert read_deployment(deployment.folder) == deployment


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_understands_the_service(deployment: Deployment) -> None:
    unit = deployment.folder / "fedmerge-operator.service"
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert str(unit.name) not in done.stderr
    with unit.open("a") as file:
        file.write("Restart=now and then\n[Service]\nRestart=now and then\n")
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert str(unit.name) in done.stderr  # it does read the unit


@pytest.mark.parametrize("host", [*HOSTS, "localhost", "127.0.0.1"])
def test_clients_know_the_server_by_each_of_its_names(deployment: Deployment, host: str) -> None:
    handshake(server_context(deployment), ssl.create_default_context(cafile=str(deployment.authority)), host)


def test_another_name_another_authority_and_no_authority_are_refused(deployment: Deployment, tmp_path: Path) -> None:
    other = tmp_path / "other.crt"
    other.write_bytes(new_authority("prod").certificate)
    server = server_context(deployment)
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        handshake(server, ssl.create_default_context(cafile=str(deployment.authority)), "evil.example.org")
    for context in (ssl.create_default_context(cafile=str(other)), ssl.create_default_context()):
        with pytest.raises(ssl.SSLCertVerificationError, match=r"self-signed|unable to get local issuer|signature"):
            handshake(server, context, HOSTS[0])


def test_only_the_operators_certificate_opens_what_asks_for_one(deployment: Deployment, tmp_path: Path) -> None:
    server = server_context(deployment)
    server.verify_mode = ssl.CERT_REQUIRED
    strangers = issue(new_authority("prod"), "fedmerge operator prod", "client")
    (tmp_path / "x.crt").write_bytes(strangers.certificate)
    (tmp_path / "x.key").write_bytes(strangers.key)
    certificates = {
        "operator": (deployment.folder / "operator/operator.crt", deployment.folder / "operator/operator.key"),
        "server": (deployment.folder / "server/server.crt", deployment.folder / "server/server.key"),
        "stranger": (tmp_path / "x.crt", tmp_path / "x.key"),
    }
    for role, pair in certificates.items():
        client = ssl.create_default_context(cafile=str(deployment.authority))
        client.load_cert_chain(*pair)
        if role == "operator":
            handshake(server, client, HOSTS[0])
        else:
            with pytest.raises(ssl.SSLError, match=r"certificate verify failed|CERTIFICATE_VERIFY_FAILED"):
                handshake(server, client, HOSTS[0])


def test_nothing_is_overwritten_and_a_full_disk_leaves_nothing(deployment: Deployment, tmp_path: Path) -> None:
    before = (deployment.folder / "ca/ca.key").read_bytes()
    with pytest.raises(RunDirError, match=str(deployment.folder)):
        create_deployment(deployment.folder, "prod", HOSTS, 8443, 8000)
    assert (deployment.folder / "ca/ca.key").read_bytes() == before
    with full_disk(100), pytest.raises(RunDirError, match=r"/ca/ca\.crt .*File too large"):
        create_deployment(tmp_path / "full", "prod", HOSTS, 8443, 8000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["operator"]


def test_renewed_certificates_shut_the_former_operator_out(deployment: Deployment) -> None:
    operator = deployment.folder / "operator/operator.crt"
    authority, former = deployment.authority.read_bytes(), sha1_fingerprint(operator)
    assert former in (deployment.folder / "nginx.conf").read_text()
    settings = deployment.folder / "deployment.toml"
    settings.write_text(settings.read_text().replace("10.1.2.3", "new.example.org").replace("8443", "9443"))
    renew(read_deployment(deployment.folder))
    text = (deployment.folder / "nginx.conf").read_text()
    assert former not in text
    assert sha1_fingerprint(operator) in text
    assert "listen 9443 ssl" in text
    assert deployment.authority.read_bytes() == authority
    handshake(server_context(deployment), ssl.create_default_context(cafile=str(deployment.authority)), HOSTS[0])
    handshake(
        server_context(deployment), ssl.create_default_context(cafile=str(deployment.authority)), "new.example.org"
    )
    days = (expires(operator) - expires(deployment.authority)).days
    assert days < CERTIFICATE_DAYS - 3000
    (deployment.folder / "ca/ca.key").unlink()
    with pytest.raises(DeploymentError, match=r"ca\.key"):
        renew(deployment)


@pytest.mark.skipif(not shutil.which("nginx", path="/usr/sbin:/usr/bin"), reason="nginx is not installed")
def test_nginx_takes_both_configurations(deployment: Deployment) -> None:
    nginx = shutil.which("nginx", path="/usr/sbin:/usr/bin") or ""
    for folder in (deployment.folder, deployment.folder / "operator"):
        command = [nginx, "-t", "-q", "-p", str(folder), "-c", str(folder / "nginx.conf")]
        renew(Deployment(deployment.folder, "prod", ("localhost",), 8443, 8000))  # a name that resolves
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


def test_a_bundle_has_all_that_an_organisation_needs_and_no_secret(
    deployment: Deployment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = add_client(deployment, "north-shop", public_key(tmp_path / "key.pub"), "ab" * 32)
    assert sorted(path.name for path in bundle.iterdir()) == ["README.txt", "ca.crt", "federation.toml"]
    result = tomllib.loads((bundle / "federation.toml").read_text())
    assert result == {"address": "fl.example.org:8443", "federation": "prod", "app": "ab" * 32}
    assert (bundle / "ca.crt").read_bytes() == deployment.authority.read_bytes()
    assert not any(b"PRIVATE" in path.read_bytes() for path in bundle.iterdir())
    readme = (bundle / "README.txt").read_text()
    assert "fedmerge client start DIR --bundle BUNDLE" in readme
    certificate = ssl.PEM_cert_to_DER_cert(deployment.authority.read_text())
    for said in (hashlib.sha256(certificate).hexdigest(), find_client(deployment, "north-shop").key_sha256, "ab" * 32):
        assert said in readme

    assert [(client.name, client.node) for client in list_clients(deployment)] == [("north-shop", None)]
    note_nodes(deployment, {"north-shop": 2**63 + 5})
    assert find_client(deployment, "north-shop").node == 2**63 + 5
    remove_client(deployment, "north-shop")
    assert list_clients(deployment) == []
    assert not bundle.exists()
    add_client(deployment, "north-shop", tmp_path / "key.pub", None, "books")
    assert find_client(deployment, "north-shop").node is None
    assert [key.domain for key in read_registered_keys(deployment.folder / "keys").values()] == ["books"]
    assert main(["deploy", "status", str(deployment.folder)]) == 1
    output = capsys.readouterr().out
    assert "prod at fl.example.org:8443: " in output
    assert "\n  north-shop: unknown\nlast run: none\n" in output


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("North Shop", "good", r"'North Shop': .*1 to 63"),
        ("../x", "good", r"'\.\./x'"),
        ("shop", "absent", r"key\.pub: .*\(No such file.*fedmerge client init"),
        ("shop", "private", r"key\.pub: .*private.*fedmerge client init"),
        ("shop", "ed25519", r"key\.pub: .*ssh-ed25519.*ecdsa-sha2-nistp384"),
        ("shop", "noise", r"key\.pub: .*\(\w+\).*fedmerge client init"),
        ("there", "good", r"there: .* \w{12}\. .*fedmerge deploy remove-client /\S+ there"),
        ("shop", "taken", r"key\.pub: .*client there"),
    ],
)
def test_an_invalid_client_is_refused(
    deployment: Deployment, tmp_path: Path, name: str, kind: str, message: str
) -> None:
    taken = public_key(tmp_path / "taken.pub")
    add_client(deployment, "there", taken, None)
    path = tmp_path / "key.pub"
    if kind == "good":
        public_key(path)
    elif kind == "ed25519":
        public_key(path, ed25519.Ed25519PrivateKey.generate())
    elif kind == "taken":
        shutil.copy(taken, path)
    elif kind == "private":
        path.write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n")
    elif kind == "noise":
        path.write_bytes(os.urandom(200))
    with pytest.raises(DeploymentError, match=message):
        add_client(deployment, name, path, None)
    with pytest.raises(DomainError, match=r"--domain: .*'\.\./x'"):
        add_client(deployment, "other", path, None, "../x")
    assert [client.name for client in list_clients(deployment)] == ["there"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "Prod 1"}, r"'Prod 1': .*1 to 40"),
        ({"hosts": []}, r"--host fl\.example\.org"),
        ({"hosts": ["https://x.org"]}, r"--host 'https://x\.org'"),
        ({"hosts": ["x.org:8443"]}, r"--host 'x\.org:8443'"),
        ({"port": 70000}, r"^port = 70000: .*1 .* 65535"),
        ({"superlink_port": 8443}, r"port and superlink_port .*8443"),
        ({"folder": Path("/tmp/a b")}, r"/tmp/a b: "),
    ],
)
def test_an_invalid_deployment_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "folder": tmp_path / "x",
        "name": "prod",
        "hosts": HOSTS,
        "port": 8443,
        "superlink_port": 8000,
    }
    with pytest.raises(DeploymentError, match=message):
        create_deployment(**(arguments | changes))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"deployment\.toml: .*'fedmerge deploy init'"),
        ("name = ", r"deployment\.toml: .*TOML"),
        ("name = 'prod'", r"deployment\.toml: .* name, .*hosts, name, port, superlink_port"),
        ("name = 'prod'\nhosts = ['a']\nport = 'x'\nsuperlink_port = 1", r"port = 'x': .*65535"),
    ],
)
def test_a_folder_without_a_deployment_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "deployment.toml").write_text(text)
    with pytest.raises(DeploymentError, match=message):
        read_deployment(tmp_path)


def test_hosts_are_names_or_addresses() -> None:
    assert check_host("FL.Example.org.") == "fl.example.org"
    assert check_host("2001:DB8::1") == "2001:db8::1"
    for wrong in ("", "a..b", "-a.org", "a_b.org", "1.2.3.300", "a/b"):
        with pytest.raises(DeploymentError):
            check_host(wrong)


def test_the_commands_say_what_comes_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "operator"
    assert main(["deploy", "init", str(folder), "--host", "fl.example.org"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"next: fedmerge deploy start {folder}"
    key = public_key(tmp_path / "key.pub")
    assert main(["deploy", "add-client", str(folder), "shop", "--public-key", str(key)]) == 0
    output = capsys.readouterr().out.splitlines()
    assert output[0].startswith(f"{folder}/clients/shop: send this folder to shop")
    assert "registered" in output[2]
    result = tomllib.loads((folder / "clients/shop/federation.toml").read_text())
    assert result["app"] == submitted_sha256(REPOSITORY)
    assert "may sign for domain shop" in output[1]
    assert [key.domain for key in read_registered_keys(folder / "keys").values()] == ["shop"]
    note_nodes(read_deployment(folder), {"shop": 5})
    assert main(["deploy", "remove-client", str(folder), "shop"]) == 1
    assert f"fedmerge deploy start {folder}" in capsys.readouterr().err
    (folder / "clients/shop/federation.toml").unlink()
    assert main(["deploy", "bundle", str(folder), "shop"]) == 0
    assert f"{folder}/clients/shop: " in capsys.readouterr().out
    assert tomllib.loads((folder / "clients/shop/federation.toml").read_text()) == result
    assert main(["deploy", "bundle", str(folder), "other"]) == 1
    assert re.search(r"client other: .*: shop\.", capsys.readouterr().err)
    note_nodes(read_deployment(folder), {})  # never registered, so Flower has nothing to undo
    assert main(["deploy", "remove-client", str(folder), "shop"]) == 0
    assert not list((folder / "clients").iterdir())


@pytest.mark.parametrize(("more", "domain"), [([], "shop"), (["--domain", "books"], "books"), (["--any-domain"], None)])
def test_a_key_is_bound_to_the_clients_name_by_default(tmp_path: Path, more: list[str], domain: str | None) -> None:
    folder = tmp_path / "operator"
    assert main(["deploy", "init", str(folder), "--host", "fl.example.org"]) == 0
    key = ["--public-key", str(public_key(tmp_path / "key.pub"))]
    assert main(["deploy", "add-client", str(folder), "shop", *key, "--any-domain", "--domain", "x"]) == 1
    assert main(["deploy", "add-client", str(folder), "shop", *key, *more]) == 0
    (registered,) = read_registered_keys(folder / "keys").values()
    assert registered.domain == domain
