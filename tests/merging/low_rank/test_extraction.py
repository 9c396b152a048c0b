"""A LoRA from two full models: against NumPy's SVD, through PEFT and ``fedmerge merge``, sharded files, refusals."""

import copy
import json
import re
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from backbones import bert_for_peft, llama_config
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel

import fedmerge as fm
from fedmerge.adapter import adapter_sha256
from fedmerge.cli import main
from fedmerge.encoder.peft.folder import read_adapter
from fedmerge.errors import BackboneError, ConfigError, LayoutMismatchError, MergeError
from fedmerge.merging.low_rank.extraction import extract_adapter

IDS = torch.tensor([[3, 17, 5, 29, 8]])


def gpt2() -> PreTrainedModel:
    config = GPT2Config(vocab_size=40, n_positions=32, n_embd=24, n_layer=2, n_head=2)
    return cast(PreTrainedModel, GPT2LMHeadModel(config))


def llama() -> PreTrainedModel:
    return cast(PreTrainedModel, LlamaForCausalLM(llama_config()))


BUILDS = {"bert": bert_for_peft, "llama": llama, "gpt2": gpt2}


def tuned_like(model: PreTrainedModel, changed: str, rank: int | None = None) -> PreTrainedModel:
    """Change the weights whose names match: by noise, or by an update of a rank."""
    tuned, rng = copy.deepcopy(model), torch.Generator().manual_seed(7)
    for name, parameter in tuned.named_parameters():
        if re.search(changed, name):
            noise = torch.randn(parameter.shape, generator=rng)
            if rank is not None and parameter.ndim == 2:
                noise = torch.randn(len(parameter), rank, generator=rng) @ torch.randn(
                    rank, parameter.shape[1], generator=rng
                )
            parameter.data += 0.05 * noise
    return tuned


def saved(model: PreTrainedModel, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def built(name: str) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return cast(PreTrainedModel, BUILDS[name]().train(False))


def output_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS)[0]
    return found


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_equals_numpy_s_svd(name: str, tmp_path: Path) -> None:
    model = built(name)
    tuned = tuned_like(model, r"(query|value|q_proj|up_proj|intermediate.dense).*weight")
    found = extract_adapter(saved(model, tmp_path / "base"), saved(tuned, tmp_path / "tuned"), rank=5)
    changed = {
        key.removesuffix(".weight")
        for key, value in tuned.state_dict().items()
        if not torch.equal(value, model.state_dict()[key])
    }
    assert found.adapter.modules.keys() == found.residuals.keys() == changed
    assert found.lost == {}
    errors = changes = 0.0
    for module, lora in found.adapter.modules.items():
        after, before = (each.state_dict()[f"{module}.weight"].double().numpy() for each in (tuned, model))
        U, S, Vh = np.linalg.svd((after - before).astype(np.float64))
        nearest = U[:, :5] * S[:5] @ Vh[:5]
        assert lora.rank == 5
        np.testing.assert_allclose(lora.delta_weight().numpy(), nearest, atol=1e-6)
        tail, whole = float(np.sum(S[5:] ** 2)), float(np.sum(S**2))
        assert found.residuals[module] == pytest.approx(np.sqrt(tail / whole), rel=1e-4)
        errors, changes = errors + tail, changes + whole
    assert found.residual == pytest.approx(np.sqrt(errors / changes), rel=1e-4)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_a_change_of_low_rank_comes_back_through_peft(name: str, tmp_path: Path) -> None:
    model = built(name)
    tuned = tuned_like(model, r"(query|dense|_proj|c_attn|c_fc).*weight", rank=2)
    base = saved(model, tmp_path / "base")
    extracted = fm.extract(base, saved(tuned, tmp_path / "tuned"), rank=4)
    extracted.save(tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["task_type"] == ("FEATURE_EXTRACTION" if name == "bert" else "CAUSAL_LM")
    assert config["fan_in_fan_out"] == (name == "gpt2")
    assert config["base_model_name_or_path"] == "base"
    assert {module.rank for module in extracted.adapter.modules.values()} == {2}
    assert extracted.provenance["residual"] < 1e-5
    loaded = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "lora").train(False)
    assert torch.allclose(output_of(loaded), output_of(tuned), atol=1e-4)
    assert not torch.allclose(output_of(model), output_of(tuned), atol=1e-2)
    merged = loaded.merge_and_unload()
    assert torch.allclose(output_of(merged), output_of(tuned), atol=1e-4)


