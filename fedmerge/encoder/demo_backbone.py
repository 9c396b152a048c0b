"""A tiny text encoder for trials without a download: random weights, vocabulary of the demo domains."""

import re
import string
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import BertConfig, BertModel, BertTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from fedmerge import seeding
from fedmerge.domain.demo_words import BRAND_ENDS, BRAND_FORMS, BRAND_STARTS, STAGE_WORDS, STYLES, VOCABULARIES
from fedmerge.errors import BackboneError
from fedmerge.files import share

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CHARACTERS = string.ascii_lowercase + string.digits
WIDTH, NUM_LAYERS, NUM_HEADS, NUM_POSITIONS = 64, 2, 4, 256
NOTE = "Random weights, made by `fedmerge data demo-backbone`: for trying out the software. Its vectors mean nothing."


def write_demo_backbone(folder: Path, *, seed: int = 0) -> Path:
    """Write a BERT with two layers and width 64 as a Hugging Face folder, complete or not at all.

    Its weights are random, so results with it say nothing about any method. Its WordPiece vocabulary contains the words
    of the demo domains and all letters and digits. The same seed gives the same weights.

    Args:
        folder: must be absent or empty; missing parents are created.
        seed: seed of the weights.

    Raises:
        BackboneError: the folder is not empty, or cannot be written.
    """
    folder = folder.expanduser().absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BackboneError(f"{folder}: exists and is not an empty folder. Choose another folder, or delete it.")
    vocabulary = {token: index for index, token in enumerate(_vocabulary())}
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=WIDTH,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        intermediate_size=2 * WIDTH,
        max_position_embeddings=NUM_POSITIONS,
    )
    model = BertModel(config, add_pooling_layer=False)
    _draw_weights(model, seed)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.partial-", dir=folder.parent) as parent:
            partial = Path(parent) / folder.name
            transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # as load_backbone does
            model.save_pretrained(partial)
            for weights in partial.glob("*.safetensors"):
                share(weights)
            BertTokenizer(vocab=vocabulary).save_pretrained(partial)
            (partial / "README.md").write_text(NOTE + "\n", encoding="utf-8")
            partial.rename(folder)  # also replaces an empty folder
    except OSError as error:
        raise BackboneError(
            f"{folder}: the backbone cannot be written ({error}). Check free space and permissions there."
        ) from error
    return folder


def _vocabulary() -> list[str]:
    """List special tokens, punctuation, characters, their continuations, then the words in alphabetical order."""
    continuations = [f"##{character}" for character in CHARACTERS]
    words = {word for text in _texts() for word in re.findall(r"[a-z0-9]+", text.lower())}
    endings = {f"##{ending}" for ending in BRAND_ENDS}
    return [*SPECIAL, *string.punctuation, *CHARACTERS, *continuations, *sorted((words | endings) - {*CHARACTERS})]


def _texts() -> Iterator[str]:
    """Yield all words of items in demo domains; the name of a brand is a start followed by an end."""
    yield from ("title brand category", *BRAND_FORMS, *BRAND_STARTS)
    yield from (word for words in (*STAGE_WORDS, *(style.words for style in STYLES)) for word in words)
    for vocabulary in VOCABULARIES.values():
        yield from (vocabulary.department, *vocabulary.qualifiers, *vocabulary.variants, *vocabulary.style_words)
        for family in vocabulary.families:
            yield from (family.leaf, *family.nouns)


def _draw_weights(model: PreTrainedModel, seed: int) -> None:
    """Draw weights large enough that different texts get clearly different vectors; leave norms and biases."""
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.ndim != 2:
                continue
            bound = (6 / sum(parameter.shape)) ** 0.5  # Xavier
            if "word_embeddings" in name:
                bound = 1.0
            elif "embeddings" in name:
                bound = 0.03
            uniform = seeding.generator(seed, "demo-backbone", name).random(tuple(parameter.shape))
            parameter.copy_(torch.from_numpy(bound * (2 * uniform - 1)))
