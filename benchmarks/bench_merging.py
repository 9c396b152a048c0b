"""Time and peak memory of every training-free merge of many adapters.

    python benchmarks/bench_merging.py

100 adapters of rank 8 on query and value of a backbone of RoBERTa-base's size: 24 modules of 768 × 768, 5.7 GB if all
updates were dense at once. Random factors; the memory does not depend on values. Every merge runs in a process of its
own, so that its peak is its own; the adapters (118 MB of factors) are in it. The result is compressed to rank 64; the
full SVD is taken either way.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from typing import Any

import torch

from fedmerge.encoder.lora import Adapter, LoraModule
from fedmerge.merging.methods import METHODS
from fedmerge.merging.training_free import merge_adapters

GIB = 2**30


def build_adapters(options: argparse.Namespace) -> dict[str, Adapter]:
    """Random experts on query and value of every layer."""
    rng = torch.Generator().manual_seed(0)
    names = [f"encoder.layer.{i}.attention.self.{part}" for i in range(options.layers) for part in ("query", "value")]
    return {
        f"domain {k:03d}": Adapter(
            {
                name: LoraModule(
                    torch.randn(options.rank, options.width, generator=rng) / options.width**0.5,
                    0.02 * torch.randn(options.width, options.rank, generator=rng),
                    2.0,
                )
                for name in names
            }
        )
        for k in range(options.domains)
    }


def merge_once(options: argparse.Namespace) -> dict[str, Any]:
    """One merge in this process: its seconds, the peak resident memory, the mean residual."""
    torch.set_num_threads(options.threads)
    adapters = build_adapters(options)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    start = time.perf_counter()
    method, scope, space = options.one.split(",")
    merged = merge_adapters(adapters, method, scope=scope, space=space, output_rank=options.output_rank)
    return {
        "seconds": time.perf_counter() - start,
        "before": before,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "residual": sum(merged.residuals.values()) / len(merged.residuals),
    }


def main() -> None:
    """Run every case in a process of its own and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--domains", type=int, default=100)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--output-rank", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--methods", default=",".join(name for name, row in METHODS.items() if not row.learned))
    parser.add_argument("--scopes", default="tensor,model", help="of methods with thresholds")
    parser.add_argument("--spaces", default="full,core")
    parser.add_argument("--one", help="method,scope,space: this case alone, in this process")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(merge_once(options)))
        return
    print(
        f"{options.domains} adapters of rank {options.rank}, {2 * options.layers} modules of {options.width} x "
        f"{options.width}, output rank {options.output_rank}, {options.threads} threads"
    )
    print(f"{'method':<24}{'scope':<8}{'space':<7}{'seconds':>9}{'peak GiB':>10}{'before':>8}{'residual':>10}")
    settings = [f"--{name}={getattr(options, name)}" for name in ("domains", "rank", "layers", "width", "threads")] + [
        f"--output-rank={options.output_rank}"
    ]
    for method in options.methods.split(","):
        for scope in options.scopes.split(",") if METHODS[method].rows is not None else ["tensor"]:
            for space in options.spaces.split(","):
                done = subprocess.run(
                    [sys.executable, os.path.abspath(__file__), *settings, f"--one={method},{scope},{space}"],
                    capture_output=True,
                    text=True,
                    check=True,
                )
                case = json.loads(done.stdout.splitlines()[-1])
                print(
                    f"{method:<24}{scope:<8}{space:<7}{case['seconds']:>9.1f}{case['peak'] / GIB:>10.2f}"
                    f"{case['before'] / GIB:>8.2f}{case['residual']:>10.4f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
