"""Coefficients on clients' own users: the gradient against a dense float64 model, its dependencies, and learning."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import layout_of, random_adapters
from learning_on_clients import StudySchedule, learn_on_clients
from merging_oracles import dense_vectors, oracle_rows

from fedmerge.adapter import Adapter
from fedmerge.client.coefficients.own_users import (
    ClientMergeSettings,
    clipped_gradient_sum,
    coefficient_gradient,
    draw_batch,
    draw_negatives,
)
from fedmerge.client.local_domain import LocalDomain, open_domain
from fedmerge.client.training.dp_sgd import Records, poisson_records
from fedmerge.config import Text
from fedmerge.domain.demo import generate_domain
from fedmerge.domain.folder import write_domain
from fedmerge.domain.interactions import make_interactions
from fedmerge.encoder.backbone import Backbone
from fedmerge.encoder.text import pack_sequences
from fedmerge.errors import ConfigError, DomainError
from fedmerge.mergerec.vectors import initial_vectors
from fedmerge.merging.stack import stack_adapters

SMALL = ClientMergeSettings(batch_size=6, negatives=8)
SCHEDULE = StudySchedule(steps=3)
TEXT = Text(max_attribute_tokens=6, max_items=3, max_tokens=64)


@pytest.fixture(scope="module")
def adapters(backbone: Backbone) -> dict[str, Adapter]:
    return random_adapters(layout_of(backbone))


@pytest.fixture(scope="module")
def clients(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> list[LocalDomain]:
    root, opened = tmp_path_factory.mktemp("domains"), []
    for name in ("toys", "books"):
        demo = generate_domain(name, num_users=30, num_items=25)
        write_domain(root / name, demo.catalog, demo.interactions, public_catalog=True, synthetic=True, source="test")
        opened.append(open_domain(root / name, backbone, TEXT))
    return opened


@pytest.mark.parametrize("initialisation", ["task-vectors", "ties"])
@pytest.mark.parametrize("layer_wise", [False, True], ids=["domain", "layer"])
def test_the_gradient_equals_a_dense_float64_model(
    backbone: Backbone,
    adapters: dict[str, Adapter],
    clients: list[LocalDomain],
    layer_wise: bool,
    initialisation: str,
) -> None:
    vectors, client = initial_vectors(stack_adapters(adapters), initialisation), clients[0]
    values = np.random.default_rng(1).uniform(0.2, 0.9, (3, len(vectors.groups)) if layer_wise else (3,))
    found, found_loss = coefficient_gradient(client, vectors, torch.tensor(values, dtype=torch.float32), 4, SMALL)

    exact, rows = torch.tensor(values, requires_grad=True), oracle_rows(adapters, initialisation)

    def coefficient(domain: str, module: str) -> torch.Tensor:
        row = exact[vectors.domains.index(domain)]
        return row[vectors.group_of[module]] if layer_wise else row

    histories, targets, negatives = draw_batch(client, 4, SMALL)
    texts = pack_sequences(client.table, histories, backbone.special, TEXT.max_items, TEXT.max_tokens)
    users = dense_vectors(backbone, rows, coefficient, texts)
    items = dense_vectors(backbone, rows, coefficient, client.item_sequences).detach()
    losses = []
    for user, target in zip(users, targets, strict=True):
        candidates = {int(target), *negatives.tolist()}
        normaliser = torch.log(sum((torch.exp(user @ items[i] / 0.05) for i in candidates), torch.zeros(())))
        losses.append(normaliser - user @ items[target] / 0.05)
    loss = torch.stack(losses).mean()
    (gradient,) = torch.autograd.grad(loss, [exact])
    assert found_loss == pytest.approx(loss.item(), rel=1e-4)
    assert found.shape == values.shape
    assert torch.linalg.norm(found - gradient) <= 1e-4 * torch.linalg.norm(gradient)


def test_users_add_up(
    backbone: Backbone, adapters: dict[str, Adapter], clients: list[LocalDomain], tmp_path: Path
) -> None:
    """The change of the gradient by one user's data does not depend on the data of another user."""
    vectors, coefficients, client = stack_adapters(adapters), torch.full((3,), 0.5), clients[0]
    sequences = [client.interactions.sequence(user) for user in range(client.interactions.num_users)]
    histories, _, _ = draw_batch(client, 0, SMALL)
    marked = [next(u for u, s in enumerate(sequences) if np.shares_memory(s, history)) for history in histories[:2]]

    def gradient(*changed: int) -> torch.Tensor:
        items = [(s + 1) % len(client.catalog) if u in changed else s for u, s in enumerate(sequences)]
        folder = tmp_path / str(changed) / "toys"
        users = make_interactions(client.interactions.user_ids, items)
        write_domain(folder, client.catalog, users, public_catalog=True, synthetic=True, source="test")
        return coefficient_gradient(open_domain(folder, backbone, TEXT), vectors, coefficients, 0, SMALL)[0]

    none, first, second, both = gradient(), gradient(marked[0]), gradient(marked[1]), gradient(*marked)
    assert (first - none).abs().max() > 1e-3
    assert torch.allclose(both - second, first - none, atol=1e-5)


