"""K adapters of one layout, stacked in memory or read one at a time, and their exact linear merge."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeVar

import numpy as np
import torch

from fedmerge.adapter import (
    Adapter,
    LoraModule,
    OnDemand,
    fits_float32,
    float32_factors,
    layer_of,
    num_not_finite,
)
from fedmerge.errors import ConfigError, LayoutMismatchError, MergeError

OTHERS = "others"


@dataclass(frozen=True, slots=True)
class StackedModule:
    """The K updates of one linear module side by side: Σ_k w_k Δ_k = lora_B · diag(w[owner]) · lora_A.

    Attributes:
        lora_A: (R, in) float32, R = Σ ranks; row j includes the scaling of its domain.
        lora_B: (out, R) float32.
        owner: (R,) int64, index of the domain of row j.
    """

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    owner: torch.Tensor


@dataclass(frozen=True, slots=True)
class StackLayout:
    """The layout that K adapters share, without their values: enough to make coefficients.

    Attributes:
        domains: K names, sorted; their order is the first axis of all coefficients.
        groups: G groups of layer-wise coefficients: "layer 0", ..., by path ("encoder.block.0", ...) if the layers form
            several stacks, and "others" if some module is in no layer.
        group_of: module name -> index into ``groups``, sorted by name.
    """

    domains: tuple[str, ...]
    groups: tuple[str, ...]
    group_of: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Stack(StackLayout):
    """K adapters of one layout.

    Attributes:
        modules: module name -> stacked factors, sorted by name; in memory, or stacked one at a time when they are read.
    """

    modules: Mapping[str, StackedModule]


T_Layout = TypeVar("T_Layout", bound=StackLayout)


def survey_adapters(adapters: Mapping[str, Adapter], *, values: bool = True) -> StackLayout:
    """Check that K adapters have one layout, reading one at a time; ranks and scalings may differ, modules may not.

    Args:
        adapters: domain name -> adapter, in any order. Each is read once.
        values: False checks names and shapes only.

    Raises:
        LayoutMismatchError: an adapter lacks or adds a module, or a factor has another shape than in the first domain.
        MergeError: no adapter, or a value or an update is not finite in float32.
    """
    domains, first = _first(adapters)
    shapes = {name: (module.lora_A.shape[1], module.lora_B.shape[0]) for name, module in first.modules.items()}
    for domain in domains:
        adapter = adapters[domain]
        _check_names(domain, adapter, domains[0], first)
        for name, module in adapter.modules.items():
            _check_shape(domain, name, module, domains[0], shapes[name])
            if values:
                _check_values(domain, name, module)
    return StackLayout(domains, *_layers(list(first.modules)))


def layout_of(adapters: Mapping[str, Adapter]) -> StackLayout:
    """Return the layout of K adapters with modules of the same names; no module is read.

    Raises:
        LayoutMismatchError: an adapter lacks or adds a module.
        MergeError: no adapter.
    """
    domains, first = _first(adapters)
    for domain in domains[1:]:
        _check_names(domain, adapters[domain], domains[0], first)
    return StackLayout(domains, *_layers(list(first.modules)))


def open_stack(adapters: Mapping[str, Adapter]) -> Stack:
    """Stack the adapters of K domains one module at a time, whenever it is read; the latest one stays in memory.

    Args:
        adapters: domain name -> adapter, in any order. Each is read once; its modules are read when they are used.

    Returns:
        The stack, with domains sorted by name. A module is checked as by :func:`survey_adapters` when it is read.

    Raises:
        LayoutMismatchError, MergeError: as :func:`layout_of`.
    """
    held = dict(adapters)
    layout = layout_of(held)

    @lru_cache(maxsize=1)
    def stacked(name: str) -> StackedModule:
        parts = [held[domain].modules[name] for domain in layout.domains]
        shape = (parts[0].lora_A.shape[1], parts[0].lora_B.shape[0])
        for domain, part in zip(layout.domains, parts, strict=True):
            _check_shape(domain, name, part, layout.domains[0], shape)
            _check_values(domain, name, part)
        return _stack_module(parts)

    return Stack(layout.domains, layout.groups, layout.group_of, OnDemand(layout.group_of, stacked))


def stack_adapters(adapters: Mapping[str, Adapter]) -> Stack:
    """Stack the adapters of K domains; ranks and scalings may differ, module names and shapes may not.

    Args:
        adapters: domain name -> adapter, in any order.

    Returns:
        The stack, with domains sorted by name. It shares no memory with the adapters and holds R (in + out) floats per
        module, R = Σ ranks.

    Raises:
        LayoutMismatchError, MergeError: as :func:`survey_adapters`.
    """
    layout = survey_adapters(adapters)
    parts: dict[str, list[LoraModule]] = {name: [] for name in layout.group_of}
    for domain in layout.domains:
        for name, module in adapters[domain].modules.items():
            parts[name].append(module)
    modules = {name: _stack_module(parts.pop(name)) for name in layout.group_of}
    return Stack(layout.domains, layout.groups, layout.group_of, modules)


def by_module(layout: T_Layout) -> T_Layout:
    """Return a layout, or a stack, with a group of coefficients for every module, named after it."""
    names = tuple(layout.group_of)
    return replace(layout, groups=names, group_of={name: group for group, name in enumerate(names)})


def expand_coefficients(stack: StackLayout, coefficients: torch.Tensor | np.ndarray) -> torch.Tensor:
    """Expand coefficients to one number per domain and group, differentiable.

    Args:
        stack: layout of the K adapters.
        coefficients: (K,) per domain, or (K, G) per domain and group of ``stack.groups``.

    Returns:
        (K, G) float32.

    Raises:
        LayoutMismatchError: another shape.
        MergeError: a coefficient is not finite; names its domain.
    """
    values = torch.as_tensor(coefficients).to(torch.float32)
    num_domains, num_groups = len(stack.domains), len(stack.groups)
    if tuple(values.shape) not in {(num_domains,), (num_domains, num_groups)}:
        raise LayoutMismatchError(
            f"coefficients: found shape {tuple(values.shape)}, "
            f"expected ({num_domains},) or ({num_domains}, {num_groups}) "
            f"for domains {', '.join(stack.domains)} and groups {', '.join(stack.groups)}"
        )
    finite = values.detach().isfinite().reshape(num_domains, -1).all(dim=1)
    if not finite.all():
        bad = [domain for domain, good in zip(stack.domains, finite.tolist(), strict=True) if not good]
        raise MergeError(f"the coefficients of {', '.join(bad)} are not finite in float32; give smaller numbers")
    return values if values.ndim == 2 else values[:, None].expand(num_domains, num_groups)


def linear_by_layer(stack: StackLayout, weights: str, normalize: bool) -> torch.Tensor:
    """Return given coefficients per domain and layer, as mergekit's ``linear`` with gradients has them.

    Args:
        stack: layout of the K adapters.
        weights: ``NAME=w`` or ``NAME=w_0:…:w_n`` for each domain, separated by commas. Several values are spread evenly
            from the first to the last layer of each stack and interpolated linearly. A domain that is not named has
            weight 1. Modules outside the layers get the mean over the layers.
        normalize: True divides the weights of a layer by their sum.

    Returns:
        (K, G) float32.

    Raises:
        ConfigError: a weight that is no number, a domain that is not merged, or weights of a layer whose sum is 0.
    """
    where = "merging method 'linear-by-layer': weights"
    stacks = Counter(group.rpartition(".")[0] for group in stack.groups if group != OTHERS)  # name -> number of layers
    values = np.ones((len(stack.domains), len(stack.groups)))
    for text in filter(None, (part.strip() for part in weights.split(","))):
        domain, _, numbers = text.partition("=")
        try:
            anchors = [float(number) for number in numbers.split(":")]
        except ValueError:
            anchors = []
        if not anchors or not np.isfinite(anchors).all():
            raise ConfigError(f"{where}: found {text!r}, expected NAME=w or NAME=w_0:…:w_n with finite numbers")
        if domain not in stack.domains:
            raise ConfigError(f"{where}: found {domain!r}, expected one of the merged {', '.join(stack.domains)}")
        places = [place for number in stacks.values() for place in np.linspace(0, len(anchors) - 1, number)]
        by_layer = np.interp(places, np.arange(len(anchors)), anchors) if places else np.array([np.mean(anchors)])
        values[stack.domains.index(domain)] = [*by_layer, by_layer.mean()][: len(stack.groups)]
    if normalize:
        sums = values.sum(0)
        if empty := [group for group, total in zip(stack.groups, sums, strict=True) if abs(total) < 1e-8]:
            raise ConfigError(f"{where}: their sum is 0 in {', '.join(empty)}. Give others, or set normalize to false.")
        values /= sums
    return torch.from_numpy(values).float()


def linear_merge(stack: Stack, coefficients: torch.Tensor | np.ndarray) -> Adapter:
    """Merge linearly into one adapter: Δ = Σ_k w_k s_k B_k A_k, of rank min(Σ r_k, in, out).

    While Σ r_k fits, the merge is exact and no out × in matrix is formed: the rows w_k s_k A_k are stacked, the B_k are
    placed side by side, and the scaling is 1. Beyond that Δ itself is smaller: it is summed in float64, rounded to
    float32 once, and written as one factor beside an identity. A domain with coefficient 0 takes no rank. If all are 0,
    a module keeps one row of zeros, so that the layout stays complete.

    Args:
        stack: K adapters.
        coefficients: (K,) or (K, G).

    Returns:
        The merged adapter, float32. The inputs are unchanged.

    Raises:
        LayoutMismatchError: coefficients of another shape.
        MergeError: a coefficient or the merge is not finite in float32.

    Source: "concatenation" in peft's ``add_weighted_adapter``, which is exact, unlike averaging A and B separately.
    """
    return Adapter(dict(linear_modules(stack, coefficients)))


def linear_modules(stack: Stack, coefficients: torch.Tensor | np.ndarray) -> Iterator[tuple[str, LoraModule]]:
    """Yield the modules of :func:`linear_merge`, by name, one at a time.

    Raises:
        LayoutMismatchError, MergeError: as :func:`linear_merge`.
    """
    values = expand_coefficients(stack, coefficients).detach()  # (K, G)
    for name, module in stack.modules.items():
        ranks = torch.bincount(module.owner, minlength=len(stack.domains)).tolist()
        pairs = zip(torch.split(module.lora_A, ranks), torch.split(module.lora_B, ranks, dim=1), strict=True)
        total = _UpdateSum()
        for coefficient, (lora_A, lora_B) in zip(values[:, stack.group_of[name]].tolist(), pairs, strict=True):
            total.add(lora_A, lora_B, coefficient)
        yield name, check_fits(name, total.module())


def linear_merge_of_many(
    adapters: Mapping[str, Adapter], layout: StackLayout, coefficients: torch.Tensor | np.ndarray
) -> Adapter:
    """Compute :func:`linear_merge`, equal to the last bit, reading one adapter at a time.

    Args:
        adapters: domain name -> adapter, for instance a mapping that reads each from disk. Each is read once, in the
            order of the layout, and then released. For any number of domains, memory holds one adapter and the sum so
            far: at most out × in float64 numbers per module.
        layout: layout of the adapters, from :func:`survey_adapters`.
        coefficients: (K,) or (K, G).

    Raises:
        LayoutMismatchError: coefficients of another shape.
        MergeError: a coefficient or the merge is not finite in float32.
    """
    values = expand_coefficients(layout, coefficients).detach()  # (K, G)
    sums = {name: _UpdateSum() for name in layout.group_of}
    for domain, row in zip(layout.domains, values.tolist(), strict=True):
        for name, module in adapters[domain].modules.items():
            lora_A, lora_B = _scaled(module)
            sums[name].add(lora_A, lora_B, row[layout.group_of[name]])
    return Adapter({name: check_fits(name, total.module()) for name, total in sums.items()})


def dense_module(delta: torch.Tensor) -> LoraModule:
    """Write an (out, in) update without low rank as one factor beside an identity: exact, of rank min(out, in)."""
    identity = torch.eye(min(delta.shape), device=delta.device)
    wide = delta.shape[0] <= delta.shape[1]
    return LoraModule(delta, identity, 1.0) if wide else LoraModule(identity, delta, 1.0)


def check_fits(name: str, module: LoraModule) -> LoraModule:
    """Return a module of a merge, whose factors are float32.

    Raises:
        MergeError: its update is not finite in float32; names the module.
    """
    if not fits_float32(module):
        raise MergeError(
            f"merge, module {name}: the merged update is not finite in float32, whose largest number is 3.4e38. "
            "Give smaller coefficients, or leave out the adapter whose update is largest."
        )
    return module


def _layers(names: Sequence[str]) -> tuple[tuple[str, ...], dict[str, int]]:
    """Return the groups of a layout, and the index of each module's group."""
    paths = {name: layer_of(name) for name in names}
    parts = {path: path.rpartition(".") for path in paths.values() if path is not None}  # stack, ".", number
    layers = sorted(parts, key=lambda path: (parts[path][0], int(parts[path][2])))
    one_stack = len({stack for stack, _, _ in parts.values()}) == 1
    groups = [f"layer {int(parts[path][2])}" if one_stack else path for path in layers]
    place = {path: index for index, path in enumerate(layers)}
    group_of = {name: len(layers) if path is None else place[path] for name, path in paths.items()}
    return (*groups, *([OTHERS] if None in paths.values() else [])), group_of


