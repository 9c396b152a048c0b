"""Pseudo-users of every kind: their texts and teacher vectors, without private data."""

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from adapters import layout_of, random_adapter
from backbones import tiny_bert

from fedmerge.adapter import Adapter
from fedmerge.config import Text
from fedmerge.device import resolve_compute
from fedmerge.domain.demo import generate_domain
from fedmerge.encoder.backbone import Backbone, load_backbone
from fedmerge.encoder.encode import encode
from fedmerge.encoder.lora import applied
from fedmerge.encoder.text import TokenTable, build_token_table, pack_sequences
from fedmerge.errors import ConfigError, DomainError
from fedmerge.mergerec import pseudo_users
from fedmerge.mergerec.pseudo_users import (
    CONTRASTIVE_KINDS,
    LONGEST_CHAIN,
    NEIGHBOURS,
    PseudoDomain,
    _neighbours,
    centroid_domain,
    chain_domain,
    one_item_domain,
    popular_domain,
    pseudo_domain,
    subset_domain,
)

NUM_ITEMS = 30
MAX_TOKENS = 40
LONG = Text(max_tokens=127)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return load_backbone(str(tiny_bert(tmp_path_factory.mktemp("bert"))), "mean", resolve_compute("cpu", "float32"))


@pytest.fixture(scope="module")
def expert(bert: Backbone) -> Adapter:
    return random_adapter(layout_of(bert), rank=2, scaling=1.0, seed=0)


@pytest.fixture(scope="module")
def table(bert: Backbone) -> TokenTable:
    return build_token_table(generate_domain("camping", num_users=1, num_items=NUM_ITEMS).catalog, bert.tokenizer, 6)


@pytest.fixture(scope="module")
def items(bert: Backbone, expert: Adapter, table: TokenTable) -> PseudoDomain:
    return one_item_domain("camping", bert, expert, table, Text(max_tokens=MAX_TOKENS))


@pytest.fixture(scope="module")
def amateur(bert: Backbone) -> Adapter:
    return random_adapter(layout_of(bert), rank=2, scaling=1.0, seed=9)


@pytest.fixture(scope="module")
def theirs(bert: Backbone, amateur: Adapter, items: PseudoDomain) -> torch.Tensor:
    """The items' vectors under the amateur."""
    with applied(bert, amateur):
        return encode(bert, items.items)


def chosen(domain: PseudoDomain, items: PseudoDomain) -> list[int]:
    """Return the items of one-item pseudo-users, after a check of texts and vectors."""
    found = [next(i for i, text in enumerate(items.items) if text is user) for user in domain.users]
    assert torch.equal(domain.teacher_users, items.teacher_items[found])
    assert domain.items is items.items
    return found


def test_a_subset_is_drawn_once_and_by_seed(items: PseudoDomain) -> None:
    drawn = chosen(subset_domain(items, 12, seed=3), items)
    assert len(set(drawn)) == 12
    assert drawn == chosen(subset_domain(items, 12, seed=3), items)
    assert drawn != chosen(subset_domain(items, 12, seed=4), items)
    assert sorted(chosen(subset_domain(items, 999, seed=0), items)) == list(range(NUM_ITEMS))


def test_centroids_represent_the_clusters() -> None:
    angles = torch.tensor([0.00, 0.02, 0.04, 1.50, 1.52, 1.54, 3.00, 3.02, 3.04])  # three bundles of three
    vectors = torch.stack([angles.cos(), angles.sin()], dim=1)
    texts = [np.array([i], np.int32) for i in range(9)]
    bundles = PseudoDomain("x", texts, vectors, texts, vectors)
    found = {tuple(chosen(centroid_domain(bundles, 3, seed), bundles)) for seed in range(20)}
    assert (1, 4, 7) in found  # the middle of each; a start with two centres in one bundle can stay stuck
    assert all(1 <= len(items) <= 3 for items in found)
    assert chosen(centroid_domain(bundles, 9, 0), bundles) == list(range(9))


