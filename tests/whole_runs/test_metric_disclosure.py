"""Whole runs in which clients round, withhold or noise their metric sums."""

import json
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow.parquet as pq
import pytest
from flwr.app import Context, Message
from in_process import small_experiment

from fedmerge.client.disclosed.account import read_account
from fedmerge.config import ExperimentConfig
from fedmerge.config.privacy import Disclosure, Policy
from fedmerge.domain.catalog import load_catalog
from fedmerge.domain.folder import write_domain
from fedmerge.domain.interactions import load_interactions, make_interactions
from fedmerge.errors import ClientError, PolicyError
from fedmerge.privacy.dp.accountant import spent_epsilon
from fedmerge.privacy.dp.releases import Release
from fedmerge.runs.metric_sums import read_metric_sums
from sim.app.messages import records
from sim.local.in_process import answer_honestly, run_in_process

pytestmark = pytest.mark.federation

CHANGES = {"merge.methods": "average,task-arithmetic", "domains.unseen": "", "privacy.min_users": 5}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Domains, a backbone and the clients' disk: every client trains once for all tests here."""
    return tmp_path_factory.mktemp("place")


def test_a_model_that_fails_tells_no_number(place: Path, tmp_path: Path) -> None:
    """An adapter that overflows for some histories only would count their users in the text of an error."""
    found: dict[str, str] = {}

    def answer(message: Message, context: Context) -> Message | None:
        if message.metadata.message_type != records.EVALUATE:
            return answer_honestly(message, context)
        _, models = records.read_evaluation_request(message.content)
        for of_model in models.values():
            for module in of_model.modules.values():
                module.lora_B.fill_(3e38)
        request = records.evaluation_request_record(
            records.EvaluationRequest("valid", False, "", False), records.model_records(models)
        )
        wanted = Message(request, dst_node_id=1, message_type=records.EVALUATE)
        reply = answer_honestly(wanted, context)
        assert reply is not None
        kind = str(context.run_config["privacy.metrics"])
        found.setdefault(kind, records.read_error(reply.content) or "sums")
        return answer_honestly(message, context)

    for disclosure in get_args(Disclosure):
        changes = {"privacy.metrics": disclosure, "run_id": f"failing-{disclosure}", "output_dir": str(tmp_path)}
        config = small_experiment(place, **CHANGES | {"merge.methods": "average"} | changes)
        with suppress(ClientError) if disclosure == "noised" else nullcontext():  # its answers were spent on the model
            run_in_process(config, answer)
    assert any(character.isdigit() for character in found["exact"])
    assert not any(character.isdigit() for character in found["suppressed"])
    assert found["noised"] == "sums"


def test_suppressed_sums_travel_rounded_and_without_products(place: Path, tmp_path: Path) -> None:
    config = small_experiment(place, **CHANGES, output_dir=str(tmp_path), **{"privacy.metrics": "suppressed"})
    run_in_process(config)
    run = tmp_path / "run"
    exact = small_experiment(place, **CHANGES, output_dir=str(tmp_path / "exact"))
    run_in_process(exact)
    for domain, sums in read_metric_sums(run, "test", "unmasked").items():
        whole = read_metric_sums(tmp_path / "exact" / "run", "test", "unmasked")[domain]
        stated = ~np.isnan(sums.sums)
        assert stated.any()
        assert not stated.all()
        assert np.array_equal(sums.sums[stated], np.round(whole.sums[stated]))
    record = json.loads((run / "test" / "books.json").read_text())
    assert record["unmasked"]["products"] is None
    assert "recall@10" in (run / "report.txt").read_text()
    training = json.loads((run / "adapters" / "books" / "training.json").read_text())
    assert training["validations"] == []  # exact means over users
    assert "best_step" not in training
    choice = json.loads((run / "choice.json").read_text())
    assert set(choice["per_domain"]) == {"beauty", "books", "coffee"}


