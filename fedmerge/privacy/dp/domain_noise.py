"""Differential privacy of a whole domain: its update is clipped, and Gaussian noise is added to it, or to the sum.

**Local** (``add_noise``, at the client, trusting no one): on the factors. A and B themselves leave, so everything made
of them afterwards is post-processing. The factors' distance from the public start is clipped to C. Participation is
public, so the adjacency is replacement of all data of the domain: sensitivity 2C. Noise in product space would be as
sound, but it has out·in coordinates instead of r(in + out) and would have to be sent dense or cut to rank r. Noise on
both factors is multiplied, N_B·N_A. Neither way leaves much of an adapter at a strict ε.

**Central** (``average_with_noise``, at a server that is trusted with every adapter): in product space. The release is
the exact average of Δ = scaling·BA; a sum of factors is not the sum of updates, and stacked factors would show every
domain's own. Each Δ is clipped to C over all modules together. One domain more or less changes the sum by at most C;
the number of domains is public. Cutting the noisy average to a rank is post-processing.

Where merging coefficients are learned through the clients, a client's answers depend on its catalog or its users as
well. With the local mechanism each answer, K or K × G numbers, is clipped and noised in the same way
(``add_noise_to_answer``), and the noise is chosen for the adapter and all answers together.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch

from fedmerge.adapter import Adapter, LoraModule
from fedmerge.config import DP, ExperimentConfig
from fedmerge.errors import LayoutMismatchError
from fedmerge.privacy.dp.accountant import agreed_noise
from fedmerge.privacy.dp.randomness import Source
from fedmerge.privacy.dp.releases import coefficient_messages, domain_releases


def domain_noise(config: ExperimentConfig) -> float:
    """Return the noise multiplier of every release of a run: the given one, or the smallest that meets (ε, δ)."""
    return agreed_noise(config.dp, domain_releases(coefficient_messages(config)))


def domain_record(dp: DP, noise_multiplier: float) -> Mapping[str, Any]:
    """Make the record of a domain's release that its report contains and the server's accountant adds up."""
    return {
        "unit": "domain",
        "noise_multiplier": noise_multiplier,
        "clip": dp.clip,
        "sample_rate": 1.0,
        "num_units": 1,
        "steps": 1,
        "randomness": dp.randomness,
    }


def add_noise(adapter: Adapter, start: Adapter, clip: float, noise_multiplier: float, drawn: Source) -> Adapter:
    """Apply the local mechanism: start + clip(adapter − start) + noise of deviation ``noise_multiplier`` · 2 ·
    ``clip``.

    Args:
        adapter: the expert.
        start: the public adapter from which every training starts; same layout.
        clip: C, over all factors together.
        noise_multiplier: noise over the sensitivity 2C.
        drawn: randomness.

    Raises:
        LayoutMismatchError: the layouts differ.
    """
    if {name: _shapes(m) for name, m in adapter.modules.items()} != {n: _shapes(m) for n, m in start.modules.items()}:
        raise LayoutMismatchError(
            "add_noise: adapter and start have different modules or shapes. Give the start of the adapter's own layout."
        )
    distances = {
        name: (m.lora_A - start.modules[name].lora_A, m.lora_B - start.modules[name].lora_B)
        for name, m in adapter.modules.items()
    }
    factor = clip_factor([part for parts in distances.values() for part in parts], clip)
    deviation = noise_multiplier * 2 * clip
    modules = {}
    for name, module in start.modules.items():
        away_A, away_B = (scaled(part, factor) + noise_like(part, deviation, drawn) for part in distances[name])
        modules[name] = LoraModule(module.lora_A + away_A, module.lora_B + away_B, module.scaling)
    return Adapter(modules)


def add_noise_to_answer(answer: torch.Tensor, clip: float, noise_multiplier: float, drawn: Source) -> torch.Tensor:
    """Apply the local mechanism to an answer about coefficients: clip(answer) + noise as for the factors.

    Args:
        answer: (K,) or (K, G), a gradient or a change.
        clip, noise_multiplier, drawn: as for :func:`add_noise`.
    """
    return scaled(answer, clip_factor([answer], clip)) + noise_like(answer, noise_multiplier * 2 * clip, drawn)


def average_with_noise(
    adapters: Mapping[str, Adapter], clip: float, noise_multiplier: float, rank: int, drawn: Source
) -> Adapter:
    """Apply the central mechanism: (Σ clip(Δ) + noise of deviation ``noise_multiplier`` · ``clip``) / K, cut to a rank.

    Args:
        adapters: domain -> expert, K of them; only their ranks may differ.
        clip: C, on the norm of Δ over all modules together.
        noise_multiplier: noise over the sensitivity C.
        rank: rank of the result.
        drawn: randomness.
    """
    domains = sorted(adapters)
    factors = {
        domain: clip_factor([module.delta_weight() for module in adapters[domain].modules.values()], clip)
        for domain in domains
    }
    modules = {}
    for name in adapters[domains[0]].modules:
        parts = [scaled(adapters[domain].modules[name].delta_weight(), factors[domain]) for domain in domains]
        total = torch.stack(parts).sum(dim=0)
        total += noise_like(total, noise_multiplier * clip, drawn)
        modules[name] = _cut(total / len(domains), rank)
    return Adapter(modules)


def clip_factor(parts: list[torch.Tensor], clip: float) -> float:
    """Return min(1, C / norm of all parts together), and 0 if the norm is not finite."""
    norm = math.sqrt(sum(float(part.double().square().sum()) for part in parts))
    return min(1.0, clip / max(norm, 1e-30)) * (1 - 1e-6) if math.isfinite(norm) else 0.0


def scaled(part: torch.Tensor, factor: float) -> torch.Tensor:
    """Return the part times the factor; zeros for the factor 0, even if the part is not finite."""
    return factor * part if factor else torch.zeros_like(part)


def noise_like(tensor: torch.Tensor, deviation: float, drawn: Source) -> torch.Tensor:
    """Draw Gaussian noise of this standard deviation in every coordinate."""
    values = deviation * drawn.standard_normal(tensor.numel()) if deviation else [0.0] * tensor.numel()
    return torch.as_tensor(values, dtype=tensor.dtype).reshape(tensor.shape)


def _cut(delta: torch.Tensor, rank: int) -> LoraModule:
    """Return the nearest matrix of a rank, as factors with scaling 1."""
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    kept = min(rank, len(values))
    roots = values[:kept].sqrt()
    return LoraModule((roots[:, None] * right[:kept]).contiguous(), (left[:, :kept] * roots).contiguous(), 1.0)


def _shapes(module: LoraModule) -> tuple[tuple[int, ...], tuple[int, ...], float]:
    return tuple(module.lora_A.shape), tuple(module.lora_B.shape), module.scaling
