"""Layer-wise search: candidates and maps, searchers against exhaustive search, running means, resuming."""

from collections.abc import Callable
from contextlib import suppress
from itertools import count, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import layout_of, random_adapters

from fedmerge.adapter import Adapter, adapter_sha256
from fedmerge.encoder.backbone import Backbone
from fedmerge.errors import ConfigError, LayoutMismatchError, MergeError
from fedmerge.mergerec.layer_maps.candidates import (
    LayerCandidates,
    LayerMap,
    assemble,
    layer_candidates,
    map_coefficients,
)
from fedmerge.mergerec.layer_maps.episodes import FAILED, OTHERS, SEARCHERS, FoundMap, Sums, search_maps
from fedmerge.mergerec.layer_maps.ppo import ppo, walk
from fedmerge.mergerec.layer_maps.rewards import draw_readers
from fedmerge.mergerec.layer_maps.searchers import Space, coordinate
from fedmerge.merging.stack import StackLayout, linear_merge, stack_adapters
from fedmerge.merging.training_free import merge_adapters

FACTORS = (0.2, 0.6, 1.0)
ALL = ("experts", "coefficients", "ties", "zero")


@pytest.fixture(scope="module")
def adapters(backbone: Backbone) -> dict[str, Adapter]:
    return random_adapters(layout_of(backbone))


@pytest.fixture(scope="module")
def candidates(adapters: dict[str, Adapter]) -> LayerCandidates:
    return layer_candidates(adapters, ALL, FACTORS, seed=0)


def small(num_groups: int = 2, num_candidates: int = 3, start: int = 0) -> LayerCandidates:
    """Candidates of which a search needs the numbers alone."""
    groups = tuple(f"layer {number}" for number in range(num_groups))
    names = tuple(f"candidate {number}" for number in range(num_candidates))
    nothing = Adapter({})
    layout = StackLayout(("books", "tents"), groups, {})
    return LayerCandidates(layout, names, (nothing,) * num_candidates, (None,) * num_candidates, start)


# Candidates and maps


def test_a_constant_map_has_the_bytes_of_its_candidate(
    adapters: dict[str, Adapter], candidates: LayerCandidates
) -> None:
    domains, num_groups = sorted(adapters), len(candidates.layout.groups)
    expected = [adapters[domain] for domain in domains]
    expected += [merge_adapters(adapters, "task-arithmetic", coefficient=factor).adapter for factor in FACTORS]
    expected += [merge_adapters(adapters, "ties", density=0.5).adapter]
    expected += [linear_merge(stack_adapters(adapters), torch.zeros(len(domains)))]
    assert len(expected) == len(candidates.names)
    for number, adapter in enumerate(expected):
        assert adapter_sha256(assemble(candidates, (number,) * num_groups)) == adapter_sha256(adapter)
    assert candidates.names[candidates.reference] == "task-arithmetic 0.6"


def test_a_map_takes_every_group_from_its_candidate(candidates: LayerCandidates) -> None:
    layout = candidates.layout
    layer_map = tuple(number % len(candidates.names) for number in range(2, 2 + len(layout.groups)))
    found = assemble(candidates, layer_map)
    assert len(layout.groups) > 1
    for name, group in layout.group_of.items():
        assert found.modules[name] is candidates.adapters[layer_map[group]].modules[name]


def test_the_coefficients_of_a_linear_map_give_its_updates(
    adapters: dict[str, Adapter], candidates: LayerCandidates
) -> None:
    names = candidates.names
    layer_map = tuple([0, names.index("task-arithmetic 1"), names.index("zero")][: len(candidates.layout.groups)])
    coefficients = map_coefficients(candidates, layer_map)
    assert coefficients is not None
    merged, found = linear_merge(stack_adapters(adapters), coefficients), assemble(candidates, layer_map)
    for name, module in found.modules.items():
        torch.testing.assert_close(module.delta_weight(), merged.modules[name].delta_weight())
    assert map_coefficients(candidates, (names.index("ties density 0.5"), *layer_map[1:])) is None


