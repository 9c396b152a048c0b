"""The model card of an exported folder: how its vectors are used without fedmerge, and where it comes from."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fedmerge.encoder.backbone import Backbone
from fedmerge.encoder.export.formats import GRAPH_FILES, Format
from fedmerge.encoder.export.probes import Deviation

TEXT_FILE = "text.json"
FOLDER = "PATH OF THIS FOLDER"
_EXAMPLES: tuple[dict[str, str], ...] = (
    {"title": "Red tent", "brand": "North", "category": "Camping"},
    {"title": "Stove", "brand": "North"},
)
_READ = f"""
FOLDER = "{FOLDER}"
with open(f"{{FOLDER}}/{TEXT_FILE}", encoding="utf-8") as file:
    text = json.load(file)
"""
_IMPORTS: Mapping[Format, tuple[str, ...]] = {
    "sentence-transformers": ("from sentence_transformers import SentenceTransformer",),
    "onnx": ("import numpy as np", "import onnxruntime"),
    "openvino": ("import numpy as np", "import openvino"),
}
_GRAPH = """\
tokenizer = Tokenizer.from_file(f"{FOLDER}/tokenizer.json")
tokenizer.enable_truncation(text["max_tokens"])
tokenizer.enable_padding(pad_id=text["pad_token_id"])
LOAD


def encode(texts):
    batch = tokenizer.encode_batch(texts)
    ids, mask = np.array([each.ids for each in batch]), np.array([each.attention_mask for each in batch])
    inputs = {"input_ids": ids, "attention_mask": mask}
    return RUN

"""
_ONNX = 'session = onnxruntime.InferenceSession(f"{FOLDER}/FILE", providers=["CPUExecutionProvider"])'
_OPENVINO = """\
# When it is imported, OpenVINO reports its use to its makers; "opt_in_out --opt_out" in a shell ends that.
# Without this hint it computes in bfloat16 where the processor has it: faster, 1 - cosine some 5e-5.
model = openvino.compile_model(f"{FOLDER}/FILE", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})"""
_ENCODE: Mapping[Format, tuple[str, str, str]] = {  # code, how a graph is loaded and run
    "sentence-transformers": ("encode = SentenceTransformer(FOLDER).encode\n", "", ""),
    "onnx": (_GRAPH, _ONNX, 'session.run(["sentence_embedding"], inputs)[0]'),
    "openvino": (_GRAPH, _OPENVINO, 'np.array(model(inputs)["sentence_embedding"])'),
}
_TEXTS = """
cutter = Tokenizer.from_file(f"{FOLDER}/tokenizer.json")
cutter.no_truncation()
cutter.no_padding()


def item_text(item):
    parts = []
    for attribute in text["attributes"]:
        name, most = attribute["name"], attribute["max_tokens"]
        if value := item.get(name):
            ends = [end for _, end in cutter.encode(value, add_special_tokens=False).offsets]
            parts.append(f"{name}: {value if len(ends) <= most else value[: ends[most - 1]]}")
    return text["attribute_separator"].join(parts)


def history_text(items):  # oldest first; the text begins with the newest
    return text["item_separator"].join(item_text(item) for item in reversed(items[-text["max_items"] :]))


"""


def encode_recipe(to: Format, imports: Sequence[str] = ()) -> str:
    """Return Python that defines ``FOLDER``, ``text`` and ``encode``, from n texts to vectors (n, d).

    Args:
        to: format of the folder.
        imports: more import statements.
    """
    lines = {*_IMPORTS[to], "from tokenizers import Tokenizer", *imports}
    ordered = sorted(lines, key=lambda line: (line.startswith("from"), line))
    code, load, run = _ENCODE[to]
    code = code.replace("LOAD", load.replace("FILE", GRAPH_FILES.get(to, ""))).replace("RUN", run)
    return "\n".join(["import json", "", *ordered, _READ]) + code


def model_card(
    backbone: Backbone,
    what: str,
    to: Format,
    int8: bool,
    text_record: Mapping[str, Any],
    deviation: Deviation,
    provenance: Mapping[str, Any],
    license: str | None,
    sections: str,
) -> str:
    """Return ``README.md`` of an exported folder.

    Args:
        backbone: without the adapter.
        what: clause about what was exported of it.
        to: format of the folder.
        int8: its precision.
        text_record: content of TEXT_FILE.
        deviation: from the platform's vectors.
        provenance: that of the adapter.
        license: an identifier of the hub, such as ``apache-2.0``; None: none is stated.
        sections: more text, before the provenance.
    """
    examples = _examples([attribute["name"] for attribute in text_record["attributes"]])
    limits = ", ".join(f"`{each['name']}` {each['max_tokens']}" for each in text_record["attributes"])
    precision = "int8" if int8 else "float32"
    front = [
        f"library_name: {to}",
        "pipeline_tag: sentence-similarity",
        *([f"base_model: {json.dumps(backbone.name)}"] if "/" in backbone.name else []),  # of the hub
        *([f"license: {json.dumps(license)}"] if license is not None else []),
        "tags: [sentence-transformers, recommendation, fedmerge]",
    ]
    lines = "\n".join(_facts(provenance))
    return f"""---
{chr(10).join(front)}
---

# A recommender, exported by fedmerge

`{backbone.name}` {what}, in {precision}.
It maps the text of an item, or of a user's history, to a vector of {backbone.width} numbers ({backbone.pooling}
pooling, L2-normalised); the cosine of the two is the score.

```python
{encode_recipe(to)}{_TEXTS}items = {json.dumps(examples, ensure_ascii=False)}
vectors = encode([text["item_prompt"] + item_text(item) for item in items])
scores = vectors @ encode([text["history_prompt"] + history_text(items)])[0]
```

The limits are in `{TEXT_FILE}`. An item's text has its attributes in this order, without empty ones, each value cut to
its number of tokens: {limits}. A history is the text of at most {text_record["max_items"]} items, the most recent
first, joined by `"; "`; the model cuts at {text_record["max_tokens"]} tokens.

{_deviation(deviation, to, int8)}
{sections}
## Where it comes from

- backbone: `{backbone.name}`, SHA-256 over its files `{backbone.sha256}`
- licence: {_license(license)}
{lines}

The full record is in `provenance.json`. Adapters are trained on private interactions and can leak some of them; unless
the training used differential privacy, there is no formal guarantee against it.
"""


def _examples(names: Sequence[str]) -> list[dict[str, str]]:
    known = [{name: value for name, value in item.items() if name in names} for item in _EXAMPLES]
    return known if all(known) else [dict.fromkeys(names, "…"), {names[0]: "…"}]


def _deviation(deviation: Deviation, to: Format, int8: bool) -> str:
    found = (
        f"On {deviation.num_texts} texts the vectors differ from fedmerge's by at most {deviation.largest:.1e} "
        f"(1 − cosine), measured when the folder was written."
    )
    if deviation.is_large:
        return f"**{found} That is much: compare rankings before you use it.**\n"
    return f"{found}\n"


def _license(license: str | None) -> str:
    return "none stated; that of the backbone may bind you, too" if license is None else f"`{license}`"


def _facts(provenance: Mapping[str, Any]) -> list[str]:
    shown = ("method", "parameters", "run", "policy", "excluded", "sha256")
    facts = [f"- {key}: `{json.dumps(provenance[key])}`" for key in shown if provenance.get(key)]
    domains = provenance.get("domains")
    if isinstance(domains, dict):
        facts += ["", "| domain | SHA-256 of its adapter |", "| --- | --- |"]
        facts += [f"| {name} | `{sha256}` |" for name, sha256 in domains.items()]
    return facts
