"""Trainings with auxiliary losses and augmentations: neutral settings, caches, checkpoints, rounds, privacy by user."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import attached_lora, trained
from in_process import expert_of
from peft import PeftModel

from fedmerge.adapter import adapter_sha256
from fedmerge.bench.joint import train_jointly
from fedmerge.client.auxiliary.prepared import Auxiliary, augmented_histories, prepare
from fedmerge.client.cache.experts import expert_inputs
from fedmerge.client.cache.folders import inputs_key
from fedmerge.client.local_domain import LocalDomain
from fedmerge.client.training.batches import training_batches
from fedmerge.client.training.by_mode import train_private_expert
from fedmerge.client.training.dp_sgd import Records, UserPlan, clipped_sum, private_steps
from fedmerge.client.training.expert import fine_tune, train_expert, training_record
from fedmerge.client.training.loop import Attached
from fedmerge.client.training.losses import TEMPERATURE
from fedmerge.client.training.round import RoundTask, train_round
from fedmerge.client.training.settings import training_settings
from fedmerge.config import Lora, Train, from_flat
from fedmerge.encoder.encode import encode
from fedmerge.encoder.lora import fresh_adapter
from fedmerge.errors import ConfigError

LORA = Lora(rank=2, alpha=4, target_modules=("query", "value"))
TRAIN = Train(
    learning_rate=1e-2, batch_size=10, max_steps=5, warmup_steps=1, validate_every_steps=2, validation_users=10
)
BY_USER = TRAIN.model_copy(update={"negatives": "catalog"})
PLAN = UserPlan(1.0, 0.5, 0.5, 30, 3, "seeded")
EVERYTHING = ("sp=0.1", "coserec=0.1", "mip=0.1", "attribute-dropout=0.1")
AUGMENT = ("insert=0.3", "substitute=0.1")
OF_BEFORE = {  # keys of a training in the cache before there were auxiliary losses
    "learning_rate", "batch_size", "samples", "max_epochs", "max_steps", "max_minutes", "warmup_steps", "temperature",
    "validate_every_steps", "validation_users", "negatives", "item_refresh_steps", "patience",
}  # fmt: skip


def changed(settings: Train, **changes: Any) -> Train:
    return Train.model_validate({**settings.model_dump(), **changes})


def last_adapter(domain: LocalDomain, settings: Train) -> str:
    """Return the hash after the last step, which a round returns."""
    task = RoundTask(1, 1, fresh_adapter(domain.backbone, LORA, 0))
    return adapter_sha256(train_round(domain, LORA, settings, 0, task)[0])


@pytest.fixture(scope="module")
def domain(toys: LocalDomain) -> Iterator[LocalDomain]:
    """The domain with two categories and a mask token."""
    attributes = {**toys.catalog.attributes, "category": tuple(("red", "coffee")[i % 2] for i in range(25))}
    toys.backbone.tokenizer.mask_token = "[MASK]"
    yield replace(toys, catalog=replace(toys.catalog, attributes=attributes))
    toys.backbone.tokenizer.mask_token = None


# Neutral settings, and what names the others


def test_adapters_of_two_sources_are_continued_on_different_augmentations(toys: LocalDomain) -> None:
    def continued(*scope: str) -> tuple[float | None, ...]:
        settings = changed(TRAIN, augment=("insert=0.9",))
        drawn = training_batches(toys.training_sequences, settings, 0, "the same")
        batches = ((toys, batch, epochs) for batch, epochs in drawn)
        report = fine_tune("toys", [toys], batches, LORA, settings, 0, scope=scope)[1]
        return tuple(validation.loss for validation in report.validations)

    assert continued("weave", "a") == continued("weave", "a")
    assert len({continued(), continued("weave", "a"), continued("weave", "b")}) == 3


@pytest.mark.parametrize(
    "off", [{"objectives": ("sp=0", "mip=0.0")}, {"augment": ("insert=0",)}, {"views": ("crop=1",)}]
)
def test_what_is_off_changes_no_byte_and_no_key(toys: LocalDomain, off: dict[str, Any]) -> None:
    settings = changed(TRAIN, **off)
    assert training_record(settings).keys() == OF_BEFORE
    assert training_record(settings) == training_record(TRAIN)
    assert prepare(toys, settings, 0, "toys") is None
    assert last_adapter(toys, settings) == last_adapter(toys, TRAIN)


def test_what_is_on_is_named_by_the_key_and_the_report(toys: LocalDomain, tmp_path: Path) -> None:
    flat = {"cache_dir": str(tmp_path), "train.max_steps": 1, "train.batch_size": 10, "lora.rank": 2}
    keys, reports = set(), []
    for changes in (
        {},
        {"train.objectives": "sp=0.1"},
        {"train.objectives": "sp=0.2"},
        {"train.objectives": "coserec=0.1"},
        {"train.objectives": "coserec=0.1", "train.views": "crop=0.6"},
        {"train.augment": "substitute=0.1"},
        {"train.augment": "substitute=0.1", "train.augment_share": 0.4},
    ):
        config = from_flat({**flat, **changes})
        keys.add(inputs_key(expert_inputs(toys, training_settings(config))))
        if len(keys) in (1, 4):
            reports.append(expert_of(toys, config)[1])
    assert len(keys) == 7
    assert "auxiliary" not in reports[0]
    assert reports[1]["auxiliary"] == {
        "objectives": {"coserec-style": 0.1},
        "views": {"crop": 0.6, "mask": 0.7, "reorder": 0.2, "insert": 0.4, "substitute": 0.1},
    }


# Trainings


@pytest.mark.parametrize(
    "changes",
    [{"objectives": (name,)} for name in EVERYTHING] + [{"augment": AUGMENT}, {"augment": ("mask=0.7",)}],
    ids=str,
)
def test_every_loss_and_augmentation_changes_the_expert(domain: LocalDomain, changes: dict[str, Any]) -> None:
    settings = changed(TRAIN, **changes, max_steps=2)
    assert last_adapter(domain, settings) == last_adapter(domain, settings)
    assert last_adapter(domain, settings) != last_adapter(domain, changed(TRAIN, max_steps=2))


@pytest.mark.long
def test_a_killed_training_resumes_to_the_same_result(domain: LocalDomain, tmp_path: Path) -> None:
    settings, checkpoint = changed(TRAIN, objectives=EVERYTHING, augment=AUGMENT), tmp_path / "checkpoint"
    whole, report = train_expert(domain, LORA, settings, 3)

    def kill(line: str) -> None:
        if "step 4," in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_expert(domain, LORA, settings, 3, kill, checkpoint)
    lines: list[str] = []
    again, report_again = train_expert(domain, LORA, settings, 3, lines.append, checkpoint)
    assert lines[0] == "toys: resuming at step 2"
    assert report_again.validations[1:] == report.validations[1:]  # the losses, to the last bit
    assert adapter_sha256(again) == adapter_sha256(whole)


def test_a_joint_training_resumes_before_each_domain_has_moved_its_map(domain: LocalDomain, tmp_path: Path) -> None:
    other = replace(domain, manifest=replace(domain.manifest, name="other"))
    domains, checkpoint = {"other": other, "toys": domain}, tmp_path / "checkpoint"
    settings = changed(TRAIN, objectives=("mip=0.1",), max_steps=2, validate_every_steps=1)
    whole, report = train_jointly(domains, LORA, settings, 0, "shuffled")

    def kill(line: str) -> None:
        if "step 4," in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_jointly(domains, LORA, settings, 0, "shuffled", kill, checkpoint)
    again, report_again = train_jointly(domains, LORA, settings, 0, "shuffled", checkpoint=checkpoint)
    assert report_again.validations[1:] == report.validations[1:]
    assert adapter_sha256(again) == adapter_sha256(whole)


def test_rounds_train_with_them_and_send_an_adapter_alone(domain: LocalDomain) -> None:
    settings = changed(TRAIN, objectives=EVERYTHING, augment=AUGMENT, max_steps=4)
    task = RoundTask(2, 2, fresh_adapter(domain.backbone, LORA, 0), proximal=0.1)
    first, again, plain = (train_round(domain, LORA, each, 0, task)[0] for each in (settings, settings, TRAIN))
    assert adapter_sha256(first) == adapter_sha256(again) != adapter_sha256(plain)
    assert first.modules.keys() == task.start.modules.keys()


# Differential privacy by user


@pytest.fixture
def model(toys: LocalDomain) -> Iterator[PeftModel]:
    with attached_lora(toys.backbone, LORA) as attached:
        yield attached


def private(domain: LocalDomain, **changes: Any) -> Auxiliary:
    found = prepare(domain, changed(BY_USER, **changes), 0, "toys", by_user=True)
    assert found is not None
    return found


def records_of(domain: LocalDomain, users: list[int]) -> Records:
    sequences = [domain.training_sequences[user] for user in users]
    targets = np.array([s[-1] for s in sequences], dtype=np.int64)
    return Records([s[:-1] for s in sequences], targets, np.array(users))


def test_one_user_moves_the_augmented_sum_by_the_clip_at_most(toys: LocalDomain, model: PeftModel) -> None:
    auxiliary, users = private(toys, augment=AUGMENT, augment_share=1.0), list(range(8))
    items, clip = encode(toys.backbone, toys.item_sequences), 0.01

    def total(taking_part: list[int]) -> torch.Tensor:
        records = records_of(toys, taking_part)
        histories = augmented_histories(auxiliary, toys, records.histories, records.users, 5)
        found = clipped_sum(
            toys, model, trained(model), replace(records, histories=histories), items, TEMPERATURE, clip
        )
        return torch.cat([tensor.flatten() for tensor in found])

    everyone = total(users)
    for user in users:
        moved = (everyone - total([other for other in users if other != user])).norm()
        assert 0.9 * clip < moved <= clip * (1 + 1e-4)


def test_an_augmented_history_depends_on_its_user_alone(toys: LocalDomain) -> None:
    auxiliary, users = private(toys, augment=AUGMENT), list(range(30))
    records = records_of(toys, users)
    found = augmented_histories(auxiliary, toys, records.histories, records.users, 5)
    assert 5 < sum(a.tolist() != b.tolist() for a, b in zip(found, records.histories, strict=True)) < 25
    for user in (0, 7, 29):
        one = records_of(toys, [user])
        (alone,) = augmented_histories(auxiliary, toys, one.histories, one.users, 5)
        assert alone.tolist() == found[user].tolist()


def test_a_private_training_augments_and_resumes(toys: LocalDomain, tmp_path: Path) -> None:
    settings = changed(BY_USER, augment=AUGMENT, augment_share=1.0, validate_every_steps=1)
    whole, _ = train_private_expert(toys, LORA, settings, 0, PLAN)
    plain, _ = train_private_expert(toys, LORA, changed(BY_USER, validate_every_steps=1), 0, PLAN)
    assert adapter_sha256(whole) != adapter_sha256(plain)
    checkpoint = tmp_path / "checkpoint"

    def kill(line: str) -> None:
        if checkpoint.exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_private_expert(toys, LORA, settings, 0, PLAN, kill, checkpoint)
    again, _ = train_private_expert(toys, LORA, settings, 0, PLAN, checkpoint=checkpoint)
    assert adapter_sha256(again) == adapter_sha256(whole)


def test_attribute_dropout_adds_a_gradient_of_the_catalog_to_a_private_step(
    domain: LocalDomain, model: PeftModel
) -> None:
    moved, before = [], [parameter.detach().clone() for parameter in trained(model)]
    one_user = replace(PLAN, noise_multiplier=0.0, sample_rate=1.0)
    for weight in (0, 1, 2):
        settings = changed(BY_USER, objectives=(f"attribute-dropout={weight}",))
        with torch.no_grad():
            for parameter, value in zip(trained(model), before, strict=True):
                parameter.copy_(value)
        attached = Attached(model, trained(model), torch.optim.SGD(trained(model), lr=1.0))
        auxiliary = prepare(domain, settings, 0, "toys", by_user=True)
        private_steps(domain, attached, settings, one_user, 0, "toys", auxiliary=auxiliary)(0)
        moved.append(torch.cat([(b - p.detach()).flatten() for b, p in zip(before, trained(model), strict=True)]))
    once, twice = moved[1] - moved[0], moved[2] - moved[0]
    assert once.norm() > 1e-3
    torch.testing.assert_close(twice, 2 * once, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["sp", "coserec", "mip", "map"])
def test_losses_between_users_are_refused_by_user(toys: LocalDomain, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"dp\.mode = 'user', but train\.objectives has {name}.*train\.augment"):
        private(toys, objectives=(f"{name}=0.1",))
