"""Pseudo-users: token sequences made from a catalog, with their vectors under the domain's own expert, the teacher.

Every kind is made from the items' vectors under the expert; none reads an interaction. Popular items need counts, which
are private: the caller must have them, and no message of a federation carries them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

from fedmerge.adapter import Adapter
from fedmerge.config import Text
from fedmerge.domain.catalog import Catalog
from fedmerge.encoder.backbone import Backbone
from fedmerge.encoder.encode import encode
from fedmerge.encoder.lora import applied
from fedmerge.encoder.text import Tokens, TokenTable, build_token_table, item_sequences, pack_sequences
from fedmerge.errors import ConfigError, DomainError, MergeError
from fedmerge.mergerec.contrast import CONTRAST_TEMPERATURE, adaptive_weights, contrast
from fedmerge.merging.stack import linear_merge, stack_adapters
from fedmerge.seeding import generator

Kind = Literal["one-item", "subset", "centroid", "popular", "chain", "contrastive", "contrastive-adaptive"]
CONTRASTIVE_KINDS = ("contrastive", "contrastive-adaptive")  # walks that contrast with the other experts

SUBSET_SIZE = 1000  # pseudo-users of a domain that are a choice among its items
LONGEST_CHAIN = 5
NEIGHBOURS = 10  # a chain continues with one of the 10 items most similar to its last item
ROUNDS = 20  # of k-means
BLOCK = 1024  # rows of similarities at once: never N × N
ADAPTIVE_BLOCK = 128  # the same for adaptive weights, which need several such matrices in float64
LARGE = 2**17  # items; of more, blocks have fewer rows, and walks compute the neighbours of the items that they visit
WALKS_OF_LARGE = 2000  # walks in a catalog of more than LARGE items: learning draws 1,600 pseudo-users by default

Neighbours = tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]
"""Items similar to each item, and their probabilities."""


@dataclass(frozen=True, slots=True)
class PseudoDomain:
    """The pseudo-users of one domain and their teacher.

    Attributes:
        name: the domain.
        items: N token sequences, int32: the texts of the items, which every model ranks.
        teacher_items: (N, d) float32, the items' vectors under the domain's own expert, L2-normalised.
        users: P token sequences, int32: the texts of the pseudo-users.
        teacher_users: (P, d) float32, their vectors under the expert, L2-normalised.
        amateur_items: (N, d) float32, the items' vectors under the average of the other domains' experts,
            L2-normalised; None unless the teacher is contrastive.
        amateur_users: (P, d) float32, the pseudo-users' vectors under it.
    """

    name: str
    items: Sequence[Tokens]
    teacher_items: torch.Tensor
    users: Sequence[Tokens]
    teacher_users: torch.Tensor
    amateur_items: torch.Tensor | None = None
    amateur_users: torch.Tensor | None = None

    def __post_init__(self) -> None:
        for what, sequences, vectors in (
            ("item", self.items, self.teacher_items),
            ("pseudo-user", self.users, self.teacher_users),
            ("item", self.items, self.amateur_items),
            ("pseudo-user", self.users, self.amateur_users),
        ):
            if vectors is None:
                continue
            found, expected = tuple(vectors.shape), len(sequences)
            if vectors.ndim != 2 or found[0] != expected or expected == 0:
                raise DomainError(
                    f"pseudo-users of {self.name!r}: found {expected} {what} sequences and teacher vectors of shape "
                    f"{found}, expected one vector per sequence and at least one sequence; encode the same catalog"
                )
            norms = torch.linalg.vector_norm(vectors, dim=1)
            if not torch.allclose(norms, torch.ones_like(norms), atol=1e-3):
                worst = int((norms - 1).abs().nan_to_num(torch.inf).argmax())
                raise DomainError(
                    f"pseudo-users of {self.name!r}: the teacher vector of {what} {worst} has norm "
                    f"{float(norms[worst]):.4g}, expected 1; use the vectors that encode returns"
                )


def pseudo_domains(
    backbone: Backbone,
    adapters: Mapping[str, Adapter],
    catalogs: Mapping[str, Catalog],
    text: Text,
    *,
    kind: str,
    number: int | None = None,
    seed: int,
    teacher: str = "expert",
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, PseudoDomain]:
    """Make the pseudo-users of every domain.

    Args:
        backbone: the frozen encoder; left as it was.
        adapters: domain -> expert.
        catalogs: domain -> catalog, of every domain in ``adapters``.
        text: section ``[text]``.
        kind, number, seed, teacher: as in :func:`pseudo_users_of`.
        progress: receives one line per domain.

    Raises:
        MergeError: a catalog is missing.
        ConfigError: contrastive pseudo-users or a contrastive teacher of a single domain.
    """
    missing = sorted(adapters.keys() - catalogs.keys())
    if missing:
        raise MergeError(
            f"learned merges: no catalog of {', '.join(missing)}. Put it into the folder server.catalogs, or let the "
            "clients send theirs (privacy.policy = 'adapter+catalog')."
        )
    made = {}
    for domain in sorted(adapters):
        table = build_token_table(
            catalogs[domain], backbone.tokenizer, text.max_attribute_tokens, backbone.special.attributes
        )
        made[domain] = pseudo_users_of(
            domain, backbone, adapters, table, text, kind=kind, number=number, seed=seed, teacher=teacher
        )
        progress(f"pseudo-users: {len(made[domain].users)} of {domain} ({kind}) with their expert's vectors")
    return made


def pseudo_users_of(
    domain: str,
    backbone: Backbone,
    adapters: Mapping[str, Adapter],
    table: TokenTable,
    text: Text,
    *,
    kind: str,
    number: int | None = None,
    seed: int,
    teacher: str = "expert",
) -> PseudoDomain:
    """Make the pseudo-users of one domain.

    Args:
        domain: name of the domain.
        backbone: the frozen encoder; left as it was.
        adapters: domain -> expert, of the whole cohort; contrastive pseudo-users and teachers need the other domains.
        table: token table of the domain's own catalog.
        text: section ``[text]``; its longest sequence and order are used.
        kind: a :data:`Kind` other than "popular".
        number: number of pseudo-users; None: as for :func:`pseudo_domain`.
        seed: seed of all draws.
        teacher: "expert"; or "contrastive", which adds the vectors under the average of the other experts.

    Raises:
        ConfigError: contrastive pseudo-users or a contrastive teacher of a single domain, or an unknown kind.
    """
    expert = adapters[domain]
    items = one_item_domain(domain, backbone, expert, table, text)
    contrasted = kind in CONTRASTIVE_KINDS or teacher == "contrastive"
    amateur = average_of_others(adapters, domain) if contrasted else None
    made = pseudo_domain(kind, items, backbone, expert, table, text, number=number, seed=seed, amateur=amateur)
    return made if teacher == "expert" else with_amateur(made, backbone, amateur)


def average_of_others(adapters: Mapping[str, Adapter], domain: str) -> Adapter | None:
    """Return the mean of the other domains' updates; None if there is no other domain."""
    others = {name: adapters[name] for name in sorted(adapters) if name != domain}
    return linear_merge(stack_adapters(others), torch.full((len(others),), 1 / len(others))) if others else None


