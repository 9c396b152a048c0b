"""Adapters on disk and on a backbone: what PEFT writes and reads is what we read and write, to the number."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import layout_of, random_adapter, random_adapters
from backbones import tiny_bert, tiny_roberta
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from fedmerge.adapter import Adapter, LoraModule, adapter_sha256, layer_of
from fedmerge.device import resolve_compute
from fedmerge.encoder.backbone import Backbone, load_backbone
from fedmerge.encoder.encode import encode
from fedmerge.encoder.lora import adapter_of, applied, attach
from fedmerge.encoder.peft.folder import read_adapter, write_adapter
from fedmerge.errors import ConfigError, LayoutMismatchError
from fedmerge.merging.stack import linear_merge, stack_adapters

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
QUERY = "encoder.layer.0.attention.self.query"


@pytest.fixture(scope="module", params=[(tiny_bert, "mean"), (tiny_roberta, "cls")], ids=["bert", "roberta"])
def backbone_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    build, pooling = request.param
    return build(tmp_path_factory.mktemp("backbone")), pooling


@pytest.fixture
def backbone(backbone_folder: tuple[Path, str]) -> Backbone:
    """A fresh copy for each test: PEFT changes models in place."""
    return load_backbone(str(backbone_folder[0]), backbone_folder[1], resolve_compute("cpu", "float32"))


@pytest.fixture
def bert(tmp_path: Path) -> Backbone:
    return load_backbone(str(tiny_bert(tmp_path / "bert")), "mean", resolve_compute("cpu", "float32"))


def sequences(backbone: Backbone) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    special = backbone.special
    return [
        np.concatenate([special.prefix, rng.integers(7, 60, rng.integers(2, 20)), special.suffix]).astype(np.int32)
        for _ in range(12)
    ]


def uneven_adapter(backbone: Backbone) -> Adapter:
    """Every module of its own rank or scaling, so that rank_pattern and alpha_pattern are needed."""
    layout = layout_of(backbone)
    return Adapter(
        {
            name: random_adapter({name: shape}, 1 + number % 4, 0.25 + number % 3, number).modules[name]
            for number, (name, shape) in enumerate(sorted(layout.items()))
        }
    )


def even_adapter(backbone: Backbone) -> Adapter:
    return random_adapter(layout_of(backbone), 4, 2.0, 7)


def merged_adapter(backbone: Backbone) -> Adapter:
    stack = stack_adapters(random_adapters(layout_of(backbone)))
    coefficients = torch.tensor([[0.5, 0.0], [0.25, 0.0], [0.0, 1.5]])  # zeros make the ranks uneven
    return linear_merge(stack, coefficients)


MAKERS = [even_adapter, uneven_adapter, merged_adapter]


def with_model(backbone: Backbone, model: Any) -> Backbone:
    """The same encoder with PEFT's model in its place."""
    return dataclasses.replace(backbone, model=model)


def states(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


# Towards PEFT


@pytest.mark.parametrize("make", MAKERS)
def test_peft_loads_every_tensor_that_we_write_and_computes_the_same(
    backbone: Backbone, make: Callable[[Backbone], Adapter], tmp_path: Path
) -> None:
    adapter = make(backbone)
    alone = encode(backbone, sequences(backbone))
    with applied(backbone, adapter):
        ours = encode(backbone, sequences(backbone))
    write_adapter(adapter, tmp_path / "adapter", backbone.name)

    loaded = PeftModel.from_pretrained(backbone.model, tmp_path / "adapter")
    expected = load_file(tmp_path / "adapter" / TENSORS)
    found = get_peft_model_state_dict(loaded, save_embedding_layers=False)
    assert found.keys() == expected.keys()  # neither missing nor unexpected: a missing one would be drawn at random
    assert len(found) == 2 * len(adapter.modules)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    theirs = encode(with_model(backbone, loaded), sequences(backbone))
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)
    assert (ours - alone).abs().max() > 0.05  # the adapter does something


