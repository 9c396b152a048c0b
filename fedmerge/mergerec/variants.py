"""The variants of the learned methods that an experiment asks for, and the settings of each."""

from dataclasses import replace

from fedmerge.config import LEARNED_METHODS, ExperimentConfig, MergeRec
from fedmerge.errors import MergeError
from fedmerge.mergerec.objective import ADAMERGING, PAPER, CollaborativeSettings


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
    return set() if config.privacy.learns_through_clients else learned_labels(config)
