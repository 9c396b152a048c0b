"""The variants of the learned methods that an experiment asks for, and the settings of each."""

from dataclasses import replace

from fedmerge.config import LEARNED_METHODS, AdaMerging, MergeRec, ThroughClients
from fedmerge.errors import MergeError
from fedmerge.mergerec.objective import ADAMERGING, PAPER, MergeRecSettings
from fedmerge.merging.candidate import MergeVariant


def learned_variants(
    method: str, mergerec: MergeRec, adamerging: AdaMerging, through_clients: ThroughClients
) -> list[MergeVariant]:
    """Return every variant of a learned method, in order.

    Args:
        method: "mergerec" or "adamerging".
        mergerec, adamerging: the sections of the two methods.
        through_clients: section that says whose users the coefficients are learned from.
    """
    section = adamerging if method == "adamerging" else mergerec
    own_users = through_clients.users == "own-users"
    return [MergeVariant(method, granularity=each, own_users=own_users) for each in section.granularities]


def learned_variant(
    name: str, mergerec: MergeRec, adamerging: AdaMerging, through_clients: ThroughClients
) -> MergeVariant:
    """Return the learned variant with a name; for the sections see :func:`learned_variants`.

    Raises:
        MergeError: the experiment has no such variant.
    """
    variants = {
        variant.name: variant
        for method in sorted(LEARNED_METHODS)
        for variant in learned_variants(method, mergerec, adamerging, through_clients)
    }
    if name not in variants:
        raise MergeError(f"learned merges: found {name!r}, expected one of {', '.join(variants)}; correct the label")
    return variants[name]


def learned_settings(variant: MergeVariant, mergerec: MergeRec, adamerging: AdaMerging, seed: int) -> MergeRecSettings:
    """Return the settings of a learned variant; AdaMerging has the pseudo-users of ``[mergerec]``.

    Raises:
        MergeError: the variant is not of a learned method.
    """
    if variant.granularity is None:
        raise MergeError(f"learned merges: found {variant.label!r}, expected a variant with a granularity")
    settings = mergerec_settings(mergerec)
    if variant.method == "adamerging":
        settings = replace(
            ADAMERGING,
            steps=adamerging.steps,
            pseudo_users=mergerec.pseudo_users,
        )
    return replace(settings, granularity=variant.granularity, seed=seed)


def mergerec_settings(section: MergeRec) -> MergeRecSettings:
    """Return the settings of ``[mergerec]``; its preset also decides those that an experiment file does not have."""
    keys = section.model_dump(exclude={"granularities", "preset"})
    return replace(PAPER if section.preset == "paper" else MergeRecSettings(), **keys)