class _UpdateSum:
    """Running sum Σ w B A of one linear module: factors side by side, then Δ as soon as that is smaller."""

    def __init__(self) -> None:
        self.parts: list[tuple[torch.Tensor, torch.Tensor]] = []  # (r, in) with the coefficient, (out, r)
        self.rank = 0
        self.delta: torch.Tensor | None = None  # (out, in) float64
        self.nothing: tuple[torch.Tensor, torch.Tensor] | None = None  # the first domain's shapes, rank 1

    def add(self, lora_A: torch.Tensor, lora_B: torch.Tensor, coefficient: float) -> None:
        """Add coefficient · lora_B lora_A: float32 (out, r) and (r, in), held as factors unless Δ is smaller."""
        if self.nothing is None:
            self.nothing = lora_A.new_zeros(1, lora_A.shape[1]), lora_B.new_zeros(len(lora_B), 1)
        if coefficient == 0 or not len(lora_A):
            return
        self.parts.append(float32_factors(lora_A, lora_B, coefficient))
        self.rank += len(lora_A)
        width_out, width_in = len(lora_B), lora_A.shape[1]
        if self.rank <= min(width_out, width_in):
            return
        if self.delta is None:
            self.delta = lora_A.new_zeros((width_out, width_in), dtype=torch.float64)
        for rows, columns in self.parts:
            self.delta.addmm_(columns.double(), rows.double())
        self.parts.clear()

    def module(self) -> LoraModule:
        """Return the sum with scaling 1, in memory of its own."""
        if self.delta is not None:
            return dense_module(self.delta.float())
        if self.parts:
            return LoraModule(
                torch.cat([rows for rows, _ in self.parts]), torch.cat([columns for _, columns in self.parts], 1), 1.0
            )
        if self.nothing is None:
            raise MergeError("merge: found no adapter, expected at least one. Check which domains were admitted.")
        return LoraModule(*self.nothing, 1.0)


