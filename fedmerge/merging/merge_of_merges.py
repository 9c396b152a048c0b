"""Merge merges of groups of adapters into the linear merge of all of these adapters, with exact weights.

Every linear merge of a group is a multiple of the sum of its (weighted) updates: Σ f_k Δ_k / n for an average of n
adapters, c Σ f_k Δ_k for task arithmetic. So the merge of all is a sum of such merges, and no adapter is read again.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fedmerge.adapter import Adapter
from fedmerge.errors import ConfigError, MergeError
from fedmerge.files import read_record
from fedmerge.merging.candidate import Provenance
from fedmerge.merging.training_free import MergedAdapter, merge_adapters

LINEAR = ("average", "task-arithmetic")
EXPERT = "expert"  # method in the provenance of a single adapter


@dataclass(frozen=True)
class Part:
    """A merge of some adapters, or a single adapter, as a part of a merge.

    Attributes:
        domains: domain -> hash of its adapter.
        factors: domain -> factor f_k on its update before the merge.
        to_sum: multiplier that turns the merge into Σ f_k Δ_k.
    """

    domains: Mapping[str, str]
    factors: Mapping[str, float]
    to_sum: float


def read_part(name: str, folder: Path, sha256: str) -> Part:
    """Read how the adapter in a folder was merged; without ``provenance.json`` it is a single adapter.

    Args:
        name: name of the part, and of its domain if it is a single adapter.
        folder: its PEFT folder.
        sha256: hash of the adapter.

    Raises:
        MergeError: it is not the exact linear merge of its adapters.
    """
    entries = read_record(folder / "provenance.json")
    return part_of(name, Provenance.from_dict(entries) if entries else None, sha256)


def part_of(name: str, found: Provenance | None, sha256: str) -> Part:
    """Return a part by its provenance; errors and arguments as for :func:`read_part`."""
    if found is None or found.method in ("", EXPERT):
        return Part({name: sha256}, {name: 1.0}, 1.0)
    where = f"merge of merges: {name}"
    if found.method not in LINEAR:
        raise MergeError(
            f"{where} was merged by {found.method}, expected {' or '.join(LINEAR)}: a merge by another method is not a "
            "sum of updates. Merge the adapters of this group themselves."
        )
    lost = max((found.residuals or {}).values(), default=0.0)
    if lost > 0:
        raise MergeError(
            f"{where} was compressed to rank {found.rank} and lost {lost:.4f} of its norm, so a merge with it is not "
            "the merge of its adapters. Merge this group again with --output-rank exact."
        )
    factors = dict.fromkeys(found.domains, 1.0)
    if found.label is None:  # one merge by --method: coefficients are factors before the merge
        factors |= {domain: float(value) for domain, value in (found.coefficients or {}).items() if domain in factors}
    coefficient = 1 / len(factors)
    if found.method == "task-arithmetic":
        coefficient = float((found.parameters or {}).get("coefficient", 1.0))
    if coefficient == 0:
        raise MergeError(f"{where} has coefficient 0, so that its updates are lost; leave it out, or merge it again")
    return Part(dict(found.domains), factors, 1 / coefficient)


def merge_of_merges(
    adapters: Mapping[str, Adapter],
    parts: Mapping[str, Part],
    method: str,
    *,
    coefficient: float = 1.0,
    space: Literal["full", "core"] = "full",
    output_rank: int | Literal["exact"] = "exact",
    scratch: Path | None = None,
) -> MergedAdapter:
    """Merge merges into what ``method`` makes of all their adapters: average Σ_i u_i M_i / n, else c Σ_i u_i M_i.

    u_i is ``Part.to_sum`` and n the number of all adapters. Equal to the flat merge but for rounding to float32.

    Args:
        adapters: part -> merge.
        parts: part -> what it consists of, for exactly the parts of ``adapters``.
        method: "average" or "task-arithmetic".
        coefficient: c, for task arithmetic.
        space, output_rank, scratch: as for :func:`fedmerge.merging.training_free.merge_adapters`. An exact rank is at
            most the sum of the ranks, and min(in, out).

    Returns:
        The merge; its provenance names the adapters in the parts, and under ``merges`` the parts with their factors.

    Raises:
        ConfigError: a method that is not linear.
        MergeError: two parts hold the same adapter.
        LayoutMismatchError: parts of different layouts.
    """
    if method not in LINEAR:
        raise ConfigError(
            f"merge of merges: found method {method!r}, expected {' or '.join(LINEAR)}: for no other method is a merge "
            "of merges the merge of all adapters"
        )
    owners: dict[str, str] = {}
    for name in sorted(parts):
        for domain, sha256 in parts[name].domains.items():
            for key in {domain, sha256} - {""}:
                if (other := owners.setdefault(key, name)) != name:
                    raise MergeError(
                        f"merge of merges: {other} and {name} both hold the adapter of {domain!r}, which would count "
                        "twice; merge groups without common adapters"
                    )
    number = sum(len(part.domains) for part in parts.values())
    share = 1 / number if method == "average" else coefficient
    factors = {name: part.to_sum * share for name, part in sorted(parts.items())}
    merged = merge_adapters(
        adapters,
        "task-arithmetic",
        coefficient=1.0,
        coefficients=factors,
        space=space,
        output_rank=output_rank,
        scratch=scratch,
    )
    parameters = {"coefficient": coefficient} if method == "task-arithmetic" else {}
    leaves = {domain: sha256 for part in parts.values() for domain, sha256 in part.domains.items()}
    of_leaves = {domain: factor for part in parts.values() for domain, factor in part.factors.items()}
    record: dict[str, Any] = {
        name: {"factor": factors[name], "domains": sorted(part.domains)} for name, part in sorted(parts.items())
    }
    return replace(
        merged,
        method=method,
        parameters=parameters,
        coefficients=dict(sorted(of_leaves.items())),
        leaves=dict(sorted(leaves.items())),
        merges=record,
    )
