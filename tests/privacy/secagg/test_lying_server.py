"""A server that tells the clients of a secure sum different things, to read one adapter off it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from fedmerge.errors import AggregationError
from fedmerge.privacy.secagg.client import advertise, mask_values, share, unmask
from fedmerge.privacy.secagg.server import add_values, new_session, weighted_mean
from fedmerge.privacy.secagg.session import Session
from fedmerge.privacy.secagg.state import state_from_text, state_to_text

VICTIM, OTHERS = "a", ("b", "c", "d")
CLIENTS = (VICTIM, *OTHERS)

Vector = NDArray[np.float64]


def honest_session(**changes: Any) -> Session:
    arguments: dict[str, Any] = {"weights": dict.fromkeys(CLIENTS, 1.0), "num_values": 30, "value_range": 8.0}
    return new_session(**arguments | changes)


def adapters() -> dict[str, Vector]:
    rng = np.random.default_rng(0)
    return {client: rng.uniform(-0.1, 0.1, 30) for client in CLIENTS}


def run_lying_server(
    told: Mapping[str, Session], read_as: Session, values: Mapping[str, Vector], *, signed: bool
) -> NDArray[np.float64]:
    """Tell every client the session in ``told``, and read the sum by ``read_as``.

    Args:
        told: client -> the session that the server announces to it.
        read_as: whose masks and coefficients the server takes off the sum.
        values: client -> its adapter.
        signed: every client signs, and knows the keys of all from their owners.
    """
    identities = {client: Ed25519PrivateKey.generate() for client in told} if signed else {}
    registered = {client: identity.public_key() for client, identity in identities.items()} if signed else None
    states, keys = {}, {}
    for client, session in told.items():
        states[client], keys[client] = advertise(session, client, identities.get(client))
    boxes = {}
    for client in told:
        states[client], boxes[client] = share(states[client], keys, registered)
    total = np.zeros(read_as.num_values, np.uint32)
    for client in told:
        relayed = {peer: boxes[peer][client] for peer in told if peer != client}
        states[client], masked = mask_values(states[client], relayed, values[client])
        total = add_values(read_as, client, total, masked)
    revealed = {client: unmask(states[client], sorted(told)) for client in told}
    return weighted_mean(read_as, keys, frozenset(told), frozenset(told), total, revealed)


def read_victim(told: Mapping[str, Session], *, signed: bool) -> None:
    """Attack, and fail the test if the server comes to know the victim's adapter."""
    values = adapters()
    seen = run_lying_server(told, told[VICTIM], values, signed=signed)
    mean = sum(told[VICTIM].coefficients[client] * values[client] for client in CLIENTS)
    error = np.abs(seen / told[VICTIM].coefficients[VICTIM] - values[VICTIM]).max()
    pytest.fail(f"the server knows the victim's adapter to {error:.1e}; its mean is off by {np.abs(seen - mean).max()}")


SIGNED = pytest.mark.parametrize("signed", [True, False], ids=["registered keys", "no keys"])


@SIGNED
def test_other_coefficients_for_the_others_single_out_nobody(signed: bool) -> None:
    """The victim hears an equal sum, the others that all weigh next to nothing, so only the victim is in the sum."""

    def attack() -> None:
        session = honest_session()
        little = replace(session, coefficients=dict.fromkeys(CLIENTS, 1e-12))
        read_victim({client: session if client == VICTIM else little for client in CLIENTS}, signed=signed)

    with pytest.raises(AggregationError, match="1e-12"):
        attack()


ANOTHER: dict[str, dict[str, Any]] = {
    "coefficients": {"coefficients": {"a": 0.25, "b": 0.25, "c": 0.2, "d": 0.3}},
    "threshold": {"threshold": 4},
    "range": {"value_range": 1e4},
    "total weight": {"total_weight": 8.0},
    "agreement": {"agreement": "without noise"},
}


@SIGNED
@pytest.mark.parametrize("changes", ANOTHER.values(), ids=ANOTHER)
def test_clients_that_hear_different_sessions_send_no_masked_value(changes: dict[str, Any], signed: bool) -> None:
    """Each session is one that a client accepts by itself; the victim's differs from that of the others."""
    session = honest_session()
    other = replace(session, **changes)
    told = {client: session if client == VICTIM else other for client in CLIENTS}
    with pytest.raises(AggregationError, match="sign" if signed else "seal") as caught:
        read_victim(told, signed=signed)
    assert caught.traceback[-1].name in ("_check_signatures", "unseal")


def test_clients_that_hear_of_different_keys_send_no_masked_value() -> None:
    """The server leaves one client out of what it tells some of the others."""
    session, values = honest_session(), adapters()
    made = {client: advertise(session, client) for client in CLIENTS}
    keys = {client: keys for client, (_, keys) in made.items()}
    told = {client: {peer: keys[peer] for peer in CLIENTS if client == VICTIM or peer != "d"} for client in "abc"}
    shared = {client: share(made[client][0], told[client]) for client in "abc"}
    relayed = {peer: shared[peer][1][VICTIM] for peer in "bc"}
    with pytest.raises(AggregationError, match="sealed"):
        mask_values(shared[VICTIM][0], relayed, values[VICTIM])


def test_every_parameter_changes_the_digest() -> None:
    session = honest_session()
    digests = {replace(session, **changes).digest for changes in ANOTHER.values()}
    digests |= {session.digest, replace(session, identifier=bytes(32)).digest, replace(session, num_values=31).digest}
    assert len(digests) == len(ANOTHER) + 3
    assert (
        replace(session, coefficients=dict(sorted(session.coefficients.items(), reverse=True))).digest == session.digest
    )
    assert state_from_text(state_to_text(advertise(session, VICTIM)[0])).session.digest == session.digest
