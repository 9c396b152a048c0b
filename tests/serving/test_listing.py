"""Lists equal slow oracles written from the definitions: the best items, diversity, popularity."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmerge.errors import ConfigError
from fedmerge.serving.listing import Listing, best, blended, diversified, popularity_source, select

NOBODY = np.zeros(0, dtype=np.int64)


def unit_vectors(number: int, width: int = 5, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(number, width, generator=rng))


def slow_mmr(scores: list[float], vectors: list[list[float]], k: int, diversity: float) -> list[int]:
    """Maximal marginal relevance, one candidate and one comparison at a time."""
    low, high = min(scores), max(scores)
    relevance = [(score - low) / (high - low) if high > low else 0.0 for score in scores]
    chosen: list[int] = []
    while len(chosen) < min(k, len(scores)):
        values = {}
        for candidate in range(len(scores)):
            if candidate in chosen:
                continue
            similar = [sum(a * b for a, b in zip(vectors[candidate], vectors[j], strict=True)) for j in chosen]
            values[candidate] = (1 - diversity) * relevance[candidate] - diversity * max(similar, default=0.0)
        chosen.append(max(values, key=lambda candidate: values[candidate]))
    return chosen


def slow_z(values: list[float]) -> list[float]:
    mean = sum(values) / len(values)
    std = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
    return [(value - mean) / std if std else 0.0 for value in values]


@given(st.lists(st.integers(-3, 3) | st.just(-math.inf), min_size=1, max_size=20), st.integers(1, 25))
def test_the_best_are_those_of_a_stable_sort(values: list[float], k: int) -> None:
    scores = np.array(values, dtype=np.float32)
    order = sorted(range(len(values)), key=lambda i: -values[i])
    assert best(scores, k).tolist() == [i for i in order if values[i] > -math.inf][:k]


@pytest.mark.parametrize("diversity", [0.1, 0.5, 0.9, 1.0])
def test_a_diverse_list_is_that_of_the_definition(diversity: float) -> None:
    for seed in range(5):
        vectors = unit_vectors(12, seed=seed)
        scores = np.sort(np.random.default_rng(seed).normal(size=12).astype(np.float32))[::-1].copy()
        wanted = slow_mmr(scores.tolist(), vectors.tolist(), 6, diversity)
        assert diversified(scores, vectors.numpy(), 6, diversity).tolist() == wanted


def test_diversity_by_hand() -> None:
    vectors = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    scores = np.array([0.9, 0.8, 0.7], dtype=np.float32)
    assert select(scores, vectors, NOBODY, Listing(2)).tolist() == [0, 1]
    assert select(scores, vectors, NOBODY, Listing(2, diversity=0.5)).tolist() == [0, 2]  # 1 is 0 again
    assert diversified(scores[:0], vectors[:0].numpy(), 2, 0.5).tolist() == []
    assert diversified(np.ones(3, dtype=np.float32), vectors.numpy(), 3, 0.5).tolist() == [0, 2, 1]


def test_a_diverse_list_begins_with_the_best_and_holds_no_seen_or_filtered_item() -> None:
    vectors, scores = unit_vectors(400), np.random.default_rng(0).normal(size=400).astype(np.float32)
    allowed = np.arange(400) % 3 > 0
    seen = np.array([1, 2, 2, 5])
    found = select(scores, vectors, seen, Listing(20, allowed=allowed, diversity=0.7))
    candidates = [i for i in range(400) if allowed[i] and i not in seen]
    pool = sorted(candidates, key=lambda i: -scores[i])[:200]
    wanted = slow_mmr([float(scores[i]) for i in pool], vectors[pool].tolist(), 20, 0.7)
    assert found.tolist() == [pool[i] for i in wanted]
    assert found[0] == pool[0]
    kept = select(scores, vectors, seen, Listing(400, keep_seen=True, allowed=allowed))
    assert sorted(kept.tolist()) == np.flatnonzero(allowed).tolist()


@pytest.mark.parametrize("weight", [0.25, 1.0])
def test_popularity_is_blended_as_defined(weight: float) -> None:
    counts, scores = np.array([0.0, 3.0, 1.0, 40.0]), torch.tensor([[0.2, 0.9, 0.5, 0.1], [0.5, 0.5, 0.5, 0.5]])
    popularity = slow_z([math.log(1 + count) for count in counts])
    found = blended(scores.clone(), popularity_source(counts), weight)
    for user, row in enumerate(scores.tolist()):
        wanted = [(1 - weight) * z + weight * p for z, p in zip(slow_z(row), popularity, strict=True)]
        assert found[user].tolist() == pytest.approx(wanted, abs=1e-6)


def test_nonsense_is_refused() -> None:
    for k in (0, -3):
        with pytest.raises(ConfigError, match=rf"k is {k}"):
            Listing(k)
    for value in (-0.1, 1.5, math.nan):
        with pytest.raises(ConfigError, match="diversity is"):
            Listing(diversity=value)
        with pytest.raises(ConfigError, match="popularity is"):
            Listing(popularity=value)
