"""Local fine-tuning: learning, reproducibility, budgets, and resumption from a checkpoint."""

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backbones import WORDS
from run_folders import full_disk

from fedmerge.adapter import adapter_sha256
from fedmerge.client.evaluate import evaluate
from fedmerge.client.local_domain import LocalDomain, open_domain
from fedmerge.client.training.batches import num_batches, training_batches
from fedmerge.client.training.checkpoint import read_checkpoint, write_checkpoint
from fedmerge.client.training.expert import PATIENCE, TrainingReport, train_expert
from fedmerge.client.training.losses import TEMPERATURE, in_batch_softmax
from fedmerge.config import Lora, Text, Train
from fedmerge.domain.catalog import make_catalog
from fedmerge.domain.folder import write_domain
from fedmerge.domain.interactions import Interactions, make_interactions
from fedmerge.domain.splits import train_sequences
from fedmerge.encoder.backbone import Backbone
from fedmerge.encoder.encode import embed_batch
from fedmerge.encoder.lora import applied
from fedmerge.encoder.text import pack_sequences
from fedmerge.errors import ClientError, DomainError

NUM_ITEMS = 20
LORA = Lora(rank=8, alpha=16, target_modules=("all-linear",))
TRAIN = Train(
    learning_rate=1e-2,
    batch_size=20,
    max_steps=40,
    warmup_steps=3,
    validate_every_steps=10,
    validation_users=None,
)
QUICK = TRAIN.model_copy(update={"max_steps": 3, "batch_size": 10})


def write_walk(folder: Path, sequences: list[np.ndarray]) -> Path:
    """Write a domain whose items have one word each."""
    words = [word for word in WORDS if len(word) > 2][3 : 3 + NUM_ITEMS]
    blank = [""] * NUM_ITEMS
    catalog = make_catalog(
        folder.name, [f"i{i}" for i in range(NUM_ITEMS)], {"title": words, "brand": blank, "category": blank}
    )
    users = make_interactions([f"u{i}" for i in range(len(sequences))], sequences)
    write_domain(folder, catalog, users, public_catalog=True, synthetic=True, source="test")
    return folder


def walks(num_users: int, seed: int = 0) -> list[np.ndarray]:
    """Return users who move on by seven items at each step: the next item is certain, and no text reveals it."""
    starts = np.random.default_rng(seed).integers(0, NUM_ITEMS, num_users)
    return [(start + np.arange(6)) * 7 % NUM_ITEMS for start in starts]


