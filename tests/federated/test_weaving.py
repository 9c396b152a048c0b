"""Schedules of weaving, what a client starts from, and the merges of woven adapters, against their definitions."""

import itertools

import numpy as np
import pytest
import torch

from fedmerge.adapter import Adapter, LoraModule, adapter_sha256
from fedmerge.config import Weave, WeaveSchedule
from fedmerge.federated.weaving import (
    MEAN,
    Weaving,
    mean_of_others,
    schedule_passes,
    start_of,
    target_merge,
    woven_merge,
)
from fedmerge.merging.stack import linear_merge_of_many, survey_adapters
from fedmerge.merging.training_free import merge_adapters

NAMES = ("beauty", "books", "coffee", "garden")


def adapter(seed: int, rank: int = 2) -> Adapter:
    rng = torch.Generator().manual_seed(seed)
    shapes = {"encoder.layer.0.query": (5, 4), "encoder.layer.1.value": (3, 6)}
    return Adapter(
        {
            name: LoraModule(torch.randn(rank, wide, generator=rng), torch.randn(tall, rank, generator=rng), 2.0)
            for name, (tall, wide) in shapes.items()
        }
    )


def dense(found: Adapter) -> dict[str, np.ndarray]:
    return {
        name: module.scaling * module.lora_B.double().numpy() @ module.lora_A.double().numpy()
        for name, module in found.modules.items()
    }


def dense_mean(members: list[Adapter], factor: float = 1.0) -> dict[str, np.ndarray]:
    parts = [dense(member) for member in members]
    return {name: factor * np.mean([part[name] for part in parts], axis=0) for name in parts[0]}


def assert_same(found: Adapter, expected: dict[str, np.ndarray]) -> None:
    for name, delta in dense(found).items():
        np.testing.assert_allclose(delta, expected[name], rtol=1e-4, atol=1e-5)


EXPERTS = {name: adapter(number) for number, name in enumerate(NAMES)}
WOVEN = {
    Weaving(target, source): adapter(100 + number)
    for number, (target, source) in enumerate(itertools.permutations(NAMES, 2))
}


# Schedules


def trainings(schedule: WeaveSchedule, sources: int = 1, names: tuple[str, ...] = NAMES) -> list[list[Weaving]]:
    return schedule_passes(Weave(schedule=schedule, sources=sources), names, seed=0)


@pytest.mark.parametrize("schedule", ["all", "relay"])
def test_every_client_continues_every_other_adapter(schedule: WeaveSchedule) -> None:
    made = list(itertools.chain(*trainings(schedule)))
    assert sorted(made) == sorted(Weaving(*pair) for pair in itertools.permutations(NAMES, 2))
    assert len(trainings(schedule)) == 3


def test_a_ring_by_hand() -> None:
    first, second = trainings("ring", 2)
    assert first == [
        Weaving("beauty", "garden"),
        Weaving("books", "beauty"),
        Weaving("coffee", "books"),
        Weaving("garden", "coffee"),
    ]
    assert [each.source for each in second] == ["coffee", "garden", "beauty", "books"]


def test_a_whole_ring_is_the_schedule_all() -> None:
    assert trainings("ring", 3) == trainings("ring", 9) == trainings("all")


def test_sampled_sources_are_distinct_and_do_not_depend_on_other_targets() -> None:
    two, three = trainings("sampled", 2), trainings("sampled", 3)
    assert three[:2] == two
    for each in NAMES:
        sources = [weaving.source for passed in three for weaving in passed if weaving.target == each]
        assert sorted(sources) == sorted({*NAMES} - {each})
    assert schedule_passes(Weave(schedule="sampled", sources=3), NAMES, seed=1) != three


def test_the_mean_is_one_training_of_each_client() -> None:
    assert trainings("mean") == [[Weaving(name, MEAN) for name in NAMES]]


@pytest.mark.parametrize("schedule", ["all", "sampled", "ring", "relay", "mean"])
def test_schedules_ignore_the_order_of_domains_and_count_their_trainings(schedule: WeaveSchedule) -> None:
    weave = Weave(schedule=schedule, sources=2)
    assert schedule_passes(weave, NAMES, 0) == schedule_passes(weave, NAMES[::-1], 0)
    for names in (NAMES[:1], NAMES[:2], NAMES):
        passes = schedule_passes(weave, names, 0)
        assert len(passes) == weave.trainings(len(names))
        assert all([each.target for each in passed] == sorted(names) for passed in passes)
        assert all(each.target != each.source for passed in passes for each in passed)