def _scaled(module: LoraModule) -> tuple[torch.Tensor, torch.Tensor]:
    """scaling · lora_A and lora_B, float32."""
    return float32_factors(module.lora_A.detach(), module.lora_B.detach(), module.scaling)


def _stack_module(parts: list[LoraModule]) -> StackedModule:
    scaled = [_scaled(part) for part in parts]
    lora_A = torch.cat([part_A for part_A, _ in scaled])
    lora_B = torch.cat([part_B for _, part_B in scaled], dim=1)
    ranks = torch.tensor([part.lora_A.shape[0] for part in parts], device=lora_A.device)
    return StackedModule(lora_A, lora_B, torch.repeat_interleave(torch.arange(len(parts), device=lora_A.device), ranks))


def _first(adapters: Mapping[str, Adapter]) -> tuple[tuple[str, ...], Adapter]:
    """Return the domains, sorted, and the adapter of the first."""
    if not adapters:
        raise MergeError("merge: found no adapter, expected at least one. Check which domains were admitted.")
    domains = tuple(sorted(adapters))
    first = adapters[domains[0]]
    if not first.modules:
        raise LayoutMismatchError(f"adapter of {domains[0]!r}: it has no LoRA module. Train it again.")
    return domains, first


def _check_names(domain: str, adapter: Adapter, reference: str, expected: Adapter) -> None:
    """Raise unless an adapter has the modules of the one of ``reference``."""
    missing = expected.modules.keys() - adapter.modules.keys()
    surplus = adapter.modules.keys() - expected.modules.keys()
    if missing or surplus:
        found = [
            f"{what} {', '.join(sorted(names))}" for what, names in (("lacks", missing), ("adds", surplus)) if names
        ]
        raise LayoutMismatchError(
            f"adapter of {domain!r}: {' and '.join(found)}, compared with the adapter of {reference!r}; "
            "train all adapters with the same target modules"
        )


