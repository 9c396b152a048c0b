"""The categories of a catalog as texts of their own, and the items without them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedmerge.client.local_domain import LocalDomain
from fedmerge.domain.catalog import make_catalog
from fedmerge.encoder.text import Tokens, build_token_table, item_sequences
from fedmerge.errors import DomainError

CATEGORY = "category"


@dataclass(frozen=True, eq=False)
class Categories:
    """Token sequences of the distinct categories, and of the items without theirs.

    Attributes:
        values: one sequence for each distinct category, ``category: …``.
        of_items: (N,) int64 row of each item's category in ``values``; −1 for an item without one.
        items: (M,) int64 items with a category and another attribute, ascending.
        without: their M sequences without the category.
    """

    values: list[Tokens]
    of_items: npt.NDArray[np.int64]
    items: npt.NDArray[np.int64]
    without: list[Tokens]


def categories_of(domain: LocalDomain, objective: str) -> Categories:
    """Tokenise the categories of a domain.

    Args:
        domain: the client's domain.
        objective: the auxiliary loss that asks, for the message.

    Raises:
        DomainError: the items have fewer than two distinct categories.
    """
    catalog = domain.catalog
    values = catalog.attributes.get(CATEGORY, ("",) * len(catalog))
    distinct = sorted({value for value in values if value})
    sequences = _sequences(domain, {CATEGORY: distinct}) if distinct else []
    rows: dict[bytes, int] = {}
    row_of = {
        value: rows.setdefault(tokens.tobytes(), len(rows)) for value, tokens in zip(distinct, sequences, strict=True)
    }
    if len(rows) < 2:
        raise DomainError(
            f"domain {catalog.name}: train.objectives has {objective}, which contrasts categories, but the items have "
            f"{len(rows)} distinct {CATEGORY}. Leave {objective} out, or import the domain again with a column "
            f"{CATEGORY}."
        )
    kept = dict[int, Tokens]()
    for value, tokens in zip(distinct, sequences, strict=True):
        kept.setdefault(row_of[value], tokens)
    others = {name: column for name, column in catalog.attributes.items() if name != CATEGORY}
    full = [i for i, value in enumerate(values) if value and any(column[i] for column in others.values())]
    without = _sequences(domain, {name: [column[i] for i in full] for name, column in others.items()}) if full else []
    return Categories(
        [kept[row] for row in range(len(rows))],
        np.array([row_of.get(value, -1) for value in values], dtype=np.int64),
        np.array(full, dtype=np.int64),
        without,
    )


def _sequences(domain: LocalDomain, attributes: dict[str, Sequence[str]]) -> list[Tokens]:
    """Return the sequences of items with these attributes, cut as those of the domain are."""
    number = len(next(iter(attributes.values())))
    limits = {name: limit for name, limit in domain.catalog.limits.items() if name in attributes}
    catalog = make_catalog(domain.catalog.name, [str(row) for row in range(number)], attributes, limits)
    table = build_token_table(
        catalog, domain.backbone.tokenizer, domain.text.max_attribute_tokens, domain.backbone.special.attributes
    )
    return item_sequences(table, domain.backbone.special, domain.text.max_tokens)
