"""Directions of personal merges: normalisation, its units, and what magnitudes change."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from adapters import random_adapter, random_adapters

from fedmerge.adapter import Adapter, adapter_sha256
from fedmerge.config import Directions
from fedmerge.errors import LayoutMismatchError, MergeError
from fedmerge.mergerec.directions import (
    direction_stack,
    modules_without_direction,
    personal_merge,
    start_of_personal,
    universal_merge,
    update_norm,
)
from fedmerge.merging.training_free import merge_adapters

LAYOUT = {"encoder.layer.0.query": (6, 5), "encoder.layer.1.query": (4, 7)}
NORMALISED: tuple[Directions, ...] = ("module", "model", "rank-one")
UNITS: tuple[Directions, ...] = (*NORMALISED, "raw")


def changed(adapters: Mapping[str, Adapter], domain: str, factor_B: float, factor_scaling: float) -> dict[str, Adapter]:
    modules = {
        name: replace(module, lora_B=module.lora_B * factor_B, scaling=module.scaling * factor_scaling)
        for name, module in adapters[domain].modules.items()
    }
    return {**adapters, domain: Adapter(modules)}


def merged(adapters: Mapping[str, Adapter], beta: np.ndarray, unit: Directions, name: str = "toys") -> Adapter:
    """The personal merge of a domain; the rows of beta (K - 1, G) are the other domains, sorted."""
    stack = direction_stack(name, adapters, unit)
    values = start_of_personal(name, stack)
    values[[number for number, domain in enumerate(stack.domains) if domain != name]] = torch.from_numpy(beta).float()
    return personal_merge(name, adapters[name], stack, values)


def dense(adapter: Adapter) -> dict[str, torch.Tensor]:
    return {
        name: module.scaling * module.lora_B.double() @ module.lora_A.double()
        for name, module in adapter.modules.items()
    }


def expected(adapters: Mapping[str, Adapter], beta: np.ndarray, unit: Directions) -> dict[str, torch.Tensor]:
    """Δ_c + Σ β ρ_c D_k, from the definition in float64."""
    own, others = dense(adapters["toys"]), [dense(adapters[domain]) for domain in sorted({*adapters} - {"toys"})]

    def norm(deltas: Mapping[str, torch.Tensor], name: str) -> float:
        counted = deltas.values() if unit == "model" else [deltas[name]]
        return math.sqrt(sum(float(delta.square().sum()) for delta in counted))

    found = {}
    for group, name in enumerate(sorted(own)):
        found[name] = own[name].clone()
        for row, other in enumerate(others):
            direction = other[name] / norm(other, name)
            if unit == "rank-one":
                U, S, Vh = torch.linalg.svd(other[name], full_matrices=False)
                rank = int((1e-6 * S[0] < S).sum())
                direction = U[:, :rank] @ Vh[:rank] / rank**0.5
            scaled = other[name] if unit == "raw" else norm(own, name) * direction
            found[name] += float(beta[row, group]) * scaled
    return found


BETA = np.array([[0.3, -0.2], [0.5, 0.1]])


@pytest.mark.parametrize("unit", UNITS)
def test_a_merge_equals_its_definition(unit: Directions) -> None:
    adapters = random_adapters(LAYOUT)
    found, wanted = dense(merged(adapters, BETA, unit)), expected(adapters, BETA, unit)
    for name, delta in wanted.items():
        assert torch.linalg.norm(found[name] - delta) < 1e-5 * torch.linalg.norm(delta)


def test_norms_need_no_product_of_the_factors() -> None:
    for module in random_adapters(LAYOUT)["tents"].modules.values():
        assert update_norm(module) == pytest.approx(float(module.delta_weight().double().norm()), rel=1e-6)


@pytest.mark.parametrize("unit", UNITS)
def test_without_coefficients_a_merge_is_the_expert_bit_for_bit(unit: Directions) -> None:
    adapters = random_adapters(LAYOUT)
    found = merged(adapters, np.zeros((2, 2)), unit)
    assert adapter_sha256(found) == adapter_sha256(adapters["toys"])


def test_a_domain_alone_is_served_its_expert() -> None:
    adapters = {"toys": random_adapters(LAYOUT)["toys"]}
    assert adapter_sha256(merged(adapters, np.zeros((0, 2)), "module")) == adapter_sha256(adapters["toys"])


@pytest.mark.parametrize("unit", NORMALISED)
@pytest.mark.parametrize(("factor_B", "factor_scaling"), [(10.0, 1.0), (1.0, 10.0), (4.0, 0.25)])
def test_magnitudes_of_the_others_change_nothing(unit: Directions, factor_B: float, factor_scaling: float) -> None:
    """So an attack that scales its update up is void, and so is moving the scaling into B."""
    adapters = random_adapters(LAYOUT)
    before, after = (
        dense(merged(given, BETA, unit)) for given in (adapters, changed(adapters, "books", factor_B, factor_scaling))
    )
    for name in before:
        assert torch.allclose(before[name], after[name], rtol=0, atol=1e-6)


def test_the_units_agree_for_one_module_of_rank_one() -> None:
    layout = {"encoder.layer.0.query": (6, 5)}
    adapters = {name: random_adapter(layout, 1, 1.5, seed) for seed, name in enumerate(("toys", "books", "tents"))}
    first, *others = (dense(merged(adapters, BETA[:, :1], unit)) for unit in NORMALISED)
    for other in others:
        for name in first:
            assert torch.allclose(first[name], other[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("unit", UNITS)
def test_an_update_of_zero_has_no_direction(unit: Directions) -> None:
    adapters = changed(random_adapters(LAYOUT), "books", 0.0, 1.0)
    assert modules_without_direction("toys", adapters) == {"books": 2}
    found, wanted = dense(merged(adapters, BETA, unit)), dense(merged(adapters, BETA * [[0], [1]], unit))
    for name in wanted:
        assert torch.allclose(found[name], wanted[name], rtol=0, atol=1e-7)


def test_without_normalisation_a_magnitude_counts() -> None:
    adapters = random_adapters(LAYOUT)
    before, after = (dense(merged(given, BETA, "raw")) for given in (adapters, changed(adapters, "books", 10.0, 1.0)))
    assert all(torch.linalg.norm(before[name] - after[name]) > 0.1 * torch.linalg.norm(before[name]) for name in before)


def test_an_expert_of_zero_stays_zero() -> None:
    """β is in units of the own update, so there is no unit for a module that learned nothing."""
    found = merged(changed(random_adapters(LAYOUT), "toys", 0.0, 1.0), BETA, "module")
    assert all(not delta.any() for delta in dense(found).values())


def test_the_order_of_the_domains_changes_nothing() -> None:
    adapters = random_adapters(LAYOUT)
    shuffled = dict(reversed(adapters.items()))
    assert adapter_sha256(merged(adapters, BETA, "module")) == adapter_sha256(merged(shuffled, BETA, "module"))


# The universal merge


def coefficients_of(domains: Sequence[str], seed: int = 0) -> dict[str, torch.Tensor]:
    """Draw (K, G) for every domain: about 0 for the others and about 1 for its own update."""
    rng = torch.Generator().manual_seed(seed)
    return {
        domain: torch.eye(len(domains))[place, :, None] + 0.3 * torch.randn(len(domains), 2, generator=rng)
        for place, domain in enumerate(sorted(domains))
    }


@pytest.mark.parametrize("unit", UNITS)
def test_a_universal_merge_is_the_mean_of_the_personal_ones(unit: Directions) -> None:
    adapters = random_adapters(LAYOUT)
    fitted = coefficients_of(list(adapters))
    found = dense(universal_merge(adapters, fitted, unit))
    personal = [
        dense(personal_merge(name, adapters[name], direction_stack(name, adapters, unit), values))
        for name, values in fitted.items()
    ]
    for name, delta in found.items():
        mean = torch.stack([each[name] for each in personal]).mean(0)
        assert torch.linalg.norm(delta - mean) < 1e-5 * torch.linalg.norm(mean)
    shuffled = universal_merge(dict(reversed(adapters.items())), dict(reversed(fitted.items())), unit)
    assert adapter_sha256(shuffled) == adapter_sha256(universal_merge(adapters, fitted, unit))


@pytest.mark.parametrize("unit", UNITS)
def test_without_coefficients_a_universal_merge_is_the_average_bit_for_bit(unit: Directions) -> None:
    adapters = random_adapters(LAYOUT)
    average = adapter_sha256(merge_adapters(adapters, "average").adapter)
    neutral = {name: torch.eye(3)[place, :, None].expand(3, 2) for place, name in enumerate(sorted(adapters))}
    assert adapter_sha256(universal_merge(adapters, neutral, unit)) == average
    assert adapter_sha256(universal_merge(adapters, {}, unit)) == average  # nobody sent any
    alone = {"toys": adapters["toys"]}
    found = dense(universal_merge(alone, {}, unit))
    assert all(torch.allclose(found[name], delta, atol=1e-6) for name, delta in dense(adapters["toys"]).items())


@pytest.mark.parametrize("unit", UNITS)
def test_a_domain_that_learned_nothing_makes_no_nan(unit: Directions) -> None:
    adapters = changed(random_adapters(LAYOUT), "books", 0.0, 1.0)
    found = universal_merge(adapters, coefficients_of(list(adapters)), unit)
    assert all(delta.isfinite().all() for delta in dense(found).values())


def test_what_cannot_be_combined_is_refused_by_name() -> None:
    adapters = random_adapters(LAYOUT)
    with pytest.raises(MergeError, match="expected coffee among them"):
        direction_stack("coffee", adapters, "module")
    with pytest.raises(LayoutMismatchError, match="'toys'"):
        direction_stack("toys", {**adapters, "toys": random_adapter({"other": (6, 5)}, 1, 1.0, 0)}, "module")
    with pytest.raises(MergeError, match=r"'books'.*not finite"):
        direction_stack("toys", changed(adapters, "books", float("nan"), 1.0), "module")
