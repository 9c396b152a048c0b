"""LIVAR-style weights: the table of nine cells, its invariances, and merges of folders that carry their signals."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import Layout, random_adapter
from run_folders import output

import fedmerge as fm
from fedmerge.adapter import Adapter, adapter_sha256
from fedmerge.encoder.peft.folder import read_adapter, write_adapter
from fedmerge.files import seal, write_json
from fedmerge.merging.methods import method_coefficients
from fedmerge.merging.signals import TrainingSignals, livar, signals_of
from fedmerge.merging.stack import by_module, survey_adapters
from fedmerge.merging.training_free import merge_adapters

LAYOUT: Layout = {"layer.0.query": (5, 4), "layer.1.query": (6, 6), "layer.1.value": (4, 6), "top": (3, 7)}
NAMES = ("toys", "books", "tents", "coffee")
PUBLISHED: dict[str, Any] = {"per_step": False, "per_entry": False}


@pytest.fixture
def adapters() -> dict[str, Adapter]:
    return {name: random_adapter(LAYOUT, 2, 1.0, seed) for seed, name in enumerate(NAMES)}


def drawn(adapters: Mapping[str, Adapter], seed: int = 0) -> dict[str, TrainingSignals]:
    """Draw signals over four decades."""
    rng = np.random.default_rng(seed)
    found = {}
    for name in sorted(adapters):
        pairs = {module: tuple(10 ** rng.uniform(-2, 2, 2)) for module in LAYOUT}
        report = {"signals": pairs, "steps": int(rng.integers(10, 99)), "spread": float(rng.uniform(0.1, 0.9))}
        made = signals_of(report, adapters[name])
        assert made is not None
        found[name] = made
    return found


def times(signals: Mapping[str, TrainingSignals], factor: float) -> dict[str, TrainingSignals]:
    return {
        name: replace(each, of_modules={module: (factor * a, factor * b) for module, (a, b) in each.of_modules.items()})
        for name, each in signals.items()
    }


def weights(adapters: Mapping[str, Adapter], signals: Mapping[str, Any], **parameters: Any) -> np.ndarray:
    """Return the weights (K, M), domains and modules sorted."""
    layout = by_module(survey_adapters(adapters))
    return method_coefficients("livar-style", layout, signals, **parameters).double().numpy()


def quantile(values: list[float], fraction: float) -> float:
    """Interpolate between the two values around the place fraction · (n - 1)."""
    place = fraction * (len(values) - 1)
    low, ordered = int(place), sorted(values)
    return ordered[low] + (place - low) * (ordered[min(low + 1, len(values) - 1)] - ordered[low])


def cell(signal_A: float, signal_B: float, of_A: list[float], of_B: list[float]) -> float:
    """The published table, written out."""
    if signal_B < quantile(of_B, 0.6):
        return 0.03813978
    if signal_B <= quantile(of_B, 0.8):
        return (
            0.09813978
            if signal_A < quantile(of_A, 0.25)
            else 0.07813978
            if signal_A > quantile(of_A, 0.5)
            else 0.08813978
        )
    return (
        0.19313978 if signal_A < quantile(of_A, 0.25) else 0.09313978 if signal_A > quantile(of_A, 0.5) else 0.11813978
    )


def slow(adapters: Mapping[str, Adapter], signals: Mapping[str, TrainingSignals], published: bool) -> np.ndarray:
    found = {}
    for name, each in signals.items():
        for module, (a, b) in each.of_modules.items():
            shapes = adapters[name].modules[module]
            by_A, by_B = (each.steps * factor.numel() ** 0.5 for factor in (shapes.lora_A, shapes.lora_B))
            found[name, module] = (a, b) if published else (a / by_A, b / by_B)
    of_A, of_B = [a for a, _ in found.values()], [b for _, b in found.values()]
    raw = np.zeros((len(signals), len(LAYOUT)))
    for row, name in enumerate(sorted(signals)):
        for column, module in enumerate(sorted(LAYOUT)):
            signal_A, signal_B = found[name, module]
            raw[row, column] = cell(signal_A, signal_B, of_A, of_B)
    shares: np.ndarray = raw / raw.sum(0)
    return shares


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_the_weights_are_the_cells_of_the_table(adapters: dict[str, Adapter], seed: int, published: bool) -> None:
    signals = drawn(adapters, seed)
    found = weights(adapters, signals, **(PUBLISHED if published else {}))
    assert found == pytest.approx(slow(adapters, signals, published), rel=1e-6)
    assert found.sum(0) == pytest.approx(1.0)


def test_all_nine_cells_are_met(adapters: dict[str, Adapter]) -> None:
    """Otherwise the slow oracle would say little."""
    met = set[float]()
    for seed in range(5):
        signals = drawn(adapters, seed)
        pairs = [pair for each in signals.values() for pair in each.of_modules.values()]
        of_A, of_B = [a for a, _ in pairs], [b for _, b in pairs]
        met |= {cell(a, b, of_A, of_B) for a, b in pairs}
    assert len(met) == 7  # the first row of the table has one value


def test_the_merge_is_the_weighted_sum_of_updates(adapters: dict[str, Adapter]) -> None:
    signals = drawn(adapters)
    merged = merge_adapters(adapters, "livar-style", signals=signals, coefficient=1.8)
    by_hand = 1.8 * slow(adapters, signals, published=False)
    for column, module in enumerate(sorted(LAYOUT)):
        dense = sum(
            weight * adapters[name].modules[module].delta_weight().double()
            for name, weight in zip(sorted(NAMES), by_hand[:, column], strict=True)
        )
        found = merged.adapter.modules[module]
        assert torch.allclose(found.delta_weight().double(), torch.as_tensor(dense), rtol=1e-4, atol=1e-6)
        assert [merged.module_weights[name][module] for name in sorted(NAMES)] == pytest.approx(by_hand[:, column])
    core = merge_adapters(adapters, "livar-style", signals=signals, coefficient=1.8, space="core").adapter
    for module, expected in merged.adapter.modules.items():
        assert torch.allclose(core.modules[module].delta_weight(), expected.delta_weight(), atol=1e-5)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_equal_signals_are_the_average(adapters: dict[str, Adapter], number: int) -> None:
    few = {name: adapters[name] for name in NAMES[:number]}
    same = drawn({"a": adapters["toys"]})["a"]
    merged = merge_adapters(few, "livar-style", signals=dict.fromkeys(few, same))
    assert adapter_sha256(merged.adapter) == adapter_sha256(merge_adapters(few, "average").adapter)


def test_one_domain_is_itself(adapters: dict[str, Adapter]) -> None:
    alone = {"toys": adapters["toys"]}
    merged = merge_adapters(alone, "livar-style", signals=drawn(alone)).adapter
    for name, module in merged.modules.items():
        assert torch.equal(module.delta_weight(), adapters["toys"].modules[name].delta_weight())


@pytest.mark.parametrize("parameters", [{}, PUBLISHED, {"spread": True}])
def test_units_of_the_signals_and_order_of_clients_do_not_matter(
    adapters: dict[str, Adapter], parameters: dict[str, Any]
) -> None:
    signals = drawn(adapters)
    expected = weights(adapters, signals, **parameters)
    for factor in (1e-20, 0.3, 1e20):
        assert (weights(adapters, times(signals, factor), **parameters) == expected).all()
    turned = dict(reversed(adapters.items()))
    assert (weights(turned, dict(reversed(signals.items())), **parameters) == expected).all()


def test_a_longer_training_gets_weight_in_the_published_form_alone(adapters: dict[str, Adapter]) -> None:
    signals = drawn(adapters)
    longer = {name: replace(each, steps=1000 * each.steps) for name, each in times(signals, 1000.0).items()}
    mixed = {**signals, "toys": longer["toys"]}
    assert weights(adapters, mixed) == pytest.approx(weights(adapters, signals), rel=1e-6)
    assert np.abs(weights(adapters, mixed, **PUBLISHED) - weights(adapters, signals, **PUBLISHED)).max() > 0.01


@pytest.mark.parametrize("parameters", [{}, PUBLISHED])
def test_a_client_without_signals_weighs_as_one_of_equals(
    adapters: dict[str, Adapter], parameters: dict[str, Any]
) -> None:
    signals = drawn(adapters)
    three = {name: adapters[name] for name in sorted(NAMES) if name != "toys"}
    of_three = weights(three, signals, **parameters)
    silent = times({"toys": signals["toys"]}, 0.0)["toys"]
    for nothing in (silent, None, replace(signals["toys"], steps=0)):
        found = weights(adapters, {**signals, "toys": nothing}, **parameters)
        toys = sorted(NAMES).index("toys")
        assert found[toys].tolist() == pytest.approx([0.25] * len(LAYOUT))
        assert np.delete(found, toys, 0) == pytest.approx(0.75 * of_three, rel=1e-6)
    for all_silent in (dict.fromkeys(NAMES, silent), {}):
        assert weights(adapters, all_silent, **parameters).ravel().tolist() == [0.25] * 4 * len(LAYOUT)


def test_the_spread_is_a_factor(adapters: dict[str, Adapter]) -> None:
    signals = drawn(adapters)
    by_hand = slow(adapters, signals, published=False) * np.array([[signals[name].spread] for name in sorted(NAMES)])
    assert weights(adapters, signals, spread=True) == pytest.approx(by_hand / by_hand.sum(0), rel=1e-6)
    still = {name: replace(each, spread=0.0) for name, each in signals.items()}
    assert weights(adapters, still, spread=True).ravel().tolist() == [0.25] * 4 * len(LAYOUT)  # never NaN
    unknown = {**signals, "toys": replace(signals["toys"], spread=None)}
    assert weights(adapters, unknown, spread=True)[3].tolist() == [0.25] * len(LAYOUT)


def test_a_group_of_modules_has_the_mean_of_their_weights(adapters: dict[str, Adapter]) -> None:
    signals, layout = drawn(adapters), survey_adapters(adapters)
    by_layer = livar(layout, 1.0, True, True, False, signals).numpy()
    of_modules = weights(adapters, signals)
    assert layout.groups == ("layer 0", "layer 1", "others")
    assert by_layer[:, 1] == pytest.approx(of_modules[:, 1:3].mean(1), rel=1e-6)
    assert by_layer[:, 2] == pytest.approx(of_modules[:, 3], rel=1e-6)


def written(folder: Path, adapter: Adapter, signals: TrainingSignals | None) -> Path:
    """Write an expert as a client's cache has it."""
    write_adapter(adapter, folder, "tiny")
    report = {"steps": 3} if signals is None else {"steps": signals.steps, "signals": signals.of_modules}
    write_json(folder / "training.json", seal(report))
    return folder


