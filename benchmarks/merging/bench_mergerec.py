"""Cost of one MergeRec step for 2, 8 and 32 domains, against one plain LoRA forward and backward pass.

    python benchmarks/merging/bench_mergerec.py
    python benchmarks/merging/bench_mergerec.py --rows    # TIES, PCB, Localize-and-Stitch and dense rows as well

The backbone has MiniLM's size (6 layers, width 384, vocabulary 30,522; random weights from a configuration), with LoRA
of rank 8 on query and value. A step encodes 16 pseudo-users and updates the merging coefficients; the plain step is
PEFT's LoRA on the same batch, one domain, with the gradients of A and B and no optimiser. All are timed in turn in one
run, so that a slower machine slows all of them; the ratio counts. "dense" are the TIES rows as K full matrices per
module, the alternative to sparse rows.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertModel

from fedmerge.adapter import Adapter, LoraModule
from fedmerge.device import resolve_compute
from fedmerge.encoder.backbone import Backbone
from fedmerge.encoder.encode import embed_batch
from fedmerge.encoder.text import SpecialTokens
from fedmerge.mergerec.objective import PAPER, batch_terms, weighted_total
from fedmerge.mergerec.vectors import (
    INITIALISATIONS,
    TASK_VECTORS,
    Hook,
    SparseRows,
    Vectors,
    initial_vectors,
    merged_forward,
    on_device,
)
from fedmerge.merging.stack import Stack, stack_adapters

Forward = Callable[[Backbone, Vectors, torch.Tensor], AbstractContextManager[None]]

RANK, BATCH, NUM_ITEMS, WIDTH = 8, 16, 2000, 384


def build_backbone(device: str, precision: str) -> Backbone:
    """Return a backbone of MiniLM's shape with random weights and without a tokenizer."""
    config = BertConfig(hidden_size=WIDTH, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    compute = resolve_compute(device, precision)
    model = BertModel(config, add_pooling_layer=False).train(False).requires_grad_(False).to(compute.device)
    special = SpecialTokens(np.array([101], np.int32), np.array([102], np.int32), 0)
    return Backbone(model, None, special, "mean", "minilm-sized", "", compute)  # type: ignore[arg-type]  # see above


def build_stack(num_domains: int) -> Stack:
    """Return random experts on query and value."""
    rng = torch.Generator().manual_seed(0)
    names = [f"encoder.layer.{i}.attention.self.{part}" for i in range(6) for part in ("query", "value")]
    return stack_adapters(
        {
            f"domain {k:02d}": Adapter(
                {
                    name: LoraModule(
                        0.02 * torch.randn(RANK, WIDTH, generator=rng), torch.randn(WIDTH, RANK, generator=rng), 2.0
                    )
                    for name in names
                }
            )
            for k in range(num_domains)
        }
    )


def dense_forward(rows: SparseRows) -> Forward:
    """Do the same as ``merged_forward`` with K dense matrices per module, made once."""
    each = torch.eye(len(rows.domains), device=next(iter(rows.modules.values())).values.device)
    dense = {name: torch.stack([module.weighted_sum(one) for one in each]) for name, module in rows.modules.items()}

    @contextmanager
    def forward(backbone: Backbone, vectors: Vectors, coefficients: torch.Tensor) -> Iterator[None]:
        def hook(name: str) -> Hook:
            def add(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
                delta = torch.tensordot(coefficients[:, vectors.group_of[name]], dense[name], dims=1)  # (out, in)
                return output + torch.nn.functional.linear(inputs[0], delta)

            return add

        handles = [backbone.model.get_submodule(name).register_forward_hook(hook(name)) for name in dense]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    return forward


def mergerec_step(
    backbone: Backbone, rows: Vectors, sequences: list[np.ndarray], forward: Forward = merged_forward
) -> Callable[[], None]:
    """Return one step of ``learn_coefficients``: layer-wise, with catalogs of NUM_ITEMS items."""
    num_domains, device = len(rows.domains), backbone.compute.device
    coefficients = torch.full((num_domains, len(rows.groups)), 0.2, device=device, requires_grad=True)
    optimizer = torch.optim.Adam([coefficients], lr=1e-3)
    vectors = torch.nn.functional.normalize(torch.randn(num_domains, NUM_ITEMS, WIDTH, device=device), dim=-1)
    rng = np.random.default_rng(0)
    drawn_domains, drawn_items = rng.integers(0, num_domains, BATCH), rng.integers(0, NUM_ITEMS, BATCH)
    pairs = list(zip(drawn_domains, drawn_items, strict=True))

    def step() -> None:
        with forward(backbone, rows, coefficients):
            users = embed_batch(backbone, sequences)
        teacher_users = torch.stack([vectors[domain, item] for domain, item in pairs])
        terms = batch_terms(users, teacher_users, drawn_domains, list(vectors), list(vectors), PAPER)
        (coefficients.grad,) = torch.autograd.grad(weighted_total(terms, PAPER), [coefficients])
        optimizer.step()

    return step


def plain_step(device: str, precision: str, sequences: list[np.ndarray]) -> Callable[[], None]:
    """Return a forward and backward pass of PEFT's LoRA on the same batch."""
    backbone = build_backbone(device, precision)
    get_peft_model(backbone.model, LoraConfig(r=RANK, lora_alpha=16, target_modules=["query", "value"]))
    trained = [parameter for parameter in backbone.model.parameters() if parameter.requires_grad]
    targets = torch.nn.functional.normalize(torch.randn(NUM_ITEMS, WIDTH, device=backbone.compute.device), dim=-1)

    def step() -> None:
        logits = embed_batch(backbone, sequences) @ targets.T
        loss = torch.nn.functional.cross_entropy(logits / 0.05, torch.arange(BATCH, device=logits.device))
        torch.autograd.grad(loss, trained)

    return step


def seconds(step: Callable[[], None], device: torch.device) -> float:
    """Return the CPU seconds of one step, which do not depend on other load; on a GPU, wall time."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    start = clock()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - start


def main() -> None:
    """Time the steps in turn and print medians and quartiles of the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="auto", choices=["auto", "bfloat16", "float32"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--rows", action="store_true", help="also the initialisations that keep sparse rows")
    parser.add_argument("--domains", type=int, nargs="+", default=[2, 8, 32])
    parser.add_argument("--tokens", type=int, default=32, help="tokens of a pseudo-user")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    sequences = list(np.random.default_rng(0).integers(999, 30000, (BATCH, options.tokens), dtype=np.int32))
    backbone = build_backbone(options.device, options.precision)
    steps = {"plain LoRA": plain_step(options.device, options.precision, sequences)}
    sizes = {}
    for k in options.domains:
        stack = build_stack(k)
        steps[f"K = {k}"] = mergerec_step(backbone, on_device(stack, backbone.compute.device), sequences)
        for method in INITIALISATIONS if options.rows else ():
            if method == TASK_VECTORS:
                continue
            rows = on_device(initial_vectors(stack, method), backbone.compute.device)
            steps[f"K = {k}, {method}"] = mergerec_step(backbone, rows, sequences)
            if isinstance(rows, SparseRows):
                sizes[f"K = {k}, {method}"] = rows.size_bytes
                if method == "ties":
                    steps[f"K = {k}, dense"] = mergerec_step(backbone, rows, sequences, dense_forward(rows))
                    sizes[f"K = {k}, dense"] = sum(4 * k * math.prod(each.shape) for each in rows.modules.values())
    for step in steps.values():  # warm up
        step()
        step()
    device = backbone.compute.device
    times = [{name: seconds(step, device) for name, step in steps.items()} for _ in range(options.repeats)]
    print(
        f"{backbone.compute.reason}; {options.threads} threads; batch {BATCH} x {options.tokens} tokens, rank {RANK}, "
        f"{NUM_ITEMS} items a domain, {options.repeats} repeats"
    )
    print(f"{'step':<30}{'median s':>10}{'ratio to plain':>16}{'quartiles':>18}{'rows':>10}")
    for name in steps:
        ratios = [each[name] / each["plain LoRA"] for each in times]
        low, _, high = statistics.quantiles(ratios, n=4)
        median = statistics.median(each[name] for each in times)
        size = f"{sizes[name] / 2**20:.1f} MiB" if name in sizes else ""
        line = f"{name:<30}{median:>10.4f}{statistics.median(ratios):>16.2f}{f'{low:.2f} to {high:.2f}':>18}"
        print(f"{line}{size:>10}")


if __name__ == "__main__":
    main()
