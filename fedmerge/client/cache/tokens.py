"""The cache of a catalog's tokens on the client's own disk: a catalog is tokenised once, not for every message."""

import hashlib
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy.typing as npt
import tokenizers
import transformers
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from fedmerge import __version__
from fedmerge.client.cache.folders import fill_folder, inputs_key, mark_used
from fedmerge.domain.catalog import Catalog
from fedmerge.encoder.backbone import Backbone
from fedmerge.encoder.text import TokenTable, build_token_table
from fedmerge.errors import ClientError

TOKENS_FILE, HASH_FILE = "tokens.safetensors", "sha256"

logger = logging.getLogger(__name__)


def load_or_build_tokens(
    catalog: Catalog, backbone: Backbone, max_attribute_tokens: int, cache_dir: Path
) -> TokenTable:
    """Return the tokens of a catalog: from the cache if the same inputs were tokenised before, else built and cached.

    If they cannot be cached, a warning is logged and the next message tokenises again.

    Args:
        catalog: N items; its hash is part of the cache's key.
        backbone: the encoder with its tokenizer.
        max_attribute_tokens: as for :func:`fedmerge.encoder.text.build_token_table`.
        cache_dir: folder on the client's own disk.
    """
    versions = [__version__, transformers.__version__, tokenizers.__version__]
    inputs = [catalog.sha256, backbone.sha256, max_attribute_tokens, versions]
    folder = cache_dir.expanduser() / "tokens" / f"{catalog.name}-{inputs_key({'inputs': inputs})}"
    if (cached := _read_cached(folder, len(catalog))) is not None:
        mark_used(folder)
        return cached
    table = build_token_table(catalog, backbone.tokenizer, max_attribute_tokens, backbone.special.attributes)

    def write(filled: Path) -> None:
        arrays: dict[str, npt.NDArray[Any]] = {
            "ids": table.ids,
            "offsets": table.offsets,
            "separator": table.separator,
        }
        save_file(arrays, filled / TOKENS_FILE)
        (filled / HASH_FILE).write_text(_sha256(table))

    shutil.rmtree(folder, ignore_errors=True)  # a damaged one
    try:
        fill_folder(
            folder, write, lambda: _read_cached(folder, len(catalog)) is not None, f"domain {catalog.name}: its tokens"
        )
    except ClientError as error:
        logger.warning("%s", error)
    return table


def _read_cached(folder: Path, num_items: int) -> TokenTable | None:
    """Read a cached table; None if it is missing or damaged."""
    try:
        table = TokenTable(**load_file(folder / TOKENS_FILE))
        if _sha256(table) != (folder / HASH_FILE).read_text():
            return None
    except (OSError, SafetensorError, TypeError, ValueError):
        return None
    return table if len(table) == num_items else None


def _sha256(table: TokenTable) -> str:
    digest = hashlib.sha256()
    for part in (table.ids, table.offsets, table.separator):
        digest.update(str((part.dtype, part.shape)).encode() + part.tobytes())
    return digest.hexdigest()
