"""Messages: every record survives a round trip, and malformed records are errors with a remedy."""

import json
from dataclasses import replace
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch
from adapters import random_adapter
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

from fedmerge.adapter import Adapter, LoraModule, adapter_sha256
from fedmerge.domain.catalog import catalog_from_bytes, catalog_to_bytes, make_catalog
from fedmerge.errors import ClientError, FedMergeError, LayoutMismatchError
from fedmerge.evaluation.ranks import METRICS
from fedmerge.evaluation.sums import MetricSums, Variant, metric_sums
from sim.app.messages import records

LAYOUT = {"encoder.layer.0.attention.self.query": (32, 32), "encoder.layer.1.intermediate.dense": (64, 32)}
QUERY_A = "encoder.layer.0.attention.self.query.lora_A"


def adapter(seed: int = 0) -> Adapter:
    return random_adapter(LAYOUT, 2 + seed, 2.0 / 3, seed)


def sums(variant: Variant = "unmasked") -> MetricSums:
    rng = np.random.default_rng(len(variant))
    return metric_sums({"average": rng.random((5, len(METRICS))), "expert": rng.random((5, len(METRICS)))}, variant)


def travelled(content: RecordDict) -> RecordDict:
    """Return the received record, serialised and parsed by Flower."""
    data = recorddict_to_proto(content).SerializeToString()
    return recorddict_from_proto(ProtoRecordDict.FromString(data))


# Round trips


def test_a_description_comes_back() -> None:
    description = records.Description("shop", "train", 3, 4, 5, True, "c" * 64, "b" * 64, "float32", "0.1.0", "adapter")
    assert records.read_description(travelled(records.description_record(description))) == description
    idle = records.Description("", "idle")
    assert records.read_description(travelled(records.description_record(idle))) == idle


def test_a_layer_map_and_its_sum_come_back() -> None:
    request = records.LayerMapRequest("c" * 64, -1)
    content = travelled(records.layer_map_request_record(request, (2, 0, 1)))
    assert records.read_layer_map_request(content) == (request, [2, 0, 1])
    assert records.read_layer_map(travelled(records.layer_map_record(7, 1.0 / 3))) == (7, 1.0 / 3)


@pytest.mark.parametrize(
    ("facts", "found"),
    [
        ({"num_users": 6, "ndcg": 6.5}, "a sum of 6.5 over 6 users"),
        ({"num_users": 6, "ndcg": -0.1}, "a sum of -0.1 over 6 users"),
        ({"num_users": 0, "ndcg": 0.0}, "over 0 users"),
        ({"num_users": 6, "ndcg": float("nan")}, "not a number of users and a sum"),
        ({"num_users": 6.0, "ndcg": 1.0}, "not a number of users and a sum"),
        ({"num_users": 6, "ndcg": 1.0, "items": 3}, "not a number of users and a sum"),
    ],
)
def test_a_sum_that_no_users_have_is_refused(facts: dict[str, Any], found: str) -> None:
    with pytest.raises(ClientError, match=found):
        records.read_layer_map(RecordDict({"facts": ConfigRecord(facts)}))


def test_a_layer_map_of_other_values_is_refused() -> None:
    content = records.layer_map_request_record(records.LayerMapRequest("c" * 64, 0), (0, 1))
    for values in ([0.0, 1.0], ["0"], "0,1", [True]):
        content["map"] = ConfigRecord({"candidates": values})
        with pytest.raises(ClientError, match="holds no map"):
            records.read_layer_map_request(content)


def test_a_catalog_comes_back() -> None:
    columns = {"title": ["Tée", ""], "brand": ["", "x"], "category": ["a > b", ""]}
    data = catalog_to_bytes(make_catalog("shop", ["1", "2"], columns))
    found = records.read_catalog(travelled(records.catalog_record(data)))
    assert found == data
    assert catalog_from_bytes(found, "shop") == make_catalog("shop", ["1", "2"], columns)


def test_an_expert_comes_back_to_the_last_bit() -> None:
    report = {"steps": 3, "validations": [{"step": 0, "loss": None, "ndcg": 0.1}], "stopped_by": "ü"}
    found, found_report = records.read_expert(travelled(records.expert_record(adapter(), report)))
    assert adapter_sha256(found) == adapter_sha256(adapter())
    assert found_report == report
    for name, module in found.modules.items():
        assert torch.equal(module.lora_A, adapter().modules[name].lora_A)
        assert module.lora_A.dtype == torch.float32
        module.lora_A.add_(1)  # its memory is its own and may be written


