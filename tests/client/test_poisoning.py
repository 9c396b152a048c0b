"""A client that poisons its own training: its training data, its adapter, and the refusal on real data."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from in_process import cached_expert_of, expert_of, small_experiment

from fedmerge.adapter import adapter_sha256
from fedmerge.client.local_domain import LocalDomain, open_domain
from fedmerge.client.training.poisoning import (
    NUM_PROMOTED,
    apply_attack,
    poison_targets,
    training_inputs,
)
from fedmerge.client.training.settings import training_settings
from fedmerge.config import ExperimentConfig, Simulation, Train, from_flat
from fedmerge.device import resolve_compute
from fedmerge.domain.interactions import interactions_fingerprint
from fedmerge.domain.manifest import check_may_attack
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
    """Return history and target of every user, as training with samples = "last" reads them."""
    return [(tuple(items[:-1].tolist()), int(items[-1])) for items in domain.training_sequences]


def test_flipped_labels_keep_the_histories_and_flip_the_targets(domain: LocalDomain) -> None:
    num_items = len(domain.catalog)
    clean = [
        (tuple(items[:cut].tolist()), int(items[cut]))
        for items in domain.training_sequences
        for cut in range(1, len(items))
    ]
    flipped = examples(poison_targets(domain, Simulation(attack_strength=1.0), ALL_PREFIXES, 0))
    assert flipped == [(history, num_items - 1 - target) for history, target in clean]
    last = examples(poison_targets(domain, Simulation(attack_strength=1.0), Train(samples="last"), 0))
    assert last == [(tuple(items[:-1].tolist()), num_items - 1 - int(items[-1])) for items in domain.training_sequences]
    some = examples(poison_targets(domain, Simulation(attack_strength=0.4), ALL_PREFIXES, 0))
    share = np.mean([found != before for found, before in zip(some, clean, strict=True)])
    assert 0.25 < share < 0.55
    assert some == examples(poison_targets(domain, Simulation(attack_strength=0.4), ALL_PREFIXES, 0))


def test_promoted_items_are_a_few(domain: LocalDomain) -> None:
    clean = [
        target for _, target in examples(poison_targets(domain, Simulation(attack_strength=1e-9), ALL_PREFIXES, 0))
    ]
    attack = Simulation(attack="promoted-items", attack_strength=0.5)
    found = [target for _, target in examples(poison_targets(domain, attack, ALL_PREFIXES, 0))]
    changed = {target for target, before in zip(found, clean, strict=True) if target != before}
    assert 1 < len(changed) <= NUM_PROMOTED
    assert np.mean([target in changed for target in found]) > 0.35


def test_the_domain_on_disk_and_other_domains_stay_clean(place: Path, domain: LocalDomain) -> None:
    before = interactions_fingerprint(domain.interactions)
    config = attacked(place, "flipped-labels", 1.0)
    trained_on, settings = training_inputs(domain, training_settings(config))
    assert trained_on is not domain
    assert settings.samples == "last"
    assert interactions_fingerprint(domain.interactions) == before == domain.manifest.interactions_sha256
    other = open_domain(place / "domains" / "books", domain.backbone, config.text)
    assert training_inputs(other, training_settings(config)) == (other, config.train)
    assert training_inputs(domain, training_settings(small_experiment(place))) == (domain, config.train)


def test_a_poisoned_expert_is_cached_beside_the_honest_one(place: Path, domain: LocalDomain) -> None:
    lines: list[str] = []
    honest, _ = expert_of(domain, small_experiment(place), lines.append)
    assert not any("POISONS" in line for line in lines)
    found = {adapter_sha256(honest)}
    for kind, strength in (("flipped-labels", 1.0), ("promoted-items", 0.5), ("scaled-update", 10.0)):
        config = attacked(place, kind, strength)
        adapter, report = expert_of(domain, config, lines.append)
        assert any(f"coffee: POISONS ITS TRAINING: {kind}" in line for line in lines)
        assert report["sha256"] == adapter_sha256(adapter)
        assert adapter_sha256(cached_expert_of(domain, config, report["sha256"])) == report["sha256"]
        assert expert_of(domain, config, lines.append)[1]["cached"]
        assert any(module.lora_B.any() for module in adapter.modules.values())
        found.add(report["sha256"])
        if kind == "scaled-update":
            for name, module in honest.modules.items():
                torch.testing.assert_close(adapter.modules[name].delta_weight(), 10 * module.delta_weight())
    assert len(found) == 4
    assert expert_of(domain, small_experiment(place), lines.append)[1]["cached"]
    assert apply_attack(honest, "books", attacked(place, "scaled-update", 10.0).simulation) is honest


def test_data_that_are_not_synthetic_are_refused(place: Path, domain: LocalDomain) -> None:
    real = replace(domain, manifest=replace(domain.manifest, synthetic=False))
    config = attacked(place, "flipped-labels", 1.0)
    check_may_attack(domain.manifest)
    with pytest.raises(PolicyError, match=r"coffee.*simulation\.attacker"):
        training_inputs(real, training_settings(config))
    check_simulation(config)  # the demo's manifests say that the data are synthetic
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
        ({"simulation.attacker": "cofee"}, r"simulation\.attacker.*'cofee'.*domains\.train"),
        ({"simulation.attacker": "toys", "domains.unseen": "toys"}, r"simulation\.attacker.*'toys'.*domains\.train"),
        (
            {"simulation.attacker": "beauty", "simulation.attack_strength": 2},
            r"attack_strength = 2.*flipped-labels.*\b1\b",
        ),
        (
            {"simulation.attacker": "beauty", "simulation.attack": "promoted-items", "simulation.attack_strength": 1},
            r"attack_strength = 1.*promoted-items.*0\.95",
        ),
        ({"admission.action": "none", "admission.rollback": True}, r"action.*'none'.*rollback"),
        (
            {"admission.probe_items": 100, "privacy.policy": "adapter", "merge.methods": "average"},
            r"admission\.probe_items.*privacy\.policy = 'adapter'",
        ),
        ({"admission.action": "exclude", "rounds.rule": "median"}, r"admission\.action.*rounds\.rule.*median"),
        ({"admission.leave_one_out": True, "rounds.rule": "fedit"}, r"admission\.leave_one_out.*rounds\.rule.*fedit"),
        (
            {"rounds.rule": "multi-krum", "domains.train": "beauty,books,coffee,camping"},
            r"rounds\.rule.*multi-krum.*num_malicious = 1.*\b4 clients.*\b5\b",
        ),
        (
            {"rounds.rule": "krum", "rounds.parameters": "num_malicious=3"},
            r"rounds\.rule.*krum.*num_malicious = 3.*\b4 clients.*\b9\b",
        ),
    ],
)
def test_wrong_settings_are_refused(flat: dict[str, str | int | bool], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_flat(flat)


def test_krum_needs_enough_sampled_clients() -> None:
    train = {"domains.train": "beauty,books,coffee,camping,garden,kitchen", "rounds.rule": "krum"}
    assert from_flat(train).rounds.rule == "krum"
    with pytest.raises(ConfigError, match=r"krum.*\b3 clients"):
        from_flat({**train, "rounds.fraction": 0.5})
    with pytest.raises(ConfigError, match=r"rounds\.parameters"):
        from_flat({**train, "rounds.parameters": "num_malicious"})
