"""Where the randomness of differential privacy comes from: the operating system, or, for research, a seed.

Sampling and noise protect nobody from those who know them. A seed is part of the experiment, which every participant
holds, so a seeded run is reproducible and gives no guarantee.
"""

import os
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from fedmerge.seeding import generator

Randomness = Literal["system", "seeded"]
Floats = npt.NDArray[np.float64]


class Source(Protocol):
    """What is drawn from; NumPy's generators are sources."""

    def random(self, size: int) -> Floats:
        """``size`` numbers, uniform in [0, 1)."""

    def standard_normal(self, size: int) -> Floats:
        """``size`` standard normal numbers."""


class SystemSource:
    """The operating system's cryptographic generator; nobody can draw the same again."""

    def random(self, size: int) -> Floats:
        """Uniform in [0, 1), 53 bits each."""
        words = np.frombuffer(os.urandom(8 * size), dtype=np.uint64)
        return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def standard_normal(self, size: int) -> Floats:
        """By Box and Muller."""
        pairs = (size + 1) // 2
        radius = np.sqrt(-2.0 * np.log1p(-self.random(pairs)))
        angle = 2.0 * np.pi * self.random(pairs)
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:size]


def source(randomness: Randomness, seed: int, *scope: str | int) -> Source:
    """The source for one purpose.

    Args:
        randomness: ``system``, or ``seeded``: derived from seed and scope as everything else in an experiment.
    """
    return SystemSource() if randomness == "system" else generator(seed, *scope)
