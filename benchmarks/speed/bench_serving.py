"""``fedmerge serve`` beside a plain service of sentence-transformers and faiss, under the same load, in one run.

    python benchmarks/speed/bench_serving.py                                      # 12,000 items, 50 requests a second
    python benchmarks/speed/bench_serving.py --search 1000000                     # the index against exact search

Both services serve the same model (MiniLM), items and histories; they are loaded in turn. Requests arrive at fixed
times whether or not earlier ones are answered, and a latency counts from the time when the request was due. The plain
service is what one writes first, in plain_service.py: FastAPI, ``model.encode`` and exact search by faiss, or by NumPy.
``--search`` scores vectors in clusters, for users beside the items, on one thread.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedmerge.domain.catalog import Catalog
from fedmerge.domain.demo import generate_domain
from fedmerge.domain.folder import write_domain
from fedmerge.seeding import generator
from fedmerge.serving.index import load_or_build_index

WIDTH = 384
WARM_UP = 20  # requests that are not counted


@contextmanager
def running(command: Sequence[str], port: int) -> Iterator[None]:
    """Run a service until the block ends; it answers within the block."""
    process = subprocess.Popen(command)
    try:
        while process.poll() is None:
            try:
                asyncio.run(_answer(port, {"history": []}))
                break
            except OSError:
                time.sleep(0.5)
        yield
    finally:
        process.terminate()
        process.wait()


Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def _answer(port: int, body: Any, idle: list[Connection] | None = None) -> Any:
    """Send one request; return the JSON of the answer. Connections are kept in ``idle``, as a proxy does."""
    reader, writer = idle.pop() if idle else await asyncio.open_connection("127.0.0.1", port)
    content = json.dumps(body).encode()
    head = f"POST /recommend HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    writer.write(head.encode() + b"\r\n\r\n" + content)
    fields = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(fields.partition(b"content-length:")[2].partition(b"\r")[0])
    answer = json.loads(await reader.readexactly(length))
    if idle is None:
        writer.close()
    else:
        idle.append((reader, writer))
    return answer


async def latencies(port: int, histories: Sequence[list[str]], rate: float) -> list[float]:
    """Return the seconds from the time when each request was due to its answer."""
    start = time.perf_counter() + 0.1
    idle: list[Connection] = []

    async def one(number: int) -> float:
        due = start + number / rate
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        answer = await _answer(port, {"history": histories[number]}, idle)
        if len(answer["recommendations"]) != 10:
            raise SystemExit(f"port {port}: {answer}")
        return time.perf_counter() - due

    found = await asyncio.gather(*(one(number) for number in range(len(histories))))
    for _, writer in idle:
        writer.close()
    return list(found)


def load_test(options: argparse.Namespace) -> None:
    """Load both services in turn, and print their latencies."""
    with tempfile.TemporaryDirectory() as folder:
        domain, export = Path(folder) / "toys", Path(folder) / "export"
        shop = generate_domain("toys", num_users=options.users, num_items=options.items)
        write_domain(domain, shop.catalog, shop.interactions, public_catalog=True, synthetic=True, source="demo")
        subprocess.run([sys.executable, "-m", "fedmerge.cli", "export", "none", str(export)], check=True)
        services = {"sentence-transformers": options.port, "fedmerge serve": options.port + 1}
        settings = [f"cache_dir={folder}/cache", f"runtime.server_threads={options.threads}"]
        ours = ["serve", "none", "--domain", str(domain), "--port", str(options.port + 1), "--set", *settings]
        workers = [] if options.workers is None else ["--threads", str(options.workers)]
        theirs = [str(Path(__file__).with_name("plain_service.py")), str(export), str(domain), str(options.port)]
        with (
            running([sys.executable, *theirs], options.port),
            running([sys.executable, "-m", "fedmerge.cli", *ours, *workers], options.port + 1),
        ):
            histories = _histories(shop.catalog, round(2 * options.seconds * max(options.rates)) + WARM_UP)
            _compare(services, histories[:20])
            for rate in options.rates:
                print(f"\n{options.items} items, {rate:g} requests a second, {options.turns} turns")
                of_rate = histories[: round(2 * options.seconds * rate) + WARM_UP]
                _print(_in_turn(services, of_rate, rate, options.turns))


def _print(seconds: dict[str, list[list[float]]]) -> None:
    print(f"{'':<24}{'p50 ms':>10}{'p90 ms':>10}{'p99 ms':>10}")
    for name, of_service in seconds.items():
        p50, p90, p99 = (1000 * float(np.quantile(np.concatenate(of_service), q)) for q in (0.5, 0.9, 0.99))
        print(f"{name:<24}{p50:>10.1f}{p90:>10.1f}{p99:>10.1f}")
    plain, fedmerge = seconds.values()
    for quantile in (0.5, 0.99):
        ratios = [np.quantile(a, quantile) / np.quantile(b, quantile) for a, b in zip(plain, fedmerge, strict=True)]
        shown = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"times as fast at p{100 * quantile:g}: median {np.median(ratios):.2f} of the turns {shown}", flush=True)


def _histories(catalog: Catalog, number: int) -> list[list[str]]:
    """Return histories of five to eight items: 96 to 128 tokens."""
    rng = generator(0, "bench-serving")
    return [
        [catalog.item_ids[row] for row in rng.choice(len(catalog), int(rng.integers(5, 9)), replace=False)]
        for _ in range(number)
    ]


def _compare(services: dict[str, int], histories: Sequence[list[str]]) -> None:
    """Print how many of the ten items both services list."""
    shared = []
    for history in histories:
        answers = [asyncio.run(_answer(port, {"history": history})) for port in services.values()]
        lists = [{item["item_id"] for item in answer["recommendations"]} for answer in answers]
        shared.append(len(lists[0] & lists[1]) / 10)
    print(f"of ten items, both list {10 * np.mean(shared):.1f} (fedmerge encodes in bfloat16 where the processor does)")


def _in_turn(
    services: dict[str, int], histories: Sequence[list[str]], rate: float, turns: int
) -> dict[str, list[list[float]]]:
    seconds: dict[str, list[list[float]]] = {name: [] for name in services}
    for turn in range(-1, turns):
        for name, port in services.items():
            some = histories[:WARM_UP] if turn < 0 else histories[WARM_UP + turn % 2 :: 2]
            found = asyncio.run(latencies(port, some, rate))
            if turn >= 0:
                seconds[name].append(found)
    return seconds


def search_test(number: int, threads: int) -> None:
    """Build an index, and print its time, memory and recall beside exact search."""
    torch.set_num_threads(threads)
    centres = torch.nn.functional.normalize(torch.randn(number // 100, WIDTH, generator=_seeded(1)))
    vectors, users = _near(centres, number, 0.6, 2), _near(centres, 200, 0.9, 3)
    with tempfile.TemporaryDirectory() as folder:
        start, cpu = time.perf_counter(), time.process_time()
        index = load_or_build_index("bench", vectors, lambda: users, folder)
        if index is None:
            raise SystemExit("faiss is not installed: pip install 'fedmerge[serve]'")
        built = f"built in {time.perf_counter() - start:.0f} s ({time.process_time() - cpu:.0f} s of CPU time)"
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    torch.set_num_threads(1)
    exact, indexed = [], []
    for user in users:
        start = time.perf_counter()
        torch.topk(vectors @ user, 10)
        middle = time.perf_counter()
        rows = torch.from_numpy(index.search(user, 10))
        torch.topk(vectors[rows] @ user, 10)
        exact.append(middle - start)
        indexed.append(time.perf_counter() - middle)
    print(f"{number:,} vectors of width {WIDTH}, one thread; {built}, {size / 2**20:.0f} MiB")
    for name, seconds in (("exact", exact), ("index", indexed)):
        p50, p99 = (1000 * float(np.quantile(seconds, q)) for q in (0.5, 0.99))
        print(f"{name}: p50 {p50:.2f} ms, p99 {p99:.2f} ms")
    print(f"recall@10 of the index: {index.recall:.4f}; times as fast: {np.median(exact) / np.median(indexed):.0f}")


def _near(centres: torch.Tensor, number: int, distance: float, seed: int) -> torch.Tensor:
    """Return unit vectors about centres that are drawn, ``distance`` the length of the noise."""
    rng = _seeded(seed)
    chosen = torch.randint(len(centres), (number,), generator=rng)
    vectors = torch.randn(number, centres.shape[1], generator=rng).mul_(distance / centres.shape[1] ** 0.5)
    for start in range(0, number, 100_000):
        vectors[start : start + 100_000] += centres[chosen[start : start + 100_000]]
    return torch.nn.functional.normalize(vectors, out=vectors)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def main() -> None:
    """Run the load test, or a part of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=12_000)
    parser.add_argument("--users", type=int, default=200)
    parser.add_argument("--rates", type=float, nargs="+", default=[50.0, 5.0], help="requests a second")
    parser.add_argument("--seconds", type=float, default=5.0, help="of requests to each service in a turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="for encoding the catalog")
    parser.add_argument("--workers", type=int, default=None, help="--threads of fedmerge serve")
    parser.add_argument("--port", type=int, default=9431)
    parser.add_argument("--search", type=int, default=None, metavar="N", help="only the index, with so many vectors")
    options = parser.parse_args()
    if options.search is not None:
        search_test(options.search, options.threads)
    else:
        load_test(options)


if __name__ == "__main__":
    main()
