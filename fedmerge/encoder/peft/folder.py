"""Adapters as PEFT folders on disk: ``adapter_config.json`` and ``adapter_model.safetensors``.

Reading and writing them needs torch and safetensors, but not peft.
"""

import json
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fedmerge.adapter import Adapter, adapter_sha256
from fedmerge.encoder.adapter_records import adapter_record
from fedmerge.encoder.peft.contents import CONFIG_FILE, MODULE_PREFIX, PARTS, TENSOR_FILE, Contents, read_contents
from fedmerge.encoder.peft.names import anchored, exact_targets
from fedmerge.errors import LayoutMismatchError
from fedmerge.files import share

_PLAIN_LORA = {  # the other settings that every PEFT since 0.18 reads, each at PEFT's default
    "peft_type": "LORA",
    "auto_mapping": None,
    "revision": None,
    "inference_mode": True,
    "bias": "none",
    "lora_dropout": 0.0,
    "init_lora_weights": True,
    "use_rslora": False,
    "use_dora": False,
    "modules_to_save": None,
    "exclude_modules": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "layer_replication": None,
}


def write_adapter(
    adapter: Adapter,
    folder: Path,
    backbone_name: str | None,
    *,
    task_type: str | None = "FEATURE_EXTRACTION",
    target_modules: Sequence[str] | str | None = None,
    fan_in_fan_out: bool = False,
    settings: Mapping[str, Any] | None = None,
    embeddings: Collection[str] = (),
    output_biases: Mapping[str, torch.Tensor] | None = None,
    parameters: Mapping[str, torch.Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a PEFT folder: ``adapter_config.json`` and ``adapter_model.safetensors``.

    Unequal ranks and scalings are written as ``rank_pattern`` and ``alpha_pattern``, whose keys match one module each.
    Each file is complete or absent.

    Args:
        adapter: the adapter.
        folder: created if missing.
        backbone_name: written as ``base_model_name_or_path``.
        task_type: PEFT's task type, which decides the kind of model that PEFT builds from the backbone.
        target_modules: names of the modules as PEFT matches them; None matches the adapter's modules and no others.
        fan_in_fan_out: True if the layers store transposed weights, as GPT-2's do; A and B are the same.
        settings: more entries of the configuration.
        embeddings: modules that are embeddings: A (r, tokens), B (width, r).
        output_biases: module -> (out,), added to its output; the other modules get zeros.
        parameters: parameters that replace the backbone's, by their names in the bare backbone.
        dtype: type of the factors on disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ranks = {name: module.rank for name, module in adapter.modules.items()}
    alphas = {name: _whole(module.scaling * module.rank) for name, module in adapter.modules.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    targets = exact_targets(adapter.modules) if target_modules is None else target_modules
    config = {
        **_PLAIN_LORA,
        "task_type": task_type,
        "base_model_name_or_path": backbone_name,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": targets if isinstance(targets, str) else sorted(targets),
        "fan_in_fan_out": fan_in_fan_out,
        "rank_pattern": {anchored(name): value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {anchored(name): value for name, value in alphas.items() if value != alpha},
        **(settings or {}),
    }
    if output_biases:
        config["lora_bias"] = True
    tensors = {}
    for name, module in adapter.modules.items():
        form = "lora_embedding_{}" if name in embeddings else "lora_{}.weight"
        for part, values in (("A", module.lora_A), ("B", module.lora_B)):
            tensors[f"{MODULE_PREFIX}{name}.{form.format(part)}"] = values.to(dtype).contiguous()
        if output_biases and name not in embeddings:
            bias = output_biases.get(name, torch.zeros(module.lora_B.shape[0]))
            tensors[f"{MODULE_PREFIX}{name}.lora_B.bias"] = (bias / module.scaling).to(dtype).contiguous()
    for name, values in (parameters or {}).items():
        owner, _, part = name.rpartition(".")
        inside = f"{owner}.base_layer" if owner in adapter.modules else owner
        tensors[f"{MODULE_PREFIX}{inside}.{part}"] = values.contiguous()
    partial = folder / f".{TENSOR_FILE}.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    share(partial)
    os.replace(partial, folder / TENSOR_FILE)
    partial = folder / f".{CONFIG_FILE}.partial"
    partial.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    os.replace(partial, folder / CONFIG_FILE)


def read_adapter(folder: Path) -> Adapter:
    """Read a PEFT LoRA folder, including rsLoRA and rank and alpha patterns.

    Raises:
        LayoutMismatchError: the adapter is damaged, or not plain LoRA on linear layers.
    """
    return _plain(read_contents(folder), folder)


def read_verified(folder: Path) -> Adapter:
    """Read a PEFT folder and verify it against the hash recorded beside it, if there is one.

    Raises:
        LayoutMismatchError: the adapter is damaged, not plain LoRA on linear layers, or not finite.
        RunDirError: ``training.json`` or ``provenance.json`` is damaged.
    """
    return _plain(read_verified_contents(folder), folder)


def read_verified_contents(folder: Path, leave_out: Collection[str] = ()) -> Contents:
    """Read all that a PEFT folder holds, verified as by :func:`read_verified`.

    Args:
        folder: the folder.
        leave_out: parts in ``PARTS`` to leave out. What is left is another adapter than the recorded one, so that its
            hash is not compared.

    Raises:
        LayoutMismatchError: the adapter is damaged, not a sum B A, or not finite.
        RunDirError: ``training.json`` or ``provenance.json`` is damaged.
    """
    contents = read_contents(folder, leave_out)
    expected, found = adapter_record(folder).sha256, adapter_sha256(contents.adapter)
    if expected is not None and found != expected and not contents.left_out:
        raise LayoutMismatchError(
            f"adapter {folder}: its content has hash {found[:12]}, but the record beside it has {expected[:12]}. "
            "It was changed or damaged after it was written: restore the folder."
        )
    tensors: dict[str, torch.Tensor] = {}
    for name, module in contents.adapter.modules.items():
        tensors |= {f"{name}.lora_A": module.lora_A, f"{name}.lora_B": module.lora_B}
    tensors |= {f"{name}.lora_magnitude_vector": values for name, values in contents.magnitudes.items()}
    tensors |= {f"{name}.lora_B.bias": values for name, values in contents.output_biases.items()}
    for name, tensor in {**tensors, **contents.parameters, **contents.copies}.items():
        bad = int((~tensor.isfinite()).sum())
        if bad:
            raise LayoutMismatchError(
                f"adapter {folder}: {bad} of {tensor.numel()} values of {name} are NaN or infinite. Its "
                "training diverged, or the file is damaged: leave it out, or train it again."
            )
    return contents


def _plain(contents: Contents, folder: Path) -> Adapter:
    """Return the adapter of a folder that holds LoRA on linear layers and nothing else."""
    for part, names in contents.beside_lora().items():
        raise LayoutMismatchError(
            f"adapter {folder}: it holds {PARTS[part]} ({names}); only plain LoRA on linear layers can be read here. "
            f"Train without it, or merge it with `fedmerge merge --leave-out {part}`."
        )
    return contents.adapter


def _whole(value: float) -> float | int:
    """Return an integer if the value is one, since other programs expect an integer ``lora_alpha``."""
    return int(value) if float(value).is_integer() else value
