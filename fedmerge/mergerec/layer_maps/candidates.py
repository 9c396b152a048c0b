"""The candidates of a layer-wise search, and the adapter that a map of them stands for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fedmerge.adapter import Adapter
from fedmerge.errors import LayoutMismatchError
from fedmerge.merging.stack import StackLayout, linear_merge, stack_adapters
from fedmerge.merging.training_free import merge_stack

LayerMap = tuple[int, ...]
"""The index of a candidate for each of the G groups."""

REFERENCE_COEFFICIENT = 0.6  # rewards are relative to task arithmetic with the coefficient nearest to it
TIES_DENSITY = 0.5


@dataclass(frozen=True, slots=True)
class LayerCandidates:
    """What every layer group can take its update from.

    Attributes:
        layout: layout of the K experts, with G groups.
        names: C names, such as ``expert books``, ``task-arithmetic 0.6``, ``ties density 0.5``, ``zero``.
        adapters: C adapters of the layout.
        coefficients: for each candidate its (K,) coefficients; None if it is not linear in the experts.
        reference: index of the candidate whose constant map is the start of a search and has reward 0.
    """

    layout: StackLayout
    names: tuple[str, ...]
    adapters: tuple[Adapter, ...]
    coefficients: tuple[torch.Tensor | None, ...]
    reference: int

    @property
    def start(self) -> LayerMap:
        """The constant map of the reference."""
        return (self.reference,) * len(self.layout.groups)


def layer_candidates(
    adapters: Mapping[str, Adapter], kinds: Sequence[str], coefficients: Sequence[float], seed: int
) -> LayerCandidates:
    """Make the candidates, in the order experts, multiples of the sum, TIES, zero.

    Args:
        adapters: domain -> expert. A single expert is the only candidate: there is nothing to merge.
        kinds: some of "experts", "coefficients", "ties" and "zero".
        coefficients: factors λ on the sum of all updates.
        seed: as for the other merging methods.

    Raises:
        LayoutMismatchError, MergeError: as :func:`fedmerge.merging.stack.stack_adapters`.

    Source: arXiv:2503.21272, whose candidates are the experts and several merges of them.
    Differs: multiples of the sum are the merges, beside TIES with density 0.5; ``zero`` stands for "skip", since an
        adapter cannot remove a layer: the layer of the backbone stays as it is.
    """
    stack = stack_adapters(adapters)
    num_domains = len(stack.domains)
    kinds = kinds if num_domains > 1 else ("experts",)
    made: list[tuple[str, Adapter, torch.Tensor | None]] = []
    reference = 0
    if "experts" in kinds:
        units = torch.eye(num_domains).unbind()
        made += [(f"expert {name}", adapters[name], row) for name, row in zip(stack.domains, units, strict=True)]
    if "coefficients" in kinds:
        nearest = min(coefficients, key=lambda factor: abs(factor - REFERENCE_COEFFICIENT))
        reference = len(made) + list(coefficients).index(nearest)
        for factor in coefficients:
            row = torch.full((num_domains,), float(factor))
            made.append((f"task-arithmetic {factor:g}", linear_merge(stack, row), row))
    if "ties" in kinds:
        merge = merge_stack(
            stack,
            "ties",
            scope="tensor",
            space="full",
            output_rank="exact",
            seed=seed,
            scratch=None,
            density=TIES_DENSITY,
        )
        made.append((f"ties density {TIES_DENSITY:g}", merge.adapter, None))
    if "zero" in kinds:
        nothing = torch.zeros(num_domains)
        made.append(("zero", linear_merge(stack, nothing), nothing))
    names, merges, rows = zip(*made, strict=True)
    layout = StackLayout(stack.domains, stack.groups, stack.group_of)
    return LayerCandidates(layout, names, merges, rows, reference)


def check_map(candidates: LayerCandidates, layer_map: Sequence[int]) -> LayerMap:
    """Return a map of known candidates, one for every group.

    Raises:
        LayoutMismatchError: another number of groups, or an unknown index.
    """
    groups, most = candidates.layout.groups, len(candidates.names)
    unknown = [index for index in layer_map if type(index) is not int or not 0 <= index < most]
    if len(layer_map) != len(groups) or unknown:
        found = f"the unknown candidate {unknown[0]!r}" if unknown else f"{len(layer_map)} entries"
        raise LayoutMismatchError(
            f"layer map: found {found}, expected {len(groups)} numbers from 0 to {most - 1}, one for each of "
            f"{', '.join(groups)}; use the same adapters and the same [rmm] everywhere"
        )
    return tuple(layer_map)


def assemble(candidates: LayerCandidates, layer_map: Sequence[int]) -> Adapter:
    """Return the adapter of a map: Δ_m = Δ_m of candidate a_g(m); a constant map is its candidate, bit for bit.

    Raises:
        LayoutMismatchError: as :func:`check_map`.
    """
    chosen = check_map(candidates, layer_map)
    group_of = candidates.layout.group_of
    return Adapter({name: candidates.adapters[chosen[group]].modules[name] for name, group in group_of.items()})


def map_coefficients(candidates: LayerCandidates, layer_map: LayerMap) -> torch.Tensor | None:
    """Return the (K, G) coefficients of a map; None if one of its candidates is not linear."""
    rows = [candidates.coefficients[index] for index in layer_map]
    linear = [row for row in rows if row is not None]
    return torch.stack(linear, dim=1) if len(linear) == len(rows) else None


def named(candidates: LayerCandidates, layer_map: LayerMap) -> dict[str, str]:
    """Return group -> name of its candidate."""
    return {group: candidates.names[index] for group, index in zip(candidates.layout.groups, layer_map, strict=True)}
