"""Another domain's adapter continued on a client's own users: against a plain loop, its cache, and its noise."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmerge.adapter import Adapter, LoraModule, adapter_sha256
from fedmerge.client.cache.experts import expert_inputs
from fedmerge.client.cache.folders import inputs_key
from fedmerge.client.cache.woven import load_or_weave
from fedmerge.client.evaluate import evaluate
from fedmerge.client.local_domain import LocalDomain
from fedmerge.client.training.batches import training_batches
from fedmerge.client.training.checkpoint import write_checkpoint
from fedmerge.client.training.expert import weaving_settings
from fedmerge.client.training.plain_sgd import batch_loss
from fedmerge.client.training.settings import TrainingSettings, WeaveTask, training_settings
from fedmerge.config import ExperimentConfig, Train, Weave, from_flat
from fedmerge.encoder.lora import adapter_of, attach, fresh_adapter, load_into
from fedmerge.errors import PolicyError
from fedmerge.privacy.dp.accountant import spent_epsilon
from fedmerge.privacy.dp.releases import Release


class Killed(BaseException):
    """A stop that no handler catches."""


def experiment(**changes: Any) -> ExperimentConfig:
    flat = {
        "domains.train": "toys,books,music",
        "domains.unseen": "",
        "privacy.policy": "catalog-private",
        "merge.methods": "average",
        "train.max_steps": 2,
        "train.batch_size": 10,
        "train.learning_rate": 0.05,
        "train.warmup_steps": 2,
        "lora.target_modules": "query",
        "lora.rank": 2,
        "lora.alpha": 4,
        "weave.schedule": "all",
        "weave.steps": 6,
        "runtime.device": "cpu",
        "runtime.precision": "float32",
        "text.max_attribute_tokens": 6,
        "text.max_items": 3,
        "text.max_tokens": 48,
    }
    return from_flat({**flat, **changes})


def settings_for(**changes: Any) -> TrainingSettings:
    return training_settings(experiment(**changes))


@pytest.fixture
def received(toys: LocalDomain) -> Adapter:
    """An adapter of another domain, of another rank."""
    fresh = fresh_adapter(toys.backbone, experiment().lora.model_copy(update={"rank": 3, "alpha": 6}), seed=5)
    rng = torch.Generator().manual_seed(7)
    return Adapter(
        {
            name: LoraModule(module.lora_A, torch.randn(module.lora_B.shape, generator=rng) / 10, module.scaling)
            for name, module in fresh.modules.items()
        }
    )


def woven(
    domain: LocalDomain, settings: TrainingSettings, task: WeaveTask, cache: Path, run_id: str | None = None
) -> tuple[Adapter, dict[str, Any]]:
    return load_or_weave(domain, settings, task, 2, str(cache), run_id, lambda line: None)


def continued_by_hand(domain: LocalDomain, start: Adapter, settings: Train, proximal: float) -> list[Adapter]:
    """The adapters after each step of a loop written from the definition."""
    module = next(iter(start.modules.values()))
    model = attach(domain.backbone, ["query"], module.rank, module.rank * module.scaling, seed=0)
    try:
        load_into(model, start)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        before = [parameter.detach().clone() for parameter in parameters]
        optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
        batches = training_batches(domain.training_sequences, settings, 0, "toys", "weave", "books")
        found = []
        for step in range(int(settings.max_steps or 0)):
            rate = settings.learning_rate * min(1, (step + 1) / settings.warmup_steps)
            optimizer.param_groups[0]["lr"] = rate * (1 - step / int(settings.max_steps or 0))
            optimizer.zero_grad()
            loss = batch_loss(domain, next(batches)[0], None)
            for parameter, at_start in zip(parameters, before, strict=True):
                loss = loss + proximal / 2 * ((parameter - at_start) ** 2).sum()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            found.append(adapter_of(model))
        return found
    finally:
        model.unload()


@pytest.mark.parametrize("proximal", [0.0, 3.0])
def test_a_continuation_is_the_best_of_a_plain_loop_from_the_received_adapter(
    toys: LocalDomain, received: Adapter, tmp_path: Path, proximal: float
) -> None:
    settings = settings_for(**{"weave.proximal": proximal})
    found, report = woven(toys, settings, WeaveTask(1, "books", received), tmp_path)
    of_weaving = weaving_settings(settings.train, settings.weave)
    assert of_weaving.learning_rate == pytest.approx(0.01)
    by_hand = [received, *continued_by_hand(toys, received, of_weaving, proximal)]
    assert [each["step"] for each in report["validations"]] == [0, 2, 4, 6]  # every S/4, rounded up, and the last
    users = evaluate(toys, {str(step): by_hand[step] for step in (0, 2, 4, 6)}, "valid", 500, 0)["unmasked"]
    scores = {step: users.mean(str(step), "ndcg@10") for step in (0, 2, 4, 6)}
    for each in report["validations"]:
        assert each["ndcg"] == pytest.approx(scores[each["step"]], abs=1e-6)
    assert report["best_step"] == max(scores, key=lambda step: scores[step])
    for name, module in found.modules.items():
        expected = by_hand[report["best_step"]].modules[name]
        torch.testing.assert_close(module.delta_weight(), expected.delta_weight(), atol=1e-6, rtol=1e-4)
        assert module.rank == 3


def test_the_points_of_validation_are_five_at_most() -> None:
    for steps in (1, 3, 4, 5, 9, 13, 200):
        every = weaving_settings(Train(), Weave(steps=steps)).validate_every_steps
        assert len({0, *range(every, steps, every), steps}) <= 5


def test_without_steps_the_adapter_keeps_its_bytes(toys: LocalDomain, received: Adapter, tmp_path: Path) -> None:
    found, report = woven(toys, settings_for(**{"weave.steps": 0}), WeaveTask(1, "books", received), tmp_path)
    assert adapter_sha256(found) == adapter_sha256(received) == report["sha256"]
    assert report["steps"] == 0


def test_an_adapter_is_continued_once_and_depends_on_no_other(
    toys: LocalDomain, received: Adapter, tmp_path: Path
) -> None:
    settings = settings_for()
    first, report = woven(toys, settings, WeaveTask(1, "books", received), tmp_path)
    again, cached = woven(toys, settings_for(**{"weave.schedule": "ring"}), WeaveTask(2, "books", received), tmp_path)
    other, _ = woven(toys, settings, WeaveTask(1, "music", received), tmp_path)
    assert (report["cached"], cached["cached"]) == (False, True)
    assert adapter_sha256(first) == adapter_sha256(again) != adapter_sha256(other)
    stronger, _ = woven(toys, settings_for(**{"weave.rate": 1.0}), WeaveTask(1, "books", received), tmp_path)
    assert adapter_sha256(stronger) != adapter_sha256(first)


def test_weaving_trains_no_expert_again_unless_it_changes_the_noise(toys: LocalDomain) -> None:
    def key(**changes: Any) -> str:
        return inputs_key(expert_inputs(toys, settings_for(**changes)))

    none, more = {"weave.schedule": "none"}, {"weave.steps": 7}
    assert key() == key(**none) == key(**more)
    assert len({key(**BY_USER), key(**BY_USER, **none), key(**BY_USER, **more)}) == 3


@pytest.mark.parametrize("proximal", [0.0, 3.0])
def test_a_killed_training_resumes_to_the_same_bytes(
    toys: LocalDomain, received: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proximal: float
) -> None:
    settings, task = settings_for(**{"weave.proximal": proximal, "weave.rate": 1.0}), WeaveTask(1, "books", received)
    whole, _ = woven(toys, settings, task, tmp_path / "whole")

    def killed(*given: Any) -> None:
        write_checkpoint(*given)
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr("fedmerge.client.training.loop.write_checkpoint", killed)
        with pytest.raises(Killed):
            woven(toys, settings, task, tmp_path / "killed")
    resumed, report = woven(toys, settings, task, tmp_path / "killed")
    assert adapter_sha256(resumed) == adapter_sha256(whole)
    assert report["steps"] == 6


# Differential privacy by user

BY_USER = {
    "dp.mode": "user",
    "dp.delta": 1e-4,
    "dp.epsilon": 8.0,
    "dp.accountant": "rdp",
    "dp.randomness": "seeded",
    "train.negatives": "catalog",
}


def test_the_noise_by_user_covers_all_trainings_together(toys: LocalDomain, received: Adapter, tmp_path: Path) -> None:
    pytest.importorskip("opacus")
    settings = settings_for(**BY_USER)
    assert settings.woven_steps == 2 * 6
    _, report = woven(toys, settings, WeaveTask(1, "books", received), tmp_path, "run")
    spent = report["privacy"]
    assert spent["steps"] == 6
    assert report["validation_users"] == 0
    releases = [Release(spent["noise_multiplier"], spent["sample_rate"], steps) for steps in (2, 6, 6)]
    assert spent_epsilon(releases, 1e-4, "rdp") == pytest.approx(8.0, rel=0.02)
    assert spent_epsilon(releases, 1e-4, "rdp") <= 8.0


def test_by_user_each_pass_is_released_once(toys: LocalDomain, received: Adapter, tmp_path: Path) -> None:
    pytest.importorskip("opacus")
    settings = settings_for(**BY_USER)
    first, _ = woven(toys, settings, WeaveTask(1, "books", received), tmp_path, "run")
    again, report = woven(toys, settings, WeaveTask(1, "books", received), tmp_path, "run")
    assert adapter_sha256(again) == adapter_sha256(first) == report["sha256"]
    with pytest.raises(PolicyError, match="pass 1 of weaving was released before"):
        woven(toys, settings, WeaveTask(1, "music", received), tmp_path, "run")
    for number in (0, 3):
        with pytest.raises(PolicyError, match=f"pass {number} of weaving, but the noise is calibrated for 2"):
            woven(toys, settings, WeaveTask(number, "books", received), tmp_path, "run")


def test_an_attacker_poisons_what_it_continues(toys: LocalDomain, received: Adapter, tmp_path: Path) -> None:
    task = WeaveTask(1, "books", received)
    honest, _ = woven(toys, settings_for(), task, tmp_path)
    attack = {"simulation.attacker": "toys", "simulation.attack_strength": 1.0, "simulation.attack": "flipped-labels"}
    poisoned, report = woven(toys, settings_for(**attack), task, tmp_path)
    assert adapter_sha256(poisoned) != adapter_sha256(honest)
    assert report["validation_users"] == 0
    unpoisoned, _ = woven(toys, replace(settings_for(**attack), simulation=settings_for().simulation), task, tmp_path)
    assert adapter_sha256(unpoisoned) == adapter_sha256(honest)
