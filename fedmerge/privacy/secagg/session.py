"""The public parameters of one secure sum, and its arithmetic: fixed-point integers modulo 2^32.

A real x in ±range of the client with coefficient p becomes q = round(p · x · scale), with scale = (2^30 − K) / range.
As Σ p ≤ 1 over the K clients, |Σ q| ≤ 2^30 − K + K/2 < 2^30: no partial sum can overflow. The other half of the
integers is unused on purpose: if masks do not cancel, half of the values of the sum lie there.
"""

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
    """The public parameters of one secure sum.

    Attributes:
        identifier: 32 random bytes; every key and mask is bound to it.
        coefficients: client -> p_k in (0, 1] with a sum of at most 1; values are multiplied by it before summing.
        threshold: t, number of clients that must answer at the end; t − 1 clients together learn only the sum.
        num_values: number of values of each client.
        value_range: largest |value| of a client.
    """

    identifier: bytes
    coefficients: Mapping[str, float]
    threshold: int
    num_values: int
    value_range: float

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
        if not positive or math.fsum(self.coefficients.values()) > 1 + 1e-9:
            raise _refused(
                f"coefficients {', '.join(f'{each:g}' for each in self.coefficients.values())}",
                "numbers above 0 that sum to at most 1",
            )
        if self.num_values < 1 or not 0 < self.value_range < math.inf:
            raise _refused(f"{self.num_values} values in ±{self.value_range:g}", "at least one, and a range above 0")

    @property
    def clients(self) -> tuple[str, ...]:
        """Return the names of all K clients, sorted."""
        return tuple(self.coefficients)

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
        """Refuse to continue with too few clients, a client that was absent before, or one that outweighs the others.

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
        summed = math.fsum(self.coefficients[client] for client in sorted(survivors))
        largest = max(sorted(survivors), key=self.coefficients.__getitem__)
        if self.coefficients[largest] > LARGEST_SHARE * summed * (1 + 1e-9):
            raise AggregationError(
                f"secure sum, {what}: found {largest} with {self.coefficients[largest] / summed:.0%} of the sum, "
                f"expected at most {LARGEST_SHARE:.0%}: the mean would mostly show its own values. Weight all "
                "clients equally (rounds.weights = 'equal')"
            )


def default_threshold(num_clients: int) -> int:
    """Return the smallest majority: ⌊K/2⌋ + 1."""
    return num_clients // 2 + 1


def encode_values(session: Session, client: str, values: NDArray[np.floating]) -> Integers:
    """Encode a client's values, times its coefficient, as integers modulo 2^32.

    Args:
        session: session of the sum.
        client: client whose coefficient applies.
        values: (num_values,).

    Raises:
        AggregationError: another number of values, or a value that is not finite or out of range. The message is sent
            to the server, so it contains no values.
    """
    if values.shape != (session.num_values,):
        raise AggregationError(
            f"secure sum, client {client}: found values of shape {values.shape}, expected ({session.num_values},); use "
            "the same lora settings everywhere"
        )
    if not bool((np.abs(values) <= session.value_range).all()):  # NaN is not
        raise AggregationError(
            f"secure sum, client {client}: found values that are not finite or out of ±{session.value_range:g}, "
            "expected all within; clipping them would falsify the sum. Its training diverged: lower "
            "train.learning_rate"
        )
    integers = np.rint(np.asarray(values, np.float64) * (session.coefficients[client] * session.scale))
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
