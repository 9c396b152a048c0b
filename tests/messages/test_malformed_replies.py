"""Malformed replies, drawn by hypothesis from many kinds of harm, in a run: each is refused with a reason.

Every drawn reply comes from a client of its own, in the phase that it belongs to; two honest clients are among them,
and the run ends with them. By default 40 replies; with -m slow a thousand.
"""

import json
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from in_process import small_experiment

from fedmerge.adapter import Adapter
from fedmerge.config import ExperimentConfig
from fedmerge.errors import FedMergeError
from fedmerge.server.reply_checks import LARGEST_VALUE
from sim.app.messages import records
from sim.local.in_process import answer_honestly, run_in_process

HONEST = ("beauty", "books")
Harm = Callable[[RecordDict], RecordDict]


TEXT = st.text(max_size=30)
SCALARS = st.one_of(st.integers(-(2**62), 2**62), st.floats(), TEXT, st.binary(max_size=40), st.booleans())
CONFIGS = st.dictionaries(TEXT, SCALARS, max_size=4).map(lambda values: ConfigRecord({**values}))
METRICS = st.dictionaries(TEXT, st.floats(), max_size=3).map(lambda values: MetricRecord({**values}))
ARRAYS = st.dictionaries(
    TEXT,
    st.builds(Array, TEXT, st.lists(st.integers(-9, 2**31 - 1), max_size=3).map(tuple), TEXT, st.binary(max_size=60)),
    max_size=3,
).map(ArrayRecord)
RECORDS = st.one_of(CONFIGS, METRICS, ARRAYS)
JSONS = st.recursive(
    st.one_of(st.none(), st.booleans(), st.floats(), st.integers(), TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=8,
)
MUCH = RecordDict({"more": ConfigRecord({"x": b"\0" * 3_000_000})})


def another_content(content: dict[str, Any]) -> Harm:
    return lambda honest: RecordDict(content)


def without(key: str) -> Harm:
    return lambda honest: RecordDict({name: record for name, record in honest.items() if name != key})


def replaced(key: str, record: Any) -> Harm:
    return lambda honest: RecordDict({**dict(honest.items()), key: record})


def too_much(honest: RecordDict) -> RecordDict:
    return RecordDict({**dict(honest.items()), **dict(MUCH.items())})


def of_facts(change: Callable[[dict[str, Any]], Any]) -> Harm:
    def harm(honest: RecordDict) -> RecordDict:
        facts: dict[str, Any] = dict(honest.config_records["facts"])
        change(facts)
        return RecordDict({**dict(honest.items()), "facts": ConfigRecord(facts)})

    return harm


def of_array(turn: int, change: Callable[[Array], Array | None], name: str | None = None) -> Harm:
    """Change one of the adapter's tensors, or leave it out, or give it another name."""

    def harm(honest: RecordDict) -> RecordDict:
        arrays = dict(honest.array_records["adapter"].items())
        chosen = sorted(arrays)[turn % len(arrays)]
        changed = change(arrays.pop(chosen))
        if changed is not None:
            arrays[chosen if name is None else f"{chosen}{name}"] = changed
        return RecordDict({**dict(honest.items()), "adapter": ArrayRecord(arrays)})

    return harm


def with_value(value: float) -> Callable[[Array], Array]:
    def change(array: Array) -> Array:
        values = array.numpy().copy()
        values.flat[0] = value
        return Array(values)

    return change


def of_scaling(turn: int, value: Any) -> Harm:
    def harm(honest: RecordDict) -> RecordDict:
        scalings: dict[str, Any] = dict(honest.config_records["scalings"])
        scalings[sorted(scalings)[turn % len(scalings)]] = value
        return RecordDict({**dict(honest.items()), "scalings": ConfigRecord(scalings)})

    return harm


def of_sums(variant: str, change: Callable[[dict[str, Any]], Any]) -> Harm:
    def change_facts(facts: dict[str, Any]) -> None:
        result = json.loads(facts[variant])
        change(result)
        facts[variant] = json.dumps(result)

    return of_facts(change_facts)


def is_no_report(text: str) -> bool:
    try:
        return not isinstance(json.loads(text), dict)
    except ValueError:
        return True


TURN = st.integers(0, 7)
PHASES = st.sampled_from(["query.describe", "train", "evaluate"])
BAD_NUMBERS = st.one_of(
    st.sampled_from([np.nan, np.inf, -np.inf]), st.floats(2 * LARGEST_VALUE, 1e38), st.floats(-1e38, -2 * LARGEST_VALUE)
)
NO_FLOAT32 = TEXT.filter(lambda text: text != "float32")

NO_FACTS = TEXT.filter(lambda key: key != "facts")

IN_ANY = st.one_of(
    st.tuples(PHASES, st.dictionaries(NO_FACTS, RECORDS, max_size=3).map(another_content)),
    st.tuples(PHASES, st.just(without("facts"))),
    st.tuples(PHASES, CONFIGS.map(lambda record: replaced("facts", record))),
    st.tuples(PHASES, st.one_of(METRICS, ARRAYS).map(lambda record: replaced("facts", record))),
    st.tuples(PHASES, st.just(too_much)),
    st.tuples(PHASES, CONFIGS.map(lambda record: replaced("error", record))),
)
IN_DESCRIBE = st.one_of(
    st.sampled_from(["domain", "role", "num_users", "policy", "backbone_sha256"]).map(
        lambda key: of_facts(lambda facts: facts.pop(key))
    ),
    st.tuples(TEXT.filter(lambda key: key not in records.Description.__annotations__), SCALARS).map(
        lambda more: of_facts(lambda facts: facts.update([more]))
    ),
    st.tuples(
        st.sampled_from(["domain", "backbone_sha256", "policy", "fedmerge_version", "precision"]),
        st.one_of(st.integers(), st.floats(), st.binary(max_size=9), TEXT),
    ).map(lambda other: of_facts(lambda facts: facts.update([other]))),
).map(lambda harm: ("query.describe", harm))
IN_TRAIN = st.one_of(
    st.tuples(TURN, BAD_NUMBERS).map(lambda drawn: of_array(drawn[0], with_value(drawn[1]))),
    TURN.map(lambda turn: of_array(turn, lambda array: None)),
    st.tuples(TURN, TEXT.filter(bool)).map(lambda drawn: of_array(drawn[0], lambda array: array, drawn[1])),
    st.tuples(TURN, NO_FLOAT32).map(
        lambda drawn: of_array(drawn[0], lambda array: Array(drawn[1], array.shape, array.stype, array.data))
    ),
    st.tuples(TURN, st.lists(st.integers(-(2**31), 2**31 - 1), max_size=4)).map(
        lambda drawn: of_array(drawn[0], lambda array: Array(array.dtype, (*drawn[1], -1), array.stype, array.data))
    ),
    st.tuples(TURN, NO_FLOAT32).map(
        lambda drawn: of_array(drawn[0], lambda array: Array(array.dtype, array.shape, drawn[1], array.data))
    ),
    st.tuples(TURN, st.binary(max_size=200)).map(
        lambda drawn: of_array(drawn[0], lambda array: Array(array.dtype, array.shape, array.stype, drawn[1]))
    ),
    st.tuples(TURN, st.integers(1, 200)).map(
        lambda drawn: of_array(
            drawn[0], lambda array: Array(array.dtype, array.shape, array.stype, array.data[: -drawn[1]])
        )
    ),
    st.tuples(TURN, st.binary(min_size=1, max_size=99)).map(
        lambda drawn: of_array(
            drawn[0], lambda array: Array(array.dtype, array.shape, array.stype, array.data + drawn[1])
        )
    ),
    st.tuples(TURN, st.integers(0, 9), st.integers(1, 255)).map(
        lambda drawn: of_array(  # in what says where the header ends
            drawn[0],
            lambda array: Array(
                array.dtype,
                array.shape,
                array.stype,
                bytes(b ^ drawn[2] if at == drawn[1] else b for at, b in enumerate(array.data)),
            ),
        )
    ),
    TURN.map(lambda turn: of_array(turn, lambda array: Array(array.numpy().T.copy()))),
    TURN.map(lambda turn: of_array(turn, lambda array: Array(array.numpy().astype(np.float64)))),
    TURN.map(lambda turn: of_array(turn, lambda array: Array(array.numpy()[:1].copy()))),
    st.tuples(TURN, st.one_of(TEXT, st.binary(max_size=9), BAD_NUMBERS, st.just([2.0]))).map(
        lambda drawn: of_scaling(*drawn)
    ),
    st.sampled_from(["adapter", "scalings"]).map(without),
    st.one_of(TEXT, JSONS.map(json.dumps))
    .filter(is_no_report)
    .map(lambda text: of_facts(lambda facts: facts.update(report=text))),
).map(lambda harm: ("train", harm))
VARIANTS = st.sampled_from(["masked", "unmasked"])
SUM_KEYS = st.sampled_from(["variant", "num_users", "methods", "metrics", "sums", "products"])
IN_EVALUATE = st.one_of(
    st.tuples(VARIANTS, JSONS.map(json.dumps)).map(lambda drawn: of_facts(lambda facts: facts.update([drawn]))),
    st.tuples(VARIANTS, TEXT).map(lambda drawn: of_facts(lambda facts: facts.update([drawn]))),
    st.tuples(VARIANTS, SUM_KEYS).map(lambda drawn: of_sums(drawn[0], lambda result: result.pop(drawn[1]))),
    st.tuples(VARIANTS, SUM_KEYS, JSONS.filter(lambda value: value not in ("masked", "unmasked"))).map(
        lambda drawn: of_sums(drawn[0], lambda result: result.update({drawn[1]: drawn[2]}))
    ),
    st.tuples(VARIANTS, st.integers(31, 2**70)).map(
        lambda drawn: of_sums(drawn[0], lambda result: result.update(num_users=drawn[1]))
    ),
    VARIANTS.map(lambda variant: of_facts(lambda facts: facts.pop(variant))),
).map(lambda harm: ("evaluate", harm))
MALFORMED = st.one_of(IN_ANY, IN_DESCRIBE, IN_TRAIN, IN_EVALUATE)


def draw(number: int, model: Mapping[str, RecordDict]) -> list[tuple[str, RecordDict]]:
    """So many malformed replies, each with the kind of message that it answers; the same ones each time."""
    drawn: list[tuple[str, RecordDict]] = []

    quietly = list(HealthCheck)

    @settings(max_examples=2 * number, phases=[Phase.generate], derandomize=True, suppress_health_check=quietly)
    @given(MALFORMED)
    def keep(malformed: tuple[str, Harm]) -> None:
        phase, harm = malformed
        honest = model["valid" if phase == "evaluate" else phase]
        if phase == "query.describe":
            honest = of_facts(lambda facts: facts.update(domain=name_of(len(drawn))))(honest)
        try:
            reply = travelled(harm(honest))
        except (ValueError, TypeError, UnicodeError):  # Flower cannot send it
            return
        drawn.append((phase, reply))

    keep()
    assert len(drawn) >= number
    return drawn[:number]


def name_of(turn: int) -> str:
    return f"bad-{turn:04}"


def travelled(content: RecordDict) -> RecordDict:
    """Return the received record, serialised and parsed by Flower."""
    return recorddict_from_proto(ProtoRecordDict.FromString(recorddict_to_proto(content).SerializeToString()))


def kind_of(message: Message) -> str:
    """Return the kind of a message, with the split if it requests an evaluation."""
    kind = message.metadata.message_type
    return kind if kind != "evaluate" else records.read_evaluation_request(message.content)[0].split


def experiment(place: Path, out: Path, number: int) -> ExperimentConfig:
    changes = {
        "output_dir": str(out),
        "domains.train": ",".join([*HONEST, *map(name_of, range(number))]),
        "domains.unseen": "",
        "merge.methods": "average",
        "evaluation.baselines": "",
        "server.messages_at_once": 200,
    }
    return small_experiment(place, **changes)


def run_with(
    malformed: list[tuple[str, RecordDict]], model: Mapping[str, RecordDict], config: ExperimentConfig
) -> None:
    """A run of the honest clients and of one for each malformed reply, who answers all else as the model."""

    def answer(message: Message, context: Context) -> Message | list[Message] | None:
        turn = int(context.node_config["partition-id"]) - len(HONEST)
        if turn < 0:
            return answer_honestly(message, context)
        phase, reply = malformed[turn]
        kind = message.metadata.message_type
        if phase != kind:
            reply = model[kind_of(message)]
            if kind == "query.describe":
                who = {"domain": name_of(turn), "num_nodes": len(config.domains.train)}
                reply = of_facts(lambda facts: facts.update(who))(reply)
        return Message(reply, reply_to=message)

    run_in_process(config, answer)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("place")


@pytest.fixture(scope="module")
def model(place: Path) -> dict[str, RecordDict]:
    """Return an honest client's answers by kind of message."""
    found: dict[str, RecordDict] = {}

    def answer(message: Message, context: Context) -> Message | None:
        reply = answer_honestly(message, context)
        assert reply is not None
        found.setdefault(kind_of(message), reply.content)
        return reply

    run_in_process(experiment(place, place / "honest", 0), answer)
    return found


@pytest.mark.parametrize("number", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_each_malformed_reply_is_refused_with_a_reason_and_the_run_ends_with_the_rest(
    place: Path, model: dict[str, RecordDict], tmp_path: Path, number: int
) -> None:
    malformed = draw(number, model)
    assert {phase for phase, _ in malformed} == {"query.describe", "train", "evaluate"}
    started = time.monotonic()
    run_with(malformed, model, experiment(place, tmp_path, number))
    print(f"{number} malformed replies: {time.monotonic() - started:.1f} s")
    run = tmp_path / "run"
    clients = json.loads((run / "clients.json").read_text())
    assert set(clients["participants"]) == set(HONEST)
    assert len(clients["excluded"]) == number
    assert all(len(reason) > 10 and "Traceback" not in reason for reason in clients["excluded"].values())
    phases = {"query.describe": "gather", "train": "train", "evaluate": "validation"}
    for name, phase in clients["excluded_in_phase"].items():
        if found := re.fullmatch(r"bad-(\d{4})", name):
            assert phase == phases[malformed[int(found[1])][0]]
    assert (run / "DONE").exists()
    assert json.loads((run / "choice.json").read_text())["domains"] == list(HONEST)
    assert set(json.loads((run / "merged/average/provenance.json").read_text())["domains"]) >= set(HONEST)


@given(RECORDS.flatmap(lambda record: st.dictionaries(TEXT, st.just(record), max_size=3)))
@settings(max_examples=50)
def test_a_record_of_any_contents_raises_our_own_errors_only(content: dict[str, Any]) -> None:
    arrived = travelled(RecordDict(content))
    assert records.size_bytes(arrived) >= 0
    assert list(records.contents(arrived)) is not None
    for read in (
        records.read_description,
        records.read_catalog,
        records.read_expert,
        records.read_metric_sums,
        lambda content: records.read_round_request(content, lambda seed: Adapter({})),
        records.read_evaluation_request,
    ):
        with pytest.raises(FedMergeError):
            read(arrived)
