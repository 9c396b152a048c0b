"""Masked tokens of titles, for masked next-token prediction."""

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from fedmerge.encoder.text import Tokens, tokenise
from fedmerge.errors import BackboneError

MASKED, RANDOM = 0.8, 0.1  # of the chosen tokens; the others are kept
STAND_IN = "_"  # masks where the tokenizer has no mask token


@dataclass(frozen=True, eq=False)
class Title:
    """A title between special tokens.

    Attributes:
        tokens: the whole sequence.
        first, end: positions of the first token that can be predicted, and behind the last one. The first token of a
            sequence cannot: no state comes before it.
    """

    tokens: Tokens
    first: int
    end: int


def mask_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that masks others: the tokenizer's own, else that of ``_``.

    Raises:
        BackboneError: it has neither.
    """
    if tokenizer.mask_token_id is not None:
        return int(tokenizer.mask_token_id)
    found = tokenizer.convert_tokens_to_ids(STAND_IN)
    if isinstance(found, int) and found != tokenizer.unk_token_id:
        return found
    if tokens := tokenise(tokenizer, [STAND_IN])[0]:
        return tokens[-1]
    raise BackboneError(
        f"tokenizer {type(tokenizer).__name__}: it has no mask token and none for {STAND_IN!r}, which mntp.steps needs."
        " Set mntp.steps = 0, or take another backbone."
    )


def masked(
    title: Title, share: float, mask: int, vocabulary: int, rng: np.random.Generator
) -> tuple[Tokens, list[int], list[int]]:
    """Choose tokens of a title at random, and put the mask in place of 80 % of them, any token in place of 10 %.

    Args:
        title: the title.
        share: probability of a token to be chosen.
        mask: token that masks.
        vocabulary: number of tokens to draw from.
        rng: three numbers are drawn for every token of the title.

    Returns:
        The changed sequence, the chosen positions, and the tokens that were there.
    """
    size = title.end - title.first
    chosen, kind, drawn = rng.random(size) < share, rng.random(size), rng.integers(vocabulary, size=size)
    shown = title.tokens[title.first : title.end].copy()
    replaced = chosen & (kind < MASKED + RANDOM)
    shown[replaced] = np.where(kind < MASKED, mask, drawn)[replaced]
    positions = (np.flatnonzero(chosen) + title.first).tolist()
    sequence = np.concatenate([title.tokens[: title.first], shown, title.tokens[title.end :]])
    return sequence, positions, title.tokens[positions].tolist()
