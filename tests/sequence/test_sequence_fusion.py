"""Fusion of scores against a slow one in float64, its ends, and the choice of weights against trying all of them."""

import itertools

import numpy as np
import numpy.typing as npt
import pytest
import torch

from fedmerge.errors import DivergedError, LayoutMismatchError
from fedmerge.evaluation.ranks import METRICS, IntArray, per_user_metrics, rank_targets, target_ranks
from fedmerge.sequence import fusion
from fedmerge.sequence.fusion import choose_weights, fused_ranks, fused_scores
from fedmerge.sequence.ranking import Source

NUM_USERS, NUM_ITEMS = 30, 50
RNG = np.random.default_rng(0)
TARGETS = RNG.integers(0, NUM_ITEMS, NUM_USERS)
SEEN: list[IntArray] = [RNG.integers(0, NUM_ITEMS, RNG.integers(1, 9)) for _ in range(NUM_USERS)]
SEEN[3] = np.append(SEEN[3], TARGETS[3])  # a repeated purchase is still ranked
ALL_SEEN = pytest.mark.parametrize("seen", [None, SEEN], ids=["unmasked", "masked"])


def source(label: str, width: int, seed: int) -> Source:
    rng = torch.Generator().manual_seed(seed)
    return Source(
        label,
        torch.randn(NUM_USERS, width, generator=rng) * 3**seed,
        torch.randn(NUM_ITEMS, width, generator=rng) + seed,
    )


SOURCES = (source("head", 4, 0), source("text", 7, 1), source("last item", 7, 2))


def standardised(part: Source) -> npt.NDArray[np.float64]:
    scores = part.user_vectors.double().numpy() @ part.item_vectors.double().numpy().T
    return np.stack([(row - row.mean()) / row.std() for row in scores])


@ALL_SEEN
@pytest.mark.parametrize("weights", [(0.3, 0.3, 0.4), (0.9, 0.1, 0.0), (0.0, 0.5, 0.5)])
def test_ranks_are_those_of_the_definition(weights: tuple[float, ...], seen: list[IntArray] | None) -> None:
    scores = np.add.reduce([weight * standardised(part) for weight, part in zip(weights, SOURCES, strict=True)])
    np.testing.assert_allclose(fused_scores(SOURCES, weights).numpy(), scores, rtol=1e-3, atol=1e-5)
    expected = []
    for user, target in enumerate(TARGETS.tolist()):
        removed = {target} if seen is None else {target, *seen[user].tolist()}
        rivals = [item for item in range(NUM_ITEMS) if item not in removed]
        expected.append(1 + sum(bool(scores[user][item] >= scores[user][target]) for item in rivals))
    for block_size in (1, 7, None):
        assert fused_ranks(SOURCES, weights, TARGETS, seen, block_size=block_size).tolist() == expected


@ALL_SEEN
@pytest.mark.parametrize("end", [0, 1, 2])
def test_a_weight_of_one_gives_the_ranks_of_its_source(end: int, seen: list[IntArray] | None) -> None:
    weights = tuple(float(index == end) for index in range(3))
    part = SOURCES[end]
    alone = rank_targets(part.user_vectors, part.item_vectors, TARGETS, seen)
    assert np.array_equal(fused_ranks(SOURCES, weights, TARGETS, seen), alone)
    assert torch.equal(fused_scores(SOURCES, weights), part.user_vectors @ part.item_vectors.T)


def test_one_source_alone_can_be_fused() -> None:
    part = SOURCES[0]
    assert np.array_equal(
        fused_ranks([part], [1.0], TARGETS), rank_targets(part.user_vectors, part.item_vectors, TARGETS)
    )
    assert choose_weights([part], TARGETS, None, [1], 1).weights == (1.0,)


@pytest.mark.parametrize("change", ["scaled", "constant added"])
def test_scaling_or_a_constant_changes_nothing(change: str) -> None:
    head, text, last = SOURCES
    if change == "scaled":
        changed = Source("text", text.user_vectors * 40, text.item_vectors)
    else:  # 11 for each item, a different number for each user
        eleven = torch.full((NUM_ITEMS, 1), 11.0)
        shift = torch.linspace(-1, 1, NUM_USERS)[:, None]
        changed = Source(
            "text", torch.cat([text.user_vectors, shift], dim=1), torch.cat([text.item_vectors, eleven], dim=1)
        )
    weights = (0.2, 0.5, 0.3)
    before, after = fused_scores(SOURCES, weights), fused_scores((head, changed, last), weights)
    torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-4)
    assert np.array_equal(fused_ranks(SOURCES, weights, TARGETS), fused_ranks((head, changed, last), weights, TARGETS))


