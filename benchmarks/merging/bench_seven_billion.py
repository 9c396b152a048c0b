"""Merge 8 adapters of a model with the shapes of Llama-2-7B, on the same files: fedmerge, mergekit and peft.

    python benchmarks/merging/bench_seven_billion.py                       # fedmerge and peft
    python benchmarks/merging/bench_seven_billion.py --mergekit ENV/bin    # and mergekit, in an environment of its own
    python benchmarks/merging/bench_seven_billion.py --layers 32 --cases exact    # all layers, 16 GB on the disk
    python benchmarks/merging/bench_seven_billion.py --layers 1 --rank 16 --cases methods --methods ties dare

Every layer has the seven linear modules of the 7B model (4096 × 4096, 11008 × 4096), with a LoRA of rank 64 on each.
Weights are random, the vocabulary is small, and ``--layers`` of the 32 layers are written. The base model is bfloat16,
the adapters are float32.

The task is the average. fedmerge and peft merge adapters into an adapter. mergekit merges models: it folds every
adapter into a copy of the base model (``base+adapter`` in its configuration) and averages the copies with
``task_arithmetic``, so its result is a full model. *deviation* is the relative error of one module's update against the
float64 average; that of mergekit and peft holds the rounding to bfloat16. Each case is a process of its own with one
thread; the peak is the resident memory of that process, mapped files included. peft holds the base model and all
adapters, so its memory grows with the layers. fedmerge reads, merges and writes one module at a time; mergekit writes
its model in small files here, so that it gathers few results.

``--cases methods`` merges by further methods, once as `fedmerge merge` does it and once with the dense updates of all
adapters in memory; both must write the same bytes. ``--modules`` and ``--width`` make it smaller.
"""

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from commands import measure
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig

from fedmerge.adapter import Adapter, LoraModule
from fedmerge.encoder.peft.contents import open_contents
from fedmerge.encoder.peft.folder import write_adapter

ALL_LAYERS = 32
CASES = ("exact", "rank", "peft", "mergekit", "methods")
WIDTH, INNER = 4096, 11008
MODULES = (*(f"self_attn.{name}_proj" for name in "qkvo"), *(f"mlp.{name}_proj" for name in ("gate", "up", "down")))
CHECKED = "model.layers.0.mlp.down_proj"
WHOLE = """
import sys
from fedmerge.cli import main
from fedmerge.merging import training_free
training_free.HELD = 1 << 62
sys.exit(main(sys.argv[1:]))
"""
PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, out, *folders = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
names = [f"adapter{k}" for k in range(len(folders))]
model = PeftModel.from_pretrained(model, folders[0], adapter_name=names[0])
for name, folder in zip(names[1:], folders[1:]):
    model.load_adapter(folder, adapter_name=name)
model.add_weighted_adapter(names, [1 / len(names)] * len(names), "merged", combination_type="cat")
model.save_pretrained(out, selected_adapters=["merged"])
"""


def modules_of(layer: int, width: int = WIDTH, names: Sequence[str] = MODULES) -> dict[str, tuple[int, int]]:
    """Return module -> (out, in) of one layer."""
    inner = INNER * width // WIDTH
    shapes = {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)}
    return {f"model.layers.{layer}.{name}": shapes.get(name, (width, width)) for name in names}


def write_base(folder: Path, layers: int) -> None:
    """Write a base model, one file per layer."""
    folder.mkdir()
    config = LlamaConfig(vocab_size=1000, num_hidden_layers=layers, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    weight_map: dict[str, str] = {}
    rng = torch.Generator().manual_seed(0)
    for shard, tensors in _base_tensors(layers, rng):
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _base_tensors(layers: int, rng: torch.Generator) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    def drawn(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=rng)

    ends = {"model.embed_tokens.weight": drawn(1000, 4096), "lm_head.weight": drawn(1000, 4096)}
    yield "model-ends.safetensors", {**ends, "model.norm.weight": torch.ones(4096, dtype=torch.bfloat16)}
    for layer in range(layers):
        tensors = {f"{name}.weight": drawn(*shape) for name, shape in modules_of(layer).items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = torch.ones(4096, dtype=torch.bfloat16)
        yield f"model-{layer:02d}.safetensors", tensors


def write_lora(folder: Path, options: argparse.Namespace, seed: int) -> None:
    """Write an adapter whose update has entries of about .001."""
    rank = options.rank
    rng = torch.Generator().manual_seed(seed)
    modules = {
        name: LoraModule(
            torch.randn(rank, width_in, generator=rng) / width_in**0.5,
            0.01 * torch.randn(width_out, rank, generator=rng),
            1.0,
        )
        for layer in range(options.layers)
        for name, (width_out, width_in) in modules_of(layer, options.width, options.modules).items()
    }
    write_adapter(Adapter(modules), folder, "base", task_type="CAUSAL_LM")


def tensor_of(folder: Path, name: str) -> torch.Tensor:
    """Read one tensor of a model in files."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if name in file.keys():  # noqa: SIM118  # not a mapping
                tensor: torch.Tensor = file.get_tensor(name)
                return tensor.float()
    raise SystemExit(f"{folder} has no tensor {name}")


