"""Adapters as PEFT folders on disk: ``adapter_config.json`` and ``adapter_model.safetensors``.

Reading and writing them needs torch and safetensors, but not peft.
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fedmerge.adapter import Adapter, LoraModule, adapter_sha256
from fedmerge.encoder.adapter_records import adapter_record
from fedmerge.errors import LayoutMismatchError

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
MODULE_PREFIX = "base_model.model."  # PEFT's name of the bare backbone
_UNSUPPORTED = (  # settings under which an adapter is not just B A
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
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
_CHANGES_THE_BACKBONE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")  # initialisations of A and B


def write_adapter(
    adapter: Adapter,
    folder: Path,
    backbone_name: str | None,
    *,
    task_type: str | None = "FEATURE_EXTRACTION",
    target_modules: Sequence[str] | str | None = None,
    fan_in_fan_out: bool = False,
) -> None:
    """Write a PEFT folder: ``adapter_config.json`` and ``adapter_model.safetensors``.

    Unequal ranks and scalings are written as ``rank_pattern`` and ``alpha_pattern``. Each file is complete or absent.

    Args:
        adapter: the adapter.
        folder: created if missing.
        backbone_name: written as ``base_model_name_or_path``.
        task_type: PEFT's task type, which decides the kind of model that PEFT builds from the backbone.
        target_modules: names of the modules as PEFT matches them; None lists every module by its full name.
        fan_in_fan_out: True if the layers store transposed weights, as GPT-2's do; A and B are the same.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ranks = {name: module.rank for name, module in adapter.modules.items()}
    alphas = {name: _whole(module.scaling * module.rank) for name, module in adapter.modules.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    targets = sorted(adapter.modules) if target_modules is None else target_modules
    config = {
        **_PLAIN_LORA,
        "task_type": task_type,
        "base_model_name_or_path": backbone_name,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": targets if isinstance(targets, str) else sorted(targets),
        "fan_in_fan_out": fan_in_fan_out,
        "rank_pattern": {re.escape(name): value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {re.escape(name): value for name, value in alphas.items() if value != alpha},
    }
    tensors = {}
    for name, module in adapter.modules.items():
        tensors[f"{MODULE_PREFIX}{name}.lora_A.weight"] = module.lora_A.contiguous()
        tensors[f"{MODULE_PREFIX}{name}.lora_B.weight"] = module.lora_B.contiguous()
    partial = folder / f".{TENSOR_FILE}.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    os.replace(partial, folder / TENSOR_FILE)
    partial = folder / f".{CONFIG_FILE}.partial"
    partial.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    os.replace(partial, folder / CONFIG_FILE)


def read_adapter(folder: Path) -> Adapter:
    """Read a PEFT LoRA folder, including rsLoRA and rank and alpha patterns.

    Raises:
        LayoutMismatchError: the adapter is damaged, or not plain LoRA.
    """
    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
        tensors = load_file(folder / TENSOR_FILE)
    except FileNotFoundError as error:
        if (folder / PICKLE_FILE).is_file():
            raise LayoutMismatchError(
                f"adapter {folder}: found {PICKLE_FILE}, expected {TENSOR_FILE}; pickled files are never opened, since "
                "they can run code. If you trust it, load it with peft and save it again."
            ) from error
        raise LayoutMismatchError(
            f"adapter {folder}: no {Path(error.filename or TENSOR_FILE).name}. "
            f"A PEFT folder holds {CONFIG_FILE} and {TENSOR_FILE}."
        ) from error
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise LayoutMismatchError(f"adapter {folder}: damaged ({error}). Get the folder again.") from error
    _refuse_unsupported(config, folder)
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        found = re.fullmatch(rf"{re.escape(MODULE_PREFIX)}(.+)\.(lora_A|lora_B)\.weight", key)
        if not found:
            raise LayoutMismatchError(
                f"adapter {folder}: tensor {key!r} is not part of a LoRA on linear layers. Train without it."
            )
        if not tensor.is_floating_point():
            raise LayoutMismatchError(
                f"adapter {folder}: tensor {key!r} is {tensor.dtype}, expected floating point. Save it unquantised."
            )
        pairs.setdefault(found.group(1), {})[found.group(2)] = tensor.float()
    modules = {}
    for name, pair in pairs.items():
        if set(pair) != {"lora_A", "lora_B"} or pair["lora_A"].ndim != 2 or pair["lora_B"].ndim != 2:
            raise LayoutMismatchError(
                f"adapter {folder}: module {name} has no matrix pair lora_A, lora_B. Get the folder again."
            )
        rank = pair["lora_A"].shape[0]
        if (
            not rank
            or pair["lora_B"].shape[1] != rank
            or rank != _pattern(config.get("rank_pattern"), name, config["r"])
        ):
            raise LayoutMismatchError(
                f"adapter {folder}: module {name} has lora_A {tuple(pair['lora_A'].shape)} and lora_B "
                f"{tuple(pair['lora_B'].shape)}, its configuration says rank "
                f"{_pattern(config.get('rank_pattern'), name, config['r'])}. Get the folder again."
            )
        alpha = _pattern(config.get("alpha_pattern"), name, config["lora_alpha"])
        scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
        modules[name] = LoraModule(pair["lora_A"], pair["lora_B"], scaling)
    if not modules:
        raise LayoutMismatchError(f"adapter {folder}: {TENSOR_FILE} holds no LoRA module. Get the folder again.")
    return Adapter(modules)


def read_verified(folder: Path) -> Adapter:
    """Read a PEFT folder and verify it against the hash recorded beside it, if there is one.

    Raises:
        LayoutMismatchError: the adapter is damaged, not plain LoRA, or not finite.
        RunDirError: ``training.json`` or ``provenance.json`` is damaged.
    """
    adapter = read_adapter(folder)
    expected, found = adapter_record(folder).sha256, adapter_sha256(adapter)
    if expected is not None and found != expected:
        raise LayoutMismatchError(
            f"adapter {folder}: its content has hash {found[:12]}, but the record beside it has {expected[:12]}. "
            "It was changed or damaged after it was written: restore the folder."
        )
    for name, module in adapter.modules.items():
        for part, tensor in (("lora_A", module.lora_A), ("lora_B", module.lora_B)):
            bad = int((~tensor.isfinite()).sum())
            if bad:
                raise LayoutMismatchError(
                    f"adapter {folder}: {bad} of {tensor.numel()} values of {name}.{part} are NaN or infinite. Its "
                    "training diverged, or the file is damaged: leave it out, or train it again."
                )
    return adapter


def _whole(value: float) -> float | int:
    """Return an integer if the value is one, since other programs expect an integer ``lora_alpha``."""
    return int(value) if float(value).is_integer() else value


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, (int, float)) and 0 < value < 1e30


def _compile(patterns: Iterable[str]) -> bool:
    try:
        return all(re.compile(pattern) for pattern in patterns)
    except (re.error, RecursionError, OverflowError):
        return False


def _pattern(pattern: Mapping[str, float] | None, name: str, default: float) -> float:
    for key, value in (pattern or {}).items():  # PEFT's rule: a regular expression that matches the end
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def _refuse_unsupported(config: Any, folder: Path) -> None:
    if not isinstance(config, dict):
        raise LayoutMismatchError(f"adapter {folder}: {CONFIG_FILE} holds no JSON object. Get the folder again.")
    if config.get("peft_type") != "LORA":
        raise LayoutMismatchError(
            f"adapter {folder}: peft_type is {config.get('peft_type')!r}, expected 'LORA'. Train a LoRA instead."
        )
    for key in ("r", "lora_alpha"):
        if not _is_number(config.get(key)):
            raise LayoutMismatchError(
                f"adapter {folder}: {key} is {config.get(key)!r} in {CONFIG_FILE}, not a number above 0. "
                "Get the folder again."
            )
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(key) or {}
        if not (
            isinstance(pattern, dict) and all(_is_number(value) for value in pattern.values()) and _compile(pattern)
        ):
            raise LayoutMismatchError(
                f"adapter {folder}: {key} is {pattern!r} in {CONFIG_FILE}, not an object of module patterns and "
                "numbers above 0. Get the folder again."
            )
    unsupported = {"bias": config.get("bias", "none") != "none"}
    unsupported |= {key: bool(config.get(key)) for key in _UNSUPPORTED}
    for key, present in unsupported.items():
        if present:
            raise LayoutMismatchError(
                f"adapter {folder}: {key} = {config[key]!r}; only plain LoRA on linear layers is supported. "
                "Train without it."
            )
    start = str(config.get("init_lora_weights", True))
    if start.lower().startswith(_CHANGES_THE_BACKBONE):
        raise LayoutMismatchError(
            f"adapter {folder}: init_lora_weights = {start!r} changed the weights of its backbone, so that B A alone "
            "is not what was learned. Convert it with peft's save_pretrained(path_initial_model_for_weight_conversion)."
        )
