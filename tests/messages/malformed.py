"""Damage honest messages at random and read them as the server does; a program that tells what happened as JSON.

    python tests/messages/malformed.py NUMBER SEED

Whatever arrives, reading raises nothing but the errors of :mod:`fedmerge.errors`, and takes bounded memory.
"""

import json
import re
import resource
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

from fedmerge.adapter import Adapter, LoraModule
from fedmerge.config import Privacy
from fedmerge.domain.catalog import catalog_from_bytes, catalog_to_bytes, make_catalog
from fedmerge.encoder.lora import layout_of
from fedmerge.errors import FedMergeError
from fedmerge.evaluation.ranks import METRICS
from fedmerge.evaluation.sums import VARIANTS, metric_sums
from fedmerge.federated.shared_items import MeanSimilarity
from fedmerge.privacy.secagg.state import Advertisement, Revealed
from fedmerge.server.reply_checks import check_adapter, check_sums
from sim.app.messages import records, secure_sum

ADDRESS_SPACE = 6 * 2**30  # a bomb ends this process, not the machine
NUMBERS = (0, 1, -1, 2**31, 2**53, 2**62, 1.5, float("nan"), float("inf"), 1e300, True)
TEXTS = (
    "",
    "x",
    "\n10:00:00 excluded: books",
    "\x1b[31m",
    "é" * 50,
    "[" * 5000,
    "{" * 5000,
    "NaN",
    "-1",
    "null",
    "a" * 10**5,
)


@dataclass(frozen=True)
class Kind:
    """A kind of message: an honest one, and how the server reads it."""

    honest: RecordDict
    read: Callable[[RecordDict], object]


def adapter() -> Adapter:
    drawn = torch.Generator().manual_seed(0)
    names = ("encoder.0.query", "encoder.0.value")
    return Adapter(
        {n: LoraModule(torch.randn(2, 6, generator=drawn), torch.randn(6, 2, generator=drawn), 0.5) for n in names}
    )


def kinds() -> dict[str, Kind]:
    expert, rng = adapter(), np.random.default_rng(0)
    ids = [f"item {number}" for number in range(40)]
    columns = {"title": [f"title of {one}" for one in ids], "brand": ["a", "b"] * 20, "category": [""] * 40}
    outcomes = {name: rng.random((30, len(METRICS))) for name in ("average", "expert")}
    sums = {variant: metric_sums(outcomes, variant) for variant in VARIANTS}
    report = {
        "steps": 3,
        "best_step": 3,
        "seconds": 1.0,
        "stopped_by": "max_steps",
        "sha256": "a" * 64,
        "privacy": None,
    }
    of_head = {
        "trained": True,
        "reason": "",
        "cached": False,
        "epochs": 9,
        "best_epoch": 4,
        "seconds": 2.5,
        "stopped_by": "patience",
        "weights": {variant: {"head": 0.5, "text": 0.5} for variant in VARIANTS},
    }
    revealed = Revealed({"books": b"a" * 32, "toys": b"b" * 32}, {"beauty": b"c" * 32})
    description = records.Description(
        "books", "train", 30, 40, 300, False, "a" * 64, "b" * 64, "float32", "1", "adapter"
    )

    factors = torch.tensor([[0.6, 0.8], [1.0, 0.0], [0.0, 0.5]], dtype=torch.float16)
    mean = MeanSimilarity(np.array([0, 3, 4]), factors, torch.ones(3, 2, dtype=torch.uint8))

    def read_expert(content: RecordDict) -> None:
        found, _ = records.read_expert(content)
        check_adapter("books", found, layout_of(expert))

    def read_sums(content: RecordDict) -> None:
        check_sums("books", records.read_metric_sums(content), ["average", "expert"], False, (20, 30), Privacy())

    return {
        "description": Kind(records.description_record(description), records.read_description),
        "catalog": Kind(
            records.catalog_record(catalog_to_bytes(make_catalog("books", ids, columns))),
            lambda content: catalog_from_bytes(records.read_catalog(content), "books", 40),
        ),
        "adapter": Kind(records.expert_record(expert, report), read_expert),
        "report": Kind(records.report_record(report), records.read_report),
        "heads": Kind(records.head_reports_record({"merge": of_head}), records.read_head_reports),
        "fitted": Kind(records.fitted_record(2.5), records.read_fitted),
        "sums": Kind(records.metric_sums_record(sums), read_sums),
        "pseudo-users": Kind(records.pseudo_users_record(12), records.read_pseudo_users),
        "layer map": Kind(records.layer_map_record(6, 2.5), records.read_layer_map),
        "layer map request": Kind(
            records.layer_map_request_record(records.LayerMapRequest("a" * 64, 1), (0, 2)),
            records.read_layer_map_request,
        ),
        "similarity": Kind(
            records.similarity_record(factors), lambda content: records.read_similarity(content, (3, 2))
        ),
        "similarity request": Kind(
            records.similarity_request_record(records.SimilarityRequest("a" * 64, 2), mean.items),
            lambda content: records.read_similarity_request(content, 9),
        ),
        "mean similarity": Kind(
            records.weave_request_record(records.WeaveRequest(1, "shared items"), expert, mean),
            lambda content: records.read_mean_similarity(content, 9),
        ),
        "gradient": Kind(records.gradient_record(torch.ones(2, 3)), records.read_gradient),
        "masked": Kind(secure_sum.masked_record(np.arange(50, dtype=np.uint32)), secure_sum.read_masked),
        "keys": Kind(
            secure_sum.advertisement_record(Advertisement(b"a" * 32, b"b" * 32, b"c" * 64)),
            secure_sum.read_advertisement,
        ),
        "shares": Kind(secure_sum.boxes_record({"books": b"x" * 90, "toys": b"y" * 90}), secure_sum.read_boxes),
        "unmasking": Kind(secure_sum.revealed_record(revealed), secure_sum.read_revealed),
        "error": Kind(records.error_record("it failed", "books"), lambda content: None),
    }