def some_records(client: LocalDomain, number: int) -> Records:
    drawn = poisson_records(client.training_sequences, "random-prefix", 1.0, np.random.default_rng(number))
    return Records(drawn.histories[:12], drawn.targets[:12])


def one_of(records: Records, user: int) -> Records:
    return Records(records.histories[user : user + 1], records.targets[user : user + 1])


@pytest.mark.parametrize("layer_wise", [False, True], ids=["domain", "layer"])
def test_the_sum_over_users_equals_a_dense_float64_model_user_by_user(
    backbone: Backbone, adapters: dict[str, Adapter], clients: list[LocalDomain], layer_wise: bool
) -> None:
    vectors, client, clip = initial_vectors(stack_adapters(adapters), "task-vectors"), clients[0], 0.5
    values = np.random.default_rng(1).uniform(0.2, 0.9, (3, len(vectors.groups)) if layer_wise else (3,))
    at, records = torch.tensor(values, dtype=torch.float32), some_records(client, 0)
    exact, rows = torch.tensor(values, requires_grad=True), oracle_rows(adapters, "task-vectors")

    def coefficient(domain: str, module: str) -> torch.Tensor:
        row = exact[vectors.domains.index(domain)]
        return row[vectors.group_of[module]] if layer_wise else row

    texts = pack_sequences(client.table, records.histories, backbone.special, TEXT.max_items, TEXT.max_tokens)
    users = dense_vectors(backbone, rows, coefficient, texts)
    items = dense_vectors(backbone, rows, coefficient, client.item_sequences).detach()
    negatives = draw_negatives(client, 4, SMALL)
    assert len({*negatives.tolist()}) == SMALL.negatives
    whole, clipped, norms = torch.zeros_like(exact), torch.zeros_like(exact), []
    for user, target in zip(users, records.targets.tolist(), strict=True):
        scores = torch.stack([user @ items[i] / 0.05 for i in {target, *negatives.tolist()}])
        loss = torch.logsumexp(scores, 0) - user @ items[target] / 0.05
        (gradient,) = torch.autograd.grad(loss, [exact], retain_graph=True)
        norms.append(float(gradient.norm()))
        whole += gradient
        clipped += gradient * min(1.0, clip / norms[-1])
    assert min(norms) < clip < max(norms), "some are clipped, some are not"
    for bound, expected in ((1e9, whole), (clip, clipped)):
        found = clipped_gradient_sum(client, vectors, at, records, 4, SMALL, bound)
        assert found.shape == values.shape
        assert torch.linalg.norm(found - expected) <= 1e-4 * torch.linalg.norm(expected)


@pytest.mark.long
def test_one_user_more_or_less_changes_the_sum_by_the_clip_norm_at_most(
    adapters: dict[str, Adapter], clients: list[LocalDomain]
) -> None:
    vectors, at, client, clip = stack_adapters(adapters), torch.full((3,), 0.5), clients[0], 0.2
    reached = []
    for number in range(3):
        records = some_records(client, number)
        whole = clipped_gradient_sum(client, vectors, at, records, number, SMALL, clip)
        for user in range(len(records.targets)):
            rest = [other for other in range(len(records.targets)) if other != user]
            without = Records([records.histories[other] for other in rest], records.targets[rest])
            change = whole - clipped_gradient_sum(client, vectors, at, without, number, SMALL, clip)
            alone = clipped_gradient_sum(client, vectors, at, one_of(records, user), number, SMALL, clip)
            assert torch.allclose(change, alone, atol=1e-5)
            reached.append(float(change.norm()))
    assert max(reached) <= clip * (1 + 1e-5)
    assert max(reached) > 0.99 * clip
    nobody = Records([], np.array([], dtype=np.int64))
    assert not clipped_gradient_sum(client, vectors, at, nobody, 0, SMALL, clip).any()


