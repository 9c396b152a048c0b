"""Training-free merging methods: by hand with three numbers, against slow oracles, in memory that stays flat."""

import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import merging_oracles as oracles
import numpy as np
import pytest
import torch
from adapters import Layout, as_many_as, random_adapter, random_adapters
from torch.utils._python_dispatch import TorchDispatchMode

from fedmerge.adapter import Adapter, LoraModule, adapter_sha256
from fedmerge.errors import ConfigError, LayoutMismatchError, MergeError
from fedmerge.merging import rows as elementwise
from fedmerge.merging.descriptions import laws_table, methods_table
from fedmerge.merging.low_rank import spectral
from fedmerge.merging.methods import METHODS
from fedmerge.merging.rows import Piece
from fedmerge.merging.selection import order_statistics
from fedmerge.merging.stack import stack_adapters
from fedmerge.merging.training_free import domain_rows, merge_adapters
from fedmerge.seeding import generator

LAYOUT: Layout = {"layer.0.query": (5, 4), "layer.0.value": (4, 7), "layer.10.query": (6, 5), "top": (3, 6)}
SCOPES = {
    "tensor": [[name] for name in LAYOUT],
    "layer": [["layer.0.query", "layer.0.value"], ["layer.10.query"], ["top"]],
    "model": [list(LAYOUT)],
}
TRAINING_FREE = [name for name, row in METHODS.items() if not row.learned]
ELEMENTWISE = [name for name, row in METHODS.items() if row.rows is not None]
SPECTRAL = [name for name, row in METHODS.items() if row.factors is not None]
LINEAR = [name for name, row in METHODS.items() if row.coefficients is not None]
PARAMETERS: dict[str, dict[str, Any]] = {  # densities at which small modules keep more than one entry
    "ties": {"density": 0.35, "coefficient": 0.7},
    "dare": {"density": 0.6, "coefficient": 1.5},
    "dare-ties": {"density": 0.7, "ties_density": 0.5, "coefficient": 0.9},
    "pcb": {"density": 0.3, "clamp": 0.06, "coefficient": 1.1},
    "localize-and-stitch": {"density": 0.25},
    "breadcrumbs": {"drop_smallest": 0.4, "drop_largest": 0.11, "coefficient": 0.8},
    "knots-ties": {"density": 0.35, "coefficient": 0.7},
    "knots-dare": {"density": 0.6},
    "knots-dare-ties": {"density": 0.7, "ties_density": 0.5},
    "della": {"density": 0.6, "epsilon": 0.5, "coefficient": 0.9},
    "della-linear": {"density": 0.6, "epsilon": 0.5},
    "emr-unified": {"coefficient": 0.6},
    "consensus": {"mask_threshold": 0.7, "min_domains": 2, "coefficient": 0.4},
    "linear-by-layer": {"weights": "toys=0.5,books=2"},
    "slerp": {"t": 0.3},
    "multi-slerp": {"coefficient": 0.8},
    "task-arithmetic": {"coefficient": 0.3},
    "knots-task-arithmetic": {"coefficient": 0.3},
    "tsv": {"coefficient": 0.8},
    "iso-c": {"coefficient": 0.8},
    "iso-cts": {"common_fraction": 0.5, "coefficient": 0.8},
}


def merged_rows(method: Callable[..., Iterator[torch.Tensor]], rows: list[list[float]], **parameters: Any) -> list[Any]:
    names = tuple(f"domain {k}" for k in range(len(rows)))
    pieces = [Piece("m", names, torch.tensor(rows, dtype=torch.float64))]
    (merged,) = method(lambda: pieces, **parameters)
    assert pieces[0].rows.tolist() == rows
    return merged.sum(0).tolist()


