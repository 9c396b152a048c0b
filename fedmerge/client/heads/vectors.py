"""The cache of item vectors on the client's own disk: items are encoded once under each adapter."""

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from fedmerge import __version__
from fedmerge.adapter import Adapter, adapter_sha256
from fedmerge.client.cache.folders import inputs_key, mark_used
from fedmerge.client.local_domain import LocalDomain
from fedmerge.config import Text
from fedmerge.domain.catalog import Catalog
from fedmerge.encoder.backbone import Backbone
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

    def compute() -> torch.Tensor:
        if adapter is None:
            return domain.backbone_item_vectors
        with applied(domain.backbone, adapter):
            return encode(domain.backbone, domain.item_sequences)

    return load_or_encode(domain.catalog, domain.backbone, domain.text, adapter, cache_dir, compute)


def load_or_encode(
    catalog: Catalog,
    backbone: Backbone,
    text: Text,
    adapter: Adapter | None,
    cache_dir: str,
    compute: Callable[[], torch.Tensor],
) -> torch.Tensor:
    """Return the vectors of a catalog as :func:`item_vectors` does; they are computed if they are not cached.

    Args:
        catalog: N items.
        backbone: the encoder without an adapter.
        text: limits of items in tokens.
        adapter: the adapter under which ``compute`` encodes.
        cache_dir: folder on the client's own disk.
        compute: encodes the items.
    """
    name, shape = catalog.name, (len(catalog), backbone.width)
    key = _vectors_key(catalog, backbone, text, adapter)
    path = Path(cache_dir).expanduser() / "item-vectors" / f"{name}-{key}.safetensors"
    if (cached := read_tensors(path)) is not None and tuple(cached[0]["vectors"].shape) == shape:
        mark_used(path)
        return cached[0]["vectors"].clone()  # aligned as if computed: products of other rows are rounded differently
    vectors = compute()
    try:
        facts = {"adapter": "" if adapter is None else adapter_sha256(adapter)}
        write_tensors(path, {"vectors": vectors}, facts, f"domain {name}: its item vectors")
    except ClientError as error:
        logger.warning("%s", error)
    return vectors


def _vectors_key(catalog: Catalog, backbone: Backbone, text: Text, adapter: Adapter | None) -> str:
    """Return the key of everything that the vectors depend on, which does not include histories."""
    return inputs_key(
        {
            "catalog": catalog.sha256,
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
