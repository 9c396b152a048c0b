"""Compare the vectors of an exported folder with the platform's own, on texts of items and histories."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedmerge.config import BackboneSection, Text
from fedmerge.device import resolve_compute
from fedmerge.domain.catalog import Catalog, make_catalog
from fedmerge.domain.demo_words import BRAND_ENDS, BRAND_STARTS, STYLES, VOCABULARIES
from fedmerge.domain.manifest import read_template
from fedmerge.encoder.backbone import Backbone, in_float32, open_backbone
from fedmerge.encoder.encode import encode
from fedmerge.encoder.export.formats import Format
from fedmerge.encoder.export.graph import Encode, graph_encoder
from fedmerge.encoder.text import item_text, leading_blank, sequence_text
from fedmerge.errors import BackboneError

FLOAT32_LIMIT = 1e-5  # 1 − cosine; rounding alone gives 1e-6 at most
INT8_LIMIT = 0.01
_ITEMS, _HISTORIES = 24, 8


@dataclass(frozen=True)
class Probes:
    """Texts of items and of histories, without prompts."""

    items: list[str]
    histories: list[str]


@dataclass(frozen=True)
class Deviation:
    """How far an export's vectors are from the platform's own.

    Attributes:
        largest: largest 1 − cosine.
        num_texts: number of texts that were compared.
        limit: what is usual for the precision.
    """

    largest: float
    num_texts: int
    limit: float

    @property
    def is_large(self) -> bool:
        """True above the limit."""
        return not self.largest <= self.limit  # also for NaN


def measure_deviation(encoder: Backbone, folder: Path, text: Text, to: Format, int8: bool, probes: Probes) -> Deviation:
    """Encode texts with an exported folder as its users will, and with the platform's encoder in float32.

    Args:
        encoder: what was exported, adapter included.
        folder: of the export.
        text: only ``max_tokens`` is used.
        to: format of the folder.
        int8: precision of the folder.
        probes: of :func:`probe_texts`.

    Raises:
        BackboneError: vectors in float32 that differ by more than FLOAT32_LIMIT.
    """
    special, texts = encoder.special, [*probes.items, *probes.histories]
    starts = [special.before_item] * len(probes.items) + [special.before_history] * len(probes.histories)
    blank = leading_blank(encoder.tokenizer)
    within = encoder.tokenizer([f"{blank}{each}" for each in texts], add_special_tokens=False, verbose=False)
    sequences = [
        np.array([*start, *ids[: text.max_tokens - len(start) - len(special.suffix)], *special.suffix], dtype=np.int32)
        for start, ids in zip(starts, within["input_ids"], strict=True)
    ]
    wanted = encode(in_float32(encoder), sequences).double().numpy()
    of_history, of_item = prompt_texts(encoder)
    prompted = [f"{of_item}{each}" for each in probes.items] + [f"{of_history}{each}" for each in probes.histories]
    if to == "sentence-transformers":
        found = _reloaded(encoder, folder, text.max_tokens)(prompted)
    else:
        found = graph_encoder(folder, to, text.max_tokens, encoder.special.pad)(prompted)
    products = (found * wanted).sum(axis=1) / np.linalg.norm(found, axis=1) / np.linalg.norm(wanted, axis=1)
    largest = float(np.max(1 - products))
    deviation = Deviation(max(0.0, largest), len(texts), INT8_LIMIT if int8 else FLOAT32_LIMIT)
    if deviation.is_large and not int8:
        raise BackboneError(
            f"export of {encoder.name} to {to}: 1 − cosine to fedmerge's own vectors is up to {largest:.1e}, expected "
            f"at most {FLOAT32_LIMIT:.0e}. Export to another format, and report this backbone."
        )
    return deviation


def prompt_texts(encoder: Backbone) -> tuple[str, str]:
    """Return what goes before the texts of histories and of items in an export, the blank between them included.

    Without prompts both are empty: the exported tokenizer puts the blank before a text where that matters.
    """
    conventions = encoder.conventions
    if not (conventions.history_prompt or conventions.item_prompt):
        return "", ""
    blank = leading_blank(encoder.tokenizer)
    history, item = (
        f"{prompt} " if prompt else blank for prompt in (conventions.history_prompt, conventions.item_prompt)
    )
    return history, item


def probe_texts(encoder: Backbone, text: Text, template: Sequence[str], catalog: Catalog | None) -> Probes:
    """Return texts of items spread over a catalog, and of histories of them; without one, of items of the demo."""
    items = _demo(template) if catalog is None else catalog
    rows = np.unique(np.linspace(0, len(items) - 1, _ITEMS).astype(int))
    texts = [
        item_text(
            {name: values[row] for name, values in items.attributes.items()},
            encoder.tokenizer,
            text.max_attribute_tokens,
            tuple(items.attributes),
            items.limits,
        )
        for row in rows
    ]
    texts = [each for each in texts if each]
    return Probes(texts, [sequence_text(texts[:: number + 1], text.max_items) for number in range(_HISTORIES)])


def _demo(template: Sequence[str]) -> Catalog:
    """Return items made of the demo's words, whose attributes have the names of a template."""
    words, families = VOCABULARIES["toys"], VOCABULARIES["toys"].families
    columns: list[list[str]] = [[], [], []]  # title, brand, category
    for number in range(_ITEMS):
        family = families[number % len(families)]
        style, noun = STYLES[number % len(STYLES)].words[number % 4], family.nouns[number // len(families)]
        title = f"{style} {words.qualifiers[number % 12]} {noun}, {words.variants[number % 12]}"
        brand = f"{BRAND_STARTS[number % 24]}{BRAND_ENDS[number % 16]}" if number % 8 else ""
        for column, value in zip(columns, (title, brand, f"{words.department} > {family.leaf}"), strict=True):
            column.append(value)
    limits = read_template(template, "export")
    renamed = {name: columns[place % len(columns)] for place, name in enumerate(limits)}
    ids = [f"item-{number}" for number in range(_ITEMS)]
    return make_catalog("demo", ids, renamed, {name: limit for name, limit in limits.items() if limit})


def _reloaded(encoder: Backbone, folder: Path, max_tokens: int) -> Encode:
    """Load the weights and the tokenizer of a sentence-transformers folder."""
    stated = {"source": str(folder), "family": "plain", "pooling": encoder.pooling}
    section = BackboneSection.model_validate({**stated, "dimension": encoder.conventions.dimension})
    loaded = open_backbone(section, resolve_compute("cpu", "float32"))

    def vectors(texts: Sequence[str]) -> npt.NDArray[np.float32]:
        sequences = [
            np.array(loaded.tokenizer(each, truncation=True, max_length=max_tokens)["input_ids"], dtype=np.int32)
            for each in texts
        ]
        return encode(loaded, sequences).numpy()

    return vectors