@pytest.mark.parametrize(
    ("layer_map", "found"),
    [((0, 99), "candidate 99"), ((0, -1), "candidate -1"), ((True, 0), "candidate True"), ((0,), "1 entries")],
)
def test_a_map_with_an_unknown_index_is_refused(layer_map: tuple[int, ...], found: str) -> None:
    with pytest.raises(LayoutMismatchError, match=found):
        assemble(small(), layer_map)


def test_one_expert_is_the_merge(adapters: dict[str, Adapter]) -> None:
    (name,) = sorted(adapters)[:1]
    single = layer_candidates({name: adapters[name]}, ("coefficients",), FACTORS, seed=0)
    found = search_maps(single, "coordinate", _never, budget=9, num_shards=1, seed=0)
    assert adapter_sha256(assemble(single, found.layer_map)) == adapter_sha256(adapters[name])
    assert (found.episodes, found.readings) == (0, 0)


def test_one_coefficient_is_task_arithmetic(adapters: dict[str, Adapter]) -> None:
    only = layer_candidates(adapters, ("coefficients",), (0.4,), seed=0)
    found = search_maps(only, "ppo", _never, budget=9, num_shards=1, seed=0)
    expected = merge_adapters(adapters, "task-arithmetic", coefficient=0.4).adapter
    assert adapter_sha256(assemble(only, found.layer_map)) == adapter_sha256(expected)


def test_the_order_of_the_domains_changes_nothing(adapters: dict[str, Adapter], candidates: LayerCandidates) -> None:
    turned = layer_candidates(dict(reversed(adapters.items())), ALL, FACTORS, seed=0)
    assert turned.names == candidates.names
    assert [*map(adapter_sha256, turned.adapters)] == [*map(adapter_sha256, candidates.adapters)]


def _never(layer_map: LayerMap, shard: int) -> Sums:
    raise AssertionError("nothing is to be read")


# Searchers

TABLE = np.array([[0.1, 0.7, 0.3], [0.5, 0.2, 0.4]])  # (G, C): a separable reward


def separable(layer_map: LayerMap) -> float:
    return float(sum(TABLE[group, index] for group, index in enumerate(layer_map)))


def read_as(reward: Callable[[LayerMap], float]) -> Callable[[LayerMap, int], Sums]:
    return lambda layer_map, shard: {"books": (1, reward(layer_map)), "tents": (2, 2 * reward(layer_map))}


def test_coordinate_ascent_equals_exhaustive_search_from_any_start() -> None:
    maps = list(product(range(3), repeat=2))
    best = max(maps, key=separable)
    for start in maps:
        asked = coordinate(Space(2, 3, start), 0)
        given, episodes = next(asked), 0
        last: list[LayerMap | None] = []
        while True:
            episodes, last = episodes + len(given), given
            try:
                given = asked.send([separable(each) for each in given if each is not None])
            except StopIteration:
                break
        assert episodes == 2 * 2 * 3
        assert best in last


@pytest.mark.parametrize("searcher", SEARCHERS)
def test_every_searcher_finds_the_best_of_a_bandit(searcher: str) -> None:
    rewards = dict(zip(product(range(3), repeat=2), np.random.default_rng(3).permutation(9).tolist(), strict=True))
    reward = separable if searcher == "coordinate" else rewards.__getitem__
    found = search_maps(small(), searcher, read_as(reward), budget=200, num_shards=1, seed=4)
    best = max(product(range(3), repeat=2), key=reward)
    assert found.layer_map == best
    assert found.reward == pytest.approx(reward(best) - reward((0, 0)))
    assert found.episodes == (12 if searcher == "coordinate" else 200)


