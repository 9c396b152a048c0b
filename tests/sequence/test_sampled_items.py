"""The softmax over drawn items against its definition and the whole catalog's; work on a catalog in blocks."""

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from fedmerge.device import resolve_compute
from fedmerge.domain.splits import Examples
from fedmerge.evaluation.ranks import IntArray, rank_targets
from fedmerge.seeding import generator
from fedmerge.sequence import anchored, catalog
from fedmerge.sequence.anchored import text_head, train_anchored
from fedmerge.sequence.blocks import backward_in_blocks
from fedmerge.sequence.catalog import DrawnItems, by_blocks, draw_items, mean_and_covariance
from fedmerge.sequence.contrast import Contrast, contrast_backward
from fedmerge.sequence.model import Inputs, SequenceModel, SequenceSettings
from fedmerge.sequence.ranking import sequence_source
from fedmerge.sequence.training import backward, train_sequence_model

N, TEXT_WIDTH = 8, 5
CPU = resolve_compute("cpu", "float32")
SETTINGS = SequenceSettings(
    hidden_size=8, layers=1, heads=2, dropout=0.0, id_dropout=0.0, max_length=6, learning_rate=0.01, batch_size=8
)
BATCH = [np.array([1, 2, 3, 4]), np.array([5, 5]), np.array([0, 7, 6])]
INPUTS: tuple[Inputs, ...] = ("ids", "text", "text+ids")


def text_vectors() -> torch.Tensor:
    return nn.functional.normalize(torch.randn(N, TEXT_WIDTH, generator=torch.Generator().manual_seed(3)), dim=1)


def spread_model(inputs: Inputs, sampled: int | None = None) -> SequenceModel:
    """Make a model with large random weights, in training mode."""
    model = SequenceModel(N, replace(SETTINGS, inputs=inputs, sampled_items=sampled), text_vectors()).train()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.5)
    return model


def drawn_of(items: list[int], batch: list[IntArray]) -> DrawnItems:
    rows = sorted({*items, *np.concatenate(batch).tolist()})
    return DrawnItems(torch.tensor(rows), torch.tensor([row in items for row in rows]), N)


def written_out(model: SequenceModel, batch: list[IntArray], drawn: list[int]) -> torch.Tensor:
    """Compute the loss position by position: the target, and (N − 1) / n times the other drawn items."""
    losses, items = [], model.item_representations()
    for sequence in batch:
        for state, target in zip(model(torch.from_numpy(sequence[None, :-1]))[0], sequence[1:].tolist(), strict=True):
            others = [item for item in drawn if item != target]
            total = sum((items[item] @ state).exp() for item in others) * (N - 1) / len(others)
            losses.append((items[target] @ state).exp().add(total).log() - items[target] @ state)
    return torch.stack(losses).mean()


