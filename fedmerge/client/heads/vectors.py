"""The cache of item vectors on the client's own disk: items are encoded once under each adapter."""

import logging
from pathlib import Path

import torch

from fedmerge import __version__
from fedmerge.adapter import Adapter, adapter_sha256
from fedmerge.client.cache.folders import inputs_key
from fedmerge.client.local_domain import LocalDomain
from fedmerge.encoder.encode import encode
from fedmerge.encoder.lora import applied
from fedmerge.errors import ClientError
from fedmerge.tensor_files import read_tensors, write_tensors

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
    name, shape = domain.manifest.name, (len(domain.catalog), domain.backbone.width)
    path = Path(cache_dir).expanduser() / "item-vectors" / f"{name}-{_vectors_key(domain, adapter)}.safetensors"
    if (cached := read_tensors(path)) is not None and tuple(cached[0]["vectors"].shape) == shape:
        return cached[0]["vectors"]
    with applied(domain.backbone, adapter):
        vectors = domain.backbone_item_vectors if adapter is None else encode(domain.backbone, domain.item_sequences)
    try:
        write_tensors(path, {"vectors": vectors}, {}, f"domain {name}: its item vectors")
    except ClientError as error:
        logger.warning("%s", error)
    return vectors


def _vectors_key(domain: LocalDomain, adapter: Adapter | None) -> str:
    """Return the key of everything that the vectors depend on, which does not include histories."""
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
