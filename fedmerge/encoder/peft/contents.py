"""Everything that a PEFT LoRA folder holds: LoRA modules, and the parts beside them that not every use can read."""

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError

from fedmerge.adapter import Adapter, LoraModule, OnDemand, float32_factors, in_memory, largest_magnitude
from fedmerge.encoder.peft.names import is_saved_whole, is_target, unmatched_targets, value_of
from fedmerge.encoder.peft.tensors import StoredTensor, find_tensors, read_tensor
from fedmerge.errors import LayoutMismatchError

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
INDEX_FILE = f"{TENSOR_FILE}.index.json"  # of tensors in several files
PICKLE_FILE = "adapter_model.bin"
MODULE_PREFIX = "base_model.model."  # PEFT's name of the bare backbone

PARTS = {  # what a folder can hold beside LoRA on linear layers
    "dora": "magnitudes of DoRA, use_dora",
    "modules_to_save": "whole modules trained beside the LoRA",
    "bias": "trained biases",
    "embeddings": "LoRA on embeddings, and saved embedding weights",
}
_UNSUPPORTED = (  # settings under which an adapter is not just B A
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "ensure_weight_tying",
)
_CHANGES_THE_BACKBONE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")  # initialisations of A and B
_SMALLEST = 2.0**-100  # of the largest entries: beside smaller ones, float32 has no room for entries below them
_EMBEDDING = re.compile(r"(?:.+\.)?[^.]*(?:emb|wte|lm_head|shared|output)[^.]*\.(?:weight|bias)")
_SUFFIXES = {  # of a tensor's name -> what it is, the part that it belongs to
    ".lora_A.weight": ("lora_A", None),
    ".lora_B.weight": ("lora_B", None),
    ".lora_embedding_A": ("lora_embedding_A", "embeddings"),
    ".lora_embedding_B": ("lora_embedding_B", "embeddings"),
    ".lora_B.bias": ("output_bias", "bias"),
    ".lora_magnitude_vector": ("magnitude", "dora"),
    ".lora_magnitude_vector.weight": ("magnitude", "dora"),
    ".base_layer.weight": ("copy", "embeddings"),
}


@dataclass(frozen=True)
class Contents:
    """Content of a PEFT folder.

    Attributes:
        config: content of ``adapter_config.json``.
        adapter: LoRA modules. An embedding has A (r, tokens) and B (width, r); its weights change by (scaling · B A)ᵀ.
        embeddings: modules of the adapter that are embeddings.
        magnitudes: DoRA: module -> length of every row of its trained weights, float32 (out,).
        output_biases: ``lora_bias``: module -> scaling · bias of B, float32 (out,), added to the output.
        parameters: whole trained parameters, which replace the backbone's: name in the bare backbone -> values.
        copies: weights of the backbone below a LoRA on an embedding, which PEFT saves untrained: name -> values.
        kinds: name in ``parameters`` -> part in ``PARTS``.
        ignored: modules with tensors that the folder's own configuration excludes, as PEFT does; sorted.
        lacking: names in ``target_modules`` that no tensor belongs to, for which PEFT makes an update of zero; sorted.
        left_out: parts that were there and are left out; sorted.
    """

    config: Mapping[str, Any]
    adapter: Adapter
    embeddings: frozenset[str]
    magnitudes: Mapping[str, torch.Tensor]
    output_biases: Mapping[str, torch.Tensor]
    parameters: Mapping[str, torch.Tensor]
    copies: Mapping[str, torch.Tensor]
    kinds: Mapping[str, str]
    ignored: tuple[str, ...]
    lacking: tuple[str, ...]
    left_out: tuple[str, ...]

    def beside_lora(self) -> dict[str, str]:
        """Return the parts of the folder that are not LoRA on linear layers: part in ``PARTS`` -> what was found."""
        found = {
            "dora": list(self.magnitudes),
            "modules_to_save": [name for name, kind in self.kinds.items() if kind == "modules_to_save"],
            "bias": [*self.output_biases, *(name for name, kind in self.kinds.items() if kind == "bias")],
            "embeddings": [
                *sorted(self.embeddings),
                *(name for name, kind in self.kinds.items() if kind == "embeddings"),
                *self.copies,
            ],
        }
        return {part: shortened(names) for part, names in found.items() if names}


