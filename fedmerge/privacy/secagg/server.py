"""The server's side of a secure sum: relay messages, add the masked values, and remove the masks of the sum."""

import math
import secrets
from collections.abc import Mapping

import numpy as np

from fedmerge.errors import AggregationError
from fedmerge.privacy.secagg.crypto import PUBLIC_BYTES, SECRET_BYTES, public_key, restore_secret
from fedmerge.privacy.secagg.masks import apply_masks, pair_mask, self_mask
from fedmerge.privacy.secagg.session import SESSION_BYTES, Integers, Reals, Session, decode_mean, default_threshold
from fedmerge.privacy.secagg.state import Advertisement, Revealed


def new_session(
    weights: Mapping[str, float],
    num_values: int,
    value_range: float,
    threshold: int | None = None,
    agreement: str = "",
) -> Session:
    """Create a session with coefficients w_k / Σ w.

    Args:
        weights: client -> weight above 0.
        num_values: number of values of each client.
        value_range: largest |value| of a client.
        threshold: number of clients that must answer at the end; None means the smallest majority.
        agreement: what clients also check (:func:`fedmerge.privacy.secagg.agreement.agreement_of`).

    Raises:
        AggregationError: fewer than three clients, weights that count as fewer, or a threshold that is not a majority.
    """
    summed = math.fsum(weights[client] for client in sorted(weights))
    coefficients = {client: weight / summed for client, weight in weights.items()}
    return Session(
        secrets.token_bytes(SESSION_BYTES),
        coefficients,
        default_threshold(len(weights)) if threshold is None else threshold,
        num_values,
        value_range,
        summed,
        agreement,
    )


def check_advertisement(client: str, advertisement: Advertisement) -> None:
    """Refuse keys of another size.

    Raises:
        AggregationError: a key has another size.
    """
    sizes = (len(advertisement.channel_key), len(advertisement.mask_key))
    if sizes != (PUBLIC_BYTES, PUBLIC_BYTES):
        raise AggregationError(
            f"secure sum, client {client}: found keys of {sizes[0]} and {sizes[1]} bytes, expected {PUBLIC_BYTES}; use "
            "one fedmerge version everywhere"
        )


def check_boxes(client: str, boxes: Mapping[str, bytes], advertisements: Mapping[str, Advertisement]) -> None:
    """Refuse sealed shares that are not for every other client.

    Raises:
        AggregationError: shares are missing or unexpected.
    """
    expected = advertisements.keys() - {client}
    if boxes.keys() != expected:
        raise AggregationError(
            f"secure sum, client {client}: found shares for {', '.join(sorted(boxes)) or 'no client'}, expected them "
            f"for {', '.join(sorted(expected))}; use one fedmerge version everywhere"
        )


def add_values(session: Session, client: str, total: Integers, values: Integers) -> Integers:
    """Return the sum with one more client's masked values.

    Raises:
        AggregationError: another number or type of values.
    """
    if values.shape != total.shape or values.dtype != np.uint32:
        raise AggregationError(
            f"secure sum, client {client}: found {values.dtype} values of shape {values.shape}, expected uint32 of "
            f"({session.num_values},); use one fedmerge version everywhere"
        )
    return total + values


def check_revealed(client: str, revealed: Revealed, survivors: frozenset[str], shared: frozenset[str]) -> None:
    """Refuse shares of other secrets than requested.

    Raises:
        AggregationError: the shares differ from the request.
    """
    found = (set(revealed.self_masks), set(revealed.mask_keys))
    expected = (set(survivors), set(shared - survivors))
    sizes = {len(each) for part in (revealed.self_masks, revealed.mask_keys) for each in part.values()}
    if found != expected or sizes != {SECRET_BYTES}:
        raise AggregationError(
            f"secure sum, client {client}: found shares of {len(found[0])} self masks and {len(found[1])} mask keys of "
            f"{sorted(sizes)} bytes, expected {len(expected[0])} and {len(expected[1])} of {SECRET_BYTES}, for the "
            "requested clients; use one fedmerge version everywhere"
        )


def weighted_mean(
    session: Session,
    advertisements: Mapping[str, Advertisement],
    shared: frozenset[str],
    survivors: frozenset[str],
    total: Integers,
    revealed: Mapping[str, Revealed],
) -> Reals:
    """Return Σ p_k x_k / Σ p_k over the survivors, to ``session.tolerance`` / Σ p_k.

    Args:
        session: session of the sum.
        advertisements: client -> keys.
        shared: clients whose shares were relayed, and who therefore mask each other.
        survivors: clients whose masked values are in the sum.
        total: (num_values,), sum of the survivors' masked values.
        revealed: client -> revealed shares, of at least ``threshold`` clients.

    Raises:
        AggregationError: too few clients or shares, shares that do not match a client's key, or masks that do not
            cancel.
    """
    session.check_survivors(survivors, shared, "masked values")
    if len(revealed) < session.threshold:
        raise AggregationError(
            f"secure sum, unmasking: found answers of {len(revealed)} clients ({', '.join(sorted(revealed))}), "
            f"expected at least {session.threshold}; start again with fresh keys when more clients are connected"
        )
    numbers = {client: session.number(client) for client in revealed}
    total = total.copy()
    for client in sorted(survivors):
        shares = {numbers[teller]: told.self_masks[client] for teller, told in revealed.items()}
        total -= self_mask(session, restore_secret(shares, session.threshold))
    nothing = np.zeros(session.num_values, np.uint32)
    for client in sorted(shared - survivors):
        shares = {numbers[teller]: told.mask_keys[client] for teller, told in revealed.items()}
        secret = restore_secret(shares, session.threshold)
        if public_key(secret) != advertisements[client].mask_key:
            raise AggregationError(
                f"secure sum: found shares that do not restore the advertised mask key of {client}, which dropped out; "
                "a client sent a wrong share. Start again"
            )
        pairs = {peer: pair_mask(session, client, secret, peer, advertisements[peer].mask_key) for peer in survivors}
        total += apply_masks(nothing, nothing, pairs, client)  # what it would have added: the others' part cancels
    return decode_mean(session, total, survivors)
