"""The masks of a secure sum, added by clients and removed by the server."""

from collections.abc import Mapping

from fedmerge.privacy.secagg.crypto import agree_on_key, mask
from fedmerge.privacy.secagg.session import Integers, Session


def apply_masks(values: Integers, own: Integers, pairs: Mapping[str, Integers], client: str) -> Integers:
    """Return values + own + Σ_{peer > client} pair − Σ_{peer < client} pair, modulo 2^32: pairs cancel in the sum."""
    total = values + own
    for peer, pair in pairs.items():
        if client < peer:
            total += pair
        else:
            total -= pair
    return total


def self_mask(session: Session, secret: bytes) -> Integers:
    """Return the mask that only a client knows."""
    return mask(secret, session.num_values, b"self", session.digest)


def pair_mask(session: Session, client: str, secret: bytes, peer: str, key: bytes) -> Integers:
    """Return the mask of two clients, from one's secret and the other's public key; both sides get the same."""
    pair = [name.encode() for name in sorted((client, peer))]
    agreed = agree_on_key(secret, key, b"pair", session.digest, *pair)
    return mask(agreed, session.num_values, b"pair", session.digest)
