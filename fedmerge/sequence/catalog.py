"""What makes large catalogs affordable: items drawn in place of all, and work on all items a block at a time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from fedmerge.evaluation.ranks import IntArray

ITEMS_AT_ONCE = 2**17  # a catalog of up to so many items is one block


@dataclass(frozen=True, slots=True, eq=False)
class DrawnItems:
    """The items that a training step computes in place of a catalog: those of its sequences, and some drawn.

    Attributes:
        items: (n,) int64, sorted, without repeats.
        drawn: (n,) bool; False for items that are only read or targets.
        num_items: N.
    """

    items: torch.Tensor
    drawn: torch.Tensor
    num_items: int

    def numbered(self, sequences: Sequence[IntArray]) -> list[npt.NDArray[np.int64]]:
        """Return sequences of the step with the places of their items among ``items``."""
        items = self.items.cpu().numpy()
        return [np.searchsorted(items, sequence) for sequence in sequences]

    def correct(self, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """Make the exponentials of each row of logits sum to an unbiased estimate of the catalog's, in place.

        Z ≈ exp(z_t) + (N − 1) / n · Σ exp(z_j) over the n drawn items j ≠ t: the target t counts once, with certainty;
        log q of every other item is that of a uniform draw of n of the N − 1 others. With all N items drawn it is Z.

        Args:
            logits: (b, n).
            targets: (b, 1) columns of the targets.

        Source: Bengio and Senécal, Adaptive importance sampling, IEEE Transactions on Neural Networks 19, 2008;
            correction by log q as in Yi et al., Sampling-bias-corrected neural modeling, RecSys 2019.
        Differs: a uniform draw without replacement, shared by all positions of a step; the target is never drawn.
        """
        own = logits.gather(1, targets)
        others = (self.drawn.sum() - self.drawn[targets].long()).clamp(min=1)  # (b, 1)
        logits += ((self.num_items - 1) / others).log()
        logits.masked_fill_(~self.drawn, -torch.inf)
        logits.scatter_(1, targets, own)


def draw_items(
    batch: Sequence[IntArray], number: int, num_items: int, rng: np.random.Generator, device: torch.device
) -> DrawnItems:
    """Draw items of a catalog uniformly and without replacement, for all positions of a step.

    Args:
        batch: the sequences of the step.
        number: items drawn; all, if the catalog has no more.
        num_items: N.
        rng: decides the draw.
        device: of the result.
    """
    drawn = rng.choice(num_items, min(number, num_items), replace=False, shuffle=False)
    items = np.union1d(np.concatenate(batch), drawn)
    is_drawn = torch.from_numpy(np.isin(items, drawn))
    return DrawnItems(torch.from_numpy(items).to(device), is_drawn.to(device), num_items)


def by_blocks(of_items: Callable[[torch.Tensor], torch.Tensor], vectors: torch.Tensor) -> torch.Tensor:
    """Return a function of vectors (N, d) that maps every row alone, a block of items at a time; without a gradient."""
    if len(vectors) <= ITEMS_AT_ONCE:
        return of_items(vectors)
    first = of_items(vectors[:ITEMS_AT_ONCE])
    result = first.new_empty(len(vectors), *first.shape[1:])
    result[:ITEMS_AT_ONCE] = first
    for start in range(ITEMS_AT_ONCE, len(vectors), ITEMS_AT_ONCE):
        result[start : start + ITEMS_AT_ONCE] = of_items(vectors[start : start + ITEMS_AT_ONCE])
    return result


def mean_and_covariance(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean (d,) and covariance (d, d) of vectors (N, d) in float64, computed a block of items at a time."""
    blocks = torch.split(vectors, ITEMS_AT_ONCE)
    mean = torch.stack([block.double().sum(dim=0) for block in blocks]).sum(dim=0) / len(vectors)
    products = torch.zeros(vectors.shape[1], vectors.shape[1], dtype=torch.float64, device=vectors.device)
    for block in blocks:
        centred = block.double() - mean
        products += centred.T @ centred
    return mean, products / len(vectors)
