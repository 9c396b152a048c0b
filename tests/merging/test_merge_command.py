"""``fedmerge merge`` on any PEFT LoRA folders: BERT-like and Llama-like, made by peft, merged, loaded by peft."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from adapters import save_with_peft
from backbones import bert_for_peft, llama_config
from peft import PeftModel, TaskType
from run_folders import output, refusal
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM
from transformers import PreTrainedModel as Model

from fedmerge.adapter import adapter_sha256
from fedmerge.cli.adapters.merge import PARAMETERS
from fedmerge.encoder.peft.folder import read_adapter
from fedmerge.merging.methods import METHODS
from fedmerge.merging.training_free import merge_adapters

Capsys = pytest.CaptureFixture[str]
TRAINING_FREE = [name for name, row in METHODS.items() if not row.learned]
UNEQUAL: dict[str, dict[str, Any]] = {
    "law": {"r": 3, "lora_alpha": 6, "rank_pattern": {r"(layer|layers)\.1\..*": 2}},
    "medicine": {"r": 4, "lora_alpha": 3, "use_rslora": True, "alpha_pattern": {r"(layer|layers)\.0\..*": 5}},
}


def llama() -> Model:
    return cast(Model, LlamaForCausalLM(llama_config()))


def wide() -> Model:
    config = llama_config()
    config.hidden_size *= 2
    return cast(Model, LlamaForCausalLM(config))


def gpt2() -> Model:
    return cast(Model, GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=24, n_layer=2, n_head=2, n_positions=16)))


def seeded(build: Callable[[], Model]) -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build()
        model.train(False)
    for name, parameter in model.named_parameters():  # so that an update can be seen in the output
        if parameter.ndim == 2 and "embed" not in name:
            torch.nn.init.xavier_uniform_(parameter, generator=torch.Generator().manual_seed(1))
    return model


def changed(folder: Path, **settings: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


KINDS: dict[str, tuple[Callable[[], Model], dict[str, Any]]] = {
    "bert": (bert_for_peft, {"target_modules": ["query", "value"], "task_type": TaskType.FEATURE_EXTRACTION}),
    "llama": (llama, {"target_modules": ["q_proj", "v_proj"], "task_type": TaskType.CAUSAL_LM}),
    "gpt2": (gpt2, {"target_modules": ["c_attn"], "task_type": TaskType.CAUSAL_LM, "fan_in_fan_out": True}),
}
Made = tuple[Model, dict[str, Path]]


def make(kind: str, root: Path) -> Made:
    build, settings = KINDS[kind]
    model = seeded(build)
    folders = {}
    for seed, (name, own) in enumerate(UNEQUAL.items()):
        folders[name] = save_with_peft(model, root / name, seed, **settings, **own)
        changed(folders[name], base_model_name_or_path=f"tiny/{kind}")
    return model, folders


@pytest.fixture(scope="module", params=KINDS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def llamas(tmp_path: Path) -> dict[str, Path]:
    return make("llama", tmp_path / "llamas")[1]


def of(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([[3, 17, 5, 29, 8]]))[0]
    return found


def dense_oracle(model: Model, folders: dict[str, Path], factors: dict[str, float]) -> Model:
    """Σ factor · Δ on the weights, Δ read off peft's own layers."""
    dense = copy.deepcopy(model)
    for name, folder in folders.items():
        loaded = PeftModel.from_pretrained(copy.deepcopy(model), folder)
        for module, layer in loaded.named_modules():
            if hasattr(layer, "get_delta_weight"):
                weight = cast(Any, dense.get_submodule(module.removeprefix("base_model.model."))).weight
                weight.data += factors[name] * layer.get_delta_weight("default")
    return dense


def test_a_merge_through_peft_is_the_dense_one(made: Made, tmp_path: Path, capsys: Capsys) -> None:
    model, folders = made
    out = tmp_path / "merged"
    flags = ("--method", "average", "--coefficients", "3,1", "--out", out)
    shown = output(capsys, "merge", *flags, *folders.values())
    loaded = PeftModel.from_pretrained(copy.deepcopy(model), out).train(False)
    expected = dense_oracle(model, folders, {"law": 1.5, "medicine": 0.5})
    assert torch.allclose(of(loaded), of(expected), atol=1e-4)
    assert not torch.allclose(of(model), of(expected), atol=1e-2)

    theirs = json.loads((folders["law"] / "adapter_config.json").read_text())
    config = json.loads((out / "adapter_config.json").read_text())
    for key in ("base_model_name_or_path", "task_type", "fan_in_fan_out"):
        assert config[key] == theirs[key]
    assert sorted(config["target_modules"]) == sorted(theirs["target_modules"])
    assert isinstance(config["lora_alpha"], int)
    tensors = [load_file(folder / "adapter_model.safetensors") for folder in (out, folders["law"])]
    assert tensors[0].keys() == tensors[1].keys()  # prefixes of peft and of the model's class included
    assert type(loaded).__name__.removeprefix("PeftModelFor") in {"FeatureExtraction", "CausalLM"}

    record = json.loads((out / "provenance.json").read_text())
    adapters = {name: read_adapter(folder) for name, folder in folders.items()}
    assert record["domains"] == {name: adapter_sha256(adapter) for name, adapter in adapters.items()}
    assert (record["method"], record["coefficients"]) == ("average", {"law": 3.0, "medicine": 1.0})
    assert record["sha256"] == adapter_sha256(read_adapter(out))
    assert record["residuals"].keys() == adapters["law"].modules.keys()
    assert set(record["residuals"].values()) == {0.0}
    for name in adapters["law"].modules:
        assert re.search(rf"^ +\d+ +0.0000  {re.escape(name)}$", shown, re.M)