@pytest.mark.long
def test_ppo_learns() -> None:
    """The policy itself improves, so that later episodes have higher rewards than a random policy."""
    asked = ppo(Space(2, 3, (0, 0)), 0)
    maps, means = next(asked), []
    for _ in range(30):
        rewards = [FAILED if each is None else separable(each) for each in maps]
        means.append(np.mean(rewards))
        maps = asked.send(rewards)
    assert np.mean(means[-3:]) > np.mean(means[:3]) + 0.5
    assert np.mean(means[-3:]) > 0.9 * max(map(separable, product(range(3), repeat=2)))


def always(*actions: int) -> torch.nn.Module:
    """An actor that takes the given actions, by the number of cells that are chosen."""

    class Actor(torch.nn.Module):
        def forward(self, state: torch.Tensor) -> torch.Tensor:
            logits = torch.full((4,), -torch.inf)
            logits[actions[int(state.sum())]] = 0.0
            return logits

    return Actor()


def test_back_from_the_first_group_ends_without_a_map() -> None:
    drawn = torch.Generator().manual_seed(0)
    assert walk(Space(2, 3, (0, 0)), always(3, 0), drawn).layer_map is None
    assert walk(Space(2, 3, (0, 0)), always(2, 1), drawn).layer_map == (2, 1)
    too_long = walk(Space(2, 3, (0, 0)), always(1, 3), drawn)  # back revises the choice, again and again
    assert (too_long.layer_map, len(too_long.actions)) == (None, 6)
    assert [int(state.sum()) for state in too_long.states] == [0, 1, 0, 1, 0, 1]


def test_an_episode_without_a_map_has_the_reward_of_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[list[float]] = []

    def stepping_back(space: Space, seed: int) -> Any:
        sent.append((yield [None, (1, 1)]))

    monkeypatch.setattr("fedmerge.mergerec.layer_maps.episodes.SEARCHERS", {"back": stepping_back})
    search_maps(small(), "back", read_as(separable), budget=5, num_shards=1, seed=0)
    assert sent == [[-10.0, pytest.approx(separable((1, 1)) - separable((0, 0)))]]


# Rewards

OUTCOMES = {  # domain -> outcomes of users, in eighths, so that sums are exact
    "books": np.random.default_rng(1).integers(0, 9, (9, 11)) / 8,
    "tents": np.random.default_rng(2).integers(0, 9, (9, 14)) / 8,
}
MAPS = list(product(range(3), repeat=2))


def read_users(layer_map: LayerMap, shard: int, num_shards: int = 3) -> Sums:
    """Users of two domains, who divide into shards of unequal size; the second half are the others."""
    found = {}
    for domain, outcomes in OUTCOMES.items():
        half = outcomes.shape[1] // 2
        parts = [*np.array_split(np.arange(half), num_shards), np.arange(half, outcomes.shape[1])]
        users = parts[shard]
        found[domain] = (len(users), float(outcomes[MAPS.index(layer_map), users].sum()))
    return found


