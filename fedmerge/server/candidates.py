"""Every merge that an experiment asks for: from its experts, from their mean in a secure sum, or after rounds."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache, partial
from itertools import product
from types import MappingProxyType
from typing import Any

import torch

from fedmerge.adapter import Adapter
from fedmerge.config import (
    DP,
    AdaMerging,
    ExperimentConfig,
    Livar,
    Lora,
    Merge,
    MergeRec,
    Personal,
    Rmm,
    Rounds,
    Text,
    ThroughClients,
)
from fedmerge.domain.catalog import Catalog
from fedmerge.encoder.backbone import Backbone
from fedmerge.errors import MergeError, PolicyError
from fedmerge.federated.product_space import weighted_sum
from fedmerge.mergerec.coefficients import LearnedCoefficients, Progress, start_coefficients
from fedmerge.mergerec.directions import universal_merge
from fedmerge.mergerec.layer_maps.candidates import assemble, layer_candidates
from fedmerge.mergerec.learn import learn_coefficients, student_vectors
from fedmerge.mergerec.objective import MergeRecSettings
from fedmerge.mergerec.pseudo_users import PseudoDomain, pseudo_domains
from fedmerge.mergerec.similarity import UnionSimilarity, union_similarity
from fedmerge.mergerec.variants import learned_settings, learned_variants
from fedmerge.mergerec.vectors import SparseRows, StreamedVectors, Vectors, initial_vectors, merge_vectors
from fedmerge.merging.candidate import Candidate, MergeVariant, Origin, provenance_of_merge
from fedmerge.merging.methods import complete_parameters, method_coefficients, method_named
from fedmerge.merging.signals import NO_SIGNALS, Signals, without_signals
from fedmerge.merging.stack import Stack, StackLayout, by_module, linear_merge_of_many, stack_adapters, survey_adapters
from fedmerge.merging.training_free import merge_stack
from fedmerge.privacy.dp.accountant import agreed_noise
from fedmerge.privacy.dp.domain_noise import average_with_noise, domain_record
from fedmerge.privacy.dp.randomness import source
from fedmerge.privacy.dp.releases import Counted, coefficient_messages, domain_releases
from fedmerge.server.layer_search import METHOD as RMM_STYLE
from fedmerge.server.layer_search import Search, search_entries

logger = logging.getLogger(__name__)

UNIVERSAL = "fedecider-style"  # the mean of all personal merges
FORMS: Mapping[str, Mapping[str, bool]] = {"per-step": {}, "published": {"per_step": False, "per_entry": False}}
"""Form of ``livar.forms`` -> the parameters that it sets."""

Learn = Callable[[MergeVariant, MergeRecSettings, Vectors], LearnedCoefficients]
"""(variant, settings, vectors) -> coefficients."""


@dataclass(frozen=True)
class Recipe:
    """The settings of an experiment that its merges depend on.

    Attributes:
        merge, livar, mergerec, adamerging, through_clients, rmm: sections of the configuration.
        seed: seed of all draws.
        average_with_noise: the merge of ``dp.mode = 'domain-central'``: adapters -> noised average and its record for
            the provenance; None without noise.
        at_clients: True if coefficients are learned through the clients, False if from catalogs in this process.
    """

    merge: Merge
    livar: Livar
    mergerec: MergeRec
    adamerging: AdaMerging
    through_clients: ThroughClients
    rmm: Rmm
    seed: int
    average_with_noise: Callable[[Mapping[str, Adapter]], tuple[Adapter, Mapping[str, Any]]] | None = None
    at_clients: bool = False

    def variants(self, without: Sequence[str] = ()) -> list[MergeVariant]:
        """Return every variant of every method, in order, as merges without some domains of the run."""
        variants = [variant for method in self.merge.methods for variant in self.variants_of(method)]
        return [replace(variant, without=tuple(without)) for variant in variants]

    def variants_of(self, method: str) -> list[MergeVariant]:
        """Return every variant of one method, in order."""
        if method == RMM_STYLE:
            return [MergeVariant(method)]
        if method_named(method).signals:
            return livar_variants(method, self.livar)
        if method_named(method).learned:
            return learned_variants(method, self.mergerec, self.adamerging, self.through_clients)
        return training_free_variants(method, self.merge)


def recipe_of(config: ExperimentConfig) -> Recipe:
    """Return the recipe of an experiment."""
    noise = None
    if config.dp.mode == "domain-central":
        releases = domain_releases(coefficient_messages(config))
        noise = partial(_noised_average, dp=config.dp, releases=releases, lora=config.lora, seed=config.seed)
    return Recipe(
        config.merge,
        config.livar,
        config.mergerec,
        config.adamerging,
        config.through_clients,
        config.rmm,
        config.seed,
        noise,
        at_clients=config.privacy.learns_through_clients,
    )


def livar_variants(method: str, livar: Livar) -> list[MergeVariant]:
    """Return every variant of the method that weighs by training signals, in order: each form with each factor."""
    spread = {"spread": True} if livar.spread else {}
    return [
        MergeVariant(method, {"coefficient": coefficient, **FORMS[form], **spread})
        for form, coefficient in product(livar.forms, livar.coefficients)
    ]


def training_free_variants(method: str, merge: Merge) -> list[MergeVariant]:
    """Return every variant of a training-free method, in order: each density with each coefficient."""
    row = method_named(method)
    lists = {"density": merge.densities, "coefficient": merge.coefficients}
    if row.coefficients is not None:
        lists = {"coefficient": merge.task_arithmetic_coefficients}
    varied = {key: values for key, values in lists.items() if values and key in row.parameters}
    return [MergeVariant(method, dict(zip(varied, values, strict=True))) for values in product(*varied.values())]


def merge_candidates(
    adapters: Mapping[str, Adapter],
    variants: Sequence[MergeVariant],
    origin: Origin,
    recipe: Recipe,
    progress: Callable[[str], None] = lambda line: None,
    *,
    learn: Learn | None = None,
    search: Search | None = None,
    signals: Signals = NO_SIGNALS,
    finished: Mapping[str, Candidate] = MappingProxyType({}),
    keep: Callable[[Candidate], None] = lambda candidate: None,
) -> list[Candidate]:
    """Make merges, in order.

    Linear methods (average, task arithmetic) read one adapter at a time, so with a mapping that reads from disk their
    memory does not grow with the number of domains; nor does that of mergerec with ``domains_per_step``. The others
    hold the factors of all adapters and the dense updates of one module.

    Args:
        adapters: domain -> expert.
        variants: the merges to make, such as ``recipe.variants()``.
        origin: hashes of the experts and what else is known of them.
        recipe: settings that the variants share.
        progress: receives lines about the progress.
        learn: learns the coefficients of learned methods; None if this process cannot.
        search: searches for the map of ``rmm-style``; None if this process cannot.
        signals: domain -> training signals, for a method that weighs by them.
        finished: label -> a merge of the same experts that exists already.
        keep: receives every other merge as soon as it is made.

    Raises:
        PolicyError: a learned method without ``learn`` or ``search``, since the clients keep the catalogs.
        MergeError: a learned method without the backbone or without the catalogs of all domains.
    """
    layout = survey_adapters(adapters)
    origin = replace(origin, domains={domain: origin.domains[domain] for domain in layout.domains})
    candidates: list[Candidate] = []

    @cache
    def stack() -> Stack:
        return stack_adapters(adapters)

    @cache
    def all_signals() -> Signals:
        return {domain: signals.get(domain) for domain in layout.domains}

    @lru_cache(maxsize=1)
    def vectors_of(initialisation: str, streamed: bool) -> Vectors:
        if streamed:
            return StreamedVectors(layout.domains, layout.groups, layout.group_of, adapters)
        return initial_vectors(stack(), initialisation)

    def linear(
        coefficients: torch.Tensor, vectors: Vectors | None = None, groups: StackLayout = layout
    ) -> tuple[Adapter, dict[str, Any]]:
        entries: dict[str, Any] = {
            "coefficients": dict(zip(layout.domains, coefficients.tolist(), strict=True)),
            "coefficient_groups": list(groups.groups) if coefficients.ndim == 2 else ["all"],
        }
        if recipe.average_with_noise is not None:
            adapter, entries["privacy"] = recipe.average_with_noise(adapters)
        elif not isinstance(vectors, SparseRows):
            adapter = linear_merge_of_many(adapters, groups, coefficients)
        else:
            adapter = merge_vectors(vectors, coefficients)
        return adapter, entries

    def make(variant: MergeVariant) -> tuple[Adapter, dict[str, Any]]:
        """Return the adapter and the entries of its provenance that depend on the method."""
        row = method_named(variant.method)
        if row.coefficients is not None:
            groups = by_module(layout) if row.signals else layout
            chosen = complete_parameters(variant.method, variant.parameters)
            found = all_signals() if row.signals else NO_SIGNALS
            adapter, entries = linear(method_coefficients(variant.method, groups, found, **chosen), groups=groups)
            if row.signals and (lacking := without_signals(layout.domains, found, bool(chosen["spread"]))):
                entries["more"] = {"without_signals": lacking}
                progress(f"{variant.label}: no training signals of {', '.join(lacking)}: 1/{len(layout.domains)} each")
            return adapter, {"parameters": chosen, **entries}
        if not row.learned:
            made = merge_stack(
                stack(),
                variant.method,
                scope=recipe.merge.scope if row.rows else "tensor",
                space=recipe.merge.space,
                output_rank=recipe.merge.output_rank or "exact",
                seed=recipe.seed,
                scratch=None,
                signals=NO_SIGNALS,
                **variant.parameters,
            )
            return made.adapter, made.entries()
        if variant.method == RMM_STYLE and search is not None:
            choices = layer_candidates(adapters, recipe.rmm.candidates, recipe.rmm.coefficients, recipe.seed)
            best = search(choices)
            return assemble(choices, best.layer_map), search_entries(choices, best, recipe.rmm)
        if learn is None or variant.method == RMM_STYLE:
            raise PolicyError(
                f"{variant.method}: privacy.policy = 'catalog-private' keeps the catalogs at the clients, so its "
                "coefficients are learned in a federation (fedmerge run). Leave the method out of merge.methods, or "
                "set another privacy.policy."
            )
        settings = learned_settings(variant, recipe.mergerec, recipe.adamerging, recipe.seed)
        vectors = vectors_of(settings.initialisation, settings.samples(len(layout.domains)))
        learned = learn(variant, settings, vectors)
        adapter, entries = linear(learned.coefficients, vectors)
        if recipe.at_clients:
            entries["through_clients"] = recipe.through_clients.model_dump()
        return adapter, {**entries, **_learned_entries(settings, learned)}

    for variant in variants:
        if variant.label in finished:
            candidates.append(finished[variant.label])
            progress(f"merged before: {variant.label}")
            continue
        adapter, entries = make(variant)
        provenance = replace(provenance_of_merge(variant, adapter, origin), **entries)
        candidates.append(Candidate(adapter, provenance))
        keep(candidates[-1])
        progress(f"merged: {variant.label}")
    return candidates


def _learned_entries(settings: MergeRecSettings, learned: LearnedCoefficients) -> dict[str, Any]:
    """Return the entries of the provenance that say how coefficients were learned."""
    start = learned.initial_coefficients.flatten()[0].item()
    return {
        "parameters": asdict(settings) | {"initial_coefficient": start},
        "losses": [dict(losses) for losses in learned.history if losses],
        "validation": [list(looked) for looked in learned.validation],
        "chosen_step": learned.chosen_step,
        "reconstructions": list(settings.reconstructions) or None,
    }


def learn_from_catalogs(
    backbone: Backbone | None,
    adapters: Mapping[str, Adapter],
    catalogs: Mapping[str, Catalog],
    text: Text,
    progress: Callable[[str], None] = lambda line: None,
) -> Learn:
    """Return a function that learns coefficients in this process, from the catalogs.

    It holds the tokens of every catalog and two matrices of item vectors. Variants that share their pseudo-users and
    their initial merge encode the items once.

    Args:
        backbone: the frozen encoder; None only if no method is learned.
        adapters: domain -> expert.
        catalogs: domain -> catalog; may be empty only if no method is learned.
        text: section ``[text]``.
        progress: receives lines about the progress.

    Returns:
        A function for :func:`merge_candidates`. It raises MergeError without the backbone or one of the catalogs.
    """
    students: dict[str, Mapping[str, torch.Tensor]] = {}  # of the latest method, whose variants share them

    @cache
    def pseudo_users(
        encoder: Backbone, kind: str, number: int | None, seed: int, teacher: str
    ) -> dict[str, PseudoDomain]:
        return pseudo_domains(
            encoder,
            adapters,
            catalogs,
            text,
            kind=kind,
            number=number,
            seed=seed,
            teacher=teacher,
            progress=progress,
        )

    def pseudo_users_for(encoder: Backbone, settings: MergeRecSettings) -> dict[str, PseudoDomain]:
        number, teacher = settings.num_pseudo_users, settings.teacher
        return pseudo_users(encoder, settings.pseudo_users, number, settings.seed, teacher)

    @lru_cache(maxsize=1)
    def union_of(encoder: Backbone, settings: MergeRecSettings) -> UnionSimilarity:
        items = {domain: pseudo.items for domain, pseudo in pseudo_users_for(encoder, settings).items()}
        found = union_similarity(encoder, adapters, items, settings)
        progress(f"similarity: {len(found.items)} items of {len(items)} catalogs with the vectors of every expert")
        return found

    def learn(variant: MergeVariant, settings: MergeRecSettings, vectors: Vectors) -> LearnedCoefficients:
        method = variant.method
        if backbone is None:
            raise MergeError(f"{method}: found no backbone, expected the one that the adapters were trained on")
        pseudo = pseudo_users_for(backbone, settings)
        union = union_of(backbone, replace(settings, granularity="layer")) if settings.compares_items else None
        if settings.terms_of_users and method not in students:
            start = start_coefficients(vectors, "domain", settings.start)
            students.clear()
            students[method] = student_vectors(backbone, vectors, pseudo, start)
            progress(f"{method}: item vectors under the initial merge")
        report = _every_fifth(variant.label, progress)
        return learn_coefficients(backbone, vectors, pseudo, settings, report, students.get(method), union=union)

    return learn


def _noised_average(
    adapters: Mapping[str, Adapter], *, dp: DP, releases: tuple[Counted, ...], lora: Lora, seed: int
) -> tuple[Adapter, Mapping[str, Any]]:
    """Return the average with the noise of ``dp.mode = 'domain-central'``, and what it spent."""
    noise = agreed_noise(dp, releases)
    rank = max(lora.of(domain).rank for domain in adapters)
    drawn = source(dp.randomness, seed, "server", "domain-dp")
    return average_with_noise(adapters, dp.clip, noise, rank, drawn), domain_record(dp, noise)


def _every_fifth(label: str, progress: Callable[[str], None]) -> Progress:
    """Return a callback that reports the first step and every fifth of the steps."""

    def report(step: int, steps: int, losses: Mapping[str, float]) -> None:
        if step == 1 or step % max(1, steps // 5) == 0:
            terms = ", ".join(f"{term} {value:.6g}" for term, value in losses.items())
            progress(f"{label}: step {step}/{steps}, {terms}")

    return report


def candidates_of_mean(mean: Adapter, record: Mapping[str, Any], origin: Origin, merge: Merge) -> list[Candidate]:
    """Make the average and task arithmetic from the mean of the experts in a secure sum.

    Args:
        mean: mean of the experts, with equal weights.
        record: record of the sum, for the provenance.
        origin: the domains in the sum, without hashes, and what else is known of them.
        merge: methods and their variants.
    """
    candidates = []
    for variant in (each for method in merge.methods for each in training_free_variants(method, merge)):
        coefficient = variant.parameters.get("coefficient", 1 / len(origin.domains))
        adapter = weighted_sum({"mean": mean}, {"mean": coefficient * len(origin.domains)})
        provenance = replace(
            provenance_of_merge(variant, adapter, origin),
            parameters=variant.parameters,
            coefficients=dict.fromkeys(origin.domains, coefficient),
            coefficient_groups=["all"],
            secure_sum={key: value for key, value in record.items() if key != "sha256"},
        )
        candidates.append(Candidate(adapter, provenance))
    return candidates


def universal_candidate(
    adapters: Mapping[str, Adapter], coefficients: Mapping[str, torch.Tensor], personal: Personal, origin: Origin
) -> Candidate:
    """Return the mean of all personal merges as a merge that every domain can be served.

    Args:
        adapters: domain -> expert, of all domains of the cohort.
        coefficients: domain -> (K, G) that it fitted and sent; a domain that sent none counts with its expert.
        personal: section ``[personal]``.
        origin: hashes of the experts and what else is known of them.
    """
    adapter = universal_merge(adapters, coefficients, personal.directions or "module")
    layout = survey_adapters(adapters, values=False)
    fitted = {
        domain: dict(zip(layout.domains, values.tolist(), strict=True))
        for domain, values in sorted(coefficients.items())
    }
    provenance = replace(
        provenance_of_merge(MergeVariant(UNIVERSAL), adapter, origin),
        parameters=personal.model_dump(mode="json"),
        coefficient_groups=list(layout.groups),
        more={"personal_coefficients": fitted},
    )
    return Candidate(adapter, provenance)


def candidate_of_rounds(
    adapter: Adapter, rounds: Rounds, aggregations: Sequence[Mapping[str, Any]], origin: Origin
) -> Candidate:
    """Return the global adapter of a federation over rounds as a merge.

    Args:
        adapter: the global adapter after the last round.
        rounds: section ``[rounds]``.
        aggregations: report of the aggregation of every round.
        origin: the domains that took part and what else is known of them.
    """
    variant = MergeVariant(str(rounds.rule), num_rounds=rounds.number)
    provenance = replace(
        provenance_of_merge(variant, adapter, origin),
        parameters=rounds.model_dump(mode="json"),
        rounds=list(aggregations),
    )
    return Candidate(adapter, provenance)
