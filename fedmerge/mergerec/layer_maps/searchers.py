"""Searchers over layer maps, behind one interface: a generator that yields maps and is sent their rewards.

A searcher keeps no state outside of the generator and draws from the seed alone, so the same rewards give the same
maps. A resumed search sends it the rewards that are on disk.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass

import numpy as np

from fedmerge.mergerec.layer_maps.candidates import LayerMap
from fedmerge.seeding import generator

SWEEPS = 2  # of coordinate ascent
POPULATION = 12  # maps of a generation
PARENTS = 4


@dataclass(frozen=True, slots=True)
class Space:
    """The maps that a search chooses from.

    Attributes:
        num_groups: G.
        num_candidates: C.
        start: the map that a search starts from.
    """

    num_groups: int
    num_candidates: int
    start: LayerMap


Episodes = Generator[list[LayerMap | None], list[float], None]
"""Yields the maps of some episodes, None for an episode that ended without a map; is sent their rewards."""
Searcher = Callable[[Space, int], Episodes]
"""(space, seed) -> episodes; a searcher that does not end by itself is ended by the budget."""


def coordinate(space: Space, seed: int) -> Episodes:
    """Choose the best candidate of one group after the other, twice over all groups: 2GC episodes, without a draw.

    The current choice stays unless another candidate is better.
    """
    best = space.start
    for _ in range(SWEEPS):
        for group in range(space.num_groups):
            maps = [(*best[:group], index, *best[group + 1 :]) for index in range(space.num_candidates)]
            rewards = yield [*maps]
            current = best[group]
            best = maps[max(range(len(maps)), key=lambda index: (rewards[index], index == current, -index))]


def evolution(space: Space, seed: int) -> Episodes:
    """Cross the best maps so far and mutate one group of a child on average; start from the constant maps."""
    drawn = generator(seed, "rmm", "evolution")
    found: dict[LayerMap, float] = {}
    constant = [(index,) * space.num_groups for index in range(space.num_candidates)]
    maps = list(dict.fromkeys([space.start, *constant]))
    maps += [_mutated(drawn, space, space.start, 0.5) for _ in range(POPULATION - len(maps))]
    while True:
        rewards = yield [*maps]
        found |= zip(maps, rewards, strict=True)
        parents = sorted(found, key=lambda each: (-found[each], each))[:PARENTS]
        maps = [_child(drawn, space, parents) for _ in range(POPULATION)]


def _child(drawn: np.random.Generator, space: Space, parents: list[LayerMap]) -> LayerMap:
    left, right = (parents[int(number)] for number in drawn.integers(len(parents), size=2))
    sides = drawn.integers(2, size=space.num_groups)
    crossed = tuple(one if side else other for one, other, side in zip(left, right, sides, strict=True))
    return _mutated(drawn, space, crossed, 1 / space.num_groups)


def _mutated(drawn: np.random.Generator, space: Space, layer_map: LayerMap, rate: float) -> LayerMap:
    changed = drawn.random(space.num_groups) < rate
    others = drawn.integers(space.num_candidates, size=space.num_groups)
    return tuple(
        int(other) if change else index for index, other, change in zip(layer_map, others, changed, strict=True)
    )