@pytest.mark.parametrize("method", TRAINING_FREE)
def test_every_method_merges_a_decoder_s_adapters(
    method: str, llamas: dict[str, Path], tmp_path: Path, capsys: Capsys
) -> None:
    shown = output(
        capsys, "merge", "--method", method, "--output-rank", "4", "--out", tmp_path / "out", *llamas.values()
    )
    wanted = merge_adapters({name: read_adapter(folder) for name, folder in llamas.items()}, method, output_rank=4)
    assert adapter_sha256(read_adapter(tmp_path / "out")) == adapter_sha256(wanted.adapter)
    record = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert record["residuals"] == wanted.residuals
    assert record["output_rank"] == 4
    assert max(wanted.residuals.values()) > 0.01
    for name, residual in wanted.residuals.items():
        assert f"{residual:.4f}  {name}\n" in shown
    model = PeftModel.from_pretrained(seeded(llama), tmp_path / "out").train(False)
    assert not torch.allclose(of(model), of(seeded(llama)), atol=1e-3)


def test_the_flags_are_the_parameters(llamas: dict[str, Path], tmp_path: Path, capsys: Capsys) -> None:
    assert set(PARAMETERS) == {name for method in TRAINING_FREE for name in METHODS[method].parameters}
    flags = [
        "--density",
        "0.5",
        "--ties-density",
        "0.7",
        "--coefficient",
        "0.8",
        "--seed",
        "3",
        "--scope",
        "model",
        "--space",
        "core",
    ]
    output(capsys, "merge", *llamas.values(), "--method", "dare-ties", *flags, "--out", tmp_path / "out")
    adapters = {name: read_adapter(folder) for name, folder in llamas.items()}
    wanted = merge_adapters(
        adapters, "dare-ties", scope="model", space="core", seed=3, density=0.5, ties_density=0.7, coefficient=0.8
    )
    assert adapter_sha256(read_adapter(tmp_path / "out")) == adapter_sha256(wanted.adapter)
    record = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert record["parameters"] == {"density": 0.5, "ties_density": 0.7, "coefficient": 0.8}
    assert {key: record[key] for key in wanted.settings} == wanted.settings
    assert (record["run"], record["excluded"]) == (None, {})


def test_who_has_coefficient_zero_or_is_excluded_is_absent(
    llamas: dict[str, Path], tmp_path: Path, capsys: Capsys
) -> None:
    third = save_with_peft(seeded(llama), tmp_path / "code", 7, r=2, **KINDS["llama"][1])
    changed(third, base_model_name_or_path="tiny/llama")
    sources: list[str | Path] = [*llamas.values(), f"third={third}"]
    shas = set()
    for number, absent in enumerate((["--coefficients", "third=0"], ["--exclude", "third"])):
        out = tmp_path / f"out {number}"
        assert "without third" in output(capsys, "merge", *sources, "--method", "ties", "--out", out, *absent)
        record = json.loads((out / "provenance.json").read_text())
        assert list(record["domains"]) == ["law", "medicine"]
        assert list(record["excluded"]) == ["third"]
        shas.add(record["sha256"])
    assert len(shas) == 1


def test_target_modules_that_more_settings_narrow_are_written_one_by_one(tmp_path: Path, capsys: Capsys) -> None:
    model, settings = seeded(llama), KINDS["llama"][1]
    folders = [
        save_with_peft(model, tmp_path / name, 1, r=2, layers_to_transform=[1], **settings) for name in ("a", "b")
    ]
    output(capsys, "merge", "--method", "average", "--out", tmp_path / "out", *folders)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    names = [f"model.layers.1.self_attn.{part}_proj" for part in ("q", "v")]
    assert config["target_modules"] == f"^({'|'.join(map(re.escape, names))})$"
    loaded = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "out")
    assert not any("layers.0" in name for name, _ in loaded.named_modules() if name.endswith("lora_A"))


def nan(folder: Path) -> Path:
    tensors = load_file(folder / "adapter_model.safetensors")
    key = sorted(tensors)[0]
    tensors[key][0, 0] = torch.nan
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


