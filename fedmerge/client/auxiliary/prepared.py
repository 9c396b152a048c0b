"""What auxiliary losses and augmentations need beside a batch, prepared before a training and kept at the client."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from fedmerge.client.auxiliary.categories import Categories, categories_of
from fedmerge.client.baselines.item_knn import item_neighbours
from fedmerge.client.local_domain import LocalDomain
from fedmerge.config import USERS_OBJECTIVES, Train
from fedmerge.errors import BackboneError, ConfigError
from fedmerge.evaluation.ranks import IntArray
from fedmerge.seeding import generator
from fedmerge.sequence.augmentation import NEIGHBOURS, augmented, forbidden_items, most_similar

SHRINKAGE = 10.0  # of item-knn: two items that one user has in common are hardly similar
OF_SIMILAR = frozenset({"insert", "substitute"})  # augmentations that need similar items


@dataclass(frozen=True, eq=False)
class Auxiliary:
    """Settings, tables and maps of one domain's auxiliary losses and augmentations.

    Attributes:
        settings: ``[train]``.
        similar: (N, k) of :func:`similar_items`; None where nothing is inserted.
        categories: None where no loss reads them.
        maps: W (d, d) of ``mip`` and ``map``, trained beside the adapter from the identity, and dropped afterwards.
        seed: seed of the experiment.
        scope: names of the randomness after the seed; a draw also depends on its purpose, step and user.
    """

    settings: Train
    similar: IntArray | None
    categories: Categories | None
    maps: Mapping[str, torch.nn.Parameter]
    seed: int
    scope: tuple[str | int, ...]

    def draw(self, purpose: str, *scope: str | int) -> np.random.Generator:
        """Make the generator of one draw."""
        return generator(self.seed, "client", *self.scope, "auxiliary", purpose, *scope)


NO_AUXILIARIES: Mapping[str, Auxiliary] = {}


def prepare(
    domain: LocalDomain, settings: Train, seed: int, *scope: str | int, by_user: bool = False
) -> Auxiliary | None:
    """Prepare the auxiliary losses and augmentations of a training; None if none is on.

    Args:
        domain: the client's domain; no adapter may be applied to its backbone.
        settings: ``[train]``.
        seed: seed of the experiment.
        scope: names of the randomness after the seed.
        by_user: True with differential privacy by user: similar items are counted without users.

    Raises:
        ConfigError: by user, a loss that depends on several users.
        BackboneError: ``mip`` or ``map``, and no mask token.
        DomainError: a loss of categories, and none to contrast.
    """
    weights, rates = settings.objective_weights, settings.augment_rates
    if not weights and not rates:
        return None
    if by_user and (others := sorted(USERS_OBJECTIVES & {*weights})):
        raise ConfigError(
            f"domain {domain.manifest.name}: dp.mode = 'user', but train.objectives has {', '.join(others)}: such a "
            "loss of a user depends on other users. Leave it out, or augment the user's own history with train.augment."
        )
    masking = [name for name in ("mip", "map") if name in weights]
    if masking and domain.backbone.tokenizer.mask_token_id is None:
        raise BackboneError(
            f"backbone {domain.backbone.name}: train.objectives has {masking[0]}, but the tokenizer has no mask token. "
            f"Leave {' and '.join(masking)} out, or use a backbone with one, such as BERT or RoBERTa."
        )
    of_category = [name for name in ("map", "attribute-dropout") if name in weights]
    views = settings.view_rates if "coserec" in weights else {}
    similar = None
    if OF_SIMILAR & {*rates, *views}:
        similar = similar_items(domain, domain.backbone_item_vectors, by_user=by_user)
    return Auxiliary(
        settings,
        similar,
        categories_of(domain, of_category[0]) if of_category else None,
        {name: torch.nn.Parameter(torch.eye(domain.backbone.width, device=domain.backbone.device)) for name in masking},
        seed,
        scope,
    )


def trained_maps(auxiliaries: Iterable[Auxiliary]) -> tuple[torch.nn.Parameter, ...]:
    """Return the parameters that are trained beside the adapter."""
    return tuple(of_loss for auxiliary in auxiliaries for of_loss in auxiliary.maps.values())


def similar_items(domain: LocalDomain, vectors: torch.Tensor, *, by_user: bool = False) -> npt.NDArray[np.int32]:
    """Return the items most similar to each item of a domain, (N, k), by the train sequences and the backbone.

    Args:
        domain: the client's domain.
        vectors: (N, d) item vectors under the backbone.
        by_user: True to read no user, so that no user's history depends on another user.
    """
    if by_user:
        return most_similar(vectors.numpy())
    counted = item_neighbours(domain.training_sequences, len(domain.catalog), NEIGHBOURS, SHRINKAGE)
    return most_similar(vectors.numpy(), counted.items, counted.similarities)


def augmented_histories(
    auxiliary: Auxiliary,
    domain: LocalDomain,
    histories: Sequence[npt.NDArray[np.int32]],
    users: npt.NDArray[np.int64],
    step: int,
) -> list[npt.NDArray[np.int32]]:
    """Return the histories of the usual loss, each augmented with probability ``augment_share``.

    A user's draws depend on that user and the step alone, whoever else takes part.

    Args:
        auxiliary: of :func:`prepare`.
        domain: the client's domain.
        histories: b arrays, oldest first, each the beginning of its user's training sequence.
        users: (b,) numbers of the users among the training sequences.
        step: number of the step, from 0.
    """
    rates, share = auxiliary.settings.augment_rates, auxiliary.settings.augment_share
    if not rates:
        return list(histories)
    found = []
    for history, user in zip(histories, users.tolist(), strict=True):
        rng = auxiliary.draw("augment", step, user)
        if rng.random() >= share:
            found.append(history)
            continue
        forbidden = forbidden_items(history, domain.training_sequences[user][len(history) :])
        read = history[-domain.text.max_items :]
        found.append(np.asarray(augmented(read, rates, auxiliary.similar, forbidden, rng), dtype=np.int32))
    return found
