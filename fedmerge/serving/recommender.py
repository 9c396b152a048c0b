"""Recommendations from a model and a catalog; interactions are not read.

>>> from fedmerge.serving.recommender import load_recommender, recommend  # doctest: +SKIP
>>> recommender = load_recommender("runs/<id>/merged/average", "data/Toys")  # doctest: +SKIP
>>> recommend(recommender, ["B00004", "B00017"], k=3)  # doctest: +SKIP
"""

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from fedmerge.adapter import Adapter
from fedmerge.client.cache.tokens import load_or_build_tokens
from fedmerge.client.heads.vectors import load_or_encode
from fedmerge.config import ExperimentConfig, Text, load_config
from fedmerge.domain.catalog import Catalog, load_catalog, make_catalog
from fedmerge.encoder.adapted import NO_ADAPTER, folded, load_adapted
from fedmerge.encoder.adapter_records import config_of_adapter
from fedmerge.encoder.backbone import Backbone, check_max_tokens
from fedmerge.encoder.encode import Encode, encode, prepared
from fedmerge.encoder.text import Tokens, TokenTable, build_token_table, item_sequences, pack_items
from fedmerge.errors import ConfigError, DomainError, LayoutMismatchError
from fedmerge.evaluation.ranks import IntArray
from fedmerge.evaluation.sums import Variant
from fedmerge.serving.index import ItemIndex, is_exact
from fedmerge.serving.listing import Listing, blended, select

FILTER_MARGIN = 2  # times as many items are looked for as the filter's share makes necessary
SCORES_PER_BLOCK = 2**24  # of many users, at once: 64 MiB of float32
ScoreKind = Literal["cosine", "standardised"]
HeadScores = Callable[[torch.Tensor, Sequence[IntArray], Variant], torch.Tensor]
"""(text vectors of users (U, d), histories as positions in the catalog, variant) -> standardised scores (U, N)."""
Item = str | Mapping[str, str]
"""An item of a history: its id, or its attributes if the catalog does not have it."""


@dataclass(frozen=True)
class Recommendation:
    """One item; ``title`` is of ``Catalog.titles``, ``score`` of the recommender's ``score_kind``."""

    item_id: str
    title: str
    score: float


@dataclass(frozen=True, eq=False)
class History:
    """What a user had, oldest first, repeats included.

    Attributes:
        seen: positions of the items that the catalog has.
        tokens: of the most recent items, of those that the catalog lacks as well.
    """

    seen: IntArray
    tokens: Sequence[Tokens]


@dataclass(frozen=True, eq=False)
class Recommender:
    """A recommender of one catalog's items. It is read-only, so threads may share it.

    Attributes:
        encoder: the backbone with the adapter folded in.
        encode: encodes with it, prepared once for all calls.
        catalog: N items.
        text: how histories become sequences; the same as in training.
        table: the tokens of the items.
        item_vectors: (N, d) float32 on the CPU, L2-normalised.
        item_index: item id -> position in the catalog.
        head: scores of a sequence head; None: the cosine of user and item vector.
        popularity: (N,) of :func:`fedmerge.serving.listing.popularity_source`; None if it is not known.
        index: of the item vectors; None scores all items. With a head or popularity all are scored in any case.
    """

    encoder: Backbone
    encode: Encode
    catalog: Catalog
    text: Text
    table: TokenTable
    item_vectors: torch.Tensor
    item_index: Mapping[str, int]
    head: HeadScores | None = None
    popularity: torch.Tensor | None = None
    index: ItemIndex | None = None

    @property
    def score_kind(self) -> ScoreKind:
        """The meaning of a score: a cosine, or with a head standardised over the catalog for each user."""
        return "cosine" if self.head is None else "standardised"


