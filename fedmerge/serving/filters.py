"""Filters: which items of a catalog may be recommended."""

import difflib
from collections.abc import Collection, Mapping

import numpy as np

from fedmerge.domain.catalog import Catalog
from fedmerge.errors import DomainError
from fedmerge.serving.listing import BoolArray


def passing(catalog: Catalog, only: Mapping[str, Collection[str]]) -> BoolArray:
    """Return which items have, for each attribute, one of the given values.

    Args:
        catalog: N items.
        only: attribute -> values, compared as they stand; ``Games*`` is every value that begins with ``Games``, since
            categories are often paths.

    Returns:
        (N,), all True without a filter.

    Raises:
        DomainError: an attribute that the catalog does not have.
    """
    passes = np.ones(len(catalog), dtype=np.bool_)
    for name, values in only.items():
        if name not in catalog.attributes:
            raise DomainError(
                f"recommend: found a filter on {name!r}, expected one of {list(catalog.attributes)}, the attributes of "
                f"{catalog.name}. Correct the name."
            )
        wanted = set(values)
        beginnings = tuple(value[:-1] for value in values if value.endswith("*"))
        column = catalog.attributes[name]
        found = (value in wanted or value.startswith(beginnings) for value in column)
        passes &= np.fromiter(found, np.bool_, len(catalog))
    return passes


def check_values(catalog: Catalog, only: Mapping[str, Collection[str]]) -> None:
    """Refuse a filter on a value that no item has.

    Raises:
        DomainError: as :func:`passing`; or names the values that come close.
    """
    for name, values in only.items():
        for value in values:
            if not passing(catalog, {name: [value]}).any():
                present = set(catalog.attributes[name]) - {""}
                close = difflib.get_close_matches(value, present, n=3)
                shown = ", ".join(map(repr, close or sorted(present)[:3]))
                raise DomainError(
                    f"recommend: no item of {catalog.name} has the {name} {value!r}, expected a value such as {shown}. "
                    "Give a value as it stands in the catalog, or its beginning with * behind it."
                )


def in_stock(catalog: Catalog, item_index: Mapping[str, int], item_ids: Collection[str]) -> BoolArray:
    """Return which items are in stock.

    Args:
        catalog: N items.
        item_index: item id -> position.
        item_ids: what is in stock; ids that the catalog does not have count for nothing.

    Raises:
        DomainError: the catalog has none of them.
    """
    available = np.zeros(len(catalog), dtype=np.bool_)
    available[[item_index[item] for item in item_ids if item in item_index]] = True
    if not available.any():
        raise DomainError(
            f"recommend: none of the {len(item_ids)} items in stock is in the catalog of {catalog.name}, expected ids "
            f"such as {catalog.item_ids[0]!r}. Check the file."
        )
    return available