def test_a_user_whose_gradient_fails_leaves_the_others(
    adapters: dict[str, Adapter], clients: list[LocalDomain], monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors, at, client, records = (
        stack_adapters(adapters),
        torch.full((3,), 0.5),
        clients[0],
        some_records(clients[0], 0),
    )
    rest = Records(records.histories[1:], records.targets[1:])
    expected = clipped_gradient_sum(client, vectors, at, rest, 0, SMALL, 0.2)

    def short_of_memory(*arguments: Any) -> Any:
        if arguments[1][0] is records.histories[0]:
            raise MemoryError
        return packed(*arguments)

    packed = LocalDomain.packed
    monkeypatch.setattr(LocalDomain, "packed", short_of_memory)
    assert torch.equal(clipped_gradient_sum(client, vectors, at, records, 0, SMALL, 0.2), expected)


def test_only_training_sequences_are_read(clients: list[LocalDomain]) -> None:
    client = clients[0]
    for step in range(5):
        histories, targets, negatives = draw_batch(client, step, SMALL)
        starts = {
            tuple(sequence[:n].tolist()) for sequence in client.training_sequences for n in range(1, len(sequence) + 1)
        }
        assert all((*history.tolist(), target) in starts for history, target in zip(histories, targets, strict=True))
        assert len(set(negatives.tolist())) == 8
    assert draw_batch(client, 0, SMALL)[1].tolist() != draw_batch(client, 1, SMALL)[1].tolist()


def test_learning_is_reproducible_in_any_order_and_weighs_clients_alike(
    adapters: dict[str, Adapter], clients: list[LocalDomain]
) -> None:
    vectors = stack_adapters(adapters)
    learned = learn_on_clients(clients, vectors, SMALL, SCHEDULE)
    again = learn_on_clients(clients[::-1], vectors, SMALL, SCHEDULE)
    assert torch.equal(learned.trajectory, again.trajectory)
    assert learned.coefficients.shape == (3, 2)
    first = learned.history[0]
    assert first.keys() == {"total", "books", "toys"}
    assert first["total"] == pytest.approx((first["books"] + first["toys"]) / 2)
    gradients = [coefficient_gradient(c, vectors, learned.initial_coefficients, 0, SMALL)[0] for c in clients]
    step = learned.trajectory[1] - learned.trajectory[0]
    assert torch.equal(step.sign(), -(gradients[0] + gradients[1]).sign())  # the first step of Adam
    started = learn_on_clients(
        clients, vectors, SMALL, replace(SCHEDULE, granularity="domain"), start=torch.tensor([0.1, 0.2, 0.3])
    )
    assert started.initial_coefficients.tolist() == pytest.approx([0.1, 0.2, 0.3])


@pytest.mark.long
def test_learning_lowers_the_loss_of_users(adapters: dict[str, Adapter], clients: list[LocalDomain]) -> None:
    settings = replace(SMALL, batch_size=30)
    learned = learn_on_clients(clients, stack_adapters(adapters), settings, StudySchedule(steps=40, learning_rate=0.05))
    losses = [step["total"] for step in learned.history]
    assert np.mean(losses[-10:]) < np.mean(losses[:10])


def test_wrong_settings_and_missing_users_are_refused(
    backbone: Backbone, clients: list[LocalDomain], adapters: dict[str, Adapter], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"negatives.*\b0\b.*\b1\b"):
        ClientMergeSettings(negatives=0)
    with pytest.raises(ConfigError, match=r"learning_rate.*\b0\b"):
        StudySchedule(learning_rate=0)
    with pytest.raises(ConfigError, match=r"granularity.*'module'.*'domain'.*'layer'"):
        StudySchedule(granularity="module")  # type: ignore[arg-type]  # on purpose
    with pytest.raises(DomainError, match="learn_on_clients"):
        learn_on_clients([], stack_adapters(adapters), SMALL, SCHEDULE)
    users = make_interactions(["u"], [[0]])
    catalog = clients[0].catalog
    write_domain(tmp_path / "toys", catalog, users, public_catalog=True, synthetic=True, source="test")
    with pytest.raises(DomainError, match="toys"):
        draw_batch(open_domain(tmp_path / "toys", backbone, TEXT), 0, SMALL)
