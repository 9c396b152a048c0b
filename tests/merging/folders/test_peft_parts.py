"""``fedmerge merge`` on what peft saves beside plain LoRA, compared with the weights that peft itself computes."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from adapters import Tree, saved_by_peft, touched, weights_of, weights_with
from peft import PeftModel
from run_folders import output, refusal
from safetensors.torch import load_file, save_file

from fedmerge.adapter import adapter_sha256
from fedmerge.encoder.peft.folder import read_adapter

Capsys = pytest.CaptureFixture[str]
Weights = dict[str, torch.Tensor]


@pytest.fixture
def model() -> Tree:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        names = ("enc.layers.0.proj", "enc.layers.1.proj", "dec.layers.0.proj", "proj", "score")
        layers: dict[str, torch.nn.Module] = {name: torch.nn.Linear(5, 4) for name in names}
        return Tree({**layers, "embed_tokens": torch.nn.Embedding(7, 5), "wide": torch.nn.Linear(5, 6)})


def saved(model: Tree, root: Path, **of_b: Any) -> tuple[Path, Path]:
    """Adapter a on the projections, adapter b with other settings."""
    a = saved_by_peft(model, root / "a", 1, r=2, lora_alpha=3, target_modules=["proj"])
    return a, saved_by_peft(model, root / "b", 2, **{"r": 3, "lora_alpha": 4, "target_modules": ["proj"], **of_b})


def mean(model: Tree, *folders: Path) -> Weights:
    """W_0 + mean of what peft adds to every weight."""
    base, loaded = weights_of(model), [weights_with(model, folder) for folder in folders]
    return {name: base[name] + sum(each[name] - base[name] for each in loaded) / len(loaded) for name in base}


def same(found: Weights, expected: Weights) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, atol=2e-6, rtol=1e-5)


def average(capsys: Capsys, out: Path, *more: Any) -> str:
    return output(capsys, "merge", "--method", "average", "--out", out, *more)


def record(folder: Path) -> dict[str, Any]:
    return cast(dict[str, Any], json.loads((folder / "provenance.json").read_text()))


def changed(folder: Path, **settings: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


def base_of(model: Tree, folder: Path) -> Path:
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


UNEQUAL: dict[str, dict[str, Any]] = {
    "other names": {"target_modules": ["score"]},
    "a pattern": {"target_modules": r"(enc\..*proj|wide)"},
    "excluded": {"target_modules": ["proj", "wide"], "exclude_modules": ["dec.layers.0.proj"]},
    "one layer": {"target_modules": ["proj"], "layers_to_transform": [1]},
    "rslora and patterns": {"target_modules": ["proj"], "use_rslora": True, "rank_pattern": {"^proj": 1}},
}


@pytest.mark.parametrize("kind", UNEQUAL)
def test_a_union_of_modules_touches_what_the_sources_touch(
    kind: str, model: Tree, tmp_path: Path, capsys: Capsys
) -> None:
    folders = saved(model, tmp_path, **UNEQUAL[kind])
    changed(folders[0], target_modules="enc.*proj") if kind == "excluded" else None
    shown = average(capsys, tmp_path / "out", *folders)
    assert touched(model, tmp_path / "out") == touched(model, folders[0]) | touched(model, folders[1])
    if kind != "excluded":
        same(weights_with(model, tmp_path / "out"), mean(model, *folders))
    lacking = {each.name: sorted(touched(model, tmp_path / "out") - touched(model, each)) for each in folders}
    assert record(tmp_path / "out").get("missing_modules", {}) == {name: some for name, some in lacking.items() if some}
    for name, some in lacking.items():
        assert (f"{name} lacks {len(some)} of" in shown) == bool(some)


def test_targets_that_no_file_holds_are_said_and_count_as_zero(model: Tree, tmp_path: Path, capsys: Capsys) -> None:
    """peft warns of missing keys when it loads the sources, and merges zero; the merge names what it holds."""
    folders = saved(model, tmp_path, target_modules=["proj"])
    for folder in folders:
        changed(folder, target_modules=["proj", "wide", "unknown"])
        with pytest.warns(UserWarning, match="missing adapter keys.*wide"):
            PeftModel.from_pretrained(copy.deepcopy(model), str(folder))
    shown = average(capsys, tmp_path / "out", *folders)
    for name in ("a", "b"):
        assert f"{name}: its file has no unknown, wide, which its configuration names" in shown
    assert record(tmp_path / "out")["lacking_targets"] == {"a": ["unknown", "wide"], "b": ["unknown", "wide"]}
    for folder in folders:
        changed(folder, target_modules=["proj"])
    same(weights_with(model, tmp_path / "out"), mean(model, *folders))
    assert "its file has no" not in average(capsys, tmp_path / "whole", *folders)


def test_colliding_names_can_be_merged_again(model: Tree, tmp_path: Path, capsys: Capsys) -> None:
    a, b = saved(model, tmp_path)
    average(capsys, tmp_path / "x", a, b)
    average(capsys, tmp_path / "y", tmp_path / "x", a)
    same(weights_with(model, tmp_path / "y"), mean(model, tmp_path / "x", a))


def test_embeddings_and_whole_modules_and_biases(model: Tree, tmp_path: Path, capsys: Capsys) -> None:
    a = saved_by_peft(model, tmp_path / "a", 1, r=2, target_modules=["proj", "embed_tokens"], modules_to_save=["score"])
    b = saved_by_peft(model, tmp_path / "b", 2, r=3, target_modules=["embed_tokens", "proj"], modules_to_save=["score"])
    average(capsys, tmp_path / "out", a, b)
    same(weights_with(model, tmp_path / "out"), mean(model, a, b))
    not_one = ("--method", "task-arithmetic", "--coefficient", "0.4")
    assert "--base" in refusal(capsys, "merge", *not_one, "--out", tmp_path / "no", a, b)
    assert "linear" in refusal(capsys, "merge", "--method", "ties", "--out", tmp_path / "no", a, b)
    shown = average(capsys, tmp_path / "less", "--leave-out", "modules_to_save,embeddings", a, b)
    assert "left out" in shown
    assert all("proj" in name for name in read_adapter(tmp_path / "less").modules)

    base = base_of(model, tmp_path / "base")
    c = saved_by_peft(model, tmp_path / "c", 3, r=2, target_modules=["proj"], bias="all")
    average(capsys, tmp_path / "with base", "--base", base, a, c)
    same(weights_with(model, tmp_path / "with base"), mean(model, a, c))


@pytest.mark.parametrize(
    "settings",
    [{"modules_to_save": ["score"]}, {"lora_bias": True}, {"bias": "all"}],
    ids=["whole module", "bias of B", "biases"],
)
def test_the_recorded_hash_holds_all_that_a_merge_holds(
    settings: dict[str, Any], model: Tree, tmp_path: Path, capsys: Capsys
) -> None:
    plain = saved(model, tmp_path / "plain")
    folders = [
        saved_by_peft(model, tmp_path / name, seed, **{"r": 2, "target_modules": ["proj"], **settings})
        for seed, name in enumerate("ab")
    ]
    average(capsys, tmp_path / "plain out", *plain)
    average(capsys, tmp_path / "out", *folders)
    average(capsys, tmp_path / "again", tmp_path / "out", folders[0])
    assert record(tmp_path / "again")["domains"]["out"] == record(tmp_path / "out")["sha256"]
    assert record(tmp_path / "plain out")["sha256"] == adapter_sha256(read_adapter(tmp_path / "plain out"))
    file = tmp_path / "out" / "adapter_model.safetensors"
    tensors = load_file(file)
    beside = [key for key in tensors if not key.endswith(("lora_A.weight", "lora_B.weight", "_A", "_B"))]
    assert beside
    for key in beside:
        save_file({**tensors, key: tensors[key] + 1}, file)
        refused = refusal(
            capsys, "merge", "--method", "average", "--out", tmp_path / "no", tmp_path / "out", folders[0]
        )
        assert "was changed or damaged" in refused


def test_dora_is_folded_with_the_weights_of_the_base_model(model: Tree, tmp_path: Path, capsys: Capsys) -> None:
    a, b = saved(model, tmp_path, use_dora=True, target_modules=["proj", "embed_tokens"])
    assert "--base" in refusal(capsys, "merge", "--method", "average", "--out", tmp_path / "no", a, b)
    shown = average(capsys, tmp_path / "out", "--base", base_of(model, tmp_path / "base"), a, b)
    assert "DoRA folded" in shown
    same(weights_with(model, tmp_path / "out"), mean(model, a, b))


def test_biases_of_B_are_merged(model: Tree, tmp_path: Path, capsys: Capsys) -> None:
    folders = saved(model, tmp_path, lora_bias=True)
    average(capsys, tmp_path / "out", *folders)
    same(weights_with(model, tmp_path / "out"), mean(model, *folders))


def test_tensors_in_several_files(model: Tree, tmp_path: Path, capsys: Capsys) -> None:
    a, b = saved(model, tmp_path)
    average(capsys, tmp_path / "out", a, b)
    tensors = load_file(b / "adapter_model.safetensors")
    (b / "adapter_model.safetensors").unlink()
    files = {name: f"adapter_model-0000{number % 2 + 1}-of-00002.safetensors" for number, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: tensor for name, tensor in tensors.items() if files[name] == file}, b / file)
    index = b / "adapter_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    average(capsys, tmp_path / "again", a, b)
    assert record(tmp_path / "again")["sha256"] == record(tmp_path / "out")["sha256"]
    (b / file).unlink()
    assert "of-00002" in refusal(capsys, "merge", "--method", "average", "--out", tmp_path / "no", a, b)


def test_revisions_of_the_base_model(model: Tree, tmp_path: Path, capsys: Capsys) -> None:
    a, b = saved(model, tmp_path)
    mapping = {"base_model_class": "Tree", "parent_library": "adapters"}
    for folder in (a, b):
        changed(folder, base_model_name_or_path="tiny/base", revision="v1", auto_mapping=mapping, task_type=None)
    average(capsys, tmp_path / "out", a, b)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["revision"], config["auto_mapping"]) == ("v1", mapping)
    assert record(tmp_path / "out")["backbone"]["revision"] == "v1"
    for other in ("v2", None):
        changed(b, revision=other)
        refused = refusal(capsys, "merge", "--method", "average", "--out", tmp_path / "no", a, b)
        assert all(text in refused for text in ("revision", "'v1'", repr(other or "main"), "--base-model"))
    average(capsys, tmp_path / "chosen", "--base-model", "tiny/base@v2", a, b)
    assert json.loads((tmp_path / "chosen" / "adapter_config.json").read_text())["revision"] == "v2"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types_keep_their_meaning(dtype: torch.dtype, model: Tree, tmp_path: Path, capsys: Capsys) -> None:
    folders = saved(model, tmp_path)
    for folder in folders:
        path = folder / "adapter_model.safetensors"
        save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path)
    average(capsys, tmp_path / "out", *folders)
    deltas = [read_adapter(folder).modules for folder in (*folders, tmp_path / "out")]
    for name, module in deltas[2].items():
        expected = (deltas[0][name].delta_weight() + deltas[1][name].delta_weight()) / 2
        torch.testing.assert_close(module.delta_weight(), expected, atol=1e-6, rtol=1e-5)
    average(capsys, tmp_path / "half", "--dtype", "float16", *folders)
    assert {each.dtype for each in load_file(tmp_path / "half" / "adapter_model.safetensors").values()} == {
        torch.float16
    }
    average(capsys, tmp_path / "again", tmp_path / "half", folders[0])  # the recorded hash is that of what was written


def test_adapters_of_the_hub_come_from_its_cache(
    model: Tree, tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = saved(model, tmp_path)
    commit, cached = "0123456789abcdef0123456789abcdef01234567", tmp_path / "hub" / "models--org--law"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "v1").write_text(commit)
    shutil.copytree(b, cached / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    average(capsys, tmp_path / "out", a, "org/law@v1")
    assert record(tmp_path / "out")["hub"] == {"law": {"repository": "org/law", "revision": "v1", "commit": commit}}
    same(weights_with(model, tmp_path / "out"), mean(model, a, b))
    refused = refusal(capsys, "merge", "--method", "average", "--out", tmp_path / "no", a, "org/law@v2")
    assert "org/law@v2" in refused
    assert "cache" in refused
    assert "ORG/REPO@main" in refusal(capsys, "merge", "--method", "average", "--out", tmp_path / "no", a, "org/law")