def test_noised_sums_are_counted_here_and_at_the_client(place: Path, tmp_path: Path) -> None:
    changes = {"privacy.metrics": "noised", "privacy.metrics_noise": 3.0, "dp.randomness": "seeded"}
    config = small_experiment(place, **CHANGES, output_dir=str(tmp_path), cache_dir=str(tmp_path / "cache"), **changes)
    run_in_process(config)
    run = tmp_path / "run"
    statement = json.loads((run / "privacy.json").read_text())
    assert statement["mode"] == "none"
    assert not statement["guarantee_of_run"]
    epsilon = spent_epsilon([Release(3.0, 1.0, 2)], statement["delta"], "prv")
    for domain in ("beauty", "books", "coffee"):
        assert statement["domains"][domain]["epsilon"] == pytest.approx(epsilon)
        account = read_account(tmp_path / "cache" / "disclosed" / domain)
        assert [(entry.unit, entry.release) for entry in account] == [("user", Release(3.0, 1.0, 1, replaced=1.0))] * 2
    rows = pq.read_table(run / "metrics.parquet").to_pylist()
    assert {row["metric"] for row in rows if not np.isnan(row["sum"])} == {"recall@10", "ndcg@10"}
    assert all(row["noise"] > 0 for row in rows)
    # The same run again, as after a kill that lost the server's folder: the very same noise, and nothing more charged.
    first = (run / "metrics.parquet").read_bytes()
    run_in_process(replace_output(config, tmp_path / "again"))
    assert (tmp_path / "again" / "run" / "metrics.parquet").read_bytes() == first
    assert len(read_account(tmp_path / "cache" / "disclosed" / "books")) == 2


def replace_output(config: ExperimentConfig, output: Path) -> ExperimentConfig:
    return config.model_copy(update={"output_dir": str(output)})


def test_a_run_that_ends_after_training_evaluates_nothing(place: Path, tmp_path: Path) -> None:
    config = small_experiment(place, **CHANGES, output_dir=str(tmp_path), until="train")
    asked = []

    def answer(message: Message, context: Context) -> Message | None:
        if message.metadata.message_type == records.TRAIN:
            request = records.evaluation_request_record(
                records.EvaluationRequest("test", True, "", False), records.model_records({})
            )
            wanted = Message(request, dst_node_id=1, message_type=records.EVALUATE)
            reply = answer_honestly(wanted, context)
            assert reply is not None
            asked.append(records.read_error(reply.content))
        return answer_honestly(message, context)

    run_in_process(config, answer)
    assert len(asked) == 3
    assert all(error and PolicyError.__name__ in error and "until = 'train'" in error for error in asked)


@pytest.mark.parametrize("policy", get_args(Policy))
@pytest.mark.parametrize("disclosure", ["exact", "suppressed", "noised"])
def test_a_run_over_one_user_fewer_tells_nothing_exact_of_that_user(
    tmp_path: Path, policy: str, disclosure: str
) -> None:
    """The auditor's differencing: U users in one run, U - 1 in the next, everything else the same."""
    small_experiment(tmp_path)  # writes the domains
    changes = {"merge.methods": "average", "privacy.policy": policy, "privacy.metrics": disclosure}
    runs = [tmp_path / "runs" / name for name in ("everyone", "one-fewer")]
    for run in runs:
        if run.name == "one-fewer":
            remove_one_user(tmp_path / "domains" / "books")
        run_in_process(small_experiment(tmp_path, **CHANGES | changes | {"run_id": run.name}))
    before, after = (read_metric_sums(run, "test", "unmasked") for run in runs)
    assert before["books"].num_users == 30
    if disclosure == "exact":  # the run says so: the difference is the user's outcome
        assert after["books"].num_users == 29
        return
    if disclosure == "noised":  # the difference has the noise of both
        assert after["books"].noise > 1
        return
    assert "books" not in after
    reason = json.loads((runs[1] / "clients.json").read_text())["excluded"]["books"]
    assert "PolicyError" in reason
    assert "min_users = 5" in reason


def remove_one_user(folder: Path) -> None:
    catalog, interactions = load_catalog(folder), load_interactions(folder)
    rest = range(1, interactions.num_users)
    kept = make_interactions(
        [interactions.user_ids[user] for user in rest], [interactions.sequence(user) for user in rest]
    )
    write_domain(folder, catalog, kept, public_catalog=True, synthetic=True, source="a test", overwrite=True)
