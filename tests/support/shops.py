"""Shops of one catalog: the users of a demo domain, split."""

from itertools import pairwise
from pathlib import Path

import numpy as np

from fedmerge.domain.catalog import make_catalog
from fedmerge.domain.demo import generate_domain
from fedmerge.domain.folder import write_domain
from fedmerge.domain.interactions import make_interactions

SHOPS = ("shop-a", "shop-b", "shop-c")


def write_shops(root: Path, num_users: int = 30, num_items: int = 25) -> None:
    """Write three shops with so many users each; the last sells all but item 0, in reverse order."""
    demo = generate_domain("books", num_users=len(SHOPS) * num_users, num_items=num_items)
    offsets = demo.interactions.offsets
    sequences = [demo.interactions.items[start:end] for start, end in pairwise(offsets)]
    for number, shop in enumerate(SHOPS):
        order = np.arange(num_items)[:0:-1] if shop == SHOPS[-1] else np.arange(num_items)
        place = np.full(num_items, -1)
        place[order] = np.arange(len(order))
        own = [place[sequence] for sequence in sequences[number * num_users : (number + 1) * num_users]]
        catalog = make_catalog(
            shop,
            [demo.catalog.item_ids[item] for item in order],
            {name: [values[item] for item in order] for name, values in demo.catalog.attributes.items()},
        )
        users = make_interactions(
            [f"{shop}-u{user}" for user in range(num_users)], [items[items >= 0].astype(np.int32) for items in own]
        )
        write_domain(
            root / shop, catalog, users, public_catalog=True, synthetic=True, source="test", catalog_source="given"
        )
