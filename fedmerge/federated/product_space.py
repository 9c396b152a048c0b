"""Arithmetic on adapters in product space, Δ = scaling · B A: sums, differences, errors, and truncation to a rank."""

from collections.abc import Mapping

import torch

from fedmerge.adapter import Adapter, LoraModule
from fedmerge.merging.low_rank.spectral import Factors, dense_svd, support, thin_svd
from fedmerge.merging.stack import linear_merge_of_many, survey_adapters

Triples = Mapping[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
"""Module name -> U (out, q), S (q,), Vh (q, in) of its Δ on the numerical support, float64."""


def weighted_sum(adapters: Mapping[str, Adapter], weights: Mapping[str, float]) -> Adapter:
    """Compute Σ_k w_k Δ_k exactly: factors side by side, or Δ beside an identity as soon as that is smaller.

    Args:
        adapters: name -> adapter, of one layout; ranks and scalings may differ.
        weights: name -> w_k, of every adapter.

    Raises:
        LayoutMismatchError: an adapter has another layout.
        MergeError: no adapter, or a value is not finite.
    """
    layout = survey_adapters(adapters)
    return linear_merge_of_many(adapters, layout, torch.tensor([weights[name] for name in layout.domains]))


def client_update(local: Adapter, start: Adapter) -> Adapter:
    """Compute Δ_local − Δ_start exactly, the change by local training, at most at the sum of both ranks.

    A module that started from 0 (fresh, with B = 0) is its own update. The adapters must have the same modules.
    """
    modules = {}
    for name, module in local.modules.items():
        before = start.modules[name]
        if not before.lora_B.any():
            modules[name] = module
            continue
        lora_A = torch.cat([module.lora_A * module.scaling, before.lora_A * before.scaling])
        modules[name] = LoraModule(lora_A, torch.cat([module.lora_B, -before.lora_B], dim=1), 1.0)
    return Adapter(modules)


def relative_error(found: Adapter, expected: Adapter) -> float:
    """Compute ‖Δ_found − Δ_expected‖_F / ‖Δ_expected‖_F over all modules, from the factors.

    Returns:
        The ratio; 0 if both are 0, infinity if only the expected one is 0.
    """
    difference = norm = 0.0
    for name, module in expected.modules.items():
        left, right = factors_of(module)
        other_left, other_right = factors_of(found.modules[name])
        norm += frobenius(left, right) ** 2
        difference += frobenius(torch.cat([other_left, -left], dim=1), torch.cat([other_right, right])) ** 2
    if norm == 0:
        return 0.0 if difference == 0 else float("inf")
    return float((difference / norm) ** 0.5)


def inner_product(left: Adapter, right: Adapter) -> float:
    """Compute ⟨Δ, Δ'⟩ over the same modules: Σ s s' Σ (Bᵀ B') ∘ (A A'ᵀ), float64; no Δ is formed."""
    total = 0.0
    for name, module in left.modules.items():
        own_B, own_A = factors_of(module)
        other_B, other_A = factors_of(right.modules[name])
        total += float(((own_B.T @ other_B) * (own_A @ other_A.T)).sum())
    return total


def factors_of(module: LoraModule) -> Factors:
    """Return (out, r) and (r, in) float64; the second includes the scaling."""
    return module.lora_B.double(), module.lora_A.double() * module.scaling


def frobenius(left: torch.Tensor, right: torch.Tensor) -> float:
    """Compute ‖left · right‖_F of (out, r) and (r, in) from an r × r core, without forming the product."""
    core = torch.linalg.qr(left.double())[1] @ torch.linalg.qr(right.double().T)[1].T
    return float(torch.linalg.vector_norm(core))


def decomposed(adapter: Adapter) -> Triples:
    """Compute the SVD of every module: by QR of its factors and SVD of a small core, if that is smaller than Δ."""
    triples = {}
    for name, module in adapter.modules.items():
        left, right = factors_of(module)
        if module.rank < min(len(left), right.shape[1]):
            triples[name] = thin_svd(left, right)
        else:
            U, S, Vh = dense_svd(left @ right)
            triples[name] = U[:, : support(S)], S[: support(S)], Vh[: support(S)]
    return triples


def compressed(triples: Triples, rank: int | None) -> tuple[Adapter, float]:
    """Return the best adapter with at most this rank per module (None: the whole support), and its residual.

    Returns:
        The adapter, scaling 1, and ‖Δ − Δ_adapter‖_F / ‖Δ‖_F over all modules. A zero module keeps one row of zeros.
    """
    modules = {}
    for name, (U, S, Vh) in triples.items():
        kept = max(1, len(S) if rank is None else min(rank, len(S)))
        modules[name] = _leading(U, S, Vh, kept, 1.0, Vh.new_zeros(kept, Vh.shape[1]))
    return Adapter(modules), _lost(triples, {name: module.rank for name, module in modules.items()})


def cut_to(triples: Triples, shape: Adapter, fresh: Adapter) -> tuple[Adapter, float]:
    """Return the best adapter with given ranks and scalings, for further training, and its residual.

    The singular values are split between the factors: B = U √S / √scaling and A = √S Vh / √scaling. If a module has
    fewer directions than its rank, the rest is fresh: rows of A with B = 0, which training can use.

    Args:
        triples: SVD of the adapter to truncate.
        shape: adapter with the ranks and scalings of the result; scalings above 0.
        fresh: adapter of the same shape that supplies the fresh rows of A.

    Returns:
        The adapter, and ‖Δ − Δ_adapter‖_F / ‖Δ‖_F over all modules.
    """
    modules = {
        name: _leading(*triples[name], like.rank, like.scaling, fresh.modules[name].lora_A)
        for name, like in shape.modules.items()
    }
    return Adapter(modules), _lost(triples, {name: like.rank for name, like in shape.modules.items()})


def first_rows(adapter: Adapter, shape: Adapter, fresh: Adapter) -> Adapter:
    """Return the first r rows of A and columns of B of every module, r as in ``shape``; fill up as :func:`cut_to`."""
    modules = {}
    for name, like in shape.modules.items():
        module = adapter.modules[name]
        missing = max(0, like.rank - module.rank)
        lora_A = torch.cat([module.lora_A[: like.rank], fresh.modules[name].lora_A[like.rank - missing :]])
        lora_B = torch.cat([module.lora_B[:, : like.rank], module.lora_B.new_zeros(len(module.lora_B), missing)], dim=1)
        modules[name] = LoraModule(lora_A, lora_B, module.scaling)
    return Adapter(modules)


def _leading(
    U: torch.Tensor, S: torch.Tensor, Vh: torch.Tensor, rank: int, scaling: float, filling: torch.Tensor
) -> LoraModule:
    """U (out, q), S (q,), Vh (q, in), filling (rank, in) -> a module of exactly this rank."""
    root = (S[:rank] / scaling).sqrt()
    lora_A = filling.clone().float()
    lora_B = torch.zeros(len(U), rank)
    lora_A[: len(root)] = (root[:, None] * Vh[:rank]).float()
    lora_B[:, : len(root)] = (U[:, :rank] * root).float()
    return LoraModule(lora_A, lora_B, scaling)


def _lost(triples: Triples, ranks: Mapping[str, int]) -> float:
    whole = sum(float(S.square().sum()) for _, S, _ in triples.values())
    cut = sum(float(S[ranks[name] :].square().sum()) for name, (_, S, _) in triples.items())
    return (cut / whole) ** 0.5 if whole else 0.0
