"""An expert is trained once; a damaged or unfinished one is trained again or resumed."""

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from in_process import cached_expert_of, expert_of

from fedmerge.adapter import Adapter, adapter_sha256
from fedmerge.client.cache.experts import REPORT_FILE, expert_inputs
from fedmerge.client.cache.folders import inputs_key
from fedmerge.client.local_domain import LocalDomain, open_domain
from fedmerge.client.training.settings import training_settings
from fedmerge.config import ExperimentConfig, from_flat
from fedmerge.domain.demo import generate_domain
from fedmerge.domain.folder import write_domain
from fedmerge.encoder.backbone import Backbone
from fedmerge.errors import ClientError, DivergedError


class Killed(BaseException):
    """A stop that no handler catches."""


def settings_for(cache: Path, **changes: Any) -> ExperimentConfig:
    flat = {
        "cache_dir": str(cache),
        "train.max_steps": 2,
        "train.batch_size": 10,
        "train.validate_every_steps": 1,
        "lora.target_modules": "query",
        "lora.rank": 2,
        "lora.alpha": 4,
        "runtime.device": "cpu",
        "runtime.precision": "float32",
        "text.max_attribute_tokens": 6,
        "text.max_items": 3,
        "text.max_tokens": 48,
    }
    return from_flat({**flat, **changes})


def expert(domain: LocalDomain, config: ExperimentConfig) -> tuple[Adapter, dict[str, Any], list[str]]:
    lines: list[str] = []
    adapter, report = expert_of(domain, config, lines.append)
    return adapter, report, lines


def experts_on_disk(cache: Path) -> list[Path]:
    return sorted((cache / "experts").iterdir())


def test_an_expert_is_trained_once(toys: LocalDomain, tmp_path: Path) -> None:
    config = settings_for(tmp_path)
    trained, report, lines = expert(toys, config)
    assert report["cached"] is False
    assert report["sha256"] == adapter_sha256(trained)
    assert len(lines) == 3  # start and two validations
    json.dumps(report, allow_nan=False)
    (folder,) = experts_on_disk(tmp_path)  # no checkpoint and no partial folder beside it
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}

    again, cached, lines = expert(toys, config)
    assert cached == {**json.loads(json.dumps(report)), "cached": True}
    assert adapter_sha256(again) == report["sha256"]
    assert len(lines) == 1
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == times
    assert adapter_sha256(cached_expert_of(toys, config, report["sha256"])) == report["sha256"]


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"train.max_steps": 3},
        {"lora.rank": 3},
        {"text.max_items": 2},
        {"runtime.threads_per_client": 2},
    ],
    ids=str,
)
def test_other_settings_train_again(toys: LocalDomain, tmp_path: Path, change: dict[str, Any]) -> None:
    expert(toys, settings_for(tmp_path))
    config = settings_for(tmp_path, **change)
    assert expert(replace(toys, text=config.text), config)[1]["cached"] is False
    assert len(experts_on_disk(tmp_path)) == 2


def test_settings_of_the_server_do_not_train_again(toys: LocalDomain, tmp_path: Path) -> None:
    expert(toys, settings_for(tmp_path))
    change = {"merge.methods": "average", "evaluation.test_users": 3, "output_dir": "elsewhere", "name": "other"}
    assert expert(toys, settings_for(tmp_path, **change))[1]["cached"] is True


def test_other_data_of_the_same_name_trains_again(toys: LocalDomain, backbone: Backbone, tmp_path: Path) -> None:
    config = settings_for(tmp_path)
    _, first, _ = expert(toys, config)
    for number, demo in enumerate(
        (
            generate_domain("toys", num_users=31, num_items=25),
            generate_domain("toys", seed=1, num_users=30, num_items=25),
        )
    ):
        folder = tmp_path / str(number) / "toys"
        write_domain(folder, demo.catalog, demo.interactions, public_catalog=True, synthetic=True, source="test")
        _, report, _ = expert(open_domain(folder, backbone, toys.text), config)
        assert report["cached"] is False
        assert [v["loss"] for v in report["validations"]] != [v["loss"] for v in first["validations"]]