@pytest.mark.parametrize("make", MAKERS)
def test_written_adapters_are_read_back_exactly(
    backbone: Backbone, make: Callable[[Backbone], Adapter], tmp_path: Path
) -> None:
    adapter = make(backbone)
    before = adapter_sha256(adapter)
    write_adapter(adapter, tmp_path / "adapter", "some/backbone")
    found = read_adapter(tmp_path / "adapter")
    assert list(found.modules) == list(adapter.modules) == sorted(adapter.modules)
    for name, module in adapter.modules.items():
        assert torch.equal(found.modules[name].lora_A, module.lora_A)
        assert torch.equal(found.modules[name].lora_B, module.lora_B)
        assert found.modules[name].scaling == pytest.approx(module.scaling, rel=1e-15)
    assert adapter_sha256(adapter) == before
    assert sorted(os.listdir(tmp_path / "adapter")) == [CONFIG, TENSORS]
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert config["base_model_name_or_path"] == "some/backbone"
    assert [name for name in unlike(adapter.modules) if re.fullmatch(config["target_modules"], name)] == sorted(
        adapter.modules
    )


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("targets", [None, ("query", "dense"), r".*\.(query|dense)"], ids=["names", "short", "pattern"])
def test_peft_reads_the_configuration_that_it_would_write(
    bert: Backbone, make: Callable[[Backbone], Adapter], targets: tuple[str, ...] | str | None, tmp_path: Path
) -> None:
    adapter = make(bert)
    write_adapter(
        adapter, tmp_path, "some/backbone", task_type="CAUSAL_LM", target_modules=targets, fan_in_fan_out=True
    )
    written = json.loads((tmp_path / CONFIG).read_text())
    expected = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path="some/backbone",
        inference_mode=True,
        r=written["r"],
        lora_alpha=written["lora_alpha"],
        target_modules=list(targets) if isinstance(targets, tuple) else written["target_modules"],
        fan_in_fan_out=True,
        rank_pattern=written["rank_pattern"],
        alpha_pattern=written["alpha_pattern"],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT warns of keys that it does not know
        assert LoraConfig.from_pretrained(str(tmp_path)) == expected


def test_an_uneven_adapter_needs_its_patterns(bert: Backbone, tmp_path: Path) -> None:
    write_adapter(uneven_adapter(bert), tmp_path / "adapter", bert.name)
    path = tmp_path / "adapter" / CONFIG
    config = json.loads(path.read_text())
    assert config["rank_pattern"]
    assert config["alpha_pattern"]
    path.write_text(json.dumps({**config, "rank_pattern": {}}))
    ranks = {module.rank for module in uneven_adapter(bert).modules.values()}
    with pytest.raises(LayoutMismatchError, match=f"rank {config['r']}") as caught:
        read_adapter(tmp_path / "adapter")
    assert any(f"({rank}, 32)" in str(caught.value) for rank in ranks - {config["r"]})


# From PEFT


@pytest.mark.parametrize("use_rslora", [False, True])
def test_an_adapter_that_peft_wrote_is_read_with_its_patterns(
    backbone: Backbone, use_rslora: bool, tmp_path: Path
) -> None:
    config = LoraConfig(
        task_type=TaskType.FEATURE_EXTRACTION,
        r=3,
        lora_alpha=5,
        target_modules=["query", "intermediate.dense"],
        rank_pattern={"layer.1.attention.self.query": 2, r"\d+.intermediate.dense": 4},
        alpha_pattern={"query": 7, "encoder.layer.0.intermediate.dense": 0.5},
        use_rslora=use_rslora,
        init_lora_weights=False,
    )
    torch.manual_seed(0)
    model = get_peft_model(backbone.model, config)
    model.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    adapter = read_adapter(tmp_path / "adapter")
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    assert set(adapter.modules) == set(layers)
    assert {module.rank for module in adapter.modules.values()} == {2, 3, 4}
    for name, module in adapter.modules.items():
        delta: Any = layers[name]
        torch.testing.assert_close(module.delta_weight(), delta.get_delta_weight("default"), atol=1e-6, rtol=1e-6)
    assert len({module.scaling for module in adapter.modules.values()}) >= 3
    theirs = encode(with_model(backbone, model), sequences(backbone))
    model.unload()
    with applied(backbone, adapter):
        torch.testing.assert_close(encode(backbone, sequences(backbone)), theirs, atol=1e-5, rtol=0)


