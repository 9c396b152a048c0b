"""The anchored head against a dense float64 model written from its definition, and the laws that it obeys."""

import numpy as np
import pytest
import scipy.linalg
import torch
from adapters import random_adapter

from fedmerge.adapter import Adapter, LoraModule, adapter_sha256
from fedmerge.errors import DomainError, LayoutMismatchError
from fedmerge.evaluation.ranks import IntArray
from fedmerge.federated.product_space import weighted_sum
from fedmerge.sequence import anchored
from fedmerge.sequence.anchored import DECAY, anchored_source, backward, text_head, train_anchored, whitening
from fedmerge.sequence.ranking import Source

WIDTH, RANK, MAX_LENGTH, NUM_ITEMS = 8, 3, 5, 20
RNG = np.random.default_rng(0)
HISTORIES: list[IntArray] = [RNG.integers(0, NUM_ITEMS, length) for length in (1, 2, 4, 5, 9, 3, 2)]
LAYOUT = {"attention": (WIDTH, WIDTH), "item": (WIDTH, WIDTH), "recency": (MAX_LENGTH, 1)}


def item_vectors(num_items: int = NUM_ITEMS) -> torch.Tensor:
    drawn = torch.randn(num_items, WIDTH, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.normalize(drawn, dim=1)


def trained_head(seed: int = 0) -> Adapter:
    return random_adapter(LAYOUT, RANK, 0.7, seed)


def scores_of(source: Source) -> torch.Tensor:
    return source.user_vectors @ source.item_vectors.T


def dense_whitened(items: torch.Tensor) -> torch.Tensor:
    """Whitened vectors (N, d) float64 by the definition, the inverse square root taken by scipy."""
    centred = items.double() - items.double().mean(dim=0)
    covariance = (centred.T @ centred / len(items)).numpy()
    ridge = anchored.RIDGE * np.trace(covariance) / WIDTH
    rows = centred.numpy() @ np.linalg.inv(scipy.linalg.sqrtm(covariance + ridge * np.eye(WIDTH)))
    return torch.from_numpy(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def dense_scores(deltas: dict[str, torch.Tensor], items: torch.Tensor, history: IntArray) -> torch.Tensor:
    """Scores of all items (N,) by the definition, item by item, with Δ and I + Δ as matrices."""
    read = [items[int(i)] for i in history[-MAX_LENGTH:]]
    age = [len(read) - 1 - j for j in range(len(read))]
    logits = [
        read[-1] @ deltas["attention"] @ e - DECAY * a + deltas["recency"][a, 0] for e, a in zip(read, age, strict=True)
    ]
    weights = torch.stack(logits).softmax(0)
    state = sum((w * e for w, e in zip(weights, read, strict=True)), torch.zeros(WIDTH, dtype=items.dtype))
    mapped = torch.stack([(torch.eye(WIDTH, dtype=items.dtype) + deltas["item"]) @ e for e in items])
    scores: torch.Tensor = mapped @ (state / state.norm())
    return scores


def doubled(head: Adapter) -> dict[str, torch.Tensor]:
    return {name: m.scaling * m.lora_B.double() @ m.lora_A.double() for name, m in head.modules.items()}


def test_scores_are_those_of_the_dense_model() -> None:
    found = scores_of(anchored_source(trained_head(), item_vectors(), HISTORIES))
    items = dense_whitened(item_vectors())
    expected = [dense_scores(doubled(trained_head()), items, history) for history in HISTORIES]
    torch.testing.assert_close(found.double(), torch.stack(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head", [text_head(WIDTH, RANK, MAX_LENGTH, 3), random_adapter(LAYOUT, RANK, 0.0, 3)])
def test_a_head_of_zero_delta_is_the_text_model_whatever_its_factors(head: Adapter) -> None:
    source = anchored_source(head, item_vectors(), HISTORIES)
    other_seed = anchored_source(text_head(WIDTH, RANK + 1, MAX_LENGTH, 4), item_vectors(), HISTORIES)
    assert torch.equal(source.user_vectors, other_seed.user_vectors)
    items = dense_whitened(item_vectors()).float()
    torch.testing.assert_close(source.item_vectors, items)
    for history, user in zip(HISTORIES, source.user_vectors, strict=True):
        read = items[torch.from_numpy(history[-MAX_LENGTH:])]
        mean = torch.tensor([np.exp(-DECAY * age) for age in range(len(read))][::-1], dtype=torch.float32) @ read
        torch.testing.assert_close(user, mean / mean.norm())


def test_gradients_are_those_of_the_dense_model() -> None:
    batch = [np.asarray(history[-MAX_LENGTH - 1 :], dtype=np.int64) for history in HISTORIES if len(history) > 1]
    factors = {
        name: (m.lora_A.clone().requires_grad_(), m.lora_B.clone().requires_grad_(), m.scaling)
        for name, m in trained_head().modules.items()
    }
    loss = backward(factors, item_vectors(), batch, logits_per_block=3 * NUM_ITEMS)  # several blocks

    exact = {name: (A.detach().double(), B.detach().double(), x) for name, (A, B, x) in factors.items()}
    for A, B, _ in exact.values():
        A.requires_grad_()
        B.requires_grad_()
    deltas = {name: x * B @ A for name, (A, B, x) in exact.items()}
    likelihoods = []
    for sequence in batch:
        for position in range(1, len(sequence)):
            scores = dense_scores(deltas, item_vectors().double(), sequence[:position])
            explained = (scores / anchored.TEMPERATURE).softmax(0)[int(sequence[position])]
            likelihoods.append((1 - anchored.BACKGROUND) * explained + anchored.BACKGROUND / NUM_ITEMS)
    expected = -torch.stack(likelihoods).log().mean()
    expected.backward()  # type: ignore[no-untyped-call]  # PyTorch leaves it untyped
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for name, (A, B, _) in factors.items():
        for found, slow in ((A, exact[name][0]), (B, exact[name][1])):
            assert found.grad is not None
            torch.testing.assert_close(found.grad.double(), slow.grad, rtol=1e-3, atol=1e-5)


def test_the_merge_of_two_heads_has_the_mean_of_their_deltas() -> None:
    heads = {"a": trained_head(1), "b": trained_head(2)}
    merged = anchored_source(weighted_sum(heads, {"a": 0.5, "b": 0.5}), item_vectors(), HISTORIES)
    mean = {name: (doubled(heads["a"])[name] + doubled(heads["b"])[name]) / 2 for name in LAYOUT}
    expected = [dense_scores(mean, dense_whitened(item_vectors()), history) for history in HISTORIES]
    torch.testing.assert_close(scores_of(merged).double(), torch.stack(expected), rtol=1e-5, atol=1e-5)


def test_a_new_item_changes_no_other_score_under_the_whitening_of_the_others() -> None:
    larger = torch.cat([item_vectors(), torch.ones(1, WIDTH)])
    before = anchored_source(trained_head(), item_vectors(), HISTORIES)
    after = anchored_source(trained_head(), larger, HISTORIES, by=whitening(item_vectors()))
    torch.testing.assert_close(before.user_vectors, after.user_vectors)
    torch.testing.assert_close(before.item_vectors, after.item_vectors[:-1])


def test_a_catalog_of_equal_vectors_or_fewer_items_than_dimensions_has_finite_scores() -> None:
    for vectors in (item_vectors()[:1].repeat(NUM_ITEMS, 1), torch.eye(WIDTH)[:2].repeat(NUM_ITEMS // 2, 1)):
        assert scores_of(anchored_source(trained_head(), vectors, HISTORIES)).isfinite().all()
    mean, matrix = whitening(item_vectors()[:1])
    assert not mean.any()
    assert torch.equal(matrix, torch.eye(WIDTH))


def test_permuted_items_have_permuted_scores() -> None:
    order = np.random.default_rng(5).permutation(NUM_ITEMS)
    place = np.argsort(order)  # item i lies at place[i]
    permuted = anchored_source(trained_head(), item_vectors()[torch.from_numpy(order)], [place[h] for h in HISTORIES])
    expected = scores_of(anchored_source(trained_head(), item_vectors(), HISTORIES))
    torch.testing.assert_close(scores_of(permuted), expected[:, torch.from_numpy(order)])


def test_only_the_last_items_are_read() -> None:
    long = np.arange(12)
    whole, cut = (anchored_source(trained_head(), item_vectors(), [h]) for h in (long, long[-MAX_LENGTH:]))
    assert torch.equal(whole.user_vectors, cut.user_vectors)


def test_a_users_vector_does_not_depend_on_the_other_users() -> None:
    together = anchored_source(trained_head(), item_vectors(), HISTORIES).user_vectors
    for user, history in enumerate(HISTORIES):
        alone = anchored_source(trained_head(), item_vectors(), [history]).user_vectors[0]
        torch.testing.assert_close(alone, together[user])


def chains(num_users: int) -> list[IntArray]:
    """Users who go through the catalog in order, which text vectors alone do not say."""
    return [(np.arange(6) + user) % NUM_ITEMS for user in range(num_users)]


def test_training_lowers_the_loss_and_the_same_seed_gives_the_same_bytes() -> None:
    start, sequences = text_head(WIDTH, RANK, MAX_LENGTH, 0), chains(30)
    (one, report), (two, _), (other, _) = (
        train_anchored(
            sequences,
            item_vectors(),
            start,
            steps=40,
            learning_rate=0.01,
            batch_size=8,
            seed=1,
            scope=("round", number),
        )
        for number in (1, 1, 2)
    )
    assert adapter_sha256(one) == adapter_sha256(two) != adapter_sha256(other)
    assert adapter_sha256(start) == adapter_sha256(text_head(WIDTH, RANK, MAX_LENGTH, 0))  # unchanged
    assert report.steps == 40
    batch = [np.asarray(sequence, dtype=np.int64) for sequence in sequences]

    def loss_of(head: Adapter) -> float:
        factors = {
            name: (m.lora_A.clone().requires_grad_(), m.lora_B.clone().requires_grad_(), m.scaling)
            for name, m in head.modules.items()
        }
        return backward(factors, item_vectors(), batch)

    assert loss_of(one) < loss_of(start) - 0.1


def test_no_step_returns_the_start_and_a_strong_proximal_term_stays_near_it() -> None:
    start, sequences = trained_head(), chains(30)
    untouched, report = train_anchored(sequences, item_vectors(), start, steps=0, seed=0)
    assert adapter_sha256(untouched) == adapter_sha256(start)
    assert report.loss is None

    def moved(proximal: float) -> float:
        head, _ = train_anchored(
            sequences, item_vectors(), start, steps=40, learning_rate=0.01, proximal=proximal, seed=0
        )
        return sum(float((m.lora_B - start.modules[name].lora_B).square().sum()) for name, m in head.modules.items())

    assert moved(100.0) < moved(0.0) / 10


@pytest.mark.parametrize(
    "head",
    [
        text_head(WIDTH + 1, RANK, MAX_LENGTH, 0),
        Adapter({"item": LoraModule(torch.zeros(1, WIDTH), torch.zeros(WIDTH, 1), 1.0)}),
    ],
)
def test_a_head_that_does_not_fit_is_refused(head: Adapter) -> None:
    with pytest.raises(LayoutMismatchError, match=f"item vectors of width {WIDTH}"):
        anchored_source(head, item_vectors(), HISTORIES)
    with pytest.raises(LayoutMismatchError, match=f"item vectors of width {WIDTH}"):
        train_anchored(HISTORIES, item_vectors(), head, steps=1, seed=0)


def test_histories_that_do_not_fit_are_refused() -> None:
    with pytest.raises(LayoutMismatchError, match="a history is empty"):
        anchored_source(trained_head(), item_vectors(), [np.zeros(0, dtype=np.int64)])
    with pytest.raises(LayoutMismatchError, match="outside the catalog"):
        anchored_source(trained_head(), item_vectors(), [np.array([NUM_ITEMS])])
    with pytest.raises(DomainError, match="cannot be trained"):
        train_anchored([np.array([1])], item_vectors(), trained_head(), steps=1, seed=0)
