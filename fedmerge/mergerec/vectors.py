"""The vectors that learned coefficients multiply, K per module, and a backbone that computes with θ₀ + Σ_k w_k v_k.

The vectors are the adapters' own updates (task vectors), stored low-rank in a ``Stack``, or the rows of an elementwise
merging method, which are stored sparse: they have no low rank, but few entries are not 0. For many domains the adapters
stay on disk (``StreamedVectors``), and a step has the factors of a few of them (``SampledVectors``).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch.utils.hooks import RemovableHandle

from fedmerge.adapter import Adapter
from fedmerge.encoder.backbone import Backbone
from fedmerge.errors import ConfigError, LayoutMismatchError, MergeError
from fedmerge.merging.parameters import Value
from fedmerge.merging.stack import (
    Stack,
    StackedModule,
    StackLayout,
    dense_module,
    expand_coefficients,
    linear_merge,
    linear_merge_of_many,
    stack_adapters,
)
from fedmerge.merging.training_free import domain_rows

TASK_VECTORS = "task-vectors"

INITIALISATIONS: dict[str, float] = {TASK_VECTORS: 0.2, "ties": 1.0, "pcb": 1.0, "localize-and-stitch": 1.0}
"""Origin of the vectors -> published initial coefficient; rows at 1 are the method's own merge."""


@dataclass(frozen=True, slots=True)
class SparseModule:
    """The K sparse updates of one linear module, domain after domain.

    Attributes:
        index: (E,) int32, positions of the entries in the flattened (out, in) updates.
        values: (E,) float32.
        counts: number of entries of each of the K domains.
        shape: (out, in).
    """

    index: torch.Tensor
    values: torch.Tensor
    counts: tuple[int, ...]
    shape: tuple[int, int]

    def weighted_sum(self, coefficients: torch.Tensor) -> torch.Tensor:
        """Σ_k w_k v_k, (out, in), differentiable in the (K,) coefficients."""
        parts = zip(torch.split(self.values, list(self.counts)), coefficients.unbind(), strict=True)
        entries = torch.cat([values * coefficient for values, coefficient in parts])  # (E,)
        return entries.new_zeros(self.shape[0] * self.shape[1]).index_add(0, self.index, entries).view(self.shape)


@dataclass(frozen=True, slots=True)
class SparseRows(StackLayout):
    """K sparse vectors of one layout.

    Attributes:
        modules: module name -> its sparse updates, sorted by name.
    """

    modules: Mapping[str, SparseModule]

    @property
    def size_bytes(self) -> int:
        """Bytes of all entries."""
        return sum(module.index.nbytes + module.values.nbytes for module in self.modules.values())


@dataclass(frozen=True, slots=True)
class StreamedVectors(StackLayout):
    """K task vectors that are read one adapter at a time, whenever they are needed.

    Attributes:
        adapters: domain -> adapter, for instance a mapping that reads each from disk.
    """

    adapters: Mapping[str, Adapter]


@dataclass(frozen=True, slots=True)
class SampledVectors(StackLayout):
    """The merge at given coefficients, and the factors of the sampled domains, whose coefficients get gradients.

    Attributes:
        merge: module -> Σ_k w_k Δ_k, (out, in) float64.
        modules: module -> stacked factors of the sampled domains; ``owner`` counts over all K domains.
    """

    merge: Mapping[str, torch.Tensor]
    modules: Mapping[str, StackedModule]


Vectors = Stack | SparseRows | StreamedVectors | SampledVectors


def initial_vectors(stack: Stack, initialisation: str = TASK_VECTORS, **parameters: Value) -> Vectors:
    """Return the vectors whose coefficients are learned.

    Args:
        stack: K adapters.
        initialisation: "task-vectors" for the updates themselves, or the elementwise method whose rows they are, with
            thresholds over single modules.
        parameters: parameters of that method, such as ``density``.

    Raises:
        ConfigError: an unknown initialisation, or a parameter that is unknown or out of bounds.

    Source: arXiv:2601.01753, initialisation of the merging vectors.
    """
    if initialisation not in INITIALISATIONS:
        raise ConfigError(f"initialisation: found {initialisation!r}, expected one of {', '.join(INITIALISATIONS)}")
    if initialisation == TASK_VECTORS:
        if parameters:
            raise ConfigError(
                f"initialisation {initialisation!r}: found parameters {', '.join(parameters)}, expected none"
            )
        return stack
    modules = {
        name: _sparse(rows)
        for name, rows in domain_rows(stack, initialisation, **parameters)  # type: ignore[arg-type]  # not the scope
    }
    return SparseRows(stack.domains, stack.groups, stack.group_of, dict(sorted(modules.items())))


