"""Names of modules that collide: what is written hits one module, for peft and for fedmerge alike."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import Tree, random_tree, touched, weights_of, weights_with
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from fedmerge.adapter import Adapter, LoraModule, adapter_sha256
from fedmerge.encoder.peft.folder import read_adapter, write_adapter
from fedmerge.encoder.peft.names import is_target


def random_adapter_on(model: torch.nn.Module, rng: np.random.Generator) -> Adapter:
    """Draw ranks, scalings and factors for some of a model's linear layers."""
    linear = {name: each for name, each in model.named_modules() if isinstance(each, torch.nn.Linear)}
    names = rng.choice(sorted(linear), rng.integers(1, len(linear)), replace=False)
    modules = {}
    for name in map(str, names):
        rank, (width_out, width_in) = int(rng.integers(1, 4)), linear[name].weight.shape
        lora_A, lora_B = (torch.from_numpy(rng.normal(size=(size, rank))).float() for size in (width_in, width_out))
        modules[name] = LoraModule(lora_A.T.contiguous(), lora_B, float(rng.choice([0.5, 1.0, 2.0])))
    return Adapter(modules)


@pytest.mark.parametrize("seed", range(40))
def test_an_adapter_on_any_names_survives_peft_and_fedmerge(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    model = random_tree(rng)
    adapter = random_adapter_on(model, rng)
    write_adapter(adapter, tmp_path, None)
    assert adapter_sha256(read_adapter(tmp_path)) == adapter_sha256(adapter)
    assert touched(model, tmp_path) == set(adapter.modules)
    expected = weights_of(model)
    for name, module in adapter.modules.items():
        expected[f"{name}.weight"] += module.scaling * module.lora_B.double() @ module.lora_A.double()
    found = weights_with(model, tmp_path)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, atol=1e-5, rtol=1e-5)


NARROWED: dict[str, dict[str, Any]] = {
    "last parts": {"target_modules": ["proj", "b"]},
    "whole names": {"target_modules": ["enc.layers.0.proj", "proj"]},
    "a pattern": {"target_modules": r".*layers\.0\.(proj|b)"},
    "excluded": {"target_modules": ["proj"], "exclude_modules": ["layers.1.proj"]},
    "excluded by a pattern": {"target_modules": ["proj"], "exclude_modules": r"enc\..*"},
    "one layer": {"target_modules": ["proj", "b"], "layers_to_transform": 1},
    "layers of a list": {"target_modules": ["proj"], "layers_to_transform": [0], "layers_pattern": ["layers"]},
    "a listed name beside a layer": {"target_modules": ["proj"], "layers_to_transform": [7]},
    "saved whole": {"target_modules": ["proj", "b"], "modules_to_save": ["layers.0"]},
}


@pytest.mark.parametrize("kind", NARROWED)
def test_targets_are_those_of_peft(kind: str) -> None:
    towers = [
        f"{tower}.layers.{layer}.{part}" for tower in ("enc", "dec") for layer in (0, 1) for part in ("proj", "b")
    ]
    settings = dict(NARROWED[kind])
    config = LoraConfig(**settings)
    for name in (*towers, "proj", "enc.proj", "enc.proj.inner"):
        theirs = check_target_module_exists(config, name)
        assert is_target(name, settings) == (bool(theirs) and type(theirs).__name__ != "_ExcludedModule"), name


def test_a_name_with_every_special_character_is_matched_as_text(tmp_path: Path) -> None:
    names = ["a+b.proj", "aab.proj", "(x).p|q", "x.p"]
    model = Tree({name: torch.nn.Linear(3, 3) for name in names})
    module = LoraModule(torch.ones(1, 3), torch.ones(3, 1), 1.0)
    for name in names:
        write_adapter(Adapter({name: module}), tmp_path / str(names.index(name)), None)
        assert touched(model, tmp_path / str(names.index(name))) == {name}
