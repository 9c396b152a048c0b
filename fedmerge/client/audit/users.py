"""The users of an audited training, drawn from the experiment's seed: left-out users and canaries."""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from fedmerge.client.local_domain import LocalDomain
from fedmerge.config import Simulation
from fedmerge.seeding import generator

CANARY_LENGTH = 4  # items of a planted user

Sequences = tuple[npt.NDArray[np.int32], ...]


@dataclass(frozen=True)
class Canaries:
    """Fictitious users with random items: some are planted into the training, as many are held back to compare."""

    planted: Sequences
    compared: Sequences


def prepare_for_audit(domain: LocalDomain, simulation: Simulation, seed: int) -> LocalDomain:
    """Return the domain with users left out of training and canaries planted."""
    users = left_out_users(domain.manifest.name, domain.interactions.num_users, simulation.held_out_users, seed)
    return replace(domain, left_out=users, planted=canaries(domain, simulation.canaries, seed).planted)


def left_out_users(name: str, num_users: int, share: float, seed: int) -> npt.NDArray[np.bool_]:
    """Draw the users to leave out, (U,), the same ones for every call with this seed."""
    out = np.zeros(num_users, dtype=np.bool_)
    out[generator(seed, "audit", "left-out", name).permutation(num_users)[: round(share * num_users)]] = True
    return out


def canaries(domain: LocalDomain, count: int, seed: int) -> Canaries:
    """Draw canaries of uniformly random items, so that only training on them makes their targets likely."""
    num_items = len(domain.table)
    drawn = generator(seed, "audit", "canaries", domain.manifest.name)
    sequences = [drawn.integers(0, num_items, CANARY_LENGTH).astype(np.int32) for _ in range(2 * count)]
    return Canaries(tuple(sequences[:count]), tuple(sequences[count:]))
