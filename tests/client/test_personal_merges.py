"""A client's personal merge: its gradient against a dense float64 model, its users, its cache."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import layout_of, random_adapters
from merging_oracles import dense_vectors

from fedmerge.adapter import Adapter, adapter_sha256
from fedmerge.client.coefficients import personal
from fedmerge.client.coefficients.personal import (
    PersonalMerge,
    PersonalSettings,
    coefficient_gradient,
    find_personal_merge,
    fit_personal_merge,
    fitting_sequences,
    load_or_fit_personal_merge,
)
from fedmerge.client.local_domain import LocalDomain, open_domain
from fedmerge.client.training.batches import training_batches
from fedmerge.config import Personal, Text, Train
from fedmerge.domain.demo import generate_domain
from fedmerge.domain.folder import write_domain
from fedmerge.domain.splits import evaluated_users, evaluation_examples
from fedmerge.encoder.backbone import Backbone
from fedmerge.encoder.text import pack_sequences
from fedmerge.mergerec.directions import direction_stack, start_of_personal

TEXT = Text(max_attribute_tokens=6, max_items=3, max_tokens=64)
SETTINGS = PersonalSettings(Personal(directions="module", steps=8, learning_rate=0.1), 8, 10, "exact", 0, 1)
CHOOSING = np.arange(10)
SOURCES = {"books": "b", "tents": "c", "toys": "a"}


@pytest.fixture(scope="module")
def adapters(backbone: Backbone) -> dict[str, Adapter]:
    return random_adapters(layout_of(backbone))


@pytest.fixture(scope="module")
def client(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> LocalDomain:
    folder = tmp_path_factory.mktemp("domains") / "toys"
    demo = generate_domain("toys", num_users=40, num_items=25)
    write_domain(folder, demo.catalog, demo.interactions, public_catalog=True, synthetic=True, source="test")
    return open_domain(folder, backbone, TEXT)


def test_the_gradient_equals_a_dense_float64_model(
    backbone: Backbone, adapters: dict[str, Adapter], client: LocalDomain
) -> None:
    """∂L/∂β_{k,g} = Σ_{m∈g} ρ_c ⟨∂L/∂W_m, D_{k,m}⟩, by automatic differentiation of the definition."""
    stack = direction_stack("toys", adapters, "module")
    values = start_of_personal("toys", stack)
    values[[0, 1]] = torch.tensor([[0.3, -0.2, 0.1][: len(stack.groups)], [0.2, 0.4, 0.1][: len(stack.groups)]])
    batch, _ = next(training_batches(client.training_sequences, Train(batch_size=8), 0, "test"))
    found, found_loss = coefficient_gradient(client, stack, values, batch)

    norms = {
        name: {m: (lora.scaling * lora.lora_B.double() @ lora.lora_A.double()).norm() for m, lora in of.modules.items()}
        for name, of in adapters.items()
    }
    exact: torch.Tensor = values.double().requires_grad_()

    def coefficient(domain: str, module: str) -> torch.Tensor:
        own = exact[stack.domains.index(domain), stack.group_of[module]]
        return torch.mul(own, float(norms["toys"][module] / norms[domain][module]) if domain != "toys" else 1.0)

    packed = pack_sequences(client.table, batch.histories, backbone.special, TEXT.max_items, TEXT.max_tokens)
    users = dense_vectors(backbone, adapters, coefficient, packed)
    distinct, targets = np.unique(batch.targets, return_inverse=True)
    items = dense_vectors(backbone, adapters, coefficient, [client.item_sequences[item] for item in distinct])
    loss = torch.nn.functional.cross_entropy(users @ items.T / 0.05, torch.from_numpy(targets))
    (gradient,) = torch.autograd.grad(loss, [exact])
    assert found_loss == pytest.approx(loss.item(), rel=1e-4)
    assert torch.linalg.norm(found - gradient) <= 1e-4 * torch.linalg.norm(gradient)


def test_held_out_users_neither_stop_nor_choose(client: LocalDomain) -> None:
    sequences = fitting_sequences(client, SETTINGS, CHOOSING)
    stopping = evaluation_examples(client.interactions, "valid", 8, 0).users
    users = np.setdiff1d(evaluated_users(client.interactions, "valid"), [*CHOOSING, *stopping])
    assert len(sequences) == len(users) >= 20
    for user, sequence in zip(users, sequences, strict=True):  # the validation item is fitted, that of test is not
        assert np.array_equal(sequence, client.interactions.sequence(user)[:-1])
    audited = replace(client, left_out=np.isin(np.arange(client.interactions.num_users), users[:5]))
    assert len(fitting_sequences(audited, SETTINGS, CHOOSING)) == len(users) - 5
    on_train = replace(SETTINGS, personal=Personal(directions="module", fit_on="train"))
    assert fitting_sequences(client, on_train, CHOOSING) == client.training_sequences
    assert fitting_sequences(client, replace(SETTINGS, stopping_users=None), CHOOSING) == []


def test_a_fit_lowers_its_loss_and_never_falls_below_the_expert_on_validation(
    client: LocalDomain, adapters: dict[str, Adapter]
) -> None:
    sequences, lines = fitting_sequences(client, SETTINGS, CHOOSING), list[str]()
    found = fit_personal_merge(client, adapters, SETTINGS, sequences, lines.append)
    steps, scores = zip(*found.record["validations"], strict=True)
    assert steps == (0, 2, 4, 6, 8)
    assert found.record["best_step"] == steps[scores.index(max(scores))]
    assert len(lines) == 5
    assert found.record["coefficients"]["toys"] == [1.0] * len(found.record["groups"])
    again = fit_personal_merge(client, dict(reversed(adapters.items())), SETTINGS, sequences)
    assert adapter_sha256(again.adapter) == adapter_sha256(found.adapter)


def test_a_factor_on_the_own_update_is_fitted_if_asked_for(client: LocalDomain, adapters: dict[str, Adapter]) -> None:
    settings = replace(SETTINGS, personal=SETTINGS.personal.model_copy(update={"own": True, "fit_on": "train"}))
    found = fit_personal_merge(client, adapters, settings, client.training_sequences)
    fixed = replace(settings, personal=settings.personal.model_copy(update={"own": False}))
    without = fit_personal_merge(client, adapters, fixed, client.training_sequences)
    if found.record["best_step"]:
        assert found.record["coefficients"]["toys"] != [1.0] * len(found.record["groups"])
    assert without.record["coefficients"]["toys"] == [1.0] * len(found.record["groups"])
    neutral = fit_personal_merge(client, adapters, settings, [])
    assert adapter_sha256(neutral.adapter) == adapter_sha256(adapters["toys"])


def test_what_is_off_is_not_in_the_name_of_a_fit() -> None:
    """Fits of versions without these settings are found again; the universal merge changes no fit."""
    known = {"directions", "fit_on", "steps", "learning_rate"}
    sent = replace(SETTINGS, personal=SETTINGS.personal.model_copy(update={"universal": True}))
    assert SETTINGS.record()["personal"].keys() == sent.record()["personal"].keys() == known
    own = replace(SETTINGS, personal=SETTINGS.personal.model_copy(update={"own": True}))
    assert own.record()["personal"].keys() == known | {"own"}


def test_without_users_the_merge_is_the_expert(client: LocalDomain, adapters: dict[str, Adapter]) -> None:
    found = fit_personal_merge(client, adapters, SETTINGS, [])
    assert adapter_sha256(found.adapter) == adapter_sha256(adapters["toys"])
    assert found.record["validations"] == []


def test_the_log_says_why_a_merge_is_the_expert(client: LocalDomain, adapters: dict[str, Adapter]) -> None:
    lines = list[str]()
    fit_personal_merge(client, adapters, SETTINGS, [], lines.append)
    fit_personal_merge(client, {"toys": adapters["toys"]}, SETTINGS, client.training_sequences, lines.append)
    expected = [
        f"toys: {reason} to fit a personal merge on; it is the expert" for reason in ("0 users", "no other domain")
    ]
    assert lines == expected


def load(client: LocalDomain, adapters: Mapping[str, Adapter], settings: PersonalSettings, cache: Path) -> Adapter:
    found = load_or_fit_personal_merge(client, adapters, SOURCES, settings, CHOOSING, str(cache))
    return found.adapter


def test_a_fit_is_cached_by_all_of_its_inputs_and_found_again(
    client: LocalDomain, adapters: dict[str, Adapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = replace(SETTINGS, personal=Personal(directions="module", steps=2, learning_rate=0.3, fit_on="train"))
    assert find_personal_merge("toys", SOURCES, short, str(tmp_path)) is None
    made = load(client, adapters, short, tmp_path)
    fits = list[PersonalSettings]()

    def fit(domain: LocalDomain, given: Mapping[str, Adapter], settings: PersonalSettings, *rest: Any) -> PersonalMerge:
        fits.append(settings)
        return fit_personal_merge(domain, given, settings, *rest)

    monkeypatch.setattr(personal, "fit_personal_merge", fit)
    assert adapter_sha256(load(client, adapters, short, tmp_path)) == adapter_sha256(made)
    assert not fits
    found = find_personal_merge("toys", SOURCES, short, str(tmp_path))
    assert found is not None
    assert adapter_sha256(found) == adapter_sha256(made)
    assert find_personal_merge("toys", {**SOURCES, "books": "other"}, short, str(tmp_path)) is None
    assert find_personal_merge("toys", SOURCES, replace(short, seed=1), str(tmp_path)) is None
    load(client, adapters, replace(short, seed=1), tmp_path)
    load(client, {**adapters, "books": adapters["tents"]}, short, tmp_path)
    assert len(fits) == 2
    for path in tmp_path.glob("personal/*/personal.json"):  # damaged: fitted again
        path.write_text(path.read_text().replace('"best_step"', '"best_stop"'))
    assert find_personal_merge("toys", SOURCES, short, str(tmp_path)) is None
    assert adapter_sha256(load(client, adapters, short, tmp_path)) == adapter_sha256(made)
    assert len(fits) == 3
