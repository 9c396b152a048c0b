"""Sequence models: seconds of an epoch and peak memory, and ranking by fused scores against plain ranking.

    python benchmarks/speed/bench_sequence.py --threads 1 --clock cpu
    python benchmarks/speed/bench_sequence.py --threads 1 --clock cpu --batches 3 --sampled 0 10000 --items 12000 100000

An epoch is extrapolated from some batches of synthetic users. Peak memory is the growth of a process of its own that
trains on those batches, or ranks once. With `--sampled` only steps are measured, over items drawn; 0: all.
"""

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from interleaved import CLOCKS, arguments, print_table, timed_in_turn

from fedmerge.device import resolve_compute
from fedmerge.evaluation.ranks import rank_targets
from fedmerge.sequence.catalog import draw_items
from fedmerge.sequence.fusion import choose_weights, fused_ranks
from fedmerge.sequence.model import Inputs, SequenceModel, SequenceSettings
from fedmerge.sequence.ranking import Source
from fedmerge.sequence.training import backward, optimizers_of

TEXT_WIDTH, MEAN_LENGTH = 384, 8
WEIGHTS = (0.4, 0.4, 0.2)
INPUTS: tuple[Inputs, ...] = ("ids", "text", "text+ids")


def train_batches(
    inputs: Inputs, num_items: int, num_batches: int, clock: str, hidden_size: int, sampled: int | None = None
) -> float:
    """Return the seconds of a batch."""
    rng = np.random.default_rng(0)
    settings = SequenceSettings(inputs=inputs, hidden_size=hidden_size, sampled_items=sampled)
    vectors = None if inputs == "ids" else unit_vectors(num_items, TEXT_WIDTH, 0)
    model = SequenceModel(num_items, settings, vectors).train()
    optimizers, dtype = optimizers_of(model), resolve_compute("cpu").autocast_dtype
    now, start = CLOCKS[clock], 0.0
    for number in range(-1, num_batches):  # the first one allocates
        if number == 0:
            start = now()
        lengths = np.clip(rng.geometric(1 / (MEAN_LENGTH - 1), settings.batch_size) + 1, 2, settings.max_length + 1)
        for optimizer in optimizers.values():
            optimizer.zero_grad()
        batch = [rng.integers(0, num_items, length) for length in lengths]
        drawn = None if sampled is None else draw_items(batch, sampled, num_items, rng, torch.device("cpu"))
        backward(model, batch, dtype, drawn=drawn)
        for optimizer in optimizers.values():
            optimizer.step()
    return (now() - start) / num_batches


def unit_vectors(number: int, width: int, seed: int) -> torch.Tensor:
    """Return random unit vectors."""
    return torch.nn.functional.normalize(torch.randn(number, width, generator=torch.Generator().manual_seed(seed)))


def sources_of(num_users: int, num_items: int) -> tuple[Source, ...]:
    """Return a head of width 64, and two sources of text of width 384."""
    text = unit_vectors(num_items, TEXT_WIDTH, 1)
    return (
        Source("head", unit_vectors(num_users, 64, 2), unit_vectors(num_items, 64, 3)),
        Source("text", unit_vectors(num_users, TEXT_WIDTH, 4), text),
        Source("recent items", unit_vectors(num_users, TEXT_WIDTH, 5), text),
    )


def rankings(num_users: int, num_items: int) -> dict[str, Callable[[], object]]:
    """Return the ways to rank: by text alone, fused, and the choice of weights."""
    sources = sources_of(num_users, num_items)
    rng = np.random.default_rng(0)
    targets = rng.integers(0, num_items, num_users)
    seen = [rng.integers(0, num_items, MEAN_LENGTH) for _ in range(num_users)]
    return {
        "text alone": lambda: rank_targets(sources[1].user_vectors, sources[1].item_vectors, targets, seen),
        "all three alone": lambda: [rank_targets(s.user_vectors, s.item_vectors, targets, seen) for s in sources],
        "fused": lambda: fused_ranks(sources, WEIGHTS, targets, seen),
        "66 weights chosen": lambda: choose_weights(sources, targets, seen, (0, 0.5, 0.5), len(targets)),
    }


def peak_mib(threads: int, what: str, inputs: Inputs, num_users: int, num_items: int) -> float:
    """Return the MiB that training batches, or one ranking, adds to a process that has loaded everything."""
    torch.set_num_threads(threads)
    if what == "training":
        train_batches(inputs, 10, 1, "wall", 64)
        before = largest_kib()
        train_batches(inputs, num_items, 10, "wall", 64)
    else:
        rankings(2, 100)[what]()
        call = rankings(num_users, num_items)[what]
        before = largest_kib()
        call()
    return (largest_kib() - before) / 1024


def step(threads: int, num_items: int, num_batches: int, clock: str, sampled: int | None) -> tuple[float, float]:
    """Return the seconds of a step on text and ids of width 128, and the largest resident set of this process in MB."""
    torch.set_num_threads(threads)
    seconds = train_batches("text+ids", num_items, num_batches, clock, 128, sampled)
    return seconds, largest_kib() * 1024 / 1e6


def largest_kib() -> int:
    """Return the largest resident set of this process so far (that of getrusage starts with the parent's)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0])


def in_own_process(*of_call: object) -> float:
    """Return :func:`peak_mib` of a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return float(process.submit(peak_mib, *of_call).result())  # type: ignore[arg-type]  # as given


def main() -> None:
    """Time an epoch of each model and the ways to rank, in turn, and measure the memory of each."""
    parser = arguments(__doc__, repeats=5)
    parser.add_argument("--users", type=int, default=22000, help="training users of an epoch")
    parser.add_argument("--ranked", type=int, default=2000, help="users ranked")
    parser.add_argument("--items", type=int, nargs="+", default=[12000])
    parser.add_argument("--batches", type=int, default=10, help="batches timed")
    parser.add_argument("--sampled", type=int, nargs="+", default=[], help="items drawn for a step, 0: all; only steps")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.sampled:
        for num_items in options.items:
            for sampled in options.sampled:
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                    call = process.submit(
                        step, options.threads, num_items, options.batches, options.clock, sampled or None
                    )
                    seconds, size = call.result()
                print(
                    f"{num_items:>10,} items, {sampled or 'all'} scored: {seconds:.3f} s a step, {size:,.0f} MB",
                    flush=True,
                )
        return
    started = time.monotonic()
    first = options.items[0]
    batches = options.users / SequenceSettings().batch_size
    print(f"an epoch of {options.users} users, {first} items, {options.threads} threads, {options.clock}")
    for hidden_size in (64, 128):
        for inputs in INPUTS:
            of_batch = train_batches(inputs, first, options.batches, options.clock, hidden_size)
            print(f"{inputs:<9} width {hidden_size:<4} {of_batch * batches:6.1f} s")
    for inputs in INPUTS:
        print(f"training, {inputs}: {in_own_process(options.threads, 'training', inputs, 0, first):.0f} MiB")
    for num_items in options.items:
        calls = rankings(options.ranked, num_items)
        if num_items > first:
            del calls["66 weights chosen"]
        print(f"\n{options.ranked} users, {num_items} items, {options.threads} threads, {options.clock}")
        repeats = options.repeats if num_items == first else 2
        print_table(timed_in_turn(calls, repeats, options.clock), "text alone", "users/s", options.ranked)
        for name in calls:
            size = in_own_process(options.threads, name, "ids", options.ranked, num_items)
            print(f"{name}: {size:.0f} MiB above the vectors")
    print(f"\n{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
