"""Merges that the server trains further on titles of public catalogs, as candidates beside those they come from."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fedmerge.adapter import adapter_sha256
from fedmerge.config import ExperimentConfig
from fedmerge.domain.catalog import Catalog
from fedmerge.encoder.backbone import Backbone
from fedmerge.errors import MergeError
from fedmerge.federated.product_space import weighted_sum
from fedmerge.llm2rec.stages import STYLE, StageSettings, check_stages, train_stages
from fedmerge.llm2rec.titles import titles_of
from fedmerge.merging.candidate import Candidate, largest_rank
from fedmerge.runs.checkpoints import LEARNING

METHOD = "llm2rec-style"


def refined_label(label: str) -> str:
    """Return the label of a merge after the stages."""
    return f"{METHOD} {label}"


def refined_candidates(
    candidates: Sequence[Candidate],
    backbone: Backbone | None,
    catalogs: Mapping[str, Catalog],
    config: ExperimentConfig,
    progress: Callable[[str], None] = lambda line: None,
    folder: Path | None = None,
    *,
    finished: Mapping[str, Candidate] = MappingProxyType({}),
    keep: Callable[[Candidate], None] = lambda candidate: None,
) -> list[Candidate]:
    """Train merges by ``[mntp]`` and ``[simcse]``; none if both are off.

    Args:
        candidates: merges.
        backbone: the frozen encoder; None only if both stages are off.
        catalogs: domain -> catalog, of the domains in the merges as far as the server has them.
        config: the experiment.
        progress: receives lines about the progress.
        folder: run folder, in which a resumed training finds its state; None keeps none.
        finished: label -> a merge of the same experts that exists already.
        keep: receives every other merge as soon as it is made.

    Returns:
        One merge for each of the candidates, in order.

    Raises:
        BackboneError: as :func:`fedmerge.llm2rec.stages.check_stages`.
        MergeError: no backbone, no title, or the loss is not finite.
    """
    if not config.refines_merges:
        return []
    if backbone is None:
        raise MergeError(f"{METHOD}: found no backbone, expected the one that the adapters were trained on")
    check_stages(backbone, config.mntp, config.simcse)
    settings = StageSettings(config.mntp, config.simcse, config.lora, config.seed)
    sections = {name: getattr(config, name).model_dump(mode="json") for name in settings.names}
    made: list[Candidate] = []
    for candidate in candidates:
        label, before = refined_label(candidate.label), candidate.provenance
        entries = {"style": STYLE, "of": candidate.label, "of_sha256": before.sha256, **sections}
        found = finished.get(label)
        if found is not None and _made_by(found) == entries:
            made.append(found)
            progress(f"merged before: {label}")
            continue
        known = {domain: catalogs[domain] for domain in before.domains if domain in catalogs}
        titles = distinct_titles(backbone, known, config.text.max_attribute_tokens)
        if not titles:
            raise MergeError(f"{label}: found no title in the catalogs of {', '.join(known) or 'no domain'}")
        progress(f"{label}: {len(titles)} titles of {len(known)} catalogs")
        state = folder / LEARNING / f"{METHOD}-{_key(entries, settings, titles)}.safetensors" if folder else None
        stages, losses = train_stages(backbone, candidate.adapter, titles, settings, progress, state)
        adapter = weighted_sum({"merge": candidate.adapter, "stages": stages}, {"merge": 1.0, "stages": 1.0})
        provenance = replace(
            before,
            label=label,
            method=METHOD,
            sha256=adapter_sha256(adapter),
            rank=largest_rank(adapter),
            stages={**entries, "num_titles": len(titles), "rank": config.lora.rank, "losses": losses},
            parameters=None,
            losses=None,
            validation=None,
            chosen_step=None,
            coefficients=None,
            coefficient_groups=None,
            search=None,
            residuals=None,
        )
        made.append(Candidate(adapter, provenance))
        keep(made[-1])
        if state is not None:
            state.unlink(missing_ok=True)
        progress(f"merged: {label}")
    return made


def distinct_titles(backbone: Backbone, catalogs: Mapping[str, Catalog], max_attribute_tokens: int) -> list[str]:
    """Return the distinct titles of all catalogs, sorted, so that they do not depend on the order of the domains."""
    found = {
        title
        for catalog in catalogs.values()
        for title in titles_of(catalog, backbone.tokenizer, max_attribute_tokens)
        if title
    }
    return sorted(found)


def _made_by(candidate: Candidate) -> dict[str, Any]:
    recorded = candidate.provenance.stages or {}
    return {key: value for key, value in recorded.items() if key not in ("num_titles", "rank", "losses")}


def _key(entries: Mapping[str, Any], settings: StageSettings, titles: Sequence[str]) -> str:
    """Return a name of all that the stages depend on."""
    inputs = [entries, settings.lora.model_dump(mode="json"), settings.seed, titles]
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:8]
