"""Write a merge as a PEFT folder like its sources."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import torch

from fedmerge.adapter import Adapter, LoraModule, OnDemand, num_not_finite
from fedmerge.encoder.peft.contents import open_contents
from fedmerge.encoder.peft.folder import contents_sha256, write_adapter
from fedmerge.errors import MergeError
from fedmerge.files import new_folder, write_json, write_text
from fedmerge.merging.folders.reading import AdapterFolders
from fedmerge.merging.folders.whole import NOTHING, Whole, merge_whole
from fedmerge.merging.training_free import MergedAdapter


def rounded(merged: MergedAdapter, dtype: torch.dtype) -> MergedAdapter:
    """Round the factors of a merge to the type in which they are written.

    Raises:
        MergeError: a value is too large for the type.
    """
    if dtype == torch.float32:
        return merged

    def module(name: str) -> LoraModule:
        found = merged.adapter.modules[name]
        return replace(found, lora_A=found.lora_A.to(dtype).float(), lora_B=found.lora_B.to(dtype).float())

    modules = OnDemand(merged.adapter.modules, module)
    for name, each in modules.items():
        if num_not_finite(each.lora_A) or num_not_finite(each.lora_B):
            raise MergeError(
                f"module {name}: a value of its merge is too large for {str(dtype).removeprefix('torch.')}. "
                "Write it as bfloat16 or float32."
            )
    return replace(merged, adapter=Adapter(modules))


def write_merge(
    merged: MergedAdapter,
    sources: AdapterFolders,
    folder: Path,
    run: str | None,
    excluded: Mapping[str, str],
    files: Mapping[str, str] = MappingProxyType({}),
    dtype: torch.dtype = torch.float32,
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
        dtype: type of the factors on disk, to which ``merged`` was rounded.

    Raises:
        MergeError: the sources hold whole parameters, of which this method has no merge.
        RunDirError: the folder is not empty, or cannot be written.
    """
    whole = merge_whole(merged, sources)
    made = merged.provenance(sources.hashes(), sources.backbone)
    more = {**made.more, **sources.facts(), **whole.facts()}
    provenance = replace(made, is_remerge=True, run=run, excluded=dict(excluded), more=more)
    with new_folder(folder) as partial:
        write_as_sources(merged.adapter, sources, partial, whole, dtype)
        if whole.parameters or whole.output_biases:
            provenance = replace(provenance, sha256=contents_sha256(open_contents(partial)))
        write_json(partial / "provenance.json", provenance.to_dict())
        for name, text in files.items():
            write_text(partial / name, text)


def write_as_sources(
    adapter: Adapter,
    sources: AdapterFolders,
    folder: Path,
    whole: Whole = NOTHING,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a merge as a PEFT folder with the base model, task and module names of its sources."""
    write_adapter(
        adapter,
        folder,
        sources.backbone_name,
        task_type=sources.task_type,
        target_modules=sources.target_modules,
        fan_in_fan_out=sources.fan_in_fan_out,
        settings={"revision": sources.revision, "auto_mapping": sources.auto_mapping, **whole.settings},
        embeddings=sources.embeddings & adapter.modules.keys(),
        output_biases=whole.output_biases,
        parameters=whole.parameters,
        dtype=dtype,
    )