def with_amateur(domain: PseudoDomain, backbone: Backbone, amateur: Adapter | None) -> PseudoDomain:
    """Add the vectors under another adapter, with which a contrastive teacher contrasts the expert.

    Raises:
        ConfigError: there is no other adapter.
    """
    if amateur is None:
        raise ConfigError(
            f"pseudo-users of {domain.name!r}: a contrastive teacher contrasts with the other experts, found none; set "
            "mergerec.teacher = 'expert'"
        )
    with applied(backbone, amateur):
        items = encode(backbone, domain.items)
        users = items if domain.users is domain.items else encode(backbone, domain.users)
    return replace(domain, amateur_items=items, amateur_users=users)


def one_item_domain(name: str, backbone: Backbone, expert: Adapter, table: TokenTable, text: Text) -> PseudoDomain:
    """Make the paper's pseudo-users: every item is a sequence of its own.

    Args:
        name: name of the domain.
        backbone: the frozen encoder; left as it was.
        expert: the domain's own adapter.
        table: token table of the domain's catalog, N items.
        text: section ``[text]``; its longest sequence and order are used.

    Returns:
        N pseudo-users with their (N, d) vectors under the expert.

    Source: arXiv:2601.01753, pseudo-users.
    Differs: the released code stores an N × N matrix of teacher scores; here are the vectors whose product it is.
    """
    items, special = item_sequences(table, backbone.special, text.max_tokens), backbone.special
    users = items
    if special.tells_apart or text.order == "newest-last":  # a history has another prompt, or is cut at its beginning
        users = pack_sequences(table, ([item] for item in range(len(table))), special, 1, text.max_tokens, text.order)
    with applied(backbone, expert):
        item_vectors = encode(backbone, items)
        user_vectors = item_vectors if users is items else encode(backbone, users)
    return PseudoDomain(name, items, item_vectors, users, user_vectors)


def subset_domain(domain: PseudoDomain, number: int, seed: int) -> PseudoDomain:
    """Make one-item pseudo-users of a random subset of the items."""
    size = min(number, len(domain.items))
    return _of_items(
        domain, generator(seed, "pseudo-users", "subset", domain.name).permutation(len(domain.items))[:size]
    )