def flipped(data: bytes, rng: np.random.Generator) -> bytes:
    """Change some bits, cut off an end, repeat a part, or replace the whole."""
    changed = bytearray(data)
    match int(rng.integers(5)):
        case 0 | 1:
            for _ in range(int(rng.integers(1, 9)) if data else 0):
                changed[int(rng.integers(len(changed)))] ^= 1 << int(rng.integers(8))
        case 2:
            del changed[int(rng.integers(len(changed) + 1)) :]
        case 3:
            at = int(rng.integers(len(changed) + 1))
            changed[at:at] = changed[: int(rng.integers(len(changed) + 1))]
        case _:
            changed = bytearray(rng.bytes(int(rng.integers(200))))
    return bytes(changed)


def spoiled_header(data: bytes, rng: np.random.Generator) -> bytes:
    """Change the text of an array's npy header."""
    length = int.from_bytes(data[8:10], "little")
    header = data[10 : 10 + length].decode("latin1").rstrip()
    texts = [
        header[: int(rng.integers(len(header)))],
        header.replace("(", "(" * int(rng.integers(1, 3000)), 1),
        header.replace(
            "'<f4'", str(rng.choice(["'O'", "'<f999999999'", "[('a','<f4')]", "'|V2147483647'", "None", '"""']))
        ),
        header.replace("False", str(rng.choice(["True", "0", "False, 'more': 1", "'''", "1L", "\\", "f'{1}'"]))),
        header.replace(
            "'shape': (", "'shape': (" + str(rng.choice(["-", "1000000000, ", "2**99, ", "1.5, ", "'x', "])), 1
        ),
        "[" * int(rng.integers(1, 9000)),
        "\n" * 3 + "if 1:\n x\n  y",
        str(rng.bytes(60).decode("latin1")),
    ]
    changed = texts[int(rng.integers(len(texts)))].encode("latin1", "replace")[:60000]
    return data[:8] + len(changed).to_bytes(2, "little") + changed + data[10 + length :]


