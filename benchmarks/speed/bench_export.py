"""Speed and deviation of exported encoders: PyTorch, ONNX Runtime and OpenVINO, in float32 and int8.

    python benchmarks/speed/bench_export.py [--items 400] [--backbone FOLDER]

Alternatives: the exported folder in sentence-transformers (PyTorch, float32), which the others are compared with;
``fedmerge.encoder.encode`` in bfloat16, as the platform encodes; the exported graphs. Texts are items of the demo and
histories of one to eight of them, tokenised in each call; batches of 32 are formed by length. A second table has one
history at a time, as a service answers. Deviation is 1 − cosine to float32; nearest is the share of an item's ten
nearest items that are kept.
"""

import argparse
import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from interleaved import arguments, print_table, timed_in_turn

from fedmerge.config import Text
from fedmerge.device import resolve_compute
from fedmerge.domain.demo import generate_domain
from fedmerge.encoder.backbone import Backbone, load_backbone
from fedmerge.encoder.encode import encode
from fedmerge.encoder.export.folder import export_model
from fedmerge.encoder.export.formats import Format
from fedmerge.encoder.export.graph import Encode, graph_encoder
from fedmerge.encoder.text import item_text, sequence_text

BATCH, NEAREST, SINGLE = 32, 10, 20
BASELINE = "sentence-transformers, float32"
GRAPHS: tuple[tuple[str, Format, bool, bool], ...] = (  # name, format, int8, bfloat16
    ("ONNX Runtime, float32", "onnx", False, False),
    ("ONNX Runtime, int8", "onnx", True, False),
    ("OpenVINO, float32", "openvino", False, False),
    ("OpenVINO, bfloat16", "openvino", False, True),
    ("OpenVINO, int8", "openvino", True, False),
)
PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino", "nncf")}


def shop_texts(num_items: int) -> tuple[list[str], list[str]]:
    """Return the texts of items, and of a history for every fourth item."""
    attributes = generate_domain("toys", num_users=1, num_items=num_items).catalog.attributes
    items = [item_text({name: values[row] for name, values in attributes.items()}) for row in range(num_items)]
    rng = np.random.default_rng(0)
    chosen = [rng.integers(0, num_items, rng.integers(1, 9)) for _ in range(num_items // 4)]
    return items, [sequence_text([items[row] for row in rows]) for rows in chosen]


def by_length(encoder: Encode) -> Encode:
    """Encode in batches of similar length."""

    def encode_all(texts: Sequence[str]) -> npt.NDArray[np.float32]:
        order = np.argsort([len(text) for text in texts])
        batches = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
        parts = [encoder([texts[row] for row in batch]) for batch in batches]
        return np.concatenate(parts)[np.argsort(order)]

    return encode_all


def platform(backbone: Backbone, max_tokens: int) -> Encode:
    """Encode as the platform does, from texts."""

    def encode_all(texts: Sequence[str]) -> npt.NDArray[np.float32]:
        ids = backbone.tokenizer(list(texts), truncation=True, max_length=max_tokens)["input_ids"]
        return encode(backbone, [np.array(each, dtype=np.int32) for each in ids]).numpy()

    return encode_all


def nearest(vectors: npt.NDArray[np.float32]) -> list[set[int]]:
    """Return the ten nearest items of every item."""
    scores = vectors @ vectors.T
    np.fill_diagonal(scores, -np.inf)
    return [set(row) for row in np.argpartition(-scores, NEAREST, axis=1)[:, :NEAREST].tolist()]


def main() -> None:
    """Export, compare vectors, then time batches and single histories in turn."""
    parser = arguments(__doc__, repeats=7)
    parser.add_argument("--items", type=int, default=400)
    parser.add_argument("--backbone", default="sentence-transformers/all-MiniLM-L6-v2")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    from sentence_transformers import SentenceTransformer  # noqa: PLC0415  # slow to import

    text = Text()
    items, histories = shop_texts(options.items)
    backbone = load_backbone(options.backbone, "mean", resolve_compute("cpu", "bfloat16"))
    with tempfile.TemporaryDirectory() as name:
        model_folder = Path(name) / "model"
        export_model(backbone, None, model_folder, text, {})
        model = SentenceTransformer(str(model_folder), device="cpu")
        ways: dict[str, Encode] = {
            BASELINE: lambda texts: model.encode(list(texts), batch_size=BATCH),
            "fedmerge, bfloat16": platform(backbone, text.max_tokens),
        }
        for label, to, int8, bfloat16 in GRAPHS:
            if missing := [package for package in PACKAGES[to] if importlib.util.find_spec(package) is None]:
                print(f"{label}: left out, {', '.join(missing)} not installed")
                continue
            folder = Path(name) / f"{to}-{int8}"
            if not folder.exists():
                export_model(backbone, None, folder, text, {}, to=to, int8=int8)
            pad = backbone.special.pad
            encoder = graph_encoder(folder, to, text.max_tokens, pad, threads=options.threads, bfloat16=bfloat16)
            ways[label] = by_length(encoder)
        compare(ways, items, histories)
        measure(ways, [*items, *histories], histories[:SINGLE], options)


def compare(ways: dict[str, Encode], items: list[str], histories: list[str]) -> None:
    """Print deviations from the baseline."""
    wanted = ways[BASELINE]([*items, *histories]).astype(np.float64)
    neighbours = nearest(wanted[: len(items)].astype(np.float32))
    print(f"{'':<32}{'1 − cosine: mean':>18}{'largest':>10}{'nearest kept':>14}")
    for label, encoder in ways.items():
        found = encoder([*items, *histories])
        apart = 1 - (found * wanted).sum(axis=1)
        kept = np.mean([len(a & b) for a, b in zip(nearest(found[: len(items)]), neighbours, strict=True)]) / NEAREST
        print(f"{label:<32}{max(0.0, apart.mean()):>18.1e}{max(0.0, apart.max()):>10.1e}{100 * kept:>12.1f} %")


def measure(ways: dict[str, Encode], texts: list[str], single: list[str], options: argparse.Namespace) -> None:
    """Print the speed of batches, then of one text a call."""

    def one_by_one(encoder: Encode) -> Callable[[], object]:
        return lambda: [encoder([each]) for each in single]

    def at_once(encoder: Encode) -> Callable[[], object]:
        return lambda: encoder(texts)

    for title, call_of, amount in (("batches of 32", at_once, len(texts)), ("one history a call", one_by_one, SINGLE)):
        calls = {label: call_of(encoder) for label, encoder in ways.items()}
        print(f"\n{title}; {options.threads} threads, {options.clock} clock, {options.repeats} turns")
        print_table(timed_in_turn(calls, options.repeats, options.clock), BASELINE, "texts/s", amount)


if __name__ == "__main__":
    main()
