"""A client that poisons its own training: what it trains on, what it sends, and who may not."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from in_process import small_experiment

from fedmerge.adapter import adapter_sha256
from fedmerge.client.cache.experts import load_expert, load_or_train_expert
from fedmerge.client.local_domain import LocalDomain, open_domain
from fedmerge.client.training.poisoning import NUM_PROMOTED, check_may_attack, poisoned, sent, training_inputs
from fedmerge.config import ExperimentConfig, Simulation, Train, from_flat
from fedmerge.device import resolve_compute
from fedmerge.domain.interactions import interactions_fingerprint
from fedmerge.encoder.backbone import load_backbone
from fedmerge.errors import ConfigError, PolicyError
from sim.checks import check_simulation

ALL_PREFIXES = Train()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("attack")
    small_experiment(place)
    return place


@pytest.fixture(scope="module")
def domain(place: Path) -> LocalDomain:
    backbone = load_backbone(str(place / "backbone"), "mean", resolve_compute("cpu", "float32"))
    return open_domain(place / "domains" / "coffee", backbone, small_experiment(place).text)


def attacked(place: Path, kind: str, strength: float, **changes: object) -> ExperimentConfig:
    return small_experiment(
        place,
        **{
            "simulation.attacker": "coffee",
            "simulation.attack": kind,
            "simulation.attack_strength": strength,
            **changes,
        },
    )


def examples(domain: LocalDomain) -> list[tuple[tuple[int, ...], int]]:
    """History and target of every user, as training with samples = "last" sees them."""
    return [(tuple(items[:-1].tolist()), int(items[-1])) for items in domain.training_sequences]


def test_flipped_labels_keep_the_histories_and_turn_the_targets(domain: LocalDomain) -> None:
    num_items = len(domain.catalog)
    clean = [
        (tuple(items[:cut].tolist()), int(items[cut]))
        for items in domain.training_sequences
        for cut in range(1, len(items))
    ]
    flipped = examples(poisoned(domain, Simulation(attack_strength=1.0), ALL_PREFIXES, 0))
    assert flipped == [(history, num_items - 1 - target) for history, target in clean]
    last = examples(poisoned(domain, Simulation(attack_strength=1.0), Train(samples="last"), 0))
    assert last == [(tuple(items[:-1].tolist()), num_items - 1 - int(items[-1])) for items in domain.training_sequences]
    some = examples(poisoned(domain, Simulation(attack_strength=0.4), ALL_PREFIXES, 0))
    share = np.mean([found != before for found, before in zip(some, clean, strict=True)])
    assert 0.25 < share < 0.55
    assert some == examples(poisoned(domain, Simulation(attack_strength=0.4), ALL_PREFIXES, 0))


def test_promoted_items_are_a_few(domain: LocalDomain) -> None:
    clean = [target for _, target in examples(poisoned(domain, Simulation(attack_strength=1e-9), ALL_PREFIXES, 0))]
    attack = Simulation(attack="promoted-items", attack_strength=0.5)
    found = [target for _, target in examples(poisoned(domain, attack, ALL_PREFIXES, 0))]
    changed = {target for target, before in zip(found, clean, strict=True) if target != before}
    assert 1 < len(changed) <= NUM_PROMOTED
    assert np.mean([target in changed for target in found]) > 0.35


def test_the_domain_itself_and_everybody_else_stay_clean(place: Path, domain: LocalDomain) -> None:
    before = interactions_fingerprint(domain.interactions)
    config = attacked(place, "flipped-labels", 1.0)
    trained_on, settings = training_inputs(domain, config)
    assert trained_on is not domain
    assert settings.samples == "last"
    assert interactions_fingerprint(domain.interactions) == before == domain.manifest.interactions_sha256
    other = open_domain(place / "domains" / "books", domain.backbone, config.text)
    assert training_inputs(other, config) == (other, config.train)
    assert training_inputs(domain, small_experiment(place)) == (domain, config.train)


def test_a_poisoned_expert_is_kept_beside_the_honest_one_and_found_again(place: Path, domain: LocalDomain) -> None:
    lines: list[str] = []
    honest, _ = load_or_train_expert(domain, small_experiment(place), lines.append)
    assert not any("POISONS" in line for line in lines)
    found = {adapter_sha256(honest)}
    for kind, strength in (("flipped-labels", 1.0), ("promoted-items", 0.5), ("scaled-update", 10.0)):
        config = attacked(place, kind, strength)
        adapter, report = load_or_train_expert(domain, config, lines.append)
        assert any(f"coffee: POISONS ITS TRAINING: {kind}" in line for line in lines)
        assert report["sha256"] == adapter_sha256(adapter)
        assert adapter_sha256(load_expert(domain, config, report["sha256"])) == report["sha256"]
        assert load_or_train_expert(domain, config, lines.append)[1]["cached"]
        assert any(module.lora_B.any() for module in adapter.modules.values())
        found.add(report["sha256"])
        if kind == "scaled-update":
            for name, module in honest.modules.items():
                torch.testing.assert_close(adapter.modules[name].delta_weight(), 10 * module.delta_weight())
    assert len(found) == 4
    assert load_or_train_expert(domain, small_experiment(place), lines.append)[1]["cached"]
    assert sent(honest, "books", attacked(place, "scaled-update", 10.0)) is honest


def test_data_that_are_not_synthetic_are_refused(place: Path, domain: LocalDomain) -> None:
    real = replace(domain, manifest=replace(domain.manifest, synthetic=False))
    config = attacked(place, "flipped-labels", 1.0)
    check_may_attack(domain.manifest)
    with pytest.raises(PolicyError, match=r"domain coffee: simulation\.attacker"):
        training_inputs(real, config)
    check_simulation(config)  # the demo's folders say that they are synthetic
    manifest = place / "domains" / "coffee" / "manifest.json"
    text = manifest.read_text()
    try:
        manifest.write_text(text.replace('"synthetic": true', '"synthetic": false'))
        assert manifest.read_text() != text
        with pytest.raises(ConfigError, match="coffee"):
            check_simulation(config)
        check_simulation(small_experiment(place))
    finally:
        manifest.write_text(text)


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({"simulation.attacker": "cofee"}, r"simulation\.attacker = 'cofee' is not among domains\.train"),
        ({"simulation.attacker": "toys", "domains.unseen": "toys"}, r"simulation\.attacker = 'toys' is not among"),
        (
            {"simulation.attacker": "beauty", "simulation.attack_strength": 2},
            r"for flipped-labels it is a share .* at most 1",
        ),
        (
            {"simulation.attacker": "beauty", "simulation.attack": "promoted-items", "simulation.attack_strength": 1},
            r"at most 0\.95; with all of them promoted no other item is left",
        ),
        ({"admission.action": "none", "admission.rollback": True}, r"action is 'none', but rollback is set"),
        (
            {"admission.probe_items": 100, "privacy.policy": "adapter", "merge.methods": "average"},
            r"admission\.probe_items needs the catalogs, but privacy\.policy = 'adapter' keeps them",
        ),
        (
            {"admission.action": "exclude", "rounds.rule": "median"},
            r"admission\.action: the gate stands in front of one merge.* rounds\.rule is median; leave it out, or",
        ),
        ({"admission.leave_one_out": True, "rounds.rule": "fedit"}, r"admission\.leave_one_out: the gate"),
        (
            {"rounds.rule": "multi-krum", "domains.train": "beauty,books,coffee,camping"},
            r"rounds\.rule is multi-krum with num_malicious = 1, and 4 clients .* 2 · num_malicious \+ 3 = 5",
        ),
        (
            {"rounds.rule": "krum", "rounds.parameters": "num_malicious=3"},
            r"4 clients take part in a round; its proof needs .* = 9\. Name more domains, or lower num_malicious",
        ),
    ],
)
def test_wrong_settings_are_refused(flat: dict[str, str | int | bool], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_flat(flat)


def test_enough_clients_for_krum_are_counted_of_those_that_are_drawn() -> None:
    train = {"domains.train": "beauty,books,coffee,camping,garden,kitchen", "rounds.rule": "krum"}
    assert from_flat(train).rounds.rule == "krum"
    with pytest.raises(ConfigError, match="and 3 clients take part in a round"):
        from_flat({**train, "rounds.fraction": 0.5})
    with pytest.raises(ConfigError, match=r"rounds\.parameters"):
        from_flat({**train, "rounds.parameters": "num_malicious"})