def merge_vectors(vectors: Vectors, coefficients: torch.Tensor) -> Adapter:
    """Return θ(w) as one adapter, exactly; a sum of sparse rows, of no low rank, is stored as Δ times an identity.

    Args:
        vectors: K vectors.
        coefficients: (K,) or (K, G).

    Raises:
        LayoutMismatchError: coefficients of another shape.
        MergeError: a coefficient is not finite.
    """
    if isinstance(vectors, Stack):
        return linear_merge(vectors, coefficients)
    if isinstance(vectors, StreamedVectors):
        return linear_merge_of_many(vectors.adapters, vectors, coefficients)
    if isinstance(vectors, SampledVectors):
        raise MergeError("merge_vectors: found a sample of the domains, expected the vectors of all; merge those")
    values = expand_coefficients(vectors, coefficients).detach()  # (K, G)
    merged = {}
    for name, module in vectors.modules.items():
        delta = module.weighted_sum(values[:, vectors.group_of[name]].to(module.values.device))
        merged[name] = dense_module(delta.cpu())
    return Adapter(merged)


def on_device(vectors: Vectors, device: torch.device) -> Vectors:
    """Return the same vectors on a device; streamed ones are moved when they are read."""
    if isinstance(vectors, (StreamedVectors, SampledVectors)):
        return vectors
    if isinstance(vectors, Stack):
        stacked = {
            name: StackedModule(module.lora_A.to(device), module.lora_B.to(device), module.owner.to(device))
            for name, module in vectors.modules.items()
        }
        return replace(vectors, modules=stacked)
    sparse = {
        name: replace(module, index=module.index.to(device), values=module.values.to(device))
        for name, module in vectors.modules.items()
    }
    return replace(vectors, modules=sparse)