def test_folders_carry_their_signals(
    adapters: dict[str, Adapter], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    signals: dict[str, TrainingSignals | None] = {**drawn(adapters), "tents": None}
    folders = {name: written(tmp_path / name, adapters[name], signals[name]) for name in NAMES}
    wanted = merge_adapters(adapters, "livar-style", signals=signals, per_entry=False, coefficient=1.8)
    arguments = ["--method", "livar-style", "--per-entry", "false", "--coefficient", "1.8"]
    shown = output(capsys, "merge", *arguments, "--out", str(tmp_path / "out"), *map(str, folders.values()))
    assert adapter_sha256(read_adapter(tmp_path / "out")) == adapter_sha256(wanted.adapter)
    assert "no training signals in training.json of tents: 1/4 in every module" in shown
    record = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert record["module_weights"] == wanted.module_weights
    in_python = fm.merge(
        {**folders, "toys": fm.load_adapter(folders["toys"])}, "livar-style", per_entry=False, coefficient=1.8
    )
    assert adapter_sha256(in_python.adapter) == adapter_sha256(wanted.adapter)

    overrides = ["--set", "merge.methods=livar-style", "livar.coefficients=1.8", "livar.forms=per-step,published"]
    output(capsys, "merge", *map(str, folders.values()), "--out", str(tmp_path / "several"), *overrides)
    published = read_adapter(tmp_path / "several" / "livar-style-1.8-per_step-0-per_entry-0")
    wanted = merge_adapters(adapters, "livar-style", signals=signals, coefficient=1.8, **PUBLISHED)
    assert adapter_sha256(published) == adapter_sha256(wanted.adapter)
    record = json.loads((tmp_path / "several" / "livar-style-1.8" / "provenance.json").read_text())
    assert record["without_signals"] == ["tents"]
    assert record["coefficient_groups"] == sorted(LAYOUT)
