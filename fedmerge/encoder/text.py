"""Items and histories as tokens: items are tokenised once, and sequences are packed from their tokens.

Tokens are int32 (length,). Those of RecFormer are (length, 3): id, type, and position of the item, 1 for the newest.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from fedmerge.config import ATTRIBUTES
from fedmerge.domain.catalog import Catalog
from fedmerge.errors import BackboneError, DomainError

Tokens = npt.NDArray[np.int32]
Order = Literal["newest-first", "newest-last"]
KEY, VALUE, PADDING = 1, 2, 3  # types of RecFormer's tokens; its first token has type 0
CHUNK = 4096  # items tokenised at a time: a tokenizer's own record of a text takes some kilobytes


def _none() -> Tokens:
    return np.zeros(0, dtype=np.int32)


@dataclass(frozen=True, eq=False)
class SpecialTokens:
    """Tokens around a text, ``prefix + prompt + text + suffix``, and the id that pads a batch.

    Attributes:
        prefix: what the tokenizer puts before a text.
        suffix: what it puts after one, and an end-of-sequence token that the family appends.
        pad: id of the padding.
        history_prompt: tokens of the prompt of histories.
        item_prompt: tokens of the prompt of items.
        attributes: as in :class:`fedmerge.encoder.families.Conventions`; if given, tokens have three columns.
    """

    prefix: Tokens
    suffix: Tokens
    pad: int
    history_prompt: Tokens = field(default_factory=_none)
    item_prompt: Tokens = field(default_factory=_none)
    attributes: int | None = None

    @property
    def before_history(self) -> Tokens:
        """Everything before the text of a history."""
        return np.concatenate([self.prefix, self.history_prompt])

    @property
    def before_item(self) -> Tokens:
        """Everything before the text of an item."""
        return np.concatenate([self.prefix, self.item_prompt])

    @property
    def num_around(self) -> int:
        """The number of tokens around a text, of items or histories, whichever has more."""
        return max(len(self.before_history), len(self.before_item)) + len(self.suffix)

    @property
    def tells_apart(self) -> bool:
        """True if an item as a history of its own begins with other tokens than as an item."""
        return not np.array_equal(self.history_prompt, self.item_prompt)


@dataclass(frozen=True, eq=False)
class TokenTable:
    """The tokens of all items of a catalog, concatenated.

    Attributes:
        ids: int32 (total,) or (total, 3), without special tokens.
        offsets: int64 (N + 1,); item i is ``ids[offsets[i]:offsets[i + 1]]``.
        separator: int32 tokens of ``";"``, placed between two items; every item begins with a blank. RecFormer has
            neither.
    """

    ids: Tokens
    offsets: npt.NDArray[np.int64]
    separator: Tokens

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def item(self, index: int) -> Tokens:
        """Return the tokens of one item."""
        return self.ids[self.offsets[index] : self.offsets[index + 1]]


def special_tokens(
    tokenizer: PreTrainedTokenizerBase,
    history_prompt: str = "",
    item_prompt: str = "",
    append_eos: bool = False,
    attributes: int | None = None,
) -> SpecialTokens:
    """Read the special tokens off a tokenizer of any family, and tokenise the prompts.

    Args:
        tokenizer: of the backbone.
        history_prompt: text before histories. A blank between it and the text is not part of it.
        item_prompt: the same of items.
        append_eos: put an end-of-sequence token behind every text, unless the tokenizer ends it by a token of its own.
        attributes: as in :class:`SpecialTokens`; then there are no prompts, and nothing follows a text.

    Raises:
        BackboneError: the tokenizer's output does not contain a text's own tokens, or it has no end-of-sequence token.
    """
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("a")["input_ids"])
    start = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), None)
    if not bare or start is None:
        raise BackboneError(
            f"tokenizer {type(tokenizer).__name__}: its special tokens look like text "
            f"('a' is {bare} alone and {full} in context). Use a backbone with a standard tokenizer."
        )
    suffix, eos = full[start + len(bare) :], tokenizer.eos_token_id
    if append_eos and not suffix and eos is None:
        raise BackboneError(
            f"tokenizer {type(tokenizer).__name__}: it has no end-of-sequence token, and backbone.eos = 'append' needs "
            "one. Set backbone.eos = 'tokenizer'."
        )
    if append_eos and not suffix:
        suffix = [eos]
    pad = next((i for i in (tokenizer.pad_token_id, eos) if i is not None), 0)
    if attributes is not None:
        nothing = typed([], 0)
        return SpecialTokens(typed(full[:start], 0), nothing, int(pad), nothing, nothing, attributes)
    of_history, of_item = (_prompt_tokens(tokenizer, prompt) for prompt in (history_prompt, item_prompt))
    return SpecialTokens(_tokens(full[:start]), _tokens(suffix), int(pad), of_history, of_item)


@lru_cache(maxsize=8)
def leading_blank(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what begins the text of an item: a blank, or nothing where the tokenizer itself puts one there.

    WordPiece ignores a blank, byte-level BPE needs it, and SentencePiece with a dummy prefix (Llama 2, Mistral) would
    have two.
    """
    first, second, both, blank = tokenise(tokenizer, ["b", "a", "b a", " a"])
    within = both[len(first) :] if both[: len(first)] == first else blank
    return "" if blank != within == second else " "