def read_contents(folder: Path, leave_out: Iterable[str] = ()) -> Contents:
    """Read :func:`open_contents` into memory."""
    found = open_contents(folder, leave_out)
    parameters, copies = (
        {name: each.clone() for name, each in part.items()} for part in (found.parameters, found.copies)
    )
    return replace(found, adapter=in_memory(found.adapter), parameters=parameters, copies=copies)


def open_contents(folder: Path, leave_out: Iterable[str] = ()) -> Contents:
    """Open a PEFT LoRA folder with all that it holds; values keep their meaning in float32, whatever their type was.

    Modules, parameters and copies are read each time they are used. Files that change meanwhile are an error.

    Args:
        folder: the folder; its tensors may be in several files beside ``adapter_model.safetensors.index.json``.
        leave_out: parts in ``PARTS`` to leave out.

    Raises:
        LayoutMismatchError: the folder is damaged, or holds a kind of adapter that is not B A and no such part.
    """
    config, tensors = _open_files(folder)
    _check_config(config, folder)
    leave_out = frozenset(leave_out)
    found: defaultdict[str, dict[str, StoredTensor]] = defaultdict(dict)
    kinds: dict[str, str] = {}
    left_out, ignored, trained = set(), set(), set()
    for key, tensor in tensors.items():
        if tensor.dtype is None or not tensor.dtype.is_floating_point:
            raise LayoutMismatchError(
                f"adapter {folder}: tensor {key!r} is {tensor.dtype or 'of a type unknown here'}, expected floating "
                "point. Save it unquantised."
            )
        name, what, part = _identify(key, config, folder)
        of_lora = what not in ("copy", "parameter")
        if of_lora:
            trained.add(name)
        if of_lora and not is_target(name, config):
            ignored.add(name)
        elif part in leave_out:
            left_out.add(part)
        else:
            found[what][name] = tensor
            if what == "parameter":
                kinds[name] = part
    modules = _modules(found, config, folder)
    if not modules:
        why = f"its configuration excludes {shortened(sorted(ignored))}" if ignored else "no LoRA module"
        raise LayoutMismatchError(f"adapter {folder}: {TENSOR_FILE}: {why}. Get the folder again.")
    _check_complete(config, folder, leave_out, modules, found, kinds)

    def vectors(what: str) -> dict[str, torch.Tensor]:
        return {name: _read(folder, tensor).float().flatten() for name, tensor in sorted(found[what].items())}

    def whole(what: str) -> OnDemand[str, torch.Tensor]:
        return OnDemand(found[what], lambda name: _read(folder, found[what][name]))

    return Contents(
        config=MappingProxyType(config),
        adapter=Adapter(modules),
        embeddings=frozenset({*found["lora_embedding_A"], *found["lora_embedding_B"]}),
        magnitudes={name: vector.clone() for name, vector in vectors("magnitude").items()},
        output_biases={name: modules[name].scaling * bias for name, bias in vectors("output_bias").items()},
        parameters=whole("parameter"),
        copies=whole("copy"),
        kinds=dict(sorted(kinds.items())),
        ignored=tuple(sorted(ignored)),
        lacking=unmatched_targets(config, trained),
        left_out=tuple(sorted(left_out)),
    )


def shortened(names: Iterable[str], most: int = 3) -> str:
    """Join names for a message, the first few of many."""
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return f"{', '.join(listed[:most])}{more}"


