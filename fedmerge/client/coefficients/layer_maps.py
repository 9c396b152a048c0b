"""A layer map read by a client's validation users: their number and the sum of their NDCG@10, nothing else.

The users who search and those who choose are drawn from the validation users. Those whom the run's own validation does
not read come first, so that the selection of methods is on users who took no part, where there are enough.
"""

import numpy as np
import numpy.typing as npt
import torch

from fedmerge import seeding
from fedmerge.adapter import Adapter
from fedmerge.client.local_domain import LocalDomain
from fedmerge.domain.splits import Examples, evaluated_users, examples_of
from fedmerge.encoder.encode import encode
from fedmerge.encoder.lora import applied
from fedmerge.evaluation.ranks import METRICS, SELECTION_METRIC, per_user_metrics, rank_targets
from fedmerge.mergerec.layer_maps.rewards import Readers, draw_items, draw_readers


def validation_readers(domain: LocalDomain, validated: Examples, num_users: int, num_shards: int, seed: int) -> Readers:
    """Draw the users of a search, in shards, and as many others; the same for every map of a run.

    Args:
        domain: the client's domain.
        validated: the examples of the run's own validation, whose users come last.
        num_users: users of the search; at most half of the validation users.
        num_shards: shards.
        seed: seed of the draw.

    Raises:
        ConfigError: fewer users than shards.
    """
    users = evaluated_users(domain.interactions, "valid")
    name = domain.manifest.name
    drawn = seeding.generator(seed, "rmm", "validation-users", name).permutation(users)
    order = np.argsort(np.isin(drawn, validated.users), kind="stable")
    return draw_readers(name, drawn[order], num_users, num_shards)


def ndcg_of(domain: LocalDomain, adapter: Adapter, users: npt.NDArray[np.int64], seed: int) -> tuple[int, float]:
    """Return the number of users and the sum of their NDCG@10 under an adapter, unmasked.

    The candidates of a user are up to 2,000 drawn items, the same for everyone, and the user's target: for a search
    alone. With at most 2,000 items this is the full ranking.

    Args:
        domain: the client's domain.
        adapter: the adapter of a map.
        users: indices of validation users.
        seed: seed of the draw of items.
    """
    examples = examples_of(domain.interactions, "valid", users)
    drawn = draw_items(domain.manifest.name, domain.manifest.num_items, seed)
    items = np.union1d(drawn, examples.targets)
    only_targets = np.flatnonzero(~np.isin(items, drawn))
    packed = domain.packed(examples.histories)
    with torch.no_grad(), applied(domain.backbone, adapter):
        histories = encode(domain.backbone, packed)  # (U, d)
        vectors = encode(domain.backbone, [domain.item_sequences[item] for item in items])  # (n, d)
    left_out = [only_targets] * len(users) if len(only_targets) else None  # a user's own target stays
    ranks = rank_targets(histories, vectors, np.searchsorted(items, examples.targets), left_out)
    return len(users), float(per_user_metrics(ranks)[:, METRICS.index(SELECTION_METRIC)].sum())
