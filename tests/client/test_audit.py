"""Audited runs with differential privacy, in this process, and `fedmerge privacy audit` of them."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, RecordDict
from in_process import small_experiment

from fedmerge.cli import main
from fedmerge.client.audit.attacks import Audited, audit_domain
from fedmerge.client.audit.users import CANARY_LENGTH, canaries, left_out_users, prepare_for_audit
from fedmerge.client.local_domain import open_domain
from fedmerge.client.training.settings import training_settings
from fedmerge.config import ExperimentConfig, Simulation, to_flat
from fedmerge.encoder.backbone import Backbone
from fedmerge.encoder.lora import fresh_adapter
from fedmerge.encoder.peft.folder import read_adapter
from fedmerge.report.audit_text import audit_text
from sim.app.client.app import app as client_app
from sim.app.messages import records
from sim.local.in_process import run_in_process

Capsys = pytest.CaptureFixture[str]
SETTINGS: dict[str, Any] = {
    "domains.train": "beauty,books",
    "domains.unseen": "",
    "merge.methods": "average",
    "train.negatives": "catalog",
    "train.max_steps": 2,
    "dp.mode": "user",
    "dp.noise_multiplier": 2.0,
    "dp.delta": 1e-3,
    "dp.accountant": "rdp",
    "dp.randomness": "seeded",
    "simulation.held_out_users": 0.5,
    "simulation.canaries": 3,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("place")
    small_experiment(place)
    return place


@pytest.fixture(scope="module")
def run(place: Path) -> ExperimentConfig:
    config = small_experiment(place, run_id="private", **SETTINGS)
    run_in_process(config)
    return config


def folder_of(config: ExperimentConfig) -> Path:
    return Path(config.output_dir) / str(config.run_id)


# A run


def test_a_run_reports_its_privacy_loss(run: ExperimentConfig) -> None:
    statement = json.loads((folder_of(run) / "privacy.json").read_text())
    assert set(statement["domains"]) == {"beauty", "books"}
    for found in statement["domains"].values():
        assert found["releases"][0]["steps"] == 2
        assert 0 < found["epsilon"] < found["epsilon_replaced"]
    report = (folder_of(run) / "report.txt").read_text()
    assert "differential privacy (user), covers the adapters" in report
    assert "THIS GUARANTEES NOTHING: noise and sampling came from the experiment's seed" in report
    assert "metric sums on validation and test" in report


def test_with_differential_privacy_neither_loss_nor_validations_leave_the_client(run: ExperimentConfig) -> None:
    for domain in ("beauty", "books"):
        told = json.loads((folder_of(run) / "adapters" / domain / "training.json").read_text())
        assert told["validations"] == []
        assert told["validation_users"] == 0
        assert told["privacy"]["noise_multiplier"] == 2.0


@pytest.mark.long
def test_releases_of_rounds_add_up_and_domains_can_hide_their_update(place: Path) -> None:
    without = {"simulation.held_out_users": 0.0, "simulation.canaries": 0}
    rounds = small_experiment(
        place, run_id="rounds", **{**SETTINGS, **without, "rounds.rule": "ffa-lora", "rounds.number": 2}
    )
    local = {"dp.mode": "domain-local", "train.negatives": "in-batch", "dp.clip": 0.5}
    hidden = small_experiment(place, run_id="hidden", **{**SETTINGS, **without, **local})
    for config in (rounds, hidden):
        run_in_process(config)
    found = json.loads((folder_of(rounds) / "privacy.json").read_text())["domains"]["books"]
    assert [release["steps"] for release in found["releases"]] == [1, 1]
    found = json.loads((folder_of(hidden) / "privacy.json").read_text())["domains"]["books"]
    assert found["releases"][0]["unit"] == "domain"
    told = json.loads((folder_of(hidden) / "adapters" / "books" / "training.json").read_text())
    assert (told["steps"], told["best_step"], told["validations"]) == (0, 0, [])
    modules = read_adapter(folder_of(hidden) / "adapters" / "books").modules.values()
    noise = torch.cat([module.lora_B.flatten() for module in modules])  # a B that starts at 0 and is clipped to 0.5
    assert float(noise.std()) == pytest.approx(2.0 * 2 * 0.5, rel=0.2)


def test_canaries_and_left_out_users_are_for_simulations(run: ExperimentConfig) -> None:
    path = str(Path(run.domains.root) / "books")
    context = Context(1, 1, {"domain-path": path}, RecordDict(), dict(to_flat(run)))
    message = Message(RecordDict(), dst_node_id=1, message_type=records.DESCRIBE)
    assert "domain books: [simulation]" in str(records.read_error(client_app(message, context).content))


# Users


def test_users_are_left_out_and_canaries_planted(backbone: Backbone, run: ExperimentConfig) -> None:
    domain = open_domain(Path(run.domains.root) / "books", backbone, run.text)
    trained = prepare_for_audit(domain, Simulation(held_out_users=0.5, canaries=3), 0)
    users = domain.interactions.num_users
    out = left_out_users("books", users, 0.5, 0)
    assert out.sum() == round(users / 2)
    assert np.array_equal(out, left_out_users("books", users, 0.5, 0))
    assert not np.array_equal(out, left_out_users("books", users, 0.5, 1))
    kept = len(domain.training_sequences) - int(out.sum())  # all have a history here
    assert len(trained.training_sequences) == kept + 3
    drawn = canaries(domain, 3, 0)
    assert [len(sequence) for sequence in [*drawn.planted, *drawn.compared]] == [CANARY_LENGTH] * 6
    assert len(prepare_for_audit(domain, Simulation(), 0).training_sequences) == len(domain.training_sequences)


# fedmerge privacy audit


def test_an_audit_of_a_run(run: ExperimentConfig, capsys: Capsys) -> None:
    assert main(["privacy", "audit", str(folder_of(run)), "--domain", "books", "--shadows", "2", "--json"]) == 0
    audit = json.loads(capsys.readouterr().out)
    assert audit == json.loads((folder_of(run) / "privacy-audit.json").read_text())
    found = audit["domains"]["books"]
    assert found["members"] == found["non_members"] == 15
    rows = {(row["model"], row["attack"]): row for row in found["membership"]}
    assert set(rows) == {
        ("backbone", "loss"),
        *product(("expert", "merged"), ("loss", "loss against the backbone's", "LiRA")),
    }
    assert all(0 <= row["auc"] <= 1 and 0 < row["auc_error"] < 0.2 for row in rows.values())
    assert {row["tpr_at_fpr_0.01"] for row in rows.values()} == {None}  # 15 non-members
    recovery = {row["from"]: row["precision_at"] for row in found["recovery"]["rows"]}
    assert recovery["similarity sharing (item factors)"]["50"] > 1.5 * recovery["backbone"]["50"]
    assert [row["model"] for row in found["canaries"]] == ["backbone", "expert", "merged"]
    text = (folder_of(run) / "privacy-audit.txt").read_text()
    for part in (
        "LiRA",
        "membership inference",
        "bought one after the other",
        "canaries (3 planted",
        "15 were left out",
    ):
        assert part in text


def test_no_shadow_is_trained_without_an_expert_and_a_plain_sum(backbone: Backbone, run: ExperimentConfig) -> None:
    domain = open_domain(Path(run.domains.root) / "books", backbone, run.text)
    merged = fresh_adapter(backbone, run.lora.of("books"), seed=0)
    lines: list[str] = []
    found = audit_domain(Audited(domain, training_settings(run), None, merged, {}, None), 8, lines.append)
    assert found["shadows"] == 0
    assert not any("shadow 1 of" in line for line in lines)
    assert {row["model"] for row in found["membership"]} == {"backbone", "merged"}
    text = audit_text({"run": "rounds", "dp": {}, "domains": {"books": found}})
    assert "0 shadow trainings (without an expert" in text


def test_an_audit_of_a_zero_adapter_says_that_nothing_was_learned(backbone: Backbone, run: ExperimentConfig) -> None:
    domain = open_domain(Path(run.domains.root) / "books", backbone, run.text)
    zero = fresh_adapter(backbone, run.lora.of("books"), seed=0)  # the best step was 0
    trained = read_adapter(folder_of(run) / "adapters" / "books")
    for expert, merged, expected in ((zero, zero, ["expert", "merged"]), (trained, zero, ["merged"])):
        lines: list[str] = []
        found = audit_domain(Audited(domain, training_settings(run), expert, merged, {}, None), 0, lines.append)
        assert found["nothing_learned"] == expected
        assert sum("nothing was learned" in line for line in lines) == len(expected)
        text = audit_text({"run": "void", "dp": {}, "domains": {"books": found}})
        assert [f"NOTHING WAS LEARNED: {model} is zero" in text for model in ("expert", "merged")] == [
            model in expected for model in ("expert", "merged")
        ]
    auc = {row["model"]: row["auc"] for row in found["membership"] if row["attack"] == "loss"}
    assert auc["merged"] == auc["backbone"]  # which is why it must be said


def test_an_audit_needs_users_who_were_left_out(place: Path, run: ExperimentConfig, capsys: Capsys) -> None:
    arguments = ["privacy", "audit", str(folder_of(run)), "--shadows", "0", "--set", "simulation.held_out_users=0"]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert "trained on 30 users and left out 0" in error
    assert "simulation.held_out_users = 0.5" in error


def test_an_audit_refuses_unknown_domains_and_negative_counts(run: ExperimentConfig, capsys: Capsys) -> None:
    assert main(["privacy", "audit", str(folder_of(run)), "--domain", "toys"]) == 1
    assert "--domain toys: not a training domain of the run; expected one of beauty, books." in capsys.readouterr().err
    assert main(["privacy", "audit", str(folder_of(run)), "--shadows", "-1"]) == 1
    assert "--shadows -1: expected 0 or more" in capsys.readouterr().err
