"""An organisation's client folder and the operator's bundle: made, read, and refused where wrong."""

import hashlib
import logging
import re
import signal
import ssl
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_ssh_public_key,
)

from fedmerge.cli import main
from fedmerge.deploy.certificates import new_authority
from fedmerge.domain.demo import write_demo
from fedmerge.errors import ConfigError, FedMergeError
from fedmerge.organisation.folder import (
    Bundle,
    approve_app,
    approved_apps,
    init_client,
    private_key,
    read_bundle,
    read_client,
)
from fedmerge.privacy.client_policy import ClientPolicy, read_client_policy
from fedmerge.privacy.signatures import fingerprint, read_private_key

APP = "ab" * 32


@pytest.fixture(scope="module")
def domain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("domains") / 'a "quoted" place'
    write_demo(root, num_domains=2, num_users=10, num_items=20)
    return root / "beauty"


@pytest.fixture
def folder(domain: Path, tmp_path: Path) -> Path:
    init_client(tmp_path / "north", "north", domain)
    return tmp_path / "north"


def test_a_new_client_folder_holds_a_key_pair_and_files_that_are_read_back(domain: Path, tmp_path: Path) -> None:
    result = init_client(tmp_path / "north", "north", domain, threads=2, backbone="../models/bert")
    folder = tmp_path / "north"
    assert sorted(path.name for path in folder.iterdir()) == ["client.toml", "key", "key.pub", "policy.toml"]
    client = read_client(folder)
    assert (client.name, client.domain, client.threads) == ("north", domain, 2)
    assert (client.cache_dir, client.policy) == (folder / "cache", folder / "policy.toml")
    assert client.backbone == "../models/bert"  # no such folder: the name of one of the hub
    assert read_client_policy(client.policy) == ClientPolicy()
    key = private_key(client)
    assert key.curve.name == "secp384r1"
    public = load_ssh_public_key((folder / "key.pub").read_bytes())
    assert public == key.public_key()
    assert fingerprint(key.public_key()) == result
    assert len(result) == 64


def test_nobody_else_can_read_the_private_key(folder: Path) -> None:
    assert stat.S_IMODE((folder / "key").stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    (folder / "key").chmod(0o640)
    with pytest.raises(ConfigError, match=r"chmod 600 /.+/key"):
        private_key(read_client(folder))


def test_a_client_folder_is_never_overwritten(folder: Path, domain: Path) -> None:
    before = (folder / "key").read_bytes()
    with pytest.raises(FedMergeError, match=str(folder)):
        init_client(folder, "north", domain)
    assert (folder / "key").read_bytes() == before


@pytest.mark.parametrize("name", ["", "North", "no rth", "-north", "north\n", "../north", "n" * 64])
def test_a_malformed_name_is_refused(name: str, domain: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--name .*: .*north-shop"):
        init_client(tmp_path / "x", name, domain)
    assert not (tmp_path / "x").exists()


def test_a_folder_without_a_domain_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FedMergeError, match="nowhere"):
        init_client(tmp_path / "x", "north", tmp_path / "nowhere")
    assert not (tmp_path / "x").exists()


def test_a_backbone_in_the_client_folder_is_found_wherever_the_client_is_started(folder: Path) -> None:
    (folder / "model").mkdir()
    text = (folder / "client.toml").read_text()
    (folder / "client.toml").write_text(text.replace("sentence-transformers/all-MiniLM-L6-v2", "model"))
    assert read_client(folder).backbone == str(folder / "model")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('name = "North"', r"client\.toml: 1 .*: name, .*\n  name: "),
        ("threads = 0", r"(?s)client\.toml: 1 .*threads: .* 0"),
        ('colour = "red"', r"(?s)client\.toml: 1 .*colour"),
        ("name = ", r"client\.toml: .*TOML.*fedmerge client init"),
    ],
)
def test_a_wrong_client_file_is_refused(folder: Path, line: str, message: str) -> None:
    key = line.split(" ", maxsplit=1)[0]
    kept = [old for old in (folder / "client.toml").read_text().splitlines() if not old.startswith(f"{key} ")]
    (folder / "client.toml").write_text("\n".join([*kept, line]))
    with pytest.raises(ConfigError, match=message):
        read_client(folder)


def test_a_folder_without_a_client_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"client\.toml: .*fedmerge client init"):
        read_client(tmp_path)


