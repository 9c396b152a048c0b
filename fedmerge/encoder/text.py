"""Items and histories as tokens: items are tokenised once, and sequences are packed from their tokens."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from fedmerge.config import ATTRIBUTES
from fedmerge.domain.catalog import Catalog
from fedmerge.errors import BackboneError, DomainError

Tokens = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class SpecialTokens:
    """Tokens that a tokenizer puts around a text, ``prefix + text + suffix``, and the id that pads a batch."""

    prefix: Tokens
    suffix: Tokens
    pad: int


@dataclass(frozen=True, eq=False)
class TokenTable:
    """The tokens of all items of a catalog, concatenated.

    Attributes:
        ids: int32 (total,), without special tokens.
        offsets: int64 (N + 1,); item i is ``ids[offsets[i]:offsets[i + 1]]``.
        separator: int32 tokens of ``";"``, placed between two items; every item begins with a blank.
    """

    ids: Tokens
    offsets: npt.NDArray[np.int64]
    separator: Tokens

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def item(self, index: int) -> Tokens:
        """Return the tokens of one item."""
        return self.ids[self.offsets[index] : self.offsets[index + 1]]


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> SpecialTokens:
    """Read the special tokens off a tokenizer of any family.

    Raises:
        BackboneError: the tokenizer's output does not contain a text's own tokens.
    """
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("a")["input_ids"])
    start = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), None)
    if not bare or start is None:
        raise BackboneError(
            f"tokenizer {type(tokenizer).__name__}: its special tokens look like text "
            f"('a' is {bare} alone and {full} in context). Use a backbone with a standard tokenizer."
        )
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    return SpecialTokens(_tokens(full[:start]), _tokens(full[start + len(bare) :]), int(pad))


def build_token_table(catalog: Catalog, tokenizer: PreTrainedTokenizerBase, max_attribute_tokens: int) -> TokenTable:
    """Tokenise a catalog: ``title: … brand: … category: …`` or its own attributes in order, empty ones left out.

    Args:
        catalog: N items.
        tokenizer: tokenizer of the backbone.
        max_attribute_tokens: maximum number of tokens of an attribute's value, without its key, for attributes of which
            the catalog states no limit.

    Raises:
        DomainError: an item without text for a tokenizer without special tokens, so that nothing of it can be encoded.
    """
    pieces: list[list[list[int]]] = []  # attribute -> item -> tokens, key included
    for attribute, texts in catalog.attributes.items():
        # The joined text contains these leading blanks: WordPiece ignores them, byte-level BPE needs them.
        key = _tokenise(tokenizer, [f" {attribute}:"])[0]
        values = _tokenise(tokenizer, [f" {value}" if value else "" for value in texts])
        limit = catalog.limits.get(attribute, max_attribute_tokens)
        pieces.append([key + value[:limit] if value else [] for value in values])
    items = [[token for attribute in item for token in attribute] for item in zip(*pieces, strict=True)]
    offsets = np.zeros(len(items) + 1, dtype=np.int64)
    np.cumsum([len(item) for item in items], out=offsets[1:])
    if not all(items):
        _check_empty_items(catalog.name, [index for index, item in enumerate(items) if not item], len(items), tokenizer)
    flat = np.fromiter((token for item in items for token in item), dtype=np.int32, count=int(offsets[-1]))
    return TokenTable(flat, offsets, _tokens(_tokenise(tokenizer, [";"])[0]))


def item_text(
    attributes: Mapping[str, str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_attribute_tokens: int = 32,
    names: Sequence[str] = ATTRIBUTES,
    limits: Mapping[str, int] | None = None,
) -> str:
    """Return the text of an item, ``title: … brand: … category: …``, for an encoder served outside fedmerge.

    Args:
        attributes: attribute -> value; empty and missing ones are left out.
        tokenizer: tokenizer of the encoder, to cut values as :func:`build_token_table` does; None cuts nothing.
        max_attribute_tokens: maximum number of tokens of a value.
        names: the attributes in the order of the text.
        limits: attribute -> maximum number of tokens of its value, where that is another.

    >>> item_text({"title": "Red tent", "brand": "", "category": "Camping"})
    'title: Red tent category: Camping'
    """
    of_tokens = limits or {}
    present = [(name, attributes[name]) for name in names if attributes.get(name)]
    if tokenizer is not None:
        present = [(name, _cut(value, tokenizer, of_tokens.get(name, max_attribute_tokens))) for name, value in present]
    return " ".join(f"{name}: {value}" for name, value in present)


def sequence_text(item_texts: Sequence[str], max_items: int = 50) -> str:
    """Return the text of a history, most recent item first; the user's vector is its encoding.

    Args:
        item_texts: texts from :func:`item_text`, oldest first.
        max_items: number of most recent items that are read.

    >>> sequence_text(["title: Tent", "title: Stove"])
    'title: Stove; title: Tent'
    """
    return "; ".join(reversed(item_texts[-max_items:]))


def item_sequences(table: TokenTable, special: SpecialTokens, max_tokens: int) -> list[Tokens]:
    """Return one sequence per item of the catalog; item vectors are their encodings."""
    return pack_sequences(table, ([index] for index in range(len(table))), special, 1, max_tokens)


def pack_sequences(
    table: TokenTable,
    histories: Iterable[Sequence[int] | npt.NDArray[np.integer]],
    special: SpecialTokens,
    max_items: int,
    max_tokens: int,
) -> list[Tokens]:
    """Pack histories, most recent item first, items joined by ``"; "``.

    Args:
        table: tokens of the catalog.
        histories: item indices, oldest first; only the last ``max_items`` are read.
        special: tokens around every sequence; they count towards ``max_tokens``.
        max_items: maximum number of items in a sequence.
        max_tokens: maximum number of tokens in a sequence; the oldest are cut.

    Returns:
        One int32 array per history.
    """
    return [
        pack_items([table.item(int(index)) for index in history[-max_items:]], table.separator, special, max_tokens)
        for history in histories
    ]


def pack_items(items: Sequence[Tokens], separator: Tokens, special: SpecialTokens, max_tokens: int) -> Tokens:
    """Pack the tokens of one history's items, oldest first, as :func:`pack_sequences` does."""
    parts: list[Tokens] = [special.prefix]
    left = max_tokens - len(special.prefix) - len(special.suffix)
    for position, item in enumerate(reversed(items)):
        for tokens in (separator, item) if position else (item,):
            parts.append(tokens[:left])
            left -= len(parts[-1])
        if left <= 0:
            break
    parts.append(special.suffix)
    return np.concatenate(parts)


