"""Everything that must hold before a client's first run, tested one by one, each with its remedy."""

import http.client
import shutil
import socket
import ssl
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from fedmerge.domain.catalog import load_catalog
from fedmerge.domain.interactions import load_interactions
from fedmerge.domain.manifest import read_manifest
from fedmerge.errors import FedMergeError
from fedmerge.organisation.folder import APPROVED, Bundle, Client, approved_apps, private_key
from fedmerge.privacy.client_policy import read_client_policy
from fedmerge.privacy.signatures import fingerprint

FREE_BYTES = 2**30  # experts and trainings that are going on are some MB each
WAIT_SECONDS = 10.0
DAYS_LEFT = 14  # of the certificate
MOST_AHEAD_SECONDS, MOST_BEHIND_SECONDS = 4.0, 290.0  # Flower: 5 and 305; its signatures carry the time


@dataclass(frozen=True)
class Check:
    """What was tested, whether it holds (None: could not be tested), and what was found or what to do."""

    what: str
    holds: bool | None
    found: str


def check_client(
    client: Client, bundle: Bundle | None, backbone: Callable[[], str], registered: Callable[[Bundle], str]
) -> Iterator[Check]:
    """Every check, in order, as it is done.

    Args:
        client: whose.
        bundle: None leaves out everything about the server.
        backbone: loads the encoder and says which it is.
        registered: asks the server to let the client in; empty if it did.
    """
    for what, test in (
        ("key", lambda: fingerprint(private_key(client).public_key())),
        ("domain", lambda: _domain(client)),
        ("policy", lambda: _policy(client)),
        ("backbone", backbone),
        ("disk", lambda: _disk(client)),
        ("app", lambda: _app(client, bundle)),
    ):
        yield _checked(what, test)
    if bundle is None:
        yield Check("server", None, "not tested: give the operator's bundle with --bundle")
        return
    address = _checked("address", lambda: _address(bundle))
    yield address
    secure = _checked("certificate", lambda: _certificate(bundle)) if address.holds else _skipped("certificate")
    yield secure
    yield _checked("clock", lambda: _clock(bundle)) if secure.holds else _skipped("clock")
    yield _checked("registered", lambda: _registered(bundle, registered)) if secure.holds else _skipped("registered")


class _Fails(Exception):
    """What was found, and the remedy."""


def _checked(what: str, test: Callable[[], str]) -> Check:
    try:
        return Check(what, True, test())
    except (_Fails, FedMergeError) as error:
        return Check(what, False, str(error))


def _skipped(what: str) -> Check:
    return Check(what, None, "not tested, the one before failed")


def _domain(client: Client) -> str:
    manifest = read_manifest(client.domain)
    load_catalog(client.domain)
    load_interactions(client.domain)
    kept = "may leave if the policy says so" if manifest.public_catalog else "stays here (tell the operator)"
    return f"{manifest.name}: {manifest.num_users:,} users, {manifest.num_items:,} items; its catalog {kept}"


def _policy(client: Client) -> str:
    policy = read_client_policy(client.policy)
    return ", ".join(f"{name} = {value}" for name, value in policy.model_dump().items())


def _disk(client: Client) -> str:
    try:
        client.cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=client.cache_dir):
            pass
        free = shutil.disk_usage(client.cache_dir).free
    except OSError as error:
        raise _Fails(f"{client.cache_dir}: cannot be written ({error.strerror}). Correct cache_dir.") from error
    if free < FREE_BYTES:
        raise _Fails(f"{client.cache_dir}: {free / 2**30:.1f} GiB are free, expected 1. Make space or move cache_dir.")
    return f"{free / 2**30:.0f} GiB are free for {client.cache_dir}"


def _app(client: Client, bundle: Bundle | None) -> str:
    approved = approved_apps(client.folder)
    remedy = f"fedmerge client approve {client.folder} --bundle BUNDLE or --app FILE"
    if not approved:
        raise _Fails(f"{client.folder / APPROVED}: no app is approved, so every run is refused. {remedy}")
    if bundle and bundle.app and bundle.app not in approved:
        raise _Fails(f"the operator's app {bundle.app} is not approved. If it is the one you agreed on: {remedy}")
    return f"{len(approved)} approved" + (", the operator's among them" if bundle and bundle.app else "")


def _address(bundle: Bundle) -> str:
    try:
        with socket.create_connection((bundle.host, bundle.port), WAIT_SECONDS) as connection:
            return f"{bundle.address} is reached at {connection.getpeername()[0]}"
    except OSError as error:
        raise _Fails(
            f"{bundle.address}: cannot be reached ({error}). Is the firewall open for connections to it from here, and "
            "does the server run?"
        ) from error


def _certificate(bundle: Bundle) -> str:
    try:
        context = ssl.create_default_context(cafile=str(bundle.authority))
        with (
            socket.create_connection((bundle.host, bundle.port), WAIT_SECONDS) as connection,
            context.wrap_socket(connection, server_hostname=bundle.host) as secure,
        ):
            told = secure.getpeercert() or {}
    except ssl.SSLCertVerificationError as error:
        raise _Fails(
            f"{bundle.address}: its certificate is refused ({error.verify_message}). Is {bundle.authority} the newest "
            "one from the operator, and this machine's clock right? Do not go on without."
        ) from error
    except OSError as error:
        raise _Fails(f"{bundle.address}: no TLS there ({error}). Ask the operator for the right address.") from error
    until = datetime.fromtimestamp(ssl.cert_time_to_seconds(str(told.get("notAfter"))), UTC)
    days = (until - datetime.now(UTC)).days
    if days < DAYS_LEFT:
        raise _Fails(f"{bundle.address}: its certificate ends on {until:%Y-%m-%d}. Tell the operator.")
    return f"of the authority {bundle.authority_sha256}, for {bundle.host}, until {until:%Y-%m-%d}"


def _clock(bundle: Bundle) -> str:
    context = ssl.create_default_context(cafile=str(bundle.authority))
    connection = http.client.HTTPSConnection(bundle.host, bundle.port, timeout=WAIT_SECONDS, context=context)
    try:
        connection.request("GET", "/health")
        now, told = time.time(), connection.getresponse().headers["Date"]
        ahead = now - parsedate_to_datetime(told).timestamp()
    except (OSError, http.client.HTTPException, TypeError, ValueError) as error:
        raise _Fails(
            f"{bundle.address}: gives no time ({type(error).__name__}: {error}). Ask the operator whether it runs."
        ) from error
    finally:
        connection.close()
    if not -MOST_BEHIND_SECONDS < ahead < MOST_AHEAD_SECONDS:
        raise _Fails(
            f"this machine's clock differs by {ahead:+.0f} s from the server's; signatures carry the time and are "
            "refused. Set it by NTP."
        )
    return f"{ahead:+.0f} s from the server's"


def _registered(bundle: Bundle, registered: Callable[[Bundle], str]) -> str:
    if told := registered(bundle):
        raise _Fails(
            f"{bundle.address} does not let this key in ({told}). It is not registered: send key.pub to the operator; "
            "or this client runs now, or ended uncleanly within the last minute."
        )
    return "the server lets this key in"
