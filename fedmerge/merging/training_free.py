"""Merge adapters by any method that runs no model, one module at a time."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from fedmerge.adapter import Adapter, LoraModule, OnDemand, adapter_sha256
from fedmerge.encoder.peft.tensors import find_tensors, read_tensor, write_tensors
from fedmerge.errors import ConfigError, MergeError
from fedmerge.merging.candidate import Provenance, largest_rank
from fedmerge.merging.low_rank.compression import compressed
from fedmerge.merging.low_rank.spaces import Bases, core_bases, knots_bases, lift_dense, project
from fedmerge.merging.low_rank.spectral import Factors, rounding
from fedmerge.merging.methods import Method, method_coefficients, method_named, name_of
from fedmerge.merging.own_method import SEED, OwnMethod, call_function
from fedmerge.merging.parameters import Value, checked_parameters
from fedmerge.merging.rows import Piece, total
from fedmerge.merging.signals import NO_SIGNALS, Signals
from fedmerge.merging.stack import Stack, by_module, check_fits, expand_coefficients, linear_modules, open_stack
from fedmerge.seeding import derive

Scope = Literal["tensor", "layer", "model"]
Space = Literal["full", "core"]
HELD = 1 << 23  # entries of a module's K updates in memory at a time; a larger module goes in blocks of neurons


@dataclass(frozen=True, slots=True)
class MergedAdapter:
    """A merge, how it was made, and what its adapter loses.

    Attributes:
        adapter: the merge, float32.
        residuals: module -> ‖Δ - Δ_adapter‖_F / ‖Δ‖_F, where Δ is the merge as defined; 0 where Δ = 0.
        method: name in METHODS, or ``package.module:function`` of one's own.
        parameters: all parameters of the method, defaults included.
        coefficients: domain -> coefficient, for the domains that took part.
        settings: scope, space, output rank, and the seed of methods that draw.
        module_weights: domain -> module -> weight, for a method that weighs every module by itself; else empty.
        leaves: domain -> hash of its adapter, for a merge of merges; ``coefficients`` are then of these. Else empty.
        merges: merge -> its factor and domains, for a merge of merges.
    """

    adapter: Adapter
    residuals: Mapping[str, float]
    method: str
    parameters: Mapping[str, Value]
    coefficients: Mapping[str, float]
    settings: Mapping[str, str | int]
    module_weights: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    leaves: Mapping[str, str] = field(default_factory=dict)
    merges: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def provenance(self, adapters: Mapping[str, str], backbone: Mapping[str, str | None] | None) -> Provenance:
        """Return the merge's provenance.

        Args:
            adapters: domain -> hash of the adapter.
            backbone: name and sha256 of the adapters' backbone, as far as known.
        """
        return Provenance(
            method=self.method,
            domains=dict(self.leaves) or {domain: adapters[domain] for domain in self.coefficients},
            rank=largest_rank(self.adapter),
            backbone=backbone,
            sha256=adapter_sha256(self.adapter),
            **self.entries(),
        )

    def entries(self) -> dict[str, Any]:
        """Return the entries of the provenance that depend on the method."""
        return {
            "parameters": dict(self.parameters),
            "coefficients": dict(self.coefficients),
            "coefficient_groups": ["all"],
            "settings": dict(self.settings),
            "residuals": dict(self.residuals),
            "more": {key: value for key in ("module_weights", "merges") if (value := getattr(self, key))},
        }


def merge_adapters(
    adapters: Mapping[str, Adapter],
    method: str | OwnMethod,
    *,
    coefficients: Mapping[str, float] | None = None,
    scope: Scope = "tensor",
    space: Space = "full",
    output_rank: int | Literal["exact"] = "exact",
    seed: int = 0,
    scratch: Path | None = None,
    signals: Signals = NO_SIGNALS,
    **parameters: Value,
) -> MergedAdapter:
    """Merge adapters of one layout; their ranks and scalings may differ.

    Modules are merged one at a time, and elementwise methods take a large one in blocks of neurons: at any scope,
    memory holds one module's merge and at most 2^23 entries of its K updates. A function of one's own gets a module's
    K updates whole. KnOTS and core space also hold the bases of all modules that share a threshold.

    Args:
        adapters: domain -> adapter, in any order.
        method: name in METHODS of a method that is not learned, or one's own: ``package.module:function``, or the
            function itself; see ``fedmerge.merging.own_method``.
        coefficients: domain -> factor on the scaling of its adapter, applied before the method; 1 where not given. A
            domain at 0 is absent: it counts neither in K nor in a rank.
        scope: range of a threshold: one module, all modules of a layer, or all modules.
        space: "core" merges in core space, at a cost that does not grow with the square of the width.
        output_rank: rank of the result. "exact" keeps the merge as defined: at most the sum of the ranks for linear
            and spectral methods, KnOTS and core space; up to min(in, out) for elementwise methods and functions in full
            space, whose merges have no low rank. It is the default because a fixed rank would silently change what
            these methods compute. An integer compresses by SVD; see ``residuals``.
        seed: seed of methods that draw.
        scratch: folder that holds the merged modules, which are read from there when they are used; it must outlive the
            result. With adapters that are read on demand, memory then does not grow with the number of modules. None:
            the merge is held in memory.
        signals: domain -> training signals, for a method that weighs by them.
        parameters: parameters of the method.

    Raises:
        ConfigError: no such method, a learned method, or a setting out of bounds.
        LayoutMismatchError: an adapter of another layout; names it.
        MergeError: no domain is left, or a value is not finite.
    """
    checked_settings(method, scope, space, output_rank, parameters)
    weighted, factors = _weighted(adapters, coefficients)
    merged = merge_stack(
        open_stack(weighted),
        method,
        scope=scope,
        space=space,
        output_rank=output_rank,
        seed=seed,
        scratch=scratch,
        signals=signals,
        **parameters,
    )
    return replace(merged, coefficients=factors)


def merge_stack(
    stack: Stack,
    method: str | OwnMethod,
    *,
    scope: Scope = "tensor",
    space: Space = "full",
    output_rank: int | Literal["exact"] = "exact",
    seed: int = 0,
    scratch: Path | None = None,
    signals: Signals = NO_SIGNALS,
    **parameters: Value,
) -> MergedAdapter:
    """Merge stacked adapters, each with coefficient 1; see :func:`merge_adapters`."""
    row, chosen = checked_settings(method, scope, space, output_rank, parameters)
    if row.most_domains is not None and len(stack.domains) > row.most_domains:
        raise MergeError(
            f"merging method {name_of(method)!r}: found {len(stack.domains)} adapters ({', '.join(stack.domains)}), "
            f"expected at most {row.most_domains}. Choose another method, or leave adapters out."
        )
    made: dict[str, str | int] = {"scope": scope, "space": space, "output_rank": output_rank}
    if row.random:
        made["seed"] = seed
    residuals: dict[str, float] = {}
    if row.signals:
        stack, signals = by_module(stack), {domain: signals.get(domain) for domain in stack.domains}
    values = None
    if row.coefficients is not None:
        values = expand_coefficients(stack, method_coefficients(name_of(method), stack, signals, **chosen))  # (K, G)

    def modules() -> Iterator[tuple[str, LoraModule]]:
        if values is not None and space == "full" and output_rank == "exact":
            residuals.update(dict.fromkeys(stack.modules, 0.0))
            yield from linear_modules(stack, values)
            return
        rank = None if output_rank == "exact" else output_rank
        for name, bases, update in _merges(stack, row, chosen, scope, space, seed, values):
            module, residuals[name] = compressed(update, bases, rank)
            yield name, check_fits(name, module)

    merged = _collected(modules(), scratch)
    factors = dict.fromkeys(stack.domains, 1.0)
    weights: dict[str, dict[str, float]] = {}
    if row.signals and values is not None:
        weights = {
            domain: dict(zip(stack.groups, each, strict=True))
            for domain, each in zip(stack.domains, values.tolist(), strict=True)
        }
    return MergedAdapter(merged, dict(sorted(residuals.items())), name_of(method), chosen, factors, made, weights)


def _collected(modules: Iterable[tuple[str, LoraModule]], scratch: Path | None) -> Adapter:
    """Return the adapter of modules that are made one at a time, in memory or in files of a folder."""
    if scratch is None:
        return Adapter(dict(modules))
    scalings, stored = {}, {}
    for number, (name, module) in enumerate(modules):
        path = scratch / f"{number}.safetensors"
        write_tensors(path, {"lora_A": module.lora_A, "lora_B": module.lora_B})
        scalings[name], stored[name] = module.scaling, find_tensors(path)

    def read(name: str) -> LoraModule:
        lora_A, lora_B = (read_tensor(stored[name][part]) for part in ("lora_A", "lora_B"))
        return LoraModule(lora_A, lora_B, scalings[name])

    return Adapter(OnDemand(stored, read))


def checked_settings(
    method: str | OwnMethod, scope: str, space: str, output_rank: int | str, parameters: Mapping[str, Value]
) -> tuple[Method, dict[str, Value]]:
    """Check the settings of :func:`merge_adapters`; return the method and all of its parameters.

    Raises:
        ConfigError: no such method, a learned method, or a setting out of bounds.
    """
    if output_rank != "exact" and (
        isinstance(output_rank, bool) or not isinstance(output_rank, int) or output_rank < 1
    ):
        raise ConfigError(f"merge: output_rank: found {output_rank!r}, expected 'exact' or an integer of at least 1")
    return _checked(method, scope, space, parameters)


def domain_rows(
    stack: Stack, method: str, *, scope: Scope = "tensor", space: Space = "full", seed: int = 0, **parameters: Value
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each domain's contribution to a merge: per module K updates whose sum is the merge.

    MergeRec starts from these vectors (TIES rows, PCB rows, …). Only linear and elementwise methods have them.

    Args:
        stack: K adapters.
        method, scope, space, seed, parameters: as in :func:`merge_adapters`.

    Yields:
        Module name and (K, out, in) float32 in the order of ``stack.domains``; modules are grouped by scope.

    Raises:
        ConfigError: as :func:`merge_adapters`, or a method whose merge is not a sum over domains: spectral, or one's
            own.
    """
    row, chosen = _checked(method, scope, space, parameters)
    if row.coefficients is None and row.rows is None:
        raise ConfigError(
            f"merging method {method!r}: its merge is not a sum of rows; choose a linear or elementwise method"
        )
    return _domain_rows(stack, method, row, chosen, scope, space, seed)


