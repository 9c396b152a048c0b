"""Any PEFT LoRA folders, of encoders or decoders: read and held together, and their merge written as another."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
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
    """Adapters of one layout, and what their folders agree on.

    Attributes:
        adapters: name -> adapter.
        backbone_name: ``base_model_name_or_path``; None where no folder names one.
        backbone_sha256: of the backbone they were trained on; None where nobody wrote it down.
        task_type: PEFT's; None where no folder has one.
        target_modules: as the folders have it, where all say the same and nothing else narrows it; else None.
        fan_in_fan_out: of layers that keep their weights transposed.
    """

    adapters: Mapping[str, Adapter]
    backbone_name: str | None
    backbone_sha256: str | None
    task_type: str | None
    target_modules: tuple[str, ...] | str | None
    fan_in_fan_out: bool


def read_folders(folders: Mapping[str, Path], backbone_name: str | None = None) -> AdapterFolders:
    """Read adapters that are to be merged and see that they belong together.

    Args:
        folders: name -> PEFT folder.
        backbone_name: to write as the merge's base model; needed where the folders name different ones.

    Raises:
        LayoutMismatchError: no plain LoRA adapter, a damaged one, values that are not finite, other modules or shapes
            than in the first, or folders that disagree about the base model or the task.
        MergeError: no folder at all, or adapters of different backbones, by their hashes.
        RunDirError: a damaged record beside an adapter.
    """
    adapters = {name: read_verified(folders[name]) for name in sorted(folders)}
    survey_adapters(adapters)
    hashes = {name: adapter_record(folders[name]).backbone_sha256 for name in adapters}
    known = {name: sha256 for name, sha256 in hashes.items() if sha256 is not None}
    if len(set(known.values())) > 1:
        found = ", ".join(f"{name} {sha256[:12]}" for name, sha256 in known.items())
        raise MergeError(f"the adapters were made on different backbones ({found}). Merge adapters of one backbone.")
    configs = {name: read_record(folders[name] / CONFIG_FILE) for name in adapters}
    if backbone_name is None:
        same = len(known) == len(adapters)  # by hash, whatever each of them calls it
        remedy = "Merge adapters of one base model; if these are names of one and the same, say which: --base-model."
        backbone_name = _agreed("base_model_name_or_path", configs, remedy, first=same)
    remedy = "PEFT makes different models of these; set it to the same in each adapter_config.json."
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
    details: Mapping[str, Any],
    files: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write a merge as a PEFT folder with ``provenance.json``, whole or not at all.

    Base model, task and names of modules are those of the sources, so that PEFT loads it as it loads them.

    Args:
        merged: of ``merge_adapters``.
        sources: what it was made of.
        folder: must be absent or empty.
        details: entries that the provenance gets, too.
        files: name -> text of files that the folder gets, too.

    Raises:
        RunDirError: the folder holds something, or cannot be written.
    """
    provenance = {
        **merged.record(),
        "domains": {name: adapter_sha256(sources.adapters[name]) for name in merged.coefficients},
        "backbone": {"name": sources.backbone_name, "sha256": sources.backbone_sha256},
        **details,
    }
    with new_folder(folder) as partial:
        write_as_sources(merged.adapter, sources, partial)
        write_json(partial / "provenance.json", provenance)
        for name, text in files.items():
            write_text(partial / name, text)


def write_as_sources(adapter: Adapter, sources: AdapterFolders, folder: Path) -> None:
    """Write a merge as a PEFT folder with base model, task and names of modules as its sources have them."""
    write_adapter(
        adapter,
        folder,
        sources.backbone_name,
        task_type=sources.task_type,
        target_modules=sources.target_modules,
        fan_in_fan_out=sources.fan_in_fan_out,
    )


def _agreed(key: str, configs: Mapping[str, Mapping[str, Any]], remedy: str, first: bool = False) -> str | None:
    """What the folders that have this setting have for it."""
    given = {name: str(config[key]) for name, config in configs.items() if config.get(key)}
    if len(set(given.values())) > 1 and not first:
        found = ", ".join(f"{name} {value!r}" for name, value in given.items())
        raise LayoutMismatchError(f"the adapters have different {key} ({found}), expected the same. {remedy}")
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
