"""The vectors that learned coefficients multiply, K per module, and a backbone that computes with θ₀ + Σ_k w_k v_k.

The vectors are the adapters' own updates (task vectors), stored low-rank in a ``Stack``, or the rows of an elementwise
merging method, which are stored sparse: they have no low rank, but few entries are not 0.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch.utils.hooks import RemovableHandle

from fedmerge.adapter import Adapter
from fedmerge.encoder.backbone import Backbone
from fedmerge.errors import ConfigError, LayoutMismatchError
from fedmerge.merging.parameters import Value
from fedmerge.merging.stack import Stack, StackedModule, StackLayout, dense_module, expand_coefficients, linear_merge
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


Vectors = Stack | SparseRows


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
    values = expand_coefficients(vectors, coefficients).detach()  # (K, G)
    merged = {}
    for name, module in vectors.modules.items():
        delta = module.weighted_sum(values[:, vectors.group_of[name]].to(module.values.device))
        merged[name] = dense_module(delta.cpu())
    return Adapter(merged)


def on_device(vectors: Vectors, device: torch.device) -> Vectors:
    """Return the same vectors on a device."""
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
    may change them inside the context.

    Args:
        backbone: its weights are not touched; the hooks are removed on leaving, also after an error.
        vectors: K vectors.
        coefficients: (K,) or (K, G) float32 on the backbone's device.

    Raises:
        LayoutMismatchError: the backbone lacks a module, or has it in another shape; coefficients of another shape.
        MergeError: a coefficient that is not finite.
    """
    expand_coefficients(vectors, coefficients)
    layers = _target_layers(backbone, vectors)
    handles: list[RemovableHandle] = []
    try:
        for name, layer in layers.items():
            group = vectors.group_of[name] if coefficients.ndim == 2 else None
            handles.append(layer.register_forward_hook(_hook(vectors.modules[name], layer, coefficients, group)))
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


def _sparse(rows: torch.Tensor) -> SparseModule:
    """Convert (K, out, in) dense rows to sparse."""
    flat = rows.flatten(1)
    found = [row.nonzero().squeeze(1) for row in flat]
    values = torch.cat([row[index] for row, index in zip(flat, found, strict=True)])
    counts = tuple(len(index) for index in found)
    return SparseModule(torch.cat(found).to(torch.int32), values, counts, (rows.shape[1], rows.shape[2]))


def _target_layers(backbone: Backbone, vectors: Vectors) -> dict[str, torch.nn.Linear]:
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