def _domain_rows(
    stack: Stack, method: str, row: Method, chosen: Mapping[str, Value], scope: Scope, space: Space, seed: int
) -> Iterator[tuple[str, torch.Tensor]]:
    if row.coefficients is not None:
        values = expand_coefficients(stack, method_coefficients(method, stack, NO_SIGNALS, **chosen))  # (K, G)
        for name, module in stack.modules.items():
            weights = values[:, stack.group_of[name]].to(module.lora_A.device)
            yield name, _dense(_updates(stack, name)) * weights[:, None, None]
        return
    for name, bases, rows in _rows(stack, row, chosen, scope, space, seed, lambda rows: rows):
        yield name, rows if bases.identity else torch.stack([lift_dense(each, bases).float() for each in rows])


def _merges(
    stack: Stack,
    row: Method,
    chosen: Mapping[str, Value],
    scope: Scope,
    space: Space,
    seed: int,
    values: torch.Tensor | None,
) -> Iterator[tuple[str, Bases, torch.Tensor | Factors]]:
    """Yield every module's merge in its coordinates: dense (a, b), or factors (a, q), (q, b).

    ``values`` are the coefficients (K, G) of a linear method.
    """
    if row.rows is not None:
        yield from _rows(stack, row, chosen, scope, space, seed, total)
        return
    for name in stack.modules:
        bases = _bases(_updates(stack, name), space, knots=False)
        updates = project(_updates(stack, name), bases)
        if row.factors is not None:
            yield name, bases, _finite(name, row.factors(updates, **chosen))
        elif row.function is not None:
            drawn = {SEED: derive(seed, "own method", name)} if row.random else {}
            yield name, bases, call_function(row.source, row.function, name, _dense(updates), {**chosen, **drawn})
        elif values is not None:
            weights = values[:, stack.group_of[name]].tolist()
            left = torch.cat([left * weight for (left, _), weight in zip(updates, weights, strict=True)], dim=1)
            yield name, bases, _finite(name, (left, torch.cat([right for _, right in updates])))


