"""Study: what a training step and an encoded item cost with each backbone, and the memory of a client that trains.

    python benchmarks/studies/backbones/study_backbone_costs.py configs/amazon3-smollm2.toml \\
        --domain data/amazon-2000/Toys --backbones sentence-transformers/all-MiniLM-L6-v2 \\
            models/all-mpnet-base-v2 models/SmolLM2-135M-Instruct

Texts, adapter, batches and the tokens whose activations are held at once are those of the experiment. Each backbone has
a process of its own in every turn; times are CPU seconds, the first step and the first piece of items are not counted.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import torch

from fedmerge.bench.ranking import backbone_of
from fedmerge.client.local_domain import open_domain
from fedmerge.client.training.batches import training_batches
from fedmerge.client.training.plain_sgd import training_step
from fedmerge.config import ExperimentConfig, load_config
from fedmerge.encoder.encode import encode, tokens_at_once
from fedmerge.encoder.fast.frozen import frozen_products, using
from fedmerge.encoder.lora import attach

Costs = dict[str, float]


def main() -> None:
    """Print a row for each backbone: the median over turns, and the times of the first backbone's step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="the experiment whose settings are used")
    parser.add_argument("--domain", type=Path, required=True, help="a domain folder")
    parser.add_argument("--backbones", nargs="+", default=[], help="ids or folders; the first is compared with")
    parser.add_argument("--steps", type=int, default=3, help="counted training steps (default: 3)")
    parser.add_argument("--items", type=int, default=200, help="counted items that are encoded (default: 200)")
    parser.add_argument("--repeats", type=int, default=1, help="turns (default: 1)")
    parser.add_argument("--measure", help="measure this backbone in this process and print JSON")
    options = parser.parse_args()
    if options.measure:
        config = load_config(options.config, [f"backbone.source={options.measure}"])
        print(json.dumps(measured(config, options.domain, options.steps, options.items)))
        return
    found: dict[str, list[Costs]] = {source: [] for source in options.backbones}
    for _ in range(options.repeats):
        for source, turns in found.items():
            command = [sys.executable, *sys.argv, "--measure", source]
            made = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            turns.append(json.loads(made.stdout.splitlines()[-1]))
    print("backbone | adapter's numbers | CPU s a step | times | CPU ms an item | times | peak MB")
    first = found[options.backbones[0]]
    for source, turns in found.items():
        step, item = (statistics.median(turn[key] for turn in turns) for key in ("step", "item"))
        ratios = [
            statistics.median(turn[key] / base[key] for turn, base in zip(turns, first, strict=True))
            for key in ("step", "item")
        ]
        peak, size = max(turn["peak_mb"] for turn in turns), turns[0]["parameters"]
        cells = [f"{size:,.0f}", f"{step:.2f}", f"{ratios[0]:.1f}", f"{item * 1000:.1f}", f"{ratios[1]:.1f}"]
        print(" | ".join([Path(source).name, *cells, f"{peak:,.0f}"]), flush=True)


def measured(config: ExperimentConfig, folder: Path, steps: int, items: int) -> Costs:
    """Encode some items, then train some steps; return CPU seconds of each and this process's peak memory in MB."""
    torch.set_num_threads(config.runtime.threads_per_client)
    backbone = backbone_of(config.backbone, config.runtime)
    domain = open_domain(folder, backbone, config.text)
    texts = domain.item_sequences[: 2 * items]
    encode(backbone, texts[items:])
    item = _seconds(lambda: encode(backbone, texts[:items])) / len(texts[:items])
    lora, settings = config.lora, config.train
    model = attach(backbone, lora.target_modules, lora.rank, lora.alpha, config.seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, settings.learning_rate, weight_decay=0.0)
    drawn = training_batches(domain.training_sequences, settings, config.seed, domain.manifest.name)
    batches = [batch for batch, _ in islice(drawn, steps + 1)]
    products = frozen_products(backbone)

    def train(some: slice) -> None:
        with using(products), tokens_at_once(settings.tokens_at_once):
            for batch in batches[some]:
                training_step(domain, batch, optimizer)

    train(slice(1))
    return {
        "parameters": sum(parameter.numel() for parameter in trained),
        "item": item,
        "step": _seconds(lambda: train(slice(1, None))) / steps,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,  # Linux: KiB
    }


def _seconds(call: Callable[[], object]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


if __name__ == "__main__":
    main()
