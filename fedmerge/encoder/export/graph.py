"""An encoder as a graph from token ids to its vector: ONNX, and from it OpenVINO; each in float32 or int8."""

import contextlib
import copy
import importlib
import io
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer

from fedmerge.encoder.backbone import Backbone
from fedmerge.encoder.encode import vectors_of
from fedmerge.encoder.export.formats import GRAPH_FILES, Format
from fedmerge.errors import BackboneError

INPUTS, VECTORS = ("input_ids", "attention_mask"), "sentence_embedding"
_OPSET = 20  # the first with GELU; read by ONNX Runtime since 1.17
_AXES = {0: "batch", 1: "tokens"}
_LARGEST_FILE = 1 << 30  # bytes of weights; protobuf ends at 2 GiB, and larger models keep theirs in a second file

Encode = Callable[[Sequence[str]], npt.NDArray[np.float32]]


class _Graph(torch.nn.Module):
    """Token ids (n, tokens) and mask to token vectors (n, tokens, d) and normalised vectors (n, d)."""

    def __init__(self, model: torch.nn.Module, pooling: str, width: int) -> None:
        super().__init__()
        self.model, self.pooling, self.width = model, pooling, width

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return hidden, vectors_of(hidden, attention_mask, self.pooling, self.width)


def write_graph(backbone: Backbone, folder: Path, to: Format, int8: bool) -> None:
    """Write an encoder as a graph, into the folder of an export.

    Its inputs are ``input_ids`` and ``attention_mask`` (n, tokens), padded on the right; its outputs
    ``last_hidden_state`` (n, tokens, d) and ``sentence_embedding`` (n, d), pooled and normalised. In ONNX, int8 is
    ONNX Runtime's dynamic quantisation of weights and activations; in OpenVINO it is NNCF's compression of weights,
    after which OpenVINO quantises activations in groups.

    Args:
        backbone: the encoder, adapter included.
        folder: of the export.
        to: ONNX or OpenVINO.
        int8: otherwise float32.

    Raises:
        BackboneError: the model cannot be expressed as a graph.
    """
    path = folder / GRAPH_FILES[to]
    path.parent.mkdir()
    if to == "onnx" and not int8:
        _write_onnx(backbone, path)
        return
    with _temporary(path.parent) as unfinished:
        _write_onnx(backbone, unfinished / "model.onnx")
        if to == "onnx":
            _quantise(unfinished / "model.onnx", path)
        else:
            _write_openvino(unfinished / "model.onnx", path, int8)


def graph_encoder(
    folder: Path, to: Format, max_tokens: int, pad_id: int, *, threads: int = 0, bfloat16: bool = False
) -> Encode:
    """Load a graph and its tokenizer as an exported folder's own recipe does, without anything of fedmerge's.

    Args:
        folder: of the export.
        to: ONNX or OpenVINO.
        max_tokens: longer texts are cut.
        pad_id: id of the token that pads a batch.
        threads: threads to use; 0 leaves it to ONNX Runtime or OpenVINO.
        bfloat16: let OpenVINO compute in bfloat16 where the processor has it, which is its own default.

    Returns:
        Function from n texts to float32 (n, d).
    """
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(max_tokens)
    tokenizer.enable_padding(pad_id=pad_id)
    path = folder / GRAPH_FILES[to]
    run = _onnx_runtime(path, threads) if to == "onnx" else _openvino(path, threads, bfloat16)

    def encode(texts: Sequence[str]) -> npt.NDArray[np.float32]:
        batch = tokenizer.encode_batch(list(texts))
        return run(np.array([each.ids for each in batch]), np.array([each.attention_mask for each in batch]))

    return encode


def _onnx_runtime(path: Path, threads: int) -> Callable[..., npt.NDArray[np.float32]]:
    import onnxruntime  # noqa: PLC0415  # an optional package

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda *arrays: np.asarray(session.run([VECTORS], dict(zip(INPUTS, arrays, strict=True)))[0])


def _openvino(path: Path, threads: int, bfloat16: bool) -> Callable[..., npt.NDArray[np.float32]]:
    settings: dict[str, Any] = {} if bfloat16 else {"INFERENCE_PRECISION_HINT": "f32"}
    settings |= {"INFERENCE_NUM_THREADS": threads} if threads else {}
    model = _import_silently("openvino").compile_model(str(path), "CPU", settings)
    return lambda *arrays: np.array(model(dict(zip(INPUTS, arrays, strict=True)))[VECTORS])


def _write_onnx(backbone: Backbone, path: Path) -> None:
    """Write ONNX in float32, the same bytes for the same weights and packages."""
    model = backbone.model if backbone.device.type == "cpu" else copy.deepcopy(backbone.model).cpu()
    ids = torch.full((2, 8), backbone.special.pad, dtype=torch.int64)  # an example; all sizes are variable
    graph = _Graph(model, backbone.pooling, backbone.width).eval()
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                graph,
                (ids, torch.ones_like(ids)),
                input_names=INPUTS,
                output_names=("last_hidden_state", VECTORS),
                dynamic_shapes=(_AXES, _AXES),
                opset_version=_OPSET,
                dynamo=True,
                verbose=False,
            )
    except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BackboneError(
            f"export of {backbone.name}: PyTorch cannot write this model as ONNX ({reason}). Export to "
            "sentence-transformers instead."
        ) from error
    if program is None:  # only without dynamo
        raise BackboneError(f"export of {backbone.name}: PyTorch wrote no ONNX. Export to sentence-transformers.")
    _strip(program.model)
    size = sum(parameter.nbytes for parameter in model.parameters())
    program.save(path, external_data=size > _LARGEST_FILE)


def _strip(model: Any) -> None:
    """Remove what PyTorch notes of its own work: traces of the stack, which name folders of this machine."""
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values(), model.graph, model):
        value.metadata_props.clear()


def _quantise(source: Path, path: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic  # noqa: PLC0415  # an optional package

    with _quiet():
        quantize_dynamic(
            source,
            path,
            weight_type=QuantType.QInt8,
            per_channel=True,
            # Products of 8 bits overflow on processors without VNNI, and nobody would notice: take 7.
            reduce_range=True,
            use_external_data_format=source.with_suffix(".onnx.data").exists(),
        )


def _write_openvino(source: Path, path: Path, int8: bool) -> None:
    openvino = _import_silently("openvino")
    model = openvino.Core().read_model(source)
    if int8:
        with _quiet():
            nncf = _import_silently("nncf")
            model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
    openvino.save_model(model, path, compress_to_fp16=False)


def _import_silently(name: str) -> Any:
    """Import OpenVINO or NNCF, which report their use to their makers from the import on, without these reports."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # None: as if not installed
    os.environ.setdefault("NNCF_CI", "1")  # NNCF's own switch
    return importlib.import_module(name)


@contextlib.contextmanager
def _temporary(parent: Path) -> Iterator[Path]:
    folder = parent / ".partial"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide warnings, log lines and progress bars of packages about their own work."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
