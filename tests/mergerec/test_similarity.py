"""Union similarity: blocks of the experts' mean similarity, the term against a dense oracle, learning, refusals."""

from collections import Counter
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from adapters import layout_of, random_adapter, random_adapters
from merging_oracles import dense_vectors, oracle_rows

from fedmerge.adapter import Adapter
from fedmerge.encoder.backbone import Backbone
from fedmerge.encoder.encode import encode
from fedmerge.encoder.lora import applied
from fedmerge.errors import ConfigError
from fedmerge.mergerec import similarity
from fedmerge.mergerec.coefficients import LearnedCoefficients
from fedmerge.mergerec.learn import learn_coefficients
from fedmerge.mergerec.objective import PAPER
from fedmerge.mergerec.pseudo_users import PseudoDomain
from fedmerge.mergerec.similarity import (
    BLOCK,
    UnionSimilarity,
    add_similarity,
    draw_blocks,
    similarity_term,
    union_of,
    union_similarity,
)
from fedmerge.mergerec.vectors import INITIALISATIONS, initial_vectors
from fedmerge.merging.stack import stack_adapters

SIZES = {"books": 7, "tents": 9, "toys": 12}
ITEMS = replace(PAPER, loss="similarity", steps=3, batch_size=4)


@pytest.fixture(scope="module")
def backbone(either_backbone: Backbone) -> Backbone:
    return either_backbone


@pytest.fixture(scope="module")
def adapters(backbone: Backbone) -> dict[str, Adapter]:
    return random_adapters(layout_of(backbone))


def texts(name: str, number: int | None = None) -> list[np.ndarray]:
    rng = np.random.default_rng(len(name))
    lengths = rng.integers(1, 6, number or SIZES[name])
    return [np.array([2, *rng.integers(5, 40, length), 3], dtype=np.int32) for length in lengths]


CATALOGS = {name: texts(name) for name in SIZES}
UNION = union_of([CATALOGS[name] for name in sorted(CATALOGS)])


def pseudo_users(backbone: Backbone, adapters: dict[str, Adapter]) -> dict[str, PseudoDomain]:
    domains = {}
    for name, adapter in adapters.items():
        with applied(backbone, adapter):
            vectors = encode(backbone, CATALOGS[name])
        domains[name] = PseudoDomain(name, CATALOGS[name], vectors, CATALOGS[name], vectors)
    return domains


@pytest.mark.parametrize("layer_wise", [False, True], ids=["domain", "layer"])
@pytest.mark.parametrize("initialisation", INITIALISATIONS)
def test_the_term_and_its_gradient_equal_those_of_the_full_matrix(
    backbone: Backbone, adapters: dict[str, Adapter], initialisation: str, layer_wise: bool
) -> None:
    """The union is smaller than a block, so a block is the full matrix, in another order."""
    vectors = initial_vectors(stack_adapters(adapters), initialisation)
    names, shape = vectors.domains, (3, len(vectors.groups)) if layer_wise else (3,)
    values = INITIALISATIONS[initialisation] * np.random.default_rng(1).uniform(0.5, 3, shape)
    union = union_similarity(backbone, adapters, CATALOGS, ITEMS)
    at = torch.tensor(values, dtype=torch.float32)
    found, gradient = similarity_term(backbone, vectors, at, union, 1)

    exact = torch.tensor(values, requires_grad=True)

    def coefficient(domain: str, module: str) -> torch.Tensor:
        row = exact[names.index(domain)]
        return row[vectors.group_of[module]] if layer_wise else row

    N = len(UNION)
    mean = torch.zeros(N, N, dtype=torch.float64)
    for name, adapter in adapters.items():
        E = dense_vectors(backbone, {name: adapter}, lambda *_: 1.0, UNION).detach()
        mean += E @ E.T / 3
    E_hat = dense_vectors(backbone, oracle_rows(adapters, initialisation), coefficient, UNION)
    loss = (E_hat @ E_hat.T - mean).square().sum() / N**2
    (wanted,) = torch.autograd.grad(loss, [exact])
    assert found == pytest.approx(loss.item(), rel=1e-4)
    assert torch.linalg.norm(gradient - wanted) <= 1e-4 * torch.linalg.norm(wanted)
    assert (wanted != 0).all()
    with torch.no_grad():
        value, nothing = similarity_term(backbone, vectors, at, union, 1)
    assert value == pytest.approx(found)
    assert not nothing.any()