def test_ties_by_hand() -> None:
    rows = [[3.0, -1.0, 2.0], [-1.0, -4.0, 2.0], [0.5, 1.0, -4.0]]
    # two of three kept: [3, 0, 2], [0, -4, 2], [0, 1, -4]; masses 3, -3 and an exact tie
    assert merged_rows(elementwise.ties, rows, density=0.6, coefficient=1.0) == [3.0, -4.0, 0.0]
    assert merged_rows(elementwise.ties, rows, density=1.0, coefficient=2.0) == [3.5, -5.0, 0.0]
    assert merged_rows(elementwise.ties, [[1.0, -1.0, 0.5]], density=0.3, coefficient=1.0) == [1.0, -1.0, 0.0]


def test_a_share_is_taken_as_it_is_written() -> None:
    row = [float(i) for i in range(100)]
    kept = merged_rows(elementwise.ties, [row], density=0.07, coefficient=1.0)  # 0.07 * 100 > 7 in floating point
    assert kept == [0.0] * 93 + row[93:]


def test_dare_by_hand() -> None:
    rows = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
    drawn = [generator(7, "dare", f"domain {k}", "m").random(3, dtype=np.float32) < 0.5 for k in range(2)]
    expected = [sum(2 * rows[k][i] * bool(drawn[k][i]) for k in range(2)) / 2 for i in range(3)]
    assert merged_rows(elementwise.dare, rows, density=0.5, coefficient=1.0, seed=7) == expected
    assert merged_rows(elementwise.dare, rows, density=1.0, coefficient=1.0, seed=7) == [2.5, 3.5, 4.5]
    many = [merged_rows(elementwise.dare, [[1.0] * 1000], density=0.25, coefficient=1.0, seed=seed) for seed in (0, 1)]
    assert many[0] != many[1]
    assert set(many[0]) == {0.0, 4.0}
    assert np.mean(many[0]) == pytest.approx(1.0, abs=0.2)


def test_pcb_by_hand() -> None:
    settings = {"density": 0.6, "clamp": 0.0, "coefficient": 1.0}
    # scores .76, 1.12, 2.72: two are kept, the smaller of them at s = 0
    assert merged_rows(elementwise.pcb, [[1.0, 2.0, 4.0]], **settings) == [0.0, 0.0, 4.0]
    # the second coordinate cancels; each row's best entry has s = 1 where the other row has s = 0
    assert merged_rows(elementwise.pcb, [[1.0, 2.0, 4.0], [4.0, -2.0, 1.0]], **settings) == [4.0, 0.0, 4.0]
    assert merged_rows(elementwise.pcb, [[2.0, 2.0, 0.0], [0.0, 0.0, 0.0]], **settings) == [2.0, 2.0, 0.0]
    clamped = merged_rows(elementwise.pcb, [[1.0, 2.0, 4.0]], density=0.3, clamp=0.34, coefficient=1.0)
    assert clamped == [0.0, 0.0, 2.0]  # all magnitudes are clamped to the middle one


def test_localize_and_stitch_by_hand() -> None:
    rows = [[3.0, -1.0, 2.0], [-1.0, -4.0, 4.0]]
    assert merged_rows(elementwise.localize_and_stitch, rows, density=0.6, coefficient=1.0) == [3.0, -4.0, 3.0]
    rows = [[3.0, -1.0, 2.0], [0.0, 0.0, 0.0]]  # an untrained domain takes no part
    assert merged_rows(elementwise.localize_and_stitch, rows, density=1.0, coefficient=1.0) == [3.0, -1.0, 2.0]


def test_breadcrumbs_by_hand() -> None:
    rows = [[3.0, -1.0, 2.0], [-2.0, 5.0, 1.0]]
    settings = {"drop_smallest": 0.34, "drop_largest": 0.34}
    assert merged_rows(elementwise.breadcrumbs, rows, **settings, coefficient=0.5) == [-1.0, 0.0, 1.0]
    with pytest.raises(ConfigError, match=r"drop_smallest = 0.9.*drop_largest = 0.1"):
        merged_rows(elementwise.breadcrumbs, rows, drop_smallest=0.9, drop_largest=0.1, coefficient=1.0)


