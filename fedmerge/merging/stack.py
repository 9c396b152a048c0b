"""K adapters of one layout as stacked low-rank factors, and the exact linear merge that follows from them."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from fedmerge.encoder.lora import Adapter, LoraModule, layer_of
from fedmerge.errors import LayoutMismatchError, MergeError

OTHERS = "others"


@dataclass(frozen=True, slots=True)
class StackedModule:
    """The K updates of one linear module side by side: sum_k w_k Δ_k = lora_B · diag(w[owner]) · lora_A.

    Attributes:
        lora_A: (R, in) float32, R = sum of the ranks; row j is already multiplied by the scaling of its domain.
        lora_B: (out, R) float32.
        owner: (R,) int64, the domain that rank row j belongs to.
    """

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    owner: torch.Tensor


@dataclass(frozen=True, slots=True)
class Stack:
    """K adapters of one layout.

    Attributes:
        domains: the K names, sorted; this order is the first axis of all coefficients.
        modules: module name -> its stacked factors, sorted by name.
        groups: the G groups of layer-wise coefficients: "layer 0", ..., and "others" if a module lies in no layer.
        group_of: module name -> index into ``groups``.
    """

    domains: tuple[str, ...]
    modules: Mapping[str, StackedModule]
    groups: tuple[str, ...]
    group_of: Mapping[str, int]


def stack_adapters(adapters: Mapping[str, Adapter]) -> Stack:
    """Stack the adapters of K domains; ranks and scalings may differ, module names and shapes may not.

    Args:
        adapters: domain name -> adapter; the order does not matter.

    Returns:
        The stack, with domains sorted by name. It shares no memory with the adapters.

    Raises:
        LayoutMismatchError: an adapter lacks or adds a module, or a factor has another shape than in the first domain.
        MergeError: no adapter, or a value that is not finite.
    """
    if not adapters:
        raise MergeError("stack_adapters: found no adapter, expected at least one; check the admission log")
    domains = tuple(sorted(adapters))
    first = adapters[domains[0]].modules
    if not first:
        raise LayoutMismatchError(f"adapter of {domains[0]!r}: found no LoRA module, expected those that were trained")
    for domain in domains:
        _check_layout(domain, adapters[domain], domains[0], first)
    layers = {name: layer_of(name) for name in sorted(first)}
    numbers = sorted({layer for layer in layers.values() if layer is not None})
    groups = tuple(f"layer {number}" for number in numbers) + ((OTHERS,) if None in layers.values() else ())
    modules = {name: _stack_module([adapters[domain].modules[name] for domain in domains]) for name in layers}
    group_of = {name: len(numbers) if layer is None else numbers.index(layer) for name, layer in layers.items()}
    return Stack(domains, modules, groups, group_of)


def expand_coefficients(stack: Stack, coefficients: torch.Tensor | np.ndarray) -> torch.Tensor:
    """Coefficients as one number per domain and group, differentiable.

    Args:
        coefficients: (K,) one per domain, or (K, G) one per domain and group of ``stack.groups``.

    Returns:
        (K, G) float32.

    Raises:
        LayoutMismatchError: another shape.
        MergeError: a coefficient that is not finite, with its domain.
    """
    values = torch.as_tensor(coefficients).to(torch.float32)
    num_domains, num_groups = len(stack.domains), len(stack.groups)
    if tuple(values.shape) not in {(num_domains,), (num_domains, num_groups)}:
        raise LayoutMismatchError(
            f"coefficients: found shape {tuple(values.shape)}, "
            f"expected ({num_domains},) or ({num_domains}, {num_groups}) "
            f"for domains {', '.join(stack.domains)} and groups {', '.join(stack.groups)}"
        )
    finite = values.detach().isfinite().reshape(num_domains, -1).all(dim=1)
    if not finite.all():
        bad = [domain for domain, good in zip(stack.domains, finite.tolist(), strict=True) if not good]
        raise MergeError(f"coefficients of {', '.join(bad)}: found a value that is not finite; expected finite numbers")
    return values if values.ndim == 2 else values[:, None].expand(num_domains, num_groups)


def linear_merge(stack: Stack, coefficients: torch.Tensor | np.ndarray) -> Adapter:
    """The linear merge as one adapter: Δ = Σ_k w_k s_k B_k A_k, exactly, at rank Σ r_k.

    No out × in matrix is formed: the rows w_k s_k A_k are stacked over one another and the B_k lie side by side, with
    scaling 1. Domains whose coefficient is 0 take no rank; where all are 0 a module keeps one row of zeros, so that the
    layout stays complete.

    Args:
        stack: K adapters.
        coefficients: (K,) or (K, G).

    Returns:
        The merged adapter, float32; the inputs are left as they were.

    Raises:
        LayoutMismatchError: coefficients of another shape.
        MergeError: a coefficient that is not finite.

    Source: "concatenation" in peft's ``add_weighted_adapter``; exact where averaging A and B separately is not.
    """
    values = expand_coefficients(stack, coefficients).detach()  # (K, G)
    merged = {}
    for name, module in stack.modules.items():
        rows = values[:, stack.group_of[name]].to(module.lora_A.device)[module.owner]  # (R,)
        kept = rows.nonzero().squeeze(1)
        lora_A, lora_B = module.lora_A[kept] * rows[kept, None], module.lora_B[:, kept]
        if not len(kept):
            lora_A, lora_B = torch.zeros_like(module.lora_A[:1]), torch.zeros_like(module.lora_B[:, :1])
        merged[name] = LoraModule(lora_A, lora_B, 1.0)
    return Adapter(merged)


def _stack_module(parts: list[LoraModule]) -> StackedModule:
    lora_A = torch.cat([part.lora_A.detach().to(torch.float32) * part.scaling for part in parts])
    lora_B = torch.cat([part.lora_B.detach().to(torch.float32) for part in parts], dim=1)
    ranks = torch.tensor([part.lora_A.shape[0] for part in parts], device=lora_A.device)
    return StackedModule(lora_A, lora_B, torch.repeat_interleave(torch.arange(len(parts), device=lora_A.device), ranks))


def _check_layout(domain: str, adapter: Adapter, reference: str, expected: Mapping[str, LoraModule]) -> None:
    """Refuse an adapter that has another layout than ``reference`` or holds a value that is not finite."""
    missing, surplus = expected.keys() - adapter.modules.keys(), adapter.modules.keys() - expected.keys()
    if missing or surplus:
        found = [
            f"{what} {', '.join(sorted(names))}" for what, names in (("lacks", missing), ("adds", surplus)) if names
        ]
        raise LayoutMismatchError(
            f"adapter of {domain!r}: {' and '.join(found)}, compared with the adapter of {reference!r}; "
            "train all adapters with the same target modules"
        )
    for name, module in adapter.modules.items():
        (rank, width_in), (width_out, rank_B) = module.lora_A.shape, module.lora_B.shape
        shape = (expected[name].lora_A.shape[1], expected[name].lora_B.shape[0])
        if rank != rank_B or (width_in, width_out) != shape:
            raise LayoutMismatchError(
                f"adapter of {domain!r}, module {name}: "
                f"found lora_A {(rank, width_in)} and lora_B {(width_out, rank_B)}, "
                f"expected (r, {shape[0]}) and ({shape[1]}, r) as in the adapter of {reference!r}; "
                "train all adapters on the same backbone"
            )
        for factor, values in (("lora_A", module.lora_A), ("lora_B", module.lora_B), ("scaling", module.scaling)):
            bad = int((~torch.as_tensor(values).isfinite()).sum())
            if bad:
                raise MergeError(
                    f"adapter of {domain!r}, module {name}: {factor} holds {bad} values that are not finite; "
                    "expected finite values: leave this domain out or train it again"
                )