def test_a_transposed_view_travels_as_its_values() -> None:
    view = Adapter({"a": LoraModule(torch.arange(6.0).reshape(3, 2).T, torch.ones(2, 4).T, 1.0)})
    found, _ = records.read_expert(travelled(records.expert_record(view, {})))
    assert found.modules["a"].lora_A.tolist() == [[0.0, 2.0, 4.0], [1.0, 3.0, 5.0]]
    assert adapter_sha256(found) == adapter_sha256(view)


def test_b_comes_back_alone_beside_an_a_that_both_sides_have() -> None:
    content = travelled(records.expert_record(adapter(), {}, only_B=True))
    assert {*content.array_records["adapter"]} == {f"{name}.lora_B" for name in LAYOUT}
    found, _ = records.read_expert(content, frozen=adapter())
    assert adapter_sha256(found) == adapter_sha256(adapter())
    refused(records.read_expert, content, r"tensors do not match its modules.*lora_A")


def test_a_request_of_a_round_comes_back() -> None:
    start, base, fresh = adapter(), adapter(1), adapter(2)
    zero = {name: replace(module, lora_B=0 * module.lora_B) for name, module in start.modules.items()}
    made = {7: fresh, 8: Adapter(zero)}
    whole = records.RoundRequest(2, 3, "A and B", records.NOT_FRESH)
    seed_alone = records.RoundRequest(1, 3, "A and B", 7)
    b_alone = records.RoundRequest(2, 3, "B", 8)
    for request, sent, expected in ((whole, start, start), (seed_alone, None, fresh), (b_alone, start, start)):
        content = travelled(records.round_request_record(request, sent, base))
        found, found_start, found_base = records.read_round_request(content, made.__getitem__)
        assert found == request
        assert adapter_sha256(found_start) == adapter_sha256(expected)
        assert found_base is not None
        assert adapter_sha256(found_base) == adapter_sha256(base)
    content = records.round_request_record(b_alone, start, None)
    assert {*content.array_records["adapterstart"]} == {f"{name}.lora_B" for name in LAYOUT}
    nothing = records.round_request_record(whole, None, None)
    refused(lambda content: records.read_round_request(content, made.__getitem__), nothing, "adapter")


@pytest.mark.parametrize("number", [0, 1, 12])
def test_an_evaluation_request_comes_back_with_its_labels_in_order(number: int) -> None:
    request = records.EvaluationRequest("test", True, "e" * 64, False)
    models = {f"task-arithmetic 0.{i}": adapter(i) for i in reversed(range(number))}
    found, found_models = records.read_evaluation_request(
        travelled(records.evaluation_request_record(request, records.model_records(models)))
    )
    assert found == request
    assert list(found_models) == list(models)
    assert [adapter_sha256(model) for model in found_models.values()] == [adapter_sha256(m) for m in models.values()]


def test_metric_sums_come_back_exactly() -> None:
    both: dict[Variant, MetricSums] = {"unmasked": sums("unmasked"), "masked": sums("masked")}
    found = records.read_metric_sums(travelled(records.metric_sums_record(both)))
    assert list(found) == list(both)
    for variant, of_variant in both.items():
        assert found[variant].to_dict() == of_variant.to_dict()
    assert not np.array_equal(found["unmasked"].sums, found["masked"].sums)


def test_an_error_comes_back_and_other_messages_hold_none() -> None:
    assert records.read_error(travelled(records.error_record("DomainError: gone"))) == "DomainError: gone"
    assert records.read_error(records.expert_record(adapter(), {})) is None
    assert records.read_error(RecordDict()) is None


# Malformed records


def refused(read: Any, content: RecordDict, message: str) -> FedMergeError:
    with pytest.raises(FedMergeError, match=message) as caught:
        read(content)
    return caught.value


READERS = [
    records.read_description,
    records.read_catalog,
    records.read_expert,
    records.read_evaluation_request,
    records.read_metric_sums,
]


@pytest.mark.parametrize("read", READERS)
def test_an_empty_message_is_refused(read: Any) -> None:
    refused(read, RecordDict(), r"'facts'.*\[\]")


@pytest.mark.parametrize("read", READERS)
def test_a_message_of_another_kind_is_refused(read: Any) -> None:
    for content in (
        RecordDict({"facts": ConfigRecord({"unasked": 1})}),
        RecordDict({"facts": MetricRecord({"a": 1.0})}),
    ):
        with pytest.raises(FedMergeError):
            read(content)


