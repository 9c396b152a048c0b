"""Exports to ONNX and OpenVINO give the platform's vectors, in float32 and int8."""

import importlib.util
import json
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from adapters import layout_of, random_adapter
from backbones import llama_config, tiny_bert, tiny_roberta
from run_folders import contents, refusal
from transformers import LlamaModel, MPNetConfig, MPNetModel, PreTrainedModel

from fedmerge.config import Text
from fedmerge.device import resolve_compute
from fedmerge.encoder.adapted import folded
from fedmerge.encoder.backbone import Backbone, load_backbone
from fedmerge.encoder.encode import embed_batch
from fedmerge.encoder.export.folder import export_model
from fedmerge.encoder.export.formats import GRAPH_FILES, Format, check_format
from fedmerge.encoder.export.graph import graph_encoder, write_graph
from fedmerge.encoder.export.probes import FLOAT32_LIMIT
from fedmerge.encoder.text import Tokens
from fedmerge.errors import BackboneError, ConfigError

Capsys = pytest.CaptureFixture[str]
TEXT = Text(max_tokens=40, max_items=3, max_attribute_tokens=6)
TEXTS = ["title: red tent", "title: small wooden toy car brand: kids; title: red tent", "title: a", "stove " * 60]


def needs(*names: str) -> pytest.MarkDecorator:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed")


needs_onnx = needs("onnx", "onnxscript", "onnxruntime")
needs_openvino = needs("onnx", "onnxscript", "openvino", "nncf")


def encoder_of(build: Callable[[Path], Path], pooling: str, folder: Path) -> Backbone:
    return load_backbone(str(build(folder)), pooling, resolve_compute("cpu", "float32"))


def tokens(backbone: Backbone, text: str) -> Tokens:
    """Tokenise a text as it stands in a catalog, cut to TEXT.max_tokens."""
    special = backbone.special
    room = TEXT.max_tokens - len(special.prefix) - len(special.suffix)
    ids = backbone.tokenizer(f" {text}", add_special_tokens=False)["input_ids"][:room]
    return np.array([*special.prefix, *ids, *special.suffix], dtype=np.int32)


def umask() -> int:
    before = os.umask(0o022)
    os.umask(before)
    return before


def check_export(
    build: Callable[[Path], Path], pooling: str, to: Format, int8: bool, atol: float, tmp_path: Path
) -> None:
    """Export a backbone with an adapter, and compare its vectors with ``embed_batch``, one text at a time."""
    backbone = encoder_of(build, pooling, tmp_path / "backbone")
    adapter = random_adapter(layout_of(backbone), 2, 1.0, 0)
    before = logging.root.manager.disable
    deviation = export_model(backbone, adapter, tmp_path / "out", TEXT, {"method": "x"}, to=to, int8=int8)
    assert logging.root.manager.disable == before
    assert {path.parts[0] for path in map(Path, contents(tmp_path / "out"))} == {
        *("1_Pooling", "2_Normalize", "README.md", "config.json", "config_sentence_transformers.json", "modules.json"),
        *("provenance.json", "sentence_bert_config.json", "text.json", "tokenizer.json", "tokenizer_config.json"),
        GRAPH_FILES[to].partition("/")[0],
    }
    encoder = folded(backbone, adapter)
    wanted = torch.cat([embed_batch(encoder, [tokens(backbone, text)]) for text in TEXTS]).detach().numpy()
    encode = graph_encoder(tmp_path / "out", to, TEXT.max_tokens, backbone.special.pad)
    np.testing.assert_allclose(encode(TEXTS), wanted, atol=atol)
    np.testing.assert_allclose(encode(TEXTS[:1]), wanted[:1], atol=atol)  # a text does not depend on the others
    without = embed_batch(backbone, [tokens(backbone, text) for text in TEXTS]).numpy()
    assert np.abs(encode(TEXTS) - without).max() > 4 * np.abs(encode(TEXTS) - wanted).max()
    record = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert record["method"] == "x"
    assert record["export"].items() >= {"to": to, "precision": "int8" if int8 else "float32"}.items()
    assert record["export"]["largest_deviation"] == deviation.largest
    assert (deviation.largest > FLOAT32_LIMIT) == int8
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file():
            assert str(tmp_path).encode() not in path.read_bytes()
            assert b"site-packages" not in path.read_bytes()
            assert path.stat().st_mode & 0o777 == 0o666 & ~umask()


