"""Study: which learning rate, and how many steps, serve a domain's expert? On validation users alone.

    python benchmarks/studies/backbones/study_expert_rates.py configs/amazon3-smollm2.toml \\
        --domain data/amazon-2000/Pantry --rates 2e-5 1e-4 5e-4 --set train.validate_every_steps=25

One training for each rate with all other settings as they are, and NDCG@10 (unmasked) of the validation users at every
validation, step 0 being the bare backbone. Test is not read. An expert that a run trains is the best of these steps.
"""

import argparse
from pathlib import Path

import torch

from fedmerge.bench.ranking import backbone_of
from fedmerge.client.local_domain import open_domain
from fedmerge.client.training.expert import train_expert
from fedmerge.config import load_config


def main() -> None:
    """Train with every rate and print a row of validations for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="the experiment whose settings are used")
    parser.add_argument("--domain", type=Path, nargs="+", required=True, help="domain folders")
    parser.add_argument("--rates", type=float, nargs="+", required=True, help="values of train.learning_rate")
    parser.add_argument("--set", nargs="+", default=[], help="changed settings, KEY=VALUE")
    options = parser.parse_args()
    config = load_config(options.config, options.set)
    torch.set_num_threads(config.runtime.threads_per_client)
    backbone = backbone_of(config.backbone, config.runtime)
    for folder in options.domain:
        domain = open_domain(folder, backbone, config.text)
        for rate in options.rates:
            settings = config.train.model_copy(update={"learning_rate": rate})
            _, report = train_expert(domain, config.lora, settings, config.seed)
            cells = [f"{validation.step}: {validation.ndcg:.4f}" for validation in report.validations]
            print(domain.manifest.name, f"{rate:g}", *cells, f"best at {report.best_step}", sep=" | ", flush=True)


if __name__ == "__main__":
    main()
