"""Export a backbone with a folded adapter as a model folder for sentence-transformers, which needs no fedmerge."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from fedmerge.adapter import Adapter
from fedmerge.config import ATTRIBUTES, Text
from fedmerge.domain.manifest import read_template
from fedmerge.encoder.adapted import folded
from fedmerge.encoder.adapter_records import adapter_record
from fedmerge.encoder.backbone import Backbone, check_max_tokens
from fedmerge.encoder.text import item_text, special_tokens
from fedmerge.errors import BackboneError
from fedmerge.files import check_free, new_folder, read_record, share, write_json, write_text

POOLING_MODES = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens", "last": "pooling_mode_lasttoken"}
_NO_POOLER = ("bert", "roberta", "xlm-roberta")  # loaded without a pooler, which would otherwise be random
_EXAMPLES = ("title: Red tent brand: North category: Camping", "title: Stove brand: North")
_PROBE = {"title": "Red tent, 2 persons", "brand": "North", "category": "Camping"}


def export_model(
    backbone: Backbone,
    adapter: Adapter | None,
    folder: Path,
    text: Text,
    provenance: Mapping[str, Any],
    add: Callable[[Path], None] = lambda folder: None,
    template: Sequence[str] = ATTRIBUTES,
) -> None:
    """Write W + Δ in float32 with tokenizer, pooling, normalisation and a model card.

    Then ``SentenceTransformer(folder).encode(item_text(…))`` is the item's vector, and
    ``SentenceTransformer(folder).encode(sequence_text(…))`` the user's.

    Args:
        backbone: unchanged.
        adapter: adapter to fold in; None exports the backbone alone.
        folder: must be absent or empty; written complete or not at all.
        text: ``max_tokens`` becomes ``max_seq_length``; the other settings are written into the card.
        provenance: provenance of the adapter, for ``provenance.json`` and the card.
        add: adds files to the folder before it gets its name.
        template: attributes of an item's text and their limits, for the card.

    Raises:
        RunDirError: the folder is not empty, or cannot be written.
        LayoutMismatchError: the adapter belongs to another backbone.
        BackboneError: too few positions, or the tokenizer splits joined text differently from single items.
    """
    check_max_tokens(backbone, text.max_tokens)
    check_free(folder)
    model = folded(backbone, adapter).model
    with new_folder(folder) as partial:
        model.save_pretrained(partial)
        _write_tokenizer(backbone, partial, text.max_tokens)
        _write_modules(backbone, partial, text.max_tokens)
        write_json(partial / "provenance.json", dict(provenance))
        what = "as it is" if adapter is None else "with a LoRA adapter folded in"
        write_text(partial / "README.md", _card(backbone, what, text, provenance, template))
        add(partial)
        for weights in partial.glob("*.safetensors"):
            share(weights)


def provenance_of(folder: Path) -> dict[str, Any]:
    """Read the provenance of an adapter on disk: ``provenance.json``, or for an expert its name and hash."""
    if provenance := read_record(folder / "provenance.json"):
        return provenance
    sha256, name = adapter_record(folder).sha256, folder.resolve().name
    return {"method": "expert", "domains": {name: sha256}, "sha256": sha256} if sha256 else {"adapter": name}


def _write_modules(backbone: Backbone, folder: Path, max_tokens: int) -> None:
    """Write the three modules under names that every version of sentence-transformers knows."""
    names = ("Transformer", "Pooling", "Normalize")
    paths = ("", "1_Pooling", "2_Normalize")
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{name}"}
        for index, (name, path) in enumerate(zip(names, paths, strict=True))
    ]
    pooling = {"word_embedding_dimension": backbone.width}
    pooling |= {key: mode == backbone.pooling for mode, key in POOLING_MODES.items()}
    transformer: dict[str, Any] = {"max_seq_length": max_tokens, "do_lower_case": False}
    if backbone.model.config.model_type in _NO_POOLER:
        transformer["model_args"] = {"add_pooling_layer": False}
    for path in paths[1:]:
        (folder / path).mkdir()
    write_json(folder / "modules.json", modules)
    write_json(folder / "sentence_bert_config.json", transformer)
    write_json(folder / "1_Pooling" / "config.json", pooling)
    write_json(folder / "2_Normalize" / "config.json", {})
    write_json(folder / "config_sentence_transformers.json", {"similarity_fn_name": "cosine", "prompts": {}})


def _write_tokenizer(backbone: Backbone, folder: Path, max_tokens: int) -> None:
    """Write a tokenizer that treats the beginning of a text as if a blank preceded it, as items are tokenised.

    For byte-level BPE, ``title`` with and without a leading blank are different tokens; for WordPiece they are equal.
    """
    text, special = item_text(_PROBE), special_tokens(backbone.tokenizer)
    within = backbone.tokenizer(f" {text}", add_special_tokens=False)["input_ids"]
    expected = [int(token) for token in (*special.prefix, *within, *special.suffix)]

    backbone.tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings |= {"model_max_length": max_tokens, "truncation_side": "right"}
    definition = folder / "tokenizer.json"
    if backbone.tokenizer(text)["input_ids"] != expected and definition.is_file():
        tokenizer = json.loads(definition.read_text(encoding="utf-8"))
        if (tokenizer.get("pre_tokenizer") or {}).get("type") == "ByteLevel":
            tokenizer["pre_tokenizer"]["add_prefix_space"] = True
        else:
            own = tokenizer.get("normalizer")
            blank = {"type": "Prepend", "prepend": " "}
            tokenizer["normalizer"] = {"type": "Sequence", "normalizers": [*([own] if own else []), blank]}
        write_json(definition, tokenizer)
        settings |= {"add_prefix_space": True, "tokenizer_class": "PreTrainedTokenizerFast"}  # reads tokenizer.json
    write_json(folder / "tokenizer_config.json", settings)

    found = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    if found != expected:
        raise BackboneError(
            f"export of {backbone.name}: its tokenizer splits {text!r} into {found}, expected {expected} as in a "
            "catalog. Serve this backbone with fedmerge.recommend instead."
        )


def _card(backbone: Backbone, what: str, text: Text, provenance: Mapping[str, Any], template: Sequence[str]) -> str:
    shown = ("method", "parameters", "run", "policy", "excluded", "sha256")
    facts = [f"- {key}: `{json.dumps(provenance[key])}`" for key in shown if provenance.get(key)]
    domains = provenance.get("domains")
    if isinstance(domains, dict):
        facts += ["", "| domain | SHA-256 of its adapter |", "| --- | --- |"]
        facts += [f"| {name} | `{sha256}` |" for name, sha256 in domains.items()]
    lines, limits = "\n".join(facts), read_template(template, "export")
    item = " ".join(f"{name}: …" for name in limits)
    own = "".join(f", that of {name} to {limit}" for name, limit in limits.items() if limit)
    examples = _EXAMPLES if tuple(template) == ATTRIBUTES else (item, item)
    return f"""---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
base_model: {json.dumps(backbone.name)}
tags: [sentence-transformers, recommendation, fedmerge]
---

# A recommender, exported by fedmerge

`{backbone.name}` {what}, in float32. It maps the text of an item, or of a user's history, to a vector of
{backbone.width} numbers ({backbone.pooling} pooling, L2-normalised); the cosine of the two is the score.

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("PATH OF THIS FOLDER")
items = {json.dumps(examples, ensure_ascii=False)}
user = "; ".join(reversed(items))  # most recent first
scores = model.encode(items) @ model.encode(user)
```

Text of an item: `{item}` in this order, empty attributes left out, each value cut to
{text.max_attribute_tokens} tokens{own}. Text of a history: the items' texts, most recent first, joined by `"; "`,
at most {text.max_items} items; the model cuts at {text.max_tokens} tokens.

## Where it comes from

- backbone: `{backbone.name}`, SHA-256 over its files `{backbone.sha256}`
{lines}

The full record is in `provenance.json`. Adapters are trained on private interactions and can leak some of them; unless
the training used differential privacy, there is no formal guarantee against it.
"""
