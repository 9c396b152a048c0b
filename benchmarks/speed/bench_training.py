"""Training samples per second: fedmerge's step against a plain PEFT loop and sentence-transformers.

    python benchmarks/speed/bench_training.py [--source all-mpnet-base-v2] [--device cuda]

The plain loop is the usual one: every step joins the texts of 64 users' random prefixes and of their targets, runs the
Hugging Face tokenizer on them (padded to the longest, cut at 96 tokens), computes in float32 with the model's own
attention, and makes a step of AdamW. The next row is the same under bfloat16 autocast, the third sentence-transformers
with its MultipleNegativesRankingLoss. fedmerge uses the same data, batch size, LoRA (rank 8 on query and value) and
optimiser. The data are one domain of the bundled demo with 600 users
and 400 items. A turn is one epoch, since the lengths of fedmerge's batches differ within it. The last row keeps the
activations of so many tokens at once (train.tokens_at_once), with which --memory says what a process needs.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from interleaved import arguments, print_table, timed_in_turn
from peft import LoraConfig, get_peft_model
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModel, AutoTokenizer

from fedmerge.backbone_files import MINILM
from fedmerge.client.local_domain import LocalDomain, open_domain
from fedmerge.client.training.batches import num_batches, training_batches
from fedmerge.client.training.loop import give_back_memory
from fedmerge.client.training.losses import TEMPERATURE
from fedmerge.client.training.plain_sgd import training_step
from fedmerge.config import ATTRIBUTES, Text, Train
from fedmerge.device import resolve_compute
from fedmerge.domain.catalog import Catalog
from fedmerge.domain.demo import write_demo
from fedmerge.encoder.backbone import load_backbone
from fedmerge.encoder.encode import tokens_at_once
from fedmerge.encoder.fast.frozen import frozen_products, using
from fedmerge.encoder.lora import attach

BATCH, MAX_TOKENS, ALPHA, LEARNING_RATE = 64, 96, 16, 1e-3
FEW, ALL = (8, ("query", "value")), (16, ("all-linear",))  # rank and targets of the LoRA


def fedmerge_epoch(
    domain: LocalDomain, steps: int, lora: tuple[int, tuple[str, ...]], at_once: int | None = None
) -> Callable[[], None]:
    """Return an epoch of ``train_expert`` without validation; ``at_once`` is train.tokens_at_once."""
    rank, targets = lora
    settings = Train(batch_size=BATCH, learning_rate=LEARNING_RATE)
    optimizer = optimizer_of(attach(domain.backbone, targets, rank, ALPHA, seed=0))
    products = frozen_products(domain.backbone)
    batches = training_batches(domain.training_sequences, settings, 0, domain.manifest.name)

    def epoch() -> None:
        for _ in range(steps):
            batch, _done = next(batches)
            with using(products), tokens_at_once(at_once):
                training_step(domain, batch, optimizer)

    return epoch


def item_texts(catalog: Catalog) -> list[str]:
    """Return the texts that fedmerge tokenises."""
    rows = zip(*(catalog.attributes[attribute] for attribute in ATTRIBUTES), strict=True)
    return [" ".join(f"{name}: {value}" for name, value in zip(ATTRIBUTES, row, strict=True) if value) for row in rows]


def drawn_texts(domain: LocalDomain, steps: int) -> Iterator[tuple[list[str], list[str]]]:
    """Yield the texts of histories and targets of an epoch's batches."""
    texts, sequences, rng = item_texts(domain.catalog), domain.training_sequences, np.random.default_rng(0)
    users = rng.permutation(len(sequences))
    for step in range(steps):
        histories, targets = [], []
        for user in users[step * BATCH : (step + 1) * BATCH]:
            sequence = sequences[user]
            cut = rng.integers(1, len(sequence))
            histories.append("; ".join(texts[item] for item in reversed(sequence[:cut])))
            targets.append(texts[sequence[cut]])
        yield histories, targets