def _rows(
    stack: Stack,
    row: Method,
    chosen: Mapping[str, Value],
    scope: Scope,
    space: Space,
    seed: int,
    kept: Callable[[torch.Tensor], torch.Tensor],
) -> Iterator[tuple[str, Bases, torch.Tensor]]:
    """Yield what is kept of the rows of an elementwise method: per module (…, a, b) in its coordinates.

    ``kept`` maps the rows (K, n) of a block of entries to (…, n).
    """
    if row.rows is None:
        return
    drawn = {"seed": seed} if row.random else {}
    for names in _units(stack, scope):
        bases = {name: _bases(_updates(stack, name), space, row.knots) for name in names}
        merged = map(kept, row.rows(_pieces(stack, names, bases), **chosen, **drawn))
        for name in names:
            width_out, width_in = stack.modules[name].lora_B.shape[0], stack.modules[name].lora_A.shape[1]
            left, right = bases[name].left, bases[name].right
            shape = (width_out if left is None else left.shape[1], width_in if right is None else right.shape[1])
            entries = _joined(merged, math.prod(shape))
            yield name, bases[name], entries.reshape(*entries.shape[:-1], *shape)


def _joined(blocks: Iterator[torch.Tensor], size: int) -> torch.Tensor:
    """Take blocks (…, n_i) until they have all entries of a module, and return them side by side: (…, size)."""
    first = next(blocks)
    if first.shape[-1] == size:
        return first
    whole, end = first.new_empty(*first.shape[:-1], size), first.shape[-1]
    whole[..., :end] = first
    while end < size:
        block = next(blocks)
        whole[..., end : end + block.shape[-1]] = block
        end += block.shape[-1]
    return whole