def test_equal_scores_say_nothing_and_equal_items_are_ties() -> None:
    head, text, _ = SOURCES
    silent = Source("last item", torch.full((NUM_USERS, 3), 0.1), torch.full((NUM_ITEMS, 3), 0.7))
    ranks = fused_ranks((head, text, silent), (0.25, 0.25, 0.5), TARGETS)
    assert np.array_equal(ranks, fused_ranks((head, text), (0.5, 0.5), TARGETS))
    assert not fused_scores((head, silent), (0.0, 1.0)).std(dim=1).gt(1e-6).any()
    twins = torch.arange(NUM_ITEMS) // 2
    doubled = [Source(part.label, part.user_vectors, part.item_vectors[twins]) for part in SOURCES]
    ranks = fused_ranks(doubled, (0.3, 0.3, 0.4), TARGETS)
    assert np.array_equal(ranks, fused_ranks(doubled, (0.3, 0.3, 0.4), TARGETS ^ 1))
    assert (ranks % 2 == 0).all()  # the twin of the target counts against it


@ALL_SEEN
@pytest.mark.parametrize("num_sources", [2, 3])
def test_the_best_of_all_weights_is_chosen_and_shrunk(
    num_sources: int, seen: list[IntArray] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Some users follow one source and some another, so that a mixture is best.
    scores = [standardised(part) for part in SOURCES]
    targets = np.array([(scores[user % 3] + scores[0])[user].argsort()[-3] for user in range(NUM_USERS)])
    sources = SOURCES[:num_sources]
    found = {}
    for whole in itertools.product(range(11), repeat=num_sources):
        if sum(whole) == 10:
            weights = tuple(part / 10 for part in whole)
            ranks = fused_ranks(sources, weights, targets, seen)
            found[weights] = float(per_user_metrics(ranks)[:, METRICS.index("ndcg@10")].mean())
    best = max(found.values())
    chosen = max(weights for weights, ndcg in found.items() if ndcg == best)
    towards = (0.0, 1.0, 0.0)[:num_sources]  # as if 200 more users kept to them
    shrunk = tuple((50 * weight + 200 * start) / 250 for weight, start in zip(chosen, towards, strict=True))
    ranks = fused_ranks(sources, shrunk, targets, seen)
    ndcg = float(per_user_metrics(ranks)[:, METRICS.index("ndcg@10")].mean())
    monkeypatch.setattr(fusion, "USERS_PER_BLOCK", 1)
    for scores_per_block in (1, 7 * NUM_ITEMS, fusion.SCORES_PER_BLOCK):
        monkeypatch.setattr(fusion, "SCORES_PER_BLOCK", scores_per_block)
        choice = choose_weights(sources, targets, seen, towards, 50)
        assert choice.weights == pytest.approx(shrunk)
        assert choice.ndcg == pytest.approx(ndcg)
    assert best > max(found[tuple(float(i == j) for j in range(num_sources))] for i in range(num_sources))


def test_a_domain_of_many_users_is_hardly_held_back() -> None:
    head, text, _ = SOURCES
    targets = standardised(head).argmax(axis=1)  # the head is always right
    for num_users, weight in [(0, 0.0), (200, 0.5), (19_800, 0.99)]:
        choice = choose_weights((head, text), targets, None, (0, 1), num_users)
        assert choice.weights == pytest.approx((weight, 1 - weight))


def test_scores_of_few_users_are_ranked_as_those_of_many() -> None:
    weights = (0.5, 0.2, 0.3)
    assert np.array_equal(
        target_ranks(fused_scores(SOURCES, weights), TARGETS, SEEN), fused_ranks(SOURCES, weights, TARGETS, SEEN)
    )


def test_what_does_not_fit_is_refused() -> None:
    head, text, _ = SOURCES
    for weights in [(0.5,), (0.7, 0.7), (1.5, -0.5), (0.0, 0.0)]:
        with pytest.raises(LayoutMismatchError, match="one weight of each"):
            fused_ranks((head, text), weights, TARGETS)
    shorter = Source("text", text.user_vectors, text.item_vectors[:-1])
    with pytest.raises(LayoutMismatchError, match=r"\(30, 49\), \(30, 50\)"):
        choose_weights((head, shorter), TARGETS, None, (0, 1), 1)
    with pytest.raises(LayoutMismatchError, match="one item for each of 30 users"):
        fused_ranks((head, text), (0.5, 0.5), TARGETS[:-1])
    wild = Source("head", head.user_vectors * float("inf"), head.item_vectors)
    for ranked in (
        lambda: fused_ranks((wild, text), (0.5, 0.5), TARGETS),
        lambda: choose_weights((wild, text), TARGETS, None, (0, 1), 1),
    ):
        with pytest.raises(DivergedError, match="NaN or infinite"):
            ranked()
