"""Time and memory of training-free merges.

    python benchmarks/merging/bench_merging.py                    # core space against full space by module width
    python benchmarks/merging/bench_merging.py --many             # `fedmerge merge` of 100 adapters, every method

``--many`` writes 100 adapters of rank 8 on query and value of a backbone of RoBERTa-base's size, built from its
configuration: 24 modules of 768 × 768, 5.7 GB if all updates were dense at once. Each case is the whole command in a
process of its own, so that the peak resident memory is that of the case; it includes PyTorch and PEFT (0.4 GiB). The
factors are random, since the memory does not depend on values.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
from commands import measure
from transformers import RobertaConfig, RobertaModel

from fedmerge.adapter import Adapter, LoraModule
from fedmerge.encoder.peft.folder import write_adapter
from fedmerge.merging.methods import METHODS
from fedmerge.merging.training_free import merge_adapters

Shapes = dict[str, tuple[int, int]]


def roberta_base(layers: int) -> Shapes:
    """Return module -> (out, in) of query and value."""
    with torch.device("meta"):
        model = RobertaModel(RobertaConfig(num_hidden_layers=layers), add_pooling_layer=False)
    linear = {name: layer for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    return {
        name: (layer.out_features, layer.in_features)
        for name, layer in linear.items()
        if name.endswith(("query", "value"))
    }


def random_adapter(shapes: Shapes, rank: int, seed: int) -> Adapter:
    """Return an adapter with normal factors."""
    rng = torch.Generator().manual_seed(seed)
    return Adapter(
        {
            name: LoraModule(
                torch.randn(rank, width_in, generator=rng) / width_in**0.5,
                0.02 * torch.randn(width_out, rank, generator=rng),
                2.0,
            )
            for name, (width_out, width_in) in shapes.items()
        }
    )


def many(options: argparse.Namespace) -> None:
    """Run every case in a process of its own, and print a table."""
    shapes = roberta_base(options.layers)
    print(
        f"{options.domains} adapters of rank {options.rank}, {len(shapes)} modules of {next(iter(shapes.values()))}, "
        f"output rank {options.output_rank}, 1 thread"
    )
    print(f"{'method':<24}{'scope':<8}{'space':<7}{'seconds':>9}{'CPU':>9}{'peak GiB':>10}{'residual':>10}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch) / f"domain{k:03d}" for k in range(options.domains)]
        for k, folder in enumerate(folders):
            write_adapter(random_adapter(shapes, options.rank, k), folder, "roberta-base")
        for method in options.methods.split(","):
            for scope in options.scopes.split(",") if METHODS[method].rows is not None else ["tensor"]:
                for space in options.spaces.split(","):
                    out = Path(scratch) / f"{method} {scope} {space}"
                    flags = ["--method", method, "--scope", scope, "--space", space, "--out", str(out)]
                    flags += ["--output-rank", options.output_rank]
                    command = [sys.executable, "-m", "fedmerge.cli", "merge", *flags, *map(str, folders)]
                    used = measure(command, Path(scratch))
                    print(
                        f"{method:<24}{scope:<8}{space:<7}{used.seconds:>9.1f}{used.cpu_seconds:>9.1f}"
                        f"{used.peak_gib:>10.2f}{used.printed.split()[-1]:>10}",
                        flush=True,
                    )


def widths(options: argparse.Namespace) -> None:
    """Merge one module of growing width, in both spaces."""
    print(
        f"{options.few} adapters of rank {options.rank}, one module, {torch.get_num_threads()} threads, seconds of CPU"
    )
    print(f"{'method':<24}{'width':>7}{'full':>9}{'core':>9}{'growth of core':>16}")
    for method in options.methods.split(","):
        before = 0.0
        for width in (int(width) for width in options.widths.split(",")):
            adapters = {str(k): random_adapter({"m": (width, width)}, options.rank, k) for k in range(options.few)}
            seconds = {}
            for space in ("full", "core"):
                times = []
                for _ in range(3):
                    start = time.process_time()
                    merge_adapters(adapters, method, space=space)
                    times.append(time.process_time() - start)
                seconds[space] = min(times)
            growth = f"{seconds['core'] / before:.1f}" if before else ""
            before = seconds["core"]
            print(f"{method:<24}{width:>7}{seconds['full']:>9.3f}{seconds['core']:>9.3f}{growth:>16}", flush=True)


def main() -> None:
    """Run one of both benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--many", action="store_true", help="many adapters, each method in a process of its own")
    parser.add_argument("--methods", default=",".join(name for name, row in METHODS.items() if not row.learned))
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--domains", type=int, default=100, help="with --many")
    parser.add_argument("--layers", type=int, default=12, help="with --many")
    parser.add_argument("--output-rank", default="64", help="with --many")
    parser.add_argument("--scopes", default="tensor,model", help="with --many, for methods with thresholds")
    parser.add_argument("--spaces", default="full", help="with --many")
    parser.add_argument("--few", type=int, default=8, help="adapters without --many")
    parser.add_argument("--widths", default="512,1024,2048", help="without --many")
    options = parser.parse_args()
    if options.many:
        many(options)
    else:
        widths(options)


if __name__ == "__main__":
    main()
