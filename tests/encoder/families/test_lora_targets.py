"""LoRA on the layers of a family by name, their groups in merges, and rank-stabilised scaling."""

from pathlib import Path

import pytest
import torch
from adapters import random_adapter
from peft import LoraConfig, get_peft_model
from pydantic import ValidationError
from tiny_families import TINY, layout_of_linear, llama
from transformers import AutoModel, GPT2Config, GPT2Model

from fedmerge.adapter import layer_of
from fedmerge.backbone_files import LINEAR_LAYERS, missing_target_modules, target_layers
from fedmerge.config import BackboneSection, Lora
from fedmerge.device import resolve_compute
from fedmerge.encoder.backbone import Backbone, open_backbone
from fedmerge.encoder.lora import adapter_of, attach, fresh_adapter, load_into
from fedmerge.encoder.peft.folder import read_adapter, write_adapter
from fedmerge.errors import ConfigError
from fedmerge.merging.stack import linear_merge, stack_adapters

FLOAT32 = resolve_compute("cpu", "float32")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: tiny.write(tmp_path_factory.mktemp(name)) for name, tiny in TINY.items()}


def backbone_in(folder: Path) -> Backbone:
    return open_backbone(BackboneSection(source=str(folder)), FLOAT32)


def modules_of(backbone: Backbone, *targets: str) -> set[str]:
    return {*fresh_adapter(backbone, Lora(rank=2, target_modules=targets), 0).modules}


@pytest.mark.parametrize("name", TINY)
def test_the_groups_are_the_layers_that_their_names_say(name: str, folders: dict[str, Path]) -> None:
    backbone, tiny = backbone_in(folders[name]), TINY[name]
    every = {key for key, module in backbone.model.named_modules() if isinstance(module, torch.nn.Linear)}
    attention, mlp = modules_of(backbone, "attention"), modules_of(backbone, "mlp")
    for found, ends in ((attention, tiny.attention), (mlp, tiny.mlp)):
        assert len(found) == 2 * len(ends)  # two layers
        assert all(key.endswith(tuple(f".{end}" for end in ends)) for key in found)
    assert not attention & mlp
    assert attention | mlp == modules_of(backbone, "attention", "mlp") == modules_of(backbone, "all-linear") == every
    first = tiny.attention[0]
    assert modules_of(backbone, first, "mlp") == mlp | modules_of(backbone, first)
    assert {layer_of(key) for key in every} in ({"encoder.layer.0", "encoder.layer.1"}, {"layers.0", "layers.1"})


@pytest.mark.parametrize("name", TINY)
def test_files_show_what_is_missing_without_loading_the_model(name: str, folders: dict[str, Path]) -> None:
    assert missing_target_modules(folders[name], ("attention", "mlp", TINY[name].attention[0])) == []
    assert missing_target_modules(folders[name], ("mlp", "no_such")) == ["no_such"]


def test_the_layers_of_an_unknown_model_type_must_be_named(folders: dict[str, Path], tmp_path: Path) -> None:
    GPT2Model(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"'mlp': the layers of a model of type 'gpt2' are not known .*all-linear"):
        missing_target_modules(tmp_path, ("mlp",))
    with pytest.raises(ConfigError, match=r"has no linear layer 'query'. It has: .*q_proj"):
        attach(backbone_in(folders["llama"]), ("query", "mlp"), 2, 4, 0)


def test_every_row_of_the_table_has_both_groups_and_no_layer_in_both() -> None:
    for model_type, groups in LINEAR_LAYERS.items():
        assert groups.keys() == {"attention", "mlp"}
        names = [f"layers.0.{end}" for ends in groups.values() for end in ends]
        found = target_layers(names, ("attention", "mlp"), model_type)
        assert sorted(found["attention"] + found["mlp"]) == sorted({*names})


# rsLoRA


