"""Every merge that an experiment asks for, and the choice among their variants on validation."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from itertools import product
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from fedmerge.adapter import Adapter, adapter_sha256
from fedmerge.config import ExperimentConfig
from fedmerge.domain.catalog import Catalog
from fedmerge.encoder.backbone import Backbone
from fedmerge.errors import MergeError, PolicyError
from fedmerge.federated.product_space import weighted_sum
from fedmerge.mergerec.coefficients import LearnedCoefficients, Progress, start_coefficients
from fedmerge.mergerec.learn import learn_coefficients, student_vectors
from fedmerge.mergerec.objective import CollaborativeSettings
from fedmerge.mergerec.pseudo_users import PseudoDomain, pseudo_domains
from fedmerge.mergerec.variants import learned_variants
from fedmerge.mergerec.vectors import Vectors, initial_vectors, merge_vectors
from fedmerge.merging.candidate import Candidate, provenance_of_merge
from fedmerge.merging.methods import method_coefficients, method_named
from fedmerge.merging.parameters import Value
from fedmerge.merging.stack import Stack, linear_merge_of_many, stack_adapters, survey_adapters
from fedmerge.merging.training_free import merge_stack
from fedmerge.privacy.dp.domain_noise import average_with_noise, domain_noise, domain_record
from fedmerge.privacy.dp.randomness import source

logger = logging.getLogger(__name__)

Learn = Callable[[str, CollaborativeSettings, Vectors], LearnedCoefficients]
"""(label, settings, vectors) -> coefficients."""


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
    through_clients: Learn | None = None,
) -> list[Candidate]:
    """Make every merge of the configuration.

    Linear methods (average, task arithmetic) ask for the adapters one at a time: from a mapping that reads them from
    disk the memory does not grow with the number of domains. The others hold the factors of all of them, and the dense
    updates of one module; learned ones the factors, and of every catalog the tokens and two matrices of item vectors.

    Args:
        backbone: the frozen encoder; learned methods run it, for the others it may be None.
        adapters: domain -> expert.
        catalogs: domain -> catalog, needed for learned methods only.
        config: methods and their variants.
        progress: receives one line now and then.
        details: fields that every provenance gets, in place of its own values.
        finished: label -> a merge of the same experts that was made before and is not made again.
        keep: receives every other merge as soon as it is made.
        through_clients: learns the coefficients of learned methods in place of this process, which then needs neither
            backbone nor catalogs for them.

    Raises:
        MergeError: a learned method without the backbone or without the catalogs of all domains.
        PolicyError: learning from catalogs under a policy that keeps them at the clients.
    """
    layout = survey_adapters(adapters)
    sources = {domain: adapter_sha256(adapters[domain]) for domain in layout.domains}
    candidates: list[Candidate] = []

    @cache
    def stack() -> Stack:
        return stack_adapters(adapters)

    @cache
    def pseudo(encoder: Backbone) -> dict[str, PseudoDomain]:
        return pseudo_domains(
            encoder,
            adapters,
            catalogs,
            config.text,
            kind=config.mergerec.pseudo_users,
            seed=config.seed,
            progress=progress,
        )

    def add_sum(label: str, method: str, coefficients: Any, vectors: Vectors | None = None, **own: Any) -> None:
        if config.dp.mode == "domain-central":
            adapter, own["privacy"] = _noised_average(adapters, config)
        elif vectors is None or isinstance(vectors, Stack):
            adapter = linear_merge_of_many(adapters, layout, coefficients)
        else:
            adapter = merge_vectors(vectors, coefficients)
        own |= {
            "coefficients": dict(zip(layout.domains, np.asarray(coefficients).tolist(), strict=True)),
            "coefficient_groups": list(layout.groups) if np.ndim(coefficients) == 2 else ["all"],
        }
        add(label, method, adapter, **own)

    def add(label: str, method: str, adapter: Adapter, **own: Any) -> None:
        known: dict[str, str | None] | None = None
        if backbone is not None:
            known = {"name": backbone.name, "sha256": backbone.sha256}
        provenance = provenance_of_merge(label, method, adapter, sources, config.privacy.policy, known)
        candidates.append(Candidate(label, method, adapter, replace(provenance, **{**details, **own})))
        keep(candidates[-1])
        progress(f"merged: {label}")

    def made_before(label: str) -> bool:
        if label in finished:
            candidates.append(finished[label])
            progress(f"merged before: {label}")
        return label in finished

    for method in config.merge.methods:
        row = method_named(method)
        if row.coefficients is not None:
            for label, parameters in linear_variants(method, config):
                if not made_before(label):
                    add_sum(label, method, method_coefficients(method, layout, **parameters), parameters=parameters)
        elif not row.learned:
            for label, parameters in _variants(method, config):
                if not made_before(label):
                    merged = merge_stack(
                        stack(),
                        method,
                        scope=config.merge.scope if row.rows else "tensor",
                        space=config.merge.space,
                        output_rank=config.merge.output_rank or "exact",
                        seed=config.seed,
                        **parameters,
                    )
                    record = merged.provenance(sources, None)
                    entries = ("parameters", "coefficients", "coefficient_groups", "settings", "residuals")
                    add(label, method, merged.adapter, **{key: getattr(record, key) for key in entries})
        else:
            missing = [label for label in learned_variants(config, method) if not made_before(label)]
            if not missing:
                continue
            learn = through_clients or _learner_from_catalogs(method, backbone, pseudo, config, progress)
            learned = _learn(method, missing, stack(), config, learn)
            for label, coefficients, vectors, own in learned:
                add_sum(label, method, coefficients, vectors, **own)
    return candidates


def _learner_from_catalogs(
    method: str,
    backbone: Backbone | None,
    pseudo: Callable[[Backbone], dict[str, PseudoDomain]],
    config: ExperimentConfig,
    progress: Callable[[str], None],
) -> Learn:
    """What learns the coefficients of a method in this process."""
    if config.privacy.learns_through_clients:
        raise PolicyError(
            f"{method}: privacy.policy = 'catalog-private' keeps the catalogs at the clients, so its coefficients "
            "are learned in a federation (fedmerge run). Here do without it (merge.methods), or set privacy.policy."
        )
    if backbone is None:
        raise MergeError(f"{method}: found no backbone, expected the one that the adapters were trained on")
    encoder, students = backbone, dict[str, torch.Tensor]()  # the students of a method's variants are the same

    def learn(label: str, settings: CollaborativeSettings, vectors: Vectors) -> LearnedCoefficients:
        if not students:
            start = start_coefficients(vectors, "domain", settings.start)
            students.update(student_vectors(encoder, vectors, pseudo(encoder), start))
            progress(f"{method}: item vectors under the initial merge")
        shown = _every_fifth(label, progress)
        return learn_coefficients(encoder, vectors, pseudo(encoder), settings, shown, students)

    return learn


def _noised_average(adapters: Mapping[str, Adapter], config: ExperimentConfig) -> tuple[Adapter, Mapping[str, Any]]:
    """The average with the noise of ``dp.mode = 'domain-central'``, and what it spent."""
    noise = domain_noise(config)
    drawn = source(config.dp.randomness, config.seed, "server", "domain-dp")
    rank = max(config.lora.of(domain).rank for domain in adapters)
    return average_with_noise(adapters, config.dp.clip, noise, rank, drawn), domain_record(config.dp, noise)


def linear_variants(method: str, config: ExperimentConfig) -> Iterator[tuple[str, dict[str, Value]]]:
    """Labels and parameters."""
    if "coefficient" not in method_named(method).parameters:
        yield method, {}
        return
    for coefficient in config.merge.task_arithmetic_coefficients:
        yield f"{method} {coefficient:g}", {"coefficient": coefficient}


def _variants(method: str, config: ExperimentConfig) -> Iterator[tuple[str, dict[str, Value]]]:
    """Labels and parameters of a training-free method that is not linear: every density with every coefficient."""
    lists = {"density": config.merge.densities, "coefficient": config.merge.coefficients}
    varied = {key: values for key, values in lists.items() if values and key in method_named(method).parameters}
    for values in product(*varied.values()):
        parameters: dict[str, Value] = dict(zip(varied, values, strict=True))
        yield " ".join([method, *(f"{key} {value:g}" for key, value in parameters.items())]), parameters


def _learn(
    method: str, labels: Sequence[str], stack: Stack, config: ExperimentConfig, learn: Learn
) -> Iterator[tuple[str, torch.Tensor, Vectors, dict[str, Any]]]:
    """Learn what these labels of a learned method ask for: label, coefficients, vectors, entries of the provenance."""
    vectors: Vectors | None = None
    through_clients = config.privacy.learns_through_clients
    for label, settings in learned_variants(config, method).items():
        if label not in labels:
            continue
        if vectors is None:
            vectors = initial_vectors(stack, settings.initialisation)
        learned = learn(label, settings, vectors)
        start = learned.initial_coefficients.flatten()[0].item()
        own = {
            "parameters": asdict(settings) | {"initial_coefficient": start},
            "losses": [dict(losses) for losses in learned.history if losses],
            "validation": [list(looked) for looked in learned.validation],
            "chosen_step": learned.chosen_step,
            **({"through_clients": config.through_clients.model_dump()} if through_clients else {}),
        }
        yield label, learned.coefficients, vectors, own


def _every_fifth(label: str, progress: Callable[[str], None]) -> Progress:
    def report(step: int, steps: int, losses: Mapping[str, float]) -> None:
        if step == 1 or step % max(1, steps // 5) == 0:
            terms = ", ".join(f"{term} {value:.6g}" for term, value in losses.items())
            progress(f"{label}: step {step}/{steps}, {terms}")

    return report


def candidates_of_mean(
    config: ExperimentConfig, mean: Adapter, record: Mapping[str, Any], backbone: Backbone
) -> list[Candidate]:
    """Average and task arithmetic of the clients in a secure sum of equal coefficients.

    Args:
        config: merge counts.
        mean: of their experts.
        record: how it was made; its ``clients`` are who is in it.
        backbone: what they were trained on.
    """
    domains = sorted(record["clients"])
    candidates = []
    for method in config.merge.methods:
        for label, parameters in linear_variants(method, config):
            given = parameters.get("coefficient")
            coefficient = float(given) if given is not None else 1 / len(domains)
            adapter = weighted_sum({"mean": mean}, {"mean": coefficient * len(domains)})
            known: dict[str, str | None] = {"name": backbone.name, "sha256": backbone.sha256}
            sources = dict.fromkeys(domains, "")
            provenance = replace(
                provenance_of_merge(label, method, adapter, sources, config.privacy.policy, known),
                parameters=parameters,
                coefficients=dict.fromkeys(domains, coefficient),
                coefficient_groups=["all"],
                secure_sum={key: value for key, value in record.items() if key != "sha256"},
            )
            candidates.append(Candidate(label, method, adapter, provenance))
    return candidates
