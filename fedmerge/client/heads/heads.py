"""A client's own sequence head: trained once on its own users, cached on its disk, ranked alone and fused.

The model depends on the item vectors; the weights of its fusion with text and recent items also on the text vectors of
the users. So with ``inputs = "ids"`` one model serves every encoder. Nothing here leaves the client but what
:func:`head_report` returns.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from fedmerge import __version__
from fedmerge.adapter import Adapter, adapter_sha256
from fedmerge.client.auxiliary.prepared import OF_SIMILAR, similar_items
from fedmerge.client.cache.folders import fill_folder, inputs_key
from fedmerge.client.evaluate import Ranks, TextVectors, encode_text, seen_items
from fedmerge.client.heads.vectors import item_vectors
from fedmerge.client.local_domain import LocalDomain
from fedmerge.config import Head, HeadVectors
from fedmerge.domain.splits import MIN_EVALUATED_LENGTH, Examples, evaluation_examples
from fedmerge.errors import ClientError, DomainError, RunDirError
from fedmerge.evaluation.ranks import IntArray, rank_targets
from fedmerge.evaluation.sums import FEDERATED_HEAD, RECENT_ITEMS, VARIANTS, Variant, fused_label, head_label
from fedmerge.files import exclusive, read_sealed, seal, write_json
from fedmerge.sequence.anchored import anchored_source, recent_items_source, whitened, whitening
from fedmerge.sequence.contrast import Contrast
from fedmerge.sequence.fusion import CAUTIOUS_USERS, FusionChoice, choose_weights, fused_ranks
from fedmerge.sequence.model import SequenceModel, SequenceSettings
from fedmerge.sequence.ranking import Source, represented, sequence_source
from fedmerge.sequence.training import train_sequence_model

MODEL_FILE, REPORT_FILE, INPUTS_FILE = "model.safetensors", "head.json", "inputs.json"
HEAD, TEXT = "head", "text"  # sources of the fusion, with recent items
Progress = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class LocalHead:
    """A client's own head.

    Attributes:
        model: in evaluation mode, on the backbone's device.
        fusion: weights of the sources by variant, in the order of :func:`head_sources`.
        report: of the training, :class:`fedmerge.sequence.training.SequenceReport` as a dict.
        cached: True if an earlier training was reused.
        anchor: the federated head that it continues, one more source of the fusion; None without one.
    """

    model: SequenceModel
    fusion: Mapping[Variant, FusionChoice]
    report: Mapping[str, Any]
    cached: bool
    anchor: Adapter | None = None


def why_no_head(domain: LocalDomain) -> str:
    """Return why the domain cannot have a head of its own; empty if it can."""
    if not domain.can_train:
        return "fewer than two users have two items outside validation and test"
    if not (np.diff(domain.interactions.offsets) >= MIN_EVALUATED_LENGTH).any():
        return f"no user has {MIN_EVALUATED_LENGTH} items, so nothing could end the training or choose the fusion"
    return ""


def load_or_train_head(
    domain: LocalDomain,
    adapter: Adapter | None,
    head: Head,
    validation_users: int | None,
    seed: int,
    cache_dir: str,
    progress: Progress = lambda line: None,
    anchor: Adapter | None = None,
) -> LocalHead:
    """Return the domain's head over the item vectors of an adapter: from the cache, else trained and cached.

    A killed training resumes after its last epoch.

    Args:
        domain: the client's domain.
        adapter: encodes items and histories; None is the backbone alone.
        head: section ``[head]``.
        validation_users: users that end the training and choose the fusion; None takes all.
        seed: seed of the experiment.
        cache_dir: folder on the client's own disk.
        progress: receives a line now and then.
        anchor: the federated head that it continues, one more source of the fusion; None without one.

    Raises:
        DomainError: the domain has too few users, see :func:`why_no_head`.
        ClientError: the training diverged, or the head cannot be cached.
    """
    name = domain.manifest.name
    if reason := why_no_head(domain):
        raise DomainError(f"domain {name}: it has no head of its own, since {reason}. It is served without one.")
    settings = head_settings(head, validation_users)
    validation = evaluation_examples(domain.interactions, "valid", validation_users, seed)
    vectors = item_vectors(domain, adapter, cache_dir)
    inputs = head_inputs(domain, adapter, settings, seed)
    if head.contrast:
        inputs["contrast"] = head.contrast_record() | {"similar": text_inputs(domain, None)}
    folder = _folder(name, inputs, cache_dir)
    trained, cached = read_cached_head(folder), True
    if trained is None:
        with _only_training(folder, lambda: progress(f"{name}: waiting for another process that trains this head")):
            trained = read_cached_head(folder)
            if trained is None:
                cached = False
                contrast = head_contrast(domain, head, cache_dir)
                _train(domain, vectors, settings, validation, inputs, folder, progress, contrast)
                trained = read_cached_head(folder)
    if cached:
        progress(f"{name}: reusing the cached head in {folder}")
    if trained is None:
        raise ClientError(
            f"domain {name}: its head was trained, but cannot be read back from {folder}. Check the disk, or set "
            "cache_dir."
        )
    model = _model(domain, vectors, settings, trained.tensors)

    def sources() -> list[Source]:
        text = encode_text(domain, adapter, validation.histories, vectors)
        return head_sources(model, text, validation.histories, anchor)

    path, of = fusion_path(folder, domain, adapter, anchor), fusion_models(adapter, anchor)
    users = domain.interactions.num_users
    fusion = load_or_choose_fusion(path, of, sources, validation, users, lambda line: progress(f"{name}: {line}"))
    return LocalHead(model, fusion, trained.report, cached, anchor)


@dataclass(frozen=True, eq=False)
class ItemSide:
    """What the sources of a head compute of the items alone: once for all users, however many calls there are.

    Attributes:
        whitened: (N, d).
        represented: of :func:`fedmerge.sequence.ranking.represented`; None without an own head.
    """

    whitened: torch.Tensor
    represented: tuple[torch.Tensor, torch.Tensor] | None


def item_side(item_vectors: torch.Tensor, model: SequenceModel | None = None) -> ItemSide:
    """Return the side of the items (N, d), under a head if there is one."""
    return ItemSide(whitened(item_vectors, whitening(item_vectors)), None if model is None else represented(model))


def head_sources(
    model: SequenceModel,
    text: TextVectors,
    histories: Sequence[IntArray],
    anchor: Adapter | None = None,
    side: ItemSide | None = None,
) -> list[Source]:
    """Return the sources that a head is fused from, in the order of :func:`source_names`.

    Args:
        model: the head.
        text: vectors of the histories and of the items.
        histories: U arrays of item indices, oldest first.
        anchor: the federated head, which the client's own continues; None without one.
        side: of :func:`item_side`, if it is known.
    """
    side = side or item_side(text.items, model)
    own = sequence_source(model, histories, HEAD, side.represented)
    if anchor is None:
        return [own, *text_sources(text, histories, side)]
    shared = anchored_source(anchor, text.items, histories, FEDERATED_HEAD, items=side.whitened)
    return [own, *text_sources(text, histories, side), shared]


def source_names(anchor: Adapter | None = None) -> tuple[str, ...]:
    """Return the names of the sources that a head is fused from."""
    return (HEAD, TEXT, RECENT_ITEMS) if anchor is None else (HEAD, TEXT, RECENT_ITEMS, FEDERATED_HEAD)


def text_sources(text: TextVectors, histories: Sequence[IntArray], side: ItemSide) -> list[Source]:
    """Return the sources that need no training: text and recent items; arguments as for :func:`head_sources`."""
    recent = recent_items_source(text.items, histories, RECENT_ITEMS, side.whitened)
    return [Source(TEXT, text.users, text.items), recent]


def load_or_choose_fusion(
    path: Path,
    of: Mapping[str, str],
    sources: Callable[[], Sequence[Source]],
    validation: Examples,
    num_users: int,
    progress: Progress,
) -> dict[Variant, FusionChoice]:
    """Return the weights of a fusion: from a file, else chosen on validation users and written to it.

    They are held back towards equal weights of all sources but the domain's own head.

    Args:
        path: the file.
        of: :func:`fusion_models`, which the file names.
        sources: returns the sources of the validation users.
        validation: at least one user.
        num_users: of the domain.
        progress: receives a line for each variant that is chosen.

    Raises:
        RunDirError: the file cannot be written.
    """
    if (found := read_fusion(path)) is not None:
        return found
    fused = sources()
    given = [source.label != HEAD for source in fused]  # not trained by the domain
    towards = [is_given / sum(given) for is_given in given]
    fusion = {
        v: choose_weights(fused, validation.targets, seen_items(validation, v), towards, num_users) for v in VARIANTS
    }
    write_json(path, seal({variant: asdict(choice) for variant, choice in fusion.items()} | dict(of)))
    names = " + ".join(source.label for source in fused)
    for variant, choice in fusion.items():
        weights = " + ".join(f"{weight:.2f}" for weight in choice.weights)
        progress(f"fusion {variant}: {weights} of {names}, validation ndcg@10 {choice.ndcg:.4f}")
    return fusion


def alone_and_fused(
    sources: Sequence[Source], weights: Mapping[Variant, Sequence[float]], examples: Examples
) -> tuple[Ranks, Ranks]:
    """Compute every user's rank of the target under the first source, and under all of them fused.

    Args:
        sources: of the users of ``examples``.
        weights: variant -> one weight of each source.
        examples: U users.
    """
    alone, fused = Ranks(), Ranks()
    for variant in VARIANTS:
        seen = seen_items(examples, variant)
        alone[variant] = rank_targets(sources[0].user_vectors, sources[0].item_vectors, examples.targets, seen)
        fused[variant] = fused_ranks(sources, weights[variant], examples.targets, seen)
    return alone, fused


def head_ranks(
    domain: LocalDomain,
    vectors: HeadVectors,
    adapter: Adapter | None,
    head: LocalHead,
    examples: Examples,
    text: TextVectors | None = None,
) -> dict[str, Ranks]:
    """Compute every user's rank of the target under the head alone and fused; these ranks never leave the client.

    Args:
        domain: the client's domain.
        vectors: name of the encoder, for the labels.
        adapter: the encoder, as for :func:`load_or_train_head`.
        head: the head.
        examples: U users.
        text: vectors of the users and items under the encoder, if they are known.

    Returns:
        label -> variant -> (U,).
    """
    text = text or encode_text(domain, adapter, examples.histories)
    sources = head_sources(head.model, text, examples.histories, head.anchor)
    weights = {variant: choice.weights for variant, choice in head.fusion.items()}
    alone, fused = alone_and_fused(sources, weights, examples)
    return {head_label(vectors): alone, fused_label(vectors): fused}


def head_report(head: LocalHead, *, exact: bool) -> dict[str, Any]:
    """Return the report that leaves the client.

    Args:
        head: the head.
        exact: False to leave out what depends on the outcomes of validation users: epochs, the best one, the end of the
            training, and the weights of the fusion.
    """
    report = {"trained": True, "reason": "", "cached": head.cached, "seconds": head.report["seconds"]}
    if not exact:
        return report
    weights = {
        variant: dict(zip(source_names(head.anchor), choice.weights, strict=True))
        for variant, choice in head.fusion.items()
    }
    return report | {key: head.report[key] for key in ("epochs", "best_epoch", "stopped_by")} | {"weights": weights}


def head_settings(head: Head, validation_users: int | None) -> SequenceSettings:
    """Return the settings of a client's own head."""
    return SequenceSettings(
        inputs=head.inputs,
        hidden_size=head.hidden_size,
        dropout=head.dropout,
        id_dropout=head.id_dropout,
        sampled_items=head.sampled_items,
        max_epochs=head.max_epochs,
        max_minutes=head.max_minutes,
        validation_users=validation_users,
    )


