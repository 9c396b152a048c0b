"""Adapters as PEFT folders on disk: ``adapter_config.json`` and ``adapter_model.safetensors``.

Reading and writing them needs torch and safetensors, but not peft.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fedmerge.adapter import Adapter, OnDemand, adapter_sha256, in_memory, num_not_finite
from fedmerge.encoder.adapter_records import adapter_record
from fedmerge.encoder.peft.contents import (
    CONFIG_FILE,
    MODULE_PREFIX,
    PARTS,
    TENSOR_FILE,
    Contents,
    open_contents,
    read_contents,
)
from fedmerge.encoder.peft.names import anchored, exact_targets
from fedmerge.encoder.peft.tensors import bytes_of, write_tensors
from fedmerge.errors import LayoutMismatchError

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
    Each file is complete or absent. Modules and parameters that are read on demand are written one at a time.

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
    incomplete = folder / f".{TENSOR_FILE}.partial"
    write_tensors(incomplete, _tensors(adapter, embeddings, output_biases or {}, parameters or {}, dtype))
    os.replace(incomplete, folder / TENSOR_FILE)
    incomplete = folder / f".{CONFIG_FILE}.partial"
    incomplete.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    os.replace(incomplete, folder / CONFIG_FILE)


def _tensors(
    adapter: Adapter,
    embeddings: Collection[str],
    output_biases: Mapping[str, torch.Tensor],
    parameters: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
) -> OnDemand[str, torch.Tensor]:
    """Return the tensors of a folder by their names in PEFT."""

    def factor(name: str, part: str) -> torch.Tensor:
        values: torch.Tensor = getattr(adapter.modules[name], f"lora_{part}")
        return values.to(dtype)

    def bias(name: str) -> torch.Tensor:
        module = adapter.modules[name]
        values = output_biases.get(name, torch.zeros(module.lora_B.shape[0]))
        return (values / module.scaling).to(dtype)

    made: dict[str, Callable[[], torch.Tensor]] = {}
    for name in adapter.modules:
        form = "lora_embedding_{}" if name in embeddings else "lora_{}.weight"
        made |= {f"{MODULE_PREFIX}{name}.{form.format(part)}": partial(factor, name, part) for part in "AB"}
        if output_biases and name not in embeddings:
            made[f"{MODULE_PREFIX}{name}.lora_B.bias"] = partial(bias, name)
    for name in parameters:
        owner, _, part = name.rpartition(".")
        inside = f"{owner}.base_layer" if owner in adapter.modules else owner
        made[f"{MODULE_PREFIX}{inside}.{part}"] = partial(parameters.__getitem__, name)
    return OnDemand(made, lambda key: made[key]())


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
    return in_memory(_plain(open_verified(folder)[0], folder))


def open_verified(folder: Path, leave_out: Collection[str] = ()) -> tuple[Contents, str]:
    """Open a PEFT folder with all that it holds, verified as by :func:`read_verified`; also return its hash.

    Args:
        folder: the folder.
        leave_out: parts in ``PARTS`` to leave out. What is left is another adapter than the recorded one, so that its
            hash is not compared.

    Raises:
        LayoutMismatchError: the adapter is damaged, not a sum B A, or not finite.
        RunDirError: ``training.json`` or ``provenance.json`` is damaged.
    """
    contents = open_contents(folder, leave_out)
    expected, found = adapter_record(folder).sha256, contents_sha256(contents)
    if expected is not None and found != expected and not contents.left_out:
        raise LayoutMismatchError(
            f"adapter {folder}: its content has hash {found[:12]}, but the record beside it has {expected[:12]}. "
            "It was changed or damaged after it was written: restore the folder."
        )
    for name, tensor in _values(contents):
        if bad := num_not_finite(tensor):
            raise LayoutMismatchError(
                f"adapter {folder}: {bad} of {tensor.numel()} values of {name} are NaN or infinite. Its "
                "training diverged, or the file is damaged: leave it out, or train it again."
            )
    return contents, found


def contents_sha256(contents: Contents) -> str:
    """Hash an adapter with all that its folder holds beside it; of LoRA alone it is ``adapter_sha256``."""
    sha256 = adapter_sha256(contents.adapter)
    digest, num_beside = hashlib.sha256(sha256.encode()), 0
    for name, tensor in _values_beside(contents):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(bytes_of(tensor))
        num_beside += 1
    return digest.hexdigest() if num_beside else sha256


def _values(contents: Contents) -> Iterator[tuple[str, torch.Tensor]]:
    for name, module in contents.adapter.modules.items():
        yield from ((f"{name}.lora_A", module.lora_A), (f"{name}.lora_B", module.lora_B))
    yield from _values_beside(contents)


def _values_beside(contents: Contents) -> Iterator[tuple[str, torch.Tensor]]:
    yield from ((f"{name}.lora_magnitude_vector", values) for name, values in contents.magnitudes.items())
    yield from ((f"{name}.lora_B.bias", values) for name, values in contents.output_biases.items())
    yield from contents.parameters.items()
    yield from contents.copies.items()


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