def _identify(key: str, config: Mapping[str, Any], folder: Path) -> tuple[str, str, Any]:
    """Return module or parameter in the bare backbone, what a tensor is to it, and the part in ``PARTS`` or None."""
    name = key.removeprefix(MODULE_PREFIX)
    if name == key:
        raise LayoutMismatchError(
            f"adapter {folder}: tensor {key!r} does not begin with {MODULE_PREFIX!r}, as all of PEFT's do. "
            "Load it with the program that wrote it, and save it with peft."
        )
    suffix = next((suffix for suffix in _SUFFIXES if name.endswith(suffix)), None)
    if suffix is not None:
        what, part = _SUFFIXES[suffix]
        return name.removesuffix(suffix) + (".weight" if what == "copy" else ""), what, part
    part = None
    if is_saved_whole(name.rpartition(".")[0], config.get("modules_to_save")):
        part = "modules_to_save"
    elif name.endswith(".bias") and config.get("bias", "none") != "none":
        part = "bias"
    elif _EMBEDDING.fullmatch(name):  # PEFT saves them if the vocabulary was resized
        part = "embeddings"
    if part is None or "lora_" in name:
        raise LayoutMismatchError(
            f"adapter {folder}: tensor {key!r} is not part of a LoRA on linear layers or embeddings. Train without it."
        )
    return name.replace(".base_layer.", "."), "parameter", part


def _modules(
    found: Mapping[str, Mapping[str, StoredTensor]], config: Mapping[str, Any], folder: Path
) -> OnDemand[str, LoraModule]:
    """Pair the factors of every module, whose rank must be that of the configuration."""
    of_A, of_B = ({**found[f"lora_{part}"], **found[f"lora_embedding_{part}"]} for part in "AB")
    scalings = {}
    for name in sorted(of_A.keys() | of_B.keys()):
        lora_A, lora_B = of_A.get(name), of_B.get(name)
        if lora_A is None or lora_B is None or len(lora_A.shape) != 2 or len(lora_B.shape) != 2:
            raise LayoutMismatchError(
                f"adapter {folder}: module {name} has no matrix pair lora_A, lora_B. Get the folder again."
            )
        rank = lora_A.shape[0]
        expected = value_of(config.get("rank_pattern"), name, config["r"])
        if not rank or lora_B.shape[1] != rank or rank != expected:
            raise LayoutMismatchError(
                f"adapter {folder}: module {name} has lora_A {lora_A.shape} and lora_B {lora_B.shape}, its "
                f"configuration says rank {expected}. Get the folder again."
            )
        alpha = value_of(config.get("alpha_pattern"), name, config["lora_alpha"])
        scalings[name] = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank

    def module(name: str) -> LoraModule:
        return LoraModule(*_float32(_read(folder, of_A[name]), _read(folder, of_B[name])), scalings[name])

    return OnDemand(scalings, module)


