"""Training-free merges beside peft's own, on adapters that peft made: BERT-like and Llama-like."""

import copy
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from adapters import as_many_as, save_with_peft
from backbones import bert_for_peft, llama_config
from peft import PeftModel
from transformers import LlamaModel, PreTrainedModel

from fedmerge.adapter import Adapter
from fedmerge.encoder.peft.folder import read_adapter, write_adapter
from fedmerge.merging.methods import METHODS
from fedmerge.merging.stack import stack_adapters
from fedmerge.merging.training_free import merge_adapters

TRAINING_FREE = [name for name, row in METHODS.items() if not row.learned]
SETTINGS: dict[str, dict[str, Any]] = {
    "a": {"r": 3, "lora_alpha": 6},
    "b": {"r": 2, "lora_alpha": 3, "use_rslora": True, "alpha_pattern": {r"(layer|layers)\.1\..*": 5}},
    "c": {"r": 4, "lora_alpha": 4, "rank_pattern": {"query": 1, "q_proj": 1}},
}


def llama() -> PreTrainedModel:
    return cast(PreTrainedModel, LlamaModel(llama_config()))


@pytest.fixture(
    scope="module",
    params=[
        (bert_for_peft, ["query", "value"]),
        (llama, ["q_proj", "v_proj"]),
        (llama, r".*layers\.\d+\.self_attn\.(q|v)_proj"),
    ],
    ids=["bert", "llama", "llama-regex"],
)
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PreTrainedModel, dict[str, Path]]:
    build, targets = request.param
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build().train(False)
    root = tmp_path_factory.mktemp("adapters")
    return model, {
        name: save_with_peft(model, root / name, seed, target_modules=targets, **settings)
        for seed, (name, settings) in enumerate(SETTINGS.items())
    }


def peft_merge(model: PreTrainedModel, folders: dict[str, Path], weights: list[float], **options: Any) -> Any:
    """Module name -> Δ of peft's merge."""
    names = list(folders)
    wrapped = PeftModel.from_pretrained(copy.deepcopy(model), folders[names[0]], adapter_name=names[0])
    for name in names[1:]:
        wrapped.load_adapter(folders[name], adapter_name=name)
    wrapped.add_weighted_adapter(names, weights, "merged", svd_full_matrices=False, **options)
    return {
        name.removeprefix("base_model.model."): layer.get_delta_weight("merged")
        for name, layer in wrapped.named_modules()
        if hasattr(layer, "get_delta_weight")
    }


def agrees(found: Adapter, expected: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert found.modules.keys() == expected.keys()
    for name, delta in expected.items():
        error = torch.linalg.norm(found.modules[name].delta_weight() - delta)
        assert error <= tolerance * torch.linalg.norm(delta), name


@pytest.mark.parametrize("space", ["full", "core"])
def test_linear_merges_equal_peft(made: tuple[PreTrainedModel, dict[str, Path]], space: Any) -> None:
    model, folders = made
    adapters = {name: read_adapter(folder) for name, folder in folders.items()}
    weights = {"a": 0.3, "b": -0.7, "c": 1.1}
    for method, factor in (("average", 1 / 3), ("task-arithmetic", 0.5), ("knots-task-arithmetic", 0.5)):
        merged = merge_adapters(adapters, method, coefficients=weights, space=space).adapter
        scaled = [factor * weight for weight in weights.values()]
        agrees(merged, peft_merge(model, folders, scaled, combination_type="cat"))
        agrees(merged, peft_merge(model, folders, scaled, combination_type="svd", svd_rank=12))


def test_elementwise_merges_equal_peft_where_the_definitions_agree(
    made: tuple[PreTrainedModel, dict[str, Path]],
) -> None:
    model, folders = made
    adapters = {name: read_adapter(folder) for name, folder in folders.items()}
    equal = [1.0] * 3  # peft weighs after the election, fedmerge before it
    for density in (0.25, 0.5):  # whole numbers of entries
        found = merge_adapters(adapters, "ties", density=density).adapter
        agrees(found, peft_merge(model, folders, equal, combination_type="ties_svd", svd_rank=24, density=density))
        found = merge_adapters(adapters, "breadcrumbs", drop_smallest=1 - density, drop_largest=0.0).adapter
        options = {"combination_type": "magnitude_prune_svd", "svd_rank": 24, "density": density}
        agrees(found, peft_merge(model, folders, equal, **options))
    with pytest.warns(UserWarning, match="no pruning"):
        thirds = peft_merge(model, folders, [1 / 3] * 3, combination_type="dare_linear_svd", svd_rank=24, density=1.0)
    agrees(merge_adapters(adapters, "dare", density=1.0).adapter, thirds)
    with pytest.warns(UserWarning, match="no pruning"):
        whole = peft_merge(model, folders, equal, combination_type="dare_ties_svd", svd_rank=24, density=1.0)
    agrees(merge_adapters(adapters, "dare-ties", density=1.0).adapter, whole)


@pytest.mark.parametrize("method", TRAINING_FREE)
def test_peft_loads_every_merge(made: tuple[PreTrainedModel, dict[str, Path]], method: str, tmp_path: Path) -> None:
    model, folders = made
    adapters = {name: read_adapter(folder) for name, folder in folders.items()}
    merged = merge_adapters(as_many_as(method, adapters), method).adapter
    write_adapter(merged, tmp_path / "merged", "tiny")
    loaded = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "merged").train(False)
    dense = copy.deepcopy(model)
    for name, module in merged.modules.items():
        layer = cast(torch.nn.Linear, dense.get_submodule(name))
        layer.weight.data = layer.weight.data + module.delta_weight()
    ids = torch.tensor([[3, 17, 5, 29, 8]])
    with torch.no_grad():
        found, expected, before = (each(ids).last_hidden_state for each in (loaded, dense, model))
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(before, expected, atol=1e-3)


def test_decoder_layers_are_scopes(made: tuple[PreTrainedModel, dict[str, Path]]) -> None:
    _, folders = made
    adapters = {name: read_adapter(folder) for name, folder in folders.items()}
    assert stack_adapters(adapters).groups == ("layer 0", "layer 1")
    ranks = {name: module.rank for name, module in adapters["c"].modules.items()}
    assert sorted(ranks.values()) == [1, 1, 4, 4]
    by_scope = [merge_adapters(adapters, "ties", scope=scope).adapter for scope in ("tensor", "layer", "model")]
    name = next(iter(ranks))
    deltas = [adapter.modules[name].delta_weight() for adapter in by_scope]
    assert not torch.allclose(deltas[0], deltas[1])
    assert not torch.allclose(deltas[1], deltas[2])