def centroid_domain(domain: PseudoDomain, number: int, seed: int) -> PseudoDomain:
    """Make one-item pseudo-users of the items nearest to the centroids of a k-means over the expert's item vectors.

    A centroid is not a text that the merged model could read. The k-means is spherical (cosines), starts from a random
    subset and runs at most 20 rounds; centroids with the same nearest item give one pseudo-user.

    Args:
        domain: from :func:`one_item_domain`.
        number: number of centroids.
        seed: seed of the start.
    """
    vectors = domain.teacher_items
    start = generator(seed, "pseudo-users", "centroid", domain.name).permutation(len(vectors))[:number]
    centres = vectors[torch.from_numpy(start)]
    for _ in range(ROUNDS):
        nearest = torch.cat([(block @ centres.T).argmax(dim=1) for block in torch.split(vectors, BLOCK)])
        sums = torch.zeros_like(centres).index_add(0, nearest, vectors)
        norms = torch.linalg.vector_norm(sums, dim=1, keepdim=True)
        moved = torch.where(norms > 0, sums / norms.clamp(min=1e-12), centres)  # a centre without items does not move
        if torch.equal(moved, centres):
            break
        centres = moved
    chosen = torch.cat(
        [(block @ vectors.T).argmax(dim=1) for block in torch.split(centres, _rows(BLOCK, len(vectors)))]
    )
    return _of_items(domain, np.unique(chosen.numpy()))


def popular_domain(domain: PseudoDomain, counts: npt.NDArray[np.integer], number: int) -> PseudoDomain:
    """Make one-item pseudo-users of the most popular items; of equal counts, the first items are taken.

    Args:
        domain: from :func:`one_item_domain`.
        counts: (N,) occurrences of each item in the TRAINING part of the interactions. They are private: only the owner
            can count them, and no message of a federation carries them.
        number: number of pseudo-users.

    Raises:
        DomainError: the counts are of another catalog.
    """
    if counts.shape != (len(domain.items),):
        raise DomainError(
            f"pseudo-users of {domain.name!r}: found counts of shape {counts.shape}, expected one for each of "
            f"{len(domain.items)} items; count over the same catalog"
        )
    return _of_items(domain, np.argsort(-counts, kind="stable")[:number])