def _prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str) -> Tokens:
    """Tokenise a prompt as it is in front of a text, without the blank between them."""
    prompt = prompt.rstrip(" ")
    if not prompt:
        return _none()
    whole = tokenise(tokenizer, [f"{prompt} a"])[0]
    text = tokenise(tokenizer, [f"{leading_blank(tokenizer)}a"])[0]
    if whole[len(whole) - len(text) :] != text:
        raise BackboneError(
            f"tokenizer {type(tokenizer).__name__}: the end of the prompt {prompt!r} becomes one token with the text "
            "behind it. Let the prompt end in a punctuation mark."
        )
    return _tokens(whole[: len(whole) - len(text)])


def build_token_table(
    catalog: Catalog,
    tokenizer: PreTrainedTokenizerBase,
    max_attribute_tokens: int,
    attributes: int | None = None,
) -> TokenTable:
    """Tokenise a catalog: ``title: … brand: … category: …`` or its own attributes in order, empty ones left out.

    For RecFormer it is ``title…brand…category…`` without blanks and colons.

    Args:
        catalog: N items.
        tokenizer: tokenizer of the backbone.
        max_attribute_tokens: maximum number of tokens of an attribute's value, without its key, for attributes of which
            the catalog states no limit. RecFormer's key counts.
        attributes: as in :class:`SpecialTokens`.

    Raises:
        DomainError: an item without text for a tokenizer without special tokens, so that nothing of it can be encoded.
    """
    joined = attributes is None
    blank = leading_blank(tokenizer) if joined else ""  # the joined text contains it
    read = dict(list(catalog.attributes.items())[:attributes])
    keys = {name: tokenise(tokenizer, [f"{blank}{name}{':' * joined}"])[0] for name in read}
    parts, lengths = [np.zeros(0, dtype=np.int32)], np.zeros(len(catalog), dtype=np.int64)
    types = list(parts)
    for start in range(0, len(catalog), CHUNK):
        pieces: list[list[list[int]]] = []  # attribute -> item -> tokens, key included
        kinds: list[list[list[int]]] = []  # the types of these tokens
        for attribute, texts in read.items():
            some = texts[start : start + CHUNK]
            values = tokenise(tokenizer, [f"{blank}{value}" if value else "" for value in some])
            limit, key = catalog.limits.get(attribute, max_attribute_tokens), keys[attribute]
            if joined:
                pieces.append([key + value[:limit] if value else [] for value in values])
            else:
                pieces.append([(key + value)[:limit] if value else [] for value in values])
                kinds.append([([KEY] * len(key) + [VALUE] * len(value))[:limit] if value else [] for value in values])
        items = _joined(pieces)
        parts.append(_flat(items))
        types.append(_flat(_joined(kinds)))
        lengths[start : start + CHUNK] = [len(item) for item in items]
    if not lengths.all():
        _check_empty_items(catalog.name, np.flatnonzero(lengths == 0).tolist(), len(catalog), tokenizer)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    flat = np.concatenate(parts)
    if joined:
        return TokenTable(flat, offsets, _separator(tokenizer))
    return TokenTable(typed(flat, np.concatenate(types)), offsets, typed([], 0))


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
        present = [
            (name, cut_text(value, tokenizer, of_tokens.get(name, max_attribute_tokens))) for name, value in present
        ]
    return " ".join(f"{name}: {value}" for name, value in present)


def sequence_text(item_texts: Sequence[str], max_items: int = 50, order: Order = "newest-first") -> str:
    """Return the text of a history; the user's vector is its encoding.

    Args:
        item_texts: texts from :func:`item_text`, oldest first.
        max_items: number of most recent items that are read.
        order: of the items in the text.

    >>> sequence_text(["title: Tent", "title: Stove"])
    'title: Stove; title: Tent'
    """
    read = item_texts[-max_items:]
    return "; ".join(read if order == "newest-last" else reversed(read))