def test_descriptions_of_another_version_are_refused() -> None:
    facts = RecordDict({"facts": ConfigRecord({"domain": "x", "role": "train", "colour": "red"})})
    refused(records.read_description, facts, "colour")
    refused(records.read_description, RecordDict({"facts": ConfigRecord({"domain": "x"})}), "role")


def with_fact(content: RecordDict, **changes: Any) -> RecordDict:
    facts: dict[str, Any] = {**content.config_records["facts"], **changes}
    return RecordDict({**dict(content.items()), "facts": ConfigRecord(facts)})


def test_a_literal_field_takes_its_own_values_only() -> None:
    description = records.description_record(records.Description("shop", "train"))
    evaluation = records.evaluation_request_record(records.EvaluationRequest("test", True, "", True), {})
    round_request = records.round_request_record(records.RoundRequest(1, 2, "B", 7), None, None)
    reads: list[tuple[Any, RecordDict, str, str]] = [
        (records.read_description, description, "role", "unseen"),
        (records.read_evaluation_request, evaluation, "split", "valid"),
        (lambda content: records.read_round_request(content, lambda seed: adapter()), round_request, "trained", "B"),
    ]
    for read, content, key, allowed in reads:
        with pytest.raises(ClientError) as caught:
            read(with_fact(content, **{key: "admin\x1b[31m"}))
        assert key in str(caught.value)
        assert repr(allowed) in str(caught.value)
        assert "admin" in str(caught.value)
        assert "\x1b" not in str(caught.value)


def test_names_in_the_ledger_are_printable() -> None:
    (row,) = records.contents(RecordDict({"facts": ConfigRecord({"a\x1b[31m\nb": 1})}))
    assert row["name"].isascii()
    assert "\x1b" not in row["name"]


def test_a_catalog_that_is_not_bytes_is_refused() -> None:
    facts = RecordDict({"facts": ConfigRecord({"catalog": "text"})})
    assert type(refused(records.read_catalog, facts, "str.*bytes")) is ClientError


def expert_with(
    arrays: dict[str, Array | None], scalings: dict[str, Any] | None = None, only_B: bool = False
) -> RecordDict:
    """Return a good message with changed tensors and scalings (None removes one)."""
    content = records.expert_record(adapter(), {}, only_B=only_B)
    for key, kind, changes in (("adapter", ArrayRecord, arrays), ("scalings", ConfigRecord, scalings or {})):
        kept = {**content[key], **changes}
        content[key] = kind({name: value for name, value in kept.items() if value is not None})
    return content


def array(data: bytes, shape: tuple[int, ...] = (2, 32), dtype: str = "float32", stype: str = "numpy.ndarray") -> Array:
    return Array(dtype, shape, stype, data)


def npy(values: Any, allow_pickle: bool = False) -> bytes:
    buffer = BytesIO()
    np.save(buffer, values, allow_pickle=allow_pickle)
    return buffer.getvalue()


def npz() -> bytes:
    buffer = BytesIO()
    np.savez(buffer, np.zeros((2, 32), np.float32))
    return buffer.getvalue()


def header_of(shape: tuple[int, ...]) -> bytes:
    buffer = BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return buffer.getvalue()


