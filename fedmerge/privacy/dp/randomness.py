"""Randomness of differential privacy: the operating system's, or a seed for research.

Sampling and noise do not protect against somebody who knows them. Every participant holds the experiment's seed, so a
seeded run is reproducible and guarantees nothing.
"""

import os
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from fedmerge.seeding import generator

Randomness = Literal["system", "seeded"]
Floats = npt.NDArray[np.float64]


class Source(Protocol):
    """A source of random numbers; NumPy's generators are sources."""

    def random(self, size: int) -> Floats:
        """Draw ``size`` numbers, uniform in [0, 1)."""

    def standard_normal(self, size: int) -> Floats:
        """Draw ``size`` standard normal numbers."""

    def bytes(self, length: int) -> bytes:
        """Draw ``length`` bytes."""


class SystemSource:
    """The operating system's cryptographic generator, whose draws cannot be repeated."""

    def random(self, size: int) -> Floats:
        """Draw uniform numbers in [0, 1) with 53 bits each."""
        words = np.frombuffer(os.urandom(8 * size), dtype=np.uint64)
        return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def standard_normal(self, size: int) -> Floats:
        """Draw standard normal numbers by Box and Muller."""
        pairs = (size + 1) // 2
        radius = np.sqrt(-2.0 * np.log1p(-self.random(pairs)))
        angle = 2.0 * np.pi * self.random(pairs)
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:size]

    def bytes(self, length: int) -> bytes:
        """Draw bytes."""
        return os.urandom(length)


def draw_below(drawn: Source, bound: int) -> int:
    """Draw a whole number from 0 to ``bound`` - 1, each exactly as likely, however large the bound."""
    num_bits = (bound - 1).bit_length()
    num_bytes = (num_bits + 7) // 8
    while True:
        found = int.from_bytes(drawn.bytes(num_bytes), "big") >> (8 * num_bytes - num_bits)
        if found < bound:
            return found


def source(randomness: Randomness, seed: int, *scope: str | int) -> Source:
    """Make the source for one purpose.

    Args:
        randomness: ``system``, or ``seeded``: derived from seed and scope.
    """
    return SystemSource() if randomness == "system" else generator(seed, *scope)