# Starts


def never() -> Adapter:
    raise AssertionError("only the mean is cut to the shape of a fresh adapter")


def test_a_relay_continues_where_the_walk_is_and_passes_over_clients_that_failed() -> None:
    weave = Weave(schedule="relay")
    # The walk of coffee: garden, beauty, books.
    assert start_of(Weaving("garden", "coffee"), weave, EXPERTS, {}, never) is EXPERTS["coffee"]
    at_garden = {Weaving("garden", "coffee"): WOVEN[Weaving("garden", "coffee")]}
    assert start_of(Weaving("beauty", "coffee"), weave, EXPERTS, at_garden, never) is WOVEN[Weaving("garden", "coffee")]
    assert start_of(Weaving("books", "coffee"), weave, EXPERTS, at_garden, never) is WOVEN[Weaving("garden", "coffee")]
    assert start_of(Weaving("books", "coffee"), weave, EXPERTS, WOVEN, never) is WOVEN[Weaving("beauty", "coffee")]
    assert start_of(Weaving("books", "coffee"), Weave(schedule="all"), EXPERTS, WOVEN, never) is EXPERTS["coffee"]


def test_the_mean_of_the_others_is_their_best_approximation_of_the_rank() -> None:
    like = adapter(50, rank=1)
    found = mean_of_others("coffee", EXPERTS, like)
    assert found is not like
    for name, mean in dense_mean([EXPERTS[other] for other in ("beauty", "books", "garden")]).items():
        left, values, right = np.linalg.svd(mean)
        np.testing.assert_allclose(dense(found)[name], values[0] * np.outer(left[:, 0], right[0]), atol=1e-5)
        assert found.modules[name].rank == 1
        assert found.modules[name].scaling == like.modules[name].scaling


# Merges


@pytest.mark.parametrize("factor", [1.0, 1.4])
def test_merges_are_means_of_dense_updates(factor: float) -> None:
    everything = [*EXPERTS.values(), *WOVEN.values()]
    assert_same(woven_merge(EXPERTS, WOVEN, factor), dense_mean(everything, factor))
    own = [EXPERTS["books"], *(WOVEN[each] for each in WOVEN if each.target == "books")]
    assert_same(target_merge("books", EXPERTS["books"], WOVEN, factor), dense_mean(own, factor))


def test_targets_count_alike_however_much_each_continued() -> None:
    some = {each: WOVEN[each] for each in (Weaving("books", "beauty"), Weaving("books", "coffee"))}
    of_target = [dense(target_merge(name, EXPERTS[name], some, 1.0)) for name in NAMES]
    expected = {name: np.mean([part[name] for part in of_target], axis=0) for name in of_target[0]}
    assert_same(woven_merge(EXPERTS, some, 1.0), expected)


def test_without_steps_the_universal_merge_has_the_bytes_of_the_average() -> None:
    copies = {each: EXPERTS[each.source] for each in WOVEN}
    average = merge_adapters(EXPERTS, "average").adapter
    assert adapter_sha256(woven_merge(EXPERTS, copies, 1.0)) == adapter_sha256(average)


def test_a_single_domain_gives_its_expert() -> None:
    alone = {"books": EXPERTS["books"]}
    layout = survey_adapters(alone)
    itself = linear_merge_of_many(alone, layout, torch.ones(1))
    assert adapter_sha256(woven_merge(alone, {}, 1.0)) == adapter_sha256(itself)
    assert adapter_sha256(target_merge("books", EXPERTS["books"], {}, 1.0)) == adapter_sha256(itself)
    assert_same(itself, dense(EXPERTS["books"]))


def test_the_order_of_clients_changes_nothing() -> None:
    backwards = dict(reversed(EXPERTS.items())), dict(reversed(WOVEN.items()))
    assert adapter_sha256(woven_merge(*backwards, 1.4)) == adapter_sha256(woven_merge(EXPERTS, WOVEN, 1.4))
