"""The federated head: what every client makes from a seed, and the fusion of domains that do not choose their own."""

from collections.abc import Mapping, Sequence

from fedmerge.adapter import Adapter
from fedmerge.config import Head
from fedmerge.evaluation.sums import FEDERATED_SOURCES, VARIANTS, Variant
from fedmerge.sequence.anchored import text_head
from fedmerge.sequence.model import SequenceSettings

Weights = Mapping[Variant, Sequence[float]]
"""variant -> weights of FEDERATED_SOURCES."""


def fresh_head(width: int, head: Head, seed: int) -> Adapter:
    """Return the head before any training; it scores as the text vectors do.

    Args:
        width: of the item vectors.
        head: section ``[head]``.
        seed: of the round.
    """
    return text_head(width, head.rank, SequenceSettings().max_length, seed)


def mean_weights(chosen: Sequence[Weights]) -> Weights:
    """Return the mean of the weights that domains have chosen for their fusion; of none: all sources weigh alike."""
    if not chosen:
        return dict.fromkeys(VARIANTS, (1 / len(FEDERATED_SOURCES),) * len(FEDERATED_SOURCES))
    return {
        variant: tuple(sum(each) / len(chosen) for each in zip(*(of[variant] for of in chosen), strict=True))
        for variant in VARIANTS
    }
