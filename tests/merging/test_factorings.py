"""A merge depends on the updates, not on how they are factored: every method in every space, by hypothesis."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from adapters import Layout, random_adapter
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmerge.adapter import Adapter, LoraModule
from fedmerge.mergerec.directions import direction_stack, update_norm
from fedmerge.merging.methods import METHODS
from fedmerge.merging.stack import linear_merge
from fedmerge.merging.training_free import merge_adapters

LAYOUT: Layout = {"decoder.block.0.v": (8, 12), "encoder.block.0.q": (11, 9)}
TRAINING_FREE = [name for name, row in METHODS.items() if not row.learned]
NAMES = ("books", "toys")
EXAMPLES = settings(deadline=None, max_examples=8, derandomize=True)

Rewriting = Callable[[LoraModule, torch.Generator], LoraModule]


def scaled(factor: float) -> Rewriting:
    """(A c, B / c)."""
    return lambda module, rng: replace(
        module,
        lora_A=(module.lora_A.double() * factor).float(),
        lora_B=(module.lora_B.double() / factor).float(),
    )


def scaling_moved(module: LoraModule, rng: torch.Generator) -> LoraModule:
    return LoraModule(module.lora_A * (module.scaling / 32), module.lora_B, 32.0)


def turned(module: LoraModule, rng: torch.Generator) -> LoraModule:
    """(R A, B R⁻¹) for a matrix of condition 8."""
    r = module.rank
    Q, P = (torch.linalg.qr(torch.randn(r, r, generator=rng, dtype=torch.float64))[0] for _ in range(2))
    R = Q @ torch.diag(torch.logspace(-0.45, 0.45, r, dtype=torch.float64)) @ P
    return LoraModule(
        (R @ module.lora_A.double()).float(),
        (module.lora_B.double() @ torch.linalg.inv(R)).float(),
        module.scaling,
    )


def padded(module: LoraModule, rng: torch.Generator) -> LoraModule:
    """One more row of A is 0, and one more column of B."""
    rows = torch.randn(1, module.lora_A.shape[1], generator=rng)
    columns = torch.randn(len(module.lora_B), 1, generator=rng)
    lora_A = torch.cat([torch.zeros_like(rows), module.lora_A, rows])
    return LoraModule(lora_A, torch.cat([columns, module.lora_B, torch.zeros_like(columns)], dim=1), module.scaling)


def deficient(module: LoraModule, rng: torch.Generator) -> LoraModule:
    """The first term in two unequal parts, and a term that cancels."""
    first, columns = module.lora_B[:, :1], torch.randn(len(module.lora_B), 1, generator=rng)
    rows = torch.randn(1, module.lora_A.shape[1], generator=rng)
    lora_B = torch.cat([first / 4, module.lora_B[:, 1:], columns, 3 * first / 4, -columns], dim=1)
    return LoraModule(torch.cat([module.lora_A, rows, module.lora_A[:1], rows]), lora_B, module.scaling)


def dense(module: LoraModule, rng: torch.Generator) -> LoraModule:
    """Δ beside an identity."""
    return LoraModule(module.delta_weight(), torch.eye(len(module.lora_B)), 1.0)


REWRITINGS: dict[str, Rewriting] = {
    **{f"A {factor:g}": scaled(factor) for factor in (1e7, 1e-7, -3.0, 1e30, 1e-30)},
    "scaling": scaling_moved,
    "turned": turned,
    "padded": padded,
    "deficient": deficient,
    "dense": dense,
}


def same(found: Adapter, expected: Adapter, tolerance: float) -> bool:
    for name, module in expected.modules.items():
        target, other = (
            each.scaling * (each.lora_B.double() @ each.lora_A.double()) for each in (module, found.modules[name])
        )
        if not torch.linalg.norm(other - target) <= tolerance * torch.linalg.norm(target):
            return False
    return found.modules.keys() == expected.modules.keys()


def rewritten(adapter: Adapter, rewritings: list[str], seed: int) -> Adapter:
    rng = torch.Generator().manual_seed(seed)
    modules = dict(adapter.modules)
    for rewriting in rewritings:
        modules = {name: REWRITINGS[rewriting](module, rng) for name, module in modules.items()}
    return Adapter(modules)


def test_rewritings_are_the_same_update() -> None:
    adapter = random_adapter(LAYOUT, 3, 2.0, 0)
    for name in REWRITINGS:
        assert same(rewritten(adapter, [name], 1), adapter, 1e-6), name


def partly_positive(updates: torch.Tensor, share: float = 0.5) -> torch.Tensor:
    """A method of one's own for which the signs of the coordinates matter."""
    return updates.sum(0) + share * updates.amax(0).clamp(min=0)