def chain_domain(
    domain: PseudoDomain,
    backbone: Backbone,
    expert: Adapter,
    table: TokenTable,
    text: Text,
    *,
    number: int | None = None,
    seed: int = 0,
    amateur: Adapter | None = None,
    adaptive: bool = False,
) -> PseudoDomain:
    """Make pseudo-users with a history of two to five items, random walks along the expert's item similarity.

    A walk starts at an item (each item once before any item twice) and continues with one of the ten items that the
    expert finds most similar to the last item and that are not in the walk yet. Without an amateur the ten are equally
    likely. With one (contrastive decoding) the probability is softmax(((1 + α) S_expert - β S_amateur) / 0.05), so
    items that only this domain's expert finds similar are preferred.

    Args:
        domain: from :func:`one_item_domain`.
        backbone: the frozen encoder; left as it was.
        expert: the domain's own adapter.
        table: token table of its catalog.
        text: section ``[text]``; its longest sequence and order are used.
        number: number of pseudo-users; None: as many as items, or WALKS_OF_LARGE of more than LARGE items.
        seed: seed of the walks.
        amateur: an adapter to contrast with, such as the average of the other experts.
        adaptive: α and β are :func:`fedmerge.mergerec.contrast.adaptive_weights` over all items but the last one;
            False: 0 and 1.

    Returns:
        Pseudo-users whose teacher vectors are the expert's encoding of the whole history.

    Source: substitution and insertion of similar items as in CoSeRec (arXiv:2108.06479); contrastive decoding
        (arXiv:2210.15097) between experts; its adaptive weights are Taesar-style (arXiv:2602.22743).
    """
    purpose = "chain" if amateur is None else "contrastive-adaptive" if adaptive else "contrastive"
    rng = generator(seed, "pseudo-users", purpose, domain.name)
    size = len(domain.items)
    theirs = _encoded(backbone, amateur, domain)
    if number is None:
        number = min(size, WALKS_OF_LARGE) if size > LARGE else size
    starts = np.concatenate([rng.permutation(size) for _ in range(-(-number // size))])[:number]
    if size > LARGE and number * LONGEST_CHAIN < size:

        def near(item: int) -> Neighbours:
            similar, chances = _neighbours(domain.teacher_items, theirs, adaptive, range(item, item + 1))
            return similar[0], chances[0]
    else:
        every = _neighbours(domain.teacher_items, theirs, adaptive, range(size))  # (N, m) each

        def near(item: int) -> Neighbours:
            return every[0][item], every[1][item]

    chains = [_walk(int(start), near, rng) for start in starts]
    users = pack_sequences(table, chains, backbone.special, LONGEST_CHAIN, text.max_tokens, text.order)
    with applied(backbone, expert):
        return replace(domain, users=users, teacher_users=encode(backbone, users))


def pseudo_domain(
    kind: str,
    domain: PseudoDomain,
    backbone: Backbone,
    expert: Adapter,
    table: TokenTable,
    text: Text,
    *,
    number: int | None,
    seed: int,
    amateur: Adapter | None,
) -> PseudoDomain:
    """Make pseudo-users of a kind that a server can make by itself.

    Args:
        kind: "one-item", "subset", "centroid", "chain", "contrastive" or "contrastive-adaptive".
        domain: from :func:`one_item_domain`; the other arguments as for :func:`chain_domain`.
        number: number of pseudo-users; None: SUBSET_SIZE for "subset" and "centroid", as for :func:`chain_domain` for
            walks, else as many as items.

    Raises:
        ConfigError: no such kind; "popular", whose counts a server does not have; a contrastive one without an amateur.
    """
    if kind not in get_args(Kind):
        raise ConfigError(f"pseudo-users: found kind {kind!r}, expected one of {', '.join(get_args(Kind))}")
    if kind == "popular":
        raise ConfigError(
            "pseudo-users: found kind 'popular', but popularity is counted on private interactions, which no message "
            "carries; choose another kind, or call popular_domain where the counts are known"
        )
    count = SUBSET_SIZE if number is None else number
    if kind == "subset":
        return subset_domain(domain, count, seed)
    if kind == "centroid":
        return centroid_domain(domain, count, seed)
    if kind == "one-item":
        return domain
    contrastive, adaptive = kind in CONTRASTIVE_KINDS, kind == "contrastive-adaptive"
    if contrastive and amateur is None:
        raise ConfigError(f"pseudo-users: kind {kind!r} contrasts with the other experts, found none; use 'chain'")
    other = amateur if contrastive else None
    return chain_domain(
        domain, backbone, expert, table, text, number=number, seed=seed, amateur=other, adaptive=adaptive
    )


def _of_items(domain: PseudoDomain, items: npt.NDArray[np.integer]) -> PseudoDomain:
    """Make one-item pseudo-users of these items."""
    chosen = torch.from_numpy(items.astype(np.int64))
    users = [domain.users[item] for item in items]
    return replace(domain, users=users, teacher_users=domain.teacher_users[chosen])


def _encoded(backbone: Backbone, amateur: Adapter | None, domain: PseudoDomain) -> torch.Tensor | None:
    if amateur is None:
        return None
    with applied(backbone, amateur):
        return encode(backbone, domain.items)


def _rows(block: int, num_items: int) -> int:
    """Return how many rows of similarities to N items are held at once."""
    return max(1, block * LARGE // max(LARGE, num_items))


def _neighbours(vectors: torch.Tensor, theirs: torch.Tensor | None, adaptive: bool, of: range) -> Neighbours:
    """Return the ten other items most similar to each of n items, and unnormalised probabilities: (n, m), m ≤ 10."""
    most = min(NEIGHBOURS, len(vectors) - 1)
    block = _rows(ADAPTIVE_BLOCK if adaptive else BLOCK, len(vectors))
    found, chances = [], []
    for start in range(of.start, of.stop, block):
        rows = torch.arange(start, min(start + block, of.stop))
        scores = _scores_of_others(vectors, rows)  # (b, N)
        values, items = scores.topk(most, dim=1)
        found.append(items)
        if theirs is None:
            chances.append(torch.ones_like(values))
            continue
        if adaptive:
            others = _scores_of_others(theirs, rows)  # (b, N)
            alpha, beta = (weight.gather(1, items) for weight in adaptive_weights(scores, others))
            score = contrast(values, others.gather(1, items), alpha, beta)  # (b, m)
        else:
            score = contrast(values, (theirs[items] * theirs[rows][:, None, :]).sum(dim=2), 0, 1)  # (b, m)
        chances.append(torch.softmax(score / CONTRAST_TEMPERATURE, dim=1))
    return torch.cat(found).numpy(), torch.cat(chances).double().numpy()


def _scores_of_others(vectors: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return the similarities of some items to all items (b, N), -inf to themselves."""
    scores = vectors[rows] @ vectors.T
    scores[torch.arange(len(rows)), rows] = -torch.inf
    return scores


def _walk(start: int, near: Callable[[int], Neighbours], rng: np.random.Generator) -> list[int]:
    chain = [start]
    for _ in range(int(rng.integers(1, LONGEST_CHAIN))):
        items, chances = near(chain[-1])
        weights = chances * ~np.isin(items, chain)
        if weights.sum() <= 0:  # every neighbour is in the chain
            break
        chain.append(int(rng.choice(items, p=weights / weights.sum())))
    return chain
