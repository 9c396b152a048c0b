"""Random generators derived from (seed, purpose, ids), never from call order, worker or process."""

import hashlib

import numpy as np


def derive(seed: int, *scope: str | int) -> int:
    """Derive a 63-bit seed for one purpose.

    Args:
        seed: seed of the experiment.
        scope: purpose of the randomness, e.g. ``"client", "Beauty", 0``.

    Returns:
        The first 63 bits of SHA-256 over the parts. Equal parts give equal seeds on every machine.
    """
    text = "\x1f".join([str(seed), *(f"{type(part).__name__}:{part}" for part in scope)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *scope: str | int) -> np.random.Generator:
    """Make a NumPy generator for one purpose; see :func:`derive`."""
    return np.random.default_rng(derive(seed, *scope))