def test_the_running_mean_after_all_shards_is_the_reward_on_all_users(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[list[float]] = []

    def visiting(space: Space, seed: int) -> Any:
        for _ in range(5):
            sent.append((yield [(2, 1)]))

    def whole(layer_map: LayerMap) -> float:
        return float(np.mean([o[MAPS.index(layer_map), : o.shape[1] // 2].mean() for o in OUTCOMES.values()]))

    monkeypatch.setattr("fedmerge.mergerec.layer_maps.episodes.SEARCHERS", {"visiting": visiting})
    reads = list[tuple[LayerMap, int]]()

    def counted(layer_map: LayerMap, shard: int) -> Sums:
        reads.append((layer_map, shard))
        return read_users(layer_map, shard)

    found = search_maps(small(), "visiting", counted, budget=9, num_shards=3, seed=0)
    on_all = np.mean(
        [
            np.mean(o[MAPS.index((2, 1)), : o.shape[1] // 2]) - np.mean(o[0, : o.shape[1] // 2])
            for o in OUTCOMES.values()
        ]
    )
    assert sent[2] == sent[3] == sent[4] == [on_all]
    assert on_all == pytest.approx(whole((2, 1)) - whole((0, 0)), abs=1e-12)
    first = [users[0][1] / users[0][0] for users in ([read_users(m, 0)[d] for m in ((2, 1),)] for d in OUTCOMES)]
    start = [read_users((0, 0), 0)[d][1] / read_users((0, 0), 0)[d][0] for d in OUTCOMES]
    assert sent[0] == [pytest.approx(np.mean(first) - np.mean(start), abs=1e-12)]
    assert reads[:3] == [((0, 0), shard) for shard in range(3)]
    assert reads[3:6] == [((2, 1), shard) for shard in range(3)]  # a final map is not read again
    assert reads[6:] == [((0, 0), OTHERS), ((2, 1), OTHERS)]
    assert (found.episodes, found.readings) == (5, 8)


def test_other_users_choose_among_the_ten_best_and_the_start() -> None:
    def flipped(layer_map: LayerMap, shard: int) -> Sums:
        reward = separable(layer_map)
        return {"books": (4, 4 * (-reward if shard == OTHERS else reward))}

    found = search_maps(small(3, 3), "evolution", lambda m, s: flipped(m[:2], s), budget=100, num_shards=1, seed=0)
    assert found.layer_map == min([each for each, _, _ in found.read_again], key=lambda each: separable(each[:2]))
    assert len(found.read_again) == 11
    ranked = [searched for _, searched, _ in found.read_again[1:]]
    assert ranked == sorted(ranked, reverse=True)
    assert found.read_again[0] == ((0, 0, 0), 0.0, 0.0)


@pytest.mark.parametrize("searcher", SEARCHERS)
@pytest.mark.parametrize("num_shards", [1, 3])
def test_a_killed_search_resumes_without_reading_twice(searcher: str, num_shards: int, tmp_path: Path) -> None:
    def search(read: Any, log: Path | None) -> FoundMap:
        return search_maps(small(), searcher, read, budget=70, num_shards=num_shards, seed=1, log=log)

    whole = search(read_users, None)
    log, made, turns = tmp_path / "learning" / "readings.jsonl", list[tuple[LayerMap, int]](), count(1)

    def killed(layer_map: LayerMap, shard: int) -> Sums:
        if next(turns) % 4 == 0:
            raise KeyboardInterrupt
        made.append((layer_map, shard))
        return read_users(layer_map, shard)

    resumed = None
    while resumed is None:
        with suppress(KeyboardInterrupt):
            resumed = search(killed, log)
    assert resumed == whole
    assert len(made) == len({*made}) == whole.readings


def test_a_domain_that_leaves_counts_no_more() -> None:
    calls = list[int]()

    def leaving(layer_map: LayerMap, shard: int) -> Sums:
        calls.append(shard)
        sums = {"books": (1, separable(layer_map)), "tents": (1, -3 * separable(layer_map))}
        return sums if len(calls) < 4 else {"books": sums["books"]}

    found = search_maps(small(), "coordinate", leaving, budget=50, num_shards=1, seed=0)  # books has the last word
    assert found.layer_map == max(MAPS, key=separable)
    with pytest.raises(MergeError, match="no domain"):
        search_maps(small(), "coordinate", lambda layer_map, shard: {}, budget=5, num_shards=1, seed=0)


def test_readers_are_divided_into_equal_shards_and_as_many_others() -> None:
    readers = draw_readers("books", np.arange(100)[::-1].copy(), 21, 4)
    assert [len(shard) for shard in readers.shards] == [6, 5, 5, 5]
    assert len(readers.others) == 21
    together = np.concatenate([*readers.shards, readers.others])
    assert sorted(together) == sorted(np.arange(100)[::-1][:42])
    assert len(draw_readers("books", np.arange(9), 500, 1).others) == 4
    with pytest.raises(ConfigError, match=r"domain books: rmm.shards = 5 divides 4 users"):
        draw_readers("books", np.arange(9), 500, 5)
