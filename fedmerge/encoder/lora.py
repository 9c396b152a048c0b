"""LoRA adapters on a backbone: attach, read off, load, and apply temporarily."""

import hashlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model

from fedmerge.adapter import Adapter, LoraModule
from fedmerge.backbone_files import GROUPS, target_layers
from fedmerge.config import Lora
from fedmerge.encoder.backbone import Backbone
from fedmerge.encoder.loading.quantised import own_weight, use_weight
from fedmerge.encoder.peft.contents import MODULE_PREFIX
from fedmerge.errors import ConfigError, LayoutMismatchError
from fedmerge.seeding import generator

Layout = Mapping[str, tuple[tuple[int, ...], tuple[int, ...], float]]
"""Module name -> shape of lora_A, shape of lora_B, scaling."""


def attach(backbone: Backbone, target_modules: Sequence[str], rank: int, alpha: float, seed: int) -> PeftModel:
    """Attach a fresh, trainable LoRA to a backbone, in place; ``.unload()`` removes it.

    B is zero and A uniform in ±1/√in as in PEFT, but drawn from ``seed`` and the module's name, so that every client of
    a federation starts from the same adapter.

    Args:
        backbone: changed in place.
        target_modules: names of linear layers, complete or their last parts (``query``); the groups ``attention`` and
            ``mlp`` of the model's type; ``("all-linear",)`` for all.
        rank: rank r.
        alpha: scaling · r.
        seed: seed of A.

    Raises:
        ConfigError: no linear layer has one of these names, or the groups of this model type are not known.
    """
    linear = [name for name, module in backbone.model.named_modules() if isinstance(module, torch.nn.Linear)]
    targets: str | list[str] = "all-linear" if list(target_modules) == ["all-linear"] else list(target_modules)
    if not isinstance(targets, str):
        layers = target_layers(linear, targets, backbone.model.config.model_type)
        for target, found in layers.items():
            if not found:
                known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
                raise ConfigError(
                    f"lora.target_modules: {backbone.name} has no linear layer {target!r}. It has: {known}; or "
                    "all-linear."
                )
        if {*GROUPS} & {*targets}:
            targets = sorted({name for names in layers.values() for name in names})
    config = LoraConfig(
        task_type=TaskType.FEATURE_EXTRACTION,
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT also accepts fractions
        target_modules=targets,
        lora_dropout=0.0,
    )
    with warnings.catch_warnings():  # PEFT 0.21 asks transformers 5 for an attribute by its old name
        warnings.simplefilter("ignore", FutureWarning)
        model = get_peft_model(backbone.model, config)
    with torch.no_grad():
        for name, lora_A, _, _ in _lora_layers(model):
            lora_A.copy_(initial_lora_A(seed, name, *lora_A.shape))
    return model


def initial_lora_A(seed: int, name: str, rank: int, width_in: int) -> torch.Tensor:
    """Draw the initial A; for equal seeds, a smaller rank has the first rows of a larger one.

    Args:
        seed: seed of the adapter.
        name: name of the module in the bare backbone.
        rank: rank r.
        width_in: number of inputs.

    Returns:
        float32 (rank, width_in), uniform in ±1/√width_in.
    """
    bound = 1.0 / math.sqrt(width_in)
    return torch.from_numpy(generator(seed, "lora-init", name).uniform(-bound, bound, (rank, width_in))).float()


def adapter_of(model: PeftModel) -> Adapter:
    """Copy the adapter of a PEFT model."""
    return Adapter(
        {
            name: LoraModule(lora_A.detach().float().cpu().clone(), lora_B.detach().float().cpu().clone(), scaling)
            for name, lora_A, lora_B, scaling in _lora_layers(model)
        }
    )


def fresh_adapter(backbone: Backbone, lora: Lora, seed: int) -> Adapter:
    """Return the adapter that :func:`attach` starts from; the backbone is unchanged."""
    model = attach(backbone, lora.target_modules, lora.rank, lora.scaled_alpha, seed)
    try:
        return adapter_of(model)
    finally:
        model.unload()


def expected_layout(backbone: Backbone, lora: Lora) -> Layout:
    """Return the layout that ``[lora]`` gives on a backbone; the backbone is left as it was."""
    return layout_of(fresh_adapter(backbone, lora, seed=0))


def layout_of(adapter: Adapter) -> Layout:
    """Return the layout of an adapter."""
    return {
        name: (tuple(module.lora_A.shape), tuple(module.lora_B.shape), module.scaling)
        for name, module in adapter.modules.items()
    }


@cache
def layout_sha256(backbone: Backbone, lora: Lora) -> str:
    """Return a hash of modules, shapes and scalings: two parties with equal hashes train the same layout."""
    return hashlib.sha256(repr(sorted(expected_layout(backbone, lora).items())).encode()).hexdigest()


def load_into(model: PeftModel, adapter: Adapter) -> None:
    """Copy an adapter's values into the LoRA layers of a PEFT model.

    Raises:
        LayoutMismatchError: modules, shapes or scalings differ.
    """
    layers = {name: (lora_A, lora_B, scaling) for name, lora_A, lora_B, scaling in _lora_layers(model)}
    found = {name: (tuple(m.lora_A.shape), tuple(m.lora_B.shape), m.scaling) for name, m in adapter.modules.items()}
    expected = {name: (tuple(A.shape), tuple(B.shape), scaling) for name, (A, B, scaling) in layers.items()}
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise LayoutMismatchError(
                f"adapter module {name}: found (lora_A, lora_B, scaling) = {found.get(name)}, the model has "
                f"{expected.get(name)}. Use the same lora settings and backbone everywhere."
            )
    with torch.no_grad():
        for name, (lora_A, lora_B, _) in layers.items():
            lora_A.copy_(adapter.modules[name].lora_A)
            lora_B.copy_(adapter.modules[name].lora_B)


@contextmanager
def applied(backbone: Backbone, adapter: Adapter | None) -> Iterator[None]:
    """Fold an adapter into the backbone's weights, W + Δ, and restore the exact originals afterwards.

    A folded adapter of any rank costs nothing per token.

    Raises:
        LayoutMismatchError: the backbone lacks a module, or has it with another shape.
    """
    modules = dict(backbone.model.named_modules())
    originals: dict[str, torch.Tensor | None] = {}
    try:
        for name, lora in (adapter.modules if adapter else {}).items():
            layer = modules.get(name)
            shape = (lora.lora_B.shape[0], lora.lora_A.shape[1])
            if not isinstance(layer, torch.nn.Linear) or tuple(layer.weight.shape) != shape:
                found = "nothing" if layer is None else str(layer)
                raise LayoutMismatchError(
                    f"adapter module {name}: it updates a linear layer of shape {shape}, but {backbone.name} has "
                    f"{found} there. The adapter belongs to another backbone."
                )
            originals[name], weight = own_weight(layer), layer.weight.data
            use_weight(layer, weight + lora.delta_weight().to(weight.device))
        yield
    finally:
        for name, own in originals.items():
            use_weight(modules[name], own)


def factors_of(model: PeftModel) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return module -> its parameters lora_A and lora_B, by name; a change of theirs changes the model."""
    return {name: (lora_A, lora_B) for name, lora_A, lora_B, _ in _lora_layers(model)}


def _lora_layers(model: PeftModel) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, float]]:
    for name, module in sorted(model.named_modules()):
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            bare = name.removeprefix(MODULE_PREFIX)
            yield (
                bare,
                module.lora_A["default"].weight,
                module.lora_B["default"].weight,
                float(module.scaling["default"]),
            )
