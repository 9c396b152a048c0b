"""Load the model that a run serves a domain: from the run folder, and from the organisation's own disk."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from fedmerge.adapter import Adapter
from fedmerge.client.cache.experts import load_expert
from fedmerge.client.coefficients.personal import find_personal_merge, personal_settings
from fedmerge.client.evaluate import TextVectors
from fedmerge.client.heads.federated import federated_sources, federated_weights
from fedmerge.client.heads.finding import extended, find_trained_head
from fedmerge.client.heads.heads import ItemSide, LocalHead, head_sources, item_side, source_names
from fedmerge.client.local_domain import LocalDomain, open_domain
from fedmerge.client.training.settings import training_settings
from fedmerge.config import ExperimentConfig, HeadVectors
from fedmerge.device import resolve_compute
from fedmerge.domain.catalog import Catalog, load_catalog
from fedmerge.domain.manifest import Manifest, read_manifest
from fedmerge.encoder.adapted import check_backbone
from fedmerge.encoder.adapter_records import adapter_record
from fedmerge.encoder.backbone import Backbone, open_backbone
from fedmerge.encoder.peft.folder import read_verified
from fedmerge.errors import ClientError
from fedmerge.evaluation.ranks import IntArray
from fedmerge.evaluation.sums import BACKBONE, EXPERT, FEDERATED_SOURCES, GROUP, PERSONAL, VARIANTS, WOVEN, Variant
from fedmerge.files import read_record, table_or_empty
from fedmerge.runs.checkpoints import HEADS, target_merge_folder
from fedmerge.runs.federated_head import read_federated_head, read_fusion
from fedmerge.sequence.fusion import fused_scores, standardise
from fedmerge.sequence.ranking import Source
from fedmerge.server.choice import MERGED
from fedmerge.serving.decision import FUSED, TEXT_MODELS, VECTORS_OF, Decision, decide, group_of
from fedmerge.serving.recommender import Recommender, load_recommender, make_recommender

TEXT_OF: Mapping[HeadVectors, str] = {"merge": MERGED, "expert": EXPERT, "backbone": BACKBONE}


@dataclass(frozen=True)
class RunDomain:
    """A run and a domain folder: what is needed to load any model of the run for this domain.

    Attributes:
        run: the run folder.
        folder: the domain folder.
        config: that of the run; ``cache_dir`` is where this organisation's client kept what never left it.
        manifest: of the domain folder.
        catalog: N items, as they are now.
        backbone: the encoder without an adapter.
    """

    run: Path
    folder: Path
    config: ExperimentConfig
    manifest: Manifest
    catalog: Catalog
    backbone: Backbone

    @cached_property
    def local(self) -> LocalDomain:
        """The domain with its interactions."""
        return open_domain(self.folder, self.backbone, self.config.text)


@dataclass(frozen=True, eq=False)
class ServedModel:
    """A model of a run, for one domain.

    Attributes:
        decision: which model, and why.
        adapter: the adapter that texts are encoded with; None is the backbone alone.
        source: the adapter's folder; None if it lies in no folder of the run.
    """

    decision: Decision
    adapter: Adapter | None
    source: Path | None

    @property
    def fused(self) -> bool:
        """True if the head is fused with text and recent items."""
        return self.decision.model in FUSED


def open_run(run: Path, domain: Path, config: ExperimentConfig) -> RunDomain:
    """Load the backbone of a run, and manifest and catalog of a domain.

    Raises:
        DomainError: no domain folder, or a damaged one.
        BackboneError: a backbone that is missing or damaged.
    """
    manifest, catalog = read_manifest(domain), load_catalog(domain)
    compute = resolve_compute(config.runtime.device, config.runtime.precision)
    backbone = open_backbone(config.backbone, compute)
    return RunDomain(run, domain, config, manifest, catalog, backbone)


def text_of(model: str) -> str:
    """Return the text model that a model is, or that encodes the items of its head."""
    return model if model in TEXT_MODELS else TEXT_OF[VECTORS_OF.get(model, "merge")]


def load_served(place: RunDomain, model: str | None = None) -> ServedModel:
    """Load the text model of what a run serves a domain; :func:`load_head` adds its head.

    Interactions are read only to find an expert that is not in the run folder.

    Args:
        place: of :func:`open_run`.
        model: one of :data:`fedmerge.serving.decision.MODELS`, instead of the run's choice.

    Raises:
        RunDirError: the run has not chosen yet, or its choice is damaged.
        ConfigError: an unknown model.
        ClientError: the expert is neither in the run folder nor on this disk.
        LayoutMismatchError: a damaged adapter, or one of another backbone.
    """
    decision = decide(place.run, place.manifest.name, model)
    adapter, source = _text_adapter(place, decision, text_of(decision.model))
    return ServedModel(decision, adapter, source)


@dataclass(frozen=True, eq=False)
class ServedHead:
    """The head of a served model.

    Attributes:
        head: the client's own head, or the federated one.
        weights: variant -> weights of the sources: those of the fusion, or of the head alone.
    """

    head: LocalHead | Adapter
    weights: Mapping[Variant, Sequence[float]]

    def sources(self, text: TextVectors, histories: Sequence[IntArray], side: ItemSide | None = None) -> list[Source]:
        """Return what is fused, the head first, in the order of the weights; ``side`` is of :meth:`side`, if known."""
        if isinstance(self.head, LocalHead):
            return head_sources(self.head.model, text, histories, self.head.anchor, side)
        return federated_sources(self.head, text, histories, side)

    def extended(self, item_vectors: torch.Tensor) -> "ServedHead":
        """Return the head for a catalog with more items at its end, or with other texts: (N or more, d)."""
        if not isinstance(self.head, LocalHead):
            return self
        return replace(self, head=replace(self.head, model=extended(self.head.model, item_vectors)))

    def side(self, item_vectors: torch.Tensor) -> ItemSide:
        """Return what the sources compute of the items (N, d) alone."""
        return item_side(item_vectors, self.head.model if isinstance(self.head, LocalHead) else None)


def load_head(place: RunDomain, served: ServedModel, item_vectors: torch.Tensor) -> ServedHead:
    """Load the head of a served model that has one.

    The fusion of a federated head is that of the run's evaluation, see :func:`chose_fusion`.

    Args:
        place: of :func:`open_run`.
        served: of :func:`load_served`.
        item_vectors: (N, d) of the catalog under the model's adapter.

    Raises:
        ClientError: the head is not on this disk, or damaged.
    """
    config = place.config
    limit, seed, cache_dir = config.evaluation.validation_users, config.seed, config.cache_dir
    shared = read_federated_head(place.run) if config.head.kind == "federated" else None
    if served.decision.model not in VECTORS_OF:
        if shared is None:
            raise ClientError(
                f"{served.decision.domain} is served {served.decision.model!r} ({served.decision.reason}), but "
                f"{place.run / 'head'} holds no federated head, or a damaged one. Restore it, or use --model merged."
            )
        if not served.fused:
            return ServedHead(shared, _alone(FEDERATED_SOURCES))
        fusion = None if chose_fusion(place) else read_fusion(place.run)
        if fusion is None:
            fusion = federated_weights(place.local, shared, served.adapter, limit, seed, cache_dir)
        return ServedHead(shared, fusion)
    anchor = shared if VECTORS_OF[served.decision.model] == "merge" else None  # other heads are the organisation alone
    try:
        head = find_trained_head(
            place.manifest.name,
            place.catalog.item_ids,
            item_vectors,
            served.adapter,
            config.head,
            limit,
            seed,
            cache_dir,
            anchor,
        )
    except ClientError as error:
        raise _missing(served.decision, "head", error) from error
    if not served.fused:
        return ServedHead(head, _alone(source_names(anchor)))
    return ServedHead(head, {variant: choice.weights for variant, choice in head.fusion.items()})


def chose_fusion(place: RunDomain) -> bool:
    """Return whether the domain chooses its own fusion of the federated head: it trained in the run.

    Other domains, and one that joined as unseen though the settings name it for training, have the mean.
    """
    return (place.run / HEADS / f"{place.manifest.name}.json").exists()


def _alone(sources: Sequence[str]) -> Mapping[Variant, Sequence[float]]:
    """Return the weights of the first source alone."""
    return dict.fromkeys(VARIANTS, (1.0, *[0.0] * (len(sources) - 1)))


def served_recommender(
    place: RunDomain, served: ServedModel, progress: Callable[[int, int], None] | None = None
) -> Recommender:
    """Encode the catalog under a served model, unless ``cache_dir`` has its vectors, and load its head.

    Args:
        place: of :func:`open_run`.
        served: of :func:`load_served`.
        progress: called with (done, N) while items are encoded.

    Raises:
        ClientError: as :func:`load_head`.
        BackboneError, LayoutMismatchError: as :func:`fedmerge.serving.recommender.make_recommender`.
    """
    return _served(place, served, progress)[0]


def _served(
    place: RunDomain, served: ServedModel, progress: Callable[[int, int], None] | None
) -> tuple[Recommender, ServedHead | None]:
    text, cache_dir = place.config.text, place.config.cache_dir
    recommender = make_recommender(place.backbone, served.adapter, place.catalog, text, cache_dir, progress)
    if served.decision.model in TEXT_MODELS:
        return recommender, None
    head = load_head(place, served, recommender.item_vectors)
    return with_head(recommender, head), head


@dataclass(frozen=True, eq=False)
class Opened:
    """A recommender, with what it is of.

    Attributes:
        recommender: of a run's served model, or of an adapter.
        manifest: of the domain.
        decision: of a run; None for an adapter.
        head: of the recommender; None without one.
    """

    recommender: Recommender
    manifest: Manifest
    decision: Decision | None = None
    head: ServedHead | None = None


def open_recommender(
    adapter: str | Path,
    run: Path | None,
    domain: Path,
    config: ExperimentConfig,
    model: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Opened:
    """Load what a run serves a domain, or an adapter.

    Args:
        adapter: a PEFT folder, or ``"none"`` for the backbone alone; not read with a run.
        run: the run folder; None takes the adapter.
        domain: the domain folder.
        config: of the run or the adapter; ``cache_dir`` holds item vectors, and what never left this organisation.
        model: with a run, one of :data:`fedmerge.serving.decision.MODELS` instead of its choice.
        progress: called with (done, N) while items are encoded.

    Raises:
        FedMergeError: as :func:`fedmerge.serving.recommender.load_recommender`, or as :func:`open_run`,
            :func:`load_served` and :func:`served_recommender`.
    """
    if run is None:
        return Opened(load_recommender(adapter, domain, config, progress), read_manifest(domain))
    place = open_run(run, domain, config)
    served = load_served(place, model)
    recommender, head = _served(place, served, progress)
    return Opened(recommender, place.manifest, served.decision, head)


def with_head(recommender: Recommender, head: ServedHead) -> Recommender:
    """Return a recommender that scores by a head; what does not depend on a user is computed here, once."""
    items = recommender.item_vectors
    side = head.side(items)

    def scores(users: torch.Tensor, histories: Sequence[IntArray], variant: Variant) -> torch.Tensor:
        return standardised_scores(head.sources(TextVectors(users, items), histories, side), head.weights[variant])

    return replace(recommender, head=scores)


def standardised_scores(sources: Sequence[Source], weights: Sequence[float]) -> torch.Tensor:
    """Return :func:`fedmerge.sequence.fusion.fused_scores`, also standardised where one source has all the weight.

    So the scores (U, N) of every head have one scale, whatever its weights.
    """
    scores = fused_scores(sources, weights)
    return scores if max(weights) < 1 else standardise(scores)


def _text_adapter(place: RunDomain, decision: Decision, text: str) -> tuple[Adapter | None, Path | None]:
    """Load the adapter of a text model, and its folder."""
    if text == BACKBONE:
        return None, None
    if text == PERSONAL:
        return _personal_merge(place, decision), None
    folders = {MERGED: decision.merge, WOVEN: target_merge_folder(place.run, decision.domain)}
    folder = folders.get(text, place.run / "adapters" / decision.domain)
    if text == WOVEN and not folder.is_dir():
        raise ClientError(f"{decision.domain} has no woven merge: {folder} is missing. Use --model merged.")
    if text == GROUP:
        if (group := group_of(place.run, decision.domain)) is None:
            raise ClientError(f"{decision.domain} has no merge of its group: the run chose none. Use --model merged.")
        folder = group[0]
    if text == EXPERT and not expert_in_run(place, decision.domain):
        return _own_expert(place, decision), None
    adapter = read_verified(folder)
    check_backbone(f"adapter {folder}", place.backbone, adapter_record(folder).backbone_sha256)
    return adapter, folder


def expert_in_run(place: RunDomain, domain: str) -> bool:
    """Return whether the run folder has a domain's expert as it was trained: other transports round it."""
    return (place.run / "adapters" / domain).is_dir() and place.config.privacy.transport == "float32"


def _own_expert(place: RunDomain, decision: Decision) -> Adapter:
    run_id, settings = place.config.run_id or place.run.name, training_settings(place.config)
    try:
        return load_expert(place.local, settings, place.config.cache_dir, run_id, None)
    except ClientError as error:
        raise _missing(decision, "expert", error) from error


def _personal_merge(place: RunDomain, decision: Decision) -> Adapter:
    """Find the personal merge over the run's experts, whose hashes the merges of all of them have."""
    merges = [read_record(path) for path in place.run.glob("merged/*/provenance.json")]
    sources = max((table_or_empty(merge.get("domains")) for merge in merges), key=len, default={})
    found = find_personal_merge(decision.domain, sources, personal_settings(place.config), place.config.cache_dir)
    if found is None:
        folder = Path(place.config.cache_dir).expanduser() / "personal"
        raise _missing(decision, "personal merge", ClientError(f"{folder} holds none of this run."))
    return found


def _missing(decision: Decision, part: str, error: ClientError) -> ClientError:
    return ClientError(
        f"{decision.domain} is served {decision.model!r} ({decision.reason}), but its {part} is not here: {error} It "
        "lies in the cache of the client that trained it, and nowhere else: give that folder with --cache-dir, or use "
        "--model merged."
    )
