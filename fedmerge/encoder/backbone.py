"""Find, verify and load the frozen text encoder."""

import hashlib
import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedmerge.backbone_files import MINILM, find_backbone
from fedmerge.config.model import BackboneSection
from fedmerge.device import Compute
from fedmerge.encoder.attention import attend_both_ways, attends_globally, check_attention
from fedmerge.encoder.families import PLAIN, Conventions, conventions_of, identity_of
from fedmerge.encoder.loading.models import load
from fedmerge.encoder.loading.quantised import quantise
from fedmerge.encoder.text import SpecialTokens, special_tokens
from fedmerge.errors import BackboneError

logger = logging.getLogger(__name__)

MINILM_WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

_OTHER_FILES = (  # other files that the vectors depend on
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
)


@dataclass(frozen=True, eq=False)
class Backbone:
    """A frozen encoder θ₀.

    Attributes:
        model: a transformers model in float32 and evaluation mode, without parameters that require a gradient.
        tokenizer: its tokenizer.
        special: special tokens around a text.
        pooling: ``cls``, ``mean``, ``mean-text`` or ``last``.
        name: hub id or folder name, as written into the configuration of adapters.
        sha256: hash over weights, configuration and tokenizer files, and over conventions that are not the plain ones
            and a quantisation; equal hashes mean the same encoder.
        compute: device and precision.
        conventions: prompts and others, as far as they are not in the fields above; without ``pooling``.
        is_switched: True if the direction of the attention is not the model's own.
        folder: its files.
        quantisation: ``none``, ``int8`` or ``nf4``.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    special: SpecialTokens
    pooling: str
    name: str
    sha256: str
    compute: Compute
    conventions: Conventions = PLAIN
    is_switched: bool = False
    folder: Path = Path()
    quantisation: str = "none"

    @property
    def record(self) -> dict[str, str | None]:
        """Name and hash, as written into the provenance of adapters."""
        return {"name": self.name, "sha256": self.sha256}

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.compute.device

    @property
    def width(self) -> int:
        """The size d of a vector."""
        return int(self.conventions.dimension or self.model.config.hidden_size)


def load_backbone(source: str, pooling: str, compute: Compute, weights_sha256: str | None = None) -> Backbone:
    """Find, verify and load a backbone with its own conventions and a pooling.

    Args:
        source: see :func:`find_backbone`.
        pooling: as ``backbone.pooling``.
        compute: device and precision.
        weights_sha256: expected SHA-256 of ``model.safetensors``; that of all-MiniLM-L6-v2 is built in.

    Raises:
        BackboneError: see :func:`open_backbone`.
    """
    section = {"source": source, "pooling": pooling, "weights_sha256": weights_sha256}
    return open_backbone(BackboneSection.model_validate(section), compute)


def open_backbone(section: BackboneSection, compute: Compute) -> Backbone:
    """Find, verify and load a backbone.

    Args:
        section: ``[backbone]``.
        compute: device and precision.

    Raises:
        BackboneError: the backbone is not found, damaged, or not the expected one, or its conventions contradict it.
        ConfigError: a quantisation whose package is not installed.
    """
    name, folder = find_backbone(section.source)
    hashes = {path.name: _file_sha256(path) for path in sorted(folder.glob("*.safetensors"))}
    expected = section.weights_sha256 or (MINILM_WEIGHTS_SHA256 if name == MINILM else None)
    if expected and hashes.get("model.safetensors") != expected:
        raise BackboneError(
            f"backbone {folder}: model.safetensors has SHA-256 {hashes.get('model.safetensors')}, expected {expected}. "
            "The file is damaged or belongs to another model: download it again, or correct backbone.weights_sha256."
        )
    hashes |= {file: _file_sha256(folder / file) for file in _OTHER_FILES if (folder / file).is_file()}
    conventions = conventions_of(section, folder)
    model, tokenizer = load(folder, conventions)
    width = int(model.config.hidden_size)
    if conventions.dimension is not None and conventions.dimension > width:
        raise BackboneError(
            f"backbone.dimension = {conventions.dimension}, but the vectors of {name} have {width} numbers. Set it to "
            f"{width} or less, or leave it out."
        )
    model.eval().requires_grad_(False).to(compute.device)
    if section.quantisation != "none":
        quantise(model, section.quantisation)
    special = special_tokens(
        tokenizer,
        conventions.history_prompt,
        conventions.item_prompt,
        append_eos=conventions.eos == "append",
        attributes=conventions.attributes,
    )
    appends_eos = len(special.suffix) > len(special_tokens(tokenizer).suffix)
    switched = conventions.attention == "both-ways" and attend_both_ways(model)
    check_attention(model, special, conventions, name)
    globally = attends_globally(model)
    changes = identity_of(conventions, appends_eos=appends_eos, switched=switched, attends_globally=globally)
    changes |= {"quantisation": section.quantisation} if section.quantisation != "none" else {}
    lines = [f"{file} {digest}" for file, digest in sorted(hashes.items())]
    lines += [f"conventions {json.dumps(changes, sort_keys=True)}"] if changes else []
    identity = hashlib.sha256("\n".join(lines).encode())
    logger.info("backbone %s (%s)%s", name, compute.reason, f", {json.dumps(changes)}" if changes else "")
    return Backbone(
        model,
        tokenizer,
        special,
        conventions.pooling,
        name,
        identity.hexdigest(),
        compute,
        conventions,
        switched,
        folder,
        section.quantisation,
    )


def in_float32(backbone: Backbone) -> Backbone:
    """Return the same encoder, computing in float32 throughout."""
    return replace(backbone, compute=replace(backbone.compute, autocast_dtype=None, reason="float32 is required here"))


def usable_positions(model: torch.nn.Module) -> int | None:
    """Return the number of tokens that a model has positions for; None if it names no limit (relative positions).

    RoBERTa and its relatives (XLM-R, CamemBERT, MPNet, ESM, Longformer …) count positions from behind the index of the
    padding, so their table has fewer usable rows than ``max_position_embeddings``. Their tables know that index, and
    it is not always the configuration's: MPNet has its own.
    """
    stated = getattr(model.config, "max_position_embeddings", None)
    limits = [] if stated is None else [int(stated)]
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if name.rpartition(".")[2] == "position_embeddings" and padding is not None:
            limits.append(module.get_parameter("weight").shape[0] - padding - 1)
    return min(limits, default=None)


def check_max_tokens(backbone: Backbone, max_tokens: int, max_items: int = 1) -> None:
    """Raise if sequences can be longer than the backbone's positions, or have no room for a text.

    Args:
        backbone: the encoder.
        max_tokens: tokens of the longest sequence.
        max_items: most items of a history.

    Raises:
        BackboneError: gives the greatest or the smallest length that works.
    """
    limits = (usable_positions(backbone.model), backbone.conventions.max_positions)
    usable = min((limit for limit in limits if limit is not None), default=None)
    if usable is not None and max_tokens > usable:
        raise BackboneError(
            f"text.max_tokens = {max_tokens}, but {backbone.name} has {usable} positions. "
            f"Set text.max_tokens to {usable} or less."
        )
    places = getattr(backbone.model.config, "max_item_embeddings", None)
    if backbone.special.attributes is not None and places is not None and max_items >= places:
        raise BackboneError(
            f"text.max_items = {max_items}, but {backbone.name} has positions of {places - 1} items. Set "
            f"text.max_items to {places - 1} or less."
        )
    around = backbone.special.num_around
    if max_tokens <= around:
        raise BackboneError(
            f"text.max_tokens = {max_tokens}, but the special tokens and the prompt of {backbone.name} take {around}. "
            f"Set text.max_tokens to more than {around}, or shorten backbone.history_prompt and backbone.item_prompt."
        )


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
