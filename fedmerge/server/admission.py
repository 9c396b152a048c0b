"""The gate in front of the merge and the choice: what is not what was asked for is refused by name."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from fedmerge.adapter import Adapter
from fedmerge.config import Transport
from fedmerge.encoder.lora import Layout, layout_of
from fedmerge.errors import ClientError, LayoutMismatchError
from fedmerge.evaluation.sums import MetricSums, Variant

LARGEST_VALUE = 1e4  # of a factor: far beyond any training that works, and products of two of them stay finite
MAX_BASELINES = 16
_BYTES_PER_TENSOR = 1024  # name, shape, header, and the module's scaling


def adapter_bytes(layout: Layout, transport: Transport = "float32") -> int:
    """The most bytes that an adapter of this layout takes in a message; with top-k each entry has its position."""
    shapes = [shape for lora_A, lora_B, _ in layout.values() for shape in (lora_A, lora_B)]
    bytes_per_entry = 8 if transport == "top-k" else 4
    return sum(bytes_per_entry * shape[0] * shape[1] + _BYTES_PER_TENSOR for shape in shapes)


def check_adapter(domain: str, adapter: Adapter, layout: Layout) -> None:
    """Refuse an adapter of another layout or with values that are not finite.

    Raises:
        LayoutMismatchError: what differs, and where.
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
                    "infinite, expected finite float32. Its training diverged or the file is damaged: leave it out, or "
                    "train again."
                )
            largest = float(tensor.abs().max()) if tensor.numel() else 0.0
            if largest > LARGEST_VALUE:
                raise LayoutMismatchError(
                    f"domain {domain}: {name}.{part} holds a value of {largest:.3g}, expected at most "
                    f"{LARGEST_VALUE:g}. Its training diverged: lower train.learning_rate, or leave it out."
                )


def sums_bytes(num_models: int, num_metrics: int) -> int:
    """The most bytes that the metric sums of so many models take in a message, baselines included."""
    methods = num_models + MAX_BASELINES
    return 2 * 32 * num_metrics * methods * (methods + 1) + 2**16


def check_sums(
    domain: str,
    sums: Mapping[Variant, MetricSums],
    models: Sequence[str],
    baselines: bool,
    num_users: tuple[int, int],
) -> None:
    """Refuse metric sums that are not of the models asked for, or cannot be sums over this domain's users.

    Args:
        domain: whose sums they are.
        sums: of both variants.
        models: what was asked for, by label.
        baselines: whether the client was asked for baselines, whose names it knows itself.
        num_users: at least and at most so many, by the policy and by what the client said of itself.

    Raises:
        ClientError: what is wrong.
    """
    unmasked, masked = sums["unmasked"], sums["masked"]
    missing = sorted(set(models) - set(unmasked.methods))
    if missing:
        raise ClientError(f"domain {domain}: its metric sums lack {missing}. Use the same fedmerge version everywhere.")
    extra = sorted(set(unmasked.methods) - set(models))
    if len(extra) > (MAX_BASELINES if baselines else 0):
        raise ClientError(
            f"domain {domain}: its metric sums hold {extra[:3]}, which nobody asked for. "
            "Use the same fedmerge version everywhere."
        )
    if masked.methods != unmasked.methods or masked.num_users != unmasked.num_users:
        raise ClientError(f"domain {domain}: its masked and unmasked metric sums are of different methods or users.")
    fewest, most = num_users
    if unmasked.num_users < fewest:
        raise ClientError(
            f"domain {domain}: its metric sums are over {unmasked.num_users} users, fewer than privacy.min_users "
            f"({fewest}). Evaluate on more users."
        )
    if unmasked.num_users > most:
        raise ClientError(
            f"domain {domain}: its metric sums are over {unmasked.num_users} users, but it has only {most}. "
            "Leave it out, or look into its client."
        )
    for of_variant in (unmasked, masked):
        limit = of_variant.num_users * (1 + 1e-9)
        if abs(of_variant.products).max() > limit:
            raise ClientError(
                f"domain {domain}: its {of_variant.variant} products of outcomes exceed {of_variant.num_users}, the "
                "number of its users; no outcome exceeds 1. Leave it out, or look into its client."
            )
        if _smallest_scatter(of_variant) < -1e-9:
            raise ClientError(
                f"domain {domain}: its {of_variant.variant} products of outcomes leave a difference of two models with "
                "a negative variance, which no users can have. Leave it out, or look into its client."
            )


def _smallest_scatter(sums: MetricSums) -> float:
    """The smallest Σ (d - mean d)² of all differences d = x - y of two rows, over max(1, Σ x² + Σ y²).

    From sums and products, as :func:`fedmerge.evaluation.sums.paired_difference` has it, which refuses the same.
    """
    squares = np.diagonal(sums.products, axis1=1, axis2=2)  # (metrics, methods)
    own = squares[:, :, None] + squares[:, None, :]  # (metrics, methods, methods)
    totals = sums.sums.T[:, :, None] - sums.sums.T[:, None, :]
    scatter = own - 2 * sums.products - totals**2 / sums.num_users
    return float((scatter / np.maximum(1.0, own)).min())
