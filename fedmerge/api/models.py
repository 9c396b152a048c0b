"""Train, merge, extract, read and write adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedmerge.api.data import section_of
from fedmerge.errors import ConfigError, MergeError

if TYPE_CHECKING:
    from fedmerge.adapter import Adapter
    from fedmerge.client.local_domain import LocalDomain
    from fedmerge.config import Text
    from fedmerge.domain.catalog import Catalog
    from fedmerge.encoder.backbone import Backbone
    from fedmerge.encoder.text import TokenTable
    from fedmerge.merging.folders.reading import AdapterFolders
    from fedmerge.merging.methods import Method


@dataclass(frozen=True)
class Model:
    """A LoRA adapter and how it was made.

    Attributes:
        adapter: the LoRA tensors.
        provenance: the entries of ``provenance.json``.
        sources: the adapters it was made of, and what their PEFT folders agree on (base model, task, module names).
    """

    adapter: Adapter
    provenance: Mapping[str, Any] = field(repr=False)
    sources: AdapterFolders = field(repr=False)

    def save(self, folder: str | Path) -> Path:
        """Write a PEFT folder with ``provenance.json``, whole or not at all.

        Args:
            folder: absent or empty.

        Returns:
            The folder, which ``PeftModel.from_pretrained`` and every fedmerge command can read.

        Raises:
            RunDirError: the folder holds something, or cannot be written.
        """
        from fedmerge.files import new_folder, write_json
        from fedmerge.merging.folders.writing import write_as_sources

        with new_folder(Path(folder)) as partial:
            write_as_sources(self.adapter, self.sources, partial)
            write_json(partial / "provenance.json", self.provenance)
        return Path(folder)


if TYPE_CHECKING:
    AdapterLike = Model | Adapter | str | Path


def load_adapter(folder: str | Path) -> Model:
    """Read a PEFT LoRA folder, and hold it to the hash in its ``provenance.json`` if there is one.

    Raises:
        LayoutMismatchError: not a plain LoRA adapter, or a damaged one.
    """
    from dataclasses import replace

    from fedmerge.adapter import in_memory
    from fedmerge.files import read_record
    from fedmerge.merging.folders.reading import read_folders
    from fedmerge.merging.stack import survey_adapters

    name = Path(folder).resolve().name
    sources = read_folders({name: Path(folder)})
    adapters = {name: in_memory(sources.adapters[name])}
    survey_adapters(adapters)
    provenance = read_record(Path(folder) / "provenance.json")
    return Model(adapters[name], provenance, replace(sources, adapters=adapters))


def train(
    domain: LocalDomain,
    *,
    rank: int = 8,
    alpha: float = 16,
    target_modules: Sequence[str] = ("query", "value"),
    variant: str = "lora",
    seed: int = 0,
    progress: Callable[[str], None] = lambda line: None,
    **settings: Any,
) -> Model:
    """Fine-tune a LoRA expert on one domain's training users; the best step on its validation users is returned.

    Args:
        domain: of :func:`load_domains`.
        rank, alpha, target_modules, variant: as in ``[lora]``; target_modules may be ``("all-linear",)``
            or ``("attention", "mlp")``, and variant ``"rslora"``.
        seed: seed of all randomness.
        progress: receives one line after every validation.
        settings: settings of ``[train]``, such as max_steps, learning_rate, batch_size.

    Raises:
        DomainError: too few users to train on.
        ClientError: the loss is no longer finite.
        ConfigError: a setting that does not exist or is out of bounds.
    """
    from dataclasses import replace

    from fedmerge.adapter import adapter_sha256
    from fedmerge.client.training.expert import train_expert
    from fedmerge.config import Lora, Train
    from fedmerge.merging.candidate import Provenance
    from fedmerge.merging.signals import signals_of

    layout = {"rank": rank, "alpha": alpha, "target_modules": tuple(target_modules), "variant": variant}
    lora = section_of(Lora, layout)
    train = section_of(Train, settings)
    adapter, report = train_expert(domain, lora, train, seed, progress)
    auxiliary = {"auxiliary": record} if (record := train.auxiliary_record()) else {}
    name, backbone = domain.manifest.name, domain.backbone
    provenance = Provenance(
        method="expert",
        domains={name: adapter_sha256(adapter)},
        backbone={"name": backbone.name, "sha256": backbone.sha256},
        sha256=adapter_sha256(adapter),
        training={**asdict(report), "validations": [asdict(each) for each in report.validations[1:]], **auxiliary},
    )
    made_on = replace(_made_on(backbone, {name: adapter}), signals={name: signals_of(asdict(report), adapter)})
    return Model(adapter, provenance.to_dict(), made_on)


def merge(
    adapters: Mapping[str, AdapterLike],
    method: str | Callable[..., Any],
    *,
    coefficients: Mapping[str, float] | None = None,
    scope: Literal["tensor", "layer", "model"] = "tensor",
    space: Literal["full", "core"] = "full",
    output_rank: int | Literal["exact"] = "exact",
    seed: int = 0,
    **parameters: Any,
) -> Model:
    """Merge LoRA adapters of one backbone without training; a module that an adapter lacks counts as zero.

    Args:
        adapters: name -> adapter, result of another function of this API, or PEFT folder.
        method: a name of :func:`methods`, ``package.module:function``, or a function (docs/guides/own-method.md).
        coefficients: name -> factor on its adapter; 1 where it is not named, and 0 leaves it out.
        scope: the entries over which thresholds are taken.
        space: ``core`` merges in core space, at a cost that does not grow with the square of the width.
        output_rank: rank of the result; ``exact`` keeps the merge as the method defines it.
        seed: seed of methods that draw.
        parameters: the method's own parameters.

    Raises:
        LayoutMismatchError: adapters of different backbones, or of different shapes.
        ConfigError: an unknown method, or a setting out of bounds.
        MergeError: values that are not finite.
    """
    from dataclasses import replace

    from fedmerge.merging.training_free import merge_adapters

    sources = _sources(adapters)
    merged = merge_adapters(
        sources.adapters,
        method,
        coefficients=coefficients,
        scope=scope,
        space=space,
        output_rank=output_rank,
        seed=seed,
        signals=sources.signals,
        **parameters,
    )
    provenance = merged.provenance(sources.hashes(), sources.backbone)
    return Model(merged.adapter, {**provenance.to_dict(), **sources.facts()}, replace(sources, signals={}))


def merge_learned(
    adapters: Mapping[str, AdapterLike],
    catalogs: Mapping[str, LocalDomain | Catalog | str | Path],
    backbone: Backbone,
    *,
    preset: Literal["default", "paper", "adamerging"] = "default",
    text: Mapping[str, int] | None = None,
    progress: Callable[[int, int, Mapping[str, float]], None] | None = None,
    **settings: Any,
) -> Model:
    """Merge the MergeRec way: learn coefficients from pseudo-users by distilling each domain's expert.

    Every catalog item is a pseudo-user; no interaction is read.

    Args:
        adapters: domain -> its expert, as for :func:`merge`.
        catalogs: domain -> catalog, opened domain or domain folder, for exactly the domains of ``adapters``.
        backbone: the frozen encoder; left as it was.
        preset: ``paper`` has the settings of arXiv:2601.01753, ``adamerging`` those of arXiv:2310.02575.
        text: settings of ``[text]`` for catalogs; an opened domain has its own.
        progress: called after every step with step, number of steps and losses.
        settings: fields of :class:`fedmerge.mergerec.objective.MergeRecSettings`: granularity, steps, seed, …

    Raises:
        ConfigError: a setting that does not exist or is out of bounds.
        MergeError: a catalog is missing, or a loss is not finite.
    """
    from dataclasses import fields, replace

    from fedmerge.adapter import adapter_sha256
    from fedmerge.config import Text
    from fedmerge.mergerec.learn import learn_coefficients
    from fedmerge.mergerec.objective import ADAMERGING, PAPER, MergeRecSettings
    from fedmerge.mergerec.pseudo_users import pseudo_users_of
    from fedmerge.mergerec.similarity import union_similarity
    from fedmerge.mergerec.vectors import StreamedVectors, Vectors, initial_vectors, merge_vectors
    from fedmerge.merging.candidate import Provenance
    from fedmerge.merging.stack import stack_adapters, survey_adapters

    presets = {"default": MergeRecSettings(), "paper": PAPER, "adamerging": ADAMERGING}
    names = [each.name for each in fields(MergeRecSettings)]
    if preset not in presets or (unknown := sorted(settings.keys() - {*names})):
        found = f"preset {preset!r}" if preset not in presets else f"settings {', '.join(unknown)}"
        raise ConfigError(f"merge_learned: found {found}, expected presets {', '.join(presets)}; {', '.join(names)}.")
    chosen = replace(presets[preset], **settings)
    sources, of_catalogs = _sources(adapters), section_of(Text, text or {})
    if missing := sorted(sources.adapters.keys() - catalogs.keys()):
        raise MergeError(f"merge_learned: no catalog of {', '.join(missing)}. Give one for each adapter.")
    pseudo = {}
    for name in sources.adapters:
        table, settings_of_text = _token_table(catalogs[name], backbone, of_catalogs)
        pseudo[name] = pseudo_users_of(
            name,
            backbone,
            sources.adapters,
            table,
            settings_of_text,
            kind=chosen.pseudo_users,
            number=chosen.num_pseudo_users,
            seed=chosen.seed,
            teacher=chosen.teacher,
        )
    vectors: Vectors
    if chosen.samples(len(sources.adapters)):
        layout = survey_adapters(sources.adapters)
        vectors = StreamedVectors(layout.domains, layout.groups, layout.group_of, sources.adapters)
    else:
        vectors = initial_vectors(stack_adapters(sources.adapters), chosen.initialisation)
    union = None
    if chosen.compares_items:
        union = union_similarity(backbone, sources.adapters, {name: of.items for name, of in pseudo.items()}, chosen)
    learned = learn_coefficients(backbone, vectors, pseudo, chosen, progress, union=union)
    adapter = merge_vectors(vectors, learned.coefficients)
    coefficients = learned.coefficients.tolist()
    provenance = Provenance(
        method="adamerging" if chosen.clamp else "mergerec",
        parameters=asdict(chosen),
        domains=sources.hashes(),
        coefficients=dict(zip(vectors.domains, coefficients, strict=True)),
        losses=[dict(losses) for losses in learned.history if losses],
        reconstructions=list(chosen.reconstructions) or None,
        backbone={"name": backbone.name, "sha256": backbone.sha256},
        sha256=adapter_sha256(adapter),
    )
    return Model(adapter, provenance.to_dict(), _made_on(backbone, sources.adapters))


def extract(
    base: str | Path, tuned: str | Path, *, rank: int, target_modules: Sequence[str] = (), base_model: str | None = None
) -> Model:
    """Extract a LoRA from two full models: the truncated SVD of the change of each linear layer.

    Args:
        base: folder or hub id of the model before fine-tuning, with safetensors files, sharded or not.
        tuned: folder or hub id of the model after it.
        rank: largest rank of a module.
        target_modules: names of linear layers, whole or from the right; empty: all but the output head.
        base_model: name of the base model in the adapter; None: the name of ``base``.

    Returns:
        The adapter. Its provenance has the entries ``residuals`` (by module), ``residual`` (of the whole change),
        ``lost`` (share of the squared change in every changed tensor that the adapter leaves out) and ``unmatched``
        (tensors that only one model has).

    Raises:
        BackboneError: a model that cannot be read.
        ConfigError: a rank below 1, or a target that no linear layer has.
        LayoutMismatchError: models of different shapes.
        MergeError: values that are not finite, or no linear layer that changed.
    """
    from fedmerge.adapter import adapter_sha256
    from fedmerge.merging.candidate import Provenance
    from fedmerge.merging.folders.reading import AdapterFolders
    from fedmerge.merging.low_rank.extraction import extract_adapter

    made = extract_adapter(base, tuned, rank, target_modules)
    name = base_model or made.base_name
    provenance = Provenance(
        method="extract",
        domains={},
        backbone={"name": name, "sha256": None},
        sha256=adapter_sha256(made.adapter),
        parameters={"tuned": Path(tuned).name, "rank": rank, "target_modules": list(target_modules)},
        residuals=dict(made.residuals),
        more={"residual": made.residual, "lost": dict(made.lost), "unmatched": list(made.unmatched)},
    )
    sources = AdapterFolders(
        adapters={Path(tuned).name: made.adapter},
        backbone_name=name,
        backbone_sha256=None,
        task_type=made.task_type,
        target_modules=None,
        fan_in_fan_out=made.fan_in_fan_out,
    )
    return Model(made.adapter, provenance.to_dict(), sources)


def methods() -> dict[str, Method]:
    """Return every merging method by name, with its parameters, source and the laws it obeys."""
    from fedmerge.merging.methods import METHODS

    return dict(METHODS)


def adapter_of(model: AdapterLike) -> Adapter:
    from fedmerge.adapter import Adapter

    if isinstance(model, Adapter):
        return model
    return model.adapter if isinstance(model, Model) else load_adapter(model).adapter


def _sources(adapters: Mapping[str, AdapterLike]) -> AdapterFolders:
    """Collect adapters of one backbone, each with the modules of all, and what their folders agree on."""
    from dataclasses import replace

    from fedmerge.adapter import Adapter, OnDemand, adapter_sha256
    from fedmerge.merging.folders.reading import AdapterFolders, fill_missing, read_folders
    from fedmerge.merging.stack import survey_adapters

    if not adapters:
        raise MergeError("merge: found no adapter, expected one or more.")
    folders = {name: Path(each) for name, each in adapters.items() if isinstance(each, str | Path)}
    found: dict[str, AdapterFolders] = {}
    for name, each in sorted(adapters.items()):
        if isinstance(each, Adapter):
            found[name] = AdapterFolders({name: each}, None, None, "FEATURE_EXTRACTION", None, False)
        elif isinstance(each, Model):
            of_expert = next(iter(each.sources.signals.values()), None)
            found[name] = replace(
                each.sources,
                adapters={name: each.adapter},
                missing={},
                sha256={},
                contents={},
                signals={name: of_expert},
            )
    if folders:
        read = read_folders(folders)
        found |= {name: replace(read, adapters={name: read.adapters[name]}) for name in folders}
    known = {name: each.backbone_sha256 for name, each in found.items() if each.backbone_sha256 is not None}
    if len({*known.values()}) > 1:
        named = ", ".join(f"{name} {sha256[:12]}" for name, sha256 in known.items())
        raise MergeError(f"merge: adapters of different backbones ({named}). Merge adapters of one backbone.")
    bases = {(each.backbone_name, each.revision) for each in found.values() if each.backbone_name is not None}
    if len(bases) > 1 and len(known) < len(found):
        named = ", ".join(f"{name} at {revision or 'main'}" for name, revision in sorted(bases, key=str))
        raise MergeError(f"merge: adapters of different base models ({named}). Merge adapters of one base model.")
    own = {name: found[name].adapters[name] for name in sorted(found)}
    together, missing = fill_missing(own)
    survey_adapters(together)
    for name in found:
        missing[name] = (*found[name].missing.get(name, ()), *missing.get(name, ()))
    best = max(found.values(), key=lambda each: (each.backbone_sha256 is not None, each.backbone_name is not None))
    alike = {each.target_modules for each in found.values()}
    return replace(
        best,
        adapters=together,
        target_modules=best.target_modules if len(alike) == 1 else None,
        embeddings=frozenset(module for each in found.values() for module in each.embeddings),
        sha256={name: found[name].sha256.get(name) or adapter_sha256(own[name]) for name in found},
        missing={name: modules for name, modules in sorted(missing.items()) if modules},
        contents={name: found[name].contents[name] for name in sorted(found) if name in found[name].contents},
        signals=OnDemand(found, lambda name: found[name].signals.get(name)),
    )


def _made_on(backbone: Backbone, adapters: Mapping[str, Adapter]) -> AdapterFolders:
    from fedmerge.merging.folders.reading import AdapterFolders

    return AdapterFolders(adapters, backbone.name, backbone.sha256, "FEATURE_EXTRACTION", None, False)


def _token_table(source: LocalDomain | Catalog | str | Path, backbone: Backbone, text: Text) -> tuple[TokenTable, Text]:
    """Return the token table of a catalog, and the settings of its text."""
    from fedmerge.client.local_domain import LocalDomain
    from fedmerge.domain.catalog import load_catalog
    from fedmerge.encoder.text import build_token_table

    if isinstance(source, LocalDomain):
        return source.table, source.text
    catalog = load_catalog(Path(source)) if isinstance(source, str | Path) else source
    return build_token_table(catalog, backbone.tokenizer, text.max_attribute_tokens, backbone.special.attributes), text