def item_sequences(table: TokenTable, special: SpecialTokens, max_tokens: int) -> list[Tokens]:
    """Return one sequence per item of the catalog, cut at the end; item vectors are their encodings."""
    room = max_tokens - len(special.before_item) - len(special.suffix)
    return [
        np.concatenate([special.before_item, _at(table.item(index)[:room], 1), special.suffix])
        for index in range(len(table))
    ]


def pack_sequences(
    table: TokenTable,
    histories: Iterable[Sequence[int] | npt.NDArray[np.integer]],
    special: SpecialTokens,
    max_items: int,
    max_tokens: int,
    order: Order = "newest-first",
) -> list[Tokens]:
    """Pack histories, items joined by ``"; "``.

    Args:
        table: tokens of the catalog.
        histories: item indices, oldest first; only the last ``max_items`` are read.
        special: tokens around every sequence; they count towards ``max_tokens``.
        max_items: maximum number of items in a sequence.
        max_tokens: maximum number of tokens in a sequence; the oldest are cut.
        order: of the items; ``newest-first`` is cut at the end, ``newest-last`` at the beginning.

    Returns:
        One int32 array per history.
    """
    return [
        pack_items(
            [table.item(int(index)) for index in history[-max_items:]], table.separator, special, max_tokens, order
        )
        for history in histories
    ]


def pack_items(
    items: Sequence[Tokens], separator: Tokens, special: SpecialTokens, max_tokens: int, order: Order = "newest-first"
) -> Tokens:
    """Pack the tokens of one history's items, oldest first, as :func:`pack_sequences` does."""
    parts: list[Tokens] = []
    left = max_tokens - len(special.before_history) - len(special.suffix)
    for position, tokens_of_item in enumerate(reversed(items)):
        item = _at(tokens_of_item, position + 1)
        for tokens in (separator, item) if position else (item,):
            parts.append(tokens[:left] if order == "newest-first" else tokens[max(0, len(tokens) - left) :])
            left -= len(parts[-1])
        if left <= 0:
            break
    text = parts if order == "newest-first" else parts[::-1]
    return np.concatenate([special.before_history, *text, special.suffix])


def num_packed(items: Sequence[Tokens], separator: Tokens, special: SpecialTokens, max_tokens: int) -> int:
    """Return how many of the latest items :func:`pack_items` packs; of the oldest of them perhaps a part."""
    left = max_tokens - len(special.before_history) - len(special.suffix)
    for position, item in enumerate(reversed(items)):
        left -= len(separator) * (position > 0)
        if left <= 0:
            return max(position, 1)
        left -= len(item)
    return len(items)


def typed(ids: Sequence[int] | Tokens, types: int | Tokens) -> Tokens:
    """Return RecFormer's tokens (length, 3) of these ids and types, at item position 0."""
    columns = np.zeros((len(ids), 3), dtype=np.int32)
    columns[:, 0], columns[:, 1] = ids, types
    return columns


def token_ids(tokens: Tokens) -> Tokens:
    """Return the ids (length,) of tokens."""
    return tokens if tokens.ndim == 1 else tokens[:, 0]


def as_item(token: int, special: SpecialTokens) -> Tokens:
    """Return one token in place of an item's, such as the mask."""
    return _tokens([token]) if special.attributes is None else typed([token], VALUE)


def _at(item: Tokens, position: int) -> Tokens:
    """Return an item's tokens at a position in a history; tokens without that column as they are."""
    if item.ndim == 1:
        return item
    return np.column_stack([item[:, :2], np.full(len(item), position, dtype=np.int32)])


def _joined(pieces: Sequence[Sequence[Sequence[int]]]) -> list[list[int]]:
    """Return the tokens of each item from those of attribute -> item."""
    return [[token for attribute in item for token in attribute] for item in zip(*pieces, strict=True)]


def _flat(items: Sequence[Sequence[int]]) -> Tokens:
    return np.fromiter((token for item in items for token in item), dtype=np.int32)


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


def cut_text(value: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> str:
    """Return the beginning of the value of an attribute that its first tokens cover."""
    text = f"{leading_blank(tokenizer)}{value}"
    spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    return value if len(spans) <= max_tokens else text[: spans[max_tokens - 1][1]].removeprefix(" ")


def _separator(tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """Return the tokens of ``";"`` behind a text: SentencePiece would put a blank before one that stands alone."""
    text, both, alone = tokenise(tokenizer, ["a", "a;", ";"])
    within = both[len(text) :]
    return _tokens(within if within and both[: len(text)] == text else alone)


def tokenise(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Return the tokens of texts, without special tokens."""
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _tokens(ids: Sequence[int]) -> Tokens:
    return np.asarray(ids, dtype=np.int32)
