"""Quantised backbones: what their weights are, adapters on top as on the same weights in float32, what is refused."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import random_adapter
from tiny_families import TINY, layout_of_linear

from fedmerge.config import BackboneSection, ExperimentConfig, Text
from fedmerge.device import resolve_compute
from fedmerge.encoder.adapted import folded
from fedmerge.encoder.backbone import Backbone, open_backbone
from fedmerge.encoder.encode import embed_batch, encode
from fedmerge.encoder.export.folder import export_model
from fedmerge.encoder.loading.quantised import QuantisedLinear, quantise
from fedmerge.encoder.lora import adapter_of, applied, attach
from fedmerge.errors import BackboneError, ConfigError

WITHOUT_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is None
NF4 = pytest.param("nf4", marks=pytest.mark.skipif(WITHOUT_BITSANDBYTES, reason="needs bitsandbytes"))
SEQUENCES = [np.arange(5, 5 + length, dtype=np.int32) for length in (3, 9, 20)]


def opened(folder: Path, precision: str = "float32", **settings: Any) -> Backbone:
    section = BackboneSection(source=str(folder), **settings)
    return open_backbone(section, resolve_compute("cpu", precision))


def in_full(quantised: Backbone, folder: Path) -> Backbone:
    """Return a backbone with ordinary layers of the weights W_q."""
    dense = opened(folder)
    theirs = dict(quantised.model.named_modules())
    for name, layer in dense.model.named_modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight.data = theirs[name].weight.clone()
    return dense


@pytest.fixture(scope="module", params=["bert", "llama"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TINY[request.param].write(tmp_path_factory.mktemp(request.param))


def test_int8_rounds_each_row_to_its_largest_value_over_127() -> None:
    layer = torch.nn.Linear(3, 3, bias=False)
    layer.weight.data = torch.tensor([[1.27, -0.014, 0.006], [0.0, 0.0, 0.0], [-254.0, 3.1, 100.9]])
    quantised = QuantisedLinear(layer, "int8")
    assert quantised.get_buffer("codes").tolist() == [[127, -1, 1], [0, 0, 0], [-127, 2, 50]]
    expected = torch.tensor([[1.27, -0.01, 0.01], [0.0, 0.0, 0.0], [-254.0, 4.0, 100.0]])
    torch.testing.assert_close(quantised.weight, expected)
    x = torch.randn(2, 3, requires_grad=True)
    quantised(x).sum().backward()
    torch.testing.assert_close(x.grad, expected.sum(dim=0).expand(2, 3))


@pytest.mark.parametrize("kind", ["int8", NF4])
def test_vectors_are_near_those_of_full_precision_and_the_hash_says_which(kind: str, folder: Path) -> None:
    plain, quantised = opened(folder), opened(folder, quantisation=kind)
    cosines = (encode(plain, SEQUENCES) * encode(quantised, SEQUENCES)).sum(dim=1)
    assert cosines.min() > (0.999 if kind == "int8" else 0.8)
    assert cosines.max() < 1 - 1e-7
    assert plain.sha256 == opened(folder, quantisation="none").sha256 != quantised.sha256
    linear = [layer for layer in quantised.model.modules() if isinstance(layer, torch.nn.Linear)]
    assert all(type(layer) is QuantisedLinear for layer in linear)
    assert not any(parameter.requires_grad for parameter in quantised.model.parameters())
    names = {name for name, _ in quantised.model.named_parameters()}
    assert all(name.endswith("bias") or "norm" in name.lower() or "embed" in name for name in names)


@pytest.mark.parametrize("kind", ["int8", NF4])
def test_an_adapter_acts_as_on_the_same_weights_in_full_precision(kind: str, folder: Path) -> None:
    quantised = opened(folder, quantisation=kind)
    dense, adapter = in_full(quantised, folder), random_adapter(layout_of_linear(quantised.model), 2, 1.0, 0)
    alone = encode(quantised, SEQUENCES)
    torch.testing.assert_close(alone, encode(dense, SEQUENCES), atol=1e-6, rtol=0)
    with applied(dense, adapter):
        expected = encode(dense, SEQUENCES)
    assert (expected - alone).abs().max() > 0.01
    serving = folded(quantised, adapter)
    with applied(quantised, adapter):
        torch.testing.assert_close(encode(quantised, SEQUENCES), expected, atol=1e-6, rtol=0)
        with applied(quantised, adapter):  # a round's adapter under another one
            pass
        torch.testing.assert_close(encode(quantised, SEQUENCES), expected, atol=1e-6, rtol=0)
    assert torch.equal(encode(quantised, SEQUENCES), alone)
    torch.testing.assert_close(encode(serving, SEQUENCES), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["int8", NF4])
def test_adapters_are_trained_as_on_the_same_weights_in_full_precision(kind: str, folder: Path) -> None:
    quantised = opened(folder, quantisation=kind)
    trained = []
    for backbone in (quantised, in_full(quantised, folder)):
        model = attach(backbone, ("all-linear",), 2, 4, 0)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimiser = torch.optim.SGD(parameters, 0.1)
        for _ in range(3):
            vectors = embed_batch(backbone, SEQUENCES)
            (vectors @ vectors.T).sum().backward()  # type: ignore[no-untyped-call]  # of PyTorch
            optimiser.step()
            optimiser.zero_grad()
        trained.append(adapter_of(model))
        model.unload()
    assert type(next(iter(layer for layer in quantised.model.modules() if isinstance(layer, torch.nn.Linear)))) is (
        QuantisedLinear
    )
    assert trained[0].modules.keys() == trained[1].modules.keys()
    for name, module in trained[0].modules.items():
        torch.testing.assert_close(module.lora_B, trained[1].modules[name].lora_B, atol=1e-5, rtol=1e-4)
    assert any(module.lora_B.abs().max() > 1e-3 for module in trained[0].modules.values())


def test_bfloat16_encodes_near_float32(folder: Path) -> None:
    exact, half = opened(folder, quantisation="int8"), opened(folder, "bfloat16", quantisation="int8")
    assert (encode(exact, SEQUENCES) * encode(half, SEQUENCES)).sum(dim=1).min() > 0.999
    assert embed_batch(half, SEQUENCES).isfinite().all()


def test_the_default_is_no_part_of_a_cache_key() -> None:
    assert "quantisation" not in ExperimentConfig().backbone.cache_inputs()
    assert BackboneSection(quantisation="int8").cache_inputs()["quantisation"] == "int8"


def test_an_export_of_quantised_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"quantised to int8.*Serve it with fedmerge.recommend instead"):
        export_model(opened(folder, quantisation="int8"), None, tmp_path / "out", Text(), {})


@pytest.mark.skipif(not WITHOUT_BITSANDBYTES, reason="bitsandbytes is installed")
def test_nf4_says_what_to_install() -> None:
    with pytest.raises(ConfigError, match=r"bitsandbytes is not installed.*fedmerge\[nf4\].*quantisation = 'int8'"):
        quantise(torch.nn.Sequential(torch.nn.Linear(4, 4)), "nf4")