def num_packed(items: Sequence[Tokens], separator: Tokens, special: SpecialTokens, max_tokens: int) -> int:
    """Return how many of the latest items :func:`pack_items` packs; of the oldest of them perhaps a part."""
    left = max_tokens - len(special.prefix) - len(special.suffix)
    for position, item in enumerate(reversed(items)):
        left -= len(separator) * (position > 0)
        if left <= 0:
            return max(position, 1)
        left -= len(item)
    return len(items)


def _check_empty_items(domain: str, empty: list[int], num_items: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse items without tokens, unless the special tokens give them a vector: one for all of them."""
    special = special_tokens(tokenizer)
    if len(special.prefix) + len(special.suffix) == 0:
        rows = ", ".join(map(str, empty[:5])) + (", …" if len(empty) > 5 else "")
        raise DomainError(
            f"domain {domain}: {len(empty)} of {num_items} items have no text, in the rows {rows} of the catalog (from "
            "0), and the backbone's tokenizer adds no special tokens, so there is nothing to encode. Give them a text, "
            "remove them with 'fedmerge data forget --items', or use a backbone whose tokenizer adds special tokens."
        )


def _cut(value: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> str:
    text = f" {value}"
    spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    return value if len(spans) <= max_tokens else text[: spans[max_tokens - 1][1]].removeprefix(" ")


def _tokenise(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _tokens(ids: Sequence[int]) -> Tokens:
    return np.asarray(ids, dtype=np.int32)