@pytest.fixture(scope="module")
def walk(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> LocalDomain:
    folder = write_walk(tmp_path_factory.mktemp("domains") / "walk", walks(60))
    return open_domain(folder, backbone, Text(max_items=2, max_tokens=32))


def facts(report: TrainingReport) -> tuple[Any, ...]:
    """Return all of a report but the wall clock, signals included, with -1 in place of NaN, which equals nothing."""
    validations = [(v.step, -1.0 if math.isnan(v.loss) else v.loss, v.ndcg) for v in report.validations]
    return report.steps, report.best_step, report.stopped_by, validations, report.signals


# The loss


def by_hand(users: torch.Tensor, targets: list[int], items: torch.Tensor, temperature: float) -> float:
    """Average −log softmax over each user's target and the batch's other distinct targets, one user at a time."""
    losses = []
    for user, target in zip(users.double(), targets, strict=True):
        negatives = sorted(set(targets) - {target})
        scores = [float(user @ items[item].double()) / temperature for item in [target, *negatives]]
        losses.append(math.log(math.fsum(math.exp(score - scores[0]) for score in scores)))
    return math.fsum(losses) / len(losses)


def test_in_batch_softmax_by_hand() -> None:
    users = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    items = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    # Users 0 and 2 want item 0: user 0 has it (logits 2, 0), user 1 has item 1 (0, 2), user 2 is wrong (0, 2).
    right, wrong = math.log(1 + math.exp(-2)), math.log(1 + math.exp(2))
    loss = in_batch_softmax(users, items, torch.tensor([0, 1, 0]), temperature=0.5)
    assert float(loss) == pytest.approx((2 * right + wrong) / 3, rel=1e-6)


def test_in_batch_softmax_masks_the_duplicates_of_a_target() -> None:
    rng = torch.Generator().manual_seed(0)
    catalog = torch.nn.functional.normalize(torch.randn(9, 5, generator=rng), dim=1)
    users = torch.nn.functional.normalize(torch.randn(8, 5, generator=rng), dim=1)
    targets = [3, 7, 3, 0, 8, 7, 3, 1]
    items, rows = np.unique(targets, return_inverse=True)
    loss = in_batch_softmax(users, catalog[torch.from_numpy(items)], torch.from_numpy(rows), 0.05)
    assert float(loss) == pytest.approx(by_hand(users, targets, catalog, 0.05), rel=1e-5)
    unmasked = torch.nn.functional.cross_entropy(users @ catalog[torch.tensor(targets)].T / 0.05, torch.arange(8))
    assert abs(float(unmasked - loss)) > 0.05  # the naive loss is another


@pytest.mark.parametrize("samples", ["last", "random-prefix"])
def test_the_first_loss_is_that_of_the_untouched_backbone(backbone: Backbone, tmp_path: Path, samples: str) -> None:
    # With two training items per user, a random prefix has only one choice too, and the batch has all users.
    sequences = [sequence[:4] for sequence in walks(30)]
    domain = open_domain(write_walk(tmp_path / "walk", sequences), backbone, Text(max_items=2, max_tokens=32))
    settings = TRAIN.model_copy(update={"samples": samples, "max_steps": 1, "batch_size": 30})
    _, report = train_expert(domain, LORA, settings, seed=0)
    targets = [int(sequence[1]) for sequence in sequences]
    assert len(set(targets)) < 30
    text = domain.text
    packed = pack_sequences(
        domain.table, [sequence[:1] for sequence in sequences], backbone.special, text.max_items, text.max_tokens
    )
    users, items = embed_batch(backbone, packed), embed_batch(backbone, domain.item_sequences)
    assert report.validations[1].loss == pytest.approx(by_hand(users, targets, items, TEMPERATURE), rel=1e-4)


def test_the_last_training_item_is_the_target_and_held_out_items_are_never_read(
    backbone: Backbone, tmp_path: Path
) -> None:
    # With other held-out items the training is the same, the validation differs.
    reports = {}
    for name, held_out in (("one", [0, 1]), ("two", [5, 5])):
        sequences = [np.concatenate([sequence[:4], held_out]) for sequence in walks(30)]
        (tmp_path / name).mkdir()
        domain = open_domain(
            write_walk(tmp_path / name / "walk", sequences), backbone, Text(max_items=2, max_tokens=32)
        )
        assert [sequence.tolist() for sequence in train_sequences(domain.interactions)] == [
            s[:4].tolist() for s in sequences
        ]
        settings = QUICK.model_copy(update={"validate_every_steps": 1})
        reports[name] = train_expert(domain, LORA, settings, seed=0)[1].validations
    losses = {name: [validation.loss for validation in report[1:]] for name, report in reports.items()}
    assert losses["one"] == losses["two"]
    assert [v.ndcg for v in reports["one"]] != [v.ndcg for v in reports["two"]]


# Training


@pytest.mark.long
def test_training_learns_a_rule_that_the_text_does_not_reveal(walk: LocalDomain, backbone: Backbone) -> None:
    before = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    lines: list[str] = []
    adapter, report = train_expert(walk, LORA, TRAIN, seed=0, progress=lines.append)
    validations = report.validations
    assert [validation.step for validation in validations] == [0, 10, 20, 30, 40]
    assert validations[-1].loss < 0.8 * validations[1].loss
    best = max(validation.ndcg for validation in validations)
    assert best > validations[0].ndcg + 0.15
    assert next(v.ndcg for v in validations if v.step == report.best_step) == best
    assert (report.steps, report.stopped_by) == (40, "max_steps")
    assert len(lines) == len(validations)
    assert all(line.startswith("walk: ") for line in lines)
    assert all(module.lora_A.dtype == module.lora_B.dtype == torch.float32 for module in adapter.modules.values())
    after = backbone.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.long
def test_the_best_adapter_is_returned_and_not_the_last(walk: LocalDomain) -> None:
    adapter, report = train_expert(
        walk, LORA, TRAIN.model_copy(update={"learning_rate": 0.05, "max_steps": 30}), seed=1
    )
    sums = evaluate(walk, {"best": adapter}, "valid", None, seed=1)["unmasked"]
    best = next(v.ndcg for v in report.validations if v.step == report.best_step)
    assert 0 < report.best_step < report.steps
    assert best == max(v.ndcg for v in report.validations)
    assert sums.mean("best", "ndcg@10") == pytest.approx(best, abs=1e-3)


def test_the_same_seed_gives_the_same_adapter_and_another_seed_another(toys: LocalDomain) -> None:
    runs = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(noise)
        np.random.seed(noise)  # the global generators must not matter
        runs.append(train_expert(toys, LORA, QUICK, seed))
    (first, first_report), (again, again_report), (other, _) = runs
    assert adapter_sha256(first) == adapter_sha256(again)
    assert facts(first_report) == facts(again_report)
    assert adapter_sha256(first) != adapter_sha256(other)


def test_steps_are_a_budget(toys: LocalDomain) -> None:
    _, report = train_expert(toys, LORA, QUICK.model_copy(update={"max_steps": 4, "validate_every_steps": 3}), seed=0)
    assert (report.steps, report.stopped_by) == (4, "max_steps")
    assert [validation.step for validation in report.validations] == [0, 3, 4]


def test_epochs_are_a_budget(toys: LocalDomain) -> None:
    settings = QUICK.model_copy(update={"max_steps": 100, "max_epochs": 2, "batch_size": 10})
    _, report = train_expert(toys, LORA, settings, seed=0)
    assert (report.steps, report.stopped_by) == (2 * 3, "max_epochs")  # 30 users in batches of 10


def test_minutes_are_a_budget(toys: LocalDomain) -> None:
    settings = QUICK.model_copy(update={"max_steps": 100, "max_minutes": 1e-9})
    _, report = train_expert(toys, LORA, settings, seed=0)
    assert (report.steps, report.stopped_by) == (1, "max_minutes")


def test_a_batch_larger_than_the_domain_has_all_users(toys: LocalDomain) -> None:
    settings = QUICK.model_copy(update={"max_steps": None, "max_epochs": 3, "batch_size": 4096})
    assert train_expert(toys, LORA, settings, seed=0)[1].steps == 3


@pytest.mark.parametrize(
    ("num_users", "batch_size", "sizes"),
    [
        (1088, 64, [64] * 17),
        (30, 64, [30]),
        (192, 64, [64] * 3),
        (193, 64, [49, 48, 48, 48]),
        (2100, 64, [64] * 21 + [63] * 12),
        (2, 2, [2]),
    ],
)
@pytest.mark.parametrize("samples", ["last", "random-prefix"])
def test_an_epoch_has_every_user_once_in_batches_of_equal_size(
    num_users: int, batch_size: int, sizes: list[int], samples: str
) -> None:
    sequences = [np.array([user] * (2 + user % 7)) for user in range(num_users)]  # an item names its user
    settings = Train(batch_size=batch_size, samples=samples)
    drawn = list(itertools.islice(training_batches(sequences, settings, 0, "toys"), 2 * len(sizes)))
    assert num_batches(num_users, batch_size) == len(sizes)
    assert [epochs for _, epochs in drawn] == [number / len(sizes) for number in range(1, len(sizes) + 1)] + [
        1 + number / len(sizes) for number in range(1, len(sizes) + 1)
    ]
    for epoch in (drawn[: len(sizes)], drawn[len(sizes) :]):
        assert sorted((len(batch.targets) for batch, _ in epoch), reverse=True) == sizes
        assert sorted(np.concatenate([batch.targets for batch, _ in epoch]).tolist()) == list(range(num_users))


@pytest.mark.parametrize(("batch_size", "steps"), [(64, 1), (30, 1), (29, 2), (10, 3), (7, 5)])
def test_one_epoch_ends_with_its_last_batch(toys: LocalDomain, batch_size: int, steps: int) -> None:
    settings = QUICK.model_copy(update={"max_steps": None, "max_epochs": 1, "batch_size": batch_size})
    _, report = train_expert(toys, LORA, settings, seed=0)
    assert (len(toys.training_sequences), report.steps, report.stopped_by) == (30, steps, "max_epochs")


def test_patience_stops_a_training_that_does_not_improve(toys: LocalDomain) -> None:
    settings = QUICK.model_copy(update={"learning_rate": 1e-12, "max_steps": 100, "validate_every_steps": 2})
    lines: list[str] = []
    adapter, report = train_expert(toys, LORA, settings, 0, lines.append)
    assert (report.steps, report.best_step, report.stopped_by) == (2 * PATIENCE, 0, "patience")
    assert ["nothing was learned" in line for line in lines] == [False] * PATIENCE + [True]
    assert not any(module.lora_B.any() for module in adapter.modules.values())  # the untouched backbone


def test_a_loss_that_is_not_finite_is_refused_and_the_backbone_left_clean(
    toys: LocalDomain, backbone: Backbone
) -> None:
    names = list(backbone.model.state_dict())
    with pytest.raises(ClientError, match=r"toys.*\bnan\b.*step 2.*train\.learning_rate"):
        train_expert(toys, LORA, QUICK.model_copy(update={"learning_rate": 1e30}), seed=0)
    assert list(backbone.model.state_dict()) == names
    with applied(backbone, None):
        assert embed_batch(backbone, toys.item_sequences[:2]).isfinite().all()


def reduced(domain: LocalDomain, sequences: list[list[int]]) -> LocalDomain:
    interactions: Interactions = make_interactions([f"u{i}" for i in range(len(sequences))], sequences)
    return replace(domain, interactions=interactions)


@pytest.mark.parametrize(
    ("sequences", "found"),
    [
        ([[0, 1, 2, 3]], "1 users"),
        ([[0, 1, 2], [3, 4, 5], [1]], "0 users"),
        ([[0, 1], [2, 3]], "none of 2 users"),
    ],
)
def test_a_domain_too_small_to_train_on_is_refused(toys: LocalDomain, sequences: list[list[int]], found: str) -> None:
    with pytest.raises(DomainError, match=found):
        train_expert(reduced(toys, sequences), LORA, QUICK, seed=0)


# Checkpoints


class Killed(BaseException):
    """A stop that no handler catches."""


def killed_after(domain: LocalDomain, settings: Train, checkpoint: Path, validations: int) -> None:
    """Train until the checkpoint has this number of validations."""

    def progress(line: str) -> None:
        if sum(f"step {settings.validate_every_steps * number}," in line for number in range(1, 99)):
            progress.seen += 1  # type: ignore[attr-defined]  # a counter
        if progress.seen > validations:  # type: ignore[attr-defined]  # as above
            raise Killed

    progress.seen = 0  # type: ignore[attr-defined]  # as above
    with pytest.raises(Killed):
        train_expert(domain, LORA, settings, 3, progress, checkpoint)


LONG = TRAIN.model_copy(update={"max_steps": 9, "batch_size": 10, "validate_every_steps": 2, "learning_rate": 0.03})


@pytest.mark.long
@pytest.mark.parametrize("validations", [1, 3])
def test_a_killed_training_resumes_to_the_same_result(toys: LocalDomain, tmp_path: Path, validations: int) -> None:
    whole, report = train_expert(toys, LORA, LONG, 3)
    checkpoint = tmp_path / "experts" / "checkpoint"
    killed_after(toys, LONG, checkpoint, validations)
    assert [path.name for path in checkpoint.parent.iterdir()] == ["checkpoint"]
    lines: list[str] = []
    again, report_again = train_expert(toys, LORA, LONG, 3, lines.append, checkpoint)
    assert adapter_sha256(again) == adapter_sha256(whole)
    assert facts(report_again) == facts(report)
    assert lines[0] == f"toys: resuming at step {2 * validations}"
    assert len(lines) == 1 + 5 - validations


def test_tokens_at_once_change_the_training_by_rounding_alone(toys: LocalDomain) -> None:
    settings = TRAIN.model_copy(update={"max_steps": 3, "batch_size": 10})
    whole, _ = train_expert(toys, LORA, settings, 3)
    parts, _ = train_expert(toys, LORA, settings.model_copy(update={"tokens_at_once": 60}), 3)
    for name, module in whole.modules.items():
        torch.testing.assert_close(parts.modules[name].delta_weight(), module.delta_weight(), atol=2e-4, rtol=1e-2)
    assert adapter_sha256(whole) != adapter_sha256(parts)  # so it belongs to the key of a cache
    assert "tokens_at_once" not in settings.cache_inputs()
    assert settings.model_copy(update={"tokens_at_once": 60}).cache_inputs()["tokens_at_once"] == 60


def test_the_wall_clock_of_a_resumed_training_includes_earlier_attempts(toys: LocalDomain, tmp_path: Path) -> None:
    settings = LONG.model_copy(update={"max_minutes": 60.0})
    killed_after(toys, settings, tmp_path / "checkpoint", 1)
    checkpoint = read_checkpoint(tmp_path / "checkpoint")
    assert checkpoint is not None
    write_checkpoint(tmp_path / "checkpoint", replace(checkpoint, seconds=3600.0))
    assert train_expert(toys, LORA, settings, 3, checkpoint=tmp_path / "checkpoint")[1].stopped_by == "max_minutes"


@pytest.mark.long
@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_checkpoint_starts_the_training_again(toys: LocalDomain, tmp_path: Path, damage: str) -> None:
    whole, _ = train_expert(toys, LORA, LONG, 3)
    checkpoint = tmp_path / "checkpoint"
    killed_after(toys, LONG, checkpoint, 1)
    data = bytearray(checkpoint.read_bytes())
    data[-2] ^= 1
    checkpoint.write_bytes(bytes({"cut": data[:200], "flipped": data, "empty": data[:0]}[damage]))
    lines: list[str] = []
    assert adapter_sha256(train_expert(toys, LORA, LONG, 3, lines.append, checkpoint)[0]) == adapter_sha256(whole)
    assert lines[0].startswith("toys: start, validation")


def test_a_checkpoint_that_cannot_be_written_is_an_error_with_the_remedy(toys: LocalDomain, tmp_path: Path) -> None:
    with (
        full_disk(4096),
        pytest.raises(ClientError, match=rf"{tmp_path} .*cache_dir"),
    ):
        train_expert(toys, LORA, LONG, 3, checkpoint=tmp_path / "checkpoint")
    assert not list(tmp_path.iterdir())