class Trap:
    """An object whose unpickling fails the test."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("a pickle was opened",)


GOOD = np.zeros((2, 32), np.float32)
BAD_ARRAYS: dict[str, tuple[Array | None, str]] = {
    "missing": (None, QUERY_A),
    "float64": (Array(GOOD.astype(np.float64)), "float64"),
    "float64 announced as float32": (array(npy(GOOD.astype(np.float64))), "float32 .*float64"),
    "one axis": (Array(np.zeros(64, np.float32)), r"\(64,\)"),
    "three axes": (Array(np.zeros((2, 4, 8), np.float32)), r"\(2, 4, 8\)"),
    "another shape than announced": (array(npy(GOOD.T)), r"float32 \(2, 32\) .*float32 \(32, 2\)"),
    "truncated": (array(npy(GOOD)[:-1]), QUERY_A),
    "empty": (array(b""), QUERY_A),
    "an unknown version": (array(b"\x93NUMPY\x01\x07" + npy(GOOD)[8:]), r"\(1, 7\)"),
    "not an array": (array(b"garbage"), QUERY_A),
    "objects": (array(npy(np.array([[Trap()]], dtype=object), allow_pickle=True)), QUERY_A),
    "a pickle": (array(b"\x80\x04\x95garbage."), QUERY_A),
    "another serialisation": (array(npy(GOOD), stype="torch"), QUERY_A),
    "several arrays": (array(npz()), QUERY_A),
    "more than memory": (array(header_of((2**55, 2))), QUERY_A),
    "more than addressable": (array(header_of((2**60, 2**10))), QUERY_A),
}


@pytest.mark.parametrize(
    "case",
    list(BAD_ARRAYS),
)
def test_a_bad_tensor_is_refused_by_name(case: str) -> None:
    tensor, message = BAD_ARRAYS[case]
    error = refused(records.read_expert, expert_with({QUERY_A: tensor}), message)
    assert type(error) is LayoutMismatchError
    assert QUERY_A in str(error)


def test_the_good_tensor_of_these_tests_is_good() -> None:
    found, _ = records.read_expert(expert_with({QUERY_A: array(npy(GOOD))}))
    assert not found.modules["encoder.layer.0.attention.self.query"].lora_A.any()


def test_modules_without_tensors_and_tensors_without_modules_are_refused() -> None:
    refused(records.read_expert, expert_with({}, {"pooler": 1.0}), r"pooler\.lora_A")
    refused(records.read_expert, expert_with({"pooler.lora_A": array(npy(GOOD))}), r"pooler\.lora_A")


QUERY, DENSE = LAYOUT
NOT_ALONE: dict[str, tuple[dict[str, Array | None], dict[str, Any], str]] = {
    "lora_A, too": (
        {QUERY_A: array(npy(GOOD))},
        {},
        rf"\[\].*\['{QUERY_A}'\]",
    ),
    "no tensor": ({f"{DENSE}.lora_B": None}, {}, rf"\['{DENSE}\.lora_B'\].*\[\]"),
    "no scaling": ({}, {DENSE: None}, rf"\['{DENSE}\.scaling'\]"),
    "no module": ({f"{DENSE}.lora_B": None}, {DENSE: None}, rf"\['{DENSE}\.lora_B', '{DENSE}\.scaling'\]"),
    "another module": (
        {"pooler.lora_B": array(npy(GOOD))},
        {"pooler": 1.0},
        r"\['pooler\.lora_B', 'pooler\.scaling'\]",
    ),
    "a bad tensor": ({f"{QUERY}.lora_B": array(npz())}, {}, rf"{QUERY}\.lora_B "),
}


@pytest.mark.parametrize("case", list(NOT_ALONE))
def test_where_b_travels_alone_anything_more_or_less_is_refused(case: str) -> None:
    arrays, scalings, message = NOT_ALONE[case]
    content = expert_with(arrays, scalings, only_B=True)
    error = refused(lambda content: records.read_expert(content, frozen=adapter()), content, message)
    assert type(error) is LayoutMismatchError


@pytest.mark.parametrize("scaling", ["2.0", b"2", [2.0]], ids=["text", "bytes", "list"])
def test_a_scaling_that_is_no_number_is_refused(scaling: Any) -> None:
    content = expert_with({}, {"encoder.layer.1.intermediate.dense": scaling})
    refused(records.read_expert, content, r"module encoder\.layer\.1\.intermediate\.dense: its scaling is a")


@pytest.mark.parametrize("key", ["adapter", "scalings"])
def test_an_expert_without_its_records_is_refused(key: str) -> None:
    content = records.expert_record(adapter(), {})
    del content[key]
    refused(records.read_expert, content, "adapter")


@pytest.mark.parametrize("report", ["{", "", "nonsense"])
def test_a_report_that_is_not_json_is_refused(report: str) -> None:
    content = records.expert_record(adapter(), {})
    content["facts"] = ConfigRecord({"report": report})
    refused(records.read_expert, content, "report.*JSON")


@pytest.mark.parametrize("report", ["null", "[]", "5"])
def test_a_report_that_is_no_object_is_refused(report: str) -> None:
    content = records.expert_record(adapter(), {})
    content["facts"] = ConfigRecord({"report": report})
    refused(records.read_expert, content, "report")


def test_a_request_that_names_more_models_than_it_holds_is_refused() -> None:
    models = records.model_records({"a": adapter()})
    content = records.evaluation_request_record(records.EvaluationRequest("valid", False, "", False), models)
    content["models"] = ConfigRecord({"labels": ["a", "b"]})
    refused(records.read_evaluation_request, content, "adapter1")
    content["models"] = ConfigRecord({"labels": "a"})
    refused(records.read_evaluation_request, content, "models")


def changed_sums(**changes: Any) -> str:
    return json.dumps({**sums().to_dict(), **changes})


BAD_SUMS: dict[str, str] = {
    "not JSON": "{",
    "a list": "[]",
    "a number": "5",
    "null": "null",
    "no sums": json.dumps({key: value for key, value in sums().to_dict().items() if key != "sums"}),
    "something more": changed_sums(users=["anna"]),
    "another variant": changed_sums(variant="half"),
    "the other variant": changed_sums(variant="masked"),
    "no users": changed_sums(num_users=0),
    "users in words": changed_sums(num_users="five"),
    "NaN": changed_sums(sums=(sums().sums * np.nan).tolist()),
    "ragged": changed_sums(sums=[[1.0], [1.0, 2.0]]),
    "of another size": changed_sums(sums=[[1.0]]),
    "other metrics": changed_sums(metrics=["hits"]),
    "metrics no list": changed_sums(metrics=5),
    "methods no list": changed_sums(methods=5),
    "methods no names": changed_sums(methods=[["a"], ["b"]]),
    "methods twice": changed_sums(methods=["a", "a"]),
    "asymmetric": changed_sums(products=np.random.default_rng(0).random((len(METRICS), 2, 2)).tolist()),
}


@pytest.mark.parametrize(
    "case",
    list(BAD_SUMS),
)
def test_malformed_sums_are_refused(case: str) -> None:
    facts = ConfigRecord({"unmasked": BAD_SUMS[case], "masked": json.dumps(sums("masked").to_dict())})
    error = refused(records.read_metric_sums, RecordDict({"facts": facts}), "metric")
    assert type(error) is ClientError


def test_sums_of_one_variant_only_are_refused() -> None:
    refused(records.read_metric_sums, records.metric_sums_record({"unmasked": sums()}), "KeyError: 'masked'")


# The ledger


def test_the_ledger_lists_everything_in_a_message() -> None:
    content = records.expert_record(adapter(), {"steps": 3})
    content["metrics"] = MetricRecord({"loss": 0.25})
    rows = {row["name"]: row for row in records.contents(content)}
    tensors = {f"adapter.{name}.lora_{part}" for name in LAYOUT for part in "AB"}
    scalings = {f"scalings.{name}" for name in LAYOUT}
    assert set(rows) == tensors | scalings | {"facts.report", "metrics.loss"}
    row = rows["adapter.encoder.layer.1.intermediate.dense.lora_B"]
    assert (row["dtype"], row["shape"]) == ("float32", "64x2")
    assert row["size_bytes"] == len(content.array_records["adapter"]["encoder.layer.1.intermediate.dense.lora_B"].data)
    assert row["size_bytes"] >= 64 * 2 * 4
    assert (rows["facts.report"]["dtype"], rows["facts.report"]["size_bytes"]) == ("str", len('{"steps": 3}'))
    assert {type(value) for row in rows.values() for value in row.values()} == {str, int}


def test_the_ledger_holds_no_values() -> None:
    content = records.catalog_record(b"SECRET")
    content["other"] = ConfigRecord({"list": ["SECRET"], "flag": True})
    rows = list(records.contents(content))
    assert [row["name"] for row in rows] == ["facts.catalog", "other.list", "other.flag"]
    assert "SECRET" not in str(rows)


def test_the_ledger_takes_everything_that_a_client_can_send() -> None:
    content = RecordDict({"facts": ConfigRecord({"parts": [b"a", b"bc"]})})
    assert [row["name"] for row in records.contents(content)] == ["facts.parts"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validations": [1]}, r"validations = \[1\].*step, loss and ndcg"),
        ({"validations": 1}, "validations = 1"),
        ({"validations": [{"step": "x"}]}, 'validations = .*"step": "x"'),
        ({"validations": [{"step": 1, "ndcg": [1]}]}, r'validations = .*"ndcg": \[1\]'),
        ({"loss": "x"}, 'loss = "x".* number'),
        ({"loss": float("nan")}, "loss = NaN.* number"),
        ({"steps": 1.5}, r"steps = 1\.5"),
        ({"steps": 10**100}, "steps = 1000"),
        ({"best_step": True}, "best_step = true"),
        ({"seconds": None}, "seconds = null"),
        ({"stopped_by": []}, r"stopped_by = \[\]"),
        ({"privacy": 1}, "privacy = 1"),
        ({"transport": "x"}, 'transport = "x"'),
    ],
)
def test_a_report_of_another_form_is_refused(changes: dict[str, Any], message: str) -> None:
    for content in (records.expert_record(adapter(), changes), records.report_record(changes)):
        with pytest.raises(ClientError, match=message):
            records.read_report(travelled(content))