def head_contrast(domain: LocalDomain, head: Head, cache_dir: str) -> Contrast | None:
    """Return the contrast of views in the training of a client's own head; None without one.

    Args:
        domain: the client's domain; no adapter may be applied to its backbone.
        head: section ``[head]``.
        cache_dir: folder on the client's own disk, for the item vectors of the backbone.
    """
    if not head.contrast:
        return None
    rates, similar = head.view_rates, None
    if OF_SIMILAR & {*rates}:
        similar = similar_items(domain, item_vectors(domain, None, cache_dir))
    return Contrast(head.contrast, rates, similar)


@contextmanager
def _only_training(folder: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Let one process at a time train a head."""
    lock = folder.with_name(f"{folder.name}.lock")
    with ExitStack() as held:
        try:
            held.enter_context(exclusive(lock.parent, lock.name, waiting))
        except OSError as error:
            raise ClientError(
                f"{lock} cannot be written ({error.strerror}). Check the permissions there, or set cache_dir."
            ) from error
        yield
        lock.unlink(missing_ok=True)  # those who wait find the head


def _train(
    domain: LocalDomain,
    vectors: torch.Tensor,
    settings: SequenceSettings,
    validation: Examples,
    inputs: Mapping[str, Any],
    folder: Path,
    progress: Progress,
    contrast: Contrast | None,
) -> None:
    name = domain.manifest.name
    shutil.rmtree(folder, ignore_errors=True)  # a damaged one
    checkpoint = folder.with_name(f"{folder.name}.checkpoint")
    model, report = train_sequence_model(
        domain.training_sequences,
        len(domain.catalog),
        validation,
        settings,
        inputs["seed"],
        domain.backbone.compute,
        None if settings.inputs == "ids" else vectors,
        lambda line: progress(f"{name}: head: {line}"),
        checkpoint,
        contrast,
    )
    tensors = save({key: tensor.detach().cpu().contiguous() for key, tensor in model.state_dict().items()})

    def write(filled: Path) -> None:
        (filled / MODEL_FILE).write_bytes(tensors)
        record = {**asdict(report), "sha256": hashlib.sha256(tensors).hexdigest()}
        write_json(filled / REPORT_FILE, seal(record))
        write_json(filled / INPUTS_FILE, seal({**inputs, "item_ids": list(domain.catalog.item_ids)}))

    fill_folder(folder, write, lambda: read_cached_head(folder) is not None, f"domain {name}: its head")
    checkpoint.unlink(missing_ok=True)


def _model(
    domain: LocalDomain, vectors: torch.Tensor, settings: SequenceSettings, tensors: dict[str, torch.Tensor]
) -> SequenceModel:
    with torch.random.fork_rng([]):  # the weights are drawn, then replaced
        model = SequenceModel(len(domain.catalog), settings, None if settings.inputs == "ids" else vectors)
    model.load_state_dict(tensors)
    return model.to(domain.backbone.device).eval()


@dataclass(frozen=True, eq=False)
class CachedHead:
    """What the folder of a head holds, but for its fusions.

    Attributes:
        tensors: the state dict of the model.
        report: of the training.
        inputs: of :func:`head_inputs`, and ``item_ids``, the catalog's items in their order.
    """

    tensors: dict[str, torch.Tensor]
    report: dict[str, Any]
    inputs: dict[str, Any]


def read_cached_head(folder: Path) -> CachedHead | None:
    """Read a cached head; None if it is missing or damaged."""
    try:
        data, report = (folder / MODEL_FILE).read_bytes(), read_sealed(folder / REPORT_FILE)
        inputs = read_sealed(folder / INPUTS_FILE)
        if report is None or inputs is None or hashlib.sha256(data).hexdigest() != report.pop("sha256"):
            return None
        return CachedHead(load(data), report, inputs)
    except (OSError, RunDirError, SafetensorError, LookupError, ValueError):
        return None


def fusion_path(folder: Path, domain: LocalDomain, adapter: Adapter | None, anchor: Adapter | None) -> Path:
    """Return the file with the weights of a head's fusion, in the folder of the head; it is named by its inputs."""
    inputs = text_inputs(domain, adapter) | fusion_models(adapter, anchor)
    return folder / f"fusion-{inputs_key(inputs)}.json"


def fusion_models(adapter: Adapter | None, anchor: Adapter | None) -> dict[str, str]:
    """Return what :func:`find_fusion` knows a fusion by: its models' hashes, empty for those it lacks, and how."""
    return {
        "adapter": model_hash(adapter),
        "anchor": model_hash(anchor),
        # A cache of an earlier version may have other ones:
        "sources": ", ".join(source_names(anchor)[1:]),
        "weights": f"held back by {CAUTIOUS_USERS} users",
    }


def find_fusion(folder: Path, adapter: Adapter | None, anchor: Adapter | None) -> dict[Variant, FusionChoice] | None:
    """Return the newest fusion of these models in the folder of a head, for any catalog; None if there is none."""
    wanted, found = fusion_models(adapter, anchor), list[tuple[float, Path]]()
    for path in sorted(folder.glob("fusion-*.json")):
        try:
            record = read_sealed(path) or {}
        except RunDirError:  # damaged
            continue
        if {key: record.get(key) for key in wanted} == wanted:
            found.append((path.stat().st_mtime, path))
    return read_fusion(max(found)[1]) if found else None


def read_fusion(path: Path) -> dict[Variant, FusionChoice] | None:
    """Read the weights of a fusion; None if they are missing or damaged."""
    try:
        record = read_sealed(path) or {}
        return {v: FusionChoice(tuple(record[v]["weights"]), record[v]["ndcg"]) for v in VARIANTS}
    except (RunDirError, LookupError, TypeError):
        return None


def heads_folder(cache_dir: str) -> Path:
    """Return the folder of all heads of a client."""
    return Path(cache_dir).expanduser() / "heads"


def _folder(name: str, inputs: Mapping[str, Any], cache_dir: str) -> Path:
    return heads_folder(cache_dir) / f"{name}-{inputs_key(inputs)}"


def head_inputs(domain: LocalDomain, adapter: Adapter | None, settings: SequenceSettings, seed: int) -> dict[str, Any]:
    """Return everything that a head depends on, as JSON types; the users left out or planted by an audit included."""
    inputs: dict[str, Any] = {
        "interactions": domain.manifest.interactions_sha256,
        "sequences": domain.training_sha256,
        "catalog": domain.manifest.catalog_sha256,
        "num_items": len(domain.catalog),
        "settings": settings.record(),
        "seed": seed,
        "threads": torch.get_num_threads(),
        "device": [str(domain.backbone.device), domain.backbone.compute.precision],
        "versions": [__version__, torch.__version__],
    }
    if settings.inputs != "ids":
        inputs["vectors"] = {
            **text_inputs(domain, adapter),
            "text": [domain.text.max_attribute_tokens, domain.text.max_tokens],  # an item has no max_items
        }
    return inputs


def text_inputs(domain: LocalDomain, adapter: Adapter | None) -> dict[str, Any]:
    """Return everything that the text vectors of a domain's items and users depend on but for its interactions."""
    return {
        "adapter": model_hash(adapter),
        "catalog": domain.manifest.catalog_sha256,
        "backbone": [domain.backbone.sha256, domain.backbone.pooling, domain.backbone.compute.precision],
        "text": domain.text.cache_inputs(),
    }


def model_hash(adapter: Adapter | None) -> str:
    """Return the hash of an adapter; empty for the backbone alone."""
    return "" if adapter is None else adapter_sha256(adapter)
