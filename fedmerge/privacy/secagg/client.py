"""The client's side of a secure sum: four answers, each computed from its state and the relayed answers of the others.

    advertise    send two public keys
    share        send every other client, sealed, a share of the mask key's secret and a share of the self mask
    mask_values  send values + self mask ± a pair mask with every other client that has shared
    unmask       send a share of the self mask of every client in the sum, and of the mask key of every other one

Both secrets of a client together remove its masks. Therefore a client reveals a share of only one of the two, answers
each question once, and only for a sum of enough clients.

Signatures, agreed keys, masks and sealed shares are bound to the whole session (:attr:`Session.digest`), and sealed
shares also to the keys of all clients. Clients that are told different things therefore reject each other's signatures
or cannot open each other's shares, and no masked value leaves.

Source: Bonawitz et al., CCS 2017, https://doi.org/10.1145/3133956.3133982, protocol of figure 4 for honest-but-curious
    parties, with the signatures of round 0; all pairs mask each other.
Differs: every client also keeps a share of its own secrets, so that any t clients suffice at the end.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from numpy.typing import NDArray

from fedmerge.errors import AggregationError, PolicyError
from fedmerge.privacy.secagg.crypto import (
    SECRET_BYTES,
    agree_on_key,
    new_secret,
    public_key,
    seal,
    split_secret,
    unseal,
)
from fedmerge.privacy.secagg.masks import apply_masks, pair_mask, self_mask
from fedmerge.privacy.secagg.session import Integers, Session, encode_values
from fedmerge.privacy.secagg.state import Advertisement, ClientState, Revealed, Shares, Step


def advertise(
    session: Session, client: str, identity: Ed25519PrivateKey | None = None
) -> tuple[ClientState, Advertisement]:
    """Create fresh keys.

    Args:
        session: the session announced by the server; its constructor validates it.
        client: name of this client.
        identity: signing key that the others know as this client's.

    Raises:
        AggregationError: the session does not include this client.
    """
    session.number(client)
    state = ClientState(session, client, "advertised", new_secret(), new_secret(), new_secret())
    advertisement = Advertisement(public_key(state.channel_secret), public_key(state.mask_secret))
    if identity is not None:
        signature = identity.sign(_signed_text(session, client, advertisement))
        advertisement = replace(advertisement, signature=signature)
    return state, advertisement


def share(
    state: ClientState,
    advertisements: Mapping[str, Advertisement],
    registered: Mapping[str, Ed25519PublicKey] | None = None,
) -> tuple[ClientState, dict[str, bytes]]:
    """Split this client's secrets into shares, sealed for every other client.

    Args:
        state: state after :func:`advertise`.
        advertisements: keys of all participating clients.
        registered: client -> verification key, obtained independently of the server; None if keys are unsigned.

    Returns:
        The next state, and client -> sealed shares.

    Raises:
        AggregationError: too few clients, other keys under this client's name, keys that two clients share, a missing
            or wrong signature, or a question out of order.
    """
    session = state.session
    _expect(state, "advertised", "share")
    session.check_survivors(frozenset(advertisements), frozenset(session.clients), "keys")
    own = advertisements.get(state.client)
    if (
        own is None
        or own.channel_key != public_key(state.channel_secret)
        or own.mask_key != public_key(state.mask_secret)
    ):
        raise AggregationError(
            f"secure sum, client {state.client}: found other keys under its name, expected the ones it sent; "
            "they were replaced on the way. Stop this run and check the server"
        )
    keys = [key for each in advertisements.values() for key in (each.channel_key, each.mask_key)]
    if len(set(keys)) < len(keys):
        raise AggregationError(
            f"secure sum, client {state.client}: found a repeated key, expected two different keys of every client; "
            "one party may pose as several clients. Stop this run and check the server"
        )
    if registered is not None:
        _check_signatures(session, advertisements, registered)
    split = [
        dict(zip(session.clients, split_secret(secret, session.threshold, len(session.clients)), strict=True))
        for secret in (state.mask_secret, state.self_secret)
    ]
    kept = Shares(split[0][state.client], split[1][state.client])
    state = replace(state, step="shared", advertisements=dict(advertisements), own=kept)
    boxes = {
        peer: seal(
            _channel(state, peer, advertisements[peer]),
            split[0][peer] + split[1][peer],
            _about(state, state.client, peer),
        )
        for peer in sorted(advertisements.keys() - {state.client})
    }
    return state, boxes


def mask_values(
    state: ClientState, boxes: Mapping[str, bytes], values: NDArray[np.floating]
) -> tuple[ClientState, Integers]:
    """Mask the client's values: they look uniform without both secrets.

    Args:
        state: state after :func:`share`.
        boxes: client -> shares that it sealed for this client, from all that have shared.
        values: (num_values,), not yet multiplied by the coefficient.

    Returns:
        The next state, and (num_values,) integers modulo 2^32.

    Raises:
        AggregationError: too few clients, a box that cannot be unsealed, values that are not finite, or a question out
            of order.
    """
    session = state.session
    _expect(state, "shared", "mask")
    shared = frozenset(boxes) | {state.client}
    session.check_survivors(shared, frozenset(state.advertisements), "shares")
    held = {state.client: _own(state)}
    for peer, box in sorted(boxes.items()):
        if peer == state.client:
            continue
        text = unseal(_channel(state, peer, state.advertisements[peer]), box, _about(state, peer, state.client))
        if len(text) != 2 * SECRET_BYTES:
            raise AggregationError(
                f"secure sum, client {state.client}: found {len(text)} bytes of shares from {peer}, expected "
                f"{2 * SECRET_BYTES}; use one fedmerge version everywhere"
            )
        held[peer] = Shares(text[:SECRET_BYTES], text[SECRET_BYTES:])
    keys = {peer: state.advertisements[peer].mask_key for peer in shared - {state.client}}
    pairs = {peer: pair_mask(session, state.client, state.mask_secret, peer, key) for peer, key in keys.items()}
    total = apply_masks(
        encode_values(session, state.client, values), self_mask(session, state.self_secret), pairs, state.client
    )
    return replace(state, step="masked", held=held), total


def unmask(state: ClientState, survivors: Sequence[str]) -> Revealed:
    """Reveal one share, of either secret, of every client that has shared; the state must be deleted afterwards.

    Args:
        state: state after :func:`mask_values`.
        survivors: clients whose masked values are in the sum.

    Raises:
        AggregationError: too few survivors, or a question out of order.
        PolicyError: the survivors do not include this client.
    """
    _expect(state, "masked", "unmask")
    summed = frozenset(survivors)
    state.session.check_survivors(summed, frozenset(state.held), "masked values")
    if state.client not in summed:
        raise PolicyError(
            f"secure sum, client {state.client}: the server did not include its masked values in the sum, so it "
            "reveals nothing. They arrived too late, or the request would remove its masks; start again"
        )
    return Revealed(
        {peer: shares.self_mask for peer, shares in state.held.items() if peer in summed},
        {peer: shares.mask_key for peer, shares in state.held.items() if peer not in summed},
    )


def _expect(state: ClientState, step: Step, question: str) -> None:
    if state.step != step:
        raise AggregationError(
            f"secure sum, client {state.client}: found the question {question!r} after it {state.step}, expected it "
            f"once, after it {step}; a second answer could remove its masks. Start again with fresh keys"
        )


def _own(state: ClientState) -> Shares:
    if state.own is None:
        raise AggregationError(f"secure sum, client {state.client}: found no shares of its own; start again")
    return state.own


def _channel(state: ClientState, peer: str, advertisement: Advertisement) -> bytes:
    pair = [name.encode() for name in sorted((state.client, peer))]
    return agree_on_key(state.channel_secret, advertisement.channel_key, b"channel", state.session.digest, *pair)


def _about(state: ClientState, sender: str, receiver: str) -> bytes:
    """Return what a box is bound to: the session, the keys of all clients, who sealed it, and for whom."""
    keys = {peer: [each.channel_key.hex(), each.mask_key.hex()] for peer, each in state.advertisements.items()}
    return json.dumps([state.session.digest.hex(), keys, sender, receiver], sort_keys=True).encode()


def _signed_text(session: Session, client: str, advertisement: Advertisement) -> bytes:
    keys = [advertisement.channel_key.hex(), advertisement.mask_key.hex()]
    return json.dumps(["fedmerge secure sum 2", session.digest.hex(), client, *keys]).encode()


def _check_signatures(
    session: Session, advertisements: Mapping[str, Advertisement], registered: Mapping[str, Ed25519PublicKey]
) -> None:
    for peer, advertisement in sorted(advertisements.items()):
        key = registered.get(peer)
        try:
            if key is None:
                raise AggregationError(
                    f"secure sum: found no registered key of {peer}, expected one of every client; obtain it from its "
                    "owner, not from the server"
                )
            key.verify(advertisement.signature, _signed_text(session, peer, advertisement))
        except InvalidSignature as error:
            raise AggregationError(
                f"secure sum: found keys that {peer} has not signed for this session, expected its signature; they "
                "were replaced on the way. Stop this run and check the server"
            ) from error
