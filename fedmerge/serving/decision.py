"""Which model a run serves a domain, as ``choice.json`` says."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from fedmerge.config import HeadVectors
from fedmerge.errors import ConfigError, RunDirError
from fedmerge.evaluation.sums import (
    BACKBONE,
    EXPERT,
    FEDERATED_FUSED,
    FEDERATED_HEAD,
    GROUP,
    PERSONAL,
    WOVEN,
    fused_label,
    head_label,
)
from fedmerge.files import read_record, table_or_empty, text_or_none
from fedmerge.runs.checkpoints import merge_folder
from fedmerge.server.choice import CHOICE_FILE, MERGED

_VECTORS: tuple[HeadVectors, ...] = get_args(HeadVectors)
VECTORS_OF: Mapping[str, HeadVectors] = {
    **{head_label(vectors): vectors for vectors in _VECTORS},
    **{fused_label(vectors): vectors for vectors in _VECTORS},
}  # model -> the encoder of its head's item vectors
FUSED = (*(fused_label(vectors) for vectors in _VECTORS), FEDERATED_FUSED)
TEXT_MODELS = (MERGED, EXPERT, PERSONAL, WOVEN, GROUP, BACKBONE)
MODELS = (*TEXT_MODELS, *VECTORS_OF, FEDERATED_HEAD, FEDERATED_FUSED)


@dataclass(frozen=True)
class Decision:
    """The model that a domain is served, before anything of it is loaded.

    Attributes:
        run: the run folder.
        domain: name of the domain.
        model: one of :data:`MODELS`.
        reason: why it is this model, to be shown.
        merge: folder of the merge that the run serves.
    """

    run: Path
    domain: str
    model: str
    reason: str
    merge: Path


def decide(run: Path, domain: str, model: str | None = None) -> Decision:
    """Read ``choice.json`` for a domain.

    A domain that decided nothing, such as an unseen one or a new shop's, is served the merge.

    Args:
        run: a run folder.
        domain: name of the domain.
        model: one of :data:`MODELS`, instead of the choice; None takes the choice.

    Raises:
        RunDirError: the run has not chosen yet, or its choice is damaged.
        ConfigError: an unknown model.
    """
    if model is not None and model not in MODELS:
        raise ConfigError(f"model: found {model!r}, expected one of {', '.join(map(repr, MODELS))}.")
    choice = read_record(run / CHOICE_FILE)
    served = text_or_none(choice.get("served"))
    if served is None:
        raise RunDirError(
            f"{run / CHOICE_FILE}: found no served merge, since the run has not chosen yet. Resume it, or give the "
            "folder of an adapter."
        )
    merge = merge_folder(run, served)
    if model is not None:
        return Decision(run, domain, model, "as requested", merge)
    entry: Any = table_or_empty(choice.get("per_domain")).get(domain)
    if entry is None:
        return Decision(run, domain, MERGED, f"no choice was made for {domain} in this run", merge)
    chosen = text_or_none(table_or_empty(entry).get("serve"))
    if chosen not in MODELS:
        raise RunDirError(
            f"{run / CHOICE_FILE}: {domain} is served {chosen!r}, expected one of {', '.join(map(repr, MODELS))}. Use "
            "the fedmerge version that made the run, or give a model of this list."
        )
    return Decision(run, domain, str(chosen), "chosen on validation", merge)


def group_of(run: Path, domain: str) -> tuple[Path, tuple[str, ...]] | None:
    """Return the folder of the merge of a domain's group, and the domains in the group; None without groups."""
    groups = table_or_empty(read_record(run / CHOICE_FILE).get("groups"))
    label = text_or_none(table_or_empty(groups.get("merges")).get(domain))
    if label is None:
        return None
    members = next((group for group in groups.get("groups", []) if domain in group), [domain])
    return merge_folder(run, label), tuple(members)