def load_recommender(
    adapter: str | Path,
    domain: str | Path,
    config: ExperimentConfig | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Recommender:
    """Load adapter, backbone and catalog, and encode the catalog, unless ``cache_dir`` has its vectors.

    Args:
        adapter: a PEFT folder, or ``"none"`` for the backbone alone.
        domain: a domain folder, of which manifest and catalog are read.
        config: backbone, text, runtime and ``cache_dir`` are read; None: that of the run the adapter lies in, else the
            defaults.
        progress: called with (done, N) while items are encoded.

    Raises:
        DomainError: no domain folder, or a damaged catalog.
        LayoutMismatchError: a damaged adapter, or one of another backbone.
        BackboneError: a backbone that is missing or damaged.
    """
    if config is None:
        config = load_config(None if str(adapter) == NO_ADAPTER else config_of_adapter(Path(adapter)))
    catalog = load_catalog(Path(domain))
    backbone, loaded = load_adapted(adapter, config)
    return make_recommender(backbone, loaded, catalog, config.text, config.cache_dir, progress)


def make_recommender(
    backbone: Backbone,
    adapter: Adapter | None,
    catalog: Catalog,
    text: Text,
    cache_dir: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Recommender:
    """Encode a catalog under an adapter; the backbone is left as it was.

    Args:
        backbone: the encoder without an adapter.
        adapter: None is the backbone alone.
        catalog: N items.
        text: limits of items and histories in tokens.
        cache_dir: folder with the tokens and vectors of earlier calls, to which new ones are written; None encodes in
            every call.
        progress: called with (done, N) while items are encoded.

    Raises:
        BackboneError: sequences longer than the backbone's positions.
        LayoutMismatchError: an adapter of another backbone, or one that makes vectors that are not finite.
    """
    check_max_tokens(backbone, text.max_tokens, text.max_items)
    encoder, limit = folded(backbone, adapter), text.max_attribute_tokens
    if cache_dir is None:
        table = build_token_table(catalog, encoder.tokenizer, limit, encoder.special.attributes)
    else:
        table = load_or_build_tokens(catalog, backbone, limit, Path(cache_dir))

    def compute() -> torch.Tensor:
        vectors = encode(encoder, item_sequences(table, encoder.special, text.max_tokens), progress)
        if bad := int((~vectors.isfinite()).any(dim=1).sum()):
            raise LayoutMismatchError(
                f"recommender for {catalog.name}: the vectors of {bad} of {len(catalog)} items are NaN or infinite, "
                "expected finite ones. The adapter has diverged: use another merge."
            )
        return vectors

    vectors = compute() if cache_dir is None else load_or_encode(catalog, backbone, text, adapter, cache_dir, compute)
    return Recommender(encoder, prepared(encoder), catalog, text, table, vectors, index_items(catalog))


def recommend(
    recommender: Recommender,
    history: Sequence[Item],
    k: int = 10,
    keep_seen: bool = False,
    listing: Listing | None = None,
) -> list[Recommendation]:
    """Return the k items with the highest scores; of equal scores the item that comes first in the catalog.

    A head's scores depend on ``keep_seen``, since it has weights for masked and for unmasked ranking.

    Args:
        recommender: of :func:`load_recommender`.
        history: item ids, oldest first; the most recent ``text.max_items`` within ``text.max_tokens`` are read. An item
            that the catalog lacks is given by its attributes, such as ``{"title": "Red tent"}``, unless there is a
            head.
        k: how many; fewer come back where the catalog has no more.
        keep_seen: items of the history may be recommended, too.
        listing: filters, diversity and popularity; ``k`` and ``keep_seen`` are not read then.

    Raises:
        DomainError: an empty history, or an item id that the catalog does not have.
        ConfigError: k below 1, an item by its attributes for a head, or popularity that is not known.
    """
    listing = listing or Listing(k, keep_seen)
    check_history(recommender.catalog.name, recommender.item_index, history)
    return recommend_many(recommender, [read_history(recommender, history)], [listing])[0]


def recommend_many(
    recommender: Recommender, histories: Sequence[History], listings: Sequence[Listing]
) -> list[list[Recommendation]]:
    """Return the list of each user as :func:`recommend` does, encoded and scored together.

    Args:
        recommender: of :func:`load_recommender`.
        histories: of :func:`read_history`, none empty.
        listings: how the list of each history is made.

    Raises:
        ConfigError: popularity that is not known.
    """
    if any(listing.popularity for listing in listings) and recommender.popularity is None:
        raise ConfigError(
            "recommend: popularity is not known here, since no interactions were counted. Leave it at 0, or count them "
            "(--popularity)."
        )
    users = encode_histories(recommender, [history.tokens for history in histories])
    lists: dict[int, list[Recommendation]] = {}
    for number, (history, listing) in enumerate(zip(histories, listings, strict=True)):
        if (found := _searched(recommender, users[number], history, listing)) is not None:
            lists[number] = found
    size = max(1, SCORES_PER_BLOCK // len(recommender.catalog))
    for keep_seen in (False, True):
        rest = [
            number for number in range(len(users)) if number not in lists and listings[number].keep_seen == keep_seen
        ]
        for start in range(0, len(rest), size):
            block = rest[start : start + size]
            scores = _scores(recommender, users[block], [histories[number].seen for number in block], keep_seen)
            for number, row in zip(block, scores, strict=True):
                lists[number] = _listed(recommender, row, histories[number], listings[number])
    return [lists[number] for number in range(len(users))]


def encode_histories(recommender: Recommender, histories: Sequence[Sequence[Tokens]]) -> torch.Tensor:
    """Return the text vectors (U, d) of histories: for each, the tokens of its items, oldest first."""
    text, special, separator = recommender.text, recommender.encoder.special, recommender.table.separator
    return recommender.encode(
        [pack_items(tokens[-text.max_items :], separator, special, text.max_tokens, text.order) for tokens in histories]
    )


def _scores(
    recommender: Recommender, users: torch.Tensor, histories: Sequence[IntArray], keep_seen: bool
) -> torch.Tensor:
    """Return the scores of all items, (U, N), without popularity; seen items are not masked."""
    if recommender.head is None:
        return users @ recommender.item_vectors.T
    return recommender.head(users, histories, "unmasked" if keep_seen else "masked")


def similar_items(recommender: Recommender, item: Item, listing: Listing) -> list[Recommendation]:
    """Return the items whose text vectors have the largest cosine with an item's, itself left out.

    Args:
        recommender: of :func:`load_recommender`; its head is not read.
        item: an id of the catalog, or the attributes of another item.
        listing: how the list is made, without popularity.

    Raises:
        DomainError: no such item, or attributes that the catalog does not have.
    """
    check_history(recommender.catalog.name, recommender.item_index, [item])
    by_text = replace(recommender, head=None)
    history, vectors = read_history(by_text, [item]), recommender.item_vectors
    known = len(history.seen) > 0
    vector = vectors[int(history.seen[0])] if known else encode_histories(recommender, [history.tokens])[0]
    found = _searched(by_text, vector, history, listing)
    return _listed(by_text, vectors @ vector, history, listing) if found is None else found


def _listed(recommender: Recommender, scores: torch.Tensor, history: History, listing: Listing) -> list[Recommendation]:
    """Return a user's list from the scores (N,) of all items."""
    if listing.popularity and recommender.popularity is not None:
        scores = blended(scores[None], recommender.popularity, listing.popularity)[0]
    order = select(scores.numpy(), recommender.item_vectors, history.seen, listing)
    return _named(recommender.catalog, order, scores.numpy()[order])


def _searched(
    recommender: Recommender, user: torch.Tensor, history: History, listing: Listing
) -> list[Recommendation] | None:
    """Return a user's list by the index; None if all items must be scored.

    What the index finds is scored exactly. Where a filter passes few items, these are scored instead.
    """
    index, vectors = recommender.index, recommender.item_vectors
    if index is None or recommender.head is not None or listing.popularity:
        return None
    share = 1.0 if listing.allowed is None else float(listing.allowed.mean())
    if listing.allowed is not None and is_exact(round(share * len(vectors)), vectors.shape[1]):
        rows = np.flatnonzero(listing.allowed)
    else:
        wanted = listing.pool + (0 if listing.keep_seen else len(history.seen))
        rows = index.search(user, math.ceil(wanted if share == 1 else FILTER_MARGIN * wanted / share))
    scores = (vectors[torch.from_numpy(rows)] @ user).numpy()
    order = select(scores, vectors, history.seen, listing, rows)
    if len(order) < listing.k and share < 1 and len(rows) < round(share * len(vectors)):
        return None  # the filter passed too few of those that were found
    return _named(recommender.catalog, order, scores[np.searchsorted(rows, order)])


def _named(catalog: Catalog, positions: npt.NDArray[np.int64], scores: npt.NDArray[np.float32]) -> list[Recommendation]:
    return [
        Recommendation(catalog.item_ids[i], catalog.titles[i], score)
        for i, score in zip(positions.tolist(), scores.tolist(), strict=True)
    ]


def read_history(recommender: Recommender, items: Sequence[Item]) -> History:
    """Return the positions and tokens of a history.

    Args:
        recommender: whose catalog is read.
        items: ids of the catalog, or attributes; see :func:`recommend`.

    Raises:
        ConfigError: an item by its attributes for a head, which reads items of its catalog.
        DomainError: attributes that the catalog does not have, or without any text.
    """
    known = [recommender.item_index[item] for item in items if isinstance(item, str)]
    texts = [item for item in items if not isinstance(item, str)]
    if texts and recommender.head is not None:
        raise ConfigError(
            f"recommend: found {len(texts)} items given by text, but a head reads items of the catalog of "
            f"{recommender.catalog.name}. Give ids, or use --model merged."
        )
    of_texts = iter(tokens_of(recommender, texts) if texts else ())
    table = recommender.table
    tokens = [table.item(recommender.item_index[item]) if isinstance(item, str) else next(of_texts) for item in items]
    return History(np.array(known, dtype=np.int64), tokens)


def tokens_of(recommender: Recommender, items: Sequence[Mapping[str, str]]) -> list[Tokens]:
    """Return the tokens of items that are given by their attributes, as those of the catalog are made.

    Raises:
        DomainError: attributes that the catalog does not have, or an item without any text.
    """
    catalog, limit = recommender.catalog, recommender.text.max_attribute_tokens
    names = list(catalog.attributes)
    for item in items:
        if unknown := sorted(item.keys() - set(names)):
            raise DomainError(
                f"recommend: found an item with the attributes {unknown}, expected some of {names}, those of "
                f"{catalog.name}. Rename them."
            )
        if not any(value.strip() for value in item.values()):
            raise DomainError(f"recommend: found an item without text, expected at least one of {names}. Describe it.")
    columns = {name: [item.get(name, "") for item in items] for name in names}
    made = make_catalog(catalog.name, [str(number) for number in range(len(items))], columns, catalog.limits)
    table = build_token_table(made, recommender.encoder.tokenizer, limit, recommender.encoder.special.attributes)
    return [table.item(number) for number in range(len(items))]


def check_history(name: str, item_index: Mapping[str, int], history: Sequence[Item]) -> None:
    """Refuse what :func:`recommend` refuses of a history, before a catalog is encoded.

    Args:
        name: of the catalog.
        item_index: of :func:`index_items`.
        history: item ids, or attributes, which are not checked.
    """
    if isinstance(history, str):
        raise DomainError(f"recommend: the history is the text {history!r}, expected a list of item ids.")
    if not history:
        raise DomainError(f"recommend: the history is empty, expected at least one item id of {name}.")
    ids = [item for item in history if isinstance(item, str)]
    unknown = [item for item in dict.fromkeys(ids) if item not in item_index]
    if unknown:
        hints = []
        for item in unknown[:5]:
            close = difflib.get_close_matches(item, item_index, n=3)
            hints.append(f"{item!r}" + (f" (close: {', '.join(close)})" if close else ""))
        raise DomainError(
            f"recommend: {len(unknown)} of {len(history)} items of the history are not in the catalog of {name}: "
            f"{', '.join(hints)}. Give ids of its {len(item_index)} items, such as {next(iter(item_index))!r}."
        )


def index_items(catalog: Catalog) -> dict[str, int]:
    """Item id -> position in the catalog."""
    return {item: index for index, item in enumerate(catalog.item_ids)}
