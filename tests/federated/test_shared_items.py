"""Similarity averaging over shared items, against dense float64 definitions; and the loss that pulls to the mean."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedmerge.adapter import Adapter, LoraModule, adapter_sha256
from fedmerge.client.auxiliary.shared_items import similarity_loss, with_term
from fedmerge.client.local_domain import LocalDomain
from fedmerge.config import Lora, Weave
from fedmerge.encoder.encode import encode
from fedmerge.encoder.lora import applied, attach, fresh_adapter, load_into
from fedmerge.errors import DomainError
from fedmerge.federated.shared_items import (
    MeanSimilarity,
    SharedItems,
    find_shared_items,
    mean_similarity,
    similarity_factors,
)
from fedmerge.federated.weaving import SHARED, Weaving, schedule_passes, start_of, target_merge, woven_merge
from fedmerge.merging.training_free import merge_adapters

IDS = {"a": ("x", "y", "z", "own"), "b": ("z", "x", "w"), "c": ("w", "y", "q", "x")}
SHARED_ITEMS = find_shared_items(IDS)
HALF = 2e-3  # factors travel in float16
LORA = Lora(rank=2, alpha=4, target_modules=("query",))


def vectors(seed: int, number: int, width: int = 6) -> torch.Tensor:
    drawn = torch.randn(number, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(drawn, dim=1).float()


VECTORS = {name: vectors(seed, len(items.items)) for seed, (name, items) in enumerate(SHARED_ITEMS.items())}


def whole(mean: MeanSimilarity) -> np.ndarray:
    places = np.arange(len(mean.items))
    return mean.block(places, places).double().numpy()


def mean_by_hand(target: str, rank: int) -> np.ndarray:
    """The mean over those who have both items, of each S_k cut to its largest eigenvalues."""
    cut = {}
    for name, found in VECTORS.items():
        similarity = found.double().numpy() @ found.double().numpy().T
        values, directions = np.linalg.eigh(similarity)
        kept = np.argsort(values)[::-1][:rank]
        cut[name] = directions[:, kept] * np.maximum(values[kept], 0) @ directions[:, kept].T
    own = [IDS[target][item] for item in SHARED_ITEMS[target].items]
    of_ids = {name: [IDS[name][item] for item in SHARED_ITEMS[name].items] for name in IDS}
    expected = np.zeros((len(own), len(own)))
    for i, left in enumerate(own):
        for j, right in enumerate(own):
            both = [name for name in IDS if left in of_ids[name] and right in of_ids[name]]
            entries = [cut[name][of_ids[name].index(left), of_ids[name].index(right)] for name in both]
            expected[i, j] = np.mean(entries)
    return expected


def test_shared_items_are_those_of_two_catalogs_by_hand() -> None:
    found = {name: [IDS[name][item] for item in shared.items] for name, shared in SHARED_ITEMS.items()}
    assert found == {"a": ["x", "y", "z"], "b": ["z", "x", "w"], "c": ["w", "y", "x"]}
    numbers = {name: dict(zip(found[name], SHARED_ITEMS[name].shared.tolist(), strict=True)) for name in IDS}
    assert numbers["a"]["x"] == numbers["b"]["x"] == numbers["c"]["x"]
    assert numbers["c"] == {"w": 0, "y": 2, "x": 1}


@pytest.mark.parametrize("others", [{}, {"b": ("p", "q")}, {"b": ("x", "q")}], ids=["alone", "none", "one"])
def test_without_shared_items_it_is_refused_by_name(others: dict[str, tuple[str, ...]]) -> None:
    with pytest.raises(DomainError, match=r"no shared items: .* item ids of a.*mergerec.loss = 'similarity'"):
        find_shared_items({"a": ("x", "y"), **others})


@pytest.mark.parametrize("rank", [1, 2, 3, 64])
@pytest.mark.parametrize("target", IDS)
def test_the_mean_is_that_of_the_cut_similarities_of_those_who_have_both(target: str, rank: int) -> None:
    factors = {name: similarity_factors(found, rank) for name, found in VECTORS.items()}
    assert all(of_one.dtype == torch.float16 and of_one.shape[1] <= rank for of_one in factors.values())
    mean = mean_similarity(target, SHARED_ITEMS, factors)
    np.testing.assert_allclose(whole(mean), mean_by_hand(target, rank), atol=HALF)
    assert mean.factors.shape[1] <= len(mean.items)


def test_rotating_the_vectors_of_a_client_changes_nothing() -> None:
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(9), dtype=torch.float64))[0]
    before = {name: similarity_factors(found, 3) for name, found in VECTORS.items()}
    after = {**before, "b": similarity_factors((VECTORS["b"].double() @ turn).float(), 3)}
    for target in IDS:
        first, second = (whole(mean_similarity(target, SHARED_ITEMS, factors)) for factors in (before, after))
        np.testing.assert_allclose(first, second, atol=HALF)


def test_the_order_of_clients_changes_nothing_and_no_client_is_a_block_of_the_mean() -> None:
    factors = {name: similarity_factors(found, 2) for name, found in VECTORS.items()}
    turned = dict(reversed(factors.items()))
    for target in IDS:
        first, second = mean_similarity(target, SHARED_ITEMS, factors), mean_similarity(target, SHARED_ITEMS, turned)
        assert torch.equal(first.factors, second.factors)
        assert torch.equal(first.present, second.present)
    same = {name: SharedItems(np.arange(3), np.arange(3)) for name in IDS}
    mean = mean_similarity("a", same, factors)
    columns = {tuple(column) for of_one in factors.values() for column in of_one.T.abs().tolist()}
    assert not columns & {tuple(column) for column in mean.factors.T.abs().tolist()}


# Weaving


def adapter(seed: int) -> Adapter:
    rng = torch.Generator().manual_seed(seed)
    return Adapter(
        {"encoder.layer.0.query": LoraModule(torch.randn(2, 4, generator=rng), torch.randn(5, 2, generator=rng), 2.0)}
    )


EXPERTS = {name: adapter(seed) for seed, name in enumerate(IDS)}


def test_every_client_continues_its_own_expert_once() -> None:
    weave = Weave(schedule="similarity")
    (trainings,) = schedule_passes(weave, [*IDS], seed=0)
    assert trainings == [Weaving(name, SHARED) for name in IDS]
    assert all(start_of(each, weave, EXPERTS, {}, lambda: adapter(9)) is EXPERTS[each.target] for each in trainings)


def test_what_was_continued_replaces_the_expert_and_without_steps_the_merge_is_the_average() -> None:
    continued = {Weaving(name, SHARED): adapter(10 + seed) for seed, name in enumerate(IDS)}
    average = merge_adapters({name: continued[Weaving(name, SHARED)] for name in IDS}, "average").adapter
    found = woven_merge(EXPERTS, continued, 1.0).modules["encoder.layer.0.query"]
    torch.testing.assert_close(found.delta_weight(), average.modules["encoder.layer.0.query"].delta_weight())
    own = target_merge("b", EXPERTS["b"], continued, 1.0)
    assert torch.equal(
        own.modules["encoder.layer.0.query"].delta_weight(),
        continued[Weaving("b", SHARED)].modules["encoder.layer.0.query"].delta_weight(),
    )
    untouched = {Weaving(name, SHARED): EXPERTS[name] for name in IDS}
    neutral = merge_adapters(EXPERTS, "average").adapter
    assert adapter_sha256(woven_merge(EXPERTS, untouched, 1.0)) == adapter_sha256(neutral)
    alone = {Weaving("a", SHARED): EXPERTS["a"]}
    assert torch.equal(  # K = 1
        woven_merge({"a": EXPERTS["a"]}, alone, 1.0).modules["encoder.layer.0.query"].delta_weight(),
        EXPERTS["a"].modules["encoder.layer.0.query"].delta_weight(),
    )


# The loss


def some_adapter(domain: LocalDomain, seed: int) -> Adapter:
    fresh = fresh_adapter(domain.backbone, LORA, seed=0)
    rng = torch.Generator().manual_seed(seed)
    return Adapter(
        {
            name: LoraModule(module.lora_A, torch.randn(module.lora_B.shape, generator=rng) / 3, module.scaling)
            for name, module in fresh.modules.items()
        }
    )


def mean_of(domain: LocalDomain, *adapters: Adapter) -> MeanSimilarity:
    number = len(domain.catalog)
    shared = {str(place): SharedItems(np.arange(number), np.arange(number)) for place in range(len(adapters))}
    factors = {}
    for place, each in enumerate(adapters):
        with applied(domain.backbone, each):
            factors[str(place)] = similarity_factors(encode(domain.backbone, domain.item_sequences), 64)
    return mean_similarity("0", shared, factors)


def loss_and_gradient(domain: LocalDomain, at: Adapter, mean: MeanSimilarity) -> tuple[float, float]:
    module = next(iter(at.modules.values()))
    model = attach(domain.backbone, ["query"], module.rank, module.rank * module.scaling, seed=0)
    try:
        load_into(model, at)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        loss = similarity_loss(domain, mean, 10.0, 0, 0)
        gradients = torch.autograd.grad(loss, parameters)
    finally:
        model.unload()
    return float(loss.detach()), float(torch.stack([each.norm() for each in gradients]).norm())


def test_one_client_alone_has_neither_loss_nor_gradient(toys: LocalDomain) -> None:
    own, other = some_adapter(toys, 1), some_adapter(toys, 2)
    alone, pulled = (loss_and_gradient(toys, own, mean_of(toys, *them)) for them in ((own,), (own, other)))
    assert alone[0] < 1e-5
    assert alone[0] < pulled[0] / 100
    assert alone[1] < pulled[1] / 20


def test_the_loss_is_the_weighted_mean_square_over_a_block_of_all_items(toys: LocalDomain) -> None:
    own, other = some_adapter(toys, 1), some_adapter(toys, 2)
    mean = mean_of(toys, own, other)
    assert len(toys.catalog) <= 256
    with applied(toys.backbone, own):
        items = encode(toys.backbone, toys.item_sequences).double().numpy()
        with torch.no_grad():
            found = [float(similarity_loss(toys, mean, weight, 0, step)) for weight, step in ((10.0, 0), (5.0, 3))]
    expected = np.square(items @ items.T - whole(mean)).mean()
    assert found == pytest.approx([10 * expected, 5 * expected], rel=1e-3)


def test_blocks_depend_on_seed_and_step_alone_and_a_resumed_training_draws_the_same(toys: LocalDomain) -> None:
    steps: list[int] = []

    def term(step: int) -> torch.Tensor:
        steps.append(step)
        return torch.tensor(1.0)

    penalty = with_term(lambda: torch.tensor(2.0), term, 5)
    assert penalty is not None
    assert [float(penalty()), float(penalty())] == [3.0, 3.0]
    assert steps == [5, 6]
    assert with_term(None, None, 5) is None
    few = replace(mean_of(toys, some_adapter(toys, 1)), items=np.arange(len(toys.catalog)))
    with torch.no_grad():
        assert similarity_loss(toys, few, 1.0, 0, 1) == similarity_loss(toys, few, 1.0, 0, 1)