SPOILED: dict[str, tuple[Callable[[Path], Path], str]] = {  # values that the message has, as a pattern
    "DoRA": (lambda folder: changed(folder, use_dora=True), "medicine.*use_dora = True"),
    "LoRA bias": (lambda folder: changed(folder, lora_bias=True), "medicine.*lora_bias = True"),
    "head": (lambda folder: changed(folder, modules_to_save=["lm_head"]), r"medicine.*modules_to_save = \['lm_head'\]"),
    "not LoRA": (lambda folder: changed(folder, peft_type="IA3"), "medicine.*'IA3'.*'LORA'"),
    "NaN": (nan, "medicine: 1 of [0-9]+ .*lora_A"),
    "base model": (
        lambda folder: changed(folder, base_model_name_or_path="other"),
        "base_model_name_or_path.*law 'tiny/llama', medicine 'other'.*--base-model",
    ),
    "task": (
        lambda folder: changed(folder, task_type="SEQ_CLS"),
        "task_type.*law 'CAUSAL_LM', medicine 'SEQ_CLS'.*adapter_config.json",
    ),
    "shapes": (
        lambda folder: save_with_peft(seeded(wide), folder, 1, target_modules=["q_proj"], r=2, task_type="CAUSAL_LM"),
        r"'medicine'.*model\.layers\.0\.self_attn\.q_proj",
    ),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_adapters_that_cannot_be_merged_are_refused_by_name(
    kind: str, llamas: dict[str, Path], tmp_path: Path, capsys: Capsys
) -> None:
    spoil, values = SPOILED[kind]
    spoil(llamas["medicine"])
    assert re.search(values, refusal(capsys, "merge", "--method", "ties", "--out", tmp_path / "out", *llamas.values()))
    assert not (tmp_path / "out").exists()


def test_one_base_model_of_two_names(llamas: dict[str, Path], tmp_path: Path, capsys: Capsys) -> None:
    changed(llamas["medicine"], base_model_name_or_path="/models/llama")
    named = ("--method", "average", "--base-model", "tiny/llama")
    output(capsys, "merge", *named, "--out", tmp_path / "out", *llamas.values())
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny/llama"


def test_wrong_settings_are_refused_with_a_remedy(llamas: dict[str, Path], tmp_path: Path, capsys: Capsys) -> None:
    out, both = ("--out", tmp_path / "out"), tuple(llamas.values())
    ties = ("--method", "ties")
    cases: list[tuple[str, tuple[Any, ...]]] = [  # values that the message has, as a pattern
        (str(both[0]), (both[0], *ties, *out)),
        ("gone", (*both, tmp_path / "gone", *ties, *out)),
        ("adapter_config.json", (both[0], tmp_path, *ties, *out)),
        ("--method.*`fedmerge methods`", (*both, *out)),
        ("--out", (*both, *ties)),
        ("'magic'.*adamerging, average, breadcrumbs", (*both, "--method", "magic", *out)),
        ("'mergerec'", (*both, "--method", "mergerec", *out)),
        (r"density.*1\.5.*0\.0.*1\.0", (*both, *ties, "--density", "1.5", *out)),
        ("density.*nan", (*both, *ties, "--density", "nan", *out)),
        ("clamp.*density, coefficient", (*both, *ties, "--clamp", "0.1", *out)),
        ("'iso-c'.*'layer'.*'tensor'", (*both, "--method", "iso-c", "--scope", "layer", *out)),
        ("output_rank.*'half'.*'exact'", (*both, *ties, "--output-rank", "half", *out)),
        ("--coefficients.*'1,2,3'.*NAME=X,….* 2 .*law", (*both, *ties, "--coefficients", "1,2,3", *out)),
        ("--coefficients.*'law=1,2'", (*both, *ties, "--coefficients", "law=1,2", *out)),
        ("coefficients.*code", (*both, *ties, "--coefficients", "code=1", *out)),
        ("coefficient 0", (*both, *ties, "--coefficients", "0,0", *out)),
        ("--set.*--method", (*both, *ties, *out, "--set", "seed=1")),
        ("'two words'", (both[0], f"two words={both[1]}", *ties, *out)),
        ("--exclude code", (*both, *ties, *out, "--exclude", "code")),
        (str(tmp_path / "llamas"), (*both, *ties, "--out", tmp_path / "llamas")),
        ("--density.*--method", (*both, *out, "--density", "0.5")),
        ("--parameter.*--method", (*both, *out, "--parameter", "density=0.5")),
    ]
    for values, arguments in cases:
        assert re.search(values, refusal(capsys, "merge", *arguments)), values
    assert not (tmp_path / "out").exists()


def test_methods_are_described(capsys: Capsys) -> None:
    shown = output(capsys, "methods")
    for name, row in METHODS.items():
        assert f"{name}: {row.what}\n" in shown
        assert row.source in shown
        assert row.cost in shown
    assert "  parameter  density = 0.2 (above 0.0, at most 1.0)\n" in shown
    assert output(capsys, "methods", "iso-c").startswith("iso-c: ")
    assert "'magic'" in refusal(capsys, "methods", "magic")
