"""How threads wait for each other, OMP_WAIT_POLICY: training steps a second on a machine with nothing else to do, and
beside other processes.

    python benchmarks/federation/bench_waiting.py --busy 0 1 2

OpenMP's own way, the named alternative, is to wait on the CPU; `fedmerge` sets "passive", which sleeps. Each
measurement is a process of its own; a busy neighbour is a process that never pauses. Alternatives take turns.
"""

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

STEPS = """
import sys, time
import torch
threads, width, limit = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
torch.set_num_threads(threads)
torch.manual_seed(0)
layer = torch.nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True)
model = torch.nn.TransformerEncoder(layer, 2)
optimizer = torch.optim.AdamW(model.parameters())
batch = torch.randn(32, 48, width)
done, started = -1, time.perf_counter()
while done < 1 or time.perf_counter() - started < limit:
    optimizer.zero_grad()
    model(batch).square().mean().backward()
    optimizer.step()
    done += 1
    if done == 0:  # the first step is not counted
        started = time.perf_counter()
print(done / (time.perf_counter() - started))
"""
WAYS = {"two threads": (2, None), "two threads, passive": (2, "passive"), "one thread": (1, None)}


def main() -> None:
    """Print a row for each number of neighbours and width, with ratios to OpenMP's own way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 2], help="busy neighbours")
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--seconds", type=float, default=4.0, help="of a measurement")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    print("training steps a second, median (lowest to highest); ratio to two threads that wait on the CPU")
    print(f"{'busy':>5}{'width':>7}  " + "".join(f"{way:<38}" for way in WAYS))
    for busy in options.busy:
        for width in options.widths:
            rates: dict[str, list[float]] = {way: [] for way in WAYS}
            with _neighbours(busy):
                for _ in range(options.repeats):
                    for way, (threads, policy) in WAYS.items():
                        rates[way].append(_rate(threads, policy, width, options.seconds))
            first = statistics.median(rates["two threads"])
            print(
                f"{busy:>5}{width:>7}  " + "".join(f"{_text(of_way, first):<38}" for of_way in rates.values()),
                flush=True,
            )


def _rate(threads: int, policy: str | None, width: int, seconds: float) -> float:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    if policy:
        environment["OMP_WAIT_POLICY"] = policy
    command = [sys.executable, "-c", STEPS, str(threads), str(width), str(seconds)]
    return float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


@contextmanager
def _neighbours(number: int) -> Iterator[None]:
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def _text(rates: list[float], first: float) -> str:
    median = statistics.median(rates)
    return f"{median:.2f} ({min(rates):.2f} to {max(rates):.2f}), {median / first:.2f} x"


if __name__ == "__main__":
    main()