def gradients(model: SequenceModel) -> dict[str, torch.Tensor]:
    return {name: p.grad.to_dense() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("drawn", [[0, 2, 7], [3, 4], [1, 2, 3, 4, 5, 6, 0, 7]])
@pytest.mark.parametrize("logits_per_block", [1, 10**6])
def test_loss_and_gradients_are_those_of_the_definition(
    inputs: Inputs, drawn: list[int], logits_per_block: int
) -> None:
    slow, fast = spread_model(inputs), spread_model(inputs)
    expected = written_out(slow, BATCH, drawn)
    expected.backward()  # type: ignore[no-untyped-call]  # PyTorch leaves it untyped
    found = backward(fast, BATCH, drawn=drawn_of(drawn, BATCH), logits_per_block=logits_per_block)
    assert found == pytest.approx(expected.item(), rel=1e-5)
    for name, gradient in gradients(slow).items():
        torch.testing.assert_close(gradients(fast)[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("inputs", INPUTS)
def test_with_all_items_drawn_it_is_the_softmax_over_the_catalog(inputs: Inputs) -> None:
    whole, sampled = spread_model(inputs), spread_model(inputs)
    drawn = draw_items(BATCH, N + 5, N, generator(0, "test-sampled"), torch.device("cpu"))
    assert backward(whole, BATCH) == pytest.approx(backward(sampled, BATCH, drawn=drawn), rel=1e-6)
    for name, gradient in gradients(whole).items():
        torch.testing.assert_close(gradients(sampled)[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("number", [2, 3, 5, N])
def test_the_sum_is_unbiased_over_all_draws(number: int) -> None:
    logits = torch.randn(1, N, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    target, totals = torch.tensor([[2]]), []
    for items in itertools.combinations(range(N), number):
        corrected = logits.clone()
        drawn_of([*items], [np.arange(N)]).correct(corrected, target)
        totals.append(corrected.exp().sum().item())
        assert corrected[0, 2] == logits[0, 2]  # once, drawn or not
    assert np.mean(totals) == pytest.approx(logits.exp().sum().item(), rel=1e-6)


def test_the_expected_gradient_approaches_that_of_the_catalog_as_more_items_are_drawn() -> None:
    rng = torch.Generator().manual_seed(1)
    states, items = torch.randn(4, 6, generator=rng) / 2, torch.randn(N, 6, generator=rng)
    targets = torch.tensor([0, 3, 3, 6])

    def gradient(drawn: DrawnItems | None) -> torch.Tensor:
        leaves = states.clone().requires_grad_(), items.clone().requires_grad_()
        backward_in_blocks(*leaves, targets, drawn=drawn)
        grads = [leaf.grad.flatten() for leaf in leaves if leaf.grad is not None]
        return torch.cat(grads)

    whole, errors = gradient(None), []
    for number in (2, 4, 6, 7, N):
        draws = itertools.combinations(range(N), number)
        mean = torch.stack([gradient(drawn_of([*drawn], [np.arange(N)])) for drawn in draws]).mean(dim=0)
        errors.append(float((mean - whole).norm() / whole.norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-6, errors
    assert errors[-2] < 0.2 * errors[0], errors


def test_a_draw_is_uniform_without_repeats_and_has_the_items_of_the_batch() -> None:
    rng, counts = generator(0, "test-sampled"), np.zeros(N)
    for _ in range(2000):
        found = draw_items([np.array([1, 1]), np.array([6])], 3, N, rng, torch.device("cpu"))
        assert {1, 6} <= {*found.items.tolist()}
        assert int(found.drawn.sum()) == 3
        assert found.items.tolist() == sorted({*found.items.tolist()})
        counts[found.items[found.drawn].numpy()] += 1
    np.testing.assert_allclose(counts / 2000, 3 / N, atol=4 * math.sqrt(3 / N * (1 - 3 / N) / 2000))
    assert found.items[found.numbered([np.array([6, 1])])[0]].tolist() == [6, 1]


def successors(num_items: int) -> tuple[list[IntArray], Examples]:
    """Return users in whose sequences item i + 1 follows item i."""
    rng = generator(0, "test-sampled")
    users: list[IntArray] = [(rng.integers(0, num_items) + np.arange(7)) % num_items for _ in range(120)]
    histories = [user[:5].astype(np.int32) for user in users[:40]]
    return users, Examples(np.arange(40), histories, np.array([user[5] for user in users[:40]]))


def test_a_rule_is_learned_from_a_few_drawn_items() -> None:
    sequences, validation = successors(30)
    settings = replace(SETTINGS, hidden_size=16, max_epochs=20, patience=20, batch_size=16, sampled_items=6)
    model, report = train_sequence_model(sequences, 30, validation, replace(settings, learning_rate=0.02), 0, CPU)
    source = sequence_source(model, validation.histories)
    ranks = rank_targets(source.user_vectors, source.item_vectors, validation.targets)
    assert report.validation_ndcgs[0] < 0.4
    assert (ranks == 1).mean() > 0.9


def test_a_step_changes_the_items_that_it_reads_or_scores_alone() -> None:
    num_items, settings = 50, replace(SETTINGS, batch_size=1, max_epochs=1, max_minutes=1e-9, sampled_items=4)
    validation = Examples(np.arange(1), [np.array([1], dtype=np.int32)], np.array([2]))
    models = [
        train_sequence_model([np.array([1, 2])], num_items, validation, replace(settings, learning_rate=rate), 0, CPU)
        for rate in (1e-12, 0.1)
    ]
    before, after = (model.state_dict()["items.weight"] for model, _ in models)
    moved = (before - after).abs().amax(dim=1) > 1e-6
    chosen = models[1][1].best_epoch
    assert moved[[1, 2]].all() == (chosen == 1)
    assert int(moved.sum()) <= 6


@pytest.mark.parametrize("inputs", INPUTS)
def test_the_contrast_of_views_computes_the_items_that_it_reads_alone(inputs: Inputs) -> None:
    contrast = Contrast(0.5, {"crop": 0.5, "reorder": 0.5}, None)
    whole, sampled = spread_model(inputs), spread_model(inputs, sampled=3)
    losses = [contrast_backward(m, BATCH, contrast, generator(0, "test-views")) for m in (whole, sampled)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, gradient in gradients(whole).items():
        torch.testing.assert_close(gradients(sampled)[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


# The federated head


def test_the_federated_head_with_all_items_drawn_has_the_loss_over_the_catalog() -> None:
    vectors, batch = text_vectors(), [sequence.astype(np.int64) for sequence in BATCH]
    rng = torch.Generator().manual_seed(2)

    def gradient(drawn: DrawnItems | None) -> tuple[float, torch.Tensor]:
        head = text_head(TEXT_WIDTH, 2, 6, 0)
        factors = {
            name: (module.lora_A.clone().requires_grad_(), torch.ones_like(module.lora_B).requires_grad_(), 0.3)
            for name, module in head.modules.items()
        }
        loss = anchored.backward(factors, vectors, batch, drawn=drawn)
        grads = [tensor.grad.flatten() for A, B, _ in factors.values() for tensor in (A, B) if tensor.grad is not None]
        return loss, torch.cat(grads)

    whole, everything = gradient(None), gradient(draw_items(batch, N, N, np.random.default_rng(0), rng.device))
    assert whole[0] == pytest.approx(everything[0], rel=1e-5)
    torch.testing.assert_close(whole[1], everything[1], rtol=1e-4, atol=1e-6)
    some = gradient(draw_items(batch, 3, N, np.random.default_rng(0), rng.device))
    assert not torch.allclose(some[1], whole[1], rtol=1e-2)


def test_the_federated_head_draws_from_its_seed() -> None:
    start, options = text_head(TEXT_WIDTH, 2, 6, 0), {"steps": 3, "learning_rate": 0.05, "seed": 1}

    def trained(sampled: int | None) -> npt.NDArray[np.float32]:
        of_run: dict[str, Any] = {**options, "sampled_items": sampled}
        head, _ = train_anchored(BATCH, text_vectors(), start, **of_run)
        return np.concatenate([module.lora_B.numpy().ravel() for module in head.modules.values()])

    assert np.array_equal(trained(3), trained(3))
    assert not np.allclose(trained(3), trained(None))
    np.testing.assert_allclose(trained(N), trained(None), rtol=1e-3, atol=1e-5)


# Blocks


def test_blocks_of_items_give_what_the_whole_catalog_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = torch.randn(23, TEXT_WIDTH, generator=torch.Generator().manual_seed(4))
    expected = np.cov(vectors.double().numpy().T, bias=True)
    whole = by_blocks(lambda block: block * 2 + 1, vectors)
    for items_at_once in (1, 7, 23, 100):
        monkeypatch.setattr(catalog, "ITEMS_AT_ONCE", items_at_once)
        mean, covariance = mean_and_covariance(vectors)
        np.testing.assert_allclose(mean.numpy(), vectors.double().numpy().mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(covariance.numpy(), expected, rtol=1e-12)
        assert torch.equal(by_blocks(lambda block: block * 2 + 1, vectors), whole)


def test_one_block_is_equal_to_the_bit_to_what_published_results_have() -> None:
    vectors = nn.functional.normalize(torch.randn(3001, 96, generator=torch.Generator().manual_seed(4)), dim=1)
    precise = vectors.double()
    mean = precise.mean(dim=0)
    found = mean_and_covariance(vectors)
    assert torch.equal(found[0], mean)
    assert torch.equal(found[1], (precise - mean).T @ (precise - mean) / len(vectors))


def test_settings_without_a_draw_have_the_record_of_earlier_versions() -> None:
    assert "sampled_items" not in SETTINGS.record()
    assert replace(SETTINGS, sampled_items=9).record() == SETTINGS.record() | {"sampled_items": 9}
