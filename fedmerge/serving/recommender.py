"""Recommendations from an adapter and a catalog; interactions are never read.

>>> from fedmerge.recommender import load_recommender, recommend  # doctest: +SKIP
>>> recommender = load_recommender("runs/<id>/merged/average", "data/Toys")  # doctest: +SKIP
>>> recommend(recommender, ["B00004", "B00017"], k=3)  # doctest: +SKIP
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from fedmerge.adapter import Adapter
from fedmerge.config import ExperimentConfig, Text, load_config
from fedmerge.domain.catalog import Catalog, load_catalog
from fedmerge.encoder.adapted import NO_ADAPTER, folded, load_adapted
from fedmerge.encoder.adapter_records import config_of_adapter
from fedmerge.encoder.backbone import Backbone, check_max_tokens
from fedmerge.encoder.encode import encode
from fedmerge.encoder.text import TokenTable, build_token_table, item_sequences, pack_sequences
from fedmerge.errors import ConfigError, DomainError, LayoutMismatchError
from fedmerge.evaluation.ranks import IntArray
from fedmerge.evaluation.sums import Variant

ScoreKind = Literal["cosine", "standardised"]
HeadScores = Callable[[torch.Tensor, IntArray, Variant], torch.Tensor]
"""(text vector of the user (d,), history as positions in the catalog, variant) -> standardised scores (N,)."""


@dataclass(frozen=True)
class Recommendation:
    """One item; ``title`` is of ``Catalog.titles``, ``score`` of the recommender's ``score_kind``."""

    item_id: str
    title: str
    score: float


@dataclass(frozen=True, eq=False)
class Recommender:
    """A recommender of one catalog's items. It is read-only, so threads may share it.

    Attributes:
        encoder: the backbone with the adapter folded in.
        catalog: N items.
        text: how histories become sequences; the same as in training.
        table: the tokens of the items.
        item_vectors: (N, d) float32 on the CPU, L2-normalised.
        item_index: item id -> position in the catalog.
        head: scores of a sequence head; None: the cosine of user and item vector.
    """

    encoder: Backbone
    catalog: Catalog
    text: Text
    table: TokenTable
    item_vectors: torch.Tensor
    item_index: Mapping[str, int]
    head: HeadScores | None = None

    @property
    def score_kind(self) -> ScoreKind:
        """The meaning of a score: a cosine, or with a head standardised over the catalog for each user."""
        return "cosine" if self.head is None else "standardised"


def load_recommender(adapter: str | Path, domain: str | Path, config: ExperimentConfig | None = None) -> Recommender:
    """Load adapter, backbone and catalog, and encode the catalog.

    Args:
        adapter: a PEFT folder, or ``"none"`` for the backbone alone.
        domain: a domain folder, of which manifest and catalog are read.
        config: backbone, text and runtime are read; None: that of the run the adapter lies in, else the defaults.

    Raises:
        DomainError: no domain folder, or a damaged catalog.
        LayoutMismatchError: a damaged adapter, or one of another backbone.
        BackboneError: a backbone that is missing or damaged.
    """
    if config is None:
        config = load_config(None if str(adapter) == NO_ADAPTER else config_of_adapter(Path(adapter)))
    catalog = load_catalog(Path(domain))
    backbone, loaded = load_adapted(adapter, config)
    return make_recommender(backbone, loaded, catalog, config.text)


def make_recommender(backbone: Backbone, adapter: Adapter | None, catalog: Catalog, text: Text) -> Recommender:
    """Encode a catalog under an adapter; the backbone is left as it was.

    Raises:
        BackboneError: sequences longer than the backbone's positions.
        LayoutMismatchError: an adapter of another backbone, or one that makes vectors that are not finite.
    """
    check_max_tokens(backbone, text.max_tokens)
    encoder = folded(backbone, adapter)
    table = build_token_table(catalog, encoder.tokenizer, text.max_attribute_tokens)
    vectors = encode(encoder, item_sequences(table, encoder.special, text.max_tokens))
    bad = int((~vectors.isfinite()).any(dim=1).sum())
    if bad:
        raise LayoutMismatchError(
            f"recommender for {catalog.name}: the vectors of {bad} of {len(catalog)} items are NaN or infinite, "
            "expected finite ones. The adapter has diverged: use another merge."
        )
    return Recommender(encoder, catalog, text, table, vectors, index_items(catalog))


def recommend(
    recommender: Recommender, history: Sequence[str], k: int = 10, keep_seen: bool = False
) -> list[Recommendation]:
    """Return the k items with the highest scores; of equal scores the item that comes first in the catalog.

    A head's scores depend on ``keep_seen``, since it has weights for masked and for unmasked ranking.

    Args:
        recommender: of :func:`load_recommender`.
        history: item ids, oldest first; the most recent ``text.max_items`` within ``text.max_tokens`` are read.
        k: how many; fewer come back where the catalog has no more.
        keep_seen: items of the history may be recommended, too.

    Raises:
        DomainError: an empty history, or an item id that the catalog does not have.
        ConfigError: k below 1.
    """
    check_request(recommender.catalog.name, recommender.item_index, history, k)
    seen = [recommender.item_index[item] for item in history]
    text, encoder = recommender.text, recommender.encoder
    sequences = pack_sequences(recommender.table, [seen], encoder.special, text.max_items, text.max_tokens)
    user = encode(encoder, sequences)[0]  # (d,)
    if recommender.head is None:
        scores = (recommender.item_vectors @ user).numpy()  # (N,)
    else:
        scores = recommender.head(user, np.asarray(seen), "unmasked" if keep_seen else "masked").numpy()
    candidates = np.arange(len(scores)) if keep_seen else np.setdiff1d(np.arange(len(scores)), seen)
    order = candidates[np.argsort(-scores[candidates], kind="stable")[:k]]
    catalog = recommender.catalog
    return [Recommendation(catalog.item_ids[index], catalog.titles[index], float(scores[index])) for index in order]


def check_request(name: str, item_index: Mapping[str, int], history: Sequence[str], k: int) -> None:
    """Refuse what :func:`recommend` refuses, before a catalog is encoded.

    Args:
        name: of the catalog.
        item_index: of :func:`index_items`.
        history: item ids.
        k: how many to recommend.
    """
    if k < 1:
        raise ConfigError(f"recommend: k is {k}, expected at least 1.")
    if isinstance(history, str):
        raise DomainError(f"recommend: the history is the text {history!r}, expected a list of item ids.")
    if not history:
        raise DomainError(f"recommend: the history is empty, expected at least one item id of {name}.")
    unknown = [item for item in dict.fromkeys(history) if item not in item_index]
    if unknown:
        hints = []
        for item in unknown[:5]:
            close = difflib.get_close_matches(str(item), item_index, n=3)
            hints.append(f"{item!r}" + (f" (close: {', '.join(close)})" if close else ""))
        raise DomainError(
            f"recommend: {len(unknown)} of {len(history)} items of the history are not in the catalog of {name}: "
            f"{', '.join(hints)}. Give ids of its {len(item_index)} items, such as {next(iter(item_index))!r}."
        )


def index_items(catalog: Catalog) -> dict[str, int]:
    """Item id -> position in the catalog."""
    return {item: index for index, item in enumerate(catalog.item_ids)}
