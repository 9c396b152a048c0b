"""A LoRA adapter from two full models: the truncated SVD of what fine-tuning changed in each linear layer.

The models are folders of Hugging Face with safetensors files, sharded or not. Tensors are read one module at a time.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedmerge.adapter import Adapter
from fedmerge.backbone_files import find_backbone
from fedmerge.encoder.peft.model_weights import ModelWeights, open_weights, read_weight
from fedmerge.errors import BackboneError, ConfigError, LayoutMismatchError, MergeError
from fedmerge.merging.low_rank.compression import compressed
from fedmerge.merging.low_rank.spaces import Bases

_TASKS = {  # end of a class's name -> PEFT's task type
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
}


@dataclass(frozen=True)
class Extraction:
    """An adapter extracted from two models, and what it does not hold.

    Attributes:
        adapter: the changed linear modules, scaling 1.
        residuals: module -> ‖Δ - Δ_adapter‖_F / ‖Δ‖_F, where Δ is the difference of the two weights.
        lost: tensor -> its share of ‖all differences‖_F², for every changed tensor without a module in the adapter.
        residual: ‖all differences - adapter‖_F / ‖all differences‖_F, over the tensors that both models have.
        unmatched: tensors that only one of the models has.
        base_name: public name of the base model.
        task_type: PEFT's task type.
        fan_in_fan_out: True if a module stores its weight transposed.
    """

    adapter: Adapter
    residuals: Mapping[str, float]
    lost: Mapping[str, float]
    residual: float
    unmatched: tuple[str, ...]
    base_name: str
    task_type: str
    fan_in_fan_out: bool


def extract_adapter(base: str | Path, tuned: str | Path, rank: int, target_modules: Sequence[str] = ()) -> Extraction:
    """Return the LoRA of rank ``rank`` that comes closest to the change from one model to another.

    The first ``rank`` singular triples of Δ = W_tuned - W_base are the nearest matrix of this rank (Eckart and Young).
    A module that did not change is left out. Biases, norms, embeddings and modules that are not chosen stay as in the
    base model: those that changed are listed as lost.

    Args:
        base: folder or hub id of the model before fine-tuning.
        tuned: folder or hub id of the model after it.
        rank: largest rank of a module.
        target_modules: names of linear modules, whole or from the right, such as ``q_proj``; empty: all but the output
            head.

    Raises:
        BackboneError: a folder without readable safetensors files or without a readable ``config.json``.
        ConfigError: a rank below 1, or a target that no linear module has.
        LayoutMismatchError: a tensor of another shape, or a chosen module that one of the models lacks.
        MergeError: a value that is not finite, or no linear module that changed.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ConfigError(f"extract: rank: found {rank!r}, expected an integer of at least 1")
    name, folder = find_backbone(str(base))
    before, after = open_weights(folder), open_weights(find_backbone(str(tuned))[1])
    _check_shapes(before, after)
    model = _model_of(folder)
    chosen = _chosen(model, before, after, target_modules)
    modules, residuals = {}, {}
    squares: dict[str, float] = {}  # tensor -> ‖Δ‖², of all that changed
    kept = 0.0  # Σ ‖Δ - Δ_adapter‖² over the modules
    for key in sorted(before.shapes.keys() & after.shapes.keys()):
        difference = _difference(before, after, key)
        if not (square := float(difference.double().square().sum())):
            continue
        squares[key] = square
        module = chosen.get(key)
        if module is not None:
            delta = difference.T if isinstance(model.get_submodule(module), Conv1D) else difference
            modules[module], residuals[module] = compressed(delta, Bases(), min(rank, *delta.shape))
            kept += residuals[module] ** 2 * square
    if not modules:
        raise MergeError(
            f"extract: {base} and {tuned} have equal weights in every chosen linear module, so there is nothing to "
            "extract. Check which models were given, or choose other target modules."
        )
    whole = math.fsum(squares.values())
    lost = {key: squares[key] / whole for key in sorted(squares.keys() - chosen.keys())}
    architecture = type(model).__name__
    return Extraction(
        adapter=Adapter(modules),
        residuals=dict(sorted(residuals.items())),
        lost=lost,
        residual=math.sqrt(kept / whole + math.fsum(lost.values())),
        unmatched=tuple(sorted(before.shapes.keys() ^ after.shapes.keys())),
        base_name=name,
        task_type=next((task for end, task in _TASKS.items() if architecture.endswith(end)), "FEATURE_EXTRACTION"),
        fan_in_fan_out=any(isinstance(model.get_submodule(module), Conv1D) for module in modules),
    )


