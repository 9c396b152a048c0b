"""Merging again: other settings, withdrawn domains, foreign adapters; the run stays as it was."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import merges_of, random_adapter
from backbones import tiny_bert
from peft import PeftModel
from run_folders import TRAIN, Place, contents, make_place, make_run, output, refusal
from transformers import AutoModel

from fedmerge.adapter import Adapter, LoraModule, adapter_sha256
from fedmerge.cli import main
from fedmerge.config import load_config
from fedmerge.domain.catalog import CATALOG_FILE, load_catalog
from fedmerge.domain.manifest import MANIFEST_FILE
from fedmerge.encoder.adapter_records import config_of_adapter
from fedmerge.encoder.peft.folder import read_adapter, write_adapter
from fedmerge.files import read_record
from fedmerge.merging.stack import linear_merge, stack_adapters
from fedmerge.merging.training_free import merge_adapters

Capsys = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def finished(place: Place) -> Path:
    return make_run(place, "first-20260102-030405-abcd")


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "copies" / finished.name))


def experts(run: Path) -> dict[str, Adapter]:
    return {name: read_adapter(run / "adapters" / name) for name in TRAIN}


def provenance(folder: Path) -> dict[str, Any]:
    return read_record(folder / "provenance.json")


# A run


def test_the_experts_of_a_run_are_merged_without_one_of_them(run: Path, capsys: Capsys) -> None:
    before = contents(run)
    settings = ["merge.methods=task-arithmetic", "merge.task_arithmetic_coefficients=0.3,0.9"]
    printed = output(capsys, "merge", run, "--exclude", "toys", "--set", *settings)

    (made,) = (run / "remerged").iterdir()
    assert sorted(path.name for path in made.iterdir()) == [
        "config.toml",
        "task-arithmetic-0.3",
        "task-arithmetic-0.9",
    ]
    assert printed.splitlines() == [
        "merged books, coffee, without toys",
        f"{made / 'task-arithmetic-0.3'}: books 0.300, coffee 0.300",
        f"{made / 'task-arithmetic-0.9'}: books 0.900, coffee 0.900",
    ]
    assert {path: digest for path, digest in contents(run).items() if not path.startswith("remerged")} == before

    theirs = experts(run)
    wanted = linear_merge(stack_adapters({name: theirs[name] for name in ("books", "coffee")}), torch.full((2,), 0.9))
    found = read_adapter(made / "task-arithmetic-0.9")
    assert adapter_sha256(found) == adapter_sha256(wanted)
    record = provenance(made / "task-arithmetic-0.9")
    backbone = json.loads((run / "merged" / "average" / "provenance.json").read_text())["backbone"]
    assert record == {
        "label": "task-arithmetic 0.9",
        "method": "task-arithmetic",
        "domains": {name: adapter_sha256(theirs[name]) for name in ("books", "coffee")},
        "coefficients": {"books": pytest.approx(0.9), "coffee": pytest.approx(0.9)},
        "coefficient_groups": ["all"],
        "rank": 4,
        "excluded": {"toys": "left out with --exclude"},
        "policy": "adapter+catalog",
        "backbone": backbone,
        "sha256": adapter_sha256(wanted),
        "run": run.name,
        "parameters": {"coefficient": 0.9},
    }
    config = load_config(made / "config.toml")
    assert config.domains.train == ("books", "coffee")
    assert config.domains.unseen == ("camping",)
    assert config.merge.task_arithmetic_coefficients == (0.3, 0.9)
    assert config.train.max_steps == 7  # the rest is the run's


def test_the_same_settings_give_the_run_s_own_merges_and_others_do_not(place: Place, run: Path, capsys: Capsys) -> None:
    output(capsys, "merge", run, "--out", run / "again")
    for label in ("average", "task-arithmetic-0.5", "mergerec-domain-wise"):
        own, again = provenance(run / "merged" / label), provenance(run / "again" / label)
        assert again == {**own, "run": run.name}
    output(capsys, "merge", run, "--out", run / "more", "--set", "merge.methods=mergerec", "mergerec.steps=5")
    config = load_config(run / "config.toml", ["merge.methods=mergerec", "mergerec.steps=5"])
    catalogs = {name: load_catalog(place.domains / name) for name in TRAIN}
    (wanted,) = merges_of(place.backbone(), experts(run), catalogs, config)
    found = provenance(run / "more" / "mergerec-domain-wise")
    assert found["sha256"] == wanted.provenance.sha256
    assert found["sha256"] != provenance(run / "again" / "mergerec-domain-wise")["sha256"]
    assert len(found["losses"]) == 5


def test_one_merge_of_a_run_by_a_method(run: Path, capsys: Capsys, tmp_path: Path) -> None:
    flags = ("--method", "ties", "--density", "0.4", "--exclude", "toys", "--coefficients", "coffee=2")
    shown = output(capsys, "merge", run, *flags)
    (made,) = (run / "remerged").glob("*/ties")
    theirs = {name: adapter for name, adapter in experts(run).items() if name != "toys"}
    wanted = merge_adapters(theirs, "ties", density=0.4, coefficients={"coffee": 2.0})
    assert adapter_sha256(read_adapter(made)) == adapter_sha256(wanted.adapter)
    record = provenance(made)
    assert (record["run"], record["excluded"]) == (run.name, {"toys": "left out with --exclude"})
    assert record["backbone"] == provenance(run / "merged" / "average")["backbone"]
    assert "merged books, coffee, without toys\nties: density 0.4, " in shown
    assert config_of_adapter(made) == made / "config.toml"  # it can be evaluated where it lies
    assert load_config(made / "config.toml").domains.train == ("books", "coffee")
    assert f"remerged/{made.parent.name}/ties: books 1.000, coffee 2.000" in output(capsys, "show", run)
    output(capsys, "merge", run, *flags, "--out", tmp_path / "out")
    assert adapter_sha256(read_adapter(tmp_path / "out")) == adapter_sha256(wanted.adapter)


def test_a_merge_of_a_run_with_heads_says_that_it_has_none(run: Path, capsys: Capsys, tmp_path: Path) -> None:
    note = "no head is trained over it"
    for number, settings in enumerate((["--set", "merge.methods=average"], ["--method", "average"])):
        assert note not in output(capsys, "merge", str(run), "--out", str(tmp_path / f"before{number}"), *settings)
    (run / "heads").mkdir()
    for number, settings in enumerate((["--set", "merge.methods=average"], ["--method", "average"])):
        assert note in output(capsys, "merge", str(run), "--out", str(tmp_path / f"after{number}"), *settings)


def test_a_withdrawn_domain_is_not_even_opened(place: Place, run: Path, capsys: Capsys, tmp_path: Path) -> None:
    (run / "adapters" / "toys" / "adapter_model.safetensors").write_bytes(b"damaged")
    catalogs = shutil.copytree(place.domains, tmp_path / "catalogs")
    shutil.rmtree(tmp_path / "catalogs" / "toys")
    for name in ("books", "coffee"):
        (tmp_path / "catalogs" / name / "interactions.parquet").unlink()
    out = tmp_path / "out"
    output(capsys, "merge", run, "--exclude", "toys", "--catalogs", catalogs, "--out", out)
    for folder in (path for path in out.iterdir() if path.is_dir()):
        assert list(provenance(folder)["domains"]) == ["books", "coffee"]
        assert "toys" not in json.dumps({**provenance(folder), "excluded": {}})


def test_a_run_that_failed_after_training_can_be_merged(run: Path, capsys: Capsys) -> None:
    for name in ("DONE", "choice.json", "metrics.parquet", "clients.json"):
        (run / name).unlink()
    shutil.rmtree(run / "merged")
    output(capsys, "merge", run, "--set", "merge.methods=average")
    (made,) = (run / "remerged").glob("*/average")
    assert provenance(made)["backbone"] == {"name": "backbone", "sha256": None}


def test_peft_loads_what_was_merged(place: Place, finished: Path, tmp_path: Path, capsys: Capsys) -> None:
    output(capsys, "merge", finished, "--out", tmp_path / "out", "--set", "merge.methods=average")
    bare = AutoModel.from_pretrained(place.root / "backbone", add_pooling_layer=False)
    model = PeftModel.from_pretrained(bare, str(tmp_path / "out" / "average"))
    theirs = dict(model.get_base_model().named_modules())
    for name, module in linear_merge(stack_adapters(experts(finished)), torch.full((3,), 1 / 3)).modules.items():
        torch.testing.assert_close(
            theirs[name].get_delta_weight("default"), module.delta_weight(), atol=1e-6, rtol=1e-5
        )


def test_nothing_is_overwritten_and_two_merges_get_two_folders(run: Path, capsys: Capsys, tmp_path: Path) -> None:
    average = ("--set", "merge.methods=average")
    output(capsys, "merge", run, *average)
    output(capsys, "merge", run, *average)
    assert len(list((run / "remerged").iterdir())) == 2
    (tmp_path / "out").mkdir()
    output(capsys, "merge", run, "--out", tmp_path / "out", *average)  # an empty folder is free
    before = contents(tmp_path / "out")
    (tmp_path / "file").write_text("mine")
    for taken in (tmp_path / "out", tmp_path / "file", run):
        assert f"{taken}: " in refusal(capsys, "merge", run, "--out", taken, *average)
    assert contents(tmp_path / "out") == before
    assert (tmp_path / "file").read_text() == "mine"


def test_a_merge_that_cannot_be_written_leaves_nothing(run: Path, capsys: Capsys, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    target = tmp_path / "file" / "out"
    capsys.readouterr()
    assert main(["merge", str(run), "--out", str(target), "--set", "merge.methods=average"]) == 1
    assert f"fedmerge: {target}" in capsys.readouterr().err
    assert not (run / "remerged").exists()


# What is refused


def test_only_adapters_that_exist_can_be_excluded(run: Path, capsys: Capsys) -> None:
    refused = refusal(capsys, "merge", run, "--exclude", "shoes", "camping", "books")
    assert "--exclude shoes camping" in refused
    assert "books, coffee, toys" in refused
    assert "books, coffee, toys" in refusal(capsys, "merge", run, "--exclude", *TRAIN)


def test_damaged_experts_are_refused_by_name(run: Path, capsys: Capsys) -> None:
    folder = run / "adapters" / "coffee"
    adapter = read_adapter(folder)
    name, module = next(iter(adapter.modules.items()))
    other = Adapter({**adapter.modules, name: LoraModule(module.lora_A * 1.001, module.lora_B, module.scaling)})
    write_adapter(other, folder, "backbone")
    assert "coffee: " in (refused := refusal(capsys, "merge", run))
    assert adapter_sha256(other)[:12] in refused
    assert adapter_sha256(adapter)[:12] in refused
    lora_A = module.lora_A.clone()
    lora_A[0, 0] = torch.nan
    diverged = Adapter({**adapter.modules, name: LoraModule(lora_A, module.lora_B, module.scaling)})
    write_adapter(diverged, folder, "backbone")
    (folder / "training.json").unlink()
    assert "coffee: " in (refused := refusal(capsys, "merge", run))
    assert f"{name}.lora_A" in refused
    assert f"1 of {lora_A.numel()}" in refused
    (folder / "training.json").write_text("{")
    assert "coffee/training.json: " in refusal(capsys, "merge", run)
    (folder / "training.json").write_text("[1]")
    assert "coffee/training.json: found a JSON list" in refusal(capsys, "merge", run)
    (folder / "adapter_config.json").unlink()
    assert re.search("coffee: .*adapter_config.json", refusal(capsys, "merge", run))
    assert output(capsys, "merge", run, "--exclude", "coffee", "--set", "merge.methods=average")


def test_a_run_without_experts_and_no_run_at_all_are_refused(run: Path, capsys: Capsys, tmp_path: Path) -> None:
    shutil.rmtree(run / "adapters")
    assert f"{run}: " in refusal(capsys, "merge", run)
    refused = refusal(capsys, "merge", "gone", "--dir", run.parent)
    assert all(text in refused for text in ("'gone'", str(run.parent), run.name))
    refused = refusal(capsys, "merge", "gone", "--dir", tmp_path / "nowhere")
    assert all(text in refused for text in ("'gone'", str(tmp_path / "nowhere")))


def test_bad_settings_are_refused_before_anything_is_read(run: Path, capsys: Capsys) -> None:
    assert re.search("merge.method: .*merge.methods", refusal(capsys, "merge", run, "--set", "merge.method=average"))
    refused = refusal(capsys, "merge", run, "--set", "merge.methods=magic")
    assert all(word in refused for word in ("merge.methods", "'magic'", "task-arithmetic", "package.module:function"))
    with pytest.raises(SystemExit) as caught:
        output(capsys, "merge")
    assert caught.value.code == 2


def test_mergerec_wants_the_catalogs_of_the_run(place: Place, run: Path, capsys: Capsys, tmp_path: Path) -> None:
    learned = ("--set", "merge.methods=mergerec")
    (tmp_path / "empty").mkdir()
    refused = refusal(capsys, "merge", run, "--catalogs", tmp_path / "empty", *learned)
    assert all(text in refused for text in (str(tmp_path / "empty"), "books, coffee, toys", "--catalogs"))
    catalogs = tmp_path / "catalogs"
    shutil.copytree(place.domains, catalogs)
    shutil.rmtree(catalogs / "books")
    shutil.copytree(place.domains / "camping", catalogs / "books")
    manifest = json.loads((catalogs / "books" / MANIFEST_FILE).read_text())
    (catalogs / "books" / MANIFEST_FILE).write_text(json.dumps({**manifest, "name": "books"}))
    refused = refusal(capsys, "merge", run, "--catalogs", catalogs, *learned)
    hashes = [load_catalog(place.domains / domain).sha256[:12] for domain in ("books", "camping")]
    assert all(text in refused for text in (str(catalogs / "books"), *hashes))
    (catalogs / "coffee" / CATALOG_FILE).write_bytes(b"PAR1")
    shutil.rmtree(catalogs / "books")
    shutil.copytree(place.domains / "books", catalogs / "books")
    assert f"coffee/{CATALOG_FILE}" in refusal(capsys, "merge", run, "--catalogs", catalogs, *learned)


def test_a_private_catalog_is_not_taken_from_its_owner_s_folder(
    place: Place, run: Path, capsys: Capsys, tmp_path: Path
) -> None:
    shutil.copytree(place.domains, tmp_path / "owners")
    path = tmp_path / "owners" / "books" / MANIFEST_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "public_catalog": False}))
    root = f"domains.root={tmp_path / 'owners'}"
    message = refusal(capsys, "merge", run, "--set", "merge.methods=mergerec", root)
    assert all(text in message for text in ("books", "public_catalog"))


def test_another_backbone_than_the_run_s_is_refused(place: Place, run: Path, capsys: Capsys, tmp_path: Path) -> None:
    source = f"backbone.source={tiny_bert(tmp_path / 'other', seed=1)}"
    message = refusal(capsys, "merge", run, "--set", "merge.methods=mergerec", source)
    assert provenance(run / "merged" / "average")["backbone"]["sha256"][:12] in message


# Any adapters


def test_any_lora_adapters_can_be_merged_also_of_decoders(tmp_path: Path, capsys: Capsys) -> None:
    layout = {f"layers.{layer}.self_attn.{part}": (24, 16) for layer in (0, 1) for part in ("q_proj", "v_proj")}
    adapters = {name: random_adapter(layout, rank, 1.0, rank) for name, rank in (("law", 2), ("medicine", 3))}
    for name, adapter in adapters.items():
        write_adapter(adapter, tmp_path / name, "tiny-llama")
    folders = [f"code={tmp_path / 'law'}", str(tmp_path / "medicine")]
    settings = ("--set", "merge.methods=average,task-arithmetic", "merge.task_arithmetic_coefficients=0.7")
    output(capsys, "merge", *folders, "--out", tmp_path / "out", *settings)
    found = provenance(tmp_path / "out" / "task-arithmetic-0.7")
    assert found["domains"] == {
        "code": adapter_sha256(adapters["law"]),
        "medicine": adapter_sha256(adapters["medicine"]),
    }
    assert (found["backbone"], found["run"]) == ({"name": "tiny-llama", "sha256": None}, None)
    merged = read_adapter(tmp_path / "out" / "task-arithmetic-0.7")
    for name, module in merged.modules.items():
        wanted = 0.7 * sum(adapter.modules[name].delta_weight() for adapter in adapters.values())
        np.testing.assert_allclose(module.delta_weight(), wanted, atol=1e-5)
    # a merge is an adapter like any other
    output(capsys, "merge", tmp_path / "out" / "average", folders[0], "--out", tmp_path / "next", *settings)
    assert list(provenance(tmp_path / "next" / "average")["domains"]) == ["average", "code"]


def test_adapters_that_cannot_be_merged_are_refused(place: Place, tmp_path: Path, capsys: Capsys) -> None:
    one, two = tmp_path / "a" / "same", tmp_path / "b" / "same"
    write_adapter(random_adapter({"layers.0.q": (4, 4)}, 1, 1.0, 0), one, "x")
    write_adapter(random_adapter({"layers.0.q": (4, 5)}, 1, 1.0, 0), two, "x")
    average = ("--set", "merge.methods=average")
    out = ("--out", tmp_path / "out")
    refused = refusal(capsys, "merge", one, two, *out, *average)
    assert all(text in refused for text in (str(one), str(two), "'same'", "NAME="))
    assert "'same'" in refusal(capsys, "merge", one, f"other={two}", *out, *average)
    assert not (tmp_path / "out").exists()


def test_adapters_of_runs_on_different_backbones_are_refused(
    place: Place, finished: Path, tmp_path: Path, capsys: Capsys
) -> None:
    other = make_place(tmp_path / "other")
    tiny_bert(tmp_path / "other" / "backbone", seed=3)
    theirs = make_run(other, "theirs")
    folders = [str(finished / "merged" / "average"), f"theirs={theirs / 'merged' / 'average'}"]
    arguments = ["merge", *folders, "--out", str(tmp_path / "out"), "--set", "merge.methods=average"]
    refused = refusal(capsys, *arguments)
    assert all(str(run / "config.toml") in refused for run in (finished, theirs))
    refused = refusal(capsys, *arguments, "--config", str(finished / "config.toml"))
    hashes = [provenance(folder / "merged" / "average")["backbone"]["sha256"][:12] for folder in (finished, theirs)]
    assert all(text in refused for text in ("average", "theirs", *hashes))
