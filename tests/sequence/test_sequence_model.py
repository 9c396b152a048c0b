"""Models on text vectors, with and without ids: what they equal, what items without training are, and gradients."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fedmerge.errors import LayoutMismatchError
from fedmerge.sequence.model import Inputs, SequenceModel, SequenceSettings
from fedmerge.sequence.ranking import sequence_source
from fedmerge.sequence.training import backward

NUM_ITEMS, WIDTH = 9, 5
SETTINGS = SequenceSettings(inputs="text+ids", hidden_size=8, dropout=0.0, id_dropout=0.0, max_length=6)
VECTORS = nn.functional.normalize(torch.randn(NUM_ITEMS, WIDTH, generator=torch.Generator().manual_seed(1)), dim=1)
HISTORIES = [np.array([3, 1, 4, 1]), np.array([8]), np.array([2, 7])]
BATCH = [np.array([1, 2, 3, 4]), np.array([5, 5]), np.array([0, 8, 7])]
OF_TEXT = pytest.mark.parametrize("inputs", ["text", "text+ids"])


def model_of(settings: SequenceSettings = SETTINGS, vectors: torch.Tensor | None = VECTORS) -> SequenceModel:
    """Make a model with large random weights, so that each of them matters."""
    model = SequenceModel(NUM_ITEMS if vectors is None else len(vectors), settings, vectors).eval()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.5)
    return model


def scores_of(model: SequenceModel, histories: list[np.ndarray]) -> torch.Tensor:
    source = sequence_source(model, histories)
    return source.user_vectors @ source.item_vectors.T


def test_one_hot_vectors_with_a_free_linear_map_are_the_model_on_ids() -> None:
    on_ids = model_of(replace(SETTINGS, inputs="ids"), None)
    on_text = SequenceModel(NUM_ITEMS, replace(SETTINGS, inputs="text"), torch.eye(NUM_ITEMS))
    embeddings = on_ids.items.weight.detach()
    free = nn.Linear(NUM_ITEMS - 1, SETTINGS.hidden_size)  # whitened, N one-hot vectors have rank N - 1
    known = torch.cat([on_text.whitened, torch.ones(NUM_ITEMS, 1)], dim=1)
    solution = torch.linalg.solve(known.double(), embeddings.double()).float()
    on_text.text_map = nn.Sequential(free)
    weights = {name: tensor for name, tensor in on_ids.state_dict().items() if name != "items.weight"}
    weights |= {"text_map.0.weight": solution[:-1].T, "text_map.0.bias": solution[-1]}
    on_text.load_state_dict({**on_text.state_dict(), **weights})
    torch.testing.assert_close(scores_of(on_text.eval(), HISTORIES), scores_of(on_ids, HISTORIES), rtol=1e-4, atol=1e-4)
    assert backward(on_ids.train(), BATCH) == pytest.approx(backward(on_text.train(), BATCH), rel=1e-5)
    assert free.bias.grad is not None
    assert on_ids.items.weight.grad is not None
    torch.testing.assert_close(on_ids.items.weight.grad.sum(dim=0), free.bias.grad, rtol=1e-4, atol=1e-4)


def test_text_vectors_are_whitened_in_their_own_rank() -> None:
    flat = torch.cat([VECTORS[:, :3] + 4, VECTORS[:, :1]], dim=1)  # three dimensions that vary, far from the origin
    whitened = SequenceModel(NUM_ITEMS, SETTINGS, flat).whitened.double()
    assert whitened.shape == (NUM_ITEMS, 3)
    torch.testing.assert_close(whitened.T @ whitened / NUM_ITEMS, torch.eye(3).double(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(whitened.mean(dim=0), torch.zeros(3).double(), rtol=1e-3, atol=1e-3)
    same = SequenceModel(NUM_ITEMS, SETTINGS, torch.ones(NUM_ITEMS, WIDTH))  # one text for all items
    assert torch.isfinite(same.item_representations()).all()


@pytest.mark.parametrize("num_items", [1, NUM_ITEMS])
def test_an_item_added_to_a_catalog_of_one_text_does_not_outscore_all(num_items: int) -> None:
    """A catalog of one item, or of equal texts up to rounding, has no direction that could be scaled."""
    vectors = nn.functional.normalize(VECTORS[:1], dim=1).repeat(num_items, 1) + 1e-8 * VECTORS[:num_items]
    model = SequenceModel(num_items, replace(SETTINGS, inputs="text"), vectors)
    added = torch.cat([vectors, nn.functional.normalize(VECTORS[1:2], dim=1)])
    grown = SequenceModel(num_items + 1, model.settings, added, (model.text_mean, model.text_axes))
    assert grown.whitened.abs().max() < 10
    scores = scores_of(grown.eval(), [np.array([0])])
    torch.testing.assert_close(scores[0, -1], scores[0, 0])


@OF_TEXT
def test_a_permutation_of_the_items_permutes_the_scores(inputs: Inputs) -> None:
    model = model_of(replace(SETTINGS, inputs=inputs))
    order = np.random.default_rng(0).permutation(NUM_ITEMS)  # new index -> old index
    permuted = SequenceModel(NUM_ITEMS, model.settings, VECTORS[order])
    weights = model.state_dict()
    for name in {"items.weight", "trained_items"} & weights.keys():
        weights[name] = weights[name][order]
    permuted.load_state_dict(weights)
    new_index = np.argsort(order)
    found = scores_of(permuted.eval(), [new_index[history] for history in HISTORIES])
    torch.testing.assert_close(found, scores_of(model, HISTORIES)[:, order])


def test_a_new_item_changes_no_other_score_and_is_scored_by_its_text() -> None:
    model = model_of()
    new = nn.functional.normalize(torch.ones(1, WIDTH), dim=1)
    larger = SequenceModel(NUM_ITEMS + 1, SETTINGS, torch.cat([VECTORS, new]))
    weights = model.state_dict()
    weights["items.weight"] = torch.cat([weights["items.weight"], torch.full((1, 8), 50.0)])
    weights["trained_items"] = torch.cat([weights["trained_items"], torch.tensor([False])])
    larger.load_state_dict(weights)
    before, after = scores_of(model, HISTORIES), scores_of(larger.eval(), HISTORIES)
    torch.testing.assert_close(after[:, :-1], before)
    states = sequence_source(model, HISTORIES).user_vectors
    with torch.no_grad():
        torch.testing.assert_close(after[:, -1], states @ larger.base()[-1])
        # A history that holds the new item reads its text.
        on_text = sequence_source(larger, [np.array([3, NUM_ITEMS])]).user_vectors
        larger.items.weight[NUM_ITEMS] = -7
        assert torch.equal(on_text, sequence_source(larger, [np.array([3, NUM_ITEMS])]).user_vectors)


@OF_TEXT
def test_text_vectors_are_frozen_and_not_stored(inputs: Inputs) -> None:
    vectors = VECTORS.clone().requires_grad_()
    model = SequenceModel(NUM_ITEMS, replace(SETTINGS, inputs=inputs), vectors).train()
    backward(model, BATCH)
    assert vectors.grad is None
    assert not model.item_vectors.requires_grad
    assert not {name for name, tensor in model.state_dict().items() if tensor.shape == VECTORS.shape}
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("logits_per_block", [1, 4 * NUM_ITEMS, 10**6])
@OF_TEXT
def test_gradients_are_those_of_a_dense_softmax_in_float64(inputs: Inputs, logits_per_block: int) -> None:
    model = model_of(replace(SETTINGS, inputs=inputs)).train()
    if inputs == "text+ids":
        model.trained_items[6] = False
    dense = copy.deepcopy(model).double()
    losses = []
    for sequence in BATCH:
        logits = dense(torch.from_numpy(sequence[None, :-1]))[0] @ dense.item_representations().T
        losses += [-torch.log_softmax(row, 0)[item] for row, item in zip(logits, sequence[1:], strict=True)]
    expected = torch.stack(losses).mean()
    expected.backward()  # type: ignore[no-untyped-call]  # PyTorch leaves it untyped
    calls = []
    model.text_map.register_forward_hook(lambda *_: calls.append(1))
    assert backward(model, BATCH, logits_per_block=logits_per_block) == pytest.approx(expected.item(), rel=1e-5)
    assert len(calls) == 1
    for (name, one), (_, other) in zip(dense.named_parameters(), model.named_parameters(), strict=True):
        assert one.grad is not None
        torch.testing.assert_close(one.grad.float(), other.grad, rtol=1e-3, atol=1e-4, msg=name)
    if inputs == "text+ids":
        assert model.items.weight.grad is not None
        assert not model.items.weight.grad[6].any()


def test_training_drops_ids_by_item_in_scores_and_by_occurrence_in_histories() -> None:
    settings = replace(SETTINGS, id_dropout=0.3)
    vectors = nn.functional.normalize(torch.randn(400, WIDTH, generator=torch.Generator().manual_seed(2)), dim=1)
    model = model_of(settings, vectors)
    with torch.no_grad():
        assert (model.item_representations() != model.base()).all(dim=1).all()
        torch.manual_seed(0)
        dropped = (model.train().item_representations() == model.base()).all(dim=1)
        assert 0.2 < dropped.float().mean() < 0.4
        assert not torch.equal(dropped, (model.item_representations() == model.base()).all(dim=1))
        # The same item many times at the first position: read with its id, or without it.
        first = model(torch.full((400, 1), 7))[:, 0]
        assert len(torch.unique((first * 1000).round(), dim=0)) == 2
        assert torch.equal(model.eval()(torch.full((2, 1), 7))[0], model(torch.full((2, 1), 7))[1])


def test_vectors_that_do_not_fit_the_catalog_are_refused() -> None:
    with pytest.raises(LayoutMismatchError, match=r"\(9, d\): found none"):
        SequenceModel(NUM_ITEMS, SETTINGS)
    with pytest.raises(LayoutMismatchError, match=r"found shape \(8, 5\)"):
        SequenceModel(NUM_ITEMS, SETTINGS, VECTORS[:-1])
