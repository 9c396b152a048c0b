"""Split interactions leave-one-out: a user's last item is the test target, the one before it the validation target."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedmerge.config import Split
from fedmerge.domain.interactions import Interactions
from fedmerge.errors import ConfigError, DomainError
from fedmerge.seeding import generator

MIN_EVALUATED_LENGTH = 3

HELD_OUT: dict[Split, int] = {"valid": 2, "test": 1}  # number of last items that a split's history must not contain


@dataclass(frozen=True, slots=True, eq=False)
class Examples:
    """One ranking question per user: which item follows this history?

    Attributes:
        users: (E,) int64 indices into Interactions, ascending.
        histories: E arrays of int32 item indices, oldest first, none empty.
        targets: (E,) int64 item indices.
    """

    users: npt.NDArray[np.int64]
    histories: list[npt.NDArray[np.int32]]
    targets: npt.NDArray[np.int64]

    def __len__(self) -> int:
        """Return the number of examples E."""
        return len(self.users)


def train_sequences(interactions: Interactions) -> list[npt.NDArray[np.int32]]:
    """Return each user's training items: all but the last two, or all of a user with fewer than 3 (never evaluated).

    Args:
        interactions: U users.

    Returns:
        U arrays, oldest first, in the order of the users.
    """
    sequences = [interactions.sequence(user) for user in range(interactions.num_users)]
    return [sequence[:-2] if len(sequence) >= MIN_EVALUATED_LENGTH else sequence for sequence in sequences]


def evaluation_examples(interactions: Interactions, split: Split, max_users: int | None, seed: int) -> Examples:
    """Return one split's examples. The history is the training items for "valid", plus the validation item for "test".

    Args:
        interactions: users with fewer than 3 interactions are left out.
        split: "valid" or "test".
        max_users: largest number of users, drawn without replacement; None means all.
        seed: seed of the draw, which depends only on seed, split, max_users and the number of candidates.

    Raises:
        ConfigError: an unknown split, or max_users below 1.
        DomainError: every user has fewer than 3 interactions.
    """
    if max_users is not None and max_users < 1:
        raise ConfigError(f"max_users is {max_users}, expected at least 1, or none for all users.")
    users = evaluated_users(interactions, split)
    if max_users is not None and max_users < len(users):
        users = np.sort(generator(seed, "evaluation-users", split).choice(users, max_users, replace=False))
    return examples_of(interactions, split, users)


def evaluated_users(interactions: Interactions, split: Split) -> npt.NDArray[np.int64]:
    """Return the indices of all users who can be evaluated, ascending.

    Raises:
        ConfigError: an unknown split.
        DomainError: no user has 3 interactions.
    """
    if split not in HELD_OUT:
        raise ConfigError(f"split is {split!r}, expected one of {sorted(HELD_OUT)}.")
    users = np.flatnonzero(np.diff(interactions.offsets) >= MIN_EVALUATED_LENGTH).astype(np.int64)
    if not len(users):
        raise DomainError(
            f"Split {split!r}: none of {interactions.num_users} users has {MIN_EVALUATED_LENGTH} interactions. "
            "Use a domain with longer sequences, or leave this one out of the evaluation."
        )
    return users


def examples_of(interactions: Interactions, split: Split, users: npt.NDArray[np.int64]) -> Examples:
    """Return the examples of some users of :func:`evaluated_users`."""
    last = interactions.offsets[users + 1] - HELD_OUT[split]  # row of each target
    histories = [interactions.items[start:end] for start, end in zip(interactions.offsets[users], last, strict=True)]
    return Examples(users, histories, interactions.items[last].astype(np.int64))
