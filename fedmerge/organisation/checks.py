"""Checks that a client must pass before its first run, each with a remedy."""

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

from fedmerge.client.disclosed.account import check_total, read_account, total_epsilon
from fedmerge.config import MIN_SUMMED
from fedmerge.domain.catalog import load_catalog
from fedmerge.domain.interactions import load_interactions
from fedmerge.domain.manifest import read_manifest
from fedmerge.errors import FedMergeError
from fedmerge.organisation.folder import APPROVED, Bundle, Client, approved_apps, private_key
from fedmerge.privacy.client_policy import read_client_policy
from fedmerge.privacy.dp.releases import DEFAULT_DELTA
from fedmerge.privacy.secagg.identity import read_identity, read_registered
from fedmerge.privacy.signatures import fingerprint

FREE_BYTES = 2**30  # an expert or a checkpoint takes a few MB
WAIT_SECONDS = 10.0
DAYS_LEFT = 14  # minimum validity left of the server's certificate
MOST_AHEAD_SECONDS, MOST_BEHIND_SECONDS = 4.0, 290.0  # Flower allows 5 and 305; its signatures carry the time


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        what: name of the check.
        holds: whether it passed; None if it was not made.
        found: what was found; for a failure also the remedy.
    """

    what: str
    holds: bool | None
    found: str


def check_client(
    client: Client, bundle: Bundle | None, backbone: Callable[[], str], registered: Callable[[Bundle], str]
) -> Iterator[Check]:
    """Make every check in order and yield each result as it is known.

    Args:
        client: the client to check.
        bundle: the operator's bundle; None skips the checks of the server.
        backbone: loads the encoder and returns a description of it.
        registered: asks the server to admit the client; returns its refusal, empty if it admitted the client.
    """
    for what, test in (
        ("key", lambda: fingerprint(private_key(client).public_key())),
        ("domain", lambda: _domain(client)),
        ("policy", lambda: _policy(client)),
        ("secure sums", lambda: _secure_sums(client)),
        ("backbone", backbone),
        ("disk", lambda: _disk(client)),
        ("privacy budget", lambda: _account(client)),
        ("app", lambda: _app(client, bundle)),
    ):
        yield _checked(what, test)
    if bundle is None:
        yield Check("server", None, "not checked: give the operator's bundle with --bundle")
        return
    address = _checked("address", lambda: _address(bundle))
    yield address
    secure = _checked("certificate", lambda: _certificate(bundle)) if address.holds else _skipped("certificate")
    yield secure
    yield _checked("clock", lambda: _clock(bundle)) if secure.holds else _skipped("clock")
    yield _checked("registered", lambda: _registered(bundle, registered)) if secure.holds else _skipped("registered")


class _Fails(Exception):
    """A check failed; the message says what was found and names the remedy."""


def _checked(what: str, test: Callable[[], str]) -> Check:
    try:
        return Check(what, True, test())
    except (_Fails, FedMergeError) as error:
        return Check(what, False, str(error))


def _skipped(what: str) -> Check:
    return Check(what, None, "not checked, because an earlier check failed")


def _domain(client: Client) -> str:
    manifest = read_manifest(client.domain)
    load_catalog(client.domain)
    load_interactions(client.domain)
    catalog = "may leave if the policy allows it" if manifest.public_catalog else "stays here (tell the operator)"
    return f"{manifest.name}: {manifest.num_users:,} users, {manifest.num_items:,} items; its catalog {catalog}"


def _policy(client: Client) -> str:
    policy = read_client_policy(client.policy)
    return ", ".join(f"{name} = {value}" for name, value in policy.model_dump().items())


def _account(client: Client) -> str:
    account, policy = read_account(client.disclosed), read_client_policy(client.policy)
    limit = "no limit (max_total_epsilon)"
    if policy.max_total_epsilon is not None:
        limit = f"at most {policy.max_total_epsilon:g} (max_total_epsilon)"
    if not account:
        return f"nothing released with noise so far; {limit}"
    delta = policy.max_delta or DEFAULT_DELTA
    total = total_epsilon(account, delta, policy.adjacency)
    spent = ", ".join(f"ε = {epsilon:.3g} by {unit}" for unit, epsilon in total.items())
    runs = len({entry.run for entry in account})
    check_total(account, policy.max_total_epsilon, policy.max_delta, policy.adjacency)
    return f"{spent} ({policy.adjacency}) at δ = {delta:g} in {runs} runs; {limit}"


def _secure_sums(client: Client) -> str:
    policy = read_client_policy(client.policy)
    wanted = "aggregate-only" in policy.policies
    if client.identity_key is None or client.peer_keys is None:  # client.toml has both or neither
        if not wanted:
            return "no keys; policies does not allow aggregate-only either"
        if policy.require_peer_keys:
            raise _Fails(
                "policies allows aggregate-only and require_peer_keys = true, but client.toml has no identity_key and "
                "peer_keys, so every such run would be refused. Make a key with ssh-keygen -t ed25519, exchange the "
                "public keys with the other organisations, not through the operator, and name both in client.toml."
            )
        return (
            "no keys, and require_peer_keys = false: a server that invents two clients can read this client's adapter "
            "off a secure sum"
        )
    own, registered = read_identity(client.identity_key).public_key(), read_registered(client.peer_keys)
    if registered.get(client.domain.name) != own:
        raise _Fails(
            f"{client.peer_keys / client.domain.name}.pub is missing or not the public key of {client.identity_key}, "
            f"so the others would refuse this client. Copy {client.identity_key}.pub there, and send it to them again."
        )
    others = sorted(registered.keys() - {client.domain.name})
    if len(others) < MIN_SUMMED - 1:
        raise _Fails(
            f"{client.peer_keys}: keys of {len(others)} other domains, expected at least {MIN_SUMMED - 1}, which a "
            "secure sum needs. Get NAME.pub from the other organisations."
        )
    return f"signs as {client.domain.name}; sums only with {', '.join(others)}"


def _disk(client: Client) -> str:
    try:
        client.cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=client.cache_dir):
            pass
        free = shutil.disk_usage(client.cache_dir).free
    except OSError as error:
        raise _Fails(
            f"{client.cache_dir}: cannot be written ({error.strerror}). Correct cache_dir in client.toml."
        ) from error
    if free < FREE_BYTES:
        raise _Fails(
            f"{client.cache_dir}: {free / 2**30:.1f} GiB free, expected at least 1. Free space, or move cache_dir."
        )
    kept = {what: sum(1 for _ in (client.cache_dir / what).glob("*/")) for what in ("experts", "heads")}
    holds = " and ".join(f"{number} {what}" for what, number in kept.items())
    return f"{free / 2**30:.0f} GiB free in {client.cache_dir}, which holds {holds}; heads never leave"


def _app(client: Client, bundle: Bundle | None) -> str:
    approved = approved_apps(client.folder)
    remedy = f"fedmerge client approve {client.folder} --bundle BUNDLE or --app FILE"
    if not approved:
        raise _Fails(
            f"{client.folder / APPROVED}: no app is approved, so every run would be refused. Approve one: {remedy}"
        )
    if bundle and bundle.app and bundle.app not in approved:
        raise _Fails(f"the operator's app {bundle.app} is not approved. If it is the one that you agreed on: {remedy}")
    return f"{len(approved)} approved" + (", including the operator's" if bundle and bundle.app else "")


def _address(bundle: Bundle) -> str:
    try:
        with socket.create_connection((bundle.host, bundle.port), WAIT_SECONDS) as connection:
            return f"{bundle.address} answers at {connection.getpeername()[0]}"
    except OSError as error:
        raise _Fails(
            f"{bundle.address}: cannot be reached ({error}). Check that firewalls allow connections from here to it, "
            "and ask the operator whether the server runs."
        ) from error


def _certificate(bundle: Bundle) -> str:
    try:
        context = ssl.create_default_context(cafile=str(bundle.authority))
        with (
            socket.create_connection((bundle.host, bundle.port), WAIT_SECONDS) as connection,
            context.wrap_socket(connection, server_hostname=bundle.host) as secure,
        ):
            certificate = secure.getpeercert() or {}
    except ssl.SSLCertVerificationError as error:
        raise _Fails(
            f"{bundle.address}: the server's certificate is not valid ({error.verify_message}). Check that "
            f"{bundle.authority} is the operator's latest one and that this machine's clock is right. Do not start the "
            "client before this check passes."
        ) from error
    except OSError as error:
        raise _Fails(
            f"{bundle.address}: no TLS connection ({error}). Ask the operator for the right address."
        ) from error
    until = datetime.fromtimestamp(ssl.cert_time_to_seconds(str(certificate.get("notAfter"))), UTC)
    days = (until - datetime.now(UTC)).days
    if days < DAYS_LEFT:
        raise _Fails(f"{bundle.address}: the server's certificate expires on {until:%Y-%m-%d}. Tell the operator.")
    return f"for {bundle.host}, valid until {until:%Y-%m-%d}, issued by authority {bundle.authority_sha256}"


def _clock(bundle: Bundle) -> str:
    context = ssl.create_default_context(cafile=str(bundle.authority))
    connection = http.client.HTTPSConnection(bundle.host, bundle.port, timeout=WAIT_SECONDS, context=context)
    try:
        connection.request("GET", "/health")
        now, date = time.time(), connection.getresponse().headers["Date"]
        ahead = now - parsedate_to_datetime(date).timestamp()
    except (OSError, http.client.HTTPException, TypeError, ValueError) as error:
        raise _Fails(
            f"{bundle.address}: its time cannot be read ({type(error).__name__}: {error}). Ask the operator whether "
            "the server runs."
        ) from error
    finally:
        connection.close()
    if not -MOST_BEHIND_SECONDS < ahead < MOST_AHEAD_SECONDS:
        raise _Fails(
            f"this machine's clock differs by {ahead:+.0f} s from the server's, so the server would refuse its "
            "signatures, which carry the time. Synchronise the clock, for example with NTP."
        )
    return f"{ahead:+.0f} s from the server's"


def _registered(bundle: Bundle, registered: Callable[[Bundle], str]) -> str:
    if refusal := registered(bundle):
        raise _Fails(
            f"{bundle.address} refuses this key ({refusal}). If the key is not registered, send key.pub to the "
            "operator. If this client is running, stop it first; if it crashed within the last minute, wait a minute."
        )
    return "the server accepts this key"
