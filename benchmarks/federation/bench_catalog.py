"""Two shops with large catalogs, from the tables to the report: seconds and peak memory of every stage.

    python benchmarks/federation/bench_catalog.py --num-items 10000 100000
    python benchmarks/federation/bench_catalog.py --num-items 10000 100000 1000000 --stages --sampled 10000

A shop has N items with titles, brands and categories, N users and ten interactions a user, generated. It is imported by
`fedmerge data import table`; then `fedmerge run` trains two steps, merges by average and mergerec (five steps), and
evaluates 2,000 users by exact ranks. The encoder has two layers and random weights, so that what is not encoding is
seen. Memory is the process's own (heap and stacks), in MB of 10^6 bytes; that of an import is its resident set. Opening
a shop, which tokenises its catalog, is also measured by itself, above what PyTorch and backbone take; `--open-only`
stops there. `--stages` runs no federation: one shop is imported, and every stage of its client, of learned merging and
of serving has a process of its own on one thread, whose CPU seconds and peak resident set are counted; tokens and
vectors are kept from stage to stage, and `--draw` draws the vectors. Serving alone: `bench_serving.py --search N`.
"""

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from threading import Event, Thread

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from bench_scaling import PHASES, run, sample
from catalog_stages import STAGES, Sizes, measure

from fedmerge.client.local_domain import open_domain
from fedmerge.config import Text
from fedmerge.device import resolve_compute
from fedmerge.encoder.backbone import load_backbone
from fedmerge.encoder.demo_backbone import write_demo_backbone

SHOPS = ("north", "south")
INTERACTIONS_A_USER = 10
WORDS = 20_000
SETTINGS = [
    "merge.methods=average,mergerec",
    "mergerec.steps=5",
    "evaluation.validation_users=200",
    "evaluation.test_users=2000",
    "evaluation.baselines=popularity,last-item",
    "server.wait_seconds=600",
    "server.timeout_seconds=100000",
]