def _check_shape(domain: str, name: str, module: LoraModule, reference: str, shape: tuple[int, int]) -> None:
    """Raise unless a module has the widths (in, out) that it has in ``reference``."""
    (rank, width_in), (width_out, rank_B) = module.lora_A.shape, module.lora_B.shape
    if rank != rank_B or (width_in, width_out) != shape:
        raise LayoutMismatchError(
            f"adapter of {domain!r}, module {name}: "
            f"found lora_A {(rank, width_in)} and lora_B {(width_out, rank_B)}, "
            f"expected (r, {shape[0]}) and ({shape[1]}, r) as in the adapter of {reference!r}; "
            "train all adapters on the same backbone"
        )


def _check_values(domain: str, name: str, module: LoraModule) -> None:
    """Raise unless a module and its update are finite in float32."""
    scaling = torch.tensor(module.scaling, dtype=torch.float64)
    for factor, values in (("lora_A", module.lora_A), ("lora_B", module.lora_B), ("scaling", scaling)):
        if bad := num_not_finite(values):
            raise MergeError(
                f"adapter of {domain!r}, module {name}: {bad} values of {factor} are not finite. "
                "Leave this domain out, or train it again."
            )
    if not fits_float32(module):
        raise MergeError(
            f"adapter of {domain!r}, module {name}: its update is not finite in float32 (scaling "
            f"{module.scaling:g}). Give it a smaller coefficient, leave this domain out, or train it again."
        )
