"""Every merge that an experiment asks for, and the choice among their variants on validation."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from fedmerge.client.metrics import MetricSums
from fedmerge.config import ExperimentConfig
from fedmerge.domain.catalog import Catalog
from fedmerge.encoder.backbone import Backbone
from fedmerge.encoder.lora import Adapter, adapter_sha256, write_adapter
from fedmerge.encoder.text import build_token_table
from fedmerge.errors import MergeError
from fedmerge.merging.methods import method_coefficients
from fedmerge.merging.stack import linear_merge_of_many, stack_adapters, survey_adapters
from fedmerge.run_dir import write_json
from fedmerge.server.collaborative import CollaborativeSettings, learn_coefficients, student_vectors
from fedmerge.server.pseudo_users import PseudoDomain, one_item_domain

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """One merge.

    Attributes:
        label: unique in the run, e.g. ``task-arithmetic 0.4``.
        method: row of METHODS.
        adapter: the merged adapter.
        provenance: label, source domains and hashes, method, parameters, coefficients, the largest rank of a module,
            who was left out on request, policy, backbone, loss curve of a learned merge.
    """

    label: str
    method: str
    adapter: Adapter
    provenance: Mapping[str, Any] = field(repr=False)


def merge_candidates(
    backbone: Backbone | None,
    adapters: Mapping[str, Adapter],
    catalogs: Mapping[str, Catalog],
    config: ExperimentConfig,
    progress: Callable[[str], None] = lambda line: None,
    *,
    details: Mapping[str, Any] = MappingProxyType({}),
    finished: Mapping[str, Candidate] = MappingProxyType({}),
    keep: Callable[[Candidate], None] = lambda candidate: None,
) -> list[Candidate]:
    """Make every merge of the configuration.

    What needs no model run (average, task arithmetic) asks for the adapters one at a time: from a mapping that reads
    them from disk the memory does not grow with the number of domains. mergerec holds all of them, and of every catalog
    the tokens and two matrices of item vectors.

    Args:
        backbone: the frozen encoder; learned methods run it, for the others it may be None.
        adapters: domain -> expert.
        catalogs: domain -> catalog, needed for learned methods only.
        config: methods and their variants.
        progress: receives one line now and then.
        details: entries that every provenance gets, in place of its own where names are equal.
        finished: label -> a merge of the same experts that was made before and is not made again.
        keep: receives every other merge as soon as it is made.

    Raises:
        MergeError: a learned method without the backbone or without the catalogs of all domains.
    """
    layout = survey_adapters(adapters)
    sources = {domain: adapter_sha256(adapters[domain]) for domain in layout.domains}
    candidates: list[Candidate] = []

    def add(label: str, method: str, coefficients: Any, **own: Any) -> None:
        adapter = linear_merge_of_many(adapters, layout, coefficients)
        provenance = {
            "label": label,
            "method": method,
            "domains": sources,
            "coefficients": dict(zip(layout.domains, np.asarray(coefficients).tolist(), strict=True)),
            "coefficient_groups": list(layout.groups) if np.ndim(coefficients) == 2 else ["all"],
            "rank": max(module.rank for module in adapter.modules.values()),
            "excluded": {},
            "policy": config.privacy.policy,
            "backbone": backbone and {"name": backbone.name, "sha256": backbone.sha256},
            "sha256": adapter_sha256(adapter),
            **details,
            **own,
        }
        candidates.append(Candidate(label, method, adapter, provenance))
        keep(candidates[-1])
        progress(f"merged: {label}")

    def made_before(label: str) -> bool:
        if label in finished:
            candidates.append(finished[label])
            progress(f"merged before: {label}")
        return label in finished

    for method in config.merge.methods:
        if method == "average":
            if not made_before(method):
                add(method, method, method_coefficients("average", layout))
        elif method == "task-arithmetic":
            for coefficient in config.merge.task_arithmetic_coefficients:
                label = f"task-arithmetic {coefficient:g}"
                if not made_before(label):
                    coefficients = method_coefficients("task-arithmetic", layout, coefficient=coefficient)
                    add(label, method, coefficients, parameters={"coefficient": coefficient})
        else:
            if backbone is None:
                raise MergeError(f"{method}: found no backbone, expected the one that the adapters were trained on")
            labels = {f"mergerec {granularity}-wise": granularity for granularity in config.mergerec.granularities}
            if not labels.keys() <= finished.keys():
                pseudo = _pseudo_domains(backbone, adapters, catalogs, config, progress)
                stack = stack_adapters(adapters)
                start = torch.full((len(stack.domains),), config.mergerec.initial_coefficient)
                students = student_vectors(backbone, stack, pseudo, start)  # the same for every granularity
                progress("mergerec: item vectors under the initial merge")
            for label, granularity in labels.items():
                if made_before(label):
                    continue
                chosen = config.mergerec.model_dump(exclude={"granularities"})
                settings = CollaborativeSettings(granularity=granularity, seed=config.seed, **chosen)
                learned = learn_coefficients(backbone, stack, pseudo, settings, _every_fifth(label, progress), students)
                add(
                    label,
                    method,
                    learned.coefficients,
                    parameters={**chosen, "granularity": granularity, "seed": config.seed},
                    losses=[{"total": step.total, "rec": step.rec, "kd": step.kd} for step in learned.history],
                )
    return candidates


def write_candidate(candidate: Candidate, root: Path, backbone_name: str) -> Path:
    """Write a merge as the PEFT folder ``root/<label>``, blanks as hyphens, with ``provenance.json``; its path."""
    folder = root / candidate.label.replace(" ", "-")
    write_adapter(candidate.adapter, folder, backbone_name)
    write_json(folder / "provenance.json", candidate.provenance)
    return folder


def choose(
    candidates: Sequence[Candidate], validation: Mapping[str, MetricSums], train_domains: Sequence[str], metric: str
) -> tuple[dict[str, str], str, dict[str, float]]:
    """Choose each method's variant, and the merge to serve, on validation.

    Args:
        candidates: all merges.
        validation: domain -> unmasked metric sums of all candidates.
        train_domains: whose unweighted mean decides; unseen domains have no say.
        metric: the deciding one.

    Returns:
        Method -> label of its best variant; label of the best of all; every label's score. Of equal scores the first
        counts.
    """
    scores = {
        candidate.label: float(
            np.mean([validation[domain].mean(candidate.label, metric) for domain in sorted(train_domains)])
        )
        for candidate in candidates
    }
    best: dict[str, str] = {}
    for candidate in candidates:
        if candidate.method not in best or scores[candidate.label] > scores[best[candidate.method]]:
            best[candidate.method] = candidate.label
    return best, max(best.values(), key=lambda label: scores[label]), scores


def _pseudo_domains(
    backbone: Backbone,
    adapters: Mapping[str, Adapter],
    catalogs: Mapping[str, Catalog],
    config: ExperimentConfig,
    progress: Callable[[str], None],
) -> dict[str, PseudoDomain]:
    missing = sorted(adapters.keys() - catalogs.keys())
    if missing:
        raise MergeError(
            f"mergerec: no catalog of {', '.join(missing)}. Put them into the folder server.catalogs, or let the "
            "clients send theirs (privacy.policy = 'adapter+catalog')."
        )
    pseudo = {}
    for domain in sorted(adapters):
        table = build_token_table(catalogs[domain], backbone.tokenizer, config.text.max_attribute_tokens)
        pseudo[domain] = one_item_domain(domain, backbone, adapters[domain], table, config.text.max_tokens)
        progress(f"mergerec: {len(table)} pseudo-users of {domain} with their expert's vectors")
    return pseudo


def _every_fifth(label: str, progress: Callable[[str], None]) -> Callable[[int, int, Mapping[str, float]], None]:
    def report(step: int, steps: int, losses: Mapping[str, float]) -> None:
        if step == 1 or step % max(1, steps // 5) == 0:
            progress(f"{label}: step {step}/{steps}, loss {losses['loss']:.4f}, kd {losses['kd']:.6f}")

    return report
