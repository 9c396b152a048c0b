"""Audit of a deliberately overfitted adapter, without and with noise.

    pytest -m slow tests/client/test_audit_overfitted.py -s        prints the tables of docs/results.md

The domain comes from the bundled demo's generator (100 users, 100 items), the backbone is random. 50 users and 16
canaries are trained for 200 steps, each with the last item alone, without early stopping. Only the noise differs.
"""

from pathlib import Path
from typing import Any

import pytest

from fedmerge.client.audit.attacks import Audited, audit_domain
from fedmerge.client.audit.users import prepare_for_audit
from fedmerge.client.local_domain import open_domain
from fedmerge.client.training.by_mode import train_adapter
from fedmerge.client.training.settings import training_settings
from fedmerge.config import from_flat
from fedmerge.device import resolve_compute
from fedmerge.domain.demo import generate_domain
from fedmerge.domain.folder import write_domain
from fedmerge.encoder.backbone import load_backbone
from fedmerge.encoder.demo_backbone import write_demo_backbone
from fedmerge.report.audit_text import audit_text

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

SETTINGS: dict[str, Any] = {
    "text.max_tokens": 32,
    "text.max_items": 2,
    "text.max_attribute_tokens": 6,
    "lora.rank": 16,
    "lora.alpha": 32,
    "lora.target_modules": "all-linear",
    "train.negatives": "catalog",
    "train.samples": "last",
    "train.learning_rate": 3e-3,
    "train.batch_size": 90,  # all users in every step
    "train.max_steps": 200,
    "train.warmup_steps": 5,
    "train.validate_every_steps": 1000,
    "train.item_refresh_steps": 5,
    "dp.mode": "user",
    "dp.accountant": "rdp",
    "dp.randomness": "seeded",
    "simulation.held_out_users": 0.5,
    "simulation.canaries": 16,
}
NO_NOISE = {"dp.noise_multiplier": 0.0, "dp.clip": 10.0}


def epsilon(value: float) -> dict[str, float]:
    return {"dp.epsilon": value, "dp.delta": 1e-3, "dp.clip": 1.0}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("place")
    demo = generate_domain("toys", num_users=100, num_items=100)
    write_domain(place / "toys", demo.catalog, demo.interactions, public_catalog=True, synthetic=True, source="test")
    write_demo_backbone(place / "backbone")
    return place


def audited(place: Path, name: str, changes: dict[str, float]) -> dict[str, Any]:
    config = from_flat({**SETTINGS, **changes})
    backbone = load_backbone(str(place / "backbone"), "mean", resolve_compute("cpu", "float32"))
    domain = open_domain(place / "toys", backbone, config.text)
    settings = training_settings(config)
    adapter, _, _ = train_adapter(prepare_for_audit(domain, config.simulation, config.seed), settings)
    found = audit_domain(Audited(domain, settings, adapter, None, {"toys": adapter}, None), num_shadows=0)
    print("\n" + audit_text({"run": name, "dp": changes, "domains": {"toys": found}}))
    rows = {f"{row['model']} {row['attack']}": row for row in found["membership"]}
    canaries = {f"canaries {row['model']}": row for row in found["canaries"]}
    return {**rows, **canaries}


def test_an_overfitted_adapter_reveals_its_users(place: Path) -> None:
    found = audited(place, "no noise", NO_NOISE)
    assert found["expert loss"]["auc"] > 0.9
    assert found["expert loss against the backbone's"]["auc"] > 0.9
    assert found["canaries expert"]["mean_exposure"] > 4
    assert found["canaries backbone"]["mean_exposure"] < 2.5


@pytest.mark.parametrize("value", [8.0, 1.0])
def test_with_noise_the_same_training_reveals_no_user(place: Path, value: float) -> None:
    found = audited(place, f"epsilon = {value:g}", epsilon(value))
    for attack in ("expert loss", "expert loss against the backbone's", "canaries expert"):
        assert abs(found[attack]["auc"] - 0.5) < 3 * found[attack]["auc_error"]
    assert found["canaries expert"]["mean_exposure"] < 2.5
