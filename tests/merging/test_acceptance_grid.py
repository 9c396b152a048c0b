"""Every method on every kind of PEFT folder: against float64 oracles of the definition, and PEFT's merge_and_unload."""

import copy
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from adapters import as_many_as, save_with_peft
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_merging_methods import PARAMETERS, TRAINING_FREE, close, oracle_of
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedmerge.adapter import Adapter, LoraModule
from fedmerge.errors import LayoutMismatchError
from fedmerge.merging.folders.reading import read_folders
from fedmerge.merging.folders.writing import write_merge
from fedmerge.merging.methods import METHODS
from fedmerge.merging.training_free import merge_adapters

LAYOUT = {"decoder.block.0.v": (8, 12), "encoder.block.0.q": (11, 9)}
NAMES = ("books", "tents", "toys")  # the order of the domains
PLAIN: tuple[dict[str, Any], ...] = ({"r": 3, "lora_alpha": 6}, {"r": 3, "lora_alpha": 6}, {"r": 3, "lora_alpha": 6})
MIXED: tuple[dict[str, Any], ...] = ({"r": 3, "lora_alpha": 6}, {"r": 1, "lora_alpha": 3}, {"r": 4, "lora_alpha": 5})
PATTERNS: tuple[dict[str, Any], ...] = (
    {**MIXED[0], "rank_pattern": {"q": 2}, "alpha_pattern": {r"decoder\..*": 7}},
    {**MIXED[1], "rank_pattern": {r"encoder\.block\.0\.q": 4}, "use_rslora": True},
    {**MIXED[2], "alpha_pattern": {"v": 1}},
)
UNEQUAL: tuple[dict[str, Any], ...] = (
    {**MIXED[0], "target_modules": ["q", "v"]},
    {**MIXED[1], "target_modules": ["q"]},
    {**MIXED[2], "target_modules": ["v"]},
)
RS_LORA = tuple({**each, "use_rslora": True} for each in MIXED)

Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors, int], Tensors]


def as_type(dtype: torch.dtype) -> Change:
    return lambda tensors, k: {key: tensor.to(dtype) for key, tensor in tensors.items()}


def rescaled(tensors: Tensors, k: int) -> Tensors:
    """(A c, B / c), with another c for every domain."""
    factor = (1e7, 1e-7, 1e20)[k]
    return {key: (t.double() * (factor if "lora_A" in key else 1 / factor)).float() for key, t in tensors.items()}


KINDS: dict[str, tuple[tuple[dict[str, Any], ...], Change]] = {
    "plain": (PLAIN, as_type(torch.float32)),
    "mixed ranks": (MIXED, as_type(torch.float32)),
    "rslora": (RS_LORA, as_type(torch.float32)),
    "patterns": (PATTERNS, as_type(torch.float32)),
    "fp16": (MIXED, as_type(torch.float16)),
    "bf16": (PATTERNS, as_type(torch.bfloat16)),
    "fp64": (MIXED, as_type(torch.float64)),
    "rescaled": (MIXED, rescaled),
    "unequal targets": (UNEQUAL, as_type(torch.float32)),
    "conv1d": (tuple({**each, "fan_in_fan_out": True} for each in MIXED), as_type(torch.float32)),
}


def model(conv: bool) -> torch.nn.Module:
    """Modules of zero weights at the paths of LAYOUT, so that a merged weight is Δ."""
    root = torch.nn.Module()
    for path, (width_out, width_in) in LAYOUT.items():
        *parents, name = path.split(".")
        place = root
        for parent in parents:
            if not hasattr(place, parent):
                place.add_module(parent, torch.nn.Module())
            place = cast(torch.nn.Module, getattr(place, parent))
        layer: Any = torch.nn.Linear(width_in, width_out, bias=False)
        if conv:
            layer = Conv1D(width_out, width_in)  # type: ignore[no-untyped-call]  # transformers leaves it untyped
        torch.nn.init.zeros_(layer.weight)
        place.add_module(name, layer)
    return root