@pytest.mark.parametrize("space", ["full", "core"])
@pytest.mark.parametrize("method", [*TRAINING_FREE, partly_positive])
def test_the_factoring_does_not_matter(method: Any, space: Any) -> None:
    scopes = ["tensor", "layer", "model"] if method in METHODS and METHODS[method].rows is not None else ["tensor"]
    chosen = st.lists(st.sampled_from(sorted(REWRITINGS)), min_size=1, max_size=2, unique=True)

    @EXAMPLES
    @given(st.tuples(chosen, chosen), st.integers(0, 1000), st.sampled_from(scopes), st.sampled_from([1.0, 1e-7, 1e3]))
    def holds(rewritings: tuple[list[str], list[str]], seed: int, scope: Any, coefficient: float) -> None:
        adapters = {name: random_adapter(LAYOUT, 2 + k, 1.5, 7 * seed + k) for k, name in enumerate(NAMES)}
        others = {name: rewritten(adapters[name], each, seed) for name, each in zip(NAMES, rewritings, strict=True)}
        options = {"scope": scope, "space": space, "seed": seed, "coefficients": {"toys": coefficient}}
        expected, found = (merge_adapters(each, method, **options).adapter for each in (adapters, others))
        assert same(found, expected, 2e-5)

    holds()


@pytest.mark.parametrize("method", ["average", "task-arithmetic", "knots-task-arithmetic", "iso-c", "iso-cts"])
def test_core_space_loses_no_adapter(method: str) -> None:
    """Of (A · 1e7, B · 1e-7) beside an ordinary adapter, and of one that is much smaller than the other."""
    small = replace(random_adapter(LAYOUT, 2, 1.0, 1).modules["encoder.block.0.q"], scaling=1e-9)
    for toys in (scaled(1e7)(small, torch.Generator()), replace(small, scaling=1e-9)):
        adapters = {
            "books": Adapter({"m": random_adapter(LAYOUT, 3, 1.0, 0).modules["encoder.block.0.q"]}),
            "toys": Adapter({"m": toys}),
        }
        full, core = (merge_adapters(adapters, method, space=space).adapter for space in ("full", "core"))
        assert same(core, full, 1e-5)


@pytest.mark.parametrize("space", ["full", "core"])
@pytest.mark.parametrize("method", TRAINING_FREE)
def test_updates_that_cancel_leave_nothing(method: str, space: Any) -> None:
    """Rounding is no direction: methods that whiten would make a full one of it."""
    module = random_adapter({"m": (40, 30)}, 3, 1.0, 0).modules["m"]
    twice = LoraModule(
        torch.cat([module.lora_A, module.lora_A / 3]), torch.cat([module.lora_B, -3 * module.lora_B], dim=1), 1.0
    )
    ordinary = Adapter({"m": random_adapter({"m": (40, 30)}, 2, 1.0, 1).modules["m"]})
    zero = Adapter({"m": replace(module, lora_B=torch.zeros_like(module.lora_B))})
    found, expected = (
        merge_adapters({"a": ordinary, "b": other}, method, space=space).adapter
        for other in (Adapter({"m": twice}), zero)
    )
    assert same(found, expected, 1e-5)
    alone = merge_adapters({"a": ordinary, "b": Adapter({"m": replace(ordinary.modules["m"], scaling=-1.0)})}, method)
    if METHODS[method].coefficients is not None or method.startswith("iso"):
        assert torch.linalg.norm(alone.adapter.modules["m"].delta_weight()) < 1e-6


def test_directions_do_not_depend_on_the_factoring() -> None:
    adapters = {name: random_adapter(LAYOUT, 2 + k, 1.5, k) for k, name in enumerate(NAMES)}
    for rewriting in REWRITINGS:
        other = {"books": adapters["books"], "toys": rewritten(adapters["toys"], [rewriting], 3)}
        for unit in ("module", "model", "rank-one"):
            weights = torch.tensor([1.0, 0.7])
            found, expected = (
                linear_merge(direction_stack("books", each, unit), weights) for each in (other, adapters)
            )
            assert same(found, expected, 1e-5), (rewriting, unit)
    nothing = deficient(
        replace(adapters["toys"].modules["encoder.block.0.q"], lora_A=torch.zeros(3, 9)), torch.Generator()
    )
    assert update_norm(nothing) == 0
