"""The sequence model on ids, SASRec, against a slow one in NumPy, the items that it reads, and its training."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from fedmerge.device import resolve_compute
from fedmerge.domain.splits import Examples
from fedmerge.errors import ClientError, DomainError, LayoutMismatchError
from fedmerge.evaluation.ranks import IntArray, rank_targets
from fedmerge.seeding import generator
from fedmerge.sequence.model import Inputs, SequenceModel, SequenceSettings
from fedmerge.sequence.ranking import sequence_source
from fedmerge.sequence.training import backward, train_sequence_model

NUM_ITEMS = 12
CPU = resolve_compute("cpu", "float32")
SETTINGS = SequenceSettings(
    hidden_size=16, layers=2, heads=2, dropout=0.0, max_length=6, learning_rate=0.01, batch_size=8, max_epochs=40
)
LOOSE = 1e-5  # float32


def spread_model(settings: SequenceSettings = SETTINGS) -> SequenceModel:
    """Make a model with large random weights, so that each of them matters."""
    model = SequenceModel(NUM_ITEMS, settings).eval()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.5)
    return model


def circle(num_users: int, seed: int) -> list[IntArray]:
    """Return sequences in which item i + 1 follows item i, and item 0 follows the last."""
    rng = generator(seed, "test-sasrec")
    return [(rng.integers(0, NUM_ITEMS) + np.arange(rng.integers(2, 10))) % NUM_ITEMS for _ in range(num_users)]


def user_vectors(model: SequenceModel, histories: Sequence[IntArray]) -> torch.Tensor:
    return sequence_source(model, histories).user_vectors


def ranks_of(
    model: SequenceModel, histories: Sequence[IntArray], targets: IntArray, seen: Sequence[IntArray] | None = None
) -> npt.NDArray[np.int64]:
    source = sequence_source(model, histories)
    return rank_targets(source.user_vectors, source.item_vectors, targets, seen)


def next_on_circle(num_users: int, seed: int) -> Examples:
    histories = circle(num_users, seed)
    targets = np.array([(history[-1] + 1) % NUM_ITEMS for history in histories], dtype=np.int64)
    return Examples(np.arange(num_users), [history.astype(np.int32) for history in histories], targets)


# The model


def normalised(x: npt.NDArray[np.float64], weight: torch.Tensor, bias: torch.Tensor) -> npt.NDArray[np.float64]:
    centred = x - x.mean(axis=-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)
    return np.asarray(scaled * weight.double().numpy() + bias.double().numpy())


def written_out(model: SequenceModel, history: list[int], heads: int) -> npt.NDArray[np.float64]:
    """Compute hidden states (t, d) of one history, head by head and position by position, in float64."""
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    width = weights["items.weight"].shape[1]
    d = width // heads
    x = (
        weights["items.weight"].numpy()[history] * math.sqrt(width)
        + weights["positions.weight"].numpy()[: len(history)]
    )
    for block in range(SETTINGS.layers):
        w = {name.removeprefix(f"blocks.layers.{block}."): tensor for name, tensor in weights.items()}
        y = normalised(x, w["norm1.weight"], w["norm1.bias"])
        projected = y @ w["self_attn.in_proj_weight"].numpy().T + w["self_attn.in_proj_bias"].numpy()
        query, key, value = np.split(projected, 3, axis=1)
        attended = np.zeros_like(x)
        for head in range(heads):
            columns = slice(head * d, (head + 1) * d)
            for position in range(len(history)):
                logits = key[: position + 1, columns] @ query[position, columns] / math.sqrt(d)
                shares = np.exp(logits - logits.max())
                attended[position, columns] = shares @ value[: position + 1, columns] / shares.sum()
        x = x + attended @ w["self_attn.out_proj.weight"].numpy().T + w["self_attn.out_proj.bias"].numpy()
        y = normalised(x, w["norm2.weight"], w["norm2.bias"])
        inner = np.maximum(y @ w["linear1.weight"].numpy().T + w["linear1.bias"].numpy(), 0)
        x = x + inner @ w["linear2.weight"].numpy().T + w["linear2.bias"].numpy()
    return normalised(x, weights["blocks.norm.weight"], weights["blocks.norm.bias"])


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_hidden_states_equal_those_in_plain_numpy(heads: int) -> None:
    model = spread_model(replace(SETTINGS, heads=heads))
    for history in ([3], [5, 5, 0, 11], [1, 2, 3, 4, 5, 6]):
        with torch.no_grad():
            found = model(torch.tensor([history]))[0]
        np.testing.assert_allclose(found.numpy(), written_out(model, history, heads), rtol=1e-4, atol=1e-4)


def test_a_later_item_changes_nothing_before_it() -> None:
    model = spread_model()
    before, after = torch.tensor([[1, 2, 3, 4, 5]]), torch.tensor([[1, 2, 3, 9, 0]])
    for hidden in (model, model.train()):  # PyTorch takes another path for each mode
        left, right = hidden(before)[0], hidden(after)[0]
        torch.testing.assert_close(left[:3], right[:3], rtol=LOOSE, atol=LOOSE)
        assert ((left[3:] - right[3:]).abs().amax(dim=1) > 0.01).all()


def test_padding_and_other_users_change_nothing() -> None:
    model = spread_model()
    histories = [np.array([4]), np.array([7, 2, 2, 0, 1, 3]), np.array([9, 8, 7]), np.array([0, 5])]
    together = user_vectors(model, histories)
    for row, history in enumerate(histories):
        torch.testing.assert_close(together[row], user_vectors(model, [history])[0], rtol=LOOSE, atol=LOOSE)
    assert len({round(float(value), 3) for value in together[:, 0]}) == len(histories)


def test_only_the_most_recent_items_are_read() -> None:
    model = spread_model()
    recent = np.array([3, 1, 4, 1, 5, 9])
    long = user_vectors(model, [np.concatenate([[2, 6, 8], recent])])
    assert torch.equal(long, user_vectors(model, [recent]))
    assert not torch.equal(long, user_vectors(model, [recent[1:]]))


def test_ranks_are_those_of_the_inner_products_with_or_without_seen_items() -> None:
    model = spread_model()
    histories = [np.array([3, 1, 3]), np.array([0]), np.array([5, 6, 7, 8])]
    targets = np.array([1, 4, 9])
    scores = user_vectors(model, histories) @ model.item_representations().detach().T
    for seen in (None, histories):
        expected = []
        for row, target in enumerate(targets.tolist()):
            removed = set() if seen is None else set(seen[row].tolist()) - {target}
            rivals = [item for item in range(NUM_ITEMS) if item not in removed | {target}]
            expected.append(1 + sum(bool(scores[row, item] >= scores[row, target]) for item in rivals))
        assert ranks_of(model, histories, targets, seen).tolist() == expected


# The loss


@pytest.mark.parametrize("logits_per_block", [1, 5 * NUM_ITEMS, 10**6])
def test_gradients_are_those_of_the_softmax_over_the_whole_catalog(logits_per_block: int) -> None:
    batch = [np.array([1, 2, 3, 4]), np.array([5, 5]), np.array([0, 11, 7])]
    plain, blocked = spread_model().train(), spread_model().train()
    losses = []
    for sequence in batch:
        logits = plain(torch.from_numpy(sequence[None, :-1]))[0] @ plain.item_representations().T
        losses += [-torch.log_softmax(row, 0)[item] for row, item in zip(logits, sequence[1:], strict=True)]
    expected = torch.stack(losses).mean()
    expected.backward()  # type: ignore[no-untyped-call]  # PyTorch leaves it untyped
    assert backward(blocked, batch, logits_per_block=logits_per_block) == pytest.approx(expected.item(), rel=1e-5)
    for (name, one), (_, other) in zip(plain.named_parameters(), blocked.named_parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_bfloat16_rounds_gradients_and_no_loss() -> None:
    batch = [np.array([1, 2, 3, 4]), np.array([5, 5]), np.array([0, 11, 7])]
    exact, rounded = spread_model().train(), spread_model().train()
    assert backward(exact, batch) == backward(rounded, batch, torch.bfloat16)
    for (name, one), (_, other) in zip(exact.named_parameters(), rounded.named_parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert not torch.equal(one.grad, other.grad)
        assert (one.grad - other.grad).norm() < 0.01 * one.grad.norm(), name


# Training


def test_a_rule_of_next_items_is_learned() -> None:
    validation = next_on_circle(40, 1)
    model, report = train_sequence_model(circle(60, 0), NUM_ITEMS, validation, SETTINGS, 0, CPU)
    assert ranks_of(model, validation.histories, validation.targets).tolist() == [1] * 40
    assert report.validation_ndcgs[report.best_epoch] == 1.0 > report.validation_ndcgs[0]
    assert report.losses[-1] < 0.2 < report.losses[0]
    assert not model.training


def test_the_same_seed_gives_the_same_model_and_leaves_the_global_generator_alone() -> None:
    settings = replace(SETTINGS, dropout=0.4, max_epochs=3)
    before = torch.get_rng_state()
    runs = [
        train_sequence_model(circle(30, 0), NUM_ITEMS, next_on_circle(9, 1), settings, seed, CPU) for seed in (4, 4, 5)
    ]
    assert torch.equal(before, torch.get_rng_state())
    first, second, other = (model.state_dict() for model, _ in runs)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert runs[0][1].losses == runs[1][1].losses != runs[2][1].losses
    assert not torch.equal(first["items.weight"], other["items.weight"])


def test_the_blocks_start_from_different_weights() -> None:
    settings = replace(SETTINGS, max_epochs=1, max_minutes=1e-9, learning_rate=1e-12)
    model, _ = train_sequence_model(circle(30, 0), NUM_ITEMS, next_on_circle(9, 1), settings, 0, CPU)
    weights = model.state_dict()
    assert not torch.equal(weights["blocks.layers.0.linear1.weight"], weights["blocks.layers.1.linear1.weight"])


def test_the_best_epoch_is_returned_and_not_the_last() -> None:
    settings = replace(SETTINGS, learning_rate=0.2, max_epochs=12, patience=3)
    validation = next_on_circle(40, 1)
    lines: list[str] = []
    model, report = train_sequence_model(circle(60, 0), NUM_ITEMS, validation, settings, 0, CPU, progress=lines.append)
    ranks = ranks_of(model, validation.histories, validation.targets)
    found = np.where(ranks <= 10, 1 / np.log2(1 + ranks), 0).mean()
    assert found == pytest.approx(max(report.validation_ndcgs)) == report.validation_ndcgs[report.best_epoch]
    assert len(lines) == report.epochs == len(report.losses) == len(report.validation_ndcgs) - 1
    assert report.stopped_by in lines[-1]
    if report.stopped_by == "patience":
        assert report.epochs == report.best_epoch + 3


def test_every_limit_ends_the_training() -> None:
    def stopped(**changes: Any) -> tuple[str, int]:
        settings = replace(SETTINGS, **{"max_epochs": 2, **changes})
        report = train_sequence_model(circle(30, 0), NUM_ITEMS, next_on_circle(9, 1), settings, 0, CPU)[1]
        return report.stopped_by, report.epochs

    assert stopped() == ("max_epochs", 2)
    assert stopped(max_minutes=1e-9) == ("max_minutes", 1)
    assert stopped(learning_rate=1e-12, max_epochs=50, patience=4) == ("patience", 4)


def test_impossible_trainings_are_refused() -> None:
    validation = next_on_circle(5, 1)
    with pytest.raises(DomainError, match=r"\b2 train sequences.*evaluation\.baselines"):
        train_sequence_model([np.array([1]), np.array([2])], NUM_ITEMS, validation, SETTINGS, 0, CPU)
    with pytest.raises(LayoutMismatchError, match="1 of 2"):
        train_sequence_model([np.array([1, NUM_ITEMS])], NUM_ITEMS, validation, SETTINGS, 0, CPU)
    wild = replace(SETTINGS, learning_rate=1e30)
    with pytest.raises(ClientError, match=r"(nan|inf) in epoch 1\b"):
        train_sequence_model(circle(60, 0), NUM_ITEMS, validation, wild, 0, CPU)


def test_the_model_on_ids_trains_as_the_published_baseline_did() -> None:
    """Figures of the baseline before it became a row of the sequence model; equal to the bit on the machine of then."""
    settings = replace(SETTINGS, dropout=0.4, max_epochs=4)
    _, report = train_sequence_model(circle(60, 0), NUM_ITEMS, next_on_circle(40, 1), settings, 7, CPU)
    assert report.losses == pytest.approx([2.458320040043777, 2.2591353548, 1.9977561008, 1.7277662100], rel=1e-4)
    ndcgs = [0.3796049582, 0.6116864824, 0.6218242084, 0.6931813579, 0.7725133129]
    assert report.validation_ndcgs == pytest.approx(ndcgs, rel=1e-4)


def text_vectors() -> torch.Tensor:
    return nn.functional.normalize(torch.randn(NUM_ITEMS, 5, generator=torch.Generator().manual_seed(3)), dim=1)


def test_a_rule_is_learned_from_text_and_carried_to_items_without_training() -> None:
    """Two colours alternate; an item that no user has had is told by its text."""
    num_items = 60
    noise = torch.randn(num_items, 2, generator=torch.Generator().manual_seed(3))
    colour = torch.tensor([1.0, -1.0]).repeat(num_items // 2)[:, None]  # even items are red, odd ones blue
    vectors = nn.functional.normalize(torch.cat([colour, 0.3 * noise], dim=1), dim=1)
    rng = generator(0, "test-colours")
    starts = np.arange(60)[:, None] + np.arange(6)
    users = 2 * rng.integers(0, num_items // 2 - 1, starts.shape) + starts % 2
    validation = Examples(np.arange(60), [row[:-1].astype(np.int32) for row in users], users[:, -1])
    settings = replace(SETTINGS, inputs="text+ids", max_epochs=30, patience=30)
    model, _ = train_sequence_model([*users], num_items, validation, settings, 0, CPU, vectors)
    assert model.trained_items.tolist() == [True] * (num_items - 2) + [False] * 2
    source = sequence_source(model, [np.array([2, 5]), np.array([5, 2])])
    scores = source.user_vectors @ source.item_vectors.T  # after blue comes red, after red blue
    assert scores[0, num_items - 2] > scores[0, num_items - 1]
    assert scores[1, num_items - 2] < scores[1, num_items - 1]


@pytest.mark.parametrize(("inputs", "sampled"), [("ids", None), ("text+ids", None), ("text+ids", 3)])
def test_a_killed_training_resumes_to_the_same_model(inputs: Inputs, sampled: int | None, tmp_path: Path) -> None:
    class KilledError(Exception):
        pass

    def train(checkpoint: Path | None, killed_after: int | None = None) -> tuple[SequenceModel, list[str]]:
        lines: list[str] = []

        def progress(line: str) -> None:
            lines.append(line)
            if killed_after is not None and line.startswith(f"epoch {killed_after},"):
                raise KilledError

        settings = replace(SETTINGS, inputs=inputs, dropout=0.4, max_epochs=5, sampled_items=sampled)
        vectors = text_vectors() if inputs == "text+ids" else None
        sequences, validation = circle(30, 0), next_on_circle(9, 1)
        model, _ = train_sequence_model(
            sequences, NUM_ITEMS, validation, settings, 0, CPU, vectors, progress, checkpoint
        )
        return model, lines

    whole, _ = train(None)
    path = tmp_path / "folder" / "head.checkpoint"
    for killed_after in (1, 3):
        with pytest.raises(KilledError):
            train(path, killed_after)
    resumed, lines = train(path)
    assert lines[0] == "resuming after epoch 3"
    assert all(torch.equal(tensor, resumed.state_dict()[name]) for name, tensor in whole.state_dict().items())
    path.write_bytes(path.read_bytes()[:-9] + b"123456789")
    assert train(path)[1][0].startswith("epoch 1,")  # a damaged checkpoint is ignored