def _pieces(stack: Stack, names: Sequence[str], bases: Mapping[str, Bases]) -> Callable[[], Iterator[Piece]]:
    """One row per domain over the modules, recomputed in every pass, or held in memory for a single small module."""

    def pieces() -> Iterator[Piece]:
        for name in names:
            first = 0
            for updates in _blocks(project(_updates(stack, name), bases[name])):  # (K, rows, b)
                yield Piece(name, stack.domains, updates.flatten(1), updates.shape[2], first)
                first += updates[0].numel()

    if len(names) > 1 or len(_spans(project(_updates(stack, names[0]), bases[names[0]]))) > 1:
        return pieces
    (only,) = pieces()
    return lambda: iter((only,))


def _units(stack: Stack, scope: Scope) -> list[list[str]]:
    """Groups of modules that share thresholds."""
    if scope == "model":
        return [list(stack.modules)]
    if scope == "layer":
        groups = range(len(stack.groups))
        return [[name for name in stack.modules if stack.group_of[name] == group] for group in groups]
    return [[name] for name in stack.modules]


def _bases(updates: Sequence[Factors], space: Space, knots: bool) -> Bases:
    """Coordinates to merge in; in core space KnOTS rotates the core matrices."""
    core = core_bases(updates) if space == "core" else Bases()
    if not knots:
        return core
    turned = knots_bases(project(updates, core)).left
    return Bases(turned if core.left is None or turned is None else core.left @ turned, core.right)


def _updates(stack: Stack, name: str) -> list[Factors]:
    """K pairs (out, r_k), (r_k, in), scaling included."""
    module = stack.modules[name]
    ranks = torch.bincount(module.owner, minlength=len(stack.domains)).tolist()
    return list(zip(torch.split(module.lora_B, ranks, dim=1), torch.split(module.lora_A, ranks), strict=True))


def _dense(updates: Sequence[Factors]) -> torch.Tensor:
    """(K, a, b) float32, computed in float64 so that thresholds do not depend on the number of threads.

    An update whose factors cancel is 0, not rounding: methods count the domains that have an entry.
    """
    rows = _products(updates)
    for k, (left, right) in enumerate(updates):
        if torch.linalg.vector_norm(rows[k], dtype=torch.float64) <= rounding(left, right):
            rows[k] = 0.0
    return rows