@pytest.mark.parametrize("rank", [1, 3, 8, 12])
def test_rank_stabilised_scaling_is_that_of_peft(rank: int, folders: dict[str, Path], tmp_path: Path) -> None:
    backbone, lora = backbone_in(folders["llama"]), Lora(rank=rank, alpha=5, variant="rslora", target_modules=("mlp",))
    ours = fresh_adapter(backbone, lora, 0)
    config = LoraConfig(r=rank, lora_alpha=5, use_rslora=True, target_modules=["gate_proj", "up_proj", "down_proj"])
    theirs = adapter_of(get_peft_model(AutoModel.from_pretrained(folders["llama"]), config))
    assert ours.modules.keys() == theirs.modules.keys()
    for name, module in ours.modules.items():
        assert module.scaling == pytest.approx(theirs.modules[name].scaling, rel=1e-12)
    write_adapter(ours, tmp_path, "x")
    again = read_adapter(tmp_path)
    assert [each.scaling for each in again.modules.values()] == [each.scaling for each in ours.modules.values()]


def test_the_scaling_survives_a_folder_for_every_rank(tmp_path: Path) -> None:
    layout = {"layers.0.q_proj": (4, 4)}
    for rank in range(1, 257):
        lora = Lora(rank=rank, alpha=16, variant="rslora")
        scaling = lora.scaled_alpha / rank
        assert scaling * rank / rank == scaling
    write_adapter(random_adapter(layout, 7, Lora(rank=7, variant="rslora").scaled_alpha / 7, 0), tmp_path, "x")
    assert read_adapter(tmp_path).modules["layers.0.q_proj"].scaling == Lora(rank=7, variant="rslora").scaled_alpha / 7


def test_a_merge_of_rank_stabilised_adapters_is_the_sum_of_their_updates(folders: dict[str, Path]) -> None:
    backbone = backbone_in(folders["llama"])
    layout = {name: shape for name, shape in layout_of_linear(backbone.model).items() if name.endswith("down_proj")}
    scalings = [Lora(rank=rank, variant="rslora").scaled_alpha / rank for rank in (2, 3)]
    adapters = {
        str(rank): random_adapter(layout, rank, scaling, rank) for rank, scaling in zip((2, 3), scalings, strict=True)
    }
    merged = linear_merge(stack_adapters(adapters), torch.tensor([0.5, 0.25]))
    for name, module in merged.modules.items():
        wanted = 0.5 * adapters["2"].modules[name].delta_weight() + 0.25 * adapters["3"].modules[name].delta_weight()
        torch.testing.assert_close(module.delta_weight(), wanted, atol=1e-5, rtol=1e-5)


def test_ranks_of_domains_keep_alpha_under_rank_stabilisation() -> None:
    lora = Lora(rank=8, alpha=16, variant="rslora", ranks=("books=2",))
    assert lora.of("books").scaled_alpha / 2 == pytest.approx(16 / 2**0.5)
    assert lora.of("toys").scaled_alpha / 8 == pytest.approx(16 / 8**0.5)
    plain = Lora(rank=8, alpha=16, ranks=("books=2",))
    assert plain.of("books").scaled_alpha / 2 == plain.scaled_alpha / 8 == 2


def test_dora_is_refused_with_the_reason() -> None:
    with pytest.raises(ValidationError, match=r"'dora' is not B A alone: its magnitudes .* take 'lora' or 'rslora'"):
        Lora.model_validate({"variant": "dora"})


def test_the_attached_scaling_can_be_loaded_into_again(folders: dict[str, Path], tmp_path: Path) -> None:
    backbone = open_backbone(BackboneSection(source=str(llama(tmp_path))), FLOAT32)
    lora = Lora(rank=6, variant="rslora", target_modules=("attention",))
    adapter = fresh_adapter(backbone, lora, 0)
    like = next(iter(adapter.modules.values()))
    model = attach(backbone, lora.target_modules, like.rank, like.rank * like.scaling, 1)
    load_into(model, adapter)
    assert adapter_of(model).modules.keys() == adapter.modules.keys()
