"""Training samples per second: fedmerge's step against a plain PEFT loop, on all-MiniLM-L6-v2.

    python benchmarks/speed/bench_training.py

The plain loop is the usual one: every step joins the texts of 64 users' random prefixes and of their targets, runs the
Hugging Face tokenizer on them (padded to the longest, cut at 96 tokens), computes in float32 with the model's own
attention, and makes a step of AdamW. The middle row is the same under bfloat16 autocast. fedmerge uses the same data,
batch size, LoRA (rank 8 on query and value) and optimiser. The data are one domain of the bundled demo with 600 users
and 400 items. A turn is one epoch, since the lengths of fedmerge's batches differ within it.
"""

import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch
from interleaved import arguments, print_table, timed_in_turn
from peft import LoraConfig, get_peft_model
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModel, AutoTokenizer

from fedmerge.backbone_files import MINILM, find_backbone
from fedmerge.client.local_domain import LocalDomain, open_domain
from fedmerge.client.training.batches import num_batches, training_batches
from fedmerge.client.training.losses import TEMPERATURE
from fedmerge.client.training.plain_sgd import training_step
from fedmerge.config import ATTRIBUTES, Text, Train
from fedmerge.device import resolve_compute
from fedmerge.domain.catalog import Catalog
from fedmerge.domain.demo import write_demo
from fedmerge.encoder.backbone import load_backbone
from fedmerge.encoder.frozen import frozen_products, using
from fedmerge.encoder.lora import attach

BATCH, MAX_TOKENS, RANK, ALPHA, LEARNING_RATE = 64, 96, 8, 16, 1e-3
TARGETS = ("query", "value")


def fedmerge_epoch(domain: LocalDomain, steps: int) -> Callable[[], None]:
    """Return an epoch of ``train_expert`` without validation."""
    settings = Train(batch_size=BATCH, learning_rate=LEARNING_RATE)
    model = attach(domain.backbone, TARGETS, RANK, ALPHA, seed=0)
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad], LEARNING_RATE, weight_decay=0.0
    )
    products = frozen_products(domain.backbone)
    batches = training_batches(domain.training_sequences, settings, 0, domain.manifest.name)

    def epoch() -> None:
        for _ in range(steps):
            batch, _done = next(batches)
            with using(products):
                training_step(domain, batch, optimizer)

    return epoch


def item_texts(catalog: Catalog) -> list[str]:
    """Return the texts that fedmerge tokenises."""
    rows = zip(*(catalog.attributes[attribute] for attribute in ATTRIBUTES), strict=True)
    return [" ".join(f"{name}: {value}" for name, value in zip(ATTRIBUTES, row, strict=True) if value) for row in rows]


def plain_epoch(domain: LocalDomain, steps: int, autocast: bool) -> Callable[[], None]:
    """Return an epoch of a plain PEFT loop."""
    _, folder = find_backbone(MINILM)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = get_peft_model(
        AutoModel.from_pretrained(folder), LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS))
    )
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad], LEARNING_RATE, weight_decay=0.0
    )
    texts, sequences, rng = item_texts(domain.catalog), domain.training_sequences, np.random.default_rng(0)
    context: Callable[[], AbstractContextManager[object]] = (
        (lambda: torch.autocast("cpu", dtype=torch.bfloat16)) if autocast else nullcontext
    )

    def encoded(strings: list[str]) -> torch.Tensor:
        inputs = tokenizer(strings, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        with context():
            hidden = model(**inputs).last_hidden_state.float()
        mask = inputs["attention_mask"].unsqueeze(-1)
        return torch.nn.functional.normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1), dim=-1)

    def epoch() -> None:
        users = rng.permutation(len(sequences))
        for step in range(steps):
            histories, targets = [], []
            for user in users[step * BATCH : (step + 1) * BATCH]:
                sequence = sequences[user]
                cut = rng.integers(1, len(sequence))
                histories.append("; ".join(texts[item] for item in reversed(sequence[:cut])))
                targets.append(texts[sequence[cut]])
            logits = encoded(histories) @ encoded(targets).T / TEMPERATURE
            loss = torch.nn.functional.cross_entropy(logits, torch.arange(len(logits)))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # PyTorch leaves it untyped
            optimizer.step()
            loss.item()

    return epoch


def main() -> None:
    """Time epochs in turn."""
    parser = arguments(__doc__, repeats=3)
    parser.add_argument("--steps", type=int, default=None, help="steps per turn (default: an epoch)")
    parser.add_argument("--profile", action="store_true", help="afterwards profile one turn of each")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        (name,) = write_demo(folder, num_domains=1)
        compute = resolve_compute("cpu")
        domain = open_domain(Path(folder) / name, load_backbone(MINILM, "mean", compute), Text(max_tokens=MAX_TOKENS))
    steps = options.steps or num_batches(len(domain.training_sequences), BATCH)
    calls = {
        "plain PEFT, float32": plain_epoch(domain, steps, autocast=False),
        "plain PEFT, bfloat16 autocast": plain_epoch(domain, steps, autocast=True),
        "fedmerge": fedmerge_epoch(domain, steps),
    }
    for call in calls.values():
        call()  # warm up
    print(f"{compute.reason}; {options.threads} threads; {steps} steps of {BATCH} users a turn, {options.clock} clock")
    seconds = timed_in_turn(calls, options.repeats, options.clock, warm_up=0)
    print_table(seconds, "plain PEFT, float32", "samples/s", steps * BATCH)
    for name, call in calls.items() if options.profile else ():
        with profile(activities=[ProfilerActivity.CPU]) as record:
            call()
        print(f"\n{name}\n{record.key_averages().table(sort_by='self_cpu_time_total', row_limit=12)}")


if __name__ == "__main__":
    main()
