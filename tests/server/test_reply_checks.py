"""Adapters of another layout, or with impossible values, are refused by domain and module."""

import math
from collections.abc import Callable

import pytest
import torch
from adapters import random_adapter

from fedmerge.adapter import Adapter, LoraModule
from fedmerge.config import Lora
from fedmerge.encoder.backbone import Backbone
from fedmerge.encoder.lora import Layout, adapter_of, attach, expected_layout, layout_of
from fedmerge.errors import LayoutMismatchError
from fedmerge.server.reply_checks import check_adapter

LORA = Lora(rank=4, alpha=8, target_modules=("query", "value"))
NAMES = [f"encoder.layer.{layer}.attention.self.{part}" for layer in (0, 1) for part in ("query", "value")]
CHOSEN = NAMES[2]


@pytest.fixture(scope="module")
def layout(backbone: Backbone) -> Layout:
    return expected_layout(backbone, LORA)


@pytest.fixture
def adapter() -> Adapter:
    return random_adapter(dict.fromkeys(NAMES, (32, 32)), 4, 2.0, 0)


def with_module(adapter: Adapter, change: Callable[[LoraModule], LoraModule]) -> Adapter:
    return Adapter({**adapter.modules, CHOSEN: change(adapter.modules[CHOSEN])})


def with_value(tensor: torch.Tensor, value: float) -> torch.Tensor:
    changed = tensor.clone()
    changed[1, 2] = value
    return changed


def test_the_expected_layout_is_that_of_trained_adapters_and_leaves_the_backbone_as_it_was(backbone: Backbone) -> None:
    before = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    layout = expected_layout(backbone, LORA)
    assert dict(layout) == dict.fromkeys(NAMES, ((4, 32), (32, 4), 2.0))
    after = backbone.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    model = attach(backbone, LORA.target_modules, LORA.rank, LORA.alpha, seed=9)
    fresh = adapter_of(model)
    model.unload()
    assert layout_of(fresh) == layout
    check_adapter("shop", fresh, layout)


def test_a_good_adapter_passes(adapter: Adapter, layout: Layout) -> None:
    check_adapter("shop", adapter, layout)


REFUSALS: dict[str, tuple[Callable[[LoraModule], LoraModule], str]] = {
    "NaN in A": (lambda m: LoraModule(with_value(m.lora_A, math.nan), m.lora_B, 2.0), r"\.lora_A .* 1 of 128 values"),
    "inf in B": (lambda m: LoraModule(m.lora_A, with_value(m.lora_B, -math.inf), 2.0), r"\.lora_B .* 1 of 128 values"),
    "float64": (lambda m: LoraModule(m.lora_A.double(), m.lora_B, 2.0), r"\.lora_A is torch.float64"),
    "float16": (lambda m: LoraModule(m.lora_A, m.lora_B.half(), 2.0), r"\.lora_B is torch.float16"),
    "rank": (lambda m: LoraModule(m.lora_A[:3], m.lora_B[:, :3], 2.0), r"lora\.rank"),
    "ranks that differ": (lambda m: LoraModule(m.lora_A[:3], m.lora_B, 2.0), r"\(3, 32\).*\(4, 32\)"),
    "width in": (lambda m: LoraModule(m.lora_A[:, :16], m.lora_B, 2.0), r"\(4, 16\)"),
    "width out": (lambda m: LoraModule(m.lora_A, torch.ones(64, 4), 2.0), r"\(64, 4\)"),
    "scaling": (lambda m: LoraModule(m.lora_A, m.lora_B, 4.0), r"4\.0.*2\.0.*lora\.alpha"),
    "scaling NaN": (lambda m: LoraModule(m.lora_A, m.lora_B, math.nan), "nan"),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_wrong_module_is_refused_by_name(adapter: Adapter, layout: Layout, refusal: str) -> None:
    change, message = REFUSALS[refusal]
    with pytest.raises(LayoutMismatchError, match=message) as caught:
        check_adapter("shop", with_module(adapter, change), layout)
    assert str(caught.value).startswith("domain shop: ")
    assert CHOSEN in str(caught.value)


def test_missing_and_surplus_modules_are_refused_by_name(adapter: Adapter, layout: Layout) -> None:
    fewer = {name: module for name, module in adapter.modules.items() if name != CHOSEN}
    with pytest.raises(LayoutMismatchError, match=rf"domain shop: .*'{CHOSEN}'.*3 modules.* 4\)"):
        check_adapter("shop", Adapter(fewer), layout)
    more = {**adapter.modules, "pooler.dense": adapter.modules[CHOSEN]}
    with pytest.raises(LayoutMismatchError, match=r"domain shop: .*'pooler\.dense'"):
        check_adapter("shop", Adapter(more), layout)
    with pytest.raises(LayoutMismatchError, match=r"0 modules.* 4\)"):
        check_adapter("shop", Adapter({}), layout)
