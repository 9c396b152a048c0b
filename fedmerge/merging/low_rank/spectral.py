"""Spectral and spherical merging methods: they map the factors of one module's K updates to those of the merge.

The spectral methods were published for updates of full rank. Here they work on the numerical support of low-rank
updates: singular values below a millionth of the largest count as 0, and directions in no update stay 0. An update is
a pair (out, r), (r, in), scaling included. A dense update is the pair of itself and an identity. Everything is float64.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

import torch

from fedmerge.adapter import factor_norms

SUPPORT = 1e-6
PARALLEL = 0.9995  # cosine beyond which an arc is taken for a line
ROUNDING = 2.0**-23  # of float32 factors: what cancels to less than this fraction of its terms is 0
Factors = tuple[torch.Tensor, torch.Tensor]


def tsv(updates: Sequence[Factors], coefficient: float) -> Factors:
    """TSV-Merge: the leading singular triples of all updates, with their directions made orthogonal.

    Each update keeps min(rank, max(1, ⌊min(out, in) / K⌋)) triples. With U, S, V of all updates side by side,
    Δ = U⊥ S V⊥ᵀ, where X⊥ = P Qᵀ for X = P D Qᵀ.

    Returns:
        (out, q) and (q, in) float64.

    Source: Task Singular Vectors, CVPR 2025, arXiv:2412.00081.
    Differs: linearly dependent directions are whitened on their common span only.
    """
    width_out, width_in = updates[0][0].shape[0], updates[0][1].shape[1]
    kept = max(1, min(width_out, width_in) // len(updates))
    triples = [thin_svd(*update) for update in updates]
    left = torch.cat([U[:, :kept] for U, _, _ in triples], dim=1)  # (out, q)
    values = torch.cat([S[:kept] for _, S, _ in triples])
    right = torch.cat([Vh[:kept] for _, _, Vh in triples])  # (q, in)
    return _orthogonal(left) * values * coefficient, _orthogonal(right)


def iso_c(updates: Sequence[Factors], coefficient: float) -> Factors:
    """Iso-C: the sum of the updates with all singular values replaced by their mean over the support.

    Returns:
        (out, R) and (R, in) float64, where R is the rank of the sum.

    Source: No Task Left Behind, ICML 2025, arXiv:2502.04959.
    Differs: the mean is over the R values of the support, not over min(out, in).
    """
    U, S, Vh = thin_svd(*_sum(updates))
    return U * S.mean() * coefficient, Vh


def iso_cts(updates: Sequence[Factors], common_fraction: float, coefficient: float) -> Factors:
    """Iso-CTS: leading directions of the sum, plus directions of each update that the sum lacks, made isotropic.

    The first ⌊common_fraction · R⌋ of the R directions of the sum are common. The others are replaced by the leading
    directions of each update after projecting the common ones out, the same number per domain (rounded; the rest is
    common). All directions are made orthogonal as in TSV-Merge and get the mean of their singular values.

    Returns:
        (out, q) and (q, in) float64, q ≤ R.

    Source: No Task Left Behind, ICML 2025, arXiv:2502.04959.
    Differs: R is the rank of the sum, not min(out, in). A domain has at most as many directions of its own as the rank
        of its projected update.
    """
    U, S, Vh = thin_svd(*_sum(updates))
    room = len(S) - math.floor(Fraction(str(common_fraction)) * len(S))
    per_domain = min(round(Fraction(room, len(updates))), len(S) // len(updates))
    common = U[:, : len(S) - per_domain * len(updates)]  # (out, c)
    triples = [(common, S[: common.shape[1]], Vh[: common.shape[1]])]
    for left, right in updates if per_domain else ():
        U, S, Vh = thin_svd(left, right)
        U, S, Vh = thin_svd((U - common @ (common.T @ U)) * S, Vh, float(S[0]) if len(S) else 0.0)
        triples.append((U[:, :per_domain], S[:per_domain], Vh[:per_domain]))
    mean = torch.cat([S for _, S, _ in triples]).mean()
    left = torch.cat([U for U, _, _ in triples], dim=1)  # (out, q)
    return _orthogonal(left) * mean * coefficient, _orthogonal(torch.cat([Vh for _, _, Vh in triples]))


def slerp(updates: Sequence[Factors], t: float) -> Factors:
    """SLERP: move from the first update to the second along the arc between their directions.

    Δ = sin((1 - t) θ) / sin θ · Δ_0 + sin(t θ) / sin θ · Δ_1, where θ is the angle of Δ_0 and Δ_1 as vectors. Updates
    that are parallel, opposite (|cos θ| > 0.9995) or zero are interpolated linearly. One update alone is the merge.

    Args:
        updates: one or two pairs (out, r_k), (r_k, in).
        t: 0 for the first update, 1 for the second.

    Returns:
        (out, R) and (R, in) float64.

    Source: Shoemake 1985, with the linear case of mergekit's ``slerp``.
    Differs: mergekit interpolates whole weights, W + Δ_0 and W + Δ_1, whose angle is nearly 0; here it is the updates'.
    """
    if len(updates) == 1:
        return _weighted_sum(updates, [1.0])
    gram = _gram(updates)
    lengths = _lengths(updates, gram)
    cosine = float(gram[0, 1] / lengths.prod()) if lengths.prod() > 0 else 1.0
    if abs(cosine) > PARALLEL:
        return _weighted_sum(updates, [1 - t, t])
    angle = math.acos(cosine)
    return _weighted_sum(updates, [math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)])


def multi_slerp(updates: Sequence[Factors], coefficient: float) -> Factors:
    """Multi-SLERP: the direction of the mean of the updates' directions, with their mean length.

    Δ = coefficient · n̄ · m / ‖m‖, where m is the mean of Δ_k / ‖Δ_k‖ and n̄ that of ‖Δ_k‖. An update of zero has no
    direction, but counts in both means. Directions that cancel (‖m‖ < 1e-6) leave none: then Δ is the average.

    Returns:
        (out, R) and (R, in) float64.

    Source: ``multislerp`` of mergekit, with equal weights. It projects the directions onto the tangent space at m / ‖m‖
        and returns along their mean there, which is 0 since m is their mean.
    """
    gram, num_domains = _gram(updates), len(updates)
    lengths = _lengths(updates, gram)
    unit = torch.where(lengths > 0, 1 / lengths, 0.0) / num_domains  # m = Σ unit_k Δ_k
    length = float((unit @ gram @ unit).clamp(min=0).sqrt())
    weights = unit * (lengths.mean() / length) if length >= SUPPORT else torch.full_like(unit, 1 / num_domains)
    return _weighted_sum(updates, (coefficient * weights).tolist())


def thin_svd(
    left: torch.Tensor, right: torch.Tensor, largest: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the SVD of left · right on its numerical support, without forming the product.

    QR of both factors, then SVD of an r × r core. Where float32 factors cancel, the rest is rounding and counts as 0.

    Args:
        left: (out, r).
        right: (r, in).
        largest: lower bound on the singular value that the support is relative to.

    Returns:
        U (out, q), S (q,), Vh (q, in) float64; q may be 0.
    """
    Q_left, R_left = torch.linalg.qr(left.double())
    Q_right, R_right = torch.linalg.qr(right.double().T)
    U, S, Vh = torch.linalg.svd(R_left @ R_right.T, full_matrices=False)
    rank = support(S, max(largest, rounding(left, right) / SUPPORT))
    return Q_left @ U[:, :rank], S[:rank], Vh[:rank] @ Q_right.T