def run_cases(options: argparse.Namespace, folder: Path) -> None:
    """Write the files, run every case, and print a table."""
    chosen = {case for case in options.cases if case != "mergekit" or options.mergekit is not None}
    base, adapters = folder / "base", [folder / f"domain{k}" for k in range(options.adapters)]
    if chosen & {"peft", "mergekit"}:
        write_base(base, options.layers)
    for k, each in enumerate(adapters):
        write_lora(each, options, k)
    print(
        f"{options.adapters} adapters of rank {options.rank}, {options.layers} of {ALL_LAYERS} layers, "
        f"{len(options.modules)} modules each, width {options.width}, 1 thread"
    )
    print(f"{'case':<36}{'seconds':>9}{'CPU':>9}{'peak GiB':>10}{'MB written':>12}{'deviation':>11}", flush=True)
    if "methods" in chosen:
        run_methods(options, folder, adapters)
    if chosen == {"methods"}:
        return
    modules = [open_contents(each).adapter.modules[CHECKED] for each in adapters]
    expected = torch.zeros(modules[0].lora_B.shape[0], modules[0].lora_A.shape[1], dtype=torch.float64)
    for module in modules:
        expected.addmm_(module.lora_B.double(), module.lora_A.double(), alpha=module.scaling / len(modules))
    del modules

    fedmerge = [sys.executable, "-m", "fedmerge.cli", "merge", "--method", "average", *map(str, adapters)]
    cases: dict[str, list[str]] = {}
    if "exact" in chosen:
        cases["fedmerge, exact"] = [*fedmerge, "--out", "fedmerge-exact"]
    if "rank" in chosen:
        compressed = [*fedmerge, "--output-rank", str(options.rank), "--out", "fedmerge-rank"]
        cases[f"fedmerge, rank {options.rank}"] = compressed
    if "peft" in chosen:
        cases["peft, cat"] = [sys.executable, "-c", PEFT, str(base), "peft", *map(str, adapters)]
    if "mergekit" in chosen:
        share = 1 / len(adapters)
        models = [{"model": f"{base}+{each}", "parameters": {"weight": share}} for each in adapters]
        recipe: dict[str, Any] = {"merge_method": "task_arithmetic", "base_model": str(base), "models": models}
        recipe["dtype"] = "float32"
        recipe["parameters"] = {"normalize": False}
        (folder / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
        cache = ["--lora-merge-cache", str(folder / "cache"), "--lora-merge-dtype", "bfloat16"]
        cache += ["--out-shard-size", "250M"]  # parameters; by default it holds up to 5 billion before it writes
        cases["mergekit, task_arithmetic"] = [
            str(options.mergekit / "mergekit-yaml"), "recipe.yaml", "mergekit", "--quiet", *cache,
        ]  # fmt: skip
    for name, command in cases.items():
        used = measure(command, folder, {"HF_HUB_OFFLINE": "1"})
        out = folder / (
            command[2] if name.startswith("mergekit") else "peft/merged" if name.startswith("peft") else command[-1]
        )
        if name.startswith("mergekit"):
            found = (tensor_of(out, f"{CHECKED}.weight") - tensor_of(base, f"{CHECKED}.weight")).double()
        else:
            found = open_contents(out).adapter.modules[CHECKED].delta_weight().double()
        deviation = float(torch.linalg.norm(found - expected) / torch.linalg.norm(expected))
        size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) / 1e6
        print(
            f"{name:<36}{used.seconds:>9.1f}{used.cpu_seconds:>9.1f}{used.peak_gib:>10.2f}{size:>12.0f}{deviation:>11.1e}",
            flush=True,
        )
        shutil.rmtree(out)


def run_methods(options: argparse.Namespace, folder: Path, adapters: Sequence[Path]) -> None:
    """Merge by every method in blocks of neurons, and with whole modules; both must be equal."""
    for method in options.methods:
        hashes = set()
        for name, start in (("", ["-m", "fedmerge.cli"]), (", whole modules", ["-c", WHOLE])):
            out = folder / "merged"
            command = [sys.executable, *start, "merge", "--method", method, *map(str, adapters), "--out", str(out)]
            used = measure(command, folder)
            path = out / "adapter_model.safetensors"
            with path.open("rb") as file:
                hashes.add(hashlib.file_digest(file, "sha256").hexdigest())
            print(
                f"{f'fedmerge, {method}{name}':<36}{used.seconds:>9.1f}{used.cpu_seconds:>9.1f}{used.peak_gib:>10.2f}"
                f"{path.stat().st_size / 1e6:>12.0f}",
                flush=True,
            )
            shutil.rmtree(out)
        if len(hashes) > 1:
            raise SystemExit(f"{method}: the merge in blocks differs from that of whole modules")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=2, help="of 32")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument(
        "--mergekit", type=Path, metavar="BIN", help="folder with mergekit-yaml; without it, no mergekit"
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES[:-1], help="what to run")
    parser.add_argument("--methods", nargs="+", default=["ties"], metavar="METHOD", help="of --cases methods")
    parser.add_argument("--modules", nargs="+", choices=MODULES, default=MODULES, help="of --cases methods")
    parser.add_argument("--width", type=int, default=WIDTH, help="of --cases methods")
    parser.add_argument("--folder", type=Path, help="folder for the files, removed at the end (default: temporary)")
    options = parser.parse_args()
    if {*options.cases} != {"methods"} and (options.width != WIDTH or len(options.modules) < len(MODULES)):
        parser.error("--width and --modules need --cases methods")
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        run_cases(options, Path(scratch))


if __name__ == "__main__":
    main()
