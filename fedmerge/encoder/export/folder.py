"""Export a backbone with a folded adapter as a folder that needs no fedmerge."""

import json
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer

from fedmerge.adapter import Adapter
from fedmerge.config import ATTRIBUTES, Text
from fedmerge.domain.catalog import Catalog
from fedmerge.domain.manifest import read_template
from fedmerge.encoder.adapted import folded
from fedmerge.encoder.adapter_records import adapter_record
from fedmerge.encoder.attention import attends_globally
from fedmerge.encoder.backbone import Backbone, check_max_tokens
from fedmerge.encoder.export.card import TEXT_FILE, model_card
from fedmerge.encoder.export.formats import Format, check_format, packages
from fedmerge.encoder.export.graph import write_graph
from fedmerge.encoder.export.probes import Deviation, measure_deviation, probe_texts, prompt_texts
from fedmerge.encoder.loading.models import HAVE_POOLERS
from fedmerge.encoder.text import SpecialTokens, item_text, leading_blank, special_tokens
from fedmerge.errors import BackboneError
from fedmerge.files import check_free, new_folder, read_record, share, write_json, write_text

POOLING_MODES = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens", "last": "pooling_mode_lasttoken"}
_PROBE = {"title": "Red tent, 2 persons", "brand": "North", "category": "Camping"}


def export_model(
    backbone: Backbone,
    adapter: Adapter | None,
    folder: Path,
    text: Text,
    provenance: Mapping[str, Any],
    *,
    to: Format = "sentence-transformers",
    int8: bool = False,
    template: Sequence[str] = ATTRIBUTES,
    catalog: Catalog | None = None,
    license: str | None = None,
    sections: str = "",
    add: Callable[[Path], None] = lambda folder: None,
) -> Deviation:
    """Write W + Δ with tokenizer, pooling, normalisation, limits of the text and a model card, and verify the vectors.

    Then ``SentenceTransformer(folder).encode``, or the graph of :func:`fedmerge.encoder.export.graph.write_graph`, maps
    ``item_text(…)`` to the item's vector, and ``sequence_text(…)`` to the user's.

    Args:
        backbone: unchanged.
        adapter: adapter to fold in; None exports the backbone alone.
        folder: must be absent or empty; written complete or not at all.
        text: ``max_tokens`` becomes ``max_seq_length``; all settings are written into ``text.json``.
        provenance: provenance of the adapter, for ``provenance.json`` and the card.
        to: format of the folder.
        int8: write int8 in place of float32; not with sentence-transformers.
        template: attributes of an item's text and their limits.
        catalog: items to verify the vectors on; None: those of the demo.
        license: for the card, an identifier of the hub such as ``apache-2.0``; None: none is stated.
        sections: more text for the card.
        add: adds files to the folder before it gets its name.

    Returns:
        How far the vectors are from the platform's own; it is in ``provenance.json``, too.

    Raises:
        ConfigError: a package is not installed, or the format has no int8.
        RunDirError: the folder is not empty, or cannot be written.
        LayoutMismatchError: the adapter belongs to another backbone.
        BackboneError: too few positions, the tokenizer splits joined text differently from single items, the model
            or its conventions cannot be written in this format, or its vectors in float32 are others than the
            platform's.
    """
    check_format(to, int8)
    _check_exportable(backbone, text, to)
    check_max_tokens(backbone, text.max_tokens, text.max_items)
    check_free(folder)
    encoder = folded(backbone, adapter)
    record = _text_record(backbone, text, template)
    with new_folder(folder) as partial:
        _write_tokenizer(backbone, partial, text.max_tokens)
        _write_modules(backbone, partial, text.max_tokens, to)
        write_json(partial / TEXT_FILE, record)
        if to == "sentence-transformers":
            encoder.model.save_pretrained(partial)
        else:
            encoder.model.config.save_pretrained(partial)
            write_graph(encoder, partial, to, int8)
        probes = probe_texts(encoder, text, template, catalog)
        deviation = measure_deviation(encoder, partial, text, to, int8, probes)
        export = {
            "to": to,
            "precision": "int8" if int8 else "float32",
            "largest_deviation": deviation.largest,
            "num_texts": deviation.num_texts,
            "packages": {name: version(name) for name in packages(to, int8)},
        }
        write_json(partial / "provenance.json", {**provenance, "export": export})
        what = "as it is" if adapter is None else "with a LoRA adapter folded in"
        card = model_card(backbone, what, to, int8, record, deviation, provenance, license, sections)
        write_text(partial / "README.md", card)
        add(partial)
        for file in sorted(partial.rglob("*")):
            if file.is_file():
                share(file)
    return deviation


def _text_record(backbone: Backbone, text: Text, template: Sequence[str]) -> dict[str, Any]:
    """Return how the text of an item and of a history is made, for programs."""
    limits = read_template(template, "export")
    of_history, of_item = prompt_texts(backbone)
    return {
        "format": 1,
        "attributes": [
            {"name": name, "max_tokens": limit or text.max_attribute_tokens} for name, limit in limits.items()
        ],
        "attribute": "{name}: {value}",
        "attribute_separator": " ",
        "max_items": text.max_items,
        "item_order": "newest first",
        "item_separator": "; ",
        "max_tokens": text.max_tokens,
        "pad_token_id": backbone.special.pad,
        "pooling": backbone.pooling,
        "normalised": True,
        "history_prompt": of_history,
        "item_prompt": of_item,
    }


