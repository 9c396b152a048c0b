"""The contrast of augmented views, and drawn items, in the training of a client's own head."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import layout_of, random_adapter

from fedmerge.adapter import Adapter
from fedmerge.client.heads.finding import find_trained_head
from fedmerge.client.heads.heads import LocalHead, load_or_train_head
from fedmerge.client.heads.vectors import item_vectors
from fedmerge.client.local_domain import LocalDomain
from fedmerge.config import Head
from fedmerge.errors import ClientError
from fedmerge.seeding import generator
from fedmerge.sequence.augmentation import augmented, forbidden_items
from fedmerge.sequence.contrast import TEMPERATURE, Contrast, contrast_backward, numbered, view_contrast
from fedmerge.sequence.model import SequenceModel, SequenceSettings

SMALL = {"kind": "local", "hidden_size": 8, "max_epochs": 3, "dropout": 0.1}
VIEWS = ("insert=0.4", "substitute=0.1", "mask=0.5")


@pytest.fixture(scope="module")
def adapter(toys: LocalDomain) -> Adapter:
    return random_adapter(layout_of(toys.backbone, ("query",)), 2, 1.0, 0)


def head_of(domain: LocalDomain, adapter: Adapter, cache: Path, progress: Any = print, **changes: Any) -> LocalHead:
    section = Head.model_validate({**SMALL, **changes})
    return load_or_train_head(domain, adapter, section, None, 0, str(cache), progress)


def weights_of(head: LocalHead) -> dict[str, torch.Tensor]:
    return dict(head.model.state_dict())


def equal(one: LocalHead, other: LocalHead) -> bool:
    left, right = weights_of(one), weights_of(other)
    return all(torch.equal(left[name], right[name]) for name in left)


def test_the_loss_is_that_of_the_last_states_of_two_views() -> None:
    torch.manual_seed(0)
    settings = SequenceSettings(hidden_size=8, dropout=0.0, max_length=5)
    model = SequenceModel(12, settings).train()
    similar = np.array([[(item + step) % 12 for step in (1, 2, 3)] for item in range(12)])
    contrast = Contrast(0.3, {"insert": 0.5, "mask": 0.5}, similar)
    batch = [np.array(items) for items in ([1, 2, 3, 4], [5, 6], [1, 2, 3, 7], [8, 9, 10, 11, 0, 1, 2])]
    loss = contrast_backward(model, batch, contrast, generator(0, "test"))
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}

    draws, pairs = generator(0, "test"), []
    for sequence in batch:
        forbidden = forbidden_items(sequence[:-1], sequence[-1:])
        assert forbidden == {int(sequence[-1])}
        pairs.append([augmented(sequence[:-1], contrast.rates, similar, forbidden, draws)[-5:] for _ in range(2)])
    views = [pair[0] for pair in pairs] + [pair[1] for pair in pairs]
    states = torch.stack([model(torch.from_numpy(view)[None])[0, -1] for view in views])
    vectors = torch.nn.functional.normalize(states, dim=1)
    owners = torch.tensor([0, 1, 0, 2])  # the first and the third have read the same
    expected = 0.3 * view_contrast(vectors[:4], vectors[4:], owners, numbered(views), TEMPERATURE)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    model.zero_grad()
    expected.backward()  # type: ignore[no-untyped-call]  # of PyTorch
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_weight_zero_and_no_draw_are_the_head_of_before(toys: LocalDomain, adapter: Adapter, tmp_path: Path) -> None:
    plain = head_of(toys, adapter, tmp_path)
    again = head_of(toys, adapter, tmp_path, contrast=0.0, views=VIEWS, sampled_items=None)
    assert again.cached
    assert equal(plain, again)
    (folder,) = (tmp_path / "heads").iterdir()
    assert "contrast" not in (inputs := json.loads((folder / "inputs.json").read_text()))
    assert "sampled_items" not in inputs["settings"]


@pytest.mark.parametrize("inputs", ["text+ids", "ids"])
@pytest.mark.parametrize(
    ("changes", "others"),
    [
        ({"contrast": 0.1, "views": VIEWS}, {"contrast": 0.2, "views": VIEWS}),
        ({"sampled_items": 5}, {"sampled_items": 6}),
    ],
)
def test_a_changed_training_gives_another_head_that_serving_finds(
    toys: LocalDomain, adapter: Adapter, tmp_path: Path, inputs: str, changes: dict[str, Any], others: dict[str, Any]
) -> None:
    plain = head_of(toys, adapter, tmp_path, inputs=inputs)
    changed = head_of(toys, adapter, tmp_path, inputs=inputs, **changes)
    assert not changed.cached
    assert not equal(plain, changed)
    assert head_of(toys, adapter, tmp_path, inputs=inputs, **changes).cached
    items, vectors = toys.catalog.item_ids, item_vectors(toys, adapter, str(tmp_path))

    def found(**changes: Any) -> LocalHead:
        section = Head.model_validate({**SMALL, "inputs": inputs, **changes})
        return find_trained_head("toys", items, vectors, adapter, section, None, 0, str(tmp_path))

    assert equal(found(), plain)
    assert equal(found(**changes), changed)
    with pytest.raises(ClientError, match="holds no head"):
        found(**others)


def test_a_killed_training_resumes_to_the_same_head(toys: LocalDomain, adapter: Adapter, tmp_path: Path) -> None:
    changes = {"contrast": 0.1, "sampled_items": 5}
    whole = head_of(toys, adapter, tmp_path / "whole", **changes)

    def kill(line: str) -> None:
        if "epoch 2" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        head_of(toys, adapter, tmp_path / "killed", kill, **changes)
    resumed = head_of(toys, adapter, tmp_path / "killed", **changes)
    assert equal(whole, resumed)
    assert resumed.report["losses"] == whole.report["losses"]