def by_definition(folder: Path) -> Adapter:
    """The float64 factors of a folder; patterns match from the right, and a module that is not there is zero."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors, modules = load_file(folder / "adapter_model.safetensors"), {}
    for name, (width_out, width_in) in LAYOUT.items():
        if f"base_model.model.{name}.lora_A.weight" not in tensors:
            modules[name] = LoraModule(torch.zeros(1, width_in).double(), torch.zeros(width_out, 1).double(), 1.0)
            continue
        lora_A, lora_B = (
            tensors[f"base_model.model.{name}.{factor}.weight"].double() for factor in ("lora_A", "lora_B")
        )
        matching = [a for key, a in config["alpha_pattern"].items() if re.fullmatch(rf"(.*\.)?({key})", name)]
        alpha = (matching or [config["lora_alpha"]])[0]
        modules[name] = LoraModule(
            lora_A, lora_B, alpha / math.sqrt(len(lora_A)) if config["use_rslora"] else alpha / len(lora_A)
        )
    return Adapter(modules)


def unloaded(base: torch.nn.Module, folder: Path) -> Tensors:
    """Δ of every module, as PEFT merges it into the weights."""
    merged = PeftModel.from_pretrained(cast(PreTrainedModel, copy.deepcopy(base)), folder).merge_and_unload()
    weights = {name: merged.get_submodule(name).weight.detach() for name in LAYOUT}
    return {name: weight if weight.shape == LAYOUT[name] else weight.T for name, weight in weights.items()}


@pytest.fixture(scope="module", params=KINDS)
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Path]]:
    settings, change = KINDS[request.param]
    root, base = tmp_path_factory.mktemp("grid"), cast(PreTrainedModel, model(request.param == "conv1d"))
    made = {}
    for k, name in enumerate(NAMES):
        made[name] = save_with_peft(base, root / name, 10 + k, **{"target_modules": ["q", "v"], **settings[k]})
        file = made[name] / "adapter_model.safetensors"
        save_file({key: t.contiguous() for key, t in change(load_file(file), k).items()}, file)
    return request.param, made


@pytest.mark.parametrize("space", ["full", "core"])
def test_every_method_equals_its_definition(folders: tuple[str, dict[str, Path]], space: Any) -> None:
    kind, paths = folders
    read = read_folders(paths).adapters
    exact = {name: by_definition(path) for name, path in paths.items()}
    for method in TRAINING_FREE:
        found = merge_adapters(
            as_many_as(method, read), method, space=space, seed=4, **PARAMETERS.get(method, {})
        ).adapter
        for name in LAYOUT:
            (expected,) = oracle_of(method, as_many_as(method, exact), [name], space, seed=4)
            assert close(found.modules[name].delta_weight(), expected, 1e-5), (kind, method, name)


def test_linear_methods_equal_peft(folders: tuple[str, dict[str, Path]], tmp_path: Path) -> None:
    """Of the sources and of the written merge, both merged into the weights by PEFT."""
    kind, paths = folders
    base = model(kind == "conv1d")
    sources = read_folders(paths)
    alone = {name: unloaded(base, path) for name, path in paths.items()}
    linear = [name for name, row in METHODS.items() if row.coefficients is not None and name != "linear-by-layer"]
    for method in linear:
        merged = merge_adapters(sources.adapters, method, coefficients={"tents": -0.5})
        write_merge(merged, sources, tmp_path / method, None, {})
        found = unloaded(base, tmp_path / method)
        factor = 1 / 3 if method in ("average", "livar-style") else 0.5  # without signals
        for name in LAYOUT:
            terms = [(-0.5 if domain == "tents" else 1.0) * alone[domain][name].double() for domain in NAMES]
            expected = factor * torch.stack(terms).sum(0)
            assert close(found[name], expected, 1e-5), (kind, method, name)


def test_a_half_that_all_adapters_lack_is_refused(folders: tuple[str, dict[str, Path]], tmp_path: Path) -> None:
    _, paths = folders
    for name, path in paths.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text((path / "adapter_config.json").read_text())
        tensors = load_file(path / "adapter_model.safetensors")
        tensors.pop("base_model.model.encoder.block.0.q.lora_B.weight", None)
        save_file(tensors, tmp_path / name / "adapter_model.safetensors")
    with pytest.raises(LayoutMismatchError, match=r"module encoder\.block\.0\.q has no matrix pair"):
        read_folders({name: tmp_path / name for name in NAMES})
