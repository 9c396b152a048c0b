"""Merging methods of one's own: the example of docs/guides/own-method.md at work, and what a function has to be."""

import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import random_adapter, random_adapters
from in_process import finish, grid_in, small_experiment, tables_of
from run_folders import output, refusal

from fedmerge.adapter import Adapter, LoraModule, adapter_sha256
from fedmerge.config import from_flat, to_toml
from fedmerge.encoder.peft.folder import read_adapter, write_adapter
from fedmerge.errors import ConfigError, MergeError
from fedmerge.merging.descriptions import describe_method
from fedmerge.merging.methods import method_named
from fedmerge.merging.training_free import merge_adapters
from fedmerge.seeding import derive
from sim.local.in_process import run_in_process

PAGE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "own-method.md"
LAYOUT = {"layer.0.query": (6, 5), "layer.1.query": (4, 7)}
Capsys = pytest.CaptureFixture[str]


@pytest.fixture
def slerp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The first block of the page as a module on the path."""
    found = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    assert found
    (tmp_path / "slerp.py").write_text(found.group(1))
    monkeypatch.syspath_prepend(tmp_path)
    yield "slerp:slerp"
    sys.modules.pop("slerp", None)


def two() -> dict[str, Adapter]:
    adapters = random_adapters(LAYOUT)
    return {name: adapters[name] for name in ("books", "tents")}


def interpolated(adapters: dict[str, Adapter], t: float) -> dict[str, torch.Tensor]:
    """SLERP by its definition, in float64."""
    merged = {}
    for name in LAYOUT:
        first, second = (adapters[domain].modules[name].delta_weight().double() for domain in sorted(adapters))
        angle = math.acos(float((first * second).sum() / first.norm() / second.norm()))
        merged[name] = (math.sin((1 - t) * angle) * first + math.sin(t * angle) * second) / math.sin(angle)
    return merged


def test_the_example_of_the_page_merges_as_slerp_does(slerp: str) -> None:
    adapters = two()
    for t in (0.5, 0.3):
        merged = merge_adapters(adapters, slerp, t=t)
        assert (merged.method, dict(merged.parameters)) == ("slerp:slerp", {"t": t})
        for name, expected in interpolated(adapters, t).items():
            found = merged.adapter.modules[name].delta_weight().double()
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
            assert merged.residuals[name] < 1e-5
    for name, module in merge_adapters(adapters, slerp, t=0.0).adapter.modules.items():
        torch.testing.assert_close(module.delta_weight(), adapters["books"].modules[name].delta_weight())


def test_the_example_of_the_page_through_the_command(slerp: str, tmp_path: Path, capsys: Capsys) -> None:
    for name, adapter in two().items():
        write_adapter(adapter, tmp_path / name, "some/backbone")
    flags = ("--method", slerp, "--parameter", "t=0.3", "--output-rank", "2", "--out", tmp_path / "out")
    shown = output(capsys, "merge", *flags, tmp_path / "books", tmp_path / "tents")
    record = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert (record["method"], record["parameters"], record["rank"]) == ("slerp:slerp", {"t": 0.3}, 2)
    assert 0.01 < max(record["residuals"].values()) < 1
    wanted = merge_adapters(two(), slerp, t=0.3, output_rank=2)
    for name, module in read_adapter(tmp_path / "out").modules.items():
        torch.testing.assert_close(module.delta_weight(), wanted.adapter.modules[name].delta_weight())
        assert f"{wanted.residuals[name]:.4f}  {name}\n" in shown
    assert "slerp:slerp: Spherical interpolation of two updates." in output(capsys, "methods", slerp)
    refused = refusal(
        capsys, "merge", *flags[:2], "--parameter", "x=1", *flags[-2:], tmp_path / "books", tmp_path / "tents"
    )
    assert all(word in refused for word in ("slerp:slerp", "x", "t"))


def test_the_example_of_the_page_in_an_experiment(slerp: str, tmp_path: Path) -> None:
    settings = {"merge.methods": f"average,{slerp}", "domains.train": "books,coffee", "merge.output_rank": 3}
    run_in_process(small_experiment(tmp_path, **settings))
    run = tmp_path / "runs" / "run"
    assert slerp in json.loads((run / "choice.json").read_text())["best_variants"]
    assert f"\n{slerp} " in (run / "report.txt").read_text()
    experts = {name: read_adapter(run / "adapters" / name) for name in ("books", "coffee")}
    wanted = merge_adapters(experts, slerp, output_rank=3)
    records = [json.loads(path.read_text()) for path in run.rglob("provenance.json")]
    found = next(record for record in records if record["method"] == slerp)
    assert found["parameters"] == {"t": 0.5}
    assert found["residuals"] == pytest.approx(dict(wanted.residuals), abs=1e-6)


@pytest.mark.federation
def test_the_example_of_the_page_in_a_benchmark(slerp: str, tmp_path: Path) -> None:
    experiment = small_experiment(tmp_path, **{"domains.train": "books,coffee", "domains.unseen": ""})
    (tmp_path / "experiment.toml").write_text(to_toml(experiment))
    strategies = "".join(
        f'[[strategy]]\nname = "{name}"\nset = {{ "merge.methods" = "{method}" }}\n'
        for name, method in (("average", "average"), ("slerp", slerp))
    )
    (tmp_path / "bench.toml").write_text(
        f'title = "x"\nexperiment = "experiment.toml"\nseeds = [0]\nbaseline = "average"\n{strategies}'
    )
    grid = grid_in(tmp_path, "grid")
    finish(grid)
    cells = {cell["strategy"]: cell["status"] for cell in tables_of(grid).cells}
    assert cells == {"average": "done", "slerp": "done"}


# The function


def test_a_function_is_called_for_each_module_with_what_the_page_says() -> None:
    seen: dict[int, torch.Tensor] = {}

    def mean(updates: torch.Tensor, seed: int, weight: float = 1) -> torch.Tensor:
        seen[seed] = updates.clone()
        merged = weight * updates.mean(0)
        updates.zero_()  # its own tensor
        return merged.double()

    adapters = random_adapters(LAYOUT)
    before = {name: module.delta_weight() for name, module in adapters["toys"].modules.items()}
    merged = merge_adapters(adapters, mean, coefficients={"toys": 2.0, "books": 0.0}, seed=7, weight=0.5)
    assert list(seen) == [derive(7, "own method", name) for name in LAYOUT]
    for updates, (name, shape) in zip(seen.values(), LAYOUT.items(), strict=True):
        tents, toys = (adapters[domain].modules[name].delta_weight() for domain in ("tents", "toys"))
        assert (updates.shape, updates.dtype) == ((2, *shape), torch.float32)
        torch.testing.assert_close(updates, torch.stack([tents, 2 * toys]))
        torch.testing.assert_close(merged.adapter.modules[name].delta_weight(), (tents + 2 * toys) / 4)
        assert torch.equal(adapters["toys"].modules[name].delta_weight(), before[name])
    assert merged.settings["seed"] == 7
    assert merged.method.endswith(":test_a_function_is_called_for_each_module_with_what_the_page_says.<locals>.mean")


def test_core_space_gives_a_linear_function_the_same_merge_from_smaller_matrices() -> None:
    widths = []

    def mean(updates: torch.Tensor) -> torch.Tensor:
        widths.append(updates.shape[1:])
        return updates.mean(0)

    adapters = {name: random_adapter({"m": (40, 30)}, 2, 1.0, seed) for seed, name in enumerate("abc")}
    full, core = (merge_adapters(adapters, mean, space=space).adapter.modules["m"] for space in ("full", "core"))
    torch.testing.assert_close(full.delta_weight(), core.delta_weight(), atol=1e-5, rtol=0)
    assert widths == [(40, 30), (6, 6)]
    assert core.rank == 6


def test_a_name_and_the_function_itself_are_the_same_method(slerp: str) -> None:
    by_name = merge_adapters(two(), slerp)
    by_function = merge_adapters(two(), sys.modules["slerp"].slerp)
    assert replace(by_name, adapter=by_function.adapter) == by_function
    assert adapter_sha256(by_name.adapter) == adapter_sha256(by_function.adapter)
    assert method_named(slerp).parameters["t"].default == 0.5
    assert "t = 0.5" in describe_method(slerp)


def unnamed(*, updates: torch.Tensor) -> torch.Tensor:
    return updates


def required(updates: torch.Tensor, strength: float) -> torch.Tensor:
    return strength * updates[0]


def tensor_default(updates: torch.Tensor, start: torch.Tensor = torch.zeros(2)) -> torch.Tensor:  # noqa: B008  # refused
    return updates[0] + start


@pytest.mark.parametrize(
    ("function", "named"),
    [(unnamed, ["updates"]), (required, ["strength", "no default"]), (tensor_default, ["start", "tensor([0., 0.])"])],
)
def test_arguments_that_settings_cannot_express_are_refused(function: Callable[..., Any], named: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        merge_adapters(two(), function)
    assert all(text in str(caught.value) for text in [f":{function.__name__}", *named])


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("no_such_module_here:slerp", ["no_such_module_here", "ModuleNotFoundError", "PYTHONPATH"]),
        ("broken:slerp", ["broken", "ZeroDivisionError"]),
        ("slerp:lerp", ["lerp", "slerp.py"]),
        ("slerp:torch", ["module"]),
        ("arc", ["'arc'", "task-arithmetic", "package.module:function"]),
        (":slerp", ["':slerp'"]),
    ],
)
def test_a_name_that_leads_to_no_function_is_refused(name: str, named: list[str], slerp: str, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("1 / 0")
    with pytest.raises(ConfigError) as caught:
        merge_adapters(two(), name)
    assert all(text in str(caught.value) for text in named)


@pytest.mark.parametrize(
    ("merge", "named"),
    [
        (lambda updates: updates, ["(6, 5)", "(2, 6, 5)"]),
        (lambda updates: updates[0].T, ["(6, 5)", "(5, 6)"]),
        (lambda updates: updates[0].tolist(), ["(6, 5)", "list"]),
        (lambda updates: updates[0].long(), ["torch.int64"]),
        (lambda updates: updates[0] / 0, ["30 of 30"]),
        (lambda updates: updates[5], ["IndexError", "test_own_method.py, line"]),
    ],
)
def test_a_result_that_is_no_merge_is_refused_with_its_module(merge: Callable[..., Any], named: list[str]) -> None:
    with pytest.raises(MergeError) as caught:
        merge_adapters(two(), merge)
    assert all(text in str(caught.value) for text in ["layer.0.query", *named])


def test_a_merge_of_zeros_keeps_the_layout() -> None:
    adapters = {"a": Adapter({"m": LoraModule(torch.ones(1, 3), torch.ones(2, 1), 1.0)})}
    merged = merge_adapters(adapters, lambda updates: 0 * updates[0], output_rank=2)
    assert (merged.adapter.modules["m"].rank, merged.residuals["m"]) == (1, 0.0)


def test_settings_are_those_of_a_method_for_single_matrices() -> None:
    with pytest.raises(ConfigError) as caught:
        merge_adapters(two(), lambda updates: updates[0], scope="model")
    assert all(text in str(caught.value) for text in ("'model'", "'tensor'"))


# Configurations


def test_a_configuration_takes_the_name_and_imports_nothing() -> None:
    config = from_flat({"merge.methods": "average,no_such_module_here:merge"})
    assert config.merge.methods == ("average", "no_such_module_here:merge")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"merge.methods": "my:own:method"}, ["'my:own:method'"]),
        ({"merge.methods": "my:own,my:own"}, ["my:own"]),
        ({"merge.methods": "average,my:own", "privacy.policy": "aggregate-only"}, ["my:own", "aggregate-only"]),
        (
            {"merge.methods": "my:own", "dp.mode": "domain-central", "dp.noise_multiplier": 1.0, "dp.delta": 1e-6},
            ["my:own", "domain-central"],
        ),
        ({"rounds.rule": "my:own"}, ["my:own"]),
    ],
)
def test_a_configuration_refuses_it_where_no_single_adapter_is_seen(settings: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        from_flat(settings)
    assert all(text in str(caught.value) for text in named)
