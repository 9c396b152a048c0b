"""The cache of item vectors on the client's own disk: items are encoded once under each adapter."""

import hashlib
import logging
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fedmerge import __version__
from fedmerge.adapter import Adapter, adapter_sha256
from fedmerge.client.cache.folders import fill_folder, inputs_key
from fedmerge.client.local_domain import LocalDomain
from fedmerge.encoder.encode import encode
from fedmerge.encoder.lora import applied
from fedmerge.errors import ClientError

VECTORS_FILE, HASH_FILE = "vectors.safetensors", "sha256"

logger = logging.getLogger(__name__)


def item_vectors(domain: LocalDomain, adapter: Adapter | None, cache_dir: str) -> torch.Tensor:
    """Return the domain's item vectors: from the cache if the same items were encoded before, else encoded and cached.

    If they cannot be cached, a warning is logged and the next message encodes again.

    Args:
        domain: the client's domain.
        adapter: applied to the backbone; None for the backbone alone.
        cache_dir: folder on the client's own disk.

    Returns:
        float32 (N, d) on the CPU, L2-normalised.
    """
    name, width = domain.manifest.name, domain.backbone.width
    shape = (len(domain.catalog), width)
    folder = Path(cache_dir).expanduser() / "item-vectors" / f"{name}-{_vectors_key(domain, adapter)}"
    if (cached := _read_cached(folder, shape)) is not None:
        return cached
    with applied(domain.backbone, adapter):
        vectors = domain.backbone_item_vectors if adapter is None else encode(domain.backbone, domain.item_sequences)

    def write(filled: Path) -> None:
        save_file({"vectors": vectors}, filled / VECTORS_FILE)
        (filled / HASH_FILE).write_text(_sha256(vectors))

    shutil.rmtree(folder, ignore_errors=True)  # a damaged one
    try:
        fill_folder(folder, write, lambda: _read_cached(folder, shape) is not None, f"domain {name}: its item vectors")
    except ClientError as error:
        logger.warning("%s", error)
    return vectors


def _vectors_key(domain: LocalDomain, adapter: Adapter | None) -> str:
    """Return the key of everything that the vectors depend on; histories are no part of it."""
    backbone, text = domain.backbone, domain.text
    return inputs_key(
        {
            "catalog": domain.manifest.catalog_sha256,
            "backbone": backbone.sha256,
            "pooling": backbone.pooling,
            "text": [text.max_attribute_tokens, text.max_tokens],
            "adapter": "" if adapter is None else adapter_sha256(adapter),
            "precision": backbone.compute.precision,
            "device": str(backbone.device),
            "threads": torch.get_num_threads(),
            "versions": [__version__, torch.__version__],
        }
    )


def _read_cached(folder: Path, shape: tuple[int, int]) -> torch.Tensor | None:
    """Read cached vectors; None if they are missing or damaged."""
    try:
        vectors = load_file(folder / VECTORS_FILE)["vectors"]
        whole = vectors.dtype == torch.float32 and _sha256(vectors) == (folder / HASH_FILE).read_text()
    except (OSError, SafetensorError, LookupError, ValueError):
        return None
    return vectors if whole and tuple(vectors.shape) == shape else None


def _sha256(vectors: torch.Tensor) -> str:
    digest = hashlib.sha256(str(tuple(vectors.shape)).encode())
    digest.update(vectors.contiguous().numpy().data)
    return digest.hexdigest()
