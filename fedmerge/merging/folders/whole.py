"""Merge what PEFT folders hold beside LoRA: parameters that were trained whole, and biases of B.

These have no update B A, so a method is defined on them only if it is linear in the entries: with weights w_k,
W = W_0 + Σ_k w_k (W_k - W_0), where W_0 is the base model's. If Σ w_k = 1 and every adapter has the parameter, W_0
cancels and need not be known.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fedmerge.adapter import layer_of
from fedmerge.encoder.peft.contents import PARTS, shortened
from fedmerge.encoder.peft.model_weights import read_weight_like
from fedmerge.encoder.peft.names import is_saved_whole
from fedmerge.errors import BackboneError, LayoutMismatchError, MergeError
from fedmerge.merging.folders.reading import AdapterFolders
from fedmerge.merging.methods import METHODS, method_coefficients
from fedmerge.merging.stack import OTHERS, expand_coefficients, layout_of
from fedmerge.merging.training_free import MergedAdapter

_SUM_TOLERANCE = 1e-6  # of coefficients that are float32, as 1/3


@dataclass(frozen=True)
class Whole:
    """Merged parameters beside LoRA.

    Attributes:
        parameters: name in the bare backbone -> values.
        output_biases: module -> (out,), added to its output.
        settings: entries of ``adapter_config.json`` with which PEFT reads the parameters.
    """

    parameters: Mapping[str, torch.Tensor] = field(default_factory=dict)
    output_biases: Mapping[str, torch.Tensor] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """Return entries of the provenance."""
        names = [*self.parameters, *(f"{module}.lora_B.bias" for module in self.output_biases)]
        return {"whole_parameters": sorted(names)} if names else {}


NOTHING = Whole()


def merge_whole(merged: MergedAdapter, sources: AdapterFolders) -> Whole:
    """Merge the whole parameters of the adapters that took part in a merge, with the weights of its method.

    Raises:
        MergeError: the method is not linear in the entries, or it needs weights of the base model that are not given.
        LayoutMismatchError: the shapes of a parameter differ, or copies of the base model's weights differ.
        BackboneError: the base model lacks a weight.
    """
    contents = {name: sources.contents[name] for name in merged.coefficients if name in sources.contents}
    copies = _copies({name: each.copies for name, each in contents.items()})
    kinds = {name: kind for each in contents.values() for name, kind in each.kinds.items()}
    biased = sorted({name for each in contents.values() for name in each.output_biases})
    if not kinds and not biased:
        return Whole(copies)
    weights, made, added = _Weights(merged, sources), {}, {}
    for name in sorted(kinds):
        values = {domain: each.parameters[name] for domain, each in contents.items() if name in each.parameters}
        made[name] = _merge(name, kinds[name], values, weights, sources)
    for name in biased:
        values = {domain: each.output_biases[name] for domain, each in contents.items() if name in each.output_biases}
        added[name] = sum_of(values, weights.of(name, "bias"), torch.zeros(len(next(iter(values.values())))))
    return Whole(copies | made, added, _settings([each.config for each in contents.values()], kinds, sources))


class _Weights:
    """Weights of a linear method by domain and parameter."""

    def __init__(self, merged: MergedAdapter, sources: AdapterFolders) -> None:
        self.merged, self.signals = merged, sources.signals
        self.domains = tuple(sorted(merged.coefficients))
        self.layout = layout_of({name: sources.adapters[name] for name in self.domains})

    def of(self, name: str, kind: str) -> dict[str, float]:
        """Return domain -> weight, for a parameter of this name."""
        method = self.merged.method
        if method not in METHODS or METHODS[method].coefficients is None:
            raise MergeError(
                f"merging method {method!r}: the adapters hold {PARTS[kind]} ({name}), of which only a linear method "
                "has a merge. Choose average or task-arithmetic, or leave them out with "
                f"--leave-out {kind}."
            )
        values = expand_coefficients(
            self.layout, method_coefficients(method, self.layout, self.signals, **self.merged.parameters)
        ).double()  # (K, G)
        column = 0
        if not bool((values == values[:, :1]).all()):
            layer = layer_of(name)
            of_layer = [group for each, group in self.layout.group_of.items() if layer_of(each) == layer]
            if not of_layer or (layer is None and OTHERS not in self.layout.groups):
                raise MergeError(
                    f"merging method {method!r}: its weights differ by layer, and {name} belongs to no layer of the "
                    f"adapters. Leave it out with --leave-out {kind}."
                )
            column = of_layer[0]
        return {
            domain: value * self.merged.coefficients[domain]
            for domain, value in zip(self.domains, values[:, column].tolist(), strict=True)
        }


def sum_of(values: Mapping[str, torch.Tensor], weights: Mapping[str, float], start: torch.Tensor) -> torch.Tensor:
    """Compute start + Σ_k w_k (value_k - start) in float64; return float32."""
    total = start.double().clone()
    for domain, value in values.items():
        total += weights[domain] * (value.double() - start.double())
    return total.float()


def _merge(
    name: str, kind: str, values: Mapping[str, torch.Tensor], weights: _Weights, sources: AdapterFolders
) -> torch.Tensor:
    by_domain, leave_out = weights.of(name, kind), f"leave it out with --leave-out {kind}"
    shapes = {domain: tuple(value.shape) for domain, value in values.items()}
    if len({*shapes.values()}) > 1:
        found = ", ".join(f"{domain} {shape}" for domain, shape in shapes.items())
        raise LayoutMismatchError(
            f"{name}: found the shapes {found}; expected the same. Merge adapters with the same tokens or classes, or "
            f"{leave_out}."
        )
    lacking = [domain for domain in by_domain if domain not in values]
    total = sum(by_domain.values())
    cancels = not lacking and abs(total - 1) <= _SUM_TOLERANCE
    first = next(iter(values.values()))
    base = _base_weight(name, sources, needed=not cancels)
    if base is not None and base.shape == first.shape:
        return sum_of(values, by_domain, base)
    if cancels:
        return sum_of(values, by_domain, torch.zeros_like(first))
    why = f"{shortened(lacking)} has none" if lacking else f"the weights of the adapters sum to {total:g}, not 1"
    if base is not None:
        raise LayoutMismatchError(
            f"{name} was trained whole, and {why}: its merge depends on the base model, which has {tuple(base.shape)}, "
            f"not {tuple(first.shape)}. Give --base a model with the vocabulary of the adapters, or {leave_out}."
        )
    raise MergeError(
        f"{name} was trained whole, and {why}: its merge depends on the base model. Give the folder of its weights "
        f"with --base, or {leave_out}."
    )


def _base_weight(name: str, sources: AdapterFolders, needed: bool) -> torch.Tensor | None:
    """Return the base model's weight; None if no base model is given, or one without the weight, if not needed."""
    if sources.base is None:
        return None
    try:
        return read_weight_like(sources.base, name)
    except BackboneError:
        if needed:
            raise
        return None