def test_one_domain_has_no_loss_and_no_gradient_at_its_expert(backbone: Backbone, adapters: dict[str, Adapter]) -> None:
    alone = {"toys": adapters["toys"]}
    union = union_similarity(backbone, alone, {"toys": CATALOGS["toys"]}, ITEMS)
    found = {at: similarity_term(backbone, stack_adapters(alone), torch.tensor([at]), union, 0) for at in (1.0, 0.9)}
    assert found[1.0][0] < 1e-10 < 1e-5 * found[0.9][0]
    assert found[1.0][1].abs() < 1e-5 * found[0.9][1].abs()


def test_experts_in_rotated_spaces_have_the_same_target() -> None:
    rng = np.random.default_rng(0)
    E = torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(40, 8))).float(), dim=1)
    Q = torch.from_numpy(np.linalg.qr(rng.normal(size=(8, 8)))[0]).float()
    rows, columns = rng.integers(0, 40, (2, 3, 5))
    plain, rotated = torch.zeros(2, 3, 5, 5)
    add_similarity(plain, E, rows, columns)
    add_similarity(rotated, E @ Q, rows, columns)
    torch.testing.assert_close(plain, rotated, atol=1e-6, rtol=0)
    assert plain[1, 2, 3] == pytest.approx(float(E[rows[1, 2]] @ E[columns[1, 3]]), abs=1e-6)


