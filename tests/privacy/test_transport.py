"""Transport of adapters: examples by hand, round trips, bytes, and malformed content."""

from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
from adapters import layout_of, random_adapter

from fedmerge.adapter import Adapter, LoraModule, adapter_sha256
from fedmerge.config import Transport
from fedmerge.encoder.backbone import Backbone
from fedmerge.encoder.lora import layout_of as shapes_of
from fedmerge.errors import LayoutMismatchError
from fedmerge.privacy.transport import PIECES, Coding, decode_as_receiver, pack, residual, unpack
from fedmerge.server.reply_checks import adapter_bytes

A = torch.tensor([[1.0, -2.54, 0.0], [0.0, 0.0, 0.0]])
B = torch.tensor([[0.5, 4.0], [1.27, -1.0]])
SMALL = Adapter({"m": LoraModule(A, B, 2.0)})


@pytest.fixture(scope="module")
def trained(backbone: Backbone) -> tuple[Adapter, Adapter]:
    """A start, and the same after a training that changed a little."""
    start = random_adapter(layout_of(backbone, ("query", "value")), 4, 2.0, 0)
    moved = random_adapter(layout_of(backbone, ("query", "value")), 4, 2.0, 1)
    modules = {
        name: LoraModule(m.lora_A + 0.02 * moved.modules[name].lora_A ** 3, moved.modules[name].lora_B, m.scaling)
        for name, m in start.modules.items()
    }
    zero = {name: LoraModule(m.lora_A, torch.zeros_like(m.lora_B), m.scaling) for name, m in start.modules.items()}
    return Adapter(zero), Adapter(modules)


def test_by_hand() -> None:
    levels = pack(SMALL, Coding("int8"))
    assert levels["m.lora_A.levels"].tolist() == [[50, -127, 0], [0, 0, 0]]  # 1 / (2.54 / 127) = 50
    assert levels["m.lora_A.scales"].tolist() == [[pytest.approx(0.02)], [0.0]]
    assert levels["m.lora_B.levels"].tolist() == [[50, 127], [127, -32]]  # each column its own scale
    largest = pack(SMALL, Coding("top-k", 0.5, None))
    assert largest["m.lora_A.positions"].flatten().tolist()[:2] == [0, 1]
    assert largest["m.lora_B.values"].flatten().tolist() == pytest.approx([4.0, 1.27])
    back = decode_as_receiver(SMALL, Coding("top-k", 0.5, None)).modules["m"]
    assert back.lora_B.tolist() == [[0.0, 4.0], [pytest.approx(1.27), 0.0]]
    change = pack(SMALL, Coding("top-k", 0.25, Adapter({"m": LoraModule(A, B + torch.eye(2), 2.0)})))
    assert change["m.lora_B.values"].flatten().tolist() == [-1.0]


@pytest.mark.parametrize(
    ("transport", "bytes_each", "most"),
    [("float32", 4, 0.0), ("float16", 2, 1e-3), ("int8", 1, 0.02), ("top-k", 8, 0.7)],
)
def test_there_and_back(trained: tuple[Adapter, Adapter], transport: Transport, bytes_each: int, most: float) -> None:
    start, adapter = trained
    coding = Coding(transport, 0.25, start if transport == "top-k" else None)
    before = adapter_sha256(adapter)
    received = decode_as_receiver(adapter, coding)
    assert adapter_sha256(adapter) == before
    assert all(module.lora_A.dtype == torch.float32 for module in received.modules.values())
    lost = residual(adapter, received)
    assert lost <= most
    assert (lost == 0) == (transport == "float32")
    numbers = sum(m.lora_A.numel() + m.lora_B.numel() for m in adapter.modules.values())
    share = 0.25 if transport == "top-k" else 1
    assert sum(values.nbytes for values in pack(adapter, coding).values()) <= 1.2 * bytes_each * share * numbers
    if transport == "top-k":  # what training did not change travels for nothing
        assert lost < residual(adapter, decode_as_receiver(adapter, Coding("top-k", 0.25, None)))
        assert residual(adapter, decode_as_receiver(adapter, Coding("top-k", 1.0, start))) < 1e-6


@pytest.mark.parametrize("transport", get_args(Transport))
def test_the_limit_holds_every_honest_adapter(trained: tuple[Adapter, Adapter], transport: Transport) -> None:
    start, adapter = trained
    packed = pack(adapter, Coding(transport, 1.0, start))
    at_most = adapter_bytes(shapes_of(adapter), transport)
    assert at_most / 20 < sum(values.nbytes for values in packed.values()) <= at_most


def test_residuals_of_nothing() -> None:
    nothing = Adapter({"m": LoraModule(A, torch.zeros_like(B), 2.0)})
    assert residual(nothing, decode_as_receiver(nothing, Coding("int8"))) == 0
    assert residual(nothing, SMALL) == float("inf")


Change = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize(
    ("transport", "change", "message"),
    [
        ("int8", lambda p: p.pop("m.lora_A.scales"), r"m.lora_A.scales"),
        (
            "int8",
            lambda p: p.update({"m.lora_A.levels": p["m.lora_A.levels"][:1]}),
            r"int8 .*\(1, 3\)",
        ),
        ("float16", lambda p: p.update({"m.lora_A.half": A.numpy()}), "float32 .*float16"),
        ("top-k", lambda p: p["m.lora_A.positions"].__setitem__(2, 6), "positions .* 0 … 5"),
        ("top-k", lambda p: p["m.lora_A.positions"].__setitem__(0, -1), "positions .* 0 … 5"),
        ("top-k", lambda p: p["m.lora_A.positions"].__setitem__(1, 0), "positions .* 0 … 5"),
        ("top-k", lambda p: p.update({"m.lora_A.values": p["m.lora_A.values"][:1]}), r"float32 .*\(1, 1\)"),
    ],
)
def test_what_no_honest_client_sends(transport: Transport, change: Change, message: str) -> None:
    coding = Coding(transport, 0.5, None)
    packed: dict[str, Any] = {name: np.array(values) for name, values in pack(SMALL, coding).items()}
    change(packed)
    with pytest.raises(LayoutMismatchError, match=message):
        unpack(packed, SMALL, {"m": 2.0}, coding)
    assert set(PIECES) == set(get_args(Transport))


def test_scalings_of_other_modules_are_refused() -> None:
    with pytest.raises(LayoutMismatchError, match=r"'n'"):
        unpack(pack(SMALL, Coding()), SMALL, {"m": 2.0, "n": 1.0}, Coding())
