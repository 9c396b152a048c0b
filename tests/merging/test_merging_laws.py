"""The laws that the rows of METHODS declare, by hypothesis: any number of domains, ranks, scopes and spaces."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from adapters import Layout, random_adapter
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmerge.adapter import Adapter, LoraModule, adapter_sha256
from fedmerge.merging.methods import METHODS, Law
from fedmerge.merging.training_free import merge_adapters

LAYOUT: Layout = {"layer.0.query": (5, 4), "layer.1.value": (4, 6)}
NAMES = ("toys", "books", "tents", "coffee")
EVERYTHING_KEPT = {"coefficient": 1.0, "density": 1.0, "ties_density": 1.0, "drop_smallest": 0.0, "drop_largest": 0.0}
EXAMPLES = settings(deadline=None, max_examples=6, derandomize=True)


@dataclass(frozen=True)
class Case:
    """Adapters and how they are merged."""

    adapters: dict[str, Adapter]
    method: str
    options: dict[str, Any]
    seed: int

    def merge(self, adapters: dict[str, Adapter] | None = None, **changes: Any) -> Adapter:
        chosen = self.adapters if adapters is None else adapters
        return merge_adapters(chosen, self.method, **{**self.options, **changes}).adapter


@st.composite
def cases(draw: st.DrawFn, method: str) -> Case:
    most = METHODS[method].most_domains or 4
    names = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=most, unique=True))
    seed = draw(st.integers(0, 1000))
    adapters = {
        name: random_adapter(LAYOUT, draw(st.integers(1, 3)), draw(st.sampled_from([0.5, 1.0, 2.0])), 10 * seed + k)
        for k, name in enumerate(names)
    }
    row = METHODS[method]
    options: dict[str, Any] = {"space": draw(st.sampled_from(["full", "core"])), "seed": draw(st.integers(0, 9))}
    if row.rows is not None:
        options["scope"] = draw(st.sampled_from(["tensor", "layer", "model"]))
    if "density" in row.parameters:
        options["density"] = draw(st.sampled_from([0.2, 0.5, 0.9]))
    if "coefficient" in row.parameters:
        options["coefficient"] = draw(st.sampled_from([0.4, 1.0]))
    return Case(adapters, method, options, seed)


def same(found: Adapter, expected: Adapter, tolerance: float = 1e-5) -> bool:
    for name, module in expected.modules.items():
        target = module.delta_weight()
        error = torch.linalg.norm(found.modules[name].delta_weight() - target)
        if not error <= tolerance * max(float(torch.linalg.norm(target)), 1e-6):
            return False
    return found.modules.keys() == expected.modules.keys()


def times(factor: float, adapter: Adapter) -> Adapter:
    return Adapter({name: replace(m, scaling=factor * m.scaling) for name, m in adapter.modules.items()})


def one_domain_is_identity(case: Case) -> None:
    name, adapter = next(iter(case.adapters.items()))
    kept = {key: value for key, value in EVERYTHING_KEPT.items() if key in METHODS[case.method].parameters}
    assert same(case.merge({name: adapter}, **kept), adapter)


def permutation(case: Case) -> None:
    merged = case.merge()
    assert adapter_sha256(merged) == adapter_sha256(case.merge(dict(reversed(case.adapters.items()))))
    if not METHODS[case.method].random:  # draws belong to names
        renamed = {f"{9 - i} {name}": case.adapters[name] for i, name in enumerate(sorted(case.adapters))}
        assert same(case.merge(renamed), merged, 1e-4)


def zero_coefficient_is_absent(case: Case) -> None:
    extra = random_adapter(LAYOUT, 2, 1.0, case.seed + 7)
    merged = case.merge({**case.adapters, "extra": extra}, coefficients={"extra": 0.0})
    assert adapter_sha256(merged) == adapter_sha256(case.merge())


def inputs_unchanged(case: Case) -> None:
    before = {name: adapter_sha256(adapter) for name, adapter in case.adapters.items()}
    merged = case.merge()
    for module in merged.modules.values():  # and the result shares no memory with them
        module.lora_A.fill_(7.0)
        module.lora_B.fill_(7.0)
    assert {name: adapter_sha256(adapter) for name, adapter in case.adapters.items()} == before


def homogeneous(case: Case) -> None:
    merged = case.merge()
    for factor in (-2.0, 3.0):
        scaled = {name: times(factor, adapter) for name, adapter in case.adapters.items()}
        assert same(case.merge(scaled), times(factor, merged), 1e-4)


def turned(case: Case, bases: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Updates Q Δ Pᵀ give the merge Q · Pᵀ."""

    def turn(adapter: Adapter) -> Adapter:
        return Adapter(
            {
                name: LoraModule(module.lora_A @ bases[name][1].T, bases[name][0] @ module.lora_B, module.scaling)
                for name, module in adapter.modules.items()
            }
        )

    assert same(case.merge({name: turn(adapter) for name, adapter in case.adapters.items()}), turn(case.merge()), 1e-4)


def neurons(case: Case) -> None:
    rng = np.random.default_rng(case.seed)
    turned(
        case,
        {
            name: (torch.eye(out)[rng.permutation(out)], torch.eye(width)[rng.permutation(width)])
            for name, (out, width) in LAYOUT.items()
        },
    )


def rotation(case: Case) -> None:
    rng = torch.Generator().manual_seed(case.seed)
    turned(
        case,
        {
            name: (
                torch.linalg.qr(torch.randn(out, out, generator=rng))[0],
                torch.linalg.qr(torch.randn(width, width, generator=rng))[0],
            )
            for name, (out, width) in LAYOUT.items()
        },
    )


def core_is_full(case: Case) -> None:
    assert same(case.merge(space="core"), case.merge(space="full"), 1e-4 if METHODS[case.method].factors else 1e-5)


LAWS: dict[Law, Callable[[Case], None]] = {
    "one domain is identity": one_domain_is_identity,
    "permutation": permutation,
    "zero coefficient is absent": zero_coefficient_is_absent,
    "inputs unchanged": inputs_unchanged,
    "homogeneous": homogeneous,
    "neurons": neurons,
    "rotation": rotation,
    "core is full": core_is_full,
}


@pytest.mark.parametrize(
    ("method", "law"), [(name, law) for name, row in METHODS.items() if not row.learned for law in row.laws]
)
def test_declared_laws(method: str, law: Law) -> None:
    @EXAMPLES
    @given(cases(method))
    def holds(case: Case) -> None:
        LAWS[law](case)

    holds()


def test_laws_that_are_not_declared_do_not_hold() -> None:
    """A law that holds everywhere would say nothing."""
    adapters = {name: random_adapter(LAYOUT, 2, 1.0, k) for k, name in enumerate(NAMES)}
    missing: list[tuple[str, Law]] = [
        ("pcb", "homogeneous"),
        ("ties", "rotation"),
        ("iso-c", "one domain is identity"),
    ]
    for method, law in missing:
        assert law not in METHODS[method].laws
        with pytest.raises(AssertionError):
            LAWS[law](Case(adapters, method, {"density": 0.5} if law != "one domain is identity" else {}, 0))
    assert LAWS.keys() == set(get_args(Law))
