"""Normalised directions of the other domains' updates, in units of a client's own update, for personal merges.

A client c serves θ₀ + Δ_c + Σ_{k≠c} β_{k,g(m)} ρ_{c,m} D_{k,m}: its own update as it is, and the directions of the
others without their magnitudes, so that no domain gets more say by a larger adapter.
"""

import math
from collections.abc import Mapping

import torch

from fedmerge.adapter import Adapter, LoraModule
from fedmerge.config import Directions
from fedmerge.errors import MergeError
from fedmerge.merging.low_rank.spectral import rounding, thin_svd
from fedmerge.merging.stack import (
    Stack,
    by_module,
    expand_coefficients,
    linear_merge,
    linear_merge_of_many,
    stack_adapters,
    survey_adapters,
)


def update_norm(module: LoraModule) -> float:
    """Compute ρ = ‖Δ‖_F = |s| √tr((BᵀB)(AAᵀ)) in float64, from r × r products alone; 0 if the factors cancel."""
    lora_A, lora_B = module.lora_A.double(), module.lora_B.double()
    squared = float(((lora_B.T @ lora_B) * (lora_A @ lora_A.T)).sum())
    norm = math.sqrt(max(squared, 0.0))
    return abs(module.scaling) * norm if norm > rounding(lora_B, lora_A) else 0.0


def direction_stack(name: str, adapters: Mapping[str, Adapter], unit: Directions) -> Stack:
    """Stack a client's own update and the directions of the others, ρ_{c,m} D_{k,m}, each with scaling 1.

    ρ_{k,m} = ‖Δ_{k,m}‖_F and D_{k,m} = Δ_{k,m} / ρ_{k,m} for the unit ``module``. For ``model``, ρ_k is the norm over
    all modules. For ``rank-one``, D_{k,m} = Σ_j u_j v_jᵀ / √q over the q singular directions of Δ_{k,m}, so that all
    count alike and ‖D‖_F = 1, too. ρ = 0 gives D = 0. For ``raw``, ρ_c D_k is Δ_k: the ablation without normalisation.

    Args:
        name: the client's domain.
        adapters: domain -> expert, of all domains of the cohort; ranks and scalings may differ.
        unit: unit of normalisation.

    Returns:
        The stack of K domains, for :func:`fedmerge.mergerec.vectors.merged_forward`.

    Raises:
        MergeError: the client's own expert is missing, or a value is not finite.
        LayoutMismatchError: the layouts differ.

    Source: FeDecider, arXiv:2602.16034: magnitude and direction are separated, and only directions are combined.
    Differs: a reconstruction from the abstract, so "-style"; the unit of normalisation, the form of the coefficients
        and the scale ρ_c are ours.
    """
    if name not in adapters:
        raise MergeError(
            f"domain {name}: the cohort has the experts of {', '.join(sorted(adapters))}, expected {name} among them"
        )
    stack_adapters(adapters)  # raises for layouts that differ and for values that are not finite
    own = adapters[name]
    scale = _norms(own, unit)
    others = {domain: _directions(adapter, unit, scale) for domain, adapter in adapters.items() if domain != name}
    return stack_adapters({name: own, **others})


def modules_without_direction(name: str, adapters: Mapping[str, Adapter]) -> dict[str, int]:
    """Return domain -> number of modules whose update is zero, so that they have no direction; without the own domain.

    Domains with a direction in every module are left out.
    """
    zeros = {
        domain: sum(not update_norm(module) > 0 for module in adapter.modules.values())
        for domain, adapter in sorted(adapters.items())
        if domain != name
    }
    return {domain: number for domain, number in zeros.items() if number}


def start_of_personal(name: str, stack: Stack) -> torch.Tensor:
    """Return the (K, G) coefficients of β = 0: 1 for the own update, 0 for every direction."""
    start = torch.zeros(len(stack.domains), len(stack.groups))
    start[stack.domains.index(name)] = 1.0
    return start


