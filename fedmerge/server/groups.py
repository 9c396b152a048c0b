"""Clustered federations: groups of domains by the similarity of their updates, and the number of groups.

similarities      cosines of the updates of all pairs of domains
group_domains     domains in so many groups, by average linkage
groupings         the merges of every variant in every number of groups, as rows of each domain
choose_grouping   one merge for all, or one for each group, on validation
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean
from typing import Any

import numpy as np
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from fedmerge.adapter import Adapter
from fedmerge.evaluation.sums import GROUP, MetricSums, copy_row, paired_difference_of_mean
from fedmerge.merging.candidate import Candidate
from fedmerge.merging.stack import open_stack

SIGNIFICANCE = 0.025  # one-sided, over all groupings together

Groups = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Grouping:
    """A merge for each group of domains, by one variant of a method.

    Attributes:
        label: row of the metric sums, such as ``average in 2 groups``.
        groups: the domains of each group.
        merges: domain -> the merge of its group.
    """

    label: str
    groups: Groups
    merges: Mapping[str, Candidate]


def similarities(adapters: Mapping[str, Adapter]) -> torch.Tensor:
    """Return the cosines of the updates of all pairs of K domains, from products of factors.

    ⟨Δ_i, Δ_j⟩ = Σ_m tr((B_iᵀB_j)(A_jA_iᵀ)): no out × in matrix is formed, and memory holds one module of all domains.

    Args:
        adapters: domain -> adapter; ranks and scalings may differ.

    Returns:
        (K, K) float64, domains sorted by name; 0 for an update that is zero.

    Raises:
        LayoutMismatchError, MergeError: the layouts differ, or a value is not finite.
    """
    stack = open_stack(adapters)
    number = len(stack.domains)
    products = torch.zeros(number, number, dtype=torch.float64)
    for module in stack.modules.values():
        lora_A, lora_B, owner = module.lora_A.double(), module.lora_B.double(), module.owner
        for domain in range(number):
            rows = owner == domain
            block = (lora_B[:, rows].T @ lora_B) * (lora_A[rows] @ lora_A.T)  # (r, R)
            products[domain].index_add_(0, owner, block.sum(dim=0))
    norms = products.diagonal().clamp(min=0).sqrt()
    lengths = norms[:, None] * norms
    return torch.where(lengths > 0, products / lengths.clamp(min=torch.finfo(torch.float64).tiny), 0.0)


def group_domains(adapters: Mapping[str, Adapter], numbers: Sequence[int]) -> dict[int, Groups]:
    """Divide domains into groups of similar updates, once for each number of groups.

    Average linkage of 1 - cosine, so more groups divide the groups of fewer. Numbers above K are left out, as are
    those that ties make impossible.

    Args:
        adapters: domain -> adapter.
        numbers: numbers of groups, each at least 2.

    Returns:
        Number -> groups, each sorted, in the order of their first domains.
    """
    names = sorted(adapters)
    if len(names) < 2:
        return {}
    distances = (1 - similarities(adapters)).clamp(min=0).numpy()
    np.fill_diagonal(distances, 0.0)
    tree = linkage(squareform((distances + distances.T) / 2, checks=False), method="average")
    found = {}
    for number in sorted({number for number in numbers if number <= len(names)}):
        members: dict[int, list[str]] = {}
        for name, group in zip(names, fcluster(tree, number, criterion="maxclust").tolist(), strict=True):
            members.setdefault(group, []).append(name)
        if len(members) == number:
            found[number] = tuple(sorted(tuple(group) for group in members.values()))
    return found


def groupings(
    adapters: Mapping[str, Adapter], numbers: Sequence[int], merge: Callable[[tuple[str, ...]], Sequence[Candidate]]
) -> list[Grouping]:
    """Make every merge in groups.

    Args:
        adapters: domain -> expert.
        numbers: numbers of groups to try.
        merge: makes the merges of some domains, one for each variant, in the same order for all.
    """
    found = []
    made: dict[tuple[str, ...], Sequence[Candidate]] = {}
    for number, groups in group_domains(adapters, numbers).items():
        for group in groups:
            if group not in made:
                made[group] = merge(group)
        for variant in range(len(made[groups[0]])):
            merges = {domain: made[group][variant] for group in groups for domain in group}
            name = made[groups[0]][variant].label.split(" without ")[0]
            found.append(Grouping(f"{name} in {number} groups", groups, dict(sorted(merges.items()))))
    return found


def choose_grouping(
    found: Sequence[Grouping], validation: Mapping[str, MetricSums], served: str, metric: str
) -> dict[str, Any] | None:
    """Choose between the merge of all domains and merges of groups.

    The grouping with the best unweighted mean over domains is chosen if it is significantly better than the merge of
    all: the one-sided level is 2.5 %, divided by the number of groupings that were tried. So domains without groups
    keep one merge.

    Args:
        found: all groupings.
        validation: domain -> unmasked sums of the served merge and of every grouping; withheld scores have no vote.
        served: label of the best merge of all domains.
        metric: the selection metric.

    Returns:
        The entry ``groups`` of the choice: the scores of all groupings, and what was chosen: ``number``, 1 for the
        merge of all, and in the other case ``label``, ``groups``, and the label of each domain's merge. None if nothing
        was tried.
    """
    if not found:
        return None
    labels = [served, *(each.label for each in found)]
    one, *of_groups = (fmean(sums.mean(label, metric) for sums in validation.values()) for label in labels)
    known = {
        each.label: score for each, score in zip(found, of_groups, strict=True) if not math.isnan(score)
    }  # by all domains
    scores = {each.label: known.get(each.label) for each in found}
    entry: dict[str, Any] = {"number": 1, "one_merge": None if math.isnan(one) else one, "scores": scores}
    if not known or math.isnan(one):
        return entry
    best = next(each for each in found if each.label == max(known, key=known.__getitem__))
    difference = paired_difference_of_mean(list(validation.values()), best.label, served, metric)
    needed = NormalDist().inv_cdf(1 - SIGNIFICANCE / len(found)) * difference.standard_error
    entry |= {"gain": difference.mean, "needed": needed}
    if difference.mean <= needed or difference.mean <= 0:
        return entry
    merges = {domain: candidate.label for domain, candidate in best.merges.items()}
    groups = [list(group) for group in best.groups]
    return {**entry, "number": len(groups), "label": best.label, "groups": groups, "merges": merges}


def with_group_row(entry: Mapping[str, Any] | None, validation: Mapping[str, MetricSums]) -> dict[str, MetricSums]:
    """Return sums with the row GROUP, a copy of the chosen grouping's; unchanged if one merge was chosen."""
    if not entry or "label" not in entry:
        return dict(validation)
    return {
        domain: copy_row(sums, entry["label"], GROUP) if entry["label"] in sums.methods else sums
        for domain, sums in validation.items()
    }


def rows_of(found: Sequence[Grouping]) -> dict[str, dict[str, Adapter]]:
    """Return domain -> label -> the merge of its group, for the evaluation on validation."""
    rows: dict[str, dict[str, Adapter]] = {}
    for each in found:
        for domain, candidate in each.merges.items():
            rows.setdefault(domain, {})[each.label] = candidate.adapter
    return rows


def row_of_choice(entry: Mapping[str, Any] | None, found: Sequence[Grouping]) -> dict[str, dict[str, Adapter]]:
    """Return domain -> the row GROUP -> the merge that is chosen for its group; empty if one merge was chosen."""
    chosen = [each for each in found if entry is not None and each.label == entry.get("label")]
    return {domain: {GROUP: candidate.adapter} for each in chosen for domain, candidate in each.merges.items()}
