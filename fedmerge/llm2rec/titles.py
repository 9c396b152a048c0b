"""Items as titles, and histories of titles followed by the next one."""

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from fedmerge.domain.catalog import Catalog
from fedmerge.encoder.backbone import Backbone
from fedmerge.encoder.text import Tokens, cut_text, item_text, tokenise
from fedmerge.errors import BackboneError

TITLE = "title"


def titles_of(catalog: Catalog, tokenizer: PreTrainedTokenizerBase, max_attribute_tokens: int) -> list[str]:
    """Return the title of every item, cut to its limit of tokens; the whole text of an item that has none.

    Args:
        catalog: N items.
        tokenizer: of the backbone.
        max_attribute_tokens: tokens that are read of an attribute without a limit of its own.
    """
    limit = catalog.limits.get(TITLE, max_attribute_tokens)
    titles = catalog.attributes.get(TITLE, ("",) * len(catalog))
    names = tuple(catalog.attributes)
    return [
        cut_text(title, tokenizer, limit)
        if title
        else item_text(
            {name: catalog.attributes[name][row] for name in names},
            tokenizer,
            max_attribute_tokens,
            names,
            catalog.limits,
        )
        for row, title in enumerate(titles)
    ]


def end_token(backbone: Backbone) -> int:
    """Return the end-of-sequence token.

    Raises:
        BackboneError: the tokenizer has none.
    """
    end = backbone.tokenizer.eos_token_id
    if end is None:
        raise BackboneError(
            f"backbone {backbone.name}: its tokenizer has no end-of-sequence token, which ends a title in "
            "train.objective = 'csft'. Take a causal model whose tokenizer has one."
        )
    return int(end)


def next_title_sequences(
    backbone: Backbone, histories: Sequence[Sequence[str]], targets: Sequence[str], max_tokens: int
) -> tuple[list[Tokens], list[int]]:
    """Tokenise histories of titles, ``A, B, C``, each followed by ``D``, a line break and the end of the sequence.

    A sequence that is too long loses the beginning of its history; what the tokenizer puts before a text stays. A title
    that leaves no room for one token of history is cut at its end.

    Args:
        backbone: a decoder.
        histories: b lists of titles, oldest first.
        targets: b titles.
        max_tokens: tokens of the longest sequence.

    Returns:
        b sequences, and how many of the last tokens of each are its target.
    """
    prefix, end = backbone.special.prefix, end_token(backbone)
    room = max(2, max_tokens - len(prefix))
    before = tokenise(backbone.tokenizer, [", ".join(history) for history in histories])
    after = tokenise(backbone.tokenizer, [f"{target}\n" for target in targets])
    sequences, lengths = list[Tokens](), list[int]()
    for history, target in zip(before, after, strict=True):
        predicted = [*target[: room - 2], end]
        kept = history[max(0, len(history) - (room - len(predicted))) :]
        sequences.append(np.concatenate([prefix, np.array([*kept, *predicted], dtype=np.int32)]))
        lengths.append(len(predicted))
    return sequences, lengths
