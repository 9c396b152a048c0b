"""Refuse replies that are not what the server asked for: malformed adapters and impossible metric sums."""

from collections.abc import Mapping, Sequence
from typing import get_args

import numpy as np
import torch

from fedmerge.adapter import Adapter
from fedmerge.config import HeadVectors, Privacy, Transport
from fedmerge.encoder.lora import Layout, layout_of
from fedmerge.errors import ClientError, LayoutMismatchError
from fedmerge.evaluation.sums import (
    FEDERATED_FUSED,
    FEDERATED_HEAD,
    GROUP,
    PERSONAL,
    WOVEN,
    MetricSums,
    Variant,
    fused_label,
    head_label,
)
from fedmerge.privacy.metric_sums import check_disclosure

LARGEST_VALUE = 1e4  # in a factor: far above any training that works, and products of two such values are finite
MAX_BASELINES = 16
OWN_ROWS = {FEDERATED_HEAD, FEDERATED_FUSED, PERSONAL} | {
    label(vectors) for vectors in get_args(HeadVectors) for label in (head_label, fused_label)
}  # never taken for baselines
_BYTES_PER_TENSOR = 1024  # name, shape, header, and the module's scaling


def adapter_bytes(layout: Layout, transport: Transport = "float32") -> int:
    """Return an upper bound on the bytes of an adapter in a message; with top-k each entry also has a position."""
    shapes = [shape for lora_A, lora_B, _ in layout.values() for shape in (lora_A, lora_B)]
    bytes_per_entry = 8 if transport == "top-k" else 4
    return sum(bytes_per_entry * shape[0] * shape[1] + _BYTES_PER_TENSOR for shape in shapes)


def check_adapter(domain: str, adapter: Adapter, layout: Layout) -> None:
    """Check that an adapter has the expected layout and finite, plausible values.

    Raises:
        LayoutMismatchError: names the module and the difference.
    """
    found = layout_of(adapter)
    missing, extra = sorted(layout.keys() - found.keys()), sorted(found.keys() - layout.keys())
    if missing or extra:
        raise LayoutMismatchError(
            f"domain {domain}: its adapter lacks the modules {missing[:3]} and has unexpected {extra[:3]} "
            f"({len(found)} modules, expected {len(layout)}). Use the same lora.target_modules and backbone everywhere."
        )
    for name, expected in layout.items():
        if found[name] != expected:
            raise LayoutMismatchError(
                f"domain {domain}: module {name} has (lora_A, lora_B, scaling) {found[name]}, expected {expected}. "
                "Use the same lora.rank and lora.alpha everywhere."
            )
        module = adapter.modules[name]
        for part, tensor in (("lora_A", module.lora_A), ("lora_B", module.lora_B)):
            wrong = int((~torch.isfinite(tensor)).sum())
            if wrong or tensor.dtype != torch.float32:
                raise LayoutMismatchError(
                    f"domain {domain}: {name}.{part} is {tensor.dtype} with {wrong} of {tensor.numel()} values NaN or "
                    "infinite, expected finite float32. Its training diverged or the file is damaged: exclude the "
                    "domain, or train it again."
                )
            largest = float(tensor.abs().max()) if tensor.numel() else 0.0
            if largest > LARGEST_VALUE:
                raise LayoutMismatchError(
                    f"domain {domain}: {name}.{part} holds a value of {largest:.3g}, expected at most "
                    f"{LARGEST_VALUE:g}. Its training diverged: lower train.learning_rate, or exclude the domain."
                )


def sums_bytes(num_models: int, num_metrics: int) -> int:
    """Return an upper bound on the bytes of the metric sums of ``num_models`` models, baselines included."""
    methods = num_models + MAX_BASELINES
    return 2 * 32 * num_metrics * methods * (methods + 1) + 2**16


def check_sums(
    domain: str,
    sums: Mapping[Variant, MetricSums],
    models: Sequence[str],
    baselines: bool,
    num_users: tuple[int, int],
    privacy: Privacy,
) -> None:
    """Check that metric sums are of the requested models and can be sums over this domain's users.

    Args:
        domain: name of the domain.
        sums: masked and unmasked sums.
        models: labels of the requested models; rows of heads must be among them.
        baselines: True if the client was asked for its baselines, which it names itself.
        num_users: bounds on the number of users: ``privacy.min_users``, and the number that the client announced.
        privacy: section ``[privacy]``, which says how sums are disclosed.

    Raises:
        ClientError: a model is missing or was not requested, or no users can have these sums.
    """
    unmasked, masked = sums["unmasked"], sums["masked"]
    missing = sorted(set(models) - set(unmasked.methods))
    if missing:
        raise ClientError(f"domain {domain}: its metric sums lack {missing}. Use the same fedmerge version everywhere.")
    extra = sorted(set(unmasked.methods) - set(models))
    if len(extra) > (MAX_BASELINES if baselines else 0) or any(
        each in OWN_ROWS or each == GROUP or each.startswith(WOVEN) for each in extra
    ):
        raise ClientError(
            f"domain {domain}: its metric sums hold {extra[:3]}, which were not requested. "
            "Use the same fedmerge version everywhere."
        )
    if masked.methods != unmasked.methods or masked.num_users != unmasked.num_users:
        raise ClientError(f"domain {domain}: its masked and unmasked metric sums differ in methods or users.")
    fewest, most = num_users
    if unmasked.num_users < fewest:
        raise ClientError(
            f"domain {domain}: its metric sums are over {unmasked.num_users} users, fewer than privacy.min_users "
            f"({fewest}). Evaluate on more users."
        )
    if unmasked.num_users > most:
        raise ClientError(
            f"domain {domain}: its metric sums are over {unmasked.num_users} users, but the domain has {most}. "
            "Exclude the domain, or check its client."
        )
    check_disclosure(domain, sums, privacy.metrics, privacy.metrics_noise)
    if privacy.metrics != "exact":  # their products are bounds that the server computed
        return
    for of_variant in (unmasked, masked):
        limit = of_variant.num_users * (1 + 1e-9)
        if abs(of_variant.products).max() > limit:
            raise ClientError(
                f"domain {domain}: its {of_variant.variant} products of outcomes exceed {of_variant.num_users}, the "
                "number of its users; no outcome exceeds 1. Exclude the domain, or check its client."
            )
        if _smallest_scatter(of_variant) < -1e-9:
            raise ClientError(
                f"domain {domain}: its {of_variant.variant} products of outcomes give the difference of two models a "
                "negative variance, which is impossible. Exclude the domain, or check its client."
            )


def _smallest_scatter(sums: MetricSums) -> float:
    """Return the smallest Σ (d - mean d)² of the differences d = x - y of two rows, over max(1, Σ x² + Σ y²).

    Computed from sums and products, as in :func:`fedmerge.evaluation.sums.paired_difference`, which has the same limit.
    """
    squares = np.diagonal(sums.products, axis1=1, axis2=2)  # (metrics, methods)
    own = squares[:, :, None] + squares[:, None, :]  # (metrics, methods, methods)
    totals = sums.sums.T[:, :, None] - sums.sums.T[:, None, :]
    scatter = own - 2 * sums.products - totals**2 / sums.num_users
    return float((scatter / np.maximum(1.0, own)).min())