def flip_a_value(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(bytes(data))


def cut_tensors(folder: Path) -> None:
    os.truncate(folder / "adapter_model.safetensors", 100)


def spoil_report(folder: Path) -> None:
    (folder / REPORT_FILE).write_text('{"steps":')


def remove_report(folder: Path) -> None:
    (folder / REPORT_FILE).unlink()


@pytest.mark.parametrize("damage", [flip_a_value, cut_tensors, spoil_report, remove_report])
def test_a_damaged_expert_is_trained_again(toys: LocalDomain, tmp_path: Path, damage: Any) -> None:
    config = settings_for(tmp_path)
    _, report, _ = expert(toys, config)
    (folder,) = experts_on_disk(tmp_path)
    damage(folder)
    adapter, again, _ = expert(toys, config)
    assert again["cached"] is False
    assert adapter_sha256(adapter) == again["sha256"] == report["sha256"]
    assert expert(toys, config)[1]["cached"] is True


def test_a_killed_training_of_an_expert_resumes_from_disk(toys: LocalDomain, tmp_path: Path) -> None:
    changes = {"train.max_steps": 4}
    whole, _, _ = expert(toys, settings_for(tmp_path / "whole", **changes))

    def kill(line: str) -> None:
        if "step 3," in line:
            raise Killed

    config = settings_for(tmp_path / "killed", **changes)
    with pytest.raises(Killed):
        expert_of(toys, config, kill)
    (checkpoint,) = experts_on_disk(tmp_path / "killed")
    assert checkpoint.suffix == ".safetensors"
    adapter, report, lines = expert(toys, config)
    assert adapter_sha256(adapter) == adapter_sha256(whole)
    assert report["cached"] is False
    assert "resuming at step 2" in lines[0]
    assert checkpoint not in experts_on_disk(tmp_path / "killed")


def test_an_expert_that_is_not_in_the_cache_is_not_evaluated(toys: LocalDomain, tmp_path: Path) -> None:
    config = settings_for(tmp_path)
    with pytest.raises(ClientError, match="aaaaaaaaaaaa"):
        cached_expert_of(toys, config, "a" * 64)
    _, report, _ = expert(toys, config)
    with pytest.raises(ClientError, match=rf"{report['sha256'][::-1][:12]}.*{tmp_path}.*cache_dir"):
        cached_expert_of(toys, config, report["sha256"][::-1])


def test_domain_level_privacy_hides_that_a_training_diverged(toys: LocalDomain, tmp_path: Path) -> None:
    def diverging(**changes: Any) -> ExperimentConfig:
        config = settings_for(tmp_path, **{"train.max_steps": 8, "lora.target_modules": "query,value", **changes})
        return config.model_copy(update={"train": config.train.model_copy(update={"learning_rate": 1e30})})

    with pytest.raises(DivergedError, match="NaN"):  # at the first validation
        expert(toys, diverging())
    noise = {"dp.mode": "domain-local", "dp.noise_multiplier": 0.5, "dp.delta": 1e-3, "dp.clip": 0.1}
    sent, report, lines = expert(toys, diverging(**noise))
    assert any("NaN" in line for line in lines)
    assert (report["steps"], report["stopped_by"]) == (0, "not told")
    assert report["seconds"] > 0  # a time of 0 would reveal it
    assert report["privacy"]["noise_multiplier"] == 0.5
    noised = torch.cat([module.lora_B.flatten() for module in sent.modules.values()])
    assert float(noised.std()) == pytest.approx(0.5 * 2 * 0.1, rel=0.2)


@pytest.mark.parametrize(
    ("flat", "key"),
    [
        ({}, "cd66f993d7a1dfdb"),
        (
            {"train.negatives": "catalog", "dp.mode": "user", "dp.epsilon": 8.0, "dp.delta": 1e-5},
            "147b644475ec0b59",
        ),
        ({"dp.mode": "domain-local", "dp.noise_multiplier": 1.0, "dp.delta": 1e-5}, "4e288669f7b5dc34"),
    ],
    ids=["plain", "by user", "by domain"],
)
def test_an_expert_keeps_its_name_on_disk_across_versions_of_the_settings(flat: dict[str, Any], key: str) -> None:
    """Literal keys: a setting that is removed, or added with a default, must not make clients train again."""
    compute = SimpleNamespace(precision="float32")
    domain = SimpleNamespace(
        manifest=SimpleNamespace(catalog_sha256="c" * 64, interactions_sha256="i" * 64, name="books"),
        text=from_flat(flat).text,
        backbone=SimpleNamespace(sha256="b" * 64, pooling="mean", device="cpu", compute=compute),
    )
    inputs = expert_inputs(cast(LocalDomain, domain), training_settings(from_flat(flat)))
    assert inputs_key({**inputs, "versions": []}) == key
