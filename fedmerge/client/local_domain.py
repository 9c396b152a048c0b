"""The opened domain of a client; its interactions never leave it."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from fedmerge.client.cache.tokens import load_or_build_tokens
from fedmerge.config import Text
from fedmerge.domain.catalog import Catalog, load_catalog
from fedmerge.domain.interactions import Interactions, load_interactions
from fedmerge.domain.manifest import Manifest, read_manifest
from fedmerge.domain.splits import train_sequences
from fedmerge.encoder.backbone import Backbone, check_max_tokens
from fedmerge.encoder.encode import encode
from fedmerge.encoder.text import Tokens, TokenTable, build_token_table, item_sequences, pack_sequences

MIN_TRAINING_LENGTH = 2  # one item of history and a target
MIN_TRAINING_USERS = 2


@dataclass(frozen=True, eq=False)
class LocalDomain:
    """A domain with the backbone that encodes it.

    Attributes:
        manifest: counts and hashes.
        catalog: N items.
        interactions: U users.
        table: tokens of the items.
        text: limits of the packed sequences.
        backbone: the encoder with its tokenizer.
        left_out: (U,) True for users that training does not read, in audits; None: all are read.
        planted: sequences of fictitious users that are also trained on, in audits.
    """

    manifest: Manifest
    catalog: Catalog
    interactions: Interactions
    table: TokenTable
    text: Text
    backbone: Backbone
    left_out: npt.NDArray[np.bool_] | None = None
    planted: tuple[npt.NDArray[np.int32], ...] = ()

    @cached_property
    def training_sequences(self) -> list[npt.NDArray[np.int32]]:
        """The training items, oldest first, of every user with a history and a target outside validation and test."""
        of_users = train_sequences(self.interactions)
        if self.left_out is not None:
            of_users = [sequence for sequence, out in zip(of_users, self.left_out, strict=True) if not out]
        return [sequence for sequence in [*of_users, *self.planted] if len(sequence) >= MIN_TRAINING_LENGTH]

    @cached_property
    def training_sha256(self) -> str:
        """Hash of the training sequences in order, with those that an audit leaves out or plants."""
        digest = hashlib.sha256()
        for sequence in self.training_sequences:
            digest.update(len(sequence).to_bytes(8, "little") + np.ascontiguousarray(sequence, dtype="<i4").tobytes())
        return digest.hexdigest()

    @property
    def can_train(self) -> bool:
        """True if there are enough users for in-batch negatives."""
        return len(self.training_sequences) >= MIN_TRAINING_USERS

    @cached_property
    def item_sequences(self) -> list[Tokens]:
        """One token sequence per item."""
        return item_sequences(self.table, self.backbone.special, self.text.max_tokens)

    def packed(self, histories: Iterable[Sequence[int] | npt.NDArray[np.integer]]) -> list[Tokens]:
        """Return one token sequence per history of item indices, oldest first, under the settings of ``[text]``."""
        text = self.text
        return pack_sequences(self.table, histories, self.backbone.special, text.max_items, text.max_tokens, text.order)

    @cached_property
    def backbone_item_vectors(self) -> torch.Tensor:
        """Item vectors (N, d) under the backbone alone; no adapter may be applied to it at the first access."""
        return encode(self.backbone, self.item_sequences)


def open_domain(folder: Path, backbone: Backbone, text: Text, cache_dir: Path | None = None) -> LocalDomain:
    """Read, verify and tokenise a domain.

    Args:
        folder: folder of the domain.
        backbone: the encoder.
        text: limits of items and histories in tokens.
        cache_dir: folder with the cached tokens; None tokenises again.

    Raises:
        DomainError: missing or damaged files.
        BackboneError: sequences longer than the backbone's positions.
    """
    check_max_tokens(backbone, text.max_tokens, text.max_items)
    catalog = load_catalog(folder)
    manifest, limit = read_manifest(folder), text.max_attribute_tokens
    if cache_dir is None:
        table = build_token_table(catalog, backbone.tokenizer, limit, backbone.special.attributes)
    else:
        table = load_or_build_tokens(catalog, backbone, limit, cache_dir)
    return LocalDomain(manifest, catalog, load_interactions(folder), table, text, backbone)
