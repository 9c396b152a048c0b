"""Coordinates to merge in: those of the module, of KnOTS, or of core space. All are lossless."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedmerge.merging.low_rank.spectral import Factors, support, thin_svd


@dataclass(frozen=True, slots=True)
class Bases:
    """Orthonormal bases of one module; every update is Δ = left · M · rightᵀ.

    Attributes:
        left: (out, a) float64; None for the identity.
        right: (in, b) float64; None for the identity.
    """

    left: torch.Tensor | None = None
    right: torch.Tensor | None = None

    @property
    def identity(self) -> bool:
        """True if M is Δ itself."""
        return self.left is None and self.right is None


def core_bases(updates: Sequence[Factors]) -> Bases:
    """Core space: left singular vectors of [B_1 | … | B_K] and right singular vectors of A_1, …, A_K stacked as rows.

    M has at most R × R entries, R = Σ r_k, for any width of the module. The cost is O(R² (out + in)).

    Args:
        updates: K pairs (out, r_k), (r_k, in), scaling included in the second.

    Source: Accurate and Efficient Low-Rank Model Merging in Core Space, NeurIPS 2025.
    Differs: B_k = U √S and A_k = √S Vᵀ of Δ_k = U S Vᵀ replace the given factors, so the bases depend on the updates
        alone, not on how they are factored. Directions in which every update is numerically 0 on its own scale are left
        out.
    """
    triples = [thin_svd(*update) for update in updates]
    return Bases(_axes([(U, S) for U, S, _ in triples]), _axes([(Vh.T, S) for _, S, Vh in triples]))


def knots_bases(updates: Sequence[Factors]) -> Bases:
    """KnOTS: left singular vectors U of [Δ_1 | … | Δ_K] = U S [V_1 | … | V_K]; the merge works on M_k = S V_k.

    The wide matrix is never formed: QR of the stacked B and of every A, then SVD of an R × R core, R = Σ r_k.

    Args:
        updates: K pairs (out, r_k), (r_k, in).

    Source: KnOTS, ICLR 2025, arXiv:2410.19735.
    """
    ranks = [right.shape[0] for _, right in updates]
    if not any(ranks):
        return Bases(_one_axis(updates[0][0]))
    Q, stacked = torch.linalg.qr(torch.cat([left for left, _ in updates], dim=1).double())  # (out, q), (q, R)
    cores = [
        part @ torch.linalg.qr(right.double().T)[1].T
        for part, (_, right) in zip(stacked.split(ranks, dim=1), updates, strict=True)
    ]
    return Bases(_with_signs(Q @ _span(torch.cat(cores, dim=1))))


def project(updates: Sequence[Factors], bases: Bases) -> list[Factors]:
    """Express updates in these coordinates: K pairs (a, r_k), (r_k, b)."""
    return [
        (
            left if bases.left is None else bases.left.T @ left.double(),
            right if bases.right is None else right.double() @ bases.right,
        )
        for left, right in updates
    ]


def lift(factors: Factors, bases: Bases) -> Factors:
    """Express a merge in the module's own coordinates: (a, q), (q, b) -> (out, q), (q, in)."""
    left, right = factors
    return (
        left if bases.left is None else bases.left @ left.double(),
        right if bases.right is None else right.double() @ bases.right.T,
    )


def lift_dense(matrix: torch.Tensor, bases: Bases) -> torch.Tensor:
    """Express a dense merge M in the module's own coordinates: (a, b) -> (out, in)."""
    if bases.left is not None:
        matrix = bases.left @ matrix.double()
    return matrix if bases.right is None else matrix.double() @ bases.right.T


def _axes(parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Left singular vectors of [U_1 √S_1 | … | U_K √S_K], at least one: (n, q) float64.

    They span all U_k, whatever the scales of the updates.
    """
    if not any(len(S) for _, S in parts):
        return _one_axis(parts[0][0])
    span = _span(torch.cat([U * (S / S[:1]).sqrt() for U, S in parts], dim=1))  # each update on its own scale
    weighted = torch.cat([U * S.sqrt() for U, S in parts], dim=1)
    return _with_signs(span @ torch.linalg.svd(span.T @ weighted, full_matrices=False)[0])


def _one_axis(matrix: torch.Tensor) -> torch.Tensor:
    """An axis for updates that are all 0: (n, 1) float64."""
    return torch.eye(len(matrix), 1, dtype=torch.float64, device=matrix.device)


def _with_signs(axes: torch.Tensor) -> torch.Tensor:
    """Turn every axis so that its entry of largest magnitude is positive: an SVD leaves the signs open."""
    signs = axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    return axes * torch.where(signs == 0, 1.0, signs)


def _span(matrix: torch.Tensor) -> torch.Tensor:
    """Left singular vectors on the support, at least one: (n, q) float64."""
    U, S, _ = torch.linalg.svd(matrix.double(), full_matrices=False)
    spanning: torch.Tensor = U[:, : max(1, support(S))]
    return spanning
