"""Candidates of weaving: the universal merges of woven adapters, and the merge of one target."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from fedmerge.adapter import Adapter
from fedmerge.config import Weave
from fedmerge.federated.weaving import Woven, target_merge, woven_merge
from fedmerge.merging.candidate import Candidate, MergeVariant, Origin, provenance_of_merge

WEAVE = "weave"  # method of the universal merges
WEAVE_STYLE = "WeaveRec-style (arXiv:2510.26546), through adapters in place of pooled histories"
SIMILARITY_STYLE = "FedCIA-style (arXiv:2504.14208), over the items that two catalogs share"


def weave_settings(weave: Weave) -> dict[str, Any]:
    """Return the settings of weaving, for the provenance of its merges."""
    if weave.schedule == "similarity":
        return {"kind": SIMILARITY_STYLE, **weave.model_dump(exclude={"factors", "sources"})}
    return {"kind": WEAVE_STYLE, **weave.model_dump(exclude={"factors", "similarity_rank", "similarity_weight"})}


def woven_candidates(
    experts: Mapping[str, Adapter],
    woven: Woven,
    weave: Weave,
    record: Mapping[str, Any],
    origin: Origin,
    progress: Callable[[str], None] = lambda line: None,
    *,
    finished: Mapping[str, Candidate] = MappingProxyType({}),
    keep: Callable[[Candidate], None] = lambda candidate: None,
) -> list[Candidate]:
    """Make the universal merge of woven adapters with each factor.

    Args:
        experts: domain -> expert, of all domains that are merged.
        woven: the adapters that clients continued; a domain without any is no target.
        weave: section ``[weave]``.
        record: hashes of ``woven``, target -> source -> hash.
        origin: hashes of the experts and what else is known of them.
        progress, finished, keep: as for :func:`merge_candidates`.
    """
    targets = {each.target for each in woven}
    own = {name: expert for name, expert in experts.items() if name in targets or len(experts) == 1}
    candidates = []
    for factor in weave.factors:
        variant = MergeVariant(WEAVE, {"factor": factor})
        entries = {**weave_settings(weave), **record}
        before = finished.get(variant.label)
        if before is not None and before.provenance.weave == entries:
            candidates.append(before)
            progress(f"merged before: {variant.label}")
            continue
        adapter = woven_merge(own, woven, factor)
        provenance = provenance_of_merge(variant, adapter, origin)
        candidates.append(Candidate(adapter, replace(provenance, parameters=dict(variant.parameters), weave=entries)))
        keep(candidates[-1])
        progress(f"merged: {variant.label}")
    return candidates


def woven_candidate_of(
    target: str,
    expert: Adapter,
    woven: Woven,
    factor: float,
    weave: Weave,
    record: Mapping[str, Any],
    origin: Origin,
) -> Candidate:
    """Make the merge of what one domain trained: its expert, and what it continued.

    Args:
        target: the domain.
        expert: its expert.
        woven, weave, record, origin: as for :func:`woven_candidates`.
        factor: λ.
    """
    variant = MergeVariant(WEAVE, {"factor": factor})
    adapter = target_merge(target, expert, woven, factor)
    entries = {**weave_settings(weave), "target": target, **record}
    provenance = provenance_of_merge(variant, adapter, origin)
    return Candidate(adapter, replace(provenance, parameters=dict(variant.parameters), weave=entries))
