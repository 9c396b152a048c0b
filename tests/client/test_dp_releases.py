"""Releases with noise are made once per run, whatever the server asks: experts, rounds, answers on coefficients."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import layout_of, random_adapters
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from in_process import cached_expert_of, small_experiment

from fedmerge.adapter import adapter_sha256
from fedmerge.client.cache import dp_releases as released
from fedmerge.client.cache import experts
from fedmerge.client.cache.folders import inputs_key
from fedmerge.client.coefficients.own_users import ClientMergeSettings, clipped_gradient_sum
from fedmerge.client.local_domain import open_domain
from fedmerge.client.training.dp_sgd import poisson_records
from fedmerge.config import ExperimentConfig, from_flat, to_flat
from fedmerge.device import resolve_compute
from fedmerge.encoder.backbone import load_backbone
from fedmerge.errors import ConfigError
from fedmerge.mergerec.cohort import cohort_sha256
from fedmerge.mergerec.vectors import initial_vectors
from fedmerge.merging.stack import stack_adapters
from fedmerge.privacy.dp.domain_noise import add_noise_to_answer
from fedmerge.seeding import generator
from sim.app.client.app import app as client_app
from sim.app.client.node import cached_domain
from sim.app.messages import records

FIRST = records.RoundRequest(1, 2, "A and B", 7)


@pytest.fixture(scope="module", autouse=True)
def _in_a_task() -> None:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ExperimentConfig:
    private = {"dp.mode": "user", "dp.noise_multiplier": 2.0, "dp.delta": 1e-3, "train.negatives": "catalog"}
    rounds = {"rounds.rule": "fedit", "rounds.number": 2, "train.max_steps": 2, "run_id": "run"}
    return small_experiment(tmp_path_factory.mktemp("released"), **private, **rounds)


def ask(config: ExperimentConfig, request: records.RoundRequest) -> RecordDict:
    context = Context(1, 1, {"partition-id": 0, "num-partitions": 4}, RecordDict(), dict(to_flat(config)))
    question = Message(records.round_request_record(request, None, None), dst_node_id=1, message_type=records.TRAIN)
    return client_app(question, context).content


def refusal(config: ExperimentConfig, request: records.RoundRequest) -> str:
    return str(records.read_error(ask(config, request)))


def test_a_round_is_released_once(config: ExperimentConfig) -> None:
    (adapter, told), (again, told_again) = (records.read_expert(ask(config, FIRST)) for _ in range(2))
    assert adapter_sha256(again) == adapter_sha256(adapter)  # a second training would draw other system noise
    assert told_again == told
    assert told["privacy"]["steps"] == 1

    second, told = records.read_expert(ask(config, replace(FIRST, number=2)))
    assert told["privacy"]["steps"] == 1
    assert adapter_sha256(second) != adapter_sha256(adapter)

    other, _ = records.read_expert(ask(config.model_copy(update={"run_id": "other"}), FIRST))
    assert adapter_sha256(other) != adapter_sha256(adapter)  # a second run is counted separately


def test_another_request_for_a_round_that_was_released_is_refused(config: ExperimentConfig) -> None:
    ask(config, FIRST)
    for refused in (
        refusal(config, replace(FIRST, fresh_seed=8)),
        refusal(config.model_copy(update={"seed": config.seed + 1}), FIRST),
    ):
        assert refused.startswith("PolicyError: domain beauty: round 1 of this run was released before")
    spoiled = sorted(Path(config.cache_dir).glob("released/beauty-*/1/training.json"))
    whole = [path.read_text() for path in spoiled]
    for path in spoiled:
        path.write_text("{")
    refused = refusal(config, FIRST)
    assert refused.startswith("PolicyError: domain beauty: round 1 of this run was released before")
    assert "…/1 is damaged" in refused
    for path, text in zip(spoiled, whole, strict=True):
        path.write_text(text)


@pytest.mark.parametrize(("number", "num_rounds"), [(1, 1), (3, 2), (0, 2), (3, 3)])
def test_a_round_without_calibrated_noise_is_refused(config: ExperimentConfig, number: int, num_rounds: int) -> None:
    asked = replace(FIRST, number=number, num_rounds=num_rounds)
    refused = refusal(config, asked)
    assert f"round {number} of {num_rounds}" in refused
    assert "2 rounds (rounds.number)" in refused


def test_a_run_without_a_name_cannot_count_its_releases(config: ExperimentConfig) -> None:
    assert "run_id is 'none'" in refusal(config.model_copy(update={"run_id": None}), FIRST)


def test_more_rounds_than_steps_are_refused(config: ExperimentConfig) -> None:
    with pytest.raises(ConfigError, match=r"rounds\.number = 3.*train\.max_steps = 2"):
        from_flat({**to_flat(config), "rounds.number": 3})
    assert from_flat({**to_flat(config), "rounds.number": 3, "train.max_steps": 3}).rounds.number == 3


def test_a_run_releases_one_expert_on_whichever_machine_it_is_trained(
    config: ExperimentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = from_flat({**to_flat(config), "rounds.rule": "none", "run_id": "experts"})
    content = send(run, records.TRAIN, RecordDict())
    adapter, told = records.read_expert(content)
    assert not told["cached"]
    more_threads = from_flat({**to_flat(run), "runtime.threads_per_client": run.runtime.threads_per_client + 1})
    monkeypatch.setattr(experts, "__version__", "of tomorrow")
    again, told_again = records.read_expert(send(more_threads, records.TRAIN, RecordDict()))
    assert adapter_sha256(again) == adapter_sha256(adapter)  # a second training would draw other system noise
    assert told_again == {**told, "cached": True}
    assert records.arrays_sha256(send(run, records.TRAIN, RecordDict())) == records.arrays_sha256(content)

    backbone = load_backbone(run.backbone.source, run.backbone.pooling, resolve_compute("cpu", "float32"))
    beauty = open_domain(Path(run.domains.root) / "beauty", backbone, run.text)
    assert adapter_sha256(cached_expert_of(beauty, more_threads, told["sha256"])) == told["sha256"]
    assert adapter_sha256(cached_expert_of(beauty, more_threads, None)) == told["sha256"]

    other, _ = records.read_expert(
        send(more_threads.model_copy(update={"run_id": "more"}), records.TRAIN, RecordDict())
    )
    assert adapter_sha256(other) != adapter_sha256(adapter)  # a second run is counted separately
    asked = send(run.model_copy(update={"seed": run.seed + 1}), records.TRAIN, RecordDict())
    assert "the expert of this run was released before" in str(records.read_error(asked))
    (spoiled,) = Path(run.cache_dir).glob(f"released/beauty-{inputs_key({'run': 'experts'})}/expert/training.json")
    spoiled.write_text("{")
    refused = str(records.read_error(send(run, records.TRAIN, RecordDict())))
    assert "the expert of this run was released before" in refused
    assert "…/expert is damaged" in refused


@pytest.fixture(scope="module")
def learning(tmp_path_factory: pytest.TempPathFactory) -> tuple[ExperimentConfig, records.GradientRequest]:
    """Coefficients learned on own users, with noise by domain; the client has cached the cohort."""
    private = {"dp.mode": "domain-local", "dp.noise_multiplier": 2.0, "dp.delta": 1e-3, "privacy.min_users": 2}
    through = {"privacy.policy": "catalog-private", "through_clients.users": "own-users", "merge.methods": "mergerec"}
    config = small_experiment(tmp_path_factory.mktemp("answers"), **private, **through, run_id="run")
    backbone = load_backbone(config.backbone.source, config.backbone.pooling, resolve_compute("cpu", "float32"))
    made = random_adapters(layout_of(backbone, ("query", "value")))
    cohort = {"beauty": made["toys"], "books": made["books"]}
    assert records.read_pseudo_users(send(config, records.COHORT, records.cohort_record(cohort))) == 0
    return config, records.GradientRequest("mergerec domain-wise own-users", cohort_sha256(cohort), 0, 0)


def send(config: ExperimentConfig, message_type: str, content: RecordDict) -> RecordDict:
    context = Context(1, 1, {"partition-id": 0, "num-partitions": 4}, RecordDict(), dict(to_flat(config)))
    return client_app(Message(content, dst_node_id=1, message_type=message_type), context).content


def answer(config: ExperimentConfig, request: records.GradientRequest, at: float = 0.5) -> RecordDict:
    coefficients = torch.full((2,), at)
    return send(
        config, records.GRADIENT, records.gradient_request_record(request, coefficients, torch.full((2,), 0.5), [])
    )


def test_an_answer_about_coefficients_is_released_once(
    learning: tuple[ExperimentConfig, records.GradientRequest],
) -> None:
    config, first = learning
    given, again = (records.read_gradient(answer(config, first)) for _ in range(2))
    assert torch.equal(given, again)  # a second answer would draw other system noise
    assert not torch.equal(records.read_gradient(answer(config, replace(first, step=1))), given)
    other = config.model_copy(update={"run_id": "other"})  # a second run is counted separately
    assert not torch.equal(records.read_gradient(answer(other, first)), given)
    refused = str(records.read_error(answer(config, first, at=0.6)))
    assert "step 0, was released before" in refused
    (spoiled,) = Path(config.cache_dir).glob("released/beauty-*/*-1/training.json")
    whole = json.loads(spoiled.read_text())
    for text in ("{", json.dumps({**whole, "answer": [2 * value for value in whole["answer"]]})):
        spoiled.write_text(text)
        refused = str(records.read_error(answer(config, replace(first, step=1))))
        assert "step 1, was released before, but …" in refused
        assert "is damaged (RunDirError)" in refused
    nameless = config.model_copy(update={"run_id": None})
    assert "run_id is 'none'" in str(records.read_error(answer(nameless, first)))


@pytest.mark.parametrize(
    "changes",
    [{"step": 2}, {"step": -1}, {"num_steps": 1}, {"label": "adamerging domain-wise own-users"}, {}],
    ids=["beyond the last", "before the first", "several", "another method", "until train"],
)
def test_an_answer_without_calibrated_noise_is_refused(
    learning: tuple[ExperimentConfig, records.GradientRequest], changes: dict[str, Any]
) -> None:
    config, first = learning
    if not changes:  # until = "train": the noise is calibrated for the adapter alone
        config = config.model_copy(update={"until": "train", "run_id": "until-train"})
    refused = str(records.read_error(answer(config, replace(first, **changes))))
    assert f"{4 if changes else 0} messages: mergerec, " in refused
    assert "1 a message" in refused


@pytest.mark.parametrize("num_steps", [0, 2], ids=["a gradient that is not finite", "local steps that raise"])
def test_an_answer_that_cannot_be_computed_is_noise_alone(
    learning: tuple[ExperimentConfig, records.GradientRequest], num_steps: int
) -> None:
    config, first = learning
    through = config.through_clients.model_copy(update={"mode": "local-steps" if num_steps else "exact"})
    for number, at in enumerate((torch.nan, 1e38)):
        run = config.model_copy(update={"run_id": f"broken-{num_steps}-{number}", "through_clients": through})
        found = [records.read_gradient(answer(run, replace(first, num_steps=num_steps), at)) for _ in range(2)]
        assert torch.isfinite(found[0]).all()
        assert found[0].abs().max() > 0
        assert torch.equal(*found)


@pytest.mark.long
def test_by_user_an_answer_is_a_noisy_sum_over_the_sampled_users(tmp_path: Path) -> None:
    private = {"dp.mode": "user", "dp.delta": 1e-3, "train.negatives": "catalog", "privacy.min_users": 2}
    through = {"privacy.policy": "catalog-private", "through_clients.users": "own-users", "merge.methods": "mergerec"}
    everybody = {"through_clients.batch_size": 10_000, "dp.coefficient_clip": 0.25, "dp.randomness": "seeded"}
    given = {**private, **through, **everybody}
    config = small_experiment(tmp_path, **given, **{"dp.noise_multiplier": 0.0}, run_id="exact")
    backbone = load_backbone(config.backbone.source, config.backbone.pooling, resolve_compute("cpu", "float32"))
    made = random_adapters(layout_of(backbone, ("query", "value")))
    cohort = {"beauty": made["toys"], "books": made["books"]}
    assert records.read_pseudo_users(send(config, records.COHORT, records.cohort_record(cohort))) == 0
    request = records.GradientRequest("mergerec domain-wise own-users", cohort_sha256(cohort), 0, 0)
    exact = records.read_gradient(answer(config, request)).flatten()

    domain = open_domain(tmp_path / "domains" / "beauty", backbone, config.text)
    vectors = initial_vectors(stack_adapters(cohort), "task-vectors")
    drawn = generator(config.seed, "client", "beauty", "own-users", request.label, 0)
    taking_part = poisson_records(domain.training_sequences, "random-prefix", 1.0, drawn)
    assert len(taking_part.targets) == len(domain.training_sequences)  # q is 1
    own = ClientMergeSettings(negatives=64, seed=config.seed)
    total = clipped_gradient_sum(domain, vectors, torch.full((2,), 0.5), taking_part, 0, own, 0.25)
    torch.testing.assert_close(exact, total / len(taking_part.targets), rtol=1e-4, atol=1e-6)

    noisy = from_flat({**to_flat(config), "dp.noise_multiplier": 4.0, "run_id": "noisy"})
    found = records.read_gradient(answer(noisy, request)).flatten()
    drawn = generator(config.seed, "client", "beauty", "coefficients-dp", request.label, 0)
    noise = 4.0 * 0.25 * torch.from_numpy(drawn.standard_normal(2)).float()
    torch.testing.assert_close(found, (total + noise) / len(taking_part.targets), rtol=1e-4, atol=1e-6)
    unseeded = [from_flat({**to_flat(noisy), "dp.randomness": "system", "run_id": f"system-{n}"}) for n in range(2)]
    first, second = (records.read_gradient(answer(run, request)).flatten() for run in unseeded)
    assert not torch.equal(first, second)
    for delta, expected in ((0.05, "dp.delta = 0.05"), (1e-3, "public_catalog = false")):
        if delta < 0.05:  # the domain was imported again, while its expert is still in the cache
            manifest = tmp_path / "domains" / "beauty" / "manifest.json"
            manifest.write_text(manifest.read_text().replace('"public_catalog": true', '"public_catalog": false'))
            cached_domain.cache_clear()
        other = from_flat({**to_flat(config), "dp.delta": delta, "run_id": f"refused-{delta}"})
        assert expected in str(records.read_error(answer(other, request)))


def test_the_answer_of_the_first_of_several_processes_stays(
    learning: tuple[ExperimentConfig, records.GradientRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, first = learning
    config = config.model_copy(update={"run_id": "at-once"})
    others: list[torch.Tensor] = []

    def slowly(*arguments: Any) -> torch.Tensor:
        if not others:  # meanwhile another process answers the same message
            others.append(torch.zeros(1))
            others.append(records.read_gradient(answer(config, first)))
        return add_noise_to_answer(*arguments)

    monkeypatch.setattr(released, "add_noise_to_answer", slowly)
    assert torch.equal(records.read_gradient(answer(config, first)), others[1])