def test_popular_items_come_first_in_the_catalog_order_of_ties(items: PseudoDomain) -> None:
    counts = np.zeros(NUM_ITEMS, np.int64)
    counts[[7, 3, 20, 11]] = (5, 2, 9, 2)
    assert chosen(popular_domain(items, counts, 4), items) == [20, 7, 3, 11]
    with pytest.raises(DomainError, match=r"'camping': .*\(29,\), .* 30"):
        popular_domain(items, counts[:-1], 4)


def walks(domain: PseudoDomain, table: TokenTable, bert: Backbone) -> list[list[int]]:
    """Return the chains of items, oldest first, recovered from the tokens of the texts."""
    texts = {pack_sequences(table, [[i]], bert.special, 1, MAX_TOKENS)[0][1:-1].tobytes(): i for i in range(NUM_ITEMS)}
    assert len(texts) == NUM_ITEMS
    separator = int(table.separator[0])
    found = []
    for user in domain.users:
        body = user[1:-1]
        parts = np.split(body, np.flatnonzero(body == separator))
        found.append([texts[(part if n == 0 else part[1:]).tobytes()] for n, part in enumerate(parts)][::-1])
    return found


def test_chains_walk_among_the_most_similar_items(
    bert: Backbone, expert: Adapter, table: TokenTable, items: PseudoDomain
) -> None:
    domain = chain_domain(items, bert, expert, table, LONG, number=45, seed=1)
    similarity = items.teacher_items @ items.teacher_items.T - 2 * torch.eye(NUM_ITEMS)
    nearest = similarity.topk(NEIGHBOURS, dim=1).indices.tolist()
    chains = walks(domain, table, bert)
    assert len(chains) == 45
    assert sorted(chain[0] for chain in chains[:NUM_ITEMS]) == list(range(NUM_ITEMS))
    assert {len(chain) for chain in chains} == set(range(2, LONGEST_CHAIN + 1))
    for chain in chains:
        assert len(set(chain)) == len(chain)
        assert all(after in nearest[before] for before, after in itertools.pairwise(chain))
    with applied(bert, expert):
        assert torch.equal(domain.teacher_users, encode(bert, domain.users))
    again = chain_domain(items, bert, expert, table, LONG, number=45, seed=1)
    assert walks(again, table, bert) == chains
    assert walks(chain_domain(items, bert, expert, table, LONG, number=45, seed=2), table, bert) != chains


def test_a_few_walks_in_a_large_catalog_are_those_of_the_neighbours_of_all_items(
    bert: Backbone, expert: Adapter, table: TokenTable, items: PseudoDomain, monkeypatch: pytest.MonkeyPatch
) -> None:
    amateur = random_adapter(layout_of(bert), 2, 0.5, 7)
    computed, whole = list[int](), pseudo_users.LARGE

    def counted(*of: Any) -> Any:
        computed.append(len(of[-1]))
        return _neighbours(*of)

    monkeypatch.setattr(pseudo_users, "_neighbours", counted)
    for changes in ({}, {"amateur": amateur}, {"amateur": amateur, "adaptive": True}):
        found = []
        for large in (whole, 1):
            monkeypatch.setattr(pseudo_users, "LARGE", large)
            found.append(walks(chain_domain(items, bert, expert, table, LONG, number=5, **changes), table, bert))
        assert found[0] == found[1]
    assert set(computed) == {1, NUM_ITEMS}


def test_contrast_prefers_items_that_only_the_expert_finds_similar(
    bert: Backbone, expert: Adapter, amateur: Adapter, theirs: torch.Tensor, table: TokenTable, items: PseudoDomain
) -> None:
    advantage = items.teacher_items @ items.teacher_items.T - theirs @ theirs.T

    def mean_advantage(domain: PseudoDomain) -> float:
        steps = [pair for chain in walks(domain, table, bert) for pair in itertools.pairwise(chain)]
        return float(np.mean([advantage[before, after] for before, after in steps]))

    plain = chain_domain(items, bert, expert, table, LONG, number=300, seed=0)
    contrastive = chain_domain(items, bert, expert, table, LONG, number=300, seed=0, amateur=amateur)
    assert mean_advantage(contrastive) > mean_advantage(plain) + 0.005


