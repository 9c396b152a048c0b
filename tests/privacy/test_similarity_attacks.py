"""The audit's attacks on similarity factors: what leaks is found, and the control of other users finds nothing."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from fedmerge.client.audit.similarity import CONTROL, LESS, OWN, factor_attacks, factors_for, recovered_pairs
from fedmerge.federated.shared_items import SharedItems, similarity_factors

N, WIDTH = 40, 12


def users(seed: int, number: int) -> list[np.ndarray]:
    """Everybody buys one of ten pairs, item 2k and then 2k + 1 (or the other way), and one more item."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(number):
        pair = 2 * rng.integers(0, 10)
        found.append(np.array([pair, pair + 1, rng.integers(20, N)], dtype=np.int32))
    return found


def leaking(sequences: list[np.ndarray], backbone: torch.Tensor) -> torch.Tensor:
    """Vectors in which the items that these users bought in succession moved towards each other."""
    moved = backbone.clone()
    for sequence in sequences:
        for a, b in pairwise(sequence):
            moved[a] += 0.5 * backbone[b]
            moved[b] += 0.5 * backbone[a]
    return torch.nn.functional.normalize(moved, dim=1)


@pytest.fixture
def backbone() -> torch.Tensor:
    drawn = torch.randn(N, WIDTH, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.normalize(drawn, dim=1)


ALL = SharedItems(np.arange(N), np.arange(N))
COUNTS = (5, 10)


def test_pairs_and_members_are_read_from_factors_and_not_from_those_of_others(backbone: torch.Tensor) -> None:
    members, others = users(1, 12), [np.array([a, a + 1], dtype=np.int32) for a in range(20, 38)]
    strangers = [np.array([a, a - 3], dtype=np.int32) for a in range(30, 40)]
    sent = {
        "own": (ALL, similarity_factors(leaking(members, backbone), 64)),
        "else": (ALL, similarity_factors(leaking(strangers, backbone), 64)),
    }
    found = factors_for("own", sent)
    control = CONTROL.format("else")
    assert [*found] == [OWN, control]
    pool = members + others
    rows, similarities = factor_attacks(found, backbone, pool, np.arange(len(pool)) < len(members))
    auc = {row["model"]: float(row["auc"]) for row in rows}
    assert [*auc] == [OWN, OWN + LESS, control, control + LESS]
    assert auc[OWN + LESS] > 0.95
    assert abs(auc[control + LESS] - 0.5) < 0.25
    precision = {name: recovered_pairs(items, of, members, COUNTS) for name, items, of in similarities}
    assert precision[OWN + LESS]["10"] > 0.5
    assert precision[control + LESS]["10"] < 0.3


def test_a_control_reads_the_items_that_both_have_at_their_places(backbone: torch.Tensor) -> None:
    order = np.arange(N)[::-1][: N - 5].copy()  # the other one's catalog: reversed, without the first five
    other = SharedItems(np.arange(len(order)), order)
    vectors = leaking(users(2, 12), backbone)
    sent = {"own": (ALL, similarity_factors(vectors, 64)), "else": (other, similarity_factors(vectors[order], 64))}
    found = factors_for("own", sent)
    assert found[CONTROL.format("else")].items.tolist() == [*range(5, N)]
    for each in found.values():  # both are of the same vectors
        expected = vectors[each.items] @ vectors[each.items].T
        torch.testing.assert_close(each.factors @ each.factors.T, expected, atol=3e-3, rtol=0)
    assert factors_for("absent", sent) == {}


def test_users_without_two_shared_items_in_succession_have_no_score(backbone: torch.Tensor) -> None:
    few = {"own": (SharedItems(np.array([0, 1]), np.array([0, 1])), similarity_factors(backbone[:2], 64))}
    pool = [np.array([0, 1]), np.array([1, 0]), np.array([5, 6]), np.array([0, 0])]
    rows, _ = factor_attacks(factors_for("own", few), backbone, pool, np.array([True, False, True, False]))
    assert [row["auc"] for row in rows] == [0.5, 0.5]  # the same pair, bought by a member and by another
    nobody, _ = factor_attacks(factors_for("own", few), backbone, pool, np.array([True, True, False, False]))
    assert nobody == []