def _spans(updates: Sequence[Factors]) -> list[slice]:
    """Blocks of neurons in which K dense updates have at most HELD entries, or one neuron each."""
    width_out, width_in = updates[0][0].shape[0], updates[0][1].shape[1]
    size = max(1, HELD // (len(updates) * width_in))
    return [slice(start, start + size) for start in range(0, width_out, size)]


def _blocks(updates: Sequence[Factors]) -> Iterator[torch.Tensor]:
    """Yield :func:`_dense` in blocks of neurons: (K, rows, b) float32."""
    spans = _spans(updates)
    if len(spans) == 1:
        yield _dense(updates)
        return
    absent = torch.tensor([_cancels(update, spans) for update in updates])
    for span in spans:
        rows = _products([(left[span], right) for left, right in updates])
        rows[absent] = 0.0
        yield rows


def _products(updates: Sequence[Factors]) -> torch.Tensor:
    first_left, first_right = updates[0]
    rows = torch.empty(len(updates), first_left.shape[0], first_right.shape[1], device=first_left.device)
    for k, (left, right) in enumerate(updates):
        rows[k] = left.double() @ right.double()
    return rows


def _cancels(update: Factors, spans: Sequence[slice]) -> bool:
    """Return True if an update is 0 up to the rounding of its factors, with a block of it in memory at a time."""
    left, right = update
    least, squares = rounding(left, right), 0.0
    for span in spans:
        squares += float(torch.linalg.vector_norm(_products([(left[span], right)]), dtype=torch.float64)) ** 2
        if math.sqrt(squares) > least:
            return False
    return True


def _finite(name: str, factors: Factors) -> Factors:
    """Return the factors of a merge; raise MergeError if it is not finite in float32, before an SVD meets it."""
    check_fits(name, LoraModule(factors[1], factors[0], 1.0))
    return factors


def _weighted(
    adapters: Mapping[str, Adapter], coefficients: Mapping[str, float] | None
) -> tuple[dict[str, Adapter], dict[str, float]]:
    """Return the adapters that take part, scaled, and their coefficients, both by name."""
    given = coefficients or {}
    unknown = sorted(given.keys() - adapters.keys())
    if unknown:
        raise ConfigError(
            f"merge: coefficients for {', '.join(unknown)}, but the domains are {', '.join(sorted(adapters))}"
        )
    bad = sorted(domain for domain, value in given.items() if not math.isfinite(value))
    if bad:
        raise MergeError(f"merge: the coefficients of {', '.join(bad)} are not finite; give finite numbers")
    used = {domain: float(given.get(domain, 1.0)) for domain in sorted(adapters) if given.get(domain, 1.0) != 0}
    if adapters and not used:
        raise MergeError("merge: every domain has coefficient 0; give at least one another value")
    return {domain: _scaled(adapters[domain], value) for domain, value in used.items()}, used


def _scaled(adapter: Adapter, factor: float) -> Adapter:
    def module(name: str) -> LoraModule:
        found = adapter.modules[name]
        return replace(found, scaling=found.scaling * factor)

    return Adapter(OnDemand(adapter.modules, module))


def _checked(
    method: str | OwnMethod, scope: str, space: str, parameters: Mapping[str, Value]
) -> tuple[Method, dict[str, Value]]:
    """Return the row of a method and its complete parameters."""
    row, where = method_named(method), f"merging method {name_of(method)!r}"
    if row.learned:
        how = "learns from catalogs; call learn_coefficients"
        if "granularity" not in row.parameters:
            how = "searches with a model; name it in merge.methods, without --method"
        raise ConfigError(f"{where}: it {how}")
    for what, value, choices in (("scope", scope, get_args(Scope)), ("space", space, get_args(Space))):
        if value not in choices:
            raise ConfigError(f"merge: {what}: found {value!r}, expected one of {', '.join(choices)}")
    if (row.factors or row.function) and scope != "tensor":
        raise ConfigError(f"{where}: found scope {scope!r}, expected 'tensor', since it merges one matrix at a time")
    return row, checked_parameters(where, row.parameters, parameters)