def test_blocks_cover_all_items_equally_and_their_mean_is_that_of_the_full_matrix() -> None:
    rows, columns = draw_blocks(600, 300, seed=0)
    assert rows.shape == columns.shape == (300, BLOCK)
    for drawn in (rows, columns):
        assert set(Counter(drawn.ravel()).values()) == {300 * BLOCK // 600}
    assert np.array_equal(rows, draw_blocks(600, 300, seed=0)[0])
    assert not np.array_equal(rows, draw_blocks(600, 300, seed=1)[0])
    full = np.random.default_rng(0).exponential(size=(600, 600)) ** 3
    means = np.array([full[np.ix_(*block)].mean() for block in zip(rows, columns, strict=True)])
    assert abs(means.mean() - full.mean()) < 4 * means.std() / 300**0.5
    few = draw_blocks(30, 4, seed=0)
    assert all(np.array_equal(np.sort(drawn), np.tile(np.arange(30), (4, 1))) for drawn in few)


def test_only_blocks_are_computed_and_the_order_of_domains_changes_nothing(
    backbone: Backbone, adapters: dict[str, Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    catalogs = {name: texts(name, 400) for name in SIZES}
    union = union_of([catalogs[name] for name in sorted(catalogs)])
    assert len(union) > 2 * BLOCK
    encoded: list[int] = []

    def counted(*arguments: object) -> torch.Tensor:
        encoded.append(len(arguments[1]))  # type: ignore[arg-type]  # a list of texts
        return encode(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(similarity, "encode", counted)
    one = replace(ITEMS, steps=1)
    found = union_similarity(backbone, adapters, catalogs, one)
    assert encoded == [len(found.items)] * 3
    assert BLOCK < len(found.items) <= 2 * BLOCK
    assert found.targets.shape == (1, BLOCK, BLOCK)
    turned = union_similarity(backbone, dict(reversed(adapters.items())), dict(reversed(catalogs.items())), one)
    assert torch.equal(found.targets, turned.targets)
    rows, columns = draw_blocks(len(union), 1, one.seed)
    assert [text.tobytes() for text in union_texts(found, found.rows)] == [union[item].tobytes() for item in rows[0]]
    assert [text.tobytes() for text in union_texts(found, found.columns)] == [
        union[item].tobytes() for item in columns[0]
    ]


def union_texts(union: UnionSimilarity, of: np.ndarray) -> list[np.ndarray]:
    return [np.asarray(union.items[item]) for item in of[0]]


def test_equal_texts_are_one_item() -> None:
    assert len(union_of([CATALOGS["toys"], CATALOGS["toys"][3:]])) == len(union_of([CATALOGS["toys"]]))


@pytest.mark.parametrize("granularity", ["domain", "layer"])
def test_coefficients_learn_the_similarity(
    backbone: Backbone, adapters: dict[str, Adapter], granularity: Literal["domain", "layer"]
) -> None:
    stack, domains = stack_adapters(adapters), pseudo_users(backbone, adapters)
    settings = replace(ITEMS, steps=40, learning_rate=0.02, granularity=granularity, select_every=10)
    union = union_similarity(backbone, adapters, CATALOGS, settings)
    found = [learn_coefficients(backbone, stack, domains, settings, union=union) for _ in range(2)]
    assert torch.equal(found[0].coefficients, found[1].coefficients)
    first, last = found[0].history[0], found[0].history[-1]
    assert first.keys() == {"total", "similarity"}
    assert first["total"] == pytest.approx(10 * first["similarity"])
    assert last["similarity"] < 0.9 * first["similarity"]
    assert dict(found[0].validation)[0] == pytest.approx(first["total"], rel=1e-4)  # a block is the full matrix


def test_one_domain_is_led_to_its_expert(backbone: Backbone) -> None:
    adapters = {"toys": random_adapter(layout_of(backbone), rank=4, scaling=1.0, seed=7)}
    settings = replace(ITEMS, steps=60, learning_rate=0.05)
    union = union_similarity(backbone, adapters, {"toys": CATALOGS["toys"]}, settings)
    domains = pseudo_users(backbone, adapters)
    learned = learn_coefficients(backbone, stack_adapters(adapters), domains, settings, union=union)
    assert learned.coefficients.item() == pytest.approx(1.0, abs=0.05)


def test_beside_kd_both_terms_are_those_of_each_alone(backbone: Backbone, adapters: dict[str, Adapter]) -> None:
    stack, domains = stack_adapters(adapters), pseudo_users(backbone, adapters)

    def learned(**changes: Any) -> LearnedCoefficients:
        settings = replace(ITEMS, **changes)
        union = union_similarity(backbone, adapters, CATALOGS, settings) if settings.compares_items else None
        return learn_coefficients(backbone, stack, domains, settings, union=union)

    both, alone, kd = (learned(loss=loss) for loss in ("similarity+kd", "similarity", "kd"))
    first = both.history[0]
    assert first.keys() == {"total", "similarity", "kd"}
    assert first["similarity"] == alone.history[0]["similarity"]
    assert first["kd"] == kd.history[0]["kd"]
    assert first["total"] == pytest.approx(10 * first["similarity"] + 1000 * first["kd"])
    assert not torch.equal(both.coefficients, kd.coefficients)
    assert torch.equal(learned(loss="similarity+kd", similarity_weight=0.0).coefficients, kd.coefficients)
    assert torch.equal(learned(loss="similarity+kd", kd_weight=0.0).coefficients, alone.coefficients)


def test_a_union_that_the_loss_does_not_have_and_a_missing_one_are_refused(
    backbone: Backbone, adapters: dict[str, Adapter]
) -> None:
    stack, domains = stack_adapters(adapters), pseudo_users(backbone, adapters)
    with pytest.raises(ConfigError, match=r"no union .* 'similarity'; pass union = union_similarity"):
        learn_coefficients(backbone, stack, domains, ITEMS)
    union = union_similarity(backbone, adapters, CATALOGS, ITEMS)
    with pytest.raises(ConfigError, match=r"a union .* none for loss 'kd'"):
        learn_coefficients(backbone, stack, domains, replace(ITEMS, loss="kd"), union=union)