def rounding(left: torch.Tensor, right: torch.Tensor) -> float:
    """Return the Frobenius norm that the rounding of float32 factors may give to their product.

    The terms b_j a_jᵀ are rounded independently, so their errors add up in quadrature.
    """
    return ROUNDING * float(torch.linalg.vector_norm(factor_norms(left, right)))


def dense_svd(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the SVD of a matrix from the eigenvectors of its smaller Gram matrix, which is several times faster.

    In float64 it is accurate for singular values down to 1e-8 of the largest; only those above 1e-6 are used.

    Args:
        matrix: (out, in).

    Returns:
        U (out, q), S (q,), Vh (q, in) float64, q = min(out, in).
    """
    if matrix.shape[0] > matrix.shape[1]:
        U, S, Vh = dense_svd(matrix.T)
        return Vh.T, S, U.T
    wide = matrix.double()
    values, vectors = torch.linalg.eigh(wide @ wide.T)
    S = values.flip(0).clamp(min=0).sqrt()
    U = vectors.flip(1)
    return U, S, (U.T @ wide) / torch.where(S > 0, S, 1.0)[:, None]


def support(values: torch.Tensor, largest: float = 0.0) -> int:
    """Count the singular values that are not numerically 0; they come in descending order."""
    return int((values > SUPPORT * torch.clamp(values[:1], min=largest)).sum())


def _sum(updates: Sequence[Factors]) -> Factors:
    return torch.cat([left for left, _ in updates], dim=1), torch.cat([right for _, right in updates])


def _weighted_sum(updates: Sequence[Factors], weights: Sequence[float]) -> Factors:
    left = [left.double() * weight for (left, _), weight in zip(updates, weights, strict=True)]
    return torch.cat(left, dim=1), torch.cat([right.double() for _, right in updates])


def _lengths(updates: Sequence[Factors], gram: torch.Tensor) -> torch.Tensor:
    """‖Δ_k‖ (K,) float64; 0 where float32 factors cancel."""
    lengths = gram.diagonal().clamp(min=0).sqrt()
    least = [rounding(left.double(), right.double()) for left, right in updates]
    return torch.where(lengths > torch.tensor(least).to(lengths), lengths, 0.0)


def _gram(updates: Sequence[Factors]) -> torch.Tensor:
    """⟨Δ_k, Δ_l⟩ without forming an update: (K, K) float64."""
    left, right = _sum([(left.double(), right.double()) for left, right in updates])
    ranks = [len(right) for _, right in updates]
    products = (left.T @ left) * (right @ right.T)  # (R, R)
    blocks = [[block.sum() for block in torch.split(rows, ranks, dim=1)] for rows in torch.split(products, ranks)]
    return torch.stack([torch.stack(row) for row in blocks])


def _orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """P Qᵀ of matrix = P D Qᵀ, on the support."""
    P, D, Qh = torch.linalg.svd(matrix, full_matrices=False)
    rank = support(D)
    whitened: torch.Tensor = P[:, :rank] @ Qh[:rank]
    return whitened
