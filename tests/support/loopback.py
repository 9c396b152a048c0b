"""A federation over TLS with authentication on the loopback: SuperLink, operator, organisations."""

import ipaddress
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import NameOID

from sim.local.launch import flower_environment

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAMS = Path(sys.executable).parent


def free_port() -> int:
    """Return an unused port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def certificates(folder: Path, days: int = 90) -> None:
    """Write ca.crt, and server.pem with server.key for 127.0.0.1 and localhost, as the operator does."""
    folder.mkdir(parents=True, exist_ok=True)
    authority, server = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    issuer, subject = (x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) for name in ("test CA", "server"))
    now = datetime.now(UTC)

    def builder(name: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        base = x509.CertificateBuilder().subject_name(name).issuer_name(issuer).public_key(key.public_key())
        start, end = now - timedelta(days=1), now + timedelta(days=days)
        return base.serial_number(x509.random_serial_number()).not_valid_before(start).not_valid_after(end)

    of_ca = builder(issuer, authority).add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    of_server = builder(subject, server).add_extension(x509.SubjectAlternativeName(names), critical=False)
    for name, made in (("ca.crt", of_ca), ("server.pem", of_server)):
        (folder / name).write_bytes(made.sign(authority, hashes.SHA256()).public_bytes(Encoding.PEM))
    key = server.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())
    (folder / "server.key").write_bytes(key)


def write_identity(private: Path, public: Path) -> None:
    """Write an Ed25519 key pair for secure sums as ssh-keygen does; only its owner can read the private key."""
    key = Ed25519PrivateKey.generate()
    private.touch(mode=0o600)
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    public.write_bytes(
        key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + b" someone@example.org\n"
    )


def bundle(folder: Path, authority: Path, address: str, app: str = "") -> Path:
    """Write a bundle as the operator does."""
    folder.mkdir()
    (folder / "ca.crt").write_bytes(authority.read_bytes())
    told = f'address = "{address}"\nfederation = "test"\n' + (f'app = "{app}"\n' if app else "")
    (folder / "federation.toml").write_text(told)
    return folder


@dataclass
class Loopback:
    """A federation; :meth:`end` ends the processes started in it."""

    place: Path
    port: int
    variables: Mapping[str, str]
    processes: list["subprocess.Popen[str]"] = field(default_factory=list)

    @property
    def address(self) -> str:
        """Return the address of the SuperLink."""
        return f"127.0.0.1:{self.port}"

    def start(self, log: str, *command: str, **variables: str) -> "subprocess.Popen[str]":
        """Start a process; its output goes to ``place/log``."""
        with (self.place / log).open("a") as output:
            process = subprocess.Popen(
                command,
                cwd=self.place,
                env={**self.variables, **variables},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
            )
        self.processes.append(process)
        return process

    def said(self, log: str, text: str, seconds: float = 120.0) -> str:
        """Wait until a log contains a text; return the log."""
        found = ""

        def look() -> bool:
            nonlocal found
            found = (self.place / log).read_text()
            return text in found

        assert eventually(look, seconds), f"{log} lacks {text!r}:\n{found[-4000:]}"
        return found

    def flwr(self, *arguments: str) -> dict[str, Any]:
        """Run flwr and return its JSON output."""
        done = subprocess.run(
            [str(PROGRAMS / "flwr"), *arguments, "--format", "json"],
            cwd=self.place,
            env=dict(self.variables),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        try:
            return dict(json.loads(done.stdout))
        except ValueError:
            raise AssertionError(f"flwr {arguments}: {done.stdout}{done.stderr}") from None

    def run(self, app: Path, config: Path, folder: Path, seconds: float = 900.0) -> str:
        """Submit a run and wait until its server has ended; return the server's log."""
        answer = self.flwr("run", str(app), "test", "--run-config", str(config))
        assert "run-id" in answer, answer
        log = folder / "run.log"

        def ended() -> bool:
            return log.exists() and bool(re.search("the run failed|done in", log.read_text()))

        assert eventually(ended, seconds), (self.place / "superlink.log").read_text()[-4000:]
        return log.read_text()

    def client(self, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
        """Run ``fedmerge client …`` until it ends."""
        return subprocess.run(
            [sys.executable, "-m", "fedmerge.cli", "client", *arguments],
            cwd=self.place,
            env={**self.variables, **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )

    def end(self) -> None:
        """End the started processes, the last one first."""
        for process in reversed(self.processes):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def start_loopback(place: Path, of_server: Path | None = None) -> Loopback:
    """Start a SuperLink with TLS that admits only registered keys.

    Args:
        place: folder of the federation.
        of_server: folder of Python code that only the server's processes find first.
    """
    place.mkdir(parents=True, exist_ok=True)
    certificates(place / "tls")
    port = free_port()
    variables = flower_environment(place / "operator", free_port())
    variables |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    (place / "operator").mkdir()
    told = f'[superlink]\ndefault = "test"\n\n[superlink.test]\naddress = "127.0.0.1:{port}"\n'
    (place / "operator" / "config.toml").write_text(told + f'root-certificates = "{place / "tls" / "ca.crt"}"\n')
    federation = Loopback(place, port, variables)
    tls = place / "tls"
    federation.start(
        "superlink.log",
        *(str(PROGRAMS / "flower-superlink"), "--host", "127.0.0.1", "--port", str(port)),
        *("--ssl-ca-certfile", str(tls / "ca.crt"), "--ssl-certfile", str(tls / "server.pem")),
        *("--ssl-keyfile", str(tls / "server.key"), "--enable-supernode-auth", "--database", str(place / "state.db")),
        "--disable-runtime-dependency-installation",
        PYTHONPATH=str(REPOSITORY) if of_server is None else f"{of_server}:{REPOSITORY}",
    )
    assert eventually(lambda: _listens(port), 60), (place / "superlink.log").read_text()
    return federation


def eventually(holds: Callable[[], bool], seconds: float, pause: float = 0.2) -> bool:
    """Return True if a condition holds within the given number of seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if holds():
            return True
        time.sleep(pause)
    return False


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0
