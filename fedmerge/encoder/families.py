"""Conventions of encoders: those of published families, and those that a model's own files state. Needs no torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedmerge.backbone_files import has_tensor
from fedmerge.config.model import BackboneSection
from fedmerge.errors import BackboneError

TASK = "Given a customer's purchases, retrieve the product bought next"


@dataclass(frozen=True)
class Conventions:
    """How texts become vectors, beside a model's weights and tokenizer; the defaults are the plain ones.

    Attributes:
        pooling: ``cls``, ``mean``, ``mean-text`` (without leading special tokens and prompt) or ``last``.
        history_prompt: text before a history, without the blank that separates them.
        item_prompt: text before an item, without that blank.
        eos: ``tokenizer``, or ``append``: exactly one end-of-sequence token, after truncation.
        attention: ``causal`` or ``both-ways``, which is enforced and tested; None: the model's own.
        dimension: first dimensions that are kept; None: all.
        max_positions: limit of tokens below the model's own; None: no such limit.
        attributes: first attributes of an item that are read, as key and value tokens of their own types at the item's
            position; None: an item is one text.
    """

    pooling: str = "mean"
    history_prompt: str = ""
    item_prompt: str = ""
    eos: str = "tokenizer"
    attention: str | None = None
    dimension: int | None = None
    max_positions: int | None = None
    attributes: int | None = None


PLAIN = Conventions()
FAMILIES: Mapping[str, Conventions] = {
    "plain": PLAIN,
    # BERT, RoBERTa, XLM-R, MPNet, ModernBERT: sentence-transformers' default
    "encoder": Conventions(attention="both-ways"),
    # BLaIR, arXiv:2403.03952: last_hidden_state[:, 0], not the pooler's output
    "blair": Conventions("cls", attention="both-ways", max_positions=512),
    # Llama, SmolLM, Gemma, Qwen, Mistral
    "decoder": Conventions("last", attention="causal"),
    # Qwen3-Embedding, arXiv:2506.05176, and its model card
    "qwen3-embedding": Conventions(
        "last", f"Instruct: {TASK}\nQuery:", eos="append", attention="causal", max_positions=32768
    ),
    # E5-Mistral, arXiv:2401.00368, and its model card
    "e5-mistral": Conventions(
        "last", f"Instruct: {TASK}\nQuery:", eos="append", attention="causal", max_positions=4096
    ),
    # LLM2Vec, arXiv:2404.05961: the instruction is read, but not in the mean
    "llm2vec": Conventions("mean-text", f"{TASK}:", attention="both-ways", max_positions=512),
    # RecFormer, arXiv:2305.13731
    "recformer": Conventions("cls", attention="both-ways", max_positions=1024, attributes=3),
}
ITEM_POSITIONS = "embeddings.item_position_embeddings.weight"  # a tensor that only RecFormer has
DECODERS = (  # model types that attend to earlier tokens alone
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "smollm3",
    "phi",
    "phi3",
    "olmo2",
    "gpt2",
    "gpt_neox",
    "opt",
)
_POOLING = {"cls": "cls", "mean": "mean", "mean_sqrt_len_tokens": "mean", "lasttoken": "last"}  # after normalisation
_KNOWN_MODULES = ("Transformer", "Pooling", "Normalize")


def conventions_of(section: BackboneSection, folder: Path) -> Conventions:
    """Return the conventions of a backbone: its own files' or its family's, and over them those of ``[backbone]``.

    ``auto`` reads sentence-transformers' ``modules.json``, ``1_Pooling/config.json`` and the prompts in
    ``config_sentence_transformers.json`` (``query`` for histories, ``document``, ``passage`` or ``corpus`` for items,
    as ``encode_query`` and ``encode_document`` choose them); where these are missing, decoders pool the last token.

    Args:
        section: ``[backbone]``.
        folder: of the model.

    Raises:
        BackboneError: the files cannot be read, or state what is not supported and not overridden.
    """
    found = _of_files(section, folder) if section.family == "auto" else FAMILIES[section.family]
    given = {
        "pooling": section.pooling,
        "history_prompt": section.history_prompt,
        "item_prompt": section.item_prompt,
        "eos": section.eos,
        "attention": section.attention,
        "dimension": section.dimension,
        "max_positions": section.max_positions,
    }
    known: dict[str, Any] = {key: value for key, value in given.items() if value not in (None, "auto")}
    resolved = replace(found, **known)
    of_history, of_item = (prompt.rstrip(" ") for prompt in (resolved.history_prompt, resolved.item_prompt))
    if resolved.attributes is not None and (of_history or of_item or resolved.eos == "append"):
        raise BackboneError(
            f"backbone {folder}: a RecFormer reads keys and values alone, and [backbone] gives it a prompt or an end "
            "token. Leave history_prompt, item_prompt and eos out."
        )
    return replace(resolved, history_prompt=of_history, item_prompt=of_item)


def check_decoder(model_type: str, name: str, asked: str) -> None:
    """Refuse a model that does not predict tokens.

    Args:
        model_type: ``model_type`` in its ``config.json``.
        name: of the backbone.
        asked: the setting that needs a decoder.

    Raises:
        BackboneError: names the kind of model.
    """
    if model_type not in DECODERS:
        raise BackboneError(
            f"backbone {name}: {asked} predicts tokens, which needs a decoder (one of {', '.join(DECODERS)}), but this "
            f"is a model of type {model_type}. Encoders are trained with train.objective = 'infonce'."
        )


def identity_of(
    conventions: Conventions, *, appends_eos: bool, switched: bool, attends_globally: bool = False
) -> dict[str, Any]:
    """Return what of the conventions changes vectors, compared with the plain ones; empty if nothing does.

    Args:
        conventions: of the backbone.
        appends_eos: whether an end-of-sequence token is appended that the tokenizer does not add.
        switched: whether the direction of the attention is not the model's own.
        attends_globally: whether the first token has global attention beside the windows of the others.
    """
    found: dict[str, Any] = {
        name: getattr(conventions, name)
        for name in ("pooling", "history_prompt", "item_prompt", "dimension", "attributes")
        if getattr(conventions, name) != getattr(PLAIN, name)
    }
    found |= ({"eos": "append"} if appends_eos else {}) | ({"attention": "both-ways"} if switched else {})
    return found | ({"global_attention": "first"} if attends_globally else {})


def is_recformer(folder: Path) -> bool:
    """Return whether the configuration or the names of the tensors in a folder are those of a RecFormer."""
    config = _read(folder / "config.json", {})
    if config.get("model_type") != "longformer":
        return False
    named = [str(name).lower() for name in config.get("architectures") or ()]
    return (
        "max_item_embeddings" in config
        or any(name.startswith("recformer") for name in named)
        or has_tensor(folder, ITEM_POSITIONS)
    )


def _of_files(section: BackboneSection, folder: Path) -> Conventions:
    config = _read(folder / "config.json", {})
    modules = [module for module in _read(folder / "modules.json", []) if isinstance(module, dict)]
    family = FAMILIES["plain"]
    if config.get("model_type") in DECODERS:
        family = replace(FAMILIES["decoder"], attention=None)
    elif is_recformer(folder):
        number, tokens = config.get("max_attr_num"), config.get("max_token_num")
        family = FAMILIES["recformer"]
        family = replace(family, attributes=number or family.attributes, max_positions=tokens or family.max_positions)
    types = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    if strange := [name for name in types if name not in _KNOWN_MODULES]:
        raise BackboneError(
            f"backbone {folder}: modules.json has the modules {', '.join(strange)} beside {', '.join(_KNOWN_MODULES)}, "
            "which fedmerge does not apply. To leave them out, name a family, such as backbone.family = 'encoder'."
        )
    at = next((module.get("path") for module in modules if str(module.get("type", "")).endswith("Pooling")), None)
    pooling = _read(folder / str(at or "1_Pooling") / "config.json", {})
    if pooling and section.pooling == "auto":
        family = replace(family, pooling=_pooling_of(pooling, folder))
    stated = _read(folder / "config_sentence_transformers.json", {})
    prompts = stated["prompts"] if isinstance(stated.get("prompts"), dict) else {}
    return replace(
        family,
        history_prompt=_prompt(prompts, ("query",)),
        item_prompt=_prompt(prompts, ("document", "passage", "corpus")),
    )


def _pooling_of(config: Mapping[str, Any], folder: Path) -> str:
    """Return the pooling of sentence-transformers' configuration, in the form of any of its versions."""
    mode = config.get("pooling_mode")
    if mode is None:
        starts = {"pooling_mode_cls_token": "cls", "pooling_mode_lasttoken": "lasttoken"}
        starts |= {"pooling_mode_mean_tokens": "mean", "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens"}
        starts |= {"pooling_mode_max_tokens": "max", "pooling_mode_weightedmean_tokens": "weightedmean"}
        modes = [name for key, name in starts.items() if config.get(key)]
    else:
        modes = [mode] if isinstance(mode, str) else list(mode)
    if len(modes) != 1 or modes[0] not in _POOLING or not config.get("include_prompt", True):
        prompt = "" if config.get("include_prompt", True) else " without the prompt"
        raise BackboneError(
            f"backbone {folder}: its files state the pooling {' and '.join(map(str, modes)) or 'none'}{prompt}, "
            f"expected one of {', '.join(_POOLING)}. Set backbone.pooling to cls, mean, mean-text or last."
        )
    return _POOLING[modes[0]]


def _prompt(prompts: Mapping[str, Any], names: tuple[str, ...]) -> str:
    return next((str(prompts[name]) for name in names if prompts.get(name) is not None), "")


def _read(file: Path, missing: Any) -> Any:
    """Read a JSON file of the model; ``missing`` if there is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return missing
    except (OSError, ValueError) as error:
        raise BackboneError(f"backbone {file}: cannot be read ({error}). Get the model again.") from error
    if type(found) is not type(missing):
        raise BackboneError(
            f"backbone {file}: holds a {type(found).__name__}, expected a {type(missing).__name__}. "
            "Get the model again."
        )
    return found
