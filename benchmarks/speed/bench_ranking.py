"""Ranks of every user's target among all items: ``rank_targets`` against sorting the full score matrix.

    python benchmarks/speed/bench_ranking.py

``argsort`` sorts all scores of every user and finds the target's place; ``topk`` sorts only the first 50 and has no
rank beyond. Both hold the (users, items) matrix. Peak memory is the growth of a process of its own that ranks once.
"""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from interleaved import arguments, print_table, timed_in_turn

from fedmerge.evaluation.ranks import rank_targets

WIDTH, DEEPEST = 384, 50
Ranking = Callable[[torch.Tensor, torch.Tensor, np.ndarray], np.ndarray]


def by_argsort(users: torch.Tensor, items: torch.Tensor, targets: np.ndarray) -> np.ndarray:
    """Return 1 + the target's place in the sorted row."""
    order = torch.argsort(users @ items.T, dim=1, descending=True)
    return 1 + (order == torch.from_numpy(targets)[:, None]).int().argmax(dim=1).numpy()


def by_topk(users: torch.Tensor, items: torch.Tensor, targets: np.ndarray) -> np.ndarray:
    """Return the same among the first DEEPEST; DEEPEST + 1 for all beyond."""
    best = torch.topk(users @ items.T, DEEPEST, dim=1).indices
    hits = best == torch.from_numpy(targets)[:, None]
    return np.where(hits.any(dim=1).numpy(), 1 + hits.int().argmax(dim=1).numpy(), DEEPEST + 1)


ALTERNATIVES: dict[str, Ranking] = {"argsort": by_argsort, "topk": by_topk, "fedmerge": rank_targets}


def vectors(num_users: int, num_items: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Return random unit vectors and targets."""
    rng = torch.Generator().manual_seed(0)
    users, items = (
        torch.nn.functional.normalize(torch.randn(number, WIDTH, generator=rng)) for number in (num_users, num_items)
    )
    return users, items, torch.randint(num_items, (num_users,), generator=rng).numpy()


def peak_mib(name: str, num_users: int, num_items: int, threads: int) -> float:
    """Return the MiB that one ranking adds to a process."""
    torch.set_num_threads(threads)
    users, items, targets = vectors(num_users, num_items)
    ALTERNATIVES[name](users[:10], items, targets[:10])
    before = largest_kib()
    ALTERNATIVES[name](users, items, targets)
    return (largest_kib() - before) / 1024


def largest_kib() -> int:
    """Return the largest resident set of this process so far (that of getrusage starts with the parent's)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0])


def main() -> None:
    """Time the alternatives in turn, compare their ranks, and measure the memory of each."""
    parser = arguments(__doc__, repeats=7)
    parser.add_argument("--users", type=int, default=2000)
    parser.add_argument("--items", type=int, default=12000)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    users, items, targets = vectors(options.users, options.items)
    exact = rank_targets(users, items, targets)
    for name, rank in ALTERNATIVES.items():
        found = rank(users, items, targets)
        deepest = DEEPEST + 1 if name == "topk" else options.items
        differing = np.abs(np.minimum(exact, deepest) - found)
        print(f"{name}: {(differing > 0).sum()} of {options.users} ranks differ, by at most {differing.max()}")
    calls = {name: lambda rank=rank: rank(users, items, targets) for name, rank in ALTERNATIVES.items()}
    print(f"\n{options.users} users, {options.items} items, width {WIDTH}, {options.threads} threads, {options.clock}")
    print_table(timed_in_turn(calls, options.repeats, options.clock), "argsort", "users/s", options.users)
    print()
    for name in ALTERNATIVES:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            size = process.submit(peak_mib, name, options.users, options.items, options.threads).result()
        print(f"{name}: {size:.0f} MiB above the vectors")


if __name__ == "__main__":
    main()
