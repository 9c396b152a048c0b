"""The masks of a secure sum, as clients put them on and the server takes them off."""

from collections.abc import Mapping

from fedmerge.privacy.secagg.crypto import agreed_key, mask
from fedmerge.privacy.secagg.session import Integers, Session


def masked(values: Integers, own: Integers, pairs: Mapping[str, Integers], client: str) -> Integers:
    """values + own + Σ_{peer > client} pair − Σ_{peer < client} pair, modulo 2^32: pairs cancel in the sum."""
    total = values + own
    for peer, pair in pairs.items():
        if client < peer:
            total += pair
        else:
            total -= pair
    return total


def self_mask(session: Session, secret: bytes) -> Integers:
    """The mask that a client alone knows."""
    return mask(secret, session.num_values, b"self", session.identifier)


def pair_mask(session: Session, client: str, secret: bytes, peer: str, key: bytes) -> Integers:
    """The mask that two clients know, from one's secret and the other's public key; the same from both sides."""
    pair = [name.encode() for name in sorted((client, peer))]
    agreed = agreed_key(secret, key, b"pair", session.identifier, *pair)
    return mask(agreed, session.num_values, b"pair", session.identifier)
