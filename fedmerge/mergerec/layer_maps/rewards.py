"""The reward on pseudo-users: how near a map ranks to each domain's own expert. No interaction is read."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from fedmerge import seeding
from fedmerge.encoder.backbone import Backbone
from fedmerge.encoder.encode import encode
from fedmerge.encoder.lora import applied
from fedmerge.encoder.text import Tokens
from fedmerge.errors import ConfigError
from fedmerge.mergerec.layer_maps.candidates import LayerCandidates, LayerMap, assemble
from fedmerge.mergerec.layer_maps.episodes import OTHERS, ReadMap, Sums
from fedmerge.mergerec.objective import TERMS, MergeRecSettings, weighted_total
from fedmerge.mergerec.pseudo_users import PseudoDomain

MOST_ITEMS = 2000  # of a domain that a search ranks; its cost is that of encoding them
USERS_AT_ONCE = 512


@dataclass(frozen=True, slots=True)
class Readers:
    """Users of one domain, by number.

    Attributes:
        shards: the users of the search, in equal parts.
        others: the users of the second reading.
    """

    shards: tuple[npt.NDArray[np.int64], ...]
    others: npt.NDArray[np.int64]

    def at(self, shard: int) -> npt.NDArray[np.int64]:
        """Return the users of a shard, or those of the second reading for OTHERS."""
        return self.others if shard == OTHERS else self.shards[shard]


def draw_readers(name: str, order: npt.NDArray[np.int64], num_users: int, num_shards: int) -> Readers:
    """Divide users into the shards of a search and others of the same number, half of them at most.

    Args:
        name: the domain.
        order: users in the order in which they are taken.
        num_users: users of the search.
        num_shards: number of shards.

    Raises:
        ConfigError: a shard would have no user.
    """
    number = min(num_users, len(order) // 2)
    if number < num_shards:
        raise ConfigError(
            f"domain {name}: rmm.shards = {num_shards} divides {number} users (rmm.users, and at most half of the "
            f"{len(order)} that there are), expected one user a shard or more; lower rmm.shards or raise rmm.users"
        )
    parts = np.array_split(order[:number], num_shards)
    return Readers(tuple(np.sort(part) for part in parts), np.sort(order[number : 2 * number]))


def draw_items(name: str, num_items: int, seed: int) -> npt.NDArray[np.int64]:
    """Draw the items of a domain that a search ranks, ascending: all, or 2,000 of them."""
    drawn = seeding.generator(seed, "rmm", "items", name).permutation(num_items)[:MOST_ITEMS]
    return np.sort(drawn).astype(np.int64)


def on_pseudo_users(
    backbone: Backbone,
    candidates: LayerCandidates,
    domains: Mapping[str, PseudoDomain],
    settings: MergeRecSettings,
    num_users: int,
    num_shards: int,
) -> ReadMap:
    """Return a function that reads maps by pseudo-users: the outcome of one is −1000 · L_kd, 0 at its own expert.

    Args:
        backbone: the frozen encoder; left as it was.
        candidates: what a group can take.
        domains: domain -> pseudo-users, for exactly the domains of the candidates.
        settings: of mergerec; kd_weight, kd_top_k, temperature and seed are read.
        num_users: pseudo-users a domain in the search, and as many others; at most half of them each.
        num_shards: shards of the pseudo-users.

    Raises:
        ConfigError: a domain has fewer pseudo-users than shards.
    """
    settings = replace(settings, loss="kd")
    readers, items = dict[str, Readers](), dict[str, npt.NDArray[np.int64]]()
    for name in candidates.layout.domains:
        order = seeding.generator(settings.seed, "rmm", "pseudo-users", name).permutation(len(domains[name].users))
        readers[name] = draw_readers(name, order.astype(np.int64), num_users, num_shards)
        items[name] = draw_items(name, len(domains[name].items), settings.seed)

    def read(layer_map: LayerMap, shard: int) -> Sums:
        with applied(backbone, assemble(candidates, layer_map)):
            return {
                name: _outcomes(backbone, domains[name], items[name], of_domain.at(shard), settings)
                for name, of_domain in readers.items()
            }

    return read


@torch.no_grad()
def _outcomes(
    backbone: Backbone,
    domain: PseudoDomain,
    items: npt.NDArray[np.int64],
    users: npt.NDArray[np.int64],
    settings: MergeRecSettings,
) -> tuple[int, float]:
    """Return number and sum of the outcomes of some pseudo-users under the adapter that is applied."""
    texts: list[Tokens] = [*(domain.items[item] for item in items), *(domain.users[user] for user in users)]
    distinct = {text.tobytes(): text for text in texts}  # a one-item user is an item, and is encoded once
    row_of = {text: row for row, text in enumerate(distinct)}
    encoded = encode(backbone, list(distinct.values()))[[row_of[text.tobytes()] for text in texts]]
    students, vectors = encoded[: len(items)], encoded[len(items) :]  # (n, d), (U, d)
    teachers, theirs = domain.teacher_items[torch.from_numpy(items)], domain.teacher_users[torch.from_numpy(users)]
    total = 0.0
    for z_users, S_users in zip(torch.split(vectors, USERS_AT_ONCE), torch.split(theirs, USERS_AT_ONCE), strict=True):
        losses = TERMS["kd"](z_users @ students.T, S_users @ teachers.T, settings)
        total -= float(weighted_total({"kd": losses.double().sum()}, settings))
    return len(users), total