def adaptive_score(S: np.ndarray, M: np.ndarray) -> np.ndarray:
    """(1 + α) S - β M over a catalog, from the definition; β = 0 where both are one model."""
    p, q = np.exp(S / 0.05), np.exp(M / 0.05)
    p, q = p / p.sum(), q / q.sum()
    m = (p + q) / 2
    entropy, divergence = -p * np.log(p), (p * np.log(p / m) + q * np.log(q / m)) / 2
    alpha = (1 - entropy) / (1 - entropy.max())
    beta = divergence / divergence.max() if np.any(S != M) else 0 * divergence
    found: np.ndarray = (1 + alpha) * S - beta * M
    return found


@pytest.mark.long
def test_the_first_step_of_a_walk_has_the_probabilities_of_the_definition(
    bert: Backbone, expert: Adapter, amateur: Adapter, theirs: torch.Tensor, table: TokenTable, items: PseudoDomain
) -> None:
    S, M = (vectors.double().numpy() @ vectors.double().numpy().T for vectors in (items.teacher_items, theirs))
    for contrast, adaptive in ((None, False), (amateur, False), (amateur, True), (expert, True)):
        domain = chain_domain(
            items, bert, expert, table, LONG, number=40 * NUM_ITEMS, seed=0, amateur=contrast, adaptive=adaptive
        )
        steps = Counter((chain[0], chain[1]) for chain in walks(domain, table, bert))
        surprise = 0.0
        for start in range(NUM_ITEMS):
            similarity = [float(items.teacher_items[start] @ other) for other in items.teacher_items]
            others = sorted({*range(NUM_ITEMS)} - {start}, key=lambda item: -similarity[item])[:NEIGHBOURS]
            if adaptive:
                score = adaptive_score(
                    np.delete(S[start], start), np.delete((M if contrast is amateur else S)[start], start)
                )
                advantage = [score[item - (item > start)] for item in others]
            else:
                advantage = [similarity[item] - float(theirs[start] @ theirs[item]) for item in others]
            chances = np.exp(np.array(advantage) / 0.05 if contrast else np.zeros(NEIGHBOURS))
            expected = 40 * chances / chances.sum()
            assert sum(steps[start, item] for item in others) == 40
            surprise += sum((steps[start, i] - e) ** 2 / e for i, e in zip(others, expected, strict=True))
        freedom = NUM_ITEMS * (NEIGHBOURS - 1)
        assert abs(surprise - freedom) < 4 * (2 * freedom) ** 0.5  # chi-squared


def test_kinds_by_name(bert: Backbone, expert: Adapter, table: TokenTable, items: PseudoDomain) -> None:
    def made(kind: str, **changes: Any) -> PseudoDomain:
        settings = {"number": 7, "seed": 0, "amateur": expert, **changes}
        return pseudo_domain(kind, items, bert, expert, table, Text(max_tokens=MAX_TOKENS), **settings)

    assert made("one-item") is items
    sizes: dict[str, Callable[[int], bool]] = {"subset": (7).__eq__, "centroid": (7).__ge__, "chain": (7).__eq__}
    for kind, right in sizes.items():
        assert right(len(made(kind).users)), kind
    assert len(made("chain", number=None).users) == NUM_ITEMS
    assert len(made("contrastive").users) == len(made("contrastive-adaptive").users) == 7
    with pytest.raises(ConfigError, match="'popular'"):
        made("popular")
    for kind in CONTRASTIVE_KINDS:
        with pytest.raises(ConfigError, match=rf"'{kind}'.*'chain'"):
            made(kind, amateur=None)
    with pytest.raises(ConfigError, match=r"'typical', .*one-item, subset, centroid"):
        made("typical")


def test_a_catalog_of_two_items_still_has_chains(bert: Backbone, expert: Adapter) -> None:
    table = build_token_table(generate_domain("camping", num_users=1, num_items=NUM_ITEMS).catalog, bert.tokenizer, 6)
    two = TokenTable(table.ids, table.offsets[:3], table.separator)
    items = one_item_domain("two", bert, expert, two, Text(max_tokens=MAX_TOKENS))
    assert {len(chain) for chain in walks(chain_domain(items, bert, expert, two, LONG, number=9), table, bert)} == {2}
