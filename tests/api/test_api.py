"""The Python API, against the rooms below it and against means computed by hand."""

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backbones import tiny_bert
from in_process import small_experiment

import fedmerge as fm
from fedmerge.adapter import adapter_sha256
from fedmerge.client.local_domain import LocalDomain
from fedmerge.config import to_flat
from fedmerge.domain.demo import write_demo
from fedmerge.encoder.peft.folder import read_adapter
from fedmerge.errors import ConfigError, DomainError, LayoutMismatchError, MergeError, RunDirError
from fedmerge.evaluation.ranks import METRICS
from fedmerge.serving import recommender as room

TEXT: dict[str, Any] = {"max_attribute_tokens": 8, "max_items": 2, "max_tokens": 32}
TRAINING: dict[str, Any] = {
    "max_steps": 3,
    "batch_size": 10,
    "warmup_steps": 1,
    "validate_every_steps": 1,
    "learning_rate": 0.03,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("api")
    write_demo(place / "domains", num_domains=8, num_users=30, num_items=25)
    tiny_bert(place / "backbone")
    return place


@pytest.fixture(scope="module")
def opened(place: Path) -> dict[str, LocalDomain]:
    backbone = fm.load_backbone(str(place / "backbone"), device="cpu", precision="float32")
    return fm.load_domains(place / "domains", ["beauty", "books"], backbone=backbone, **TEXT)


@pytest.fixture(scope="module")
def experts(opened: dict[str, LocalDomain]) -> dict[str, fm.Model]:
    return {name: fm.train(domain, rank=2, alpha=4, **TRAINING) for name, domain in opened.items()}


def test_every_name_is_listed_and_found() -> None:
    for name in dir(fm):
        assert getattr(fm, name) is not None
    with pytest.raises(AttributeError, match="merge_learned"):
        fm.nothing  # noqa: B018  # the access is what is tested


@pytest.mark.long
def test_merging_loads_torch_and_neither_transformers_nor_flower() -> None:
    script = (
        "import sys, fedmerge as fm; assert 'torch' not in sys.modules; fm.merge; fm.methods(); fm.Adapter;"
        "import fedmerge.merging.training_free; import fedmerge.merging.folders.writing;"
        "found = {'transformers', 'peft', 'flwr', 'ray'} & {name.split('.')[0] for name in sys.modules};"
        "assert 'torch' in sys.modules; assert not found, found"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_domains_are_opened_by_name_or_all_of_them(place: Path, opened: dict[str, LocalDomain]) -> None:
    backbone = opened["beauty"].backbone
    assert len(fm.load_domains(place / "domains", backbone=backbone, **TEXT)) == 8
    assert list(opened) == ["beauty", "books"]
    with pytest.raises(DomainError) as caught:
        fm.load_domains(place / "domains", ["shoes"], backbone=backbone)
    assert "shoes" in str(caught.value)
    assert "beauty" in str(caught.value)
    with pytest.raises(ConfigError) as refused:
        fm.load_domains(place / "domains", ["books"], backbone=backbone, max_token=3)
    assert "max_token" in str(refused.value)
    assert "max_attribute_tokens" in str(refused.value)


def test_an_expert_is_saved_as_a_peft_folder_and_read_again(experts: dict[str, fm.Model], tmp_path: Path) -> None:
    expert = experts["books"]
    assert expert.provenance["training"]["steps"] == 3
    folder = expert.save(tmp_path / "books")
    again = fm.load_adapter(folder)
    assert adapter_sha256(again.adapter) == adapter_sha256(expert.adapter) == again.provenance["sha256"]
    assert again.sources.backbone_sha256 == expert.provenance["backbone"]["sha256"]
    with pytest.raises(RunDirError) as caught:
        expert.save(folder)
    assert str(folder) in str(caught.value)


def test_a_setting_that_does_not_exist_is_named(opened: dict[str, LocalDomain]) -> None:
    with pytest.raises(ConfigError) as caught:
        fm.train(opened["books"], max_step=3, learning_rate=-1.0)
    for value in ("max_step", "learning_rate", "max_steps"):
        assert value in str(caught.value)


def test_adapters_models_and_folders_merge_alike(experts: dict[str, fm.Model], tmp_path: Path) -> None:
    folders = {name: expert.save(tmp_path / name) for name, expert in experts.items()}
    of_models = fm.merge(experts, "task-arithmetic", coefficient=0.5)
    mixed = fm.merge(
        {"beauty": experts["beauty"].adapter, "books": folders["books"]}, "task-arithmetic", coefficient=0.5
    )
    of_folders = fm.merge(folders, "task-arithmetic", coefficient=0.5)
    hashes = {adapter_sha256(merged.adapter) for merged in (of_models, mixed, of_folders)}
    assert len(hashes) == 1
    for name, module in of_models.adapter.modules.items():
        expected = 0.5 * sum(expert.adapter.modules[name].delta_weight() for expert in experts.values())
        torch.testing.assert_close(module.delta_weight(), expected)
    saved = of_folders.save(tmp_path / "merged")
    assert adapter_sha256(read_adapter(saved)) in hashes
    assert fm.load_adapter(saved).provenance["method"] == "task-arithmetic"


def test_what_does_not_belong_together_is_refused(experts: dict[str, fm.Model]) -> None:
    with pytest.raises(MergeError):
        fm.merge({}, "average")
    foreign = fm.Model(
        experts["books"].adapter,
        {},
        type(experts["books"].sources)({}, "other", "0" * 64, "FEATURE_EXTRACTION", None, False),
    )
    with pytest.raises(MergeError) as caught:
        fm.merge({"beauty": experts["beauty"], "books": foreign}, "average")
    assert "000000000000" in str(caught.value)
    with pytest.raises(ConfigError):
        fm.merge(experts, "no-such-method")


def test_learned_coefficients_are_those_of_the_room_below(
    experts: dict[str, fm.Model], opened: dict[str, LocalDomain], place: Path
) -> None:
    backbone = opened["books"].backbone
    steps: list[int] = []
    learned = fm.merge_learned(
        experts, opened, backbone, steps=3, batch_size=4, progress=lambda step, of, losses: steps.append(step)
    )
    assert steps == [1, 2, 3]
    folders = {name: place / "domains" / name for name in experts}
    from_folders = fm.merge_learned(experts, folders, backbone, text=TEXT, steps=3, batch_size=4)
    assert adapter_sha256(learned.adapter) == adapter_sha256(from_folders.adapter)
    assert set(learned.provenance["coefficients"]) == {*experts}
    assert len(learned.provenance["losses"]) == 3
    contrasted: dict[str, Any] = {
        "loss": "similarity+kd",
        "teacher": "contrastive",
        "pseudo_users": "contrastive-adaptive",
    }
    other = fm.merge_learned(experts, opened, backbone, steps=2, batch_size=4, **contrasted)
    assert other.provenance["losses"][0].keys() == {"total", "similarity", "kd"}
    assert [name.split()[0] for name in other.provenance["reconstructions"]] == ["Taesar-style", "FedCIA-style"]
    with pytest.raises(MergeError) as caught:
        fm.merge_learned(experts, {"books": opened["books"]}, backbone)
    assert "beauty" in str(caught.value)
    with pytest.raises(ConfigError) as refused:
        fm.merge_learned(experts, opened, backbone, step=3)
    assert "steps" in str(refused.value)


def test_scores_are_means_intervals_and_paired_differences(
    experts: dict[str, fm.Model], opened: dict[str, LocalDomain]
) -> None:
    merged = fm.merge(experts, "average")
    scores = fm.evaluate(opened, {"backbone": None, "merge": merged}, baselines=["popularity"])
    assert scores.models == ("backbone", "merge", "popularity")
    per_domain = [scores.interval("merge", domain).mean for domain in opened]
    assert scores.mean("merge") == pytest.approx(np.mean(per_domain))
    one = scores.interval("merge", "books", "recall@10")
    num_users = scores.sums["books"]["unmasked"].num_users
    # Recall@10 is 0 or 1 for every user, so its standard error is that of a proportion.
    assert one.standard_error == pytest.approx((one.mean * (1 - one.mean) / (num_users - 1)) ** 0.5)
    assert one.low == pytest.approx(one.mean - 1.96 * one.standard_error)
    assert scores.difference("merge", "merge").mean == 0
    difference = scores.difference("merge", "backbone", "books", "mrr", "masked")
    means = scores.sums["books"]["masked"]
    assert difference.mean == pytest.approx(means.mean("merge", "mrr") - means.mean("backbone", "mrr"))
    frame = scores.to_frame()
    assert len(frame) == 2 * 2 * 3 * len(METRICS)
    row = frame.query("domain == 'books' and variant == 'unmasked' and model == 'merge' and metric == 'recall@10'")
    assert row["mean"].item() == one.mean
    alone = fm.evaluate(opened["books"], {"merge": merged}, max_users=5)
    assert alone.sums["books"]["unmasked"].num_users == 5
    with pytest.raises(ConfigError) as caught:
        scores.interval("merge", "shoes")
    assert "shoes" in str(caught.value)


def test_recommendations_are_those_of_the_encoded_catalog(
    experts: dict[str, fm.Model], opened: dict[str, LocalDomain], place: Path
) -> None:
    history = list(opened["books"].catalog.item_ids[:2])
    recommender = fm.load_recommender(experts["books"], opened["books"])
    found = fm.recommend(recommender, history, k=3)
    assert len(found) == 3
    assert not {item.item_id for item in found} & {*history}
    kept = fm.recommend(recommender, history, k=25, keep_seen=True)
    assert [item.score for item in kept] == sorted((item.score for item in kept), reverse=True)
    backbone = opened["books"].backbone
    assert fm.load_recommender(None, place / "domains" / "books", backbone).catalog.name == "books"


@pytest.mark.long
def test_a_federation_runs_in_this_process_and_leaves_logging_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    flat = {key: value for key, value in to_flat(small_experiment(tmp_path)).items() if value != "none"}
    library = logging.getLogger("fedmerge")
    before = (list(library.handlers), library.propagate, torch.get_num_threads())
    run = fm.simulate(None, flat)
    assert (list(library.handlers), library.propagate, torch.get_num_threads()) == before
    assert "run folder" not in capsys.readouterr().err
    assert f"run folder: {run.folder}" in caplog.text
    assert f"run folder: {run.folder}" in (run.folder / "run.log").read_text()
    assert set(run.experts) == {"beauty", "books", "coffee"}
    assert run.choice["served"] in run.report
    merged = fm.load_adapter(run.merges["average"])
    again = fm.merge(run.experts, "average")
    for name, module in merged.adapter.modules.items():
        torch.testing.assert_close(module.delta_weight(), again.adapter.modules[name].delta_weight())
    assert {"beauty", "camping"} <= set(run.to_frame()["domain"])
    folders = {"merged": run.merges[run.choice["served"].replace(" ", "-")], "expert": run.experts["beauty"]}
    served = fm.load_served(run.folder, tmp_path / "domains" / "beauty")
    chosen = run.choice["per_domain"]["beauty"]["serve"]
    wanted = fm.load_served(run.folder, tmp_path / "domains" / "beauty", model=chosen)
    assert torch.equal(served.item_vectors, wanted.item_vectors)
    for model, folder in folders.items():
        found = fm.load_served(run.folder, tmp_path / "domains" / "beauty", model=model, cache_dir=tmp_path)
        of_folder = room.load_recommender(folder, tmp_path / "domains" / "beauty")
        assert torch.equal(found.item_vectors, of_folder.item_vectors)
    with pytest.raises(RunDirError):
        fm.simulate(None, flat)
    with pytest.raises(ConfigError):
        fm.simulate(small_experiment(tmp_path), {"seed": 1})


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LayoutMismatchError) as caught:
        fm.load_adapter(tmp_path)
    assert str(tmp_path) in str(caught.value)