def personal_merge(name: str, expert: Adapter, stack: Stack, coefficients: torch.Tensor) -> Adapter:
    """Return the personal merge as one adapter; with β = 0 the expert itself, bit for bit.

    Args:
        name: the client's domain.
        expert: its own expert.
        stack: of :func:`direction_stack`.
        coefficients: (K, G), the row of the own update is 1.
    """
    if torch.equal(coefficients.cpu(), start_of_personal(name, stack)):
        return expert
    return linear_merge(stack, coefficients.cpu())


def universal_merge(
    adapters: Mapping[str, Adapter], coefficients: Mapping[str, torch.Tensor], unit: Directions
) -> Adapter:
    """Return the mean of all personal merges, Δ = 1/K Σ_c [o_c Δ_c + Σ_{k≠c} β_{c,k} ρ_c D_k], as one adapter.

    It is linear in the K updates, with a coefficient for every module, and in the K directions of ``rank-one``. With
    β = 0 and o = 1 it is the average, bit for bit.

    Args:
        adapters: domain -> expert, of all domains of the cohort.
        coefficients: domain c -> (K, G), the row of c is o_c and the others are β_c; a domain that is not named has
            β = 0 and o = 1.
        unit: unit of normalisation, as in :func:`direction_stack`.

    Raises:
        LayoutMismatchError: the layouts, or the shapes of coefficients differ.
        MergeError: a value is not finite.

    Source: FeDecider-style, see :func:`direction_stack`.
    """
    layers = survey_adapters(adapters)
    domains, modules = layers.domains, list(layers.group_of)
    norms = torch.tensor([list(_norms(adapters[domain], unit).values()) for domain in domains], dtype=torch.float64)
    own, along = torch.zeros_like(norms), torch.zeros_like(norms)  # (K, M): factors of Δ_k and of D_k
    for place, domain in enumerate(domains):
        given = coefficients.get(domain, torch.eye(len(domains))[place])
        values = expand_coefficients(layers, given).double()[:, list(layers.group_of.values())]  # (K, M)
        own[place] += values[place]
        values[place] = 0.0
        along += values * norms[place]
    if unit == "rank-one":
        ones = dict.fromkeys(modules, 1.0)
        of_directions = {f"{domain}, directions": _directions(adapters[domain], unit, ones) for domain in domains}
        stack = by_module(stack_adapters({**adapters, **of_directions}))
        row_of = dict(zip([*domains, *(f"{domain}, directions" for domain in domains)], [*own, *along], strict=True))
        return linear_merge(stack, torch.stack([row_of[name] for name in stack.domains]) / len(domains))
    total = own + torch.where(norms > 0, along / norms, 0.0)
    return linear_merge_of_many(adapters, by_module(layers), total / len(domains))


def _norms(adapter: Adapter, unit: Directions) -> dict[str, float]:
    """Return module -> ρ, by name; 1 without normalisation."""
    norms = {name: update_norm(module) for name, module in adapter.modules.items()}
    if unit == "raw":
        return dict.fromkeys(norms, 1.0)
    return dict.fromkeys(norms, math.hypot(*norms.values())) if unit == "model" else norms


def _directions(adapter: Adapter, unit: Directions, scale: Mapping[str, float]) -> Adapter:
    norms, made = _norms(adapter, unit), {}
    for name, module in adapter.modules.items():
        if not norms[name] > 0 or not scale[name] > 0:
            made[name] = LoraModule(module.lora_A, torch.zeros_like(module.lora_B), 1.0)
        elif unit == "rank-one":
            U, S, Vh = thin_svd(module.lora_B * module.scaling, module.lora_A)
            made[name] = LoraModule(Vh.float(), (U * (scale[name] / math.sqrt(len(S)))).float(), 1.0)
        else:
            factor = module.scaling * scale[name] / norms[name]
            made[name] = LoraModule(module.lora_A, (module.lora_B.double() * factor).float(), 1.0)
    return Adapter(made)