def _copies(copies: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the untrained weights that folders repeat from the base model, which must be the same in all."""
    found: dict[str, tuple[str, torch.Tensor]] = {}
    for domain, tensors in copies.items():
        for name, tensor in tensors.items():
            first, expected = found.setdefault(name, (domain, tensor))
            if not torch.equal(tensor, expected):
                raise LayoutMismatchError(
                    f"{name}: {first} and {domain} hold different copies of this weight of the base model, so their "
                    "base models or vocabularies differ. Merge adapters of one base model, or leave the module out "
                    "with --leave-out embeddings."
                )
    return {name: tensor for name, (_, tensor) in found.items()}


def _settings(configs: list[Mapping[str, Any]], kinds: Mapping[str, str], sources: AdapterFolders) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    if "modules_to_save" in kinds.values():
        modules = sorted({str(name) for config in configs for name in config.get("modules_to_save") or ()})
        modules_of = {name for adapter in sources.adapters.values() for name in adapter.modules}
        if both := sorted(name for name in modules_of if is_saved_whole(name, modules)):
            raise MergeError(
                f"{shortened(both)} was trained whole in one adapter and has a LoRA in another, which PEFT cannot "
                "load together. Leave the whole modules out with --leave-out modules_to_save."
            )
        settings["modules_to_save"] = modules
    if "bias" in kinds.values():
        trained = {config["bias"] for config in configs if config.get("bias", "none") != "none"}
        settings["bias"] = trained.pop() if len(trained) == 1 else "all"
    return settings
