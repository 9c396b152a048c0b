"""Scores as pairs of user vectors and item vectors: what ranking, fusion and serving work on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from fedmerge.encoder.encode import length_batches
from fedmerge.evaluation.ranks import IntArray
from fedmerge.sequence.model import SequenceModel

POSITIONS_PER_BATCH = 16384  # padded positions encoded at once outside training


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """One way to score items for users: score = <user vector, item vector>.

    Attributes:
        label: name of the source, e.g. ``head``, ``text`` or ``recent items``.
        user_vectors: (U, h).
        item_vectors: (N, h), on the same device.
    """

    label: str
    user_vectors: torch.Tensor
    item_vectors: torch.Tensor


@torch.no_grad()
def represented(model: SequenceModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a model computes of its items alone, both (N, h): ``base()`` and ``item_representations()``."""
    base = model.base()
    return base, model.item_representations(base)


@torch.no_grad()
def sequence_source(
    model: SequenceModel,
    histories: Sequence[IntArray],
    label: str = "head",
    of_items: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Source:
    """Return hidden states after the last item of each history, with the item representations.

    Args:
        model: in evaluation mode.
        histories: U arrays of item indices, oldest first, none empty; the most recent ``max_length`` items are read.
        label: name of the source.
        of_items: of :func:`represented`, if it is known.

    Returns:
        A source of float32 vectors on the CPU.
    """
    base, items = of_items or represented(model)
    states = last_states(lambda padded: model(padded, base), histories, model.settings.max_length, items)
    return Source(label, states, items.detach().cpu())


def last_states(
    states_of: Callable[[torch.Tensor], torch.Tensor],
    histories: Sequence[IntArray],
    max_length: int,
    items: torch.Tensor,
) -> torch.Tensor:
    """Return the states after the last item of each history, batches of similar length at a time.

    Args:
        states_of: (b, t) items, padded on the right -> (b, t, h) states.
        histories: U arrays of item indices, oldest first, none empty.
        max_length: most recent items that are read.
        items: (N, h) item representations, whose device and width the states have.

    Returns:
        float32 (U, h) on the CPU.
    """
    cut = [np.asarray(history[-max_length:], dtype=np.int64) for history in histories]
    states = torch.empty(len(cut), items.shape[1])
    for batch in length_batches([len(history) for history in cut], POSITIONS_PER_BATCH):
        padded, lengths = pad([cut[user] for user in batch], items.device)
        states[torch.from_numpy(batch)] = states_of(padded)[torch.arange(len(batch)), lengths - 1].cpu()
    return states


def pad(sequences: Sequence[npt.NDArray[np.int64]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return items (b, longest), padded on the right with item 0, which is never read, and lengths (b,)."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    padded = np.zeros((len(sequences), int(lengths.max())), dtype=np.int64)
    for row, sequence in enumerate(sequences):
        padded[row, : len(sequence)] = sequence
    return torch.from_numpy(padded).to(device), lengths.to(device)
