"""Read PEFT LoRA folders of encoders or decoders that are to be merged, and make them adapters of one layout."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fedmerge.adapter import Adapter, LoraModule, OnDemand, adapter_sha256
from fedmerge.encoder.adapter_records import adapter_record
from fedmerge.encoder.peft.contents import PARTS, Contents, shortened
from fedmerge.encoder.peft.folder import open_verified
from fedmerge.encoder.peft.model_weights import ModelWeights, open_weights, read_weight_like
from fedmerge.errors import BackboneError, LayoutMismatchError, MergeError
from fedmerge.merging.folders.agreement import agreed_base, agreed_mapping, agreed_setting, agreed_targets
from fedmerge.merging.signals import Signals, read_signals
from fedmerge.merging.stack import dense_module, survey_adapters


@dataclass(frozen=True)
class AdapterFolders:
    """Adapters of one layout, and the settings that their folders share.

    Attributes:
        adapters: name -> adapter.
        backbone_name: ``base_model_name_or_path``; None if no folder has one.
        backbone_sha256: hash of the backbone they were trained on; None if unknown.
        task_type: PEFT's task type; None if no folder has one.
        target_modules: PEFT's target modules, if they match the modules of these adapters and no others; else None.
        fan_in_fan_out: True for layers that store transposed weights.
        revision: revision of the base model; None for its newest.
        auto_mapping: PEFT's class of a base model without a task type; None if no folder has one.
        embeddings: modules that are embeddings: A (r, tokens), B (width, r).
        sha256: name -> hash of the adapter as it was read; of an adapter that is not listed, its own.
        missing: name -> modules that its folder lacks and other folders have; they count as zero.
        contents: name -> all that its folder holds; empty for adapters that were not read from folders.
        base: weights of the base model; None if not given.
        hub: name -> repository, revision and commit of an adapter from the hub.
        signals: name -> training signals beside the adapter, None where there are none; read when they are used.
    """

    adapters: Mapping[str, Adapter]
    backbone_name: str | None
    backbone_sha256: str | None
    task_type: str | None
    target_modules: tuple[str, ...] | str | None
    fan_in_fan_out: bool
    revision: str | None = None
    auto_mapping: Mapping[str, Any] | None = None
    embeddings: frozenset[str] = frozenset()
    sha256: Mapping[str, str] = field(default_factory=dict)
    missing: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    contents: Mapping[str, Contents] = field(default_factory=dict)
    base: ModelWeights | None = None
    hub: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    signals: Signals = field(default_factory=dict)

    @property
    def backbone(self) -> dict[str, str | None]:
        """Name and sha256 of the backbone, as far as known, and its revision if there is one."""
        known = {"name": self.backbone_name, "sha256": self.backbone_sha256}
        return known | ({"revision": self.revision} if self.revision else {})

    def hashes(self) -> dict[str, str]:
        """Return name -> hash of the adapter."""
        return {name: self.sha256.get(name) or adapter_sha256(adapter) for name, adapter in self.adapters.items()}

    def facts(self) -> dict[str, Any]:
        """Return entries of the provenance: what the merge does not take from the folders as it is."""
        each = self.contents.items()
        found: dict[str, Any] = {
            "missing_modules": {name: list(modules) for name, modules in self.missing.items()},
            "ignored_modules": {name: list(found.ignored) for name, found in each if found.ignored},
            "lacking_targets": {name: list(found.lacking) for name, found in each if found.lacking},
            "left_out": {name: list(found.left_out) for name, found in each if found.left_out},
            "folded": [name for name, found in each if found.magnitudes],
            "hub": {name: dict(source) for name, source in self.hub.items()},
        }
        return {key: value for key, value in found.items() if value}

    def notes(self) -> list[str]:
        """Return sentences for a person about :meth:`facts`."""
        lines = []
        for name, modules in self.missing.items():
            count = f"{len(modules)} of {len(self.adapters[name].modules)} modules"
            lines.append(f"{name} lacks {count}, which count as zero: {shortened(modules)}")
        for name, found in self.contents.items():
            if found.ignored:
                lines.append(f"{name}: its configuration excludes {shortened(found.ignored)}, which count as zero")
            if found.lacking:
                named = shortened(found.lacking)
                lines.append(f"{name}: its file has no {named}, which its configuration names and which count as zero")
            lines += [f"{name}: {PARTS[part]} left out" for part in found.left_out]
            if found.magnitudes:
                lines.append(f"{name}: DoRA folded into full updates of {len(found.magnitudes)} modules")
        return lines


def read_folders(
    folders: Mapping[str, Path],
    backbone_name: str | None = None,
    *,
    union: bool = True,
    whole: bool = False,
    leave_out: Collection[str] = (),
    base: Path | None = None,
) -> AdapterFolders:
    """Open adapters that are to be merged and check that they belong together.

    Their modules are read whenever they are used, so that memory holds few of them.

    Args:
        folders: name -> PEFT folder.
        backbone_name: base model of the merge, as ``NAME`` or ``NAME@REVISION``; needed if the folders name different
            ones.
        union: True if folders may have different modules, False refuses them.
        whole: True if the caller also merges parameters that were trained whole; False refuses them.
        leave_out: parts in ``PARTS`` to leave out.
        base: folder of the base model, whose weights DoRA and whole parameters need.

    Raises:
        LayoutMismatchError: an adapter is damaged, not a sum B A or not finite, the shape of a module differs, or the
            folders disagree about the base model or the task.
        MergeError: no folder, adapters of different backbones by their hashes, or a part that cannot be merged.
        BackboneError: the base model lacks a weight.
        RunDirError: a record beside an adapter is damaged.
    """
    opened = {name: open_verified(folders[name], leave_out) for name in sorted(folders)}
    contents = {name: each for name, (each, _) in opened.items()}
    weights = None if base is None else open_weights(base)
    configs = {name: each.config for name, each in contents.items()}
    fan_in_fan_out = any(bool(config.get("fan_in_fan_out")) for config in configs.values())
    embeddings = frozenset(name for each in contents.values() for name in each.embeddings)
    for name, each in contents.items():
        _check_parts(name, each, embeddings, whole)
    read = {name: each.adapter for name, each in contents.items()}
    filled, missing = fill_missing(read) if union else (read, {})
    survey_adapters(filled, values=False)
    adapters = {name: _folded(name, filled[name], each, weights) for name, each in contents.items()}
    hashes = {name: adapter_record(folders[name]).backbone_sha256 for name in adapters}
    known = {name: sha256 for name, sha256 in hashes.items() if sha256 is not None}
    if len(set(known.values())) > 1:
        found = ", ".join(f"{name} {sha256[:12]}" for name, sha256 in known.items())
        raise MergeError(f"the adapters belong to different backbones ({found}). Merge adapters of one backbone.")
    same = len(known) == len(adapters)  # equal hashes: the names may differ
    name_of_base, revision = agreed_base(configs, backbone_name, same)
    remedy = "PEFT builds different models for these. Set the same value in every adapter_config.json."
    return AdapterFolders(
        adapters=adapters,
        backbone_name=name_of_base,
        backbone_sha256=next(iter(known.values()), None),
        task_type=agreed_setting("task_type", configs, remedy),
        target_modules=agreed_targets(contents),
        fan_in_fan_out=fan_in_fan_out,
        revision=revision,
        auto_mapping=agreed_mapping(configs, remedy),
        embeddings=embeddings,
        sha256={name: sha256 for name, (_, sha256) in opened.items()},
        missing=missing,
        contents=contents,
        base=weights,
        signals=OnDemand(folders, lambda name: read_signals(folders[name], read[name])),
    )


def fill_missing(adapters: Mapping[str, Adapter]) -> tuple[dict[str, Adapter], dict[str, tuple[str, ...]]]:
    """Give every adapter the modules of all, with an update of zero where it has none.

    Returns:
        The adapters, and name -> modules that were missing; only of adapters that lack some.
    """
    shapes: dict[str, tuple[int, int]] = {}
    for adapter in adapters.values():
        for name, module in adapter.modules.items():
            shapes.setdefault(name, (module.lora_B.shape[0], module.lora_A.shape[1]))
    missing = {name: tuple(sorted(shapes.keys() - adapter.modules.keys())) for name, adapter in adapters.items()}
    filled = {name: _filled(adapter, missing[name], shapes) for name, adapter in adapters.items()}
    return filled, {name: modules for name, modules in missing.items() if modules}


def _filled(adapter: Adapter, missing: Collection[str], shapes: Mapping[str, tuple[int, int]]) -> Adapter:
    def module(name: str) -> LoraModule:
        if name in adapter.modules:
            return adapter.modules[name]
        width_out, width_in = shapes[name]
        return LoraModule(torch.zeros(1, width_in), torch.zeros(width_out, 1), 1.0)

    return Adapter(OnDemand([*adapter.modules, *missing], module)) if missing else adapter


def _check_parts(name: str, contents: Contents, embeddings: frozenset[str], whole: bool) -> None:
    """Raise if a folder holds a part that these merges cannot read, or another kind of module than the others."""
    clash = sorted((embeddings & contents.adapter.modules.keys()) - contents.embeddings)
    if clash:
        raise LayoutMismatchError(
            f"adapter of {name!r}: {shortened(clash)} is a linear layer, but an embedding in another adapter. "
            "Merge adapters of one base model."
        )
    beside = contents.beside_lora()
    beside.pop("dora", None)
    if contents.embeddings and not (contents.kinds or contents.output_biases or contents.copies):
        beside.pop("embeddings", None)
    if beside and not whole:
        part, found = next(iter(beside.items()))
        raise MergeError(
            f"adapter of {name!r}: it holds {PARTS[part]} ({found}), which only `fedmerge merge --method` merges. "
            f"Give --method, or leave them out with --leave-out {part}."
        )


def _folded(name: str, adapter: Adapter, contents: Contents, base: ModelWeights | None) -> Adapter:
    """Return an adapter with the update of every DoRA module written out."""
    if not contents.magnitudes:
        return adapter
    if base is None:
        raise MergeError(
            f"adapter of {name!r}: use_dora = True; the update of DoRA depends on the weights of the base model. Give "
            "their folder with --base, or leave the magnitudes out with --leave-out dora (then another update is "
            "merged than was trained)."
        )
    transposed = bool(contents.config.get("fan_in_fan_out"))
    weights = base

    def folded(module: str) -> LoraModule:
        found, magnitude = adapter.modules[module], contents.magnitudes.get(module)
        is_transposed = transposed or module in contents.embeddings
        return found if magnitude is None else fold_dora(found, magnitude, weights, module, is_transposed)

    return Adapter(OnDemand(adapter.modules, folded))


def fold_dora(
    module: LoraModule, magnitude: torch.Tensor, base: ModelWeights, name: str, transposed: bool
) -> LoraModule:
    """Return the update of a DoRA module as one factor beside an identity: m · (W + Δ) / ‖W + Δ‖ - W.

    The norm is that of every row of W + Δ, (out, in). It is computed in float64.

    Args:
        module: scaling and factors, Δ = scaling · B A.
        magnitude: m (out,).
        base: weights of the base model, on which the update depends.
        name: name of the module in the bare backbone.
        transposed: True if the base model stores W transposed, as embeddings and GPT-2's layers do.

    Raises:
        BackboneError: the base model has no such weight, or one of another shape, or a row of W + Δ is zero.

    Source: DoRA (arXiv:2402.09353), equation 5; ``peft/tuners/lora/dora.py``.
    """
    weight = read_weight_like(base, f"{name}.weight").double()
    weight = weight.T if transposed else weight  # (out, in)
    delta = module.scaling * (module.lora_B.double() @ module.lora_A.double())
    if weight.shape != delta.shape:
        raise BackboneError(
            f"base model {base.folder}: {name}.weight is {tuple(weight.shape)}, the adapter's update is "
            f"{tuple(delta.shape)}. The adapter belongs to another base model."
        )
    tuned = weight + delta
    norm = torch.linalg.vector_norm(tuned, dim=1, keepdim=True)
    folded = (magnitude.double()[:, None] / norm * tuned - weight).float()
    if not folded.isfinite().all():
        raise BackboneError(
            f"base model {base.folder}: {name}.weight with the adapter's update has a row of zeros or values that are "
            "not finite, where DoRA is not defined. Leave its magnitudes out with --leave-out dora."
        )
    return dense_module(folded)