def unlike(names: Collection[str]) -> list[str]:
    """Names of modules, and of others that end or begin like them, or are equal but for a dot."""
    return sorted(
        {
            *names,
            *(f"decoder.{name}" for name in names),
            *(f"{name}.inner" for name in names),
            *(name.replace(".", "x") for name in names),
            *(name.rpartition(".")[2] for name in names),
        }
    )


def change_config(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**config, **values}))

    return change


def change_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / TENSORS)
        change(tensors)
        save_file(tensors, folder / TENSORS)

    return rewrite


KEY_A = f"base_model.model.{QUERY}.lora_A.weight"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda folder: (folder / CONFIG).unlink(), CONFIG),
    "no tensors": (lambda folder: (folder / TENSORS).unlink(), TENSORS),
    "config not JSON": (lambda folder: (folder / CONFIG).write_text("{"), "line 1"),
    "config not text": (lambda folder: (folder / CONFIG).write_bytes(b"\xff\xfe"), "0xff"),
    "tensors cut": (lambda folder: os.truncate(folder / TENSORS, 500), "header"),
    "tensors empty": (lambda folder: (folder / TENSORS).write_bytes(b""), "header"),
    "another method": (change_config(peft_type="IA3"), "'IA3'"),
    "DoRA": (change_config(use_dora=True), "use_dora = True"),
    "bias": (
        lambda folder: (
            change_config(bias="lora_only")(folder),
            change_tensors(lambda tensors: tensors.update({f"base_model.model.{QUERY}.bias": torch.zeros(32)}))(folder),
        ),
        f"trained biases ({QUERY}.bias)",
    ),
    "LoRA bias": (change_config(lora_bias=True), "lora_bias = True"),
    "more than one weight": (change_config(target_parameters=["experts"]), "target_parameters = ['experts']"),
    "PiSSA": (change_config(init_lora_weights="pissa_niter_4"), "init_lora_weights = 'pissa_niter_4'"),
    "pickled": (
        lambda folder: (folder / TENSORS).rename(folder / "adapter_model.bin"),
        "adapter_model.bin, expected adapter_model.safetensors",
    ),
    "whole modules": (change_config(modules_to_save=["pooler"]), "modules_to_save"),
    "another rank": (change_config(r=5), "rank 5"),
    "half a pair": (change_tensors(lambda tensors: tensors.pop(KEY_A)), QUERY),
    "a vector": (change_tensors(lambda tensors: tensors.update({KEY_A: torch.zeros(4)})), QUERY),
    "ranks that differ": (change_tensors(lambda tensors: tensors.update({KEY_A: torch.zeros(3, 32)})), "rank 4"),
    "a foreign tensor": (
        change_tensors(lambda tensors: tensors.update({"head.weight": torch.zeros(1)})),
        "'head.weight'",
    ),
    "no module": (change_tensors(lambda tensors: tensors.clear()), TENSORS),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_not_a_plain_lora_folder_is_refused_by_name(bert: Backbone, damage: str, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    write_adapter(even_adapter(bert), folder, bert.name)
    spoil, message = DAMAGES[damage]
    spoil(folder)
    with pytest.raises(LayoutMismatchError) as caught:
        read_adapter(folder)
    assert message in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    "config", ["[]", '{"peft_type": "LORA"}', '{"peft_type": "LORA", "r": 4, "lora_alpha": "much"}'], ids=str
)
def test_a_configuration_of_another_form_is_refused(bert: Backbone, config: str, tmp_path: Path) -> None:
    write_adapter(even_adapter(bert), tmp_path / "adapter", bert.name)
    (tmp_path / "adapter" / CONFIG).write_text(config)
    with pytest.raises(LayoutMismatchError):
        read_adapter(tmp_path / "adapter")


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LayoutMismatchError, match=r"gone.*adapter_config.json.*adapter_model.safetensors"):
        read_adapter(tmp_path / "gone")


