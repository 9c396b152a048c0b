"""The public parameters of one secure sum, and its arithmetic: fixed-point integers modulo 2^32.

A real x in ±range of the client with coefficient p becomes q = round(p · x · scale), with scale = (2^30 − K) / range.
As Σ p = 1 over the K clients, |Σ q| ≤ 2^30 − K + K/2 < 2^30: no partial sum can overflow. The other half of the
integers is unused on purpose: if masks do not cancel, half of the values of the sum lie there.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedmerge.config import MIN_SUMMED
from fedmerge.errors import AggregationError

LARGEST_SHARE = 0.5  # largest share of one client in the sum of the coefficients
SESSION_BYTES = 32
_HALF = 2**30

Integers = NDArray[np.uint32]
Reals = NDArray[np.float64]


@dataclass(frozen=True)
class Session:
    """The public parameters of one secure sum. Signatures, keys, masks and sealed shares are bound to all of them.

    Attributes:
        identifier: 32 random bytes.
        coefficients: client -> p_k in (0, 1] with a sum of 1; values are multiplied by it before summing.
        threshold: t, number of clients that must answer at the end; t − 1 clients together learn only the sum.
        num_values: number of values of each client.
        value_range: largest |value| of a client; larger ones are cut to it.
        total_weight: Σ w_k, of which p_k = w_k / Σ w_k is a client's part.
        agreement: run, round, weighing and noise, in the same form at all clients.
    """

    identifier: bytes
    coefficients: Mapping[str, float]
    threshold: int
    num_values: int
    value_range: float
    total_weight: float = 1.0
    agreement: str = ""

    def __post_init__(self) -> None:
        """Refuse sessions that no client should join.

        Raises:
            AggregationError: a parameter is out of range.
        """
        object.__setattr__(self, "coefficients", dict(sorted(self.coefficients.items())))
        num_clients = len(self.coefficients)
        if len(self.identifier) != SESSION_BYTES:
            raise _refused(f"an identifier of {len(self.identifier)} bytes", f"{SESSION_BYTES}")
        if num_clients < MIN_SUMMED:
            raise _refused(f"{num_clients} clients", f"at least {MIN_SUMMED}: with two, each learns the other's values")
        if not num_clients // 2 < self.threshold <= num_clients:
            raise _refused(
                f"a threshold of {self.threshold}",
                f"{num_clients // 2 + 1} to {num_clients}, more than half of the {num_clients} clients, so that two "
                "halves cannot be given different requests",
            )
        positive = all(0 < each <= 1 for each in self.coefficients.values())
        if not positive or not math.isclose(math.fsum(self.coefficients.values()), 1, rel_tol=1e-9):
            raise _refused(
                f"coefficients {', '.join(f'{each:g}' for each in self.coefficients.values())}",
                "numbers above 0 that sum to 1",
            )
        check_spread(self.coefficients, "session")
        if self.num_values < 1 or not 0 < self.value_range < math.inf:
            raise _refused(f"{self.num_values} values in ±{self.value_range:g}", "at least one, and a range above 0")
        if not 0 < self.total_weight < math.inf:
            raise _refused(f"a total weight of {self.total_weight:g}", "a number above 0")

    @property
    def clients(self) -> tuple[str, ...]:
        """Return the names of all K clients, sorted."""
        return tuple(self.coefficients)

    @property
    def digest(self) -> bytes:
        """SHA-256 of all parameters in their canonical form: two sessions that differ in anything differ in it."""
        facts = {
            "identifier": self.identifier.hex(),
            "coefficients": {client: part.hex() for client, part in self.coefficients.items()},
            "threshold": self.threshold,
            "num_values": self.num_values,
            "value_range": float(self.value_range).hex(),
            "total_weight": float(self.total_weight).hex(),
            "agreement": self.agreement,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).digest()

    @property
    def scale(self) -> float:
        """Return the integers per unit."""
        return (_HALF - len(self.coefficients)) / self.value_range

    @property
    def tolerance(self) -> float:
        """Return the largest rounding error of a sum over all clients: K / (2 scale)."""
        return len(self.coefficients) / (2 * self.scale)

    def number(self, client: str) -> int:
        """Return a client's number, from 1: the point of the polynomial that is its share.

        Raises:
            AggregationError: the client is not part of the session.
        """
        if client not in self.coefficients:
            raise AggregationError(
                f"secure sum: found client {client!r}, expected one of {', '.join(self.clients)}; the clients of a "
                "session are fixed at its start"
            )
        return self.clients.index(client) + 1

    def check_survivors(self, survivors: frozenset[str], among: frozenset[str], what: str) -> None:
        """Refuse to continue with too few clients, a client that was absent before, or weights that count as too few.

        Raises:
            AggregationError: one of these holds.
        """
        if strange := sorted(survivors - among):
            raise AggregationError(
                f"secure sum, {what}: found {', '.join(strange)}, expected some of {', '.join(sorted(among))}; a "
                "client that dropped out cannot rejoin"
            )
        needed = max(self.threshold, MIN_SUMMED)
        if len(survivors) < needed:
            raise AggregationError(
                f"secure sum, {what}: found {len(survivors)} of {len(self.coefficients)} clients "
                f"({', '.join(sorted(survivors)) or 'none'}), expected at least {needed}; start again with "
                "fresh keys when more clients are connected"
            )
        check_spread({client: self.coefficients[client] for client in survivors}, what)


def check_spread(weights: Mapping[str, float], what: str) -> None:
    """Refuse weights under which the mean is little more than the values of one or two clients.

    The effective number of clients is (Σ w)² / Σ w²: K for K equal weights, less for all others.

    Args:
        weights: client -> its weight in the sum.
        what: the step, for the message.

    Raises:
        AggregationError: the effective number is below three, or one client has more than half of the sum.
    """
    summed = math.fsum(weights.values())
    effective = summed**2 / math.fsum(weight**2 for weight in weights.values()) if weights else 0.0
    largest = max(sorted(weights), key=weights.__getitem__, default="")
    share = weights[largest] / summed if weights else 0.0
    if effective < MIN_SUMMED * (1 - 1e-9) or share > LARGEST_SHARE * (1 + 1e-9):
        raise AggregationError(
            f"secure sum, {what}: found {len(weights)} clients that weigh as much as {effective:.3g} equal ones, the "
            f"largest {largest} with {share:.0%} of the sum; expected at least {MIN_SUMMED}, and at most "
            f"{LARGEST_SHARE:.0%} for one: the mean would be little more than the values of a few. Weigh all alike "
            "(rounds.weights = 'equal'), or have more clients"
        )


def num_outside(session: Session, values: NDArray[np.floating]) -> int:
    """Count the values that :func:`encode_values` cuts to the range."""
    return int((np.abs(values) > session.value_range).sum())


def default_threshold(num_clients: int) -> int:
    """Return the smallest majority: ⌊K/2⌋ + 1."""
    return num_clients // 2 + 1


def encode_values(session: Session, client: str, values: NDArray[np.floating]) -> Integers:
    """Encode a client's values, times its coefficient, as integers modulo 2^32.

    Args:
        session: session of the sum.
        client: client whose coefficient applies.
        values: (num_values,).

    Values out of range are cut to it. A refusal would travel, and the server, which sets the range, could find the
    largest value by asking again and again.

    Raises:
        AggregationError: another number of values, or one that is not finite, whatever the session says.
    """
    if values.shape != (session.num_values,):
        raise AggregationError(
            f"secure sum, client {client}: found values of shape {values.shape}, expected ({session.num_values},); use "
            "the same lora settings everywhere"
        )
    if not bool(np.isfinite(values).all()):
        raise AggregationError(
            f"secure sum, client {client}: found values that are not finite; its training diverged. Lower "
            "train.learning_rate"
        )
    inside = np.clip(np.asarray(values, np.float64), -session.value_range, session.value_range)
    integers = np.rint(inside * (session.coefficients[client] * session.scale))
    return integers.astype(np.int64).astype(np.uint32)


def decode_mean(session: Session, total: Integers, survivors: frozenset[str]) -> Reals:
    """Decode the weighted mean Σ p_k x_k / Σ p_k over the survivors.

    Args:
        session: session of the sum.
        total: (num_values,), the sum without masks.
        survivors: clients whose values are in the sum.

    Raises:
        AggregationError: the sum is out of range, so some masks did not cancel.
    """
    signed = total.view(np.int32)
    if bool((np.abs(signed.astype(np.int64)) >= _HALF).any()):
        raise AggregationError(
            "secure sum: found a sum out of range, expected all masks to cancel; a client sent a wrong share or masked "
            "value. Start again; the log of each client shows its answers"
        )
    share = math.fsum(session.coefficients[client] for client in sorted(survivors))
    return signed / (session.scale * share)


def _refused(found: str, expected: str) -> AggregationError:
    return AggregationError(f"secure sum: found {found}, expected {expected}; set up the sum again")