def lora_config(lora: tuple[int, tuple[str, ...]]) -> LoraConfig:
    """Return the LoRA as PEFT has it."""
    rank, targets = lora
    modules = "all-linear" if targets == ALL[1] else list(targets)
    return LoraConfig(r=rank, lora_alpha=ALPHA, target_modules=modules)


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    """Return AdamW of the trained parameters."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, LEARNING_RATE, weight_decay=0.0)


def plain_epoch(
    domain: LocalDomain, steps: int, lora: tuple[int, tuple[str, ...]], autocast: bool
) -> Callable[[], None]:
    """Return an epoch of a plain PEFT loop, which pools by the mean."""
    backbone = domain.backbone
    tokenizer = AutoTokenizer.from_pretrained(backbone.folder)
    model = get_peft_model(AutoModel.from_pretrained(backbone.folder), lora_config(lora)).to(backbone.device)
    optimizer = optimizer_of(model)

    def encoded(strings: list[str]) -> torch.Tensor:
        inputs = tokenizer(strings, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        inputs = inputs.to(backbone.device)
        with torch.autocast(backbone.device.type, torch.bfloat16, enabled=autocast):
            hidden = model(**inputs).last_hidden_state.float()
        mask = inputs["attention_mask"].unsqueeze(-1)
        return torch.nn.functional.normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1), dim=-1)

    def epoch() -> None:
        for histories, targets in drawn_texts(domain, steps):
            logits = encoded(histories) @ encoded(targets).T / TEMPERATURE
            loss = torch.nn.functional.cross_entropy(logits, torch.arange(len(logits), device=logits.device))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # PyTorch leaves it untyped
            optimizer.step()
            loss.item()

    return epoch


def sentence_transformers_epoch(
    domain: LocalDomain, steps: int, lora: tuple[int, tuple[str, ...]]
) -> Callable[[], None]:
    """Return an epoch of sentence-transformers' usual loss under autocast, as its trainer computes it in every step."""
    device = domain.backbone.device
    model = SentenceTransformer(str(domain.backbone.folder), device=str(device))
    model.max_seq_length = MAX_TOKENS
    model.add_adapter(lora_config(lora))
    loss_of = MultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE)
    optimizer = optimizer_of(model)

    def features(strings: list[str]) -> dict[str, torch.Tensor]:
        return {name: part.to(device) for name, part in model.preprocess(strings).items() if torch.is_tensor(part)}

    def epoch() -> None:
        model.train()
        for histories, targets in drawn_texts(domain, steps):
            with torch.autocast(device.type, torch.bfloat16):
                loss = loss_of([features(histories), features(targets)], torch.empty(0))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()

    return epoch


def megabytes(name: str) -> float:
    """Return the resident memory of this process, now (VmRSS) or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(f"{name}:"))


def memory_of(way: str, options: list[str]) -> list[float]:
    """Return MB above a loaded model of a process that trains this way alone: at most, at the end, and given back."""
    command = [sys.executable, __file__, *options, "--only", way]
    last = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    return [float(number) for number in last.split()]


def main() -> None:
    """Time epochs in turn."""
    parser = arguments(__doc__, repeats=3)
    parser.add_argument("--steps", type=int, default=None, help="steps per turn (default: an epoch)")
    parser.add_argument("--profile", action="store_true", help="afterwards profile one turn of each")
    parser.add_argument("--source", default=MINILM, help="the model: as backbone.source")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--domain", type=Path, help="folder of a domain, in place of one of the demo")
    parser.add_argument("--all-linear", action="store_true", help="LoRA of rank 16 on all linear layers")
    parser.add_argument("--tokens", type=int, default=1024, help="train.tokens_at_once of the last row")
    parser.add_argument("--memory", action="store_true", help="afterwards measure a process of each")
    parser.add_argument("--only", help="train this way alone and print its memory in MB")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        source = options.domain or Path(folder) / write_demo(folder, num_domains=1)[0]
        compute = resolve_compute(options.device)
        domain, again = (
            open_domain(source, load_backbone(options.source, "mean", compute), Text(max_tokens=MAX_TOKENS))
            for _ in range(2)  # each with a backbone of its own, which takes one LoRA
        )
    lora = ALL if options.all_linear else FEW
    steps = options.steps or num_batches(len(domain.training_sequences), BATCH)
    calls = {
        "plain PEFT, float32": plain_epoch(domain, steps, lora, autocast=False),
        "plain PEFT, bfloat16 autocast": plain_epoch(domain, steps, lora, autocast=True),
        "sentence-transformers, bfloat16 autocast": sentence_transformers_epoch(domain, steps, lora),
        "fedmerge": fedmerge_epoch(domain, steps, lora),
        "fedmerge, tokens at once": fedmerge_epoch(again, steps, lora, options.tokens),
    }
    if options.only:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak so far is forgotten
        before = megabytes("VmRSS")
        for _ in range(options.repeats):
            calls[options.only]()
        peak, end = megabytes("VmHWM"), megabytes("VmRSS")
        give_back_memory()
        print(*(number - before for number in (peak, end, megabytes("VmRSS"))))
        return
    for call in calls.values():
        call()  # warm up
    print(f"{compute.reason}; {options.threads} threads; {steps} steps of {BATCH} users a turn, {options.clock} clock")
    seconds = timed_in_turn(calls, options.repeats, options.clock, warm_up=0)
    print_table(seconds, "plain PEFT, float32", "samples/s", steps * BATCH)
    for name in calls if options.memory else ():
        peak, end, after = memory_of(name, [argument for argument in sys.argv[1:] if argument != "--memory"])
        print(
            f"{name:<42}{peak:>6,.0f} MB above a loaded model at most, {end:,.0f} at the end, {after:,.0f} given back"
        )
    for name, call in calls.items() if options.profile else ():
        with profile(activities=[ProfilerActivity.CPU]) as record:
            call()
        print(f"\n{name}\n{record.key_averages().table(sort_by='self_cpu_time_total', row_limit=12)}")


if __name__ == "__main__":
    main()