def test_a_file_without_a_key_is_refused_and_never_quoted(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "other"
    with pytest.raises(ConfigError, match=r"/other: "):
        read_private_key(path)
    path.touch(mode=0o600)
    path.write_text("SECRET")
    with pytest.raises(ConfigError, match=r"/other: .*ValueError") as caught:
        read_private_key(path)
    assert "SECRET" not in str(caught.value)
    edwards = ed25519.Ed25519PrivateKey.generate()
    path.write_bytes(edwards.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    with pytest.raises(ConfigError, match=r"/other: .*Ed25519PrivateKey"):
        read_private_key(path)
    assert isinstance(read_private_key(folder / "key"), ec.EllipticCurvePrivateKey)


# Approval


def test_an_app_is_approved_once_and_taken_back_by_deleting_its_line(folder: Path) -> None:
    assert approved_apps(folder) == frozenset()
    approve_app(folder, APP, "by hand")
    approve_app(folder, APP, "by hand")
    approve_app(folder, "0" * 64, "by hand")
    text = (folder / "approved.txt").read_text()
    assert text.count(APP) == 1
    assert approved_apps(folder) == {APP, "0" * 64}
    (folder / "approved.txt").write_text("\n".join(line for line in text.splitlines() if not line.startswith(APP)))
    assert approved_apps(folder) == {"0" * 64}


def test_a_malformed_hash_is_not_approved(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"'abc'.* 64 "):
        approve_app(folder, "abc", "by hand")
    (folder / "approved.txt").write_text("*\n")
    with pytest.raises(ConfigError, match=r"approved\.txt: .*'\*'.* 64 "):
        approved_apps(folder)


# The bundle


AUTHORITY = new_authority("shops").certificate
AUTHORITY_SHA256 = hashlib.sha256(ssl.PEM_cert_to_DER_cert(AUTHORITY.decode())).hexdigest()


def make_bundle(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "ca.crt").write_bytes(AUTHORITY)
    (folder / "federation.toml").write_text(text)
    return folder


def test_a_bundle_is_read(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "b", f'address = "fl.example.org:8000"\nfederation = "shops"\napp = "{APP}"\n')
    assert read_bundle(folder) == Bundle(folder / "ca.crt", "fl.example.org", 8000, "shops", APP, AUTHORITY_SHA256)
    assert read_bundle(folder).address == "fl.example.org:8000"
    six = read_bundle(make_bundle(tmp_path / "six", 'address = "[::1]:8000"\n'))
    assert (six.host, six.address, six.app) == ("::1", "[::1]:8000", "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('address = "fl.example.org"', r"(?s)federation\.toml: 1 .*address: "),
        ('address = "https://fl.example.org:8000"', r"(?s)federation\.toml: 1 .*address: "),
        ('address = "a:99999"', r"federation\.toml: .*99999.*1 to 65535.*deploy add-client"),
        ('address = "a:1"\napp = "short"', r"(?s)federation\.toml: 1 .*app: "),
        ("", r"(?s)federation\.toml: 1 .*address: "),
    ],
)
def test_a_wrong_bundle_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_bundle(make_bundle(tmp_path / "b", text))


def test_a_bundle_without_its_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"federation\.toml: .*deploy add-client"):
        read_bundle(tmp_path)
    folder = make_bundle(tmp_path / "b", 'address = "a:1"')
    (folder / "ca.crt").unlink()
    with pytest.raises(ConfigError, match=r"ca\.crt: .*deploy add-client"):
        read_bundle(folder)
    (folder / "ca.crt").write_bytes(AUTHORITY[:300])
    with pytest.raises(ConfigError, match=r"ca\.crt: .*\(.+\).*deploy add-client"):
        read_bundle(folder)


# The commands


def test_the_commands_say_what_comes_next(
    domain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["client", "init", "north", "--name", "north", "--domain", str(domain)]) == 0
    said = capsys.readouterr().out
    assert fingerprint(private_key(read_client(tmp_path / "north")).public_key()) in said
    assert "north/key.pub" in said
    bundle = make_bundle(tmp_path / "b", f'address = "a:1"\nfederation = "shops"\napp = "{APP}"\n')
    assert main(["client", "approve", "north"]) == 0
    assert APP not in capsys.readouterr().out
    assert main(["client", "approve", "north", "--bundle", str(bundle)]) == 0
    said = capsys.readouterr().out
    assert f"approved: {APP}" in said
    assert f"certificate: {AUTHORITY_SHA256}" in said
    assert main(["client", "approve", "north"]) == 0
    assert capsys.readouterr().out.strip() == APP
    assert "shops" in (tmp_path / "north" / "approved.txt").read_text()


def test_a_bundle_that_does_not_know_the_app_says_how_to_approve_it(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = make_bundle(tmp_path / "b", 'address = "a:1"')
    assert main(["client", "approve", str(folder), "--bundle", str(bundle)]) == 1
    assert f"fedmerge client approve {folder} --app FILE" in capsys.readouterr().err
    assert main(["client", "approve", str(folder), "--app", str(tmp_path / "no.fab")]) == 1
    assert "no.fab: " in capsys.readouterr().err


def test_a_client_without_an_approved_app_is_not_started_and_leaves_signals_and_log_as_they_were(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = make_bundle(tmp_path / "b", 'address = "127.0.0.1:1"')
    library = logging.getLogger("fedmerge")

    def settings_of_the_process() -> list[object]:
        handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
        return [*handlers, list(library.handlers), library.level, library.propagate]

    before = settings_of_the_process()
    assert main(["client", "start", str(folder), "--bundle", str(bundle)]) == 1
    assert f"fedmerge client approve {folder}" in capsys.readouterr().err
    assert settings_of_the_process() == before


def test_a_client_whose_domain_is_gone_is_not_started(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = make_bundle(tmp_path / "b", 'address = "127.0.0.1:1"')
    result = (folder / "client.toml").read_text()
    (folder / "client.toml").write_text(re.sub(r"(?m)^domain = .*", f'domain = "{tmp_path / "nowhere"}"', result))
    assert main(["client", "start", str(folder), "--bundle", str(bundle)]) == 1
    assert str(tmp_path / "nowhere") in capsys.readouterr().err