def test_real_dora_is_refused(bert: Backbone, tmp_path: Path) -> None:
    config = LoraConfig(task_type=TaskType.FEATURE_EXTRACTION, r=2, target_modules=["query"], use_dora=True)
    get_peft_model(bert.model, config).save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    with pytest.raises(LayoutMismatchError, match="use_dora"):
        read_adapter(tmp_path / "adapter")


# On a backbone


def test_applied_adds_delta_and_restores_the_exact_weights(backbone: Backbone) -> None:
    before = states(backbone.model)
    adapter = uneven_adapter(backbone)
    digest = adapter_sha256(adapter)
    with applied(backbone, adapter):
        inside = states(backbone.model)
        for name, module in adapter.modules.items():
            wanted = before[f"{name}.weight"] + module.scaling * module.lora_B @ module.lora_A
            torch.testing.assert_close(inside[f"{name}.weight"], wanted, atol=1e-6, rtol=1e-6)
        changed = {name for name in before if not torch.equal(before[name], inside[name])}
        assert changed == {f"{name}.weight" for name in adapter.modules}
    assert_unchanged(backbone.model, before)
    assert adapter_sha256(adapter) == digest


def test_applied_restores_after_an_exception_and_when_nested(backbone: Backbone) -> None:
    before = states(backbone.model)
    adapter = even_adapter(backbone)

    def fail_inside() -> None:
        with applied(backbone, adapter), applied(backbone, uneven_adapter(backbone)):
            raise KeyError("on the way")

    with pytest.raises(KeyError, match="on the way"):
        fail_inside()
    assert_unchanged(backbone.model, before)


def test_applied_none_is_the_backbone_alone(backbone: Backbone) -> None:
    before = states(backbone.model)
    with applied(backbone, None):
        assert_unchanged(backbone.model, before)


@pytest.mark.parametrize(
    ("name", "shape", "found"),
    [
        ("encoder.layer.9.attention.self.query", (32, 32), "nothing"),
        ("encoder.layer.1.attention.self.value", (64, 32), "Linear"),
        ("embeddings.word_embeddings", (32, 32), "Embedding"),
    ],
)
def test_an_adapter_of_another_backbone_is_refused_and_nothing_stays_changed(
    bert: Backbone, name: str, shape: tuple[int, int], found: str
) -> None:
    before = states(bert.model)
    good = random_adapter({QUERY: (32, 32)}, 2, 1.0, 0)
    bad = random_adapter({name: shape}, 2, 1.0, 0)
    both = Adapter({**good.modules, **bad.modules})
    with pytest.raises(LayoutMismatchError, match=rf"{name}.*{found}"), applied(bert, both):
        pass
    assert_unchanged(bert.model, before)


def test_attach_starts_from_the_backbone_and_leaves_no_trace(backbone: Backbone) -> None:
    before = states(backbone.model)
    alone = encode(backbone, sequences(backbone))
    model = attach(backbone, ("query", "value"), 4, 8, seed=0)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    adapter = adapter_of(model)
    assert torch.equal(encode(backbone, sequences(backbone)), alone)  # B is zero
    model.unload()
    assert_unchanged(backbone.model, before)
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())

    assert len(trainable) == 2 * len(adapter.modules) == 8
    assert all("lora_" in name for name in trainable)
    for name, module in adapter.modules.items():
        assert name.endswith((".query", ".value"))
        assert (module.rank, module.scaling) == (4, 2.0)
        assert not module.lora_B.any()
        bound = 32**-0.5
        assert 0.8 * bound < module.lora_A.abs().max() <= bound
        assert abs(module.lora_A.mean()) < 0.2 * bound
    assert len({module.lora_A.sum().item() for module in adapter.modules.values()}) == 4  # each its own draw


def test_all_linear_means_every_linear_layer(backbone: Backbone) -> None:
    linear = {name for name, module in backbone.model.named_modules() if isinstance(module, torch.nn.Linear)}
    model = attach(backbone, ("all-linear",), 2, 2, seed=0)
    assert set(adapter_of(model).modules) == linear
    model.unload()