def harmed(value: Any, rng: np.random.Generator) -> Any:  # noqa: PLR0911  # a case for each type
    """Return another value in the place of one of a record."""
    if isinstance(value, Array):
        data = (spoiled_header if rng.random() < 0.5 else flipped)(value.data, rng)
        dtype = str(rng.choice([value.dtype] * 4 + ["int64", "O", "float16", "<f4"]))
        shape = value.shape if rng.random() < 0.8 else tuple(rng.integers(-5, 2**31, int(rng.integers(4))).tolist())
        return Array(dtype, shape, str(rng.choice([value.stype] * 6 + ["pickle", ""])), data)
    if rng.random() < 0.2:
        return [TEXTS, NUMBERS, (b"", b"x" * 40)][int(rng.integers(3))][int(rng.integers(2))]
    if isinstance(value, bytes):
        return flipped(value, rng)
    if isinstance(value, str):
        if rng.random() < 0.4:
            return TEXTS[int(rng.integers(len(TEXTS)))]
        numbers = list(re.finditer(r"-?\d+(\.\d+)?(e-?\d+)?", value))
        if numbers and rng.random() < 0.6:
            found = numbers[int(rng.integers(len(numbers)))]
            new = str(rng.choice(["1e999", "-1", "NaN", "[]", "null", '"x"', "9" * 400, "{}", "0", "1e308"]))
            return value[: found.start()] + new + value[found.end() :]
        return flipped(value.encode(), rng).decode("utf-8", "replace")
    if isinstance(value, list):
        changed = [*value]
        for _ in range(int(rng.integers(1, 3)) if changed else 0):
            at = int(rng.integers(len(changed)))
            changed[at : at + 1] = [harmed(changed[at], rng)] * int(rng.integers(3))
        return [one for one in changed if type(one) is type(value[0])] if value else value
    return NUMBERS[int(rng.integers(len(NUMBERS)))]


def damaged(honest: RecordDict, rng: np.random.Generator) -> RecordDict:
    """Return a message with one to three harms."""
    parts: dict[str, dict[str, Any]] = {key: dict(record) for key, record in honest.items()}
    made = {key: type(record) for key, record in honest.items()}
    for _ in range(int(rng.integers(1, 4))):
        key = str(rng.choice(sorted(parts)))
        if not parts[key] or rng.random() < 0.05:
            parts.pop(key)
            if not parts:
                break
            continue
        name = str(rng.choice(sorted(parts[key])))
        value = harmed(parts[key].pop(name), rng)
        if rng.random() < 0.95:
            name = name if rng.random() < 0.9 else TEXTS[int(rng.integers(len(TEXTS)))]
            if made[key] is not ArrayRecord or isinstance(value, Array):
                parts[key][name] = value
    return RecordDict({key: made[key](values) for key, values in parts.items()})


def read_all(content: RecordDict, read: Callable[[RecordDict], object]) -> None:
    """Read a message as :mod:`sim.app.server.replies` does."""
    records.size_bytes(content)
    records.read_error(content)
    records.read_error_domain(content)
    records.content_sha256(content)
    list(records.contents(content))
    records.read_signature(content)
    read(content)


def main(number: int, seed: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    warnings.simplefilter("ignore")
    rng, outcomes, crashes, errors = np.random.default_rng(seed), Counter[str](), [], Counter[str]()
    known = kinds()
    for turn in range(number):
        name = sorted(known)[turn % len(known)]
        try:
            made = damaged(known[name].honest, rng)
            content = recorddict_from_proto(ProtoRecordDict.FromString(recorddict_to_proto(made).SerializeToString()))
        except Exception:  # Flower itself refuses it, at either end
            outcomes["not sent"] += 1
            continue
        try:
            read_all(content, known[name].read)
            outcomes["read"] += 1
        except FedMergeError as error:
            outcomes["refused"] += 1
            errors[type(error).__name__] += 1
        except Exception as error:
            crashes.append(f"{name}, message {turn}: {type(error).__name__}: {str(error)[:200]}")
    peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    told = {
        "outcomes": outcomes,
        "errors": errors,
        "crashes": crashes,
        "peak_bytes": int(peak[1]) * 1024 if peak else 0,
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
