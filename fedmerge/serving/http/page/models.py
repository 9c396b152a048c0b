"""The models beside the served one: those of the run that this machine has, loaded without reading interactions."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from fedmerge.config import ExperimentConfig
from fedmerge.encoder.adapted import NO_ADAPTER
from fedmerge.errors import ClientError, FedMergeError
from fedmerge.evaluation.sums import (
    BACKBONE,
    EXPERT,
    FEDERATED_FUSED,
    FEDERATED_HEAD,
    GROUP,
    PERSONAL,
    WOVEN,
    fused_label,
)
from fedmerge.report.html.looks import Look, assign_looks
from fedmerge.runs.federated_head import read_fusion
from fedmerge.server.choice import MERGED
from fedmerge.serving.decision import FUSED, TEXT_MODELS, VECTORS_OF, Decision, group_of
from fedmerge.serving.http.shelf import Shelf
from fedmerge.serving.model import (
    Opened,
    RunDomain,
    chose_fusion,
    expert_in_run,
    load_head,
    load_served,
    open_run,
    text_of,
    with_head,
)
from fedmerge.serving.recommender import Recommender, load_recommender, make_recommender

ORDER = (BACKBONE, EXPERT, MERGED, PERSONAL, WOVEN, GROUP)  # of the lists; the others follow
MEANINGS: Mapping[str, str] = {
    BACKBONE: "the pretrained encoder",
    EXPERT: "the adapter that this domain trained",
    MERGED: "one model for all domains",
    PERSONAL: "the merge with this domain's own coefficients",
    WOVEN: "the merge of the adapters that this domain trained and continued",
    GROUP: "one model for the domains like this one",
    FEDERATED_HEAD: "reads the order of items; trained together",
    FEDERATED_FUSED: "reads the order of items; trained together, fused with text and recent items",
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Column:
    """A list of the page.

    Attributes:
        shelf: what makes the list.
        title: the model, as reports name it.
        meaning: what it is, for people.
        look: colour and shape of the method in reports.
        served: True for the model that requests are answered with.
    """

    shelf: Shelf
    title: str
    meaning: str
    look: Look
    served: bool


def columns(shelf: Shelf) -> list[Column]:
    """Return the lists of a page, in their order: the backbone first, if it is there."""
    places = {label: place for place, label in enumerate(ORDER)}
    shelves = sorted((shelf, *shelf.beside), key=lambda each: places.get(each.label, len(ORDER)))
    methods = [_method(each.label, each.opened.decision) for each in shelves]
    looks = assign_looks(methods)
    return [
        Column(each, _title(each.label, each.opened.decision), _meaning(each.label), looks[method], each is shelf)
        for each, method in zip(shelves, methods, strict=True)
    ]


def with_models_beside(shelf: Shelf, folder: Path, config: ExperimentConfig) -> Shelf:
    """Return a shelf with those of the run's other models beside it; beside an adapter's stands the backbone.

    A model that is not on this machine, or is found by interactions alone, is absent, with a reason. Text models have
    their own item vectors, and matrices of the encoder where their adapters differ; a head shares those of its text
    model. All items are scored.

    Args:
        shelf: as its catalog was read.
        folder: the domain folder.
        config: of the run or the adapter.

    Raises:
        FedMergeError: the backbone cannot be loaded.
    """
    decision = shelf.opened.decision
    if decision is None:
        if shelf.label == BACKBONE:
            return shelf
        backbone = Opened(load_recommender(NO_ADAPTER, folder, config), shelf.opened.manifest)
        return replace(shelf, beside=(_beside(shelf, backbone, BACKBONE),))
    place = replace(open_run(decision.run, folder, config), catalog=shelf.catalog)
    texts = {text_of(decision.model): replace(shelf.recommender, head=None, popularity=None, index=None)}
    found, absent = list[Shelf](), dict[str, str]()
    for model in _wanted(place, decision.model):
        reason = _why_absent(place, model)
        if reason is None:
            logger.info("the page: loading %s", _title(model, decision))
            try:
                found.append(_beside(shelf, _open(place, model, texts), model))
            except ClientError as error:
                reason = "It is not on this machine: it lies in the cache of the client that trained it (--cache-dir)."
                logger.warning("%s is not on the page: %s", model, error)
            except FedMergeError as error:
                reason = "It cannot be loaded; the server's log says why."
                logger.warning("%s is not on the page: %s", model, error)
        if reason is not None:
            absent[_title(model, decision)] = reason
    if config.head.kind is None:
        absent["head"] = "The run trained no heads."
    return replace(shelf, beside=tuple(found), absent=absent)


def _wanted(place: RunDomain, served: str) -> list[str]:
    """Return what to show beside the served model; of heads over the same item vectors one is enough."""
    config = place.config
    wanted = [BACKBONE, EXPERT, MERGED, *([PERSONAL] if config.personal.directions is not None else [])]
    if config.weave.schedule is not None and place.manifest.name in config.domains.train:
        wanted.append(WOVEN)
    if group_of(place.run, place.manifest.name) is not None:
        wanted.append(GROUP)
    if config.head.kind is not None:
        wanted += [fused_label(vectors) for vectors in config.head.vectors if vectors != VECTORS_OF.get(served)]
    if config.head.kind == "federated" and served not in (FEDERATED_HEAD, FEDERATED_FUSED):
        # A domain that trained finds the weights of its own fusion by its interactions.
        fused = not chose_fusion(place) and read_fusion(place.run) is not None
        wanted.append(FEDERATED_FUSED if fused else FEDERATED_HEAD)
    return [model for model in wanted if model != served]


def _why_absent(place: RunDomain, model: str) -> str | None:
    if text_of(model) == EXPERT and not expert_in_run(place, place.manifest.name):
        return (
            f"The run folder has no expert of {place.manifest.name} as it was trained; one in a client's cache is "
            "found by the interactions, which are not read for this page."
        )
    return None


def _open(place: RunDomain, model: str, texts: dict[str, Recommender]) -> Opened:
    """Load a model; ``texts`` has the text models that are loaded, and gets another one if it is needed."""
    served, text = load_served(place, model), text_of(model)
    if text not in texts:
        config = place.config
        made = make_recommender(place.backbone, served.adapter, place.catalog, config.text, config.cache_dir)
        other = next(iter(texts.values()))
        texts[text] = replace(made, table=other.table, item_index=other.item_index)  # no second copy of what is equal
    recommender = texts[text]
    if model in TEXT_MODELS:
        return Opened(recommender, place.manifest, served.decision)
    head = load_head(place, served, recommender.item_vectors)
    return Opened(with_head(recommender, head), place.manifest, served.decision, head)


def _beside(shelf: Shelf, opened: Opened, label: str) -> Shelf:
    vectors = opened.recommender.item_vectors
    return Shelf(opened, label, shelf.available, None, frozenset(), vectors)


def _title(label: str, decision: Decision | None) -> str:
    return f"merge: {decision.merge.name}" if label == MERGED and decision is not None else label


def _method(label: str, decision: Decision | None) -> str:
    return decision.merge.name if label == MERGED and decision is not None else label


def _meaning(label: str) -> str:
    if label in MEANINGS:
        return MEANINGS[label]
    if label not in VECTORS_OF:
        return "the adapter that is served"
    return "reads the order of items; trained by this domain" + (
        ", fused with text and recent items" * (label in FUSED)
    )