@pytest.mark.long
@needs_onnx
def test_onnx_in_float32(tmp_path: Path) -> None:
    check_export(tiny_bert, "mean", "onnx", False, 1e-5, tmp_path)


@pytest.mark.long
@needs_openvino
def test_openvino_in_int8_without_reports_to_its_makers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # where their reports would be prepared
    monkeypatch.delenv("CI", raising=False)
    (tmp_path / "home").mkdir()
    check_export(tiny_roberta, "last", "openvino", True, 0.02, tmp_path)
    assert contents(tmp_path / "home") == {}


@pytest.mark.slow
@needs_onnx
@needs_openvino
@pytest.mark.parametrize("build", [tiny_bert, tiny_roberta], ids=["bert", "roberta"])
@pytest.mark.parametrize(
    ("pooling", "to", "int8", "atol"),
    [
        ("cls", "onnx", False, 1e-5),
        ("last", "onnx", False, 1e-5),
        ("mean", "onnx", True, 0.05),
        ("mean", "openvino", False, 1e-5),
        ("mean", "openvino", True, 0.02),
    ],
)
def test_every_pooling_and_precision(
    build: Callable[[Path], Path], pooling: str, to: Format, int8: bool, atol: float, tmp_path: Path
) -> None:
    check_export(build, pooling, to, int8, atol, tmp_path)


def tiny_llama() -> PreTrainedModel:
    return LlamaModel(llama_config())


def tiny_mpnet() -> PreTrainedModel:
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return MPNetModel(MPNetConfig(vocab_size=40, **sizes), add_pooling_layer=False)  # type: ignore[arg-type]


@pytest.mark.slow
@needs_onnx
@pytest.mark.parametrize(("build", "pooling"), [(tiny_llama, "last"), (tiny_mpnet, "mean")])
def test_other_families(build: Callable[[], PreTrainedModel], pooling: str, tmp_path: Path) -> None:
    import onnxruntime  # noqa: PLC0415  # optional

    shape = encoder_of(tiny_bert, pooling, tmp_path / "bert")
    torch.manual_seed(0)
    encoder = replace(shape, model=build().train(False).requires_grad_(False))
    write_graph(encoder, tmp_path, "onnx", False)
    session = onnxruntime.InferenceSession(str(tmp_path / GRAPH_FILES["onnx"]))
    for lengths in ((1,), (5, 3, 5), (30, 7)):
        ids = torch.randint(4, 40, (len(lengths), max(lengths)))
        mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
        inputs = {"input_ids": ids.numpy(), "attention_mask": mask.long().numpy()}
        (found,) = session.run(["sentence_embedding"], inputs)
        sequences = [row[:length].numpy().astype(np.int32) for row, length in zip(ids, lengths, strict=True)]
        np.testing.assert_allclose(found, embed_batch(encoder, sequences).numpy(), atol=1e-5)


def test_vectors_that_differ_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    """A hook changes what the platform computes, but not the weights that are written."""
    backbone = encoder_of(tiny_bert, "mean", tmp_path / "backbone")

    def disturb(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        return output + 0.1 * torch.arange(output.shape[-1])

    backbone.model.get_submodule("encoder.layer.1").register_forward_hook(disturb)
    before = contents(tmp_path)
    with pytest.raises(BackboneError, match=r"1 − cosine to fedmerge's own vectors .* expected at most 1e-05"):
        export_model(backbone, None, tmp_path / "out", TEXT, {})
    assert contents(tmp_path) == before


def test_missing_packages_and_int8_without_a_graph_are_refused(
    tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "onnx or openvino" in refusal(capsys, "export", "none", tmp_path / "out", "--int8")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    formats: tuple[Format, ...] = ("onnx", "openvino")
    for to in formats:
        with pytest.raises(ConfigError, match=rf"pip install 'fedmerge\[{to}\]'"):
            check_format(to, False)
    check_format("sentence-transformers", False)