def _check_shapes(before: ModelWeights, after: ModelWeights) -> None:
    """Raise unless the tensors of one name have one shape."""
    different = [
        f"{key} {list(before.shapes[key])} and {list(after.shapes[key])}"
        for key in sorted(before.shapes.keys() & after.shapes.keys())
        if before.shapes[key] != after.shapes[key]
    ]
    if different:
        raise LayoutMismatchError(
            f"extract: {before.folder} and {after.folder} differ in the shapes of {len(different)} tensors: "
            f"{', '.join(different[:5])}{' …' if len(different) > 5 else ''}. Give two models of one architecture and "
            "one vocabulary."
        )


def _difference(before: ModelWeights, after: ModelWeights, key: str) -> torch.Tensor:
    """Return after - before, float32."""
    difference = read_weight(after, key).float().sub_(read_weight(before, key).float())
    if bad := int((~difference.isfinite()).sum()):
        raise MergeError(f"extract: tensor {key}: {bad} of {difference.numel()} differences are not finite.")
    return difference


def _model_of(folder: Path) -> PreTrainedModel:
    """Build the model of a folder's configuration without weights."""
    try:
        config = AutoConfig.from_pretrained(folder)
        names = getattr(config, "architectures", None) or []
        known = [getattr(transformers, str(name)) for name in names[:1] if hasattr(transformers, str(name))]
        with torch.device("meta"):
            model: Any = known[0](config) if known else AutoModel.from_config(config)  # type: ignore[no-untyped-call]  # its own
    except Exception as error:  # transformers raises many kinds: no file, no JSON, an unknown type, remote code
        raise BackboneError(
            f"model {folder}: its config.json names no model that transformers can build "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}). Get the model again."
        ) from error
    built: PreTrainedModel = model
    return built


def _chosen(
    model: PreTrainedModel, before: ModelWeights, after: ModelWeights, target_modules: Sequence[str]
) -> dict[str, str]:
    """Return tensor -> module for the linear modules to extract."""
    linear = {
        name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D) and name
    }
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]  # of transformers
    found = {
        name
        for name, module in linear.items()
        if any(f".{name}".endswith(f".{target}") for target in target_modules)
        or (not target_modules and module is not head)
    }
    unknown = [each for each in target_modules if not any(f".{name}".endswith(f".{each}") for name in found)]
    if unknown:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
        raise ConfigError(
            f"extract: no linear module is named {', '.join(unknown)}; {type(model).__name__} has: {known}"
        )
    chosen, prefix = {}, f"{model.base_model_prefix}."
    for name in sorted(found):
        spellings = [f"{name}.weight", f"{prefix}{name}.weight", f"{name}.weight".removeprefix(prefix)]
        lacking = [tensors.folder for tensors in (before, after) if not tensors.shapes.keys() & {*spellings}]
        if len(lacking) == 2 and not target_modules:
            continue  # neither model has it, such as the pooler of an encoder
        if lacking:
            raise LayoutMismatchError(
                f"extract: {lacking[0]} has no weight of the linear module {name}. Give two models of the architecture "
                "in the base model's config.json, or choose other target modules."
            )
        key = next((each for each in spellings if each in before.shapes and each in after.shapes), None)
        if key is None:
            raise LayoutMismatchError(
                f"extract: the weight of {name} has another name in {before.folder} than in {after.folder}. Save both "
                "models from one class."
            )
        chosen[key] = name
    return chosen