def main() -> None:
    """Print a column for each number of items."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-items", type=int, nargs="+", default=[10_000])
    parser.add_argument("--open-only", action="store_true", help="import and open the shops, and run nothing")
    parser.add_argument("--stages", action="store_true", help="every stage of one shop in a process of its own")
    parser.add_argument("--users", type=int, default=200, help="users ranked in a stage")
    parser.add_argument("--steps", type=int, default=20, help="steps of a head")
    parser.add_argument("--sampled", type=int, default=None, help="head.sampled_items; default: the whole catalog")
    parser.add_argument("--draw", action="store_true", help="item vectors are drawn in place of encoded")
    parser.add_argument("--only", nargs="+", choices=[*STAGES], default=[*STAGES], help="stages besides open")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of the experiment")
    parser.add_argument("--opened", nargs=2, type=Path, help=argparse.SUPPRESS)  # of the process that opens a shop
    options = parser.parse_args()
    if options.opened:
        print(json.dumps(_opened(*options.opened)))
        return
    columns = []
    with tempfile.TemporaryDirectory(prefix="fedmerge-catalog-") as temporary:
        folder = Path(temporary)
        write_demo_backbone(folder / "backbone")
        for num_items in options.num_items:
            if options.stages:
                sizes = Sizes(options.users, options.steps, options.sampled, options.draw)
                columns.append(_stages(folder, num_items, sizes, options.only))
            else:
                columns.append(_measure(folder, num_items, options.set, run_too=not options.open_only))
            print(columns[-1], flush=True)
    for name in columns[0]:
        print(f"{name:<32}" + "".join(f"{column[name]:>14,.1f}" for column in columns))
    print(f"load of the machine at the end: {os.getloadavg()[1]:.1f} runnable on {len(os.sched_getaffinity(0))} CPUs")


def _measure(folder: Path, num_items: int, changes: list[str], *, run_too: bool) -> dict[str, float]:
    domains = folder / f"domains-{num_items}"
    imports = [_import(folder, domains, shop, seed, num_items) for seed, shop in enumerate(SHOPS)]
    column = {
        "items": num_items,
        "import of a shop, s": max(seconds for seconds, _ in imports),
        "import of a shop, MB": max(size for _, size in imports),
        **_open(domains / SHOPS[0], folder / "backbone"),
    }
    if run_too:
        column |= _of_a_run(run(folder, f"catalog-{num_items}", domains, SHOPS, [*SETTINGS, *changes]))
    shutil.rmtree(domains)
    return column


def _stages(folder: Path, num_items: int, sizes: Sizes, only: list[str]) -> dict[str, float]:
    domains, cache = folder / f"domains-{num_items}", folder / f"cache-{num_items}"
    seconds, size = _import(folder, domains, SHOPS[0], 0, num_items)
    imported = {"items": num_items, "import, s": seconds, "import, MB": size}
    column = imported | measure(domains / SHOPS[0], folder / "backbone", cache, sizes, only)
    shutil.rmtree(domains)
    shutil.rmtree(cache)
    return column


def _of_a_run(found: dict[str, float]) -> dict[str, float]:
    return {
        **{f"{phase}, s": found[f"{phase} s"] for phase in PHASES},
        "CPU of the clients, s": found["clients CPU s"],
        "CPU of the server, s": found["server CPU s"],
        "largest client, MB": found["client own MB"],
        "server, MB": found["server own MB"],
        "from a client, kB": found["kB from a client"],
    }


def _import(folder: Path, domains: Path, shop: str, seed: int, num_items: int) -> tuple[float, float]:
    """Return the seconds and peak memory in MB of the import of a shop."""
    source = folder / f"{shop}-source"
    source.mkdir()
    write_tables(source, num_items, seed)
    command = [sys.executable, "-m", "fedmerge.cli", "data", "import", "table", str(domains), "--name", shop]
    command += ["--interactions", str(source / "interactions.parquet"), "--catalog", str(source / "catalog.parquet")]
    started = time.perf_counter()
    process = subprocess.Popen([*command, "--public-catalog", "--keep-all-items"], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{shop}: the import of {num_items} items failed")
    shutil.rmtree(source)
    return time.perf_counter() - started, usage.ru_maxrss * 1024 / 1e6


def _open(shop: Path, backbone: Path) -> dict[str, float]:
    """Open a shop in a process of its own; return what :func:`_opened` does."""
    command = [sys.executable, __file__, "--opened", str(shop), str(backbone)]
    found: dict[str, float] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return found


def _opened(shop: Path, backbone_folder: Path) -> dict[str, float]:
    """Return the seconds of opening a shop, and the MB it takes: afterwards, and at the peak."""

    def own() -> float:
        return sample("self")[1]["own"]

    seen, done = list[float](), Event()

    def watch() -> None:
        while not done.wait(0.02):
            seen.append(own())

    backbone = load_backbone(str(backbone_folder), "mean", resolve_compute("cpu", "float32"))
    gc.collect()
    before, started = own(), time.perf_counter()
    watcher = Thread(target=watch)
    watcher.start()
    domain = open_domain(shop, backbone, Text(max_tokens=64, max_items=5))
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    gc.collect()
    after = own()
    del domain
    return {
        "opening a shop, s": seconds,
        "opening a shop, MB": after - before,
        "opening a shop, MB at its peak": max(*seen, after) - before,
    }


def write_tables(folder: Path, num_items: int, seed: int) -> None:
    """Write the interactions and the catalog of a shop as Parquet."""
    draw = np.random.default_rng(seed)
    users = np.repeat(np.arange(num_items), INTERACTIONS_A_USER)
    items = (num_items * draw.random(len(users)) ** 2).astype(np.int64)  # few are far more popular than the others
    times = np.tile(np.arange(INTERACTIONS_A_USER), num_items)
    names = pa.array(np.arange(num_items)).cast(pa.string())
    pq.write_table(
        pa.table(
            {
                "user_id": pa.DictionaryArray.from_arrays(pa.array(users), names).cast(pa.string()),
                "item_id": pa.DictionaryArray.from_arrays(pa.array(items), names).cast(pa.string()),
                "timestamp": times,
            }
        ),
        folder / "interactions.parquet",
    )
    words = np.array(["".join(letters) for letters in draw.choice([*"abcdefghijklmnopqrstuvwxyz"], (WORDS, 6))])
    title = draw.choice(words, (num_items, 6))
    catalog = {
        "item_id": names,
        "title": [" ".join(row) for row in title],
        "brand": draw.choice(words[:500], num_items).tolist(),
        "category": draw.choice(words[:50], num_items).tolist(),
    }
    pq.write_table(pa.table(catalog), folder / "catalog.parquet")


if __name__ == "__main__":
    main()