def updates_of(*matrices: list[list[float]]) -> list[spectral.Factors]:
    dense = [torch.tensor(matrix) for matrix in matrices]
    return [(matrix, torch.eye(matrix.shape[1])) for matrix in dense]


def product(factors: spectral.Factors) -> list[Any]:
    dense: list[Any] = (factors[0] @ factors[1]).numpy().round(12).tolist()
    return dense


def test_spectral_methods_by_hand() -> None:
    left, right = [[2.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 4.0]]
    assert product(spectral.tsv(updates_of(left, right), coefficient=1.0)) == [[2.0, 0.0], [0.0, 4.0]]
    # the same direction twice is whitened into one: u and v bear 1/√2 each
    assert product(spectral.tsv(updates_of(left, left), coefficient=1.0)) == [[2.0, 0.0], [0.0, 0.0]]
    # one triple of two each
    both = [[3.0, 0.0], [0.0, 1.0]]
    assert product(spectral.tsv(updates_of(both, right), coefficient=1.0)) == [[3.0, 0.0], [0.0, 4.0]]
    assert product(spectral.iso_c(updates_of(left, right), coefficient=0.5)) == [[1.5, 0.0], [0.0, 1.5]]
    assert product(spectral.iso_c(updates_of(left, left), coefficient=1.0)) == [[4.0, 0.0], [0.0, 0.0]]
    # the sum's first direction is common; the domain's own one is what the projection leaves
    wide = [[4.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 0.0]]
    assert product(spectral.iso_cts(updates_of(wide), common_fraction=0.5, coefficient=1.0)) == [
        [3.0, 0.0, 0.0],
        [0.0, 3.0, 0.0],
        [0.0, 0.0, 0.0],
    ]
    nothing = updates_of([[0.0, 0.0]], [[0.0, 0.0]])
    for function, parameters in (
        (spectral.tsv, {}),
        (spectral.iso_c, {}),
        (spectral.iso_cts, {"common_fraction": 0.8}),
    ):
        assert product(function(nothing, coefficient=1.0, **parameters)) == [[0.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_order_statistics_are_those_of_the_sorted_rows(dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(3)
    rows = torch.randn(3, 500, generator=rng, dtype=dtype) * torch.tensor([[1e-30], [1.0], [1e20]])
    rows[:, ::7] = 0.0
    rows[:, ::11] = -0.0
    rows[1, 5:90] = rows[1, 4]
    rows = rows.to(dtype)
    passes = 0

    def pieces() -> Iterator[torch.Tensor]:
        nonlocal passes
        passes += 1
        return iter(torch.split(rows, [1, 300, 199], dim=1))

    places = (0, 17, 250, 498, 499)
    found = order_statistics(pieces, lambda n: [place * n // 500 for place in places])
    assert found.dtype == dtype
    assert torch.equal(found, rows.sort(dim=1).values[:, list(places)])
    assert passes == (2 if dtype == torch.float32 else 4)


def updates_by_name(adapters: dict[str, Adapter], name: str) -> list[oracles.Array]:
    """Δ of every domain, by name, in float64."""
    modules = [adapters[domain].modules[name] for domain in sorted(adapters)]
    return [(m.scaling * (m.lora_B.double() @ m.lora_A.double())).numpy() for m in modules]


def oracle_of(
    method: str, adapters: dict[str, Adapter], names: list[str], space: str, seed: int
) -> list[oracles.Array]:
    """The merge of the modules of one scope."""
    parameters = {key: value.default for key, value in METHODS[method].parameters.items()} | PARAMETERS.get(method, {})
    updates = [updates_by_name(adapters, name) for name in names]
    lefts = [np.eye(module[0].shape[0]) for module in updates]
    rights = [np.eye(module[0].shape[1]) for module in updates]
    if space == "core":
        turned = [oracles.core(module) for module in updates]
        updates = [matrices for _, _, matrices in turned]
        lefts, rights = [U for U, _, _ in turned], [V for _, V, _ in turned]
    if method.startswith("knots"):
        aligned = [oracles.knots(matrices) for matrices in updates]
        updates = [matrices for _, matrices in aligned]
        lefts = [left @ U for left, (U, _) in zip(lefts, aligned, strict=True)]

    def pruned(matrix: oracles.Array, domain: str, name: str) -> oracles.Array:
        drawn = generator(seed, "della", domain, name).random(matrix.size, dtype=np.float32).tolist()
        settings = parameters["density"], parameters["epsilon"]
        return np.array(oracles.magpruned(matrix.ravel().tolist(), *settings, drawn, matrix.shape[1])).reshape(
            matrix.shape
        )

    def lifted(matrices: list[oracles.Array]) -> list[oracles.Array]:
        return [left @ matrix @ right.T for left, matrix, right in zip(lefts, matrices, rights, strict=True)]

    if method in SPECTRAL:
        function = getattr(oracles, method.replace("-", "_"))
        return lifted([function(matrices, **parameters) for matrices in updates])

    if method in ELEMENTWISE:  # entries are float32 numbers: a threshold must fall between the same two
        updates = [[matrix.astype(np.float32).astype(np.float64) for matrix in matrices] for matrices in updates]

    if method.startswith("della"):
        updates = [
            [pruned(matrix, domain, name) for matrix, domain in zip(matrices, sorted(adapters), strict=True)]
            for matrices, name in zip(updates, names, strict=True)
        ]

    def flat(rows: oracles.Rows) -> list[float]:
        if method == "linear-by-layer":  # books, tents, toys
            return [(2 * books + tents + 0.5 * toys) / 3.5 for books, tents, toys in zip(*rows, strict=True)]
        if method == "della":
            return oracles.ties(rows, 1.0, parameters["coefficient"])
        if method == "della-linear":
            return [parameters["coefficient"] * x for x in oracles.average(rows)]
        name = "average" if method == "livar-style" else method.removeprefix("knots-").replace("-", "_")
        if not name.startswith("dare"):
            given = {} if name == "average" else parameters  # signals are absent, and λ is 1
            found: list[float] = getattr(oracles, name)(rows, **given)
            return found
        draws = [
            np.concatenate(
                [
                    generator(seed, "dare", domain, module).random(matrices[0].size, dtype=np.float32)
                    for module, matrices in zip(names, updates, strict=True)
                ]
            ).tolist()
            for domain in sorted(adapters)
        ]
        rows = oracles.dropped(rows, parameters["density"], draws)
        if name == "dare":
            return [parameters["coefficient"] * x for x in oracles.average(rows)]
        return oracles.ties(rows, parameters["ties_density"], parameters["coefficient"])

    return lifted(oracles.over_scope(updates, flat))


def close(found: torch.Tensor, expected: Any, tolerance: float = 1e-6) -> bool:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    return bool(torch.linalg.norm(found.double() - expected) <= tolerance * max(torch.linalg.norm(expected), 1e-12))


@pytest.mark.parametrize("space", ["full", "core"])
@pytest.mark.parametrize(
    ("method", "scope"),
    [(method, scope) for method in TRAINING_FREE for scope in (SCOPES if method in ELEMENTWISE else ["tensor"])],
)
def test_equals_the_definition(method: str, scope: Any, space: Any) -> None:
    adapters = as_many_as(method, random_adapters(LAYOUT))  # ranks 3, 1, 4 and three scalings
    merged = merge_adapters(adapters, method, scope=scope, space=space, seed=4, **PARAMETERS.get(method, {}))
    assert merged.adapter.modules.keys() == LAYOUT.keys() == merged.residuals.keys()
    assert max(merged.residuals.values()) <= 1e-6
    for names in SCOPES[scope]:
        for name, expected in zip(names, oracle_of(method, adapters, names, space, seed=4), strict=True):
            assert np.abs(expected).max() > 0.01
            assert close(merged.adapter.modules[name].delta_weight(), expected), name


@pytest.mark.parametrize("method", ELEMENTWISE)
def test_exact_ties_and_zeros_equal_the_definition(method: str) -> None:
    rng = torch.Generator().manual_seed(1)
    adapters = {}
    for domain, rank in (("a", 2), ("b", 3), ("c", 2)):
        factors = [
            torch.randint(-1, 2, shape, generator=rng).float() for shape in ((rank, 6), (5, rank))
        ]  # updates of small whole numbers: many equal magnitudes, many sign ties
        adapters[domain] = Adapter({"m": LoraModule(factors[0], factors[1], 1.0)})
    if METHODS[method].knots:  # equal singular values leave KnOTS' coordinates open
        adapters = random_adapters({"m": (5, 6)})
    adapters["d"] = Adapter({"m": LoraModule(torch.ones(1, 6), torch.zeros(5, 1), 1.0)})  # never trained
    merged = merge_adapters(adapters, method, seed=2, **PARAMETERS[method])
    (expected,) = oracle_of(method, adapters, ["m"], "full", seed=2)
    assert close(merged.adapter.modules["m"].delta_weight(), expected)


def test_many_domains_do_not_overflow() -> None:
    adapters = {f"domain {k:03d}": random_adapter({"m": (6, 5)}, 2, 1.0, k) for k in range(90)}
    merged = merge_adapters(adapters, "pcb", **PARAMETERS["pcb"])
    (expected,) = oracle_of("pcb", adapters, ["m"], "full", seed=0)  # exp(90) is beyond float32
    assert close(merged.adapter.modules["m"].delta_weight(), expected)


@pytest.mark.parametrize("space", ["full", "core"])
@pytest.mark.parametrize("method", [*LINEAR, *ELEMENTWISE])
def test_the_rows_of_the_domains_sum_to_the_merge(method: str, space: Any) -> None:
    adapters = random_adapters(LAYOUT)
    settings = PARAMETERS.get(method, {})
    scope: Any = "layer" if method in ELEMENTWISE else "tensor"
    merged = merge_adapters(adapters, method, scope=scope, space=space, seed=3, **settings)
    rows = dict(domain_rows(stack_adapters(adapters), method, scope=scope, space=space, seed=3, **settings))
    assert rows.keys() == LAYOUT.keys()
    for name, shape in LAYOUT.items():
        assert rows[name].shape == (3, *shape)
        assert rows[name].dtype == torch.float32
        assert close(rows[name].sum(0), merged.adapter.modules[name].delta_weight(), 1e-5)


@pytest.mark.parametrize("method", LINEAR)
def test_core_space_is_full_space_for_linear_methods(method: str) -> None:
    layout: Layout = {"layer.0.query": (48, 40), "layer.1.value": (40, 56), "top": (4, 40)}
    adapters = random_adapters(layout)
    full, core = (merge_adapters(adapters, method, space=space).adapter for space in ("full", "core"))
    for name in layout:
        assert close(core.modules[name].delta_weight(), full.modules[name].delta_weight(), 1e-5)
        assert core.modules[name].rank == min(8, *layout[name])


class Tensors(TorchDispatchMode):  # type: ignore[no-untyped-call]  # of torch
    """Records the largest tensor that any operation returns, and the most bytes of such tensors alive at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of torch
        self.largest, self.peak = 0, 0
        self.alive: dict[int, weakref.ref[torch.Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
                self.alive[id(tensor)] = weakref.ref(tensor)
        living = [tensor for reference in self.alive.values() if (tensor := reference()) is not None]
        self.alive = {id(tensor): weakref.ref(tensor) for tensor in living}
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in living}
        self.peak = max(self.peak, sum(storages.values()))
        return result


def record(adapters: dict[str, Adapter], method: str, **settings: Any) -> Tensors:
    tensors = Tensors()
    with tensors:
        merge_adapters(adapters, method, **settings)
    return tensors


@pytest.mark.parametrize("method", TRAINING_FREE)
def test_the_cost_of_core_space_does_not_grow_with_the_square_of_the_width(method: str) -> None:
    def largest(width: int) -> int:
        layout = {"m": (width, width)}
        named = {name: random_adapter(layout, 2, 1.0, k) for k, name in enumerate(("books", "tents", "toys"))}
        adapters = as_many_as(method, named)
        return record(adapters, method, space="core", **PARAMETERS.get(method, {})).largest

    counters = 3 * 2 * 65536 * 8  # of the order statistics, whatever the width
    small, large = largest(600), largest(1200)
    assert large <= max(2 * small, counters)
    assert large < 4 * 1200 * 1200


@pytest.mark.long
@pytest.mark.parametrize("scope", ["tensor", "layer", "model"])
@pytest.mark.parametrize("method", ["ties", "pcb", "dare-ties", "breadcrumbs"])
def test_memory_does_not_grow_with_the_number_of_modules(method: str, scope: str) -> None:
    def peak(num_modules: int) -> int:
        layout = {f"layer.{i}.query": (192, 192) for i in range(num_modules)}
        adapters = {str(k): random_adapter(layout, 1, 1.0, k) for k in range(4)}
        return record(adapters, method, scope=scope, output_rank=1, **PARAMETERS[method]).peak

    dense = 4 * 192 * 192 * 4  # one module's updates
    assert dense < peak(2)
    assert peak(8) < peak(2) + dense


def test_output_rank() -> None:
    adapters = random_adapters({"m": (12, 10)})
    exact = merge_adapters(adapters, "ties")
    expected = exact.adapter.modules["m"].delta_weight()
    assert exact.adapter.modules["m"].rank == 10
    assert exact.residuals == {"m": 0.0}
    values = torch.linalg.svdvals(expected.double())
    for rank in (1, 4, 9):
        merged = merge_adapters(adapters, "ties", output_rank=rank)
        assert merged.adapter.modules["m"].rank == rank
        residual = torch.linalg.norm(merged.adapter.modules["m"].delta_weight() - expected) / torch.linalg.norm(
            expected
        )
        assert merged.residuals["m"] == pytest.approx(float(residual), rel=1e-4)
        assert merged.residuals["m"] == pytest.approx(math.sqrt(values[rank:].square().sum() / values.square().sum()))
    for method in ("average", "tsv", "iso-c", "knots-ties"):
        found = merge_adapters(adapters, method)
        assert found.adapter.modules["m"].rank <= 8  # the sum of the ranks
        assert found.residuals["m"] <= 1e-6
        small = merge_adapters(adapters, method, output_rank=2)
        assert small.adapter.modules["m"].rank == 2
        assert 0.01 < small.residuals["m"] < 1
        assert small.adapter.modules["m"].lora_A.dtype == torch.float32


def test_an_exact_merge_is_no_larger_than_it_has_to_be() -> None:
    adapters = random_adapters({"tall": (60, 40), "wide": (40, 60)})
    low, high = merge_adapters(adapters, "dare", density=1.0), merge_adapters(adapters, "ties")
    for name in ("tall", "wide"):
        assert low.adapter.modules[name].rank == 8  # it is the average
        average = merge_adapters(adapters, "average").adapter.modules[name].delta_weight()
        assert close(low.adapter.modules[name].delta_weight(), average)
        assert high.adapter.modules[name].rank == 40
        compressed = merge_adapters(adapters, "ties", output_rank=12)
        values = torch.linalg.svdvals(high.adapter.modules[name].delta_weight().double())
        expected = math.sqrt(values[12:].square().sum() / values.square().sum())
        assert compressed.residuals[name] == pytest.approx(expected, rel=1e-5)


def test_a_merge_of_nothing_keeps_the_layout() -> None:
    silent = {name: Adapter({"m": LoraModule(torch.ones(2, 4), torch.zeros(3, 2), 1.0)}) for name in ("a", "b")}
    for method in TRAINING_FREE:
        for space in ("full", "core"):
            module = merge_adapters(silent, method, space=space, output_rank=1).adapter.modules["m"]
            assert module.delta_weight().tolist() == [[0.0] * 4] * 3, method


def test_draws_depend_on_seed_domain_and_module_alone() -> None:
    adapters = random_adapters(LAYOUT)
    first = merge_adapters(adapters, "dare", density=0.5, seed=1)
    assert adapter_sha256(first.adapter) == adapter_sha256(
        merge_adapters(adapters, "dare", density=0.5, seed=1).adapter
    )
    assert adapter_sha256(first.adapter) != adapter_sha256(
        merge_adapters(adapters, "dare", density=0.5, seed=2).adapter
    )
    fewer = {name: Adapter({"top": adapter.modules["top"]}) for name, adapter in adapters.items()}
    alone = merge_adapters(fewer, "dare", density=0.5, seed=1)
    assert torch.equal(alone.adapter.modules["top"].lora_B, first.adapter.modules["top"].lora_B)


def test_coefficients_scale_the_updates_before_the_method() -> None:
    adapters = random_adapters(LAYOUT)
    coefficients = {"toys": 2.0, "books": -0.5}
    scaled = {
        domain: Adapter(
            {
                name: LoraModule(module.lora_A, module.lora_B, module.scaling * coefficients.get(domain, 1.0))
                for name, module in adapter.modules.items()
            }
        )
        for domain, adapter in adapters.items()
    }
    merged = merge_adapters(adapters, "ties", coefficients=coefficients)
    assert adapter_sha256(merged.adapter) == adapter_sha256(merge_adapters(scaled, "ties").adapter)
    assert merged.coefficients == {"books": -0.5, "tents": 1.0, "toys": 2.0}
    assert merged.parameters == {"density": 0.2, "coefficient": 1.0}


def test_refusals() -> None:
    adapters = random_adapters(LAYOUT)
    other = {**adapters, "toys": random_adapter({**LAYOUT, "top": (3, 5)}, 2, 1.0, 0)}
    with pytest.raises(LayoutMismatchError, match=r"'toys'.*top.*\(r, 6\)"):
        merge_adapters(other, "ties")
    refused: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ConfigError, "'x'.*adamerging, average", {"method": "x"}),
        (ConfigError, "'mergerec'.*learn_coefficients", {"method": "mergerec"}),
        (ConfigError, "'ties'.*rank.*density, coefficient", {"method": "ties", "rank": 3}),
        (ConfigError, r"density.*0\.0.*0\.0.*1\.0", {"density": 0.0}),
        (ConfigError, r"density.*1\.5", {"density": 1.5}),
        (ConfigError, "scope.*'all'.*tensor, layer, model", {"scope": "all"}),
        (ConfigError, "space.*'half'.*full, core", {"space": "half"}),
        (ConfigError, "'tsv'.*'model'.*'tensor'", {"method": "tsv", "scope": "model"}),
        (ConfigError, "output_rank.* 0.*'exact'.*1", {"output_rank": 0}),
        (ConfigError, "output_rank.*True", {"output_rank": True}),
        (ConfigError, "boats.*books, tents, toys", {"coefficients": {"boats": 1.0}}),
        (MergeError, "toys", {"coefficients": {"toys": math.nan}}),
        (MergeError, "0", {"coefficients": dict.fromkeys(adapters, 0.0)}),
    ]
    for error, values, settings in refused:
        with pytest.raises(error, match=values):
            merge_adapters(adapters, **{"method": "ties", **settings})
    with pytest.raises(ConfigError, match="'iso-c'"):
        domain_rows(stack_adapters(adapters), "iso-c")
    with pytest.raises(MergeError):
        merge_adapters({}, "ties")
    with pytest.raises(ValueError, match="order_statistics"):
        order_statistics(lambda: [], lambda n: (0,))


def test_the_tables_of_the_documentation_have_every_method() -> None:
    for table in (methods_table(), laws_table()):
        assert all(f"| `{name}` |" in table for name in METHODS)
    assert "density 0.2 (above 0.0, at most 1.0), coefficient 1.0 |" in methods_table()