def test_two_extracted_adapters_merge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = built("llama")
    base = saved(model, tmp_path / "base")
    for k, name in enumerate(("law", "medicine")):
        tuned = saved(tuned_like(model, f"layers.{k}.*q_proj|layers.*v_proj"), tmp_path / f"{name}-full")
        flags = ["--rank", "3", "--target-modules", "v_proj", "--out", str(tmp_path / name)]
        assert main(["extract", str(base), str(tuned), *flags]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^ +3 +0\.\d{4}  model\.layers\.1\.self_attn\.v_proj$", shown, re.M)
    assert re.search(r"lost: model\.layers\.1\.self_attn\.q_proj\.weight, \d\d\.\d% of the squared change", shown)
    assert re.search(r"medicine: 2 modules, 0\.0 MB, residual 0\.\d{4} of the whole change", shown)
    folders = [str(tmp_path / name) for name in ("law", "medicine")]
    assert main(["merge", "--method", "average", "--out", str(tmp_path / "merged"), *folders]) == 0
    merged, law, medicine = (read_adapter(tmp_path / name) for name in ("merged", "law", "medicine"))
    for name, module in merged.modules.items():
        wanted = (law.modules[name].delta_weight() + medicine.modules[name].delta_weight()) / 2
        torch.testing.assert_close(module.delta_weight(), wanted, atol=1e-6, rtol=1e-4)


def test_what_is_not_linear_is_listed_as_lost(tmp_path: Path) -> None:
    model = built("llama")
    tuned = tuned_like(model, "q_proj|embed_tokens|layers.0.input_layernorm|lm_head")
    base, after = saved(model, tmp_path / "base"), saved(tuned, tmp_path / "tuned")
    found = extract_adapter(base, after, rank=24)
    differences = {
        key: float((value - model.state_dict()[key]).double().square().sum())
        for key, value in tuned.state_dict().items()
    }
    whole = sum(differences.values())
    lost = ("lm_head.weight", "model.embed_tokens.weight", "model.layers.0.input_layernorm.weight")
    assert found.lost == {name: pytest.approx(differences[name] / whole, rel=1e-4) for name in lost}
    assert max(found.residuals.values()) == 0.0
    assert found.residual == pytest.approx(np.sqrt(sum(found.lost.values())))
    head = extract_adapter(base, after, rank=24, target_modules=("lm_head", "self_attn.q_proj"))
    assert "lm_head" in head.adapter.modules  # only when it is named


def test_shards_and_half_precision_change_nothing_else(tmp_path: Path) -> None:
    model = built("llama").bfloat16()
    tuned = tuned_like(model, "_proj")
    base, after = saved(model, tmp_path / "base"), saved(tuned, tmp_path / "tuned")
    sharded = saved(tuned, tmp_path / "shards", max_shard_size="8KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    whole, parts = (extract_adapter(base, folder, rank=3) for folder in (after, sharded))
    assert adapter_sha256(whole.adapter) == adapter_sha256(parts.adapter)
    module = "model.layers.0.mlp.up_proj"
    old, new = (each.state_dict()[f"{module}.weight"].float() for each in (model, tuned))
    exact = extract_adapter(base, after, rank=99, target_modules=(module,)).adapter.modules[module]
    torch.testing.assert_close(exact.delta_weight(), new - old, atol=0, rtol=0)


def test_refusals(tmp_path: Path) -> None:
    model = built("llama")
    base = saved(model, tmp_path / "base")
    tuned = saved(tuned_like(model, "q_proj"), tmp_path / "tuned")
    with pytest.raises(MergeError, match="equal weights in every chosen linear module"):
        extract_adapter(base, base, rank=2)
    with pytest.raises(MergeError, match="equal weights"):
        extract_adapter(base, tuned, rank=2, target_modules=("k_proj",))
    with pytest.raises(ConfigError, match=r"rank: found 0"):
        extract_adapter(base, tuned, rank=0)
    with pytest.raises(ConfigError, match=r"no linear module is named query; LlamaForCausalLM has: .*q_proj"):
        extract_adapter(base, tuned, rank=2, target_modules=("query",))
    with pytest.raises(BackboneError, match="no such folder"):
        extract_adapter(base, "./nowhere", rank=2)

    config = llama_config()
    config.vocab_size = 41
    wider = saved(cast(PreTrainedModel, LlamaForCausalLM(config)), tmp_path / "wider")
    with pytest.raises(LayoutMismatchError, match=r"shapes of 2 tensors: lm_head.weight \[40, 24\] and \[41, 24\]"):
        extract_adapter(base, wider, rank=2)

    tensors = load_file(tuned / "model.safetensors")
    key = "model.layers.0.self_attn.q_proj.weight"
    save_file({**tensors, key: tensors[key] * float("nan")}, tuned / "model.safetensors")
    with pytest.raises(MergeError, match=rf"{key}: 576 of 576 differences are not finite"):
        extract_adapter(base, tuned, rank=2)
    save_file({name: value for name, value in tensors.items() if name != key}, tuned / "model.safetensors")
    with pytest.raises(LayoutMismatchError, match=r"tuned has no weight of the linear module model.layers.0.self_attn"):
        extract_adapter(base, tuned, rank=2)
    (tuned / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(BackboneError, match="cannot be read"):
        extract_adapter(base, tuned, rank=2)
    (base / "config.json").write_text("{}")
    with pytest.raises(BackboneError, match=r"config\.json names no model"):
        extract_adapter(base, base, rank=2)


def test_a_tensor_of_one_model_alone_is_named(tmp_path: Path) -> None:
    model = built("llama")
    base, tuned = saved(model, tmp_path / "base"), saved(tuned_like(model, "q_proj"), tmp_path / "tuned")
    tensors = load_file(tuned / "model.safetensors")
    save_file({**tensors, "extra.bias": torch.ones(3)}, tuned / "model.safetensors")
    assert extract_adapter(base, tuned, rank=2).unmatched == ("extra.bias",)
