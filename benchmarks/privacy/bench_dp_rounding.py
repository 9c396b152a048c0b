"""Influence of one user, through rounding, on the other users' part of a clipped sum: bfloat16 against float32.

    python benchmarks/privacy/bench_dp_rounding.py

The users of a step determine the padding of its batches, and so the rounding of the gradients. The clipped sums with
and without a user are compared: the norm of their difference minus the user's own part, divided by the clip norm.
DP-SGD assumes 0. Training makes its steps in float32 (fedmerge.client.training.dp_sgd.private_steps).
"""

import argparse
import math
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from fedmerge.client.local_domain import LocalDomain, open_domain
from fedmerge.client.training.dp_sgd import Records, clipped_sum
from fedmerge.config import Text, load_config
from fedmerge.device import resolve_compute
from fedmerge.domain.demo import generate_domain
from fedmerge.domain.folder import write_domain
from fedmerge.encoder.backbone import load_backbone
from fedmerge.encoder.encode import encode
from fedmerge.encoder.lora import attach

CLIP, TEMPERATURE = 1.0, 0.05


def main() -> None:
    """Print a line for each precision."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, default=300)
    parser.add_argument("--left-out", type=int, default=6, help="number of users that are left out, one at a time")
    options = parser.parse_args()
    source = load_config(Path(__file__).resolve().parents[2] / "configs" / "demo.toml").backbone.source
    demo = generate_domain("toys", num_users=options.users + 100, num_items=200)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "toys"
        write_domain(place, demo.catalog, demo.interactions, public_catalog=True, synthetic=True, source="benchmark")
        backbone = load_backbone(source, "mean", resolve_compute("cpu", "float32"))
        toys = open_domain(place, backbone, Text(max_attribute_tokens=12, max_items=4, max_tokens=64))
        for precision in ("float32", "bfloat16"):
            drifts = measured(toys, precision, options.users, options.left_out)
            span = f"{min(drifts):.6f} to {max(drifts):.6f} of the clip norm"
            print(f"{precision}: {span}, {len(drifts)} users of {options.users}")


def measured(
    domain: LocalDomain, precision: Literal["float32", "bfloat16"], num_users: int, left_out: int
) -> list[float]:
    """Return, for each left-out user, the change of the others' sum as a share of the clip norm."""
    domain = replace(domain, backbone=replace(domain.backbone, compute=resolve_compute("cpu", precision)))
    model = attach(domain.backbone, ("query", "value"), 8, 16, 0)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():  # with B = 0 the gradients of A would all be 0
        for parameter in parameters:
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=rng))
    items = encode(domain.backbone, domain.item_sequences)

    def summed(users: list[int]) -> torch.Tensor:
        sequences = [domain.training_sequences[user] for user in users]
        records = Records([s[:-1] for s in sequences], np.array([s[-1] for s in sequences], dtype=np.int64))
        found = clipped_sum(domain, model, parameters, records, items, TEMPERATURE, CLIP)
        return torch.cat([tensor.flatten() for tensor in found]).double()

    everybody = list(range(num_users))
    whole = summed(everybody)
    drifts = []
    for out in everybody[:: math.ceil(num_users / left_out)]:
        moved = whole - summed([user for user in everybody if user != out]) - summed([out])
        drifts.append(float(moved.norm()) / CLIP)
    model.unload()
    return drifts


if __name__ == "__main__":
    main()
