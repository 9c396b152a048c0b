"""The learned merges that an experiment asks for: their settings, and the pseudo-users that they share."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from fedmerge.adapter import Adapter
from fedmerge.config import LEARNED_METHODS, ExperimentConfig, MergeRec
from fedmerge.domain.catalog import Catalog
from fedmerge.encoder.backbone import Backbone
from fedmerge.encoder.text import build_token_table
from fedmerge.errors import MergeError
from fedmerge.mergerec.objective import ADAMERGING, PAPER, CollaborativeSettings
from fedmerge.mergerec.pseudo_users import PseudoDomain, one_item_domain, pseudo_domain
from fedmerge.merging.stack import linear_merge, stack_adapters


def learned_variants(config: ExperimentConfig, method: str) -> dict[str, CollaborativeSettings]:
    """Label -> settings of every variant of a learned method, in order."""
    section = config.mergerec
    settings, granularities = settings_of(section), section.granularities
    if method == "adamerging":
        granularities = config.adamerging.granularities
        settings = replace(
            ADAMERGING,
            steps=config.adamerging.steps,
            pseudo_users=section.pseudo_users,
            num_pseudo_users=section.num_pseudo_users,
        )
    own_users = " own-users" if config.through_clients.users == "own-users" else ""
    return {
        f"{method} {granularity}-wise{own_users}": replace(settings, granularity=granularity, seed=config.seed)
        for granularity in granularities
    }


def settings_of(section: MergeRec) -> CollaborativeSettings:
    """Return the settings of ``[mergerec]``; its preset also decides those that an experiment file does not have."""
    keys = section.model_dump(exclude={"granularities", "preset"})
    return replace(PAPER if section.preset == "paper" else CollaborativeSettings(), **keys)


def learned_settings(config: ExperimentConfig, label: str) -> CollaborativeSettings:
    """The settings of one variant.

    Raises:
        MergeError: the experiment has no such variant.
    """
    variants = {name: of for method in sorted(LEARNED_METHODS) for name, of in learned_variants(config, method).items()}
    if label not in variants:
        raise MergeError(f"learned merges: found {label!r}, expected one of {', '.join(variants)}; correct the label")
    return variants[label]


def learned_labels(config: ExperimentConfig) -> set[str]:
    """The labels of all learned merges."""
    if config.rounds.rule is not None:
        return {str(config.rounds.rule)} & LEARNED_METHODS
    if config.until == "train":
        return set()
    methods = [method for method in config.merge.methods if method in LEARNED_METHODS]
    return {label for method in methods for label in learned_variants(config, method)}


def labels_from_catalogs(config: ExperimentConfig) -> set[str]:
    """The labels of the merges that the server learns itself, from catalogs."""
    return set() if config.privacy.policy == "catalog-private" else learned_labels(config)


def pseudo_domains(
    backbone: Backbone,
    adapters: Mapping[str, Adapter],
    catalogs: Mapping[str, Catalog],
    config: ExperimentConfig,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, PseudoDomain]:
    """The pseudo-users of every domain, as ``mergerec.pseudo_users`` asks for them.

    Args:
        backbone: the frozen encoder; left as it was.
        adapters: domain -> expert.
        catalogs: domain -> catalog.
        config: text, mergerec and seed are read.
        progress: receives one line a domain.

    Raises:
        MergeError: a catalog is missing.
        ConfigError: as :func:`pseudo_users_of`.
    """
    missing = sorted(adapters.keys() - catalogs.keys())
    if missing:
        raise MergeError(
            f"learned merges: no catalog of {', '.join(missing)}. Put them into the folder server.catalogs, or let the "
            "clients send theirs (privacy.policy = 'adapter+catalog')."
        )
    made = {}
    for domain in sorted(adapters):
        made[domain] = pseudo_users_of(domain, backbone, adapters, catalogs[domain], config)
        kind = config.mergerec.pseudo_users
        progress(f"pseudo-users: {len(made[domain].users)} of {domain} ({kind}) with their expert's vectors")
    return made


def pseudo_users_of(
    domain: str, backbone: Backbone, adapters: Mapping[str, Adapter], catalog: Catalog, config: ExperimentConfig
) -> PseudoDomain:
    """One domain's pseudo-users, as ``mergerec.pseudo_users`` asks for them.

    Args:
        domain: whose.
        backbone: the frozen encoder; left as it was.
        adapters: domain -> expert, of the whole cohort: contrastive pseudo-users look at the others.
        catalog: the domain's own.
        config: text, mergerec and seed are read.

    Raises:
        ConfigError: contrastive pseudo-users of a single domain.
    """
    kind, number = config.mergerec.pseudo_users, config.mergerec.num_pseudo_users
    expert, most = adapters[domain], config.text.max_tokens
    table = build_token_table(catalog, backbone.tokenizer, config.text.max_attribute_tokens)
    items = one_item_domain(domain, backbone, expert, table, most)
    amateur = average_of_others(adapters, domain) if kind == "contrastive" else None
    return pseudo_domain(kind, items, backbone, expert, table, most, number=number, seed=config.seed, amateur=amateur)


def average_of_others(adapters: Mapping[str, Adapter], domain: str) -> Adapter | None:
    """The mean of the other domains' updates; None where there is no other."""
    others = {name: adapters[name] for name in sorted(adapters) if name != domain}
    return linear_merge(stack_adapters(others), torch.full((len(others),), 1 / len(others))) if others else None
