"""The contrast of two augmented views of each history, CoSeRec-style: for texts and for sequence models."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from fedmerge.evaluation.ranks import IntArray
from fedmerge.sequence.augmentation import augmented, forbidden_items
from fedmerge.sequence.model import SequenceModel
from fedmerge.sequence.ranking import pad

TEMPERATURE = 0.05


@dataclass(frozen=True, eq=False)
class Contrast:
    """The contrast of views in the training of a sequence model.

    Attributes:
        weight: of the loss.
        rates: augmentations of the views with their rates.
        similar: (N, k) of :func:`fedmerge.sequence.augmentation.most_similar`; None where nothing is inserted.
    """

    weight: float
    rates: Mapping[str, float]
    similar: IntArray | None


def contrast_backward(
    model: SequenceModel,
    batch: Sequence[npt.NDArray[np.int64]],
    contrast: Contrast,
    rng: np.random.Generator,
    dtype: torch.dtype | None = None,
) -> float:
    """Add the gradients of the weighted contrast of a batch to the model's, and return the weighted loss.

    The views are those of each sequence without its last item, whose vector is the state after the last item of a view.

    Args:
        model: in training mode.
        batch: sequences of two items or more.
        contrast: weight and augmentations.
        rng: decides the views.
        dtype: of the map of the items; None for float32.
    """
    device, histories = model.positions.weight.device, [sequence[:-1] for sequence in batch]
    pairs = []
    for sequence, history in zip(batch, histories, strict=True):
        forbidden = forbidden_items(history, sequence[-1:])
        drawn = [augmented(history, contrast.rates, contrast.similar, forbidden, rng) for _ in range(2)]
        pairs.append([np.asarray(view[-model.settings.max_length :], dtype=np.int64) for view in drawn])
    views = [pair[0] for pair in pairs] + [pair[1] for pair in pairs]
    shown, items = views, None
    if model.settings.sampled_items is not None:
        read, places = np.unique(np.concatenate(views), return_inverse=True)
        items = torch.from_numpy(read).to(device)
        shown = np.split(places, np.cumsum([len(view) for view in views])[:-1])
    with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        base = model.base(items).float()
    padded, lengths = pad(shown, device)
    states = model(padded, base, items)[torch.arange(len(views), device=device), lengths - 1]  # (2 b, h)
    vectors, number = torch.nn.functional.normalize(states, dim=-1), len(pairs)
    found = view_contrast(vectors[:number], vectors[number:], numbered(histories), numbered(views), TEMPERATURE)
    loss = contrast.weight * found
    loss.backward()  # type: ignore[no-untyped-call]  # PyTorch leaves it untyped
    return loss.item()


def view_contrast(
    first: torch.Tensor, second: torch.Tensor, histories: torch.Tensor, views: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Compute the InfoNCE of two views of b histories, −log exp(z_a · z_p / τ) / Σ exp(z_a · z / τ), over all 2b views.

    p is the other view of the same history. The sum has p and the negatives: the views of other histories that equal
    neither a nor p.

    Args:
        first, second: (b, d), L2-normalised, the two views of each history.
        histories: int64 (b,), equal for equal histories.
        views: int64 (2b,), equal for equal views, the first ones before the second ones.
        temperature: τ.

    Returns:
        The mean over the 2b views, a scalar; 0 where no view has a negative.

    Source: CoSeRec, arXiv:2108.06479.
    Differs: normalised vectors of whole histories in place of the states of all positions, flattened; duplicates are no
        negatives.
    """
    stacked = torch.cat([first, second])  # (2b, d)
    number = len(first)
    rows = torch.arange(2 * number, device=stacked.device)
    partner = (rows + number) % (2 * number)
    owners, views = histories.to(stacked.device).repeat(2), views.to(stacked.device)
    alike = owners[:, None] == owners[None, :]
    for anchors in (views, views[partner]):
        alike = alike | (anchors[:, None] == views[None, :])
    alike[rows, partner] = False
    scores = (stacked @ stacked.T / temperature).masked_fill(alike, -torch.inf)
    return torch.nn.functional.cross_entropy(scores, partner)


def numbered(sequences: Sequence[IntArray]) -> torch.Tensor:
    """Return an int64 number for each sequence of items, equal for equal sequences."""
    known: dict[tuple[int, ...], int] = {}
    return torch.tensor([known.setdefault(tuple(sequence.tolist()), len(known)) for sequence in sequences])