def test_unknown_targets_are_refused_before_anything_is_changed(bert: Backbone) -> None:
    before = states(bert.model)
    with pytest.raises(ConfigError, match=r"'q_proj'.* query.*all-linear"):
        attach(bert, ("query", "q_proj"), 2, 2, seed=0)
    with pytest.raises(ConfigError, match="'uery'"):  # whole names only
        attach(bert, ("uery",), 2, 2, seed=0)
    assert_unchanged(bert.model, before)


ATTACH = """
import sys
import torch
torch.set_num_threads(1)
torch.manual_seed({noise})
from fedmerge.device import resolve_compute
from fedmerge.encoder.backbone import load_backbone
from fedmerge.adapter import adapter_sha256
from fedmerge.encoder.lora import adapter_of, attach
backbone = load_backbone(sys.argv[1], "mean", resolve_compute("cpu", "float32"))
print(adapter_sha256(adapter_of(attach(backbone, ("value", "query"), 4, 8, seed=5))))
"""


@pytest.mark.long
def test_every_process_starts_from_the_same_adapter(tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path / "bert")

    def digest(seed: int) -> str:
        backbone = load_backbone(str(folder), "mean", resolve_compute("cpu", "float32"))
        torch.manual_seed(seed)  # the global generator has no say
        return adapter_sha256(adapter_of(attach(backbone, ("query", "value"), 4, 8, seed=seed % 10)))

    elsewhere = subprocess.run(
        [sys.executable, "-c", ATTACH.format(noise=99), str(folder)],
        env={**os.environ, "PYTHONHASHSEED": "12345"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert digest(5) == digest(15) == elsewhere.stdout.split()[-1]
    assert digest(6) != digest(5)


# Small things


def test_delta_weight_by_hand() -> None:
    module = LoraModule(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [0.0], [-1.0]]), 0.5)
    assert module.rank == 1
    assert module.delta_weight().tolist() == [[1.5, 3.0], [0.0, 0.0], [-0.5, -1.0]]
    assert Adapter({"a": module}).size_bytes == 5 * 4


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("encoder.layer.3.attention.self.query", "encoder.layer.3"),
        ("layers.11.mlp.down_proj", "layers.11"),
        ("pooler.dense", None),
        ("h2.proj", None),
        ("blocks.2.experts.7.up", "blocks.2"),
        ("decoder.block.0.layer.1.EncDecAttention.q", "decoder.block.0"),
        ("vision_model.encoder.layers.11.self_attn.q_proj", "vision_model.encoder.layers.11"),
        ("0.auto_model.encoder.layer.3.output.dense", "0.auto_model.encoder.layer.3"),
        ("0", "0"),
        ("1.linear", "1"),
        ("transformer.h.10", "transformer.h.10"),
    ],
)
def test_layer_of(name: str, layer: str | None) -> None:
    assert layer_of(name) == layer


def test_the_hash_sees_names_values_shapes_and_scalings() -> None:
    lora_A, lora_B = torch.arange(4.0).reshape(2, 2), torch.ones(2, 2)
    adapter = Adapter({"b": LoraModule(lora_A, lora_B, 1.0), "a": LoraModule(lora_A, lora_B, 2.0)})
    reordered = Adapter(dict(reversed(list(adapter.modules.items()))))
    assert adapter_sha256(adapter) == adapter_sha256(reordered)
    moved = lora_A.clone()
    moved[1, 1] = torch.nextafter(moved[1, 1], torch.tensor(9.0))
    others = [
        Adapter({"b": adapter.modules["b"], "c": adapter.modules["a"]}),
        Adapter({"b": adapter.modules["b"], "a": LoraModule(lora_A, lora_B, 2.0000001)}),
        Adapter({"b": adapter.modules["b"], "a": LoraModule(moved, lora_B, 2.0)}),
        Adapter({"b": adapter.modules["b"], "a": LoraModule(lora_A.reshape(1, 4), lora_B, 2.0)}),
        Adapter({"b": adapter.modules["b"]}),
    ]
    assert len({adapter_sha256(other) for other in [adapter, *others]}) == 1 + len(others)