@contextmanager
def merged_forward(backbone: Backbone, vectors: Vectors, coefficients: torch.Tensor) -> Iterator[None]:
    """Let the backbone compute with θ₀ + Σ_k w_k v_k inside the context, differentiable in the coefficients.

    Task vectors: ((x Aᵀ) · w[owner]) Bᵀ is added to the output of every target module, at the cost of one LoRA of rank
    R = Σ r_k; no out × in matrix is formed. Sparse rows: Δ = Σ_k w_k v_k is summed in every forward pass and x Δᵀ is
    added; no dense vector of a single domain is formed. Coefficients are read in every forward pass, so an optimiser
    may change them inside the context. Sampled vectors: x Δᵀ is added for the merge Δ at the coefficients that it was
    made for, and only the coefficients of the sampled domains get gradients; the cost does not depend on K.

    Args:
        backbone: its weights are not touched; the hooks are removed on leaving, also after an error.
        vectors: K vectors, in memory or sampled.
        coefficients: (K,) or (K, G) float32 on the backbone's device.

    Raises:
        LayoutMismatchError: the backbone lacks a module, or has it in another shape; coefficients of another shape.
        MergeError: a coefficient that is not finite.
    """
    if isinstance(vectors, StreamedVectors):
        raise MergeError("merged_forward: found streamed adapters, expected those of a step; see RunningMerge.at")
    expand_coefficients(vectors, coefficients)
    layers = _target_layers(backbone, vectors)
    merge = vectors.merge if isinstance(vectors, SampledVectors) else {}
    handles: list[RemovableHandle] = []
    try:
        for name, layer in layers.items():
            group = vectors.group_of[name] if coefficients.ndim == 2 else None
            module = vectors.modules[name]
            hook = _hook(module, layer, coefficients, group)
            if isinstance(module, StackedModule) and name in merge:
                hook = _sampled_hook(module, merge[name], layer, coefficients, group)
            handles.append(layer.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


Hook = Callable[[torch.nn.Module, tuple[torch.Tensor, ...], torch.Tensor], torch.Tensor]


def _hook(
    module: StackedModule | SparseModule, layer: torch.nn.Linear, coefficients: torch.Tensor, group: int | None
) -> Hook:
    def per_domain() -> torch.Tensor:
        return coefficients if group is None else coefficients[:, group]  # (K,)

    weight = layer.weight
    if isinstance(module, SparseModule):
        rows = replace(module, index=module.index.to(weight.device), values=module.values.to(weight))

        def add_sparse(
            _module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor
        ) -> torch.Tensor:
            # under autocast Δ is rounded entry by entry: a small step changes some entries and survives on average
            return output + F.linear(inputs[0], rows.weighted_sum(per_domain()).to(weight.dtype))

        return add_sparse
    lora_A, lora_B = module.lora_A.to(weight), module.lora_B.to(weight)  # device and dtype of the weight
    owner = module.owner.to(weight.device)

    def add_low_rank(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        hidden = F.linear(inputs[0], lora_A)  # (..., R)
        # multiplied in float32: bfloat16 would round away the steps of the optimiser
        return output + F.linear((hidden * per_domain()[owner]).to(hidden.dtype), lora_B)

    return add_low_rank


def _sampled_hook(
    module: StackedModule, merge: torch.Tensor, layer: torch.nn.Linear, coefficients: torch.Tensor, group: int | None
) -> Hook:
    weight = layer.weight
    delta = merge.to(weight)
    lora_A, lora_B, owner = module.lora_A.to(weight), module.lora_B.to(weight), module.owner.to(weight.device)

    def add_sampled(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        output = output + F.linear(inputs[0], delta)
        if not len(owner):
            return output
        values = (coefficients if group is None else coefficients[:, group])[owner]  # (R,)
        hidden = F.linear(inputs[0], lora_A)  # (..., R)
        # zero in value: it is the part of the merge that can change, for the gradient
        return output + F.linear((hidden * (values - values.detach())).to(hidden.dtype), lora_B)

    return add_sampled


class RunningMerge:
    """The merge of streamed adapters at coefficients of which a step changes those of a few domains.

    It holds Σ_k w_k Δ_k in float64, out × in numbers a module, and the factors of the latest sample. Adapters are read
    once at the start, one at a time, and then when their domain is sampled.
    """

    def __init__(self, vectors: StreamedVectors, device: torch.device) -> None:
        self._vectors, self._device = vectors, device
        self._values = torch.zeros(len(vectors.domains), len(vectors.groups), dtype=torch.float64)
        self._merge: dict[str, torch.Tensor] = {}
        self._rows: list[int] = []
        self._sample: Mapping[str, StackedModule] = {}

    def at(self, coefficients: torch.Tensor, rows: Sequence[int] = ()) -> SampledVectors:
        """Return the vectors of a step; the merge that an earlier call returned changes with this call.

        Args:
            coefficients: (K,) or (K, G), the current ones of all domains.
            rows: the sampled domains, as indices; without any there is no gradient.

        Raises:
            LayoutMismatchError, MergeError: the coefficients do not fit, or an adapter is damaged.
        """
        values = expand_coefficients(self._vectors, coefficients).detach().cpu().double()  # (K, G)
        changed = (values != self._values).any(dim=1).nonzero().flatten().tolist()
        if {*changed} & {*self._rows}:
            self._add(self._sample, values)
        for row in sorted({*changed} - {*self._rows}):
            self._add(self._factors([row]), values)
        if not self._merge:  # all coefficients are 0
            self._add(self._factors([0]), values)
        self._values = values
        if self._rows != sorted(rows) or not self._sample:
            self._rows = sorted(rows)
            self._sample = self._factors(self._rows)
        vectors = self._vectors
        return SampledVectors(vectors.domains, vectors.groups, vectors.group_of, self._merge, self._sample)

    def _factors(self, rows: Sequence[int]) -> dict[str, StackedModule]:
        """Read and stack the adapters of some domains; of none, nothing but the shapes."""
        names = [self._vectors.domains[row] for row in rows]
        if not names:
            return {name: _no_factors(merge) for name, merge in self._merge.items()}
        stack = stack_adapters({name: self._vectors.adapters[name] for name in names})
        places = torch.tensor(sorted(rows))
        return {
            name: StackedModule(
                module.lora_A.to(self._device), module.lora_B.to(self._device), places[module.owner].to(self._device)
            )
            for name, module in stack.modules.items()
        }

    def _add(self, sample: Mapping[str, StackedModule], values: torch.Tensor) -> None:
        """Add (w - w_before) Δ of some domains to the merge."""
        change = (values - self._values).to(self._device)
        for name, module in sample.items():
            factors = change[module.owner, self._vectors.group_of[name]]  # (R,)
            lora_A, lora_B = module.lora_A.double(), module.lora_B.double()
            if name not in self._merge:
                self._merge[name] = lora_A.new_zeros(len(lora_B), lora_A.shape[1])
            self._merge[name].addmm_(lora_B * factors, lora_A)


def _no_factors(merge: torch.Tensor) -> StackedModule:
    width_out, width_in = merge.shape
    nothing = merge.new_zeros(0, dtype=torch.int64)
    return StackedModule(merge.new_zeros(0, width_in).float(), merge.new_zeros(width_out, 0).float(), nothing)


def _sparse(rows: torch.Tensor) -> SparseModule:
    """Convert (K, out, in) dense rows to sparse."""
    flat = rows.flatten(1)
    found = [row.nonzero().squeeze(1) for row in flat]
    values = torch.cat([row[index] for row, index in zip(flat, found, strict=True)])
    counts = tuple(len(index) for index in found)
    return SparseModule(torch.cat(found).to(torch.int32), values, counts, (rows.shape[1], rows.shape[2]))


def _target_layers(backbone: Backbone, vectors: Stack | SparseRows | SampledVectors) -> dict[str, torch.nn.Linear]:
    found = dict(backbone.model.named_modules())
    layers = {}
    for name, module in vectors.modules.items():
        layer = found.get(name)
        shape = module.shape if isinstance(module, SparseModule) else (len(module.lora_B), module.lora_A.shape[1])
        if not isinstance(layer, torch.nn.Linear) or tuple(layer.weight.shape) != shape:
            what = tuple(layer.weight.shape) if isinstance(layer, torch.nn.Linear) else type(layer).__name__
            raise LayoutMismatchError(
                f"backbone {backbone.name!r}, module {name}: found {what}, expected a linear layer of shape {shape}; "
                "merge on the backbone that the adapters were trained on"
            )
        layers[name] = layer
    return layers
