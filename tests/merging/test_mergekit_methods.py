"""Methods known from mergekit and FusionBench: by hand, degenerate inputs, and what mergekit's own formulas give."""

import math
from typing import Any

import pytest
import torch
from adapters import Layout, random_adapter, random_adapters

from fedmerge.adapter import Adapter, LoraModule
from fedmerge.config import from_flat
from fedmerge.errors import ConfigError, MergeError
from fedmerge.merging import rows as elementwise
from fedmerge.merging.low_rank.spectral import multi_slerp, slerp
from fedmerge.merging.methods import METHODS, method_coefficients
from fedmerge.merging.rows import Piece
from fedmerge.merging.stack import survey_adapters
from fedmerge.merging.training_free import merge_adapters

LAYOUT: Layout = {f"layer.{i}.query": (5, 4) for i in range(5)} | {"top": (3, 6)}


def vector(*entries: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([entries]), torch.eye(len(entries))


def merged(factors: tuple[torch.Tensor, torch.Tensor]) -> list[float]:
    row: list[float] = (factors[0] @ factors[1])[0].tolist()
    return row


def rows_of(method: Any, rows: list[list[float]], **parameters: Any) -> list[float]:
    pieces = [Piece("m", tuple(map(str, range(len(rows)))), torch.tensor(rows, dtype=torch.float64))]
    (found,) = method(lambda: pieces, **parameters)
    summed: list[float] = found.sum(0).tolist()
    return summed


def test_slerp_by_hand() -> None:
    root = math.sqrt(0.5)
    assert merged(slerp([vector(2, 0), vector(0, 4)], t=0.5)) == pytest.approx([2 * root, 4 * root])
    assert merged(slerp([vector(2, 0), vector(0, 4)], t=0.0)) == pytest.approx([2, 0])
    assert merged(slerp([vector(2, 0), vector(0, 4)], t=1.0)) == pytest.approx([0, 4])
    third = merged(slerp([vector(1, 0), vector(0, 1)], t=1 / 3))
    assert third == pytest.approx([math.cos(math.pi / 6), math.sin(math.pi / 6)])
    # parallel, opposite and zero updates have no arc: the line
    assert merged(slerp([vector(2, 0), vector(4, 0)], t=0.25)) == pytest.approx([2.5, 0])
    assert merged(slerp([vector(2, 0), vector(-4, 0)], t=0.5)) == pytest.approx([-1, 0])
    assert merged(slerp([vector(0, 0), vector(0, 4)], t=0.25)) == pytest.approx([0, 1])
    assert merged(slerp([vector(3, 1)], t=0.9)) == pytest.approx([3, 1])


def test_multi_slerp_by_hand() -> None:
    root = math.sqrt(0.5)
    assert merged(multi_slerp([vector(2, 0), vector(0, 4)], coefficient=1.0)) == pytest.approx([3 * root, 3 * root])
    three = [vector(1, 0, 0), vector(0, 2, 0), vector(0, 0, 3)]
    assert merged(multi_slerp(three, coefficient=0.5)) == pytest.approx([math.sqrt(1 / 3)] * 3)
    assert merged(multi_slerp([vector(2, 0), vector(-4, 0)], coefficient=1.0)) == pytest.approx([-1, 0])
    assert merged(multi_slerp([vector(0, 0), vector(0, 4)], coefficient=1.0)) == pytest.approx([0, 2])
    assert merged(multi_slerp([vector(0, 0)], coefficient=1.0)) == [0, 0]


def test_slerp_takes_two_domains() -> None:
    adapters = random_adapters(LAYOUT)
    with pytest.raises(MergeError, match=r"'slerp': found 3 adapters \(books, tents, toys\), expected at most 2"):
        merge_adapters(adapters, "slerp")
    merge_adapters(adapters, "slerp", coefficients={"tents": 0.0})
    domains = {"domains.train": "a,b,c", "domains.unseen": ""}
    for setting in ("merge.methods", "rounds.rule"):
        with pytest.raises(ConfigError, match=f"{setting} holds slerp, which merges two domains.*names 3.*multi-slerp"):
            from_flat({**domains, setting: "slerp"})
    from_flat({**domains, "domains.train": "a,b", "merge.methods": "slerp", "server.min_train_clients": 2})


def test_emr_unified_by_hand() -> None:
    rows = [[3.0, -1.0, 2.0, 1.0, 0.0], [-1.0, -4.0, -2.0, 1.0, 0.0], [2.0, 3.0, 0.0, -1.0, 0.0]]
    # sums 4, -2, a tie, 1 (shared by two) and nothing
    assert rows_of(elementwise.emr_unified, rows, coefficient=1.0) == [3.0, -4.0, 0.0, 1.0, 0.0]
    assert rows_of(elementwise.emr_unified, rows[:1], coefficient=2.0) == [6.0, -2.0, 4.0, 2.0, 0.0]


def test_consensus_by_hand() -> None:
    rows = [[4.0, 0.1, 3.0], [0.5, 2.0, 3.0], [0.5, 0.1, -0.1]]
    # first: matters to 0 alone (.5 < .4 · 4.5); second to 1 alone; third to 0 and 1
    settings = {"mask_threshold": 0.4, "coefficient": 1.0}
    assert rows_of(elementwise.consensus, rows, min_domains=2, **settings) == [0.0, 0.0, pytest.approx(5.9)]
    assert rows_of(elementwise.consensus, rows, min_domains=1, **settings) == pytest.approx([5.0, 2.2, 5.9])
    assert rows_of(elementwise.consensus, rows, min_domains=9, **settings) == [0.0, 0.0, 0.0]
    assert rows_of(elementwise.consensus, rows[:1], min_domains=2, **settings) == rows[0]  # K = 1


def test_magprune_keeps_the_expectation_and_prefers_large_entries() -> None:
    row = torch.tensor([[0.1, 4.0, -1.0, 2.0] * 5000], dtype=torch.float64)
    pieces = [Piece("m", ("d",), row, width=4)]
    (found,) = elementwise.della_linear(lambda: pieces, density=0.5, epsilon=0.6, coefficient=1.0, seed=3)
    entries = found.reshape(-1, 4)
    assert (entries != 0).double().mean(0).tolist() == pytest.approx([0.25, 0.75, 5 / 12, 7 / 12], abs=0.02)
    assert entries.mean(0).tolist() == pytest.approx([0.1, 4.0, -1.0, 2.0], rel=0.06)
    assert pieces[0].rows is row
    assert set(entries[:, 1].tolist()) == {0.0, 4.0 / 0.75}


@pytest.mark.parametrize("block", [1, 8, 1 << 20])
def test_blocks_of_magprune_change_nothing(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = random_adapters(LAYOUT)
    expected = merge_adapters(adapters, "della", density=0.5).adapter
    monkeypatch.setattr(elementwise, "BLOCK", block)
    found = merge_adapters(adapters, "della", density=0.5).adapter
    for name, module in expected.modules.items():
        assert torch.equal(found.modules[name].delta_weight(), module.delta_weight())


@pytest.mark.parametrize("density", [0.05, 0.95])
def test_della_narrows_its_probabilities_at_the_ends(density: float) -> None:
    adapters = random_adapters(LAYOUT)
    for method in ("della", "della-linear"):
        adapter = merge_adapters(adapters, method, density=density, epsilon=1.0).adapter
        assert all(module.delta_weight().isfinite().all() for module in adapter.modules.values())


def test_weights_by_layer() -> None:
    stack = survey_adapters(random_adapters(LAYOUT))
    assert stack.domains == ("books", "tents", "toys")
    assert stack.groups == ("layer 0", "layer 1", "layer 2", "layer 3", "layer 4", "others")
    given: dict[str, Any] = {"weights": "toys=0:1, books=1:0:2,tents=3", "normalize": False}
    found = method_coefficients("linear-by-layer", stack, **given)
    assert found.tolist() == [
        pytest.approx([1, 0.5, 0, 1, 2, 0.9]),
        pytest.approx([3, 3, 3, 3, 3, 3]),
        pytest.approx([0, 0.25, 0.5, 0.75, 1, 0.5]),
    ]
    normal = method_coefficients("linear-by-layer", stack, weights=given["weights"])
    torch.testing.assert_close(normal, found / found.sum(0))
    assert method_coefficients("linear-by-layer", stack).tolist() == [pytest.approx([1 / 3] * 6)] * 3


def test_a_merge_by_layer_is_the_weighted_sum_of_the_updates() -> None:
    adapters = random_adapters(LAYOUT)
    options: dict[str, Any] = {"weights": "books=1:0,tents=0,toys=0:1", "normalize": False}
    found = merge_adapters(adapters, "linear-by-layer", **options).adapter
    for name, share in {"layer.0.query": 0.0, "layer.1.query": 0.25, "layer.4.query": 1.0, "top": 0.5}.items():
        books, toys = (adapters[domain].modules[name].delta_weight().double() for domain in ("books", "toys"))
        torch.testing.assert_close(
            found.modules[name].delta_weight().double(), (1 - share) * books + share * toys, atol=1e-6, rtol=1e-5
        )
    only_books = merge_adapters(adapters, "linear-by-layer", **options).adapter.modules["layer.0.query"]
    assert only_books.rank == adapters["books"].modules["layer.0.query"].rank  # weight 0 takes no rank


def test_modules_outside_layers_alone_have_one_weight() -> None:
    adapters = {name: random_adapter({"head": (4, 3)}, 2, 1.0, k) for k, name in enumerate("ab")}
    found = method_coefficients("linear-by-layer", survey_adapters(adapters), weights="a=1:2", normalize=False)
    assert found.tolist() == [[1.5], [1.0]]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("toys=x", "found 'toys=x', expected NAME=w"),
        ("toys", "found 'toys', expected NAME=w"),
        ("toys=nan", "finite numbers"),
        ("boats=1", "found 'boats', expected one of the merged books, tents, toys"),
        ("toys=1:-1,books=-1:1,tents=0", "their sum is 0 in layer 0, layer 1, layer 2, layer 3, layer 4, others"),
    ],
)
def test_weights_that_are_refused(weights: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        merge_adapters(random_adapters(LAYOUT), "linear-by-layer", weights=weights)


@pytest.mark.parametrize("method", ["slerp", "multi-slerp"])
def test_spherical_merges_need_no_more_rank_than_the_sum(method: str) -> None:
    adapters = {name: random_adapter({"m": (40, 30)}, 2, 1.0, k) for k, name in enumerate("ab")}
    found = merge_adapters(adapters, method)
    assert found.adapter.modules["m"].rank == 4
    assert found.residuals["m"] <= 1e-6
    silent = {name: Adapter({"m": LoraModule(torch.ones(1, 3), torch.zeros(2, 1), 1.0)}) for name in "ab"}
    assert merge_adapters(silent, method).adapter.modules["m"].delta_weight().tolist() == [[0.0] * 3] * 2
    assert METHODS[method].source
