"""Read PEFT LoRA folders of encoders or decoders that are to be merged, and write their merge as another folder."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fedmerge.adapter import Adapter, adapter_sha256
from fedmerge.encoder.adapter_records import adapter_record
from fedmerge.encoder.peft_folder import CONFIG_FILE, read_verified, write_adapter
from fedmerge.errors import LayoutMismatchError, MergeError
from fedmerge.files import new_folder, read_record, write_json, write_text
from fedmerge.merging.stack import survey_adapters
from fedmerge.merging.training_free import MergedAdapter


@dataclass(frozen=True)
class AdapterFolders:
    """Adapters of one layout, and the settings that their folders share.

    Attributes:
        adapters: name -> adapter.
        backbone_name: ``base_model_name_or_path``; None if no folder has one.
        backbone_sha256: hash of the backbone they were trained on; None if unknown.
        task_type: PEFT's task type; None if no folder has one.
        target_modules: PEFT's target modules, if all folders agree and nothing narrows them; else None.
        fan_in_fan_out: True for layers that store transposed weights.
    """

    adapters: Mapping[str, Adapter]
    backbone_name: str | None
    backbone_sha256: str | None
    task_type: str | None
    target_modules: tuple[str, ...] | str | None
    fan_in_fan_out: bool

    @property
    def backbone(self) -> dict[str, str | None]:
        """Name and sha256 of the backbone, as far as known."""
        return {"name": self.backbone_name, "sha256": self.backbone_sha256}

    def hashes(self) -> dict[str, str]:
        """Return name -> hash of the adapter."""
        return {name: adapter_sha256(adapter) for name, adapter in self.adapters.items()}


def read_folders(folders: Mapping[str, Path], backbone_name: str | None = None) -> AdapterFolders:
    """Read adapters that are to be merged and check that they belong together.

    Args:
        folders: name -> PEFT folder.
        backbone_name: base model of the merge; needed if the folders name different ones.

    Raises:
        LayoutMismatchError: an adapter is damaged, not plain LoRA or not finite, its modules or shapes differ from the
            first one's, or the folders disagree about the base model or the task.
        MergeError: no folder, or adapters of different backbones by their hashes.
        RunDirError: a record beside an adapter is damaged.
    """
    adapters = {name: read_verified(folders[name]) for name in sorted(folders)}
    survey_adapters(adapters)
    hashes = {name: adapter_record(folders[name]).backbone_sha256 for name in adapters}
    known = {name: sha256 for name, sha256 in hashes.items() if sha256 is not None}
    if len(set(known.values())) > 1:
        found = ", ".join(f"{name} {sha256[:12]}" for name, sha256 in known.items())
        raise MergeError(f"the adapters belong to different backbones ({found}). Merge adapters of one backbone.")
    configs = {name: read_record(folders[name] / CONFIG_FILE) for name in adapters}
    if backbone_name is None:
        same = len(known) == len(adapters)  # equal hashes: the names may differ
        remedy = "Merge adapters of one base model. If these names mean the same one, choose a name with --base-model."
        backbone_name = _agreed("base_model_name_or_path", configs, remedy, first=same)
    remedy = "PEFT builds different models for these. Set the same value in every adapter_config.json."
    return AdapterFolders(
        adapters=adapters,
        backbone_name=backbone_name,
        backbone_sha256=next(iter(known.values()), None),
        task_type=_agreed("task_type", configs, remedy),
        target_modules=_target_modules(list(configs.values())),
        fan_in_fan_out=any(bool(config.get("fan_in_fan_out")) for config in configs.values()),
    )


def write_merge(
    merged: MergedAdapter,
    sources: AdapterFolders,
    folder: Path,
    run: str | None,
    excluded: Mapping[str, str],
    files: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write a merge as a PEFT folder with ``provenance.json``, complete or not at all.

    Base model, task and module names are those of the sources, so PEFT loads the merge in the same way.

    Args:
        merged: merge from ``merge_adapters``.
        sources: adapters that were merged.
        folder: must be absent or empty.
        run: id of the run that trained the sources; None for adapters of no run.
        excluded: domain -> reason, for the provenance.
        files: name -> text of more files in the folder.

    Raises:
        RunDirError: the folder is not empty, or cannot be written.
    """
    made = merged.provenance(sources.hashes(), sources.backbone)
    provenance = replace(made, is_remerge=True, run=run, excluded=dict(excluded))
    with new_folder(folder) as partial:
        write_as_sources(merged.adapter, sources, partial)
        write_json(partial / "provenance.json", provenance.to_dict())
        for name, text in files.items():
            write_text(partial / name, text)


def write_as_sources(adapter: Adapter, sources: AdapterFolders, folder: Path) -> None:
    """Write a merge as a PEFT folder with the base model, task and module names of its sources."""
    write_adapter(
        adapter,
        folder,
        sources.backbone_name,
        task_type=sources.task_type,
        target_modules=sources.target_modules,
        fan_in_fan_out=sources.fan_in_fan_out,
    )


def _agreed(key: str, configs: Mapping[str, Mapping[str, Any]], remedy: str, first: bool = False) -> str | None:
    """Return the value of a setting, which must be the same in all folders that have it, unless ``first``."""
    given = {name: str(config[key]) for name, config in configs.items() if config.get(key)}
    if len(set(given.values())) > 1 and not first:
        found = ", ".join(f"{name} {value!r}" for name, value in given.items())
        raise LayoutMismatchError(f"the adapters differ in {key} ({found}). {remedy}")
    return next(iter(given.values()), None)


def _target_modules(configs: list[dict[str, Any]]) -> tuple[str, ...] | str | None:
    narrowed = ("layers_to_transform", "layers_pattern", "exclude_modules")
    if any(config.get(key) not in (None, []) for config in configs for key in narrowed):
        return None
    targets = [config.get("target_modules") for config in configs]
    found = {json.dumps(sorted(names) if isinstance(names, list) else names) for names in targets}
    names = json.loads(found.pop()) if len(found) == 1 else None
    if isinstance(names, list) and names:
        return tuple(str(name) for name in names)
    return names if isinstance(names, str) and names != "all-linear" else None