def _float32(lora_A: torch.Tensor, lora_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and B in float32 as they are, or balanced where float32 would lose a factor but not the product."""
    sizes = (largest_magnitude(each) for each in (lora_A, lora_B) if each.dtype == torch.float64)
    held = all(size == 0 or _SMALLEST <= size <= torch.finfo(torch.float32).max for size in sizes)
    return (lora_A.float(), lora_B.float()) if held else float32_factors(lora_A, lora_B)


def _read(folder: Path, tensor: StoredTensor) -> torch.Tensor:
    try:
        return read_tensor(tensor)
    except OSError as error:
        raise _damaged(folder, error) from error


def _damaged(folder: Path, error: Exception) -> LayoutMismatchError:
    return LayoutMismatchError(f"adapter {folder}: damaged ({error}). Get the folder again.")


def _check_complete(
    config: Mapping[str, Any],
    folder: Path,
    leave_out: frozenset[str],
    modules: Mapping[str, LoraModule],
    found: Mapping[str, Mapping[str, StoredTensor]],
    kinds: Mapping[str, str],
) -> None:
    """Raise LayoutMismatchError if trained values are missing that the configuration names, or have another shape."""
    magnitudes, output_biases = found["magnitude"], found["output_bias"]
    for what, vectors in (("lora_magnitude_vector", magnitudes), ("lora_B.bias", output_biases)):
        for name, vector in vectors.items():
            if name not in modules or math.prod(vector.shape) != modules[name].lora_B.shape[0]:
                raise LayoutMismatchError(
                    f"adapter {folder}: {name}.{what} has shape {vector.shape}, which is not that of the outputs of a "
                    "LoRA module. Get the folder again."
                )
    lacking = {
        "use_dora": ("dora", sorted(modules.keys() - magnitudes.keys()), "lora_magnitude_vector"),
        "lora_bias": ("bias", [] if output_biases else sorted(modules), "lora_B.bias"),
        "modules_to_save": ("modules_to_save", [] if "modules_to_save" in kinds.values() else [TENSOR_FILE], "tensor"),
    }
    for key, (part, where, what) in lacking.items():
        if config.get(key) and where and part not in leave_out:
            raise LayoutMismatchError(
                f"adapter {folder}: {key} = {config[key]!r}, but {shortened(where)} has no {what} for it. Get the "
                f"folder again, or merge without it: --leave-out {part}."
            )


def _open_files(folder: Path) -> tuple[Any, dict[str, StoredTensor]]:
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        if (folder / INDEX_FILE).is_file() and not (folder / TENSOR_FILE).is_file():
            return config, _open_shards(folder)
        return config, find_tensors(folder / TENSOR_FILE)
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
        raise _damaged(folder, error) from error


def _open_shards(folder: Path) -> dict[str, StoredTensor]:
    """Find the tensors from the files that the index names, each of which must hold exactly its own."""
    index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
    file_of = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(file_of, dict) or not all(isinstance(file, str) for file in file_of.values()):
        raise ValueError(f"{INDEX_FILE} has no weight_map")
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(set(file_of.values())):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"{INDEX_FILE} names {file!r}, expected a safetensors file in the folder itself")
        if not (folder / file).is_file():
            raise ValueError(f"{INDEX_FILE} names {file}, which is missing")
        tensors |= find_tensors(folder / file)
    if tensors.keys() != file_of.keys():
        raise ValueError(f"{INDEX_FILE} and its files differ in {shortened(sorted(tensors.keys() ^ file_of.keys()))}")
    return tensors


def _check_config(config: Any, folder: Path) -> None:
    """Raise LayoutMismatchError for a configuration that is damaged, or not that of a sum B A."""
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
    for key in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
        value = config.get(key)
        if not (value is None or _compile([value] if isinstance(value, str) else value)):
            raise LayoutMismatchError(
                f"adapter {folder}: {key} is {value!r} in {CONFIG_FILE}, not names or a pattern of modules. "
                "Get the folder again."
            )
    layers = config.get("layers_to_transform")
    if not (layers is None or isinstance(layers, int) or _are(int, layers)):
        raise LayoutMismatchError(
            f"adapter {folder}: layers_to_transform is {layers!r} in {CONFIG_FILE}, not numbers of layers. "
            "Get the folder again."
        )
    for key in _UNSUPPORTED:
        if config.get(key):
            raise LayoutMismatchError(
                f"adapter {folder}: {key} = {config[key]!r}; its update is not a sum B A of a layer, so no merge of "
                "it is defined here. Train without it."
            )
    start = str(config.get("init_lora_weights", True))
    if start.lower().startswith(_CHANGES_THE_BACKBONE):
        raise LayoutMismatchError(
            f"adapter {folder}: init_lora_weights = {start!r} changed the weights of its backbone, so that B A alone "
            "is not what was learned. Convert it with peft's save_pretrained(path_initial_model_for_weight_conversion)."
        )


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, (int, float)) and 0 < value < 1e30


def _are(kind: type, values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)


def _compile(patterns: Any) -> bool:
    try:
        return isinstance(patterns, (list, dict)) and all(re.compile(pattern) for pattern in patterns)
    except (re.error, RecursionError, OverflowError, TypeError):
        return False
