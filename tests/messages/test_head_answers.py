"""The client app trains and evaluates heads of its own, and nothing of a head or of an item id is in an answer."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from adapters import layout_of, random_adapter
from flwr.app import Context, Message, RecordDict
from in_process import small_experiment

from fedmerge.adapter import Adapter, LoraModule, adapter_sha256
from fedmerge.config import ExperimentConfig, to_flat
from fedmerge.domain.catalog import load_catalog
from fedmerge.domain.folder import write_domain
from fedmerge.domain.interactions import load_interactions, make_interactions
from fedmerge.encoder.backbone import Backbone
from fedmerge.errors import ClientError
from fedmerge.evaluation.sums import EXPERT, FEDERATED_HEAD, VARIANTS
from fedmerge.federated.head import fresh_head
from fedmerge.files import read_sealed
from sim.app.client import coefficients, heads
from sim.app.client.app import app as client_app
from sim.app.client.replies import log_to_stderr
from sim.app.messages import records
from sim.flower_internals import TaskIdentity

ROWS = ("head on the merge", "head on the merge, fused")


@pytest.fixture(autouse=True)
def client_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Set what Flower sets before it calls a client."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    yield
    log_to_stderr.cache_clear()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("place")


@pytest.fixture(scope="module")
def merge(backbone: Backbone) -> Adapter:
    return random_adapter(layout_of(backbone, ("query",)), 2, 1.0, 0)


def experiment(place: Path, **changes: Any) -> ExperimentConfig:
    heads = {"head.kind": "local", "head.hidden_size": 8, "head.max_epochs": 2, "privacy.min_users": 5}
    return small_experiment(place, **heads | {"merge.methods": "average"} | changes)


def answer(
    config: ExperimentConfig, content: RecordDict, kind: str, own: Mapping[str, str] | None = None
) -> RecordDict:
    node: dict[str, Any] = {"partition-id": 1, "num-partitions": 4, **(own or {})}  # books
    message = Message(content, dst_node_id=1, message_type=kind)
    return client_app(message, Context(1, 1, node, RecordDict(), dict(to_flat(config)))).content


def ask_heads(
    config: ExperimentConfig, models: Mapping[str, Adapter], vectors: str = "merge", expert: str = "", **own: str
) -> RecordDict:
    request = records.HeadRequest("average", vectors, expert)
    return answer(config, records.head_request_record(request, records.model_records(models)), records.TRAIN_HEAD, own)


def evaluate(
    config: ExperimentConfig, models: Mapping[str, Adapter], heads: str, expert: str = "", **own: str
) -> RecordDict:
    request = records.EvaluationRequest("valid", False, expert, False, heads, "average" if heads else "")
    content = records.evaluation_request_record(request, records.model_records(models))
    return answer(config, content, records.EVALUATE, own)


def test_a_client_trains_its_heads_and_evaluates_them(place: Path, merge: Adapter) -> None:
    config = experiment(place, **{"head.vectors": "merge,expert,backbone"})
    adapter, _ = records.read_expert(answer(config, RecordDict(), records.TRAIN))
    sha256 = adapter_sha256(adapter)
    content = ask_heads(config, {"average": merge}, "merge,expert,backbone", sha256)
    reports = records.read_head_reports(content)
    assert list(reports) == ["merge", "expert", "backbone"]
    assert all(report["trained"] and not report["cached"] for report in reports.values())
    again = records.read_head_reports(ask_heads(config, {"average": merge}, "merge", sha256))
    assert again == {"merge": {**reports["merge"], "cached": True}}
    content = evaluate(config, {"average": merge}, "merge,expert,backbone", sha256)
    sums = records.read_metric_sums(content)
    expected = [f"head on the {vectors}{fused}" for vectors in reports for fused in ("", ", fused")]
    assert [*sums["masked"].methods] == [EXPERT, "average", *expected]
    plain = records.read_metric_sums(evaluate(config, {"average": merge}, "", sha256))
    for variant in VARIANTS:  # the other rows are those of before
        for row, label in enumerate(plain[variant].methods):
            assert np.array_equal(sums[variant].sums[sums[variant].methods.index(label)], plain[variant].sums[row])


def test_nothing_of_a_head_or_of_an_item_is_in_an_answer(place: Path, merge: Adapter, tmp_path: Path) -> None:
    config = experiment(place, cache_dir=str(tmp_path))
    trained, evaluated = ask_heads(config, {"average": merge}), evaluate(config, {"average": merge}, "merge")
    assert [(row["name"], row["shape"]) for row in records.contents(trained)] == [("facts.heads", "")]
    rows = {(row["name"], row["shape"]) for row in records.contents(evaluated)}
    assert rows == {("facts.masked", ""), ("facts.unmasked", "")}
    texts = [str(value) for content in (trained, evaluated) for value in content.config_records["facts"].values()]
    ids = load_catalog(place / "domains" / "books").item_ids
    users = load_interactions(place / "domains" / "books").user_ids
    assert not [name for name in (*ids, *users) if any(f'"{name}"' in text for text in texts)]
    report = json.loads(texts[0])["merge"]
    assert report.keys() == records.HEAD_REPORT_FIELDS.keys()
    numbers = [value for key, value in report.items() if key != "weights" and type(value) in (int, float)]
    weights = [value for of_variant in report["weights"].values() for value in of_variant.values()]
    assert (len(numbers), len(weights)) == (3, 6)
    (folder,) = (tmp_path / "heads").iterdir()
    kept = read_sealed(folder / "head.json")
    assert kept is not None
    assert {"losses", "validation_ndcgs"} <= kept.keys() - report.keys()  # means over users


def test_without_exact_metrics_nothing_that_depends_on_validation_users_leaves(place: Path, merge: Adapter) -> None:
    suppressed = experiment(place, **{"privacy.metrics": "suppressed"})
    report = records.read_head_reports(ask_heads(suppressed, {"average": merge}))["merge"]
    assert report.keys() == {"trained", "reason", "cached", "seconds"}
    sums = records.read_metric_sums(evaluate(suppressed, {"average": merge}, "merge"))
    assert sums["masked"].methods == ("average", *ROWS)
    assert sums["masked"].noise > 0
    few = experiment(place, **{"evaluation.validation_users": 4})
    report = records.read_head_reports(ask_heads(few, {"average": merge}))["merge"]
    assert "weights" not in report


def test_a_domain_with_too_few_users_says_so_and_has_no_rows(place: Path, merge: Adapter, tmp_path: Path) -> None:
    """Only one user has two items outside validation and test."""
    catalog = load_catalog(place / "domains" / "books")
    names, sequences = [f"u{number}" for number in range(9)], [[number, number + 1, 3] for number in range(8)]
    interactions = make_interactions(names, [*sequences, [0, 1, 2, 3]])
    write_domain(tmp_path / "books", catalog, interactions, public_catalog=True, synthetic=True, source="test")
    own = {"domain-path": str(tmp_path / "books")}
    config = experiment(place)
    report = records.read_head_reports(ask_heads(config, {"average": merge}, **own))["merge"]
    assert report == {"trained": False, "reason": "fewer than two users have two items outside validation and test"}
    sums = records.read_metric_sums(evaluate(config, {"average": merge}, "merge", **own))
    assert sums["masked"].methods == ("average",)


@pytest.mark.parametrize(
    ("changes", "vectors", "models", "expected"),
    [
        ({"head.kind": "none"}, "merge", True, "asks for heads on merge, which the run's \\[head\\] does not name"),
        ({}, "merge,backbone", True, "asks for heads on backbone, which"),
        ({}, "merge", False, "asks for a head on the merge 'average', but sent none"),
        ({}, "catalog", True, "names the vectors \\['catalog'\\]"),
    ],
)
def test_requests_that_the_run_does_not_have_are_refused(
    place: Path, merge: Adapter, changes: dict[str, Any], vectors: str, models: bool, expected: str
) -> None:
    config = experiment(place, **changes)
    given = {"average": merge} if models else {}
    for content in (ask_heads(config, given, vectors), evaluate(config, given, vectors)):
        found = records.read_error(content)
        assert found is not None
        with pytest.raises(AssertionError, match=expected):
            raise AssertionError(found)


def test_an_organisation_counts_the_rows_of_heads_as_models(place: Path, merge: Adapter, tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text('metrics = "exact"\nmin_users = 5\nmax_models = 3\n')
    own = {"policy-path": str(policy)}
    config = experiment(place)
    assert records.read_error(evaluate(config, {"average": merge}, "merge", **own)) is None
    policy.write_text('metrics = "exact"\nmin_users = 5\nmax_models = 2\n')
    refused = records.read_error(evaluate(experiment(place, run_id="other"), {"average": merge}, "merge", **own))
    assert refused is not None
    assert "max_models = 2 of its own policy file: run other evaluates 3 models" in refused
    policy.write_text('metrics = "exact"\nmin_users = 5\nmax_models = 1\n')
    refused = records.read_error(ask_heads(experiment(place, run_id="third"), {"average": merge}, **own))
    assert "max_models = 1 of its own policy file: run third evaluates 2 models" in str(refused)
    policy.write_text("max_minutes = 5\n")
    assert "the run has head.max_minutes = 10" in str(records.read_error(ask_heads(config, {"average": merge}, **own)))


FEDERATED = {"head.kind": "federated", "head.rank": 2, "head.steps": 1, "head.rounds": 2}


def with_anchor(
    config: ExperimentConfig, merge: Adapter, anchor: Adapter, weight: float = 0.5, **own: str
) -> RecordDict:
    """Let a client evaluate a federated head, fused with the text by the given weight."""
    fusion = records.fusion_text(dict.fromkeys(VARIANTS, (weight, 1 - weight, 0.0)))
    request = records.EvaluationRequest("valid", False, "", False, "", "average", fusion)
    models = records.model_records({"average": merge, FEDERATED_HEAD: anchor})
    return answer(config, records.evaluation_request_record(request, models), records.EVALUATE, own)


def test_every_fusion_and_every_encoder_of_a_federated_head_counts(
    place: Path, merge: Adapter, backbone: Backbone, tmp_path: Path
) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text('metrics = "exact"\nmin_users = 5\nmax_models = 4\n')
    config = experiment(place, **FEDERATED)
    anchor = fresh_head(backbone.width, config.head, 0)

    def refused(weight: float, encoder: Adapter) -> str | None:
        return records.read_error(with_anchor(config, encoder, anchor, weight, **{"policy-path": str(policy)}))

    assert refused(0.5, merge) is None  # the merge, the head, and its fusion
    assert refused(0.25, merge) is None
    assert refused(0.5, merge) is None  # asked before
    assert "evaluates 5 models" in str(refused(0.75, merge))
    other = random_adapter(layout_of(backbone, ("query",)), 2, 1.0, 1)
    assert "evaluates 7 models" in str(refused(0.5, other))


def test_encoders_of_rounds_count_and_rounds_beyond_the_run_are_refused(
    place: Path, merge: Adapter, backbone: Backbone, tmp_path: Path
) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text('metrics = "exact"\nmin_users = 5\nmax_models = 1\n')
    config = experiment(place, **FEDERATED)

    def refused(number: int, encoder: Adapter) -> str | None:
        content = records.round_request_record(records.RoundRequest(number, 2, "A and B", number), None, encoder)
        return records.read_error(answer(config, content, records.ROUND_HEAD, {"policy-path": str(policy)}))

    assert refused(1, merge) is None
    assert refused(2, merge) is None
    other = random_adapter(layout_of(backbone, ("query",)), 2, 1.0, 1)
    assert "evaluates 2 models" in str(refused(2, other))
    for number in (0, 3):
        assert f"asks for round {number} of a federated head, but the run has head.rounds = 2" in str(
            refused(number, merge)
        )


def scaled(adapter: Adapter, factor: float) -> Adapter:
    return Adapter({name: LoraModule(m.lora_A * factor, m.lora_B, m.scaling) for name, m in adapter.modules.items()})


def test_without_exact_metrics_an_error_holds_no_number_of_users(
    place: Path, merge: Adapter, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ClientError("ranking of 7 users: NaN")

    monkeypatch.setattr(heads, "federated_weights", fail)
    monkeypatch.setattr(heads, "federated_ranks", fail)
    monkeypatch.setattr(heads, "load_or_train_head", fail)
    monkeypatch.setattr(coefficients, "load_or_fit_personal_merge", fail)
    monkeypatch.setattr(coefficients, "_cached_cohort", lambda *_: SimpleNamespace(adapters={}))
    monkeypatch.setattr(coefficients, "own_expert", lambda *_: merge)
    personal = records.personal_request_record(records.PersonalRequest("0" * 64, "0" * 64))
    for metrics, shows in (("exact", True), ("suppressed", False)):
        config = experiment(place, **FEDERATED, **{"privacy.metrics": metrics})
        shown = {"personal.directions": "module", "privacy.policy": "catalog-private", "privacy.metrics": metrics}
        of_personal = experiment(place, **shown)
        anchor = fresh_head(backbone.width, config.head, 0)
        asked = {
            "the training of its heads failed": ask_heads(config, {"average": merge, FEDERATED_HEAD: anchor}),
            "the evaluation failed": with_anchor(config, merge, anchor),
            "its personal merge cannot be fitted": answer(of_personal, personal, records.FIT_PERSONAL),
        }
        for what, content in asked.items():
            found = str(records.read_error(content))
            assert ("7 users" in found) is shows
            assert (f"{what}; the reason is in the client's log" in found) is not shows


def test_models_that_are_not_finite_are_refused(place: Path, merge: Adapter, backbone: Backbone) -> None:
    config = experiment(place, **FEDERATED)
    anchor = fresh_head(backbone.width, config.head, 0)
    for factor in (float("nan"), float("inf")):
        for content in (
            ask_heads(config, {"average": merge, FEDERATED_HEAD: scaled(anchor, factor)}),
            with_anchor(config, scaled(merge, factor), anchor),
        ):
            assert "has NaN or infinite values; send finite ones" in str(records.read_error(content))
