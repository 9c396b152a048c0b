"""The search over layer maps: rewards as running means over shards of users, and a second reading on other users."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from types import MappingProxyType

from fedmerge.errors import MergeError
from fedmerge.files import append_line, make_folder, read_lines
from fedmerge.mergerec.layer_maps.candidates import LayerCandidates, LayerMap
from fedmerge.mergerec.layer_maps.ppo import ppo
from fedmerge.mergerec.layer_maps.searchers import Searcher, Space, coordinate, evolution

SEARCHERS: Mapping[str, Searcher] = MappingProxyType({"coordinate": coordinate, "evolution": evolution, "ppo": ppo})
FAILED = -10.0  # reward of an episode without a map
READ_AGAIN = 10  # best maps that other users read
OTHERS = -1  # "shard" of the other users

Sums = Mapping[str, tuple[int, float]]
"""Domain -> number of users and sum of their outcomes; higher outcomes are better."""
ReadMap = Callable[[LayerMap, int], Sums]
"""(map, number of a shard, or OTHERS) -> sums over these users of every domain."""


@dataclass(frozen=True, slots=True)
class FoundMap:
    """The result of a search.

    Attributes:
        layer_map: the best map on the other users.
        reward: its reward on the other users; the start of the search has 0.
        episodes: number of episodes.
        readings: number of times that users read a map.
        read_again: (map, reward in the search, reward on the other users) of the best maps, best in the search first;
            empty where nothing was searched.
    """

    layer_map: LayerMap
    reward: float
    episodes: int
    readings: int
    read_again: tuple[tuple[LayerMap, float, float], ...]


def search_maps(
    candidates: LayerCandidates,
    searcher: str,
    read: ReadMap,
    *,
    budget: int,
    num_shards: int,
    seed: int,
    log: Path | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> FoundMap:
    """Search for the map with the highest reward.

    R(a) is the mean over domains of the mean outcome of their users under map a, minus that of the start. A map that is
    visited for the v-th time is read by shard v of the users, and its reward is the running mean over its visits; after
    all shards it is final, and is not read again. The start is read by every shard first, so that both sides of a
    difference have the same users. The ten best maps, and the start, are read once by other users, who decide.

    Args:
        candidates: what a group can take; a single one ends the search before it starts.
        searcher: key of SEARCHERS.
        read: reads a map; each map and shard is read once.
        budget: largest number of episodes; readings of the start and of the other users are not counted.
        num_shards: shards of the users.
        seed: seed of the searcher's draws.
        log: file of the readings, which a resumed search does not make again; None keeps nothing.
        progress: receives lines about the progress.

    Raises:
        MergeError: no domain has read every map.

    Source: arXiv:2503.21272; its abstract names Dynamic Average Reward over subsets of the data.
    Differs: the formula of the running mean is ours; every map sees the shards in one order, differences are paired,
        and the map is chosen on users who took no part in the search.
    """
    start, num_candidates = candidates.start, len(candidates.names)
    if num_candidates == 1:
        return FoundMap(start, 0.0, 0, 0, ())
    readings = _Readings(read, log)
    for shard in range(num_shards):
        readings.at(start, shard)
    visits: dict[LayerMap, int] = {}  # in the order of the first visit

    def visit(layer_map: LayerMap | None) -> float:
        if layer_map is None:
            return FAILED
        visits[layer_map] = min(num_shards, visits.get(layer_map, 0) + 1)
        return readings.difference(layer_map, start, range(visits[layer_map]))

    episodes, best = 0, (0.0, start)
    asked = SEARCHERS[searcher](Space(len(start), num_candidates, start), seed)
    maps = next(asked)
    while True:
        rewards = [visit(layer_map) for layer_map in maps[: budget - episodes]]
        episodes += len(rewards)
        best = max([best, *((reward, each) for reward, each in zip(rewards, maps, strict=False) if each is not None)])
        progress(f"rmm-style: {episodes} of at most {budget} episodes, {len(visits)} maps, best reward {best[0]:.4g}")
        try:
            maps = asked.send(rewards) if len(rewards) == len(maps) and episodes < budget else []
        except StopIteration:
            maps = []
        if not maps:
            break
    rewards_of = {
        each: readings.difference(each, start, range(number)) for each, number in visits.items() if each != start
    }
    ranked = sorted(rewards_of, key=lambda each: -rewards_of[each])[:READ_AGAIN]  # stable: ties to the first visited
    rewards_of[start] = 0.0
    for layer_map in [start, *ranked]:
        readings.at(layer_map, OTHERS)
    again = [(each, rewards_of[each], readings.difference(each, start, [OTHERS])) for each in [start, *ranked]]
    chosen = max(again, key=lambda each: each[2])
    return FoundMap(chosen[0], chosen[2], episodes, readings.made, tuple(again))


class _Readings:
    """All readings of a search, on disk if there is a log."""

    def __init__(self, read: ReadMap, log: Path | None) -> None:
        self.read, self.log = read, log
        self.kept: dict[tuple[LayerMap, int], Sums] = {}
        self.used: set[tuple[LayerMap, int]] = set()
        self.domains: set[str] | None = None  # that answered every reading so far; one that left counts no more
        for line in read_lines(log) if log is not None else ():
            sums = {str(domain): (int(number), float(total)) for domain, (number, total) in line["sums"].items()}
            self.kept[tuple(line["map"]), int(line["shard"])] = sums

    @property
    def made(self) -> int:
        """Number of readings of this search, those before it was resumed included."""
        return len(self.used)

    def at(self, layer_map: LayerMap, shard: int) -> Sums:
        key = (layer_map, shard)
        if key not in self.kept:
            self.kept[key] = dict(sorted(self.read(layer_map, shard).items()))
            if self.log is not None:
                make_folder(self.log.parent)
                append_line(self.log, {"map": list(layer_map), "shard": shard, "sums": self.kept[key]})
        if key not in self.used:
            self.used.add(key)
            self.domains = {*self.kept[key]} if self.domains is None else self.domains & {*self.kept[key]}
        return self.kept[key]

    def difference(self, layer_map: LayerMap, start: LayerMap, shards: Iterable[int]) -> float:
        """Mean over domains of the difference in the mean outcome, over the same shards."""
        pairs = [(self.at(layer_map, shard), self.at(start, shard)) for shard in shards]
        if not self.domains:
            raise MergeError(
                "rmm-style: no domain has read every map so far, expected at least one. Keep the clients connected for "
                "the whole search; start a new run."
            )
        return fmean(
            _mean([sums[domain] for sums, _ in pairs]) - _mean([sums[domain] for _, sums in pairs])
            for domain in sorted(self.domains)
        )


def _mean(sums: Iterable[tuple[int, float]]) -> float:
    """Return the mean outcome over several shards: sums and numbers are added before the division."""
    pairs = list(sums)
    return sum(total for _, total in pairs) / sum(number for number, _ in pairs)
