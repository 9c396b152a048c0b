"""Auxiliary losses of S3-Rec and CoSeRec on texts, "-style": no text encoder is among the published forms.

u(·) is the vector of a sequence of items, e_j that of an item, both of length 1; InfoNCE contrasts by cos / τ within a
batch, and duplicates of the positive are no negatives.

sp                 u(history without a segment) against u(segment)
coserec            u(one augmented view of the history) against u(another one)
mip                W h, h the hidden state of a mask token in place of one item, against e of that item
map                W' h against the category of that item
attribute-dropout  the item without its category against its category; of the catalog alone, no user is read

Source: S3-Rec, arXiv:2008.07873 (sp, mip, map, and attribute-dropout for its associated attributes, which a text has);
    CoSeRec, arXiv:2108.06479.
Differs: a text encoder in place of embeddings; InfoNCE, where S3-Rec's code has −log σ(σ(s⁺) − σ(s⁻)) with one
    negative, which is never below .313; one masked item a history; negative segments are of training items of this
    batch's users, where S3-Rec's code draws them from all items, those of test included.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from fedmerge.client.auxiliary.prepared import Auxiliary
from fedmerge.client.local_domain import LocalDomain
from fedmerge.client.training.losses import TEMPERATURE, in_batch_softmax
from fedmerge.encoder.encode import embed_in_groups, token_states_in_groups
from fedmerge.encoder.text import Tokens, as_item, num_packed, pack_items
from fedmerge.evaluation.ranks import IntArray
from fedmerge.sequence.augmentation import augmented, forbidden_items, segment
from fedmerge.sequence.contrast import numbered, view_contrast


def auxiliary_losses(
    auxiliary: Auxiliary,
    domain: LocalDomain,
    histories: Sequence[npt.NDArray[np.int32]],
    users: npt.NDArray[np.int64],
    step: int,
) -> list[torch.Tensor]:
    """Return the auxiliary losses of a batch, weighted; a loss that no user of the batch has is left out.

    Args:
        auxiliary: of :func:`fedmerge.client.auxiliary.prepared.prepare`.
        domain: the client's domain.
        histories: b arrays, oldest first, each the beginning of its user's training sequence.
        users: (b,) numbers of the users among the training sequences.
        step: number of the step, from 0.
    """
    weights = auxiliary.settings.objective_weights
    later = [domain.training_sequences[user][len(h) :] for h, user in zip(histories, users.tolist(), strict=True)]
    read = [history[-domain.text.max_items :] for history in histories]
    found: dict[str, torch.Tensor | None] = {}
    if "sp" in weights:
        found["sp"] = segment_loss(auxiliary, domain, read, users, step)
    if "coserec" in weights:
        found["coserec"] = view_loss(auxiliary, domain, read, later, users, step)
    if auxiliary.maps:
        found |= masked_item_losses(auxiliary, domain, read, users, step)
    losses = [weights[name] * loss for name, loss in found.items() if loss is not None]
    of_catalog = catalog_loss(auxiliary, domain, step)
    return losses if of_catalog is None else [*losses, of_catalog]


def segment_loss(
    auxiliary: Auxiliary, domain: LocalDomain, read: Sequence[IntArray], users: npt.NDArray[np.int64], step: int
) -> torch.Tensor | None:
    """Return the loss ``sp`` over the users with two items or more; None if there are fewer than two of them.

    Args:
        auxiliary, domain, users, step: as for :func:`auxiliary_losses`.
        read: b histories as far as they are read.
    """
    rests, segments = list[IntArray](), list[IntArray]()
    for history, user in zip(read, users.tolist(), strict=True):
        if len(history) < 2:
            continue
        span = segment(len(history), auxiliary.draw("sp", step, user))
        segments.append(history[span])
        rests.append(np.delete(history, span))
    if len(rests) < 2:
        return None
    numbers = numbered(segments)
    distinct = [segments[numbers.tolist().index(number)] for number in range(int(numbers.max()) + 1)]
    vectors, of_segments = _embed(domain, rests), _embed(domain, distinct)  # (b, d), (m, d)
    return in_batch_softmax(vectors, of_segments, numbers.to(vectors.device), TEMPERATURE)


def view_loss(
    auxiliary: Auxiliary,
    domain: LocalDomain,
    read: Sequence[IntArray],
    later: Sequence[IntArray],
    users: npt.NDArray[np.int64],
    step: int,
) -> torch.Tensor:
    """Return the loss ``coserec``.

    Args:
        auxiliary, domain, users, step: as for :func:`auxiliary_losses`.
        read: b histories as far as they are read.
        later: b arrays, the target and what the user took after it.
    """
    rates = auxiliary.settings.view_rates
    pairs = []
    for history, after, user in zip(read, later, users.tolist(), strict=True):
        rng, forbidden = auxiliary.draw("coserec", step, user), forbidden_items(history, after)
        pairs.append([augmented(history, rates, auxiliary.similar, forbidden, rng) for _ in range(2)])
    views = [pair[0] for pair in pairs] + [pair[1] for pair in pairs]
    vectors = _embed(domain, views)  # (2 b, d)
    return view_contrast(vectors[: len(pairs)], vectors[len(pairs) :], numbered(read), numbered(views), TEMPERATURE)


def masked_item_losses(
    auxiliary: Auxiliary, domain: LocalDomain, read: Sequence[IntArray], users: npt.NDArray[np.int64], step: int
) -> dict[str, torch.Tensor | None]:
    """Return the losses ``mip`` and ``map`` over the users with two items or more, as far as they are on.

    Args:
        auxiliary, domain, users, step: as for :func:`auxiliary_losses`.
        read: b histories as far as they are read.
    """
    sequences, positions, items = list[Tokens](), list[int](), list[int]()
    for history, user in zip(read, users.tolist(), strict=True):
        if len(history) >= 2:
            tokens, position, item = masked_history(domain, history, auxiliary.draw("mip", step, user))
            sequences.append(tokens)
            positions.append(position)
            items.append(item)
    found: dict[str, torch.Tensor | None] = dict.fromkeys(auxiliary.maps)
    if not sequences:
        return found
    states = token_states_in_groups(domain.backbone, sequences, positions)  # (b, d)
    if "mip" in auxiliary.maps:
        distinct, rows = np.unique(items, return_inverse=True)
        wanted = [domain.item_sequences[item] for item in distinct]
        found["mip"] = _contrast(domain, _mapped(auxiliary, "mip", states), wanted, rows)
    if "map" in auxiliary.maps and auxiliary.categories is not None:
        of_items = auxiliary.categories.of_items[items]
        known = np.flatnonzero(of_items >= 0)
        if len(known):
            distinct, rows = np.unique(of_items[known], return_inverse=True)
            wanted = [auxiliary.categories.values[value] for value in distinct]
            found["map"] = _contrast(domain, _mapped(auxiliary, "map", states)[known], wanted, rows)
    return found


def masked_history(domain: LocalDomain, history: IntArray, rng: np.random.Generator) -> tuple[Tokens, int, int]:
    """Put a mask token in place of one item of a history, drawn among those that fit into a sequence.

    Returns:
        The tokens of the history, the position of the mask token, and the item.

    Raises:
        TypeError: the tokenizer has no mask token.
    """
    table, special, text = domain.table, domain.backbone.special, domain.text
    items = [table.item(int(item)) for item in history]
    from_newest = int(rng.integers(num_packed(items, table.separator, special, text.max_tokens)))
    index = len(items) - 1 - from_newest
    newer = items[index + 1 :]
    items[index] = as_item(domain.backbone.tokenizer.mask_token_id, special)
    tokens = pack_items(items, table.separator, special, text.max_tokens, text.order)
    between = sum(len(item) + len(table.separator) for item in newer)
    first = text.order == "newest-first"
    position = len(special.before_history) + between if first else len(tokens) - len(special.suffix) - between - 1
    return tokens, position, int(history[index])


def catalog_loss(auxiliary: Auxiliary, domain: LocalDomain, step: int) -> torch.Tensor | None:
    """Return the loss ``attribute-dropout`` of items drawn from the catalog, weighted; None if it is not on.

    It reads no user. Items without a category, or without anything else, are not drawn.
    """
    weight, categories = auxiliary.settings.objective_weights.get("attribute-dropout"), auxiliary.categories
    if weight is None or categories is None or not len(categories.items):
        return None
    number = min(auxiliary.settings.batch_size, len(categories.items))
    drawn = np.sort(auxiliary.draw("attribute-dropout", step).choice(len(categories.items), number, replace=False))
    distinct, rows = np.unique(categories.of_items[categories.items[drawn]], return_inverse=True)
    items = embed_in_groups(domain.backbone, [categories.without[index] for index in drawn])  # (b, d)
    return weight * _contrast(domain, items, [categories.values[value] for value in distinct], rows)


def _contrast(
    domain: LocalDomain, vectors: torch.Tensor, wanted: Sequence[Tokens], rows: npt.NDArray[np.int64]
) -> torch.Tensor:
    """Return the InfoNCE of vectors (b, d) against the encodings of m distinct texts, the positives in these rows."""
    candidates = embed_in_groups(domain.backbone, wanted)  # (m, d)
    return in_batch_softmax(vectors, candidates, torch.from_numpy(rows).to(vectors.device), TEMPERATURE)


def _mapped(auxiliary: Auxiliary, name: str, states: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(states @ auxiliary.maps[name].T, dim=-1)


def _embed(domain: LocalDomain, histories: Sequence[IntArray]) -> torch.Tensor:
    return embed_in_groups(domain.backbone, domain.packed(histories))
