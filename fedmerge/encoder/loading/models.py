"""Load model and tokenizer from a folder."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from fedmerge.encoder.families import Conventions, is_recformer
from fedmerge.encoder.loading.recformer import RecFormerModel, complete
from fedmerge.errors import BackboneError

HAVE_POOLERS = ("bert", "roberta", "xlm-roberta", "camembert", "mpnet", "longformer")


def load(folder: Path, conventions: Conventions) -> tuple[Any, PreTrainedTokenizerBase]:
    """Load model and tokenizer, without transformers' progress bar and its report on BERT's unused pooler.

    Args:
        folder: of the model.
        conventions: those that read an item's attributes load a RecFormer.

    Raises:
        BackboneError: transformers cannot load it, weights are missing, or it is a RecFormer read as another model.
    """
    recformer = conventions.attributes is not None
    if recformer != is_recformer(folder):
        found, family = ("no RecFormer", "encoder") if recformer else ("a RecFormer", "recformer")
        raise BackboneError(
            f"backbone {folder}: its files are those of {found}. Set backbone.family = {family!r}, or 'auto'."
        )
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # of transformers
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        config = AutoConfig.from_pretrained(folder)
        kind: Any = RecFormerModel if recformer else AutoModel
        config = complete(config) if recformer else config
        # The pooler of BERT-like models is never used here and must not count among "all linear layers".
        bare = {"add_pooling_layer": False} if config.model_type in HAVE_POOLERS else {}
        model, loading = kind.from_pretrained(
            folder, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **bare
        )
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise BackboneError(f"backbone {folder}: transformers cannot load it: {error}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    absent = sorted(key for key in loading["missing_keys"] if "pooler" not in key)  # transformers draws them at random
    if absent:
        raise BackboneError(
            f"backbone {folder}: the weights lack {', '.join(absent[:3])} ({len(absent)} in all). "
            "Download the model again."
        )
    return model, tokenizer
