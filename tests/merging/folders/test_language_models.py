"""``fedmerge merge`` on adapters of real GPT-2 and Llama classes, compared with the weights that peft computes."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from adapters import saved_by_peft
from peft import PeftModel
from run_folders import output, refusal
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

Capsys = pytest.CaptureFixture[str]
Weights = dict[str, torch.Tensor]
TOKENS = 11


def gpt2() -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=TOKENS, n_positions=8, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
        )


def llama(tokens: int = TOKENS, tied: bool = False) -> PreTrainedModel:
    """A model of 11 tokens, resized to another number."""
    config = LlamaConfig(
        vocab_size=TOKENS,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        model.resize_token_embeddings(tokens, mean_resizing=False)
        return model


def saved(model: PreTrainedModel, root: Path, *settings: dict[str, Any]) -> list[Path]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tied weights, deprecations of transformers
        return [
            saved_by_peft(model, root / name, seed, **{"lora_alpha": 3, **each})
            for seed, (name, each) in enumerate(zip("abc", settings, strict=False))
        ]


def merged_by_peft(model: PreTrainedModel, folder: Path) -> Weights:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*(adapter keys|did not match).*")
        loaded = PeftModel.from_pretrained(copy.deepcopy(model), str(folder))
        merged = cast(Any, loaded).merge_and_unload()
    return {name: tensor.double() for name, tensor in merged.state_dict().items()}


def check_mean(model: PreTrainedModel, out: Path, *folders: Path) -> None:
    """W_0 + mean of what peft adds to every weight, and that is not nothing."""
    before = {name: tensor.double() for name, tensor in model.state_dict().items()}
    found, each = merged_by_peft(model, out), [merged_by_peft(model, folder) for folder in folders]
    for name, weight in before.items():
        expected = weight + sum(one[name] - weight for one in each) / len(each)
        torch.testing.assert_close(found[name], expected, atol=2e-6, rtol=1e-5)
    assert any(not torch.equal(found[name], weight) for name, weight in before.items())


def average(capsys: Capsys, out: Path, *more: Any) -> str:
    return output(capsys, "merge", "--method", "average", "--out", out, *more)


DORA = {"use_dora": True, "fan_in_fan_out": True}


@pytest.mark.parametrize(
    "others",
    [
        {"r": 3, "target_modules": ["c_attn", "c_fc"], **DORA},
        {"r": 3, "target_modules": ["c_attn"], "fan_in_fan_out": True},
        {"r": 3, "target_modules": ["c_proj"], "use_rslora": True, **DORA},
    ],
    ids=["as the first", "plain", "on other modules"],
)
def test_dora_on_conv1d(others: dict[str, Any], tmp_path: Path, capsys: Capsys) -> None:
    model = gpt2()
    folders = saved(model, tmp_path, {"r": 2, "target_modules": ["c_attn", "c_fc"], **DORA}, others)
    model.save_pretrained(tmp_path / "base")
    shown = average(capsys, tmp_path / "out", "--base", tmp_path / "base", *folders)
    assert "a: DoRA folded into full updates of 4 modules" in shown
    check_mean(model, tmp_path / "out", *folders)


@pytest.mark.parametrize("tied", [False, True])
def test_a_lora_of_the_output_head_alone(tied: bool, tmp_path: Path, capsys: Capsys) -> None:
    """peft saves a copy of the head's weight beside it, which is no update: every method merges such adapters."""
    model = llama(tied=tied)
    folders = saved(model, tmp_path, *({"r": rank, "target_modules": ["lm_head"]} for rank in (2, 3)))
    assert "base_model.model.lm_head.base_layer.weight" in load_file(folders[0] / "adapter_model.safetensors")
    average(capsys, tmp_path / "out", *folders)
    check_mean(model, tmp_path / "out", *folders)
    output(capsys, "merge", "--method", "ties", "--density", "1", "--out", tmp_path / "ties", *folders)
    file = tmp_path / "out" / "adapter_model.safetensors"
    tensors = load_file(file)
    assert tensors.keys() == load_file(folders[0] / "adapter_model.safetensors").keys()
    copied = "base_model.model.lm_head.base_layer.weight"
    save_file({**tensors, copied: tensors[copied] + 1}, file)  # the recorded hash is also that of the copy
    refused = refusal(capsys, "merge", "--method", "average", "--out", tmp_path / "no", tmp_path / "out", folders[0])
    assert "was changed or damaged" in refused


WHOLE = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
ON_EMBEDDING = {"r": 2, "target_modules": ["q_proj", "embed_tokens"]}


@pytest.mark.parametrize("settings", [WHOLE, ON_EMBEDDING], ids=["saved whole", "LoRA"])
@pytest.mark.parametrize("base", [None, TOKENS, 13])
def test_embeddings_of_a_resized_vocabulary(
    base: int | None, settings: dict[str, Any], tmp_path: Path, capsys: Capsys
) -> None:
    """An average does not depend on the base model, whose vocabulary may be the one before it was resized."""
    model = llama(13)
    folders = saved(model, tmp_path, settings, settings)
    more = () if base is None else ("--base", tmp_path / "base")
    llama(base or TOKENS).save_pretrained(tmp_path / "base")
    average(capsys, tmp_path / "out", *more, *folders)
    check_mean(model, tmp_path / "out", *folders)


def test_weights_that_do_not_sum_to_1_need_the_resized_base(tmp_path: Path, capsys: Capsys) -> None:
    model = llama(13)
    folders = saved(model, tmp_path, WHOLE, WHOLE)
    for tokens in (TOKENS, 13):
        llama(tokens).save_pretrained(tmp_path / f"base {tokens}")
    command = ("merge", "--method", "task-arithmetic", "--coefficient", "0.25")
    assert "--base" in refusal(capsys, *command, "--out", tmp_path / "no", *folders)
    refused = refusal(capsys, *command, "--out", tmp_path / "no", "--base", tmp_path / "base 11", *folders)
    assert "which has (11, 8), not (13, 8)" in refused
    output(capsys, *command, "--out", tmp_path / "out", "--base", tmp_path / "base 13", *folders)
    before = {name: tensor.double() for name, tensor in model.state_dict().items()}
    found, each = (merged_by_peft(model, tmp_path / "out"), [merged_by_peft(model, folder) for folder in folders])
    for name, weight in before.items():
        expected = weight + 0.25 * sum(one[name] - weight for one in each)
        torch.testing.assert_close(found[name], expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("settings", [WHOLE, ON_EMBEDDING], ids=["saved whole", "LoRA"])
def test_vocabularies_of_other_sizes_are_refused_or_left_out(
    settings: dict[str, Any], tmp_path: Path, capsys: Capsys
) -> None:
    first, second = ((saved(llama(tokens), tmp_path / f"{tokens}", settings))[0] for tokens in (13, 15))
    named = (f"a={first}", f"b={second}")
    refused = refusal(capsys, "merge", "--method", "average", "--out", tmp_path / "no", *named)
    assert "13" in refused
    assert "15" in refused
    average(capsys, tmp_path / "out", "--leave-out", "modules_to_save,embeddings", *named)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["modules_to_save"] is None
    assert not any(
        "embed" in name or "head" in name for name in load_file(tmp_path / "out" / "adapter_model.safetensors")
    )