def _check_exportable(backbone: Backbone, text: Text, to: Format) -> None:
    """Raise BackboneError for conventions that an export has no words for."""
    found = ""
    if text.order == "newest-last":
        found = "text.order = 'newest-last' cuts histories at the beginning, and an exported tokenizer cuts at the end"
    elif backbone.pooling == "mean-text":
        found = "the pooling mean-text leaves prompts out, which an exported model cannot tell from the text"
    elif backbone.quantisation != "none":
        found = f"its weights are quantised to {backbone.quantisation}, which no format of an export has"
    elif backbone.special.attributes is not None:
        found = "it reads keys and values by their types and items by their positions, which a text does not have"
    elif attends_globally(backbone.model):
        found = "its first token has global attention, which an exported model does not give it"
    elif backbone.is_switched and to == "sentence-transformers":
        found = "its attention is switched to both ways, which sentence-transformers does not do; take --to onnx"
    if found:
        raise BackboneError(f"export of {backbone.name} to {to}: {found}. Serve it with fedmerge.recommend instead.")


def provenance_of(folder: Path) -> dict[str, Any]:
    """Read the provenance of an adapter on disk: ``provenance.json``, or for an expert its name and hash."""
    if provenance := read_record(folder / "provenance.json"):
        return provenance
    sha256, name = adapter_record(folder).sha256, folder.resolve().name
    return {"method": "expert", "domains": {name: sha256}, "sha256": sha256} if sha256 else {"adapter": name}


def _write_modules(backbone: Backbone, folder: Path, max_tokens: int, to: Format) -> None:
    """Write the modules under names that every version of sentence-transformers knows."""
    names, paths = ["Transformer", "Pooling", "Normalize"], ["", "1_Pooling", "2_Normalize"]
    size, width = int(backbone.model.config.hidden_size), backbone.width
    if width < size:  # a selection of the first dimensions, as a matrix
        names, paths = [*names[:2], "Dense", "Normalize"], [*paths[:2], "2_Dense", "3_Normalize"]
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{name}"}
        for index, (name, path) in enumerate(zip(names, paths, strict=True))
    ]
    pooling: dict[str, Any] = {"word_embedding_dimension": size}
    pooling |= {key: mode == backbone.pooling for mode, key in POOLING_MODES.items()}
    transformer: dict[str, Any] = {"max_seq_length": max_tokens, "do_lower_case": False}
    if to == "sentence-transformers" and backbone.model.config.model_type in HAVE_POOLERS:  # a graph takes no arguments
        transformer["model_args"] = {"add_pooling_layer": False}
    for path in paths[1:]:
        (folder / path).mkdir()
    write_json(folder / "modules.json", modules)
    write_json(folder / "sentence_bert_config.json", transformer)
    write_json(folder / "1_Pooling" / "config.json", pooling)
    write_json(folder / paths[-1] / "config.json", {})
    if width < size:
        dense: dict[str, Any] = {"in_features": size, "out_features": width, "bias": False}
        dense |= {"activation_function": "torch.nn.modules.linear.Identity"}
        write_json(folder / "2_Dense" / "config.json", dense)
        save_file({"linear.weight": torch.eye(width, size)}, folder / "2_Dense" / "model.safetensors")
    of_history, of_item = prompt_texts(backbone)
    prompts = {"query": of_history, "document": of_item} if of_history or of_item else {}
    write_json(folder / "config_sentence_transformers.json", {"similarity_fn_name": "cosine", "prompts": prompts})


def _write_tokenizer(backbone: Backbone, folder: Path, max_tokens: int) -> None:
    """Write a tokenizer that treats the beginning of a text as if a blank preceded it, as items are tokenised.

    For byte-level BPE, ``title`` with and without a leading blank are different tokens; for WordPiece they are equal.
    With prompts, the blank is part of them. A token that the family appends is appended here, too.
    """
    text, special, prompts = item_text(_PROBE), backbone.special, prompt_texts(backbone)
    within = backbone.tokenizer(f"{leading_blank(backbone.tokenizer)}{text}", add_special_tokens=False)["input_ids"]
    probes = [f"{prompts[1]}{text}", f"{prompts[0]}{text}"]
    starts = (special.before_item, special.before_history)
    expected = [[int(token) for token in (*start, *within, *special.suffix)] for start in starts]

    backbone.tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings |= {"model_max_length": max_tokens, "truncation_side": "right"}
    if backbone.tokenizer.pad_token_id is None:  # other libraries pad batches by name
        settings["pad_token"] = backbone.tokenizer.convert_ids_to_tokens(special.pad)
    definition = folder / "tokenizer.json"
    if len(special.suffix) > len(special_tokens(backbone.tokenizer).suffix) and definition.is_file():
        _write_template(definition, special)
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast"}  # reads tokenizer.json
        write_json(folder / "tokenizer_config.json", settings)
    whole = AutoTokenizer.from_pretrained(folder)
    if not any(prompts) and whole(probes)["input_ids"] != expected and definition.is_file():
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

    found = AutoTokenizer.from_pretrained(folder)(probes)["input_ids"]
    if found != expected:
        raise BackboneError(
            f"export of {backbone.name}: its tokenizer splits {probes} into {found}, expected {expected} as in a "
            "catalog. Serve this backbone with fedmerge.recommend instead."
        )


def _write_template(definition: Path, special: SpecialTokens) -> None:
    """Let a tokenizer's file put these special tokens around every text, within its limit of tokens."""
    tokenizer = Tokenizer.from_file(str(definition))
    before, after = (
        [str(tokenizer.id_to_token(int(token))) for token in part] for part in (special.prefix, special.suffix)
    )
    single = " ".join([*before, "$A", *after])
    ids = [(token, tokenizer.token_to_id(token)) for token in {*before, *after}]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=sorted(ids))
    tokenizer.save(str(definition))
