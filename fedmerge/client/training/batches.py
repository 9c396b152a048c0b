"""Batches of a client's users."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedmerge.config import Train
from fedmerge.seeding import generator

BATCHES_PER_BUCKET = 16  # batches are formed by length among this many batches of randomly drawn users


@dataclass(frozen=True)
class Batch:
    """One training batch: b histories (oldest first), their targets, and their users' numbers among the sequences."""

    histories: list[npt.NDArray[np.int32]]
    targets: npt.NDArray[np.int64]
    users: npt.NDArray[np.int64]


def training_batches(
    sequences: list[npt.NDArray[np.int32]], settings: Train, seed: int, *scope: str | int
) -> Iterator[tuple[Batch, float]]:
    """Draw endless epochs over the users from seed and scope; yield each batch with the epochs done after it.

    An epoch has every user once. Users of similar length share a batch, among BATCHES_PER_BUCKET batches of users
    drawn at random.
    """
    per_epoch = num_batches(len(sequences), settings.batch_size)
    for epoch in itertools.count():
        rng = generator(seed, "client", *scope, "epoch", epoch)
        cuts = [len(sequence) - 1 for sequence in sequences]
        if settings.samples == "random-prefix":
            cuts = rng.integers(1, np.asarray(cuts) + 1).tolist()
        users = rng.permutation(len(sequences))
        sizes = np.array([len(part) for part in np.array_split(users, per_epoch)])
        done = 0
        for of_bucket in np.array_split(sizes, math.ceil(per_epoch / BATCHES_PER_BUCKET)):
            bucket, users = np.split(users, [of_bucket.sum()])
            by_length = bucket[np.argsort([cuts[user] for user in bucket], kind="stable")]
            batches = np.split(by_length, np.cumsum(of_bucket)[:-1])
            for index in rng.permutation(len(batches)):
                done += 1
                chosen = batches[index]
                histories = [sequences[user][: cuts[user]] for user in chosen]
                targets = np.array([sequences[user][cuts[user]] for user in chosen], dtype=np.int64)
                yield Batch(histories, targets, chosen), epoch + done / per_epoch


def num_batches(num_users: int, batch_size: int) -> int:
    """Return the batches of an epoch, ⌈U / b⌉, whose sizes differ by at most one.

    So no batch exceeds b, and none is a small remainder with too few negatives.

    >>> num_batches(1088, 64), num_batches(65, 64), num_batches(10, 64)
    (17, 2, 1)
    """
    return math.ceil(num_users / batch_size)
