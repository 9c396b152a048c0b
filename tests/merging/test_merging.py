"""Stacked adapters and linear merges: by hand, against the dense sum, through PEFT, laws, refusals."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import pytest
import torch
from adapters import Lent, layout_of, random_adapter, random_adapters
from peft import PeftModel
from transformers import PreTrainedModel

from fedmerge import config
from fedmerge.adapter import Adapter, LoraModule, adapter_sha256, float32_factors
from fedmerge.encoder.backbone import Backbone
from fedmerge.encoder.encode import embed_batch
from fedmerge.encoder.peft.folder import read_adapter, write_adapter
from fedmerge.errors import ConfigError, LayoutMismatchError, MergeError
from fedmerge.merging.methods import METHODS, average, method_coefficients, task_arithmetic
from fedmerge.merging.stack import Stack, linear_merge, linear_merge_of_many, stack_adapters, survey_adapters
from fedmerge.merging.training_free import merge_adapters

SEQUENCES = [np.array(ids, dtype=np.int32) for ids in ([2, 9, 11, 3], [2, 30, 3], [2, 14, 8, 21, 17, 12, 3])]


@pytest.fixture(scope="module")
def backbone(either_backbone: Backbone) -> Backbone:
    return either_backbone


# The ranks add up to 8: they fit into all modules but the last, whose merge is re-expressed at rank 2.
LAYOUT = {"layer.0.query": (10, 9), "layer.10.query": (10, 9), "layer.2.out": (8, 11), "top": (2, 4)}


@pytest.fixture
def adapters() -> dict[str, Adapter]:
    return random_adapters(LAYOUT)


def dense_delta(adapters: dict[str, Adapter], name: str, coefficients: dict[str, float]) -> torch.Tensor:
    """Σ c s B A in float64, one domain after the other."""
    total = torch.zeros(())
    for domain, coefficient in coefficients.items():
        module = adapters[domain].modules[name]
        total = total + coefficient * module.scaling * (module.lora_B.double() @ module.lora_A.double())
    return total


def same_update(found: Adapter, expected: Adapter) -> bool:
    return found.modules.keys() == expected.modules.keys() and all(
        torch.allclose(module.delta_weight(), expected.modules[name].delta_weight(), rtol=1e-5, atol=1e-6)
        for name, module in found.modules.items()
    )


def test_by_hand() -> None:
    one = Adapter({"top": LoraModule(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]]), 2.0)})  # Δ = [6, 12]
    two = Adapter({"top": LoraModule(torch.tensor([[1.0, 0.0]]), torch.tensor([[-4.0]]), 0.5)})  # Δ = [-2, 0]
    merged = linear_merge(stack_adapters({"b": two, "a": one}), np.array([0.5, 3.0])).modules["top"]
    assert merged.delta_weight().tolist() == [[-3.0, 6.0]]
    assert (merged.rank, merged.scaling) == (1, 1.0)  # the ranks add up to 2, but the module is 1 × 2


def test_groups_are_layers_in_number_order_then_others(adapters: dict[str, Adapter]) -> None:
    stack = stack_adapters(adapters)
    assert stack.domains == ("books", "tents", "toys")
    assert stack.groups == ("layer 0", "layer 2", "layer 10", "others")
    assert [stack.group_of[name] for name in LAYOUT] == [0, 2, 1, 3]
    assert stack.modules["top"].owner.tolist() == [0, 1, 1, 1, 1, 2, 2, 2]


def test_two_stacks_have_two_layers_of_one_number() -> None:
    """The towers of T5, BART, Whisper and CLIP: coefficients and thresholds of layer 0 are two."""
    names = ("encoder.block.0.q", "encoder.block.0.layer.1.v", "decoder.block.0.q", "decoder.block.10.q", "lm_head")
    adapters = {
        name: Adapter(
            {
                module: replace(each, scaling=10.0 if module.startswith("decoder") else 1.0)
                for module, each in random_adapter(dict.fromkeys(names, (16, 16)), 4, 1.0, seed).modules.items()
            }
        )
        for seed, name in enumerate("ab")
    }
    stack = stack_adapters(adapters)
    assert stack.groups == ("decoder.block.0", "decoder.block.10", "encoder.block.0", "others")
    assert [stack.group_of[name] for name in names] == [2, 2, 0, 1, 3]
    alone = {
        name: Adapter({key: each for key, each in adapter.modules.items() if key.startswith("encoder")})
        for name, adapter in adapters.items()
    }
    assert stack_adapters(alone).groups == ("layer 0",)
    weights = method_coefficients("linear-by-layer", stack, weights="a=0:2", normalize=False)
    assert weights[0].tolist() == pytest.approx(
        [0.0, 2.0, 0.0, 2 / 3]
    )  # from the first to the last layer of each stack
    merged, encoder = (merge_adapters(each, "ties", density=0.2, scope="layer").adapter for each in (adapters, alone))
    assert adapter_sha256(Adapter({name: merged.modules[name] for name in names[:2]})) == adapter_sha256(encoder)


@pytest.mark.parametrize("space", ["full", "core"])
@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if not row.learned])
def test_what_float32_cannot_hold_is_one_error(method: str, space: Any) -> None:
    adapters = {name: random_adapter({"m": (6, 5)}, 2, 1.0, seed) for seed, name in enumerate("ab")}
    for value in (1e39, 1e300):
        if "coefficient" in METHODS[method].parameters:
            with pytest.raises(MergeError, match="not finite in float32") as raised:
                merge_adapters(adapters, method, space=space, coefficient=value)
            assert "\n" not in str(raised.value)
        with pytest.raises(MergeError, match=r"'a', module m: its update is not finite in float32 \(scaling 1e\+"):
            merge_adapters(adapters, method, space=space, coefficients={"a": value})
    nan = torch.full((2, 5), float("nan"))
    damaged = Adapter({"m": replace(adapters["b"].modules["m"], lora_A=nan)})
    with pytest.raises(MergeError, match=r"'b', module m: 10 values of lora_A are not finite"):
        merge_adapters({**adapters, "b": damaged}, method, space=space)


def test_factors_beyond_float32_are_balanced() -> None:
    module = random_adapter({"m": (6, 5)}, 2, 1.0, 0).modules["m"]
    lora_A, lora_B = module.lora_A.double(), module.lora_B.double()
    for factor in (1e60, 1e-60):
        found = LoraModule(*float32_factors(lora_A * factor, lora_B / factor), 1.0)
        assert torch.allclose(found.delta_weight(), module.delta_weight(), rtol=1e-5)
    assert all(map(torch.equal, float32_factors(lora_A, lora_B), (module.lora_A, module.lora_B)))
    huge = LoraModule(module.lora_A * 1e30, module.lora_B * 1e-30, 1e20)  # scaling · A is beyond float32, Δ is not
    merged = merge_adapters({"a": Adapter({"m": huge}), "b": Adapter({"m": module})}, "average").adapter.modules["m"]
    assert torch.allclose(merged.delta_weight(), (0.5e20 * module.delta_weight()), rtol=1e-5)


@pytest.mark.parametrize("layer_wise", [False, True])
def test_equals_the_dense_sum_and_survives_peft(backbone: Backbone, layer_wise: bool, tmp_path: Path) -> None:
    adapters = random_adapters(layout_of(backbone))
    stack = stack_adapters(adapters)
    shape = (len(stack.domains), len(stack.groups)) if layer_wise else (len(stack.domains),)
    coefficients = torch.from_numpy(np.random.default_rng(5).uniform(-1.0, 1.0, shape))
    merged = linear_merge(stack, coefficients)

    dense = replace(backbone, model=copy.deepcopy(backbone.model))
    layers = dict(dense.model.named_modules())
    for name, module in merged.modules.items():
        values = coefficients[:, stack.group_of[name]] if layer_wise else coefficients
        delta = dense_delta(adapters, name, dict(zip(stack.domains, values.tolist(), strict=True)))
        assert torch.linalg.norm(module.delta_weight() - delta) <= 1e-5 * torch.linalg.norm(delta)
        assert module.rank == 3 + 1 + 4
        layers[name].weight.data = (layers[name].weight.double() + delta).float()

    write_adapter(merged, tmp_path / "merged", backbone.name)
    wrapped = PeftModel.from_pretrained(copy.deepcopy(backbone.model), tmp_path / "merged").train(False)
    peft = replace(backbone, model=cast(PreTrainedModel, wrapped))
    with torch.no_grad():
        expected, found, base = (embed_batch(each, SEQUENCES) for each in (dense, peft, backbone))
    assert (expected - base).abs().max() > 0.05  # the adapters matter
    assert (expected - found).abs().max() <= 1e-5


@pytest.mark.parametrize("shape", [(24, 24), (12, 40), (40, 12)], ids=["square", "wide", "tall"])
def test_many_domains_are_merged_at_no_higher_rank_than_the_module_has(shape: tuple[int, int], tmp_path: Path) -> None:
    adapters = {f"{k:03d}": random_adapter({"layer.0.query": shape}, 1 + k % 4, 1.5, seed=k) for k in range(60)}
    stack = stack_adapters(adapters)
    coefficients = np.random.default_rng(0).uniform(-1, 1, len(adapters))
    merged = linear_merge(stack, coefficients)
    module = merged.modules["layer.0.query"]
    delta = dense_delta(adapters, "layer.0.query", dict(zip(stack.domains, coefficients.tolist(), strict=True)))
    assert sum(adapter.modules["layer.0.query"].rank for adapter in adapters.values()) == 150
    assert (module.rank, module.scaling) == (min(shape), 1.0)
    assert torch.linalg.norm(module.delta_weight() - delta) <= 1e-6 * torch.linalg.norm(delta)
    write_adapter(merged, tmp_path / "merged", "any")
    assert adapter_sha256(read_adapter(tmp_path / "merged")) == adapter_sha256(merged)


def test_at_exactly_the_rank_of_the_module_the_factors_are_kept() -> None:
    adapters = {name: random_adapter({"top": (6, 9)}, 3, 1.0, seed) for seed, name in enumerate("ab")}
    module = linear_merge(stack_adapters(adapters), np.array([1.0, 2.0])).modules["top"]
    assert torch.equal(module.lora_B, torch.cat([adapters[name].modules["top"].lora_B for name in "ab"], dim=1))


@pytest.mark.parametrize("layer_wise", [False, True])
def test_adapters_read_one_at_a_time_give_the_same_to_the_last_bit(
    adapters: dict[str, Adapter], layer_wise: bool
) -> None:
    lent = Lent(list(adapters), adapters.__getitem__)
    layout, stack = survey_adapters(lent), stack_adapters(lent)
    assert (layout.domains, layout.groups, layout.group_of) == (stack.domains, stack.groups, stack.group_of)
    coefficients = np.random.default_rng(1).uniform(-1, 1, (3, 4) if layer_wise else 3)
    coefficients[1] = 0.0
    merged = linear_merge_of_many(lent, layout, coefficients)
    assert adapter_sha256(merged) == adapter_sha256(linear_merge(stack, coefficients))
    assert merged.modules["layer.0.query"].rank == 4  # the domain with coefficient 0 takes no rank
    assert merged.modules["top"].rank == 2


def test_merging_holds_one_adapter_at_a_time_however_many_there_are() -> None:
    for num_domains in (4, 40):
        names = [f"{k:02d}" for k in range(num_domains)]
        adapters = Lent(names, lambda name: random_adapter({"layer.0.query": (5, 4)}, 3, 1.0, int(name)))
        layout = survey_adapters(adapters)
        linear_merge_of_many(adapters, layout, np.full(num_domains, 0.5))
        assert adapters.most <= 3  # the first, which the others are compared with, the one before, and this one
        assert adapters.times == 2 * num_domains + 1


def one_domain_is_identity(coefficients_of: Callable[[Stack], torch.Tensor], adapters: dict[str, Adapter]) -> None:
    alone = stack_adapters({"toys": adapters["toys"]})
    assert same_update(linear_merge(alone, coefficients_of(alone)), adapters["toys"])


def permutation(coefficients_of: Callable[[Stack], torch.Tensor], adapters: dict[str, Adapter]) -> None:
    stacks = [stack_adapters(dict(items)) for items in (adapters.items(), reversed(adapters.items()))]
    first, second = (linear_merge(stack, coefficients_of(stack)) for stack in stacks)
    assert adapter_sha256(first) == adapter_sha256(second)
    renamed = stack_adapters({f"{9 - i} {name}": adapters[name] for i, name in enumerate(sorted(adapters))})
    assert renamed.domains[0].endswith("toys")  # now another order inside the stack
    assert same_update(linear_merge(renamed, coefficients_of(renamed)), first)


def zero_coefficient_is_absent(coefficients_of: Callable[[Stack], torch.Tensor], adapters: dict[str, Adapter]) -> None:
    stack, without = stack_adapters(adapters), stack_adapters({k: v for k, v in adapters.items() if k != "tents"})
    coefficients = coefficients_of(stack)
    coefficients[stack.domains.index("tents")] = 0.0
    assert adapter_sha256(linear_merge(stack, coefficients)) == adapter_sha256(
        linear_merge(without, coefficients_of(without))
    )


def inputs_unchanged(coefficients_of: Callable[[Stack], torch.Tensor], adapters: dict[str, Adapter]) -> None:
    before = [adapter_sha256(adapter) for adapter in adapters.values()]
    stack = stack_adapters(adapters)
    factors = [module.lora_A.clone() for module in stack.modules.values()]
    coefficients = coefficients_of(stack)
    given = coefficients.clone()
    merged = linear_merge(stack, coefficients)
    for result in merged.modules.values():  # and it shares no memory with them
        result.lora_A.zero_()
        result.lora_B.zero_()
    for module, factor in zip(stack.modules.values(), factors, strict=True):
        assert torch.equal(module.lora_A, factor)
        assert module.lora_B.any()
        module.lora_A.zero_()
        module.lora_B.zero_()
    assert torch.equal(coefficients, given)
    assert [adapter_sha256(adapter) for adapter in adapters.values()] == before


LAWS = {
    "one domain is identity": one_domain_is_identity,
    "permutation": permutation,
    "zero coefficient is absent": zero_coefficient_is_absent,
    "inputs unchanged": inputs_unchanged,
}


# coefficients of a mean count every domain of the stack; linear_merge_of_many leaves absent ones out of it
NOT_OF_COEFFICIENTS = {(name, "zero coefficient is absent") for name in ("average", "linear-by-layer", "livar-style")}


@pytest.mark.parametrize(
    ("method", "law"),
    [
        (name, law)
        for name, row in METHODS.items()
        for law in row.laws
        if row.coefficients and law in LAWS and (name, law) not in NOT_OF_COEFFICIENTS
    ],
)
def test_laws_of_coefficients(method: str, law: str, adapters: dict[str, Adapter]) -> None:
    parameters: dict[str, Any] = {"coefficient": 1.0} if "coefficient" in METHODS[method].parameters else {}
    LAWS[law](lambda stack: method_coefficients(method, stack, **parameters), adapters)


def test_zero_everywhere_keeps_the_layout(adapters: dict[str, Adapter]) -> None:
    stack = stack_adapters(adapters)
    coefficients = torch.ones(3, 4)
    coefficients[:, stack.group_of["top"]] = 0.0
    merged = linear_merge(stack, coefficients)
    assert merged.modules.keys() == LAYOUT.keys()
    top = merged.modules["top"]
    assert top.rank == 1
    assert not top.lora_A.any()
    assert not top.lora_B.any()
    assert top.lora_B.shape == (2, 1)
    assert merged.modules["layer.0.query"].rank == 8


def test_coefficients_of_the_methods(adapters: dict[str, Adapter]) -> None:
    stack = stack_adapters(adapters)
    assert average(stack).tolist() == pytest.approx([1 / 3] * 3)
    assert task_arithmetic(stack, 0.3).tolist() == pytest.approx([0.3] * 3)
    assert method_coefficients("task-arithmetic", stack).tolist() == [0.5] * 3


def changed(adapter: Adapter, name: str, **factors: Any) -> Adapter:
    return Adapter({**adapter.modules, name: replace(adapter.modules[name], **factors)})


@pytest.mark.parametrize(
    ("damage", "error", "values"),
    [
        (lambda a: Adapter({n: m for n, m in a.modules.items() if n != "top"}), LayoutMismatchError, "top"),
        (lambda a: Adapter({**a.modules, "more": a.modules["top"]}), LayoutMismatchError, "more"),
        (lambda a: changed(a, "top", lora_A=torch.ones(3, 7)), LayoutMismatchError, r"top.*\(3, 7\).*\(r, 4\)"),
        (lambda a: changed(a, "top", lora_B=torch.ones(2, 5)), LayoutMismatchError, r"top.*\(2, 5\)"),
        (lambda a: changed(a, "top", lora_B=torch.full((2, 3), torch.nan)), MergeError, "top: 6 .*lora_B"),
        (lambda a: changed(a, "top", scaling=float("inf")), MergeError, "top: 1 .*scaling"),
    ],
)
def test_refuses_by_name(
    adapters: dict[str, Adapter], damage: Callable[[Adapter], Adapter], error: type[Exception], values: str
) -> None:
    with pytest.raises(error, match=rf"'toys'.*{values}"):
        stack_adapters({**adapters, "toys": damage(adapters["toys"])})


def test_refuses_nothing_to_merge() -> None:
    with pytest.raises(MergeError):
        stack_adapters({})
    with pytest.raises(LayoutMismatchError, match="'toys'"):
        stack_adapters({"toys": Adapter({})})


def test_refuses_coefficients(adapters: dict[str, Adapter]) -> None:
    stack = stack_adapters(adapters)
    with pytest.raises(LayoutMismatchError, match=r"\(2,\).*\(3,\).*\(3, 4\)"):
        linear_merge(stack, torch.ones(2))
    with pytest.raises(MergeError, match="tents"):
        linear_merge(stack, np.array([1.0, np.nan, 1.0]))


@pytest.mark.parametrize(
    ("name", "parameters", "values"),
    [
        ("mean", {}, "'mean'.*adamerging, average"),
        ("mergerec", {}, "'mergerec'.*learn_coefficients"),
        ("ties", {}, "'ties'.*merge_adapters"),
        ("average", {"coefficient": 1.0}, "'average'.*coefficient"),
        ("task-arithmetic", {"coefficient": float("nan")}, "coefficient.*nan"),
        ("task-arithmetic", {"coefficient": "1"}, "coefficient.*'1'"),
        ("task-arithmetic", {"coefficient": True}, "coefficient.*True"),
    ],
)
def test_refuses_methods_and_parameters(
    adapters: dict[str, Adapter], name: str, parameters: dict[str, Any], values: str
) -> None:
    with pytest.raises(ConfigError, match=values):
        method_coefficients(name, stack_adapters(adapters), **parameters)


def test_the_config_offers_methods_of_the_table() -> None:
    assert set(get_args(config.MergeMethod)) <= METHODS.keys()
    assert all(row.laws and row.source and row.cost and row.use for row in METHODS.values())
