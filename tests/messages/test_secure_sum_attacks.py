"""A server that does not keep to the protocol of secure sums, against a client on a machine of its own."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from loopback import write_identity
from numpy.typing import NDArray

from fedmerge.client.cache.secure_sums import cache_values
from fedmerge.config import from_flat, to_flat
from fedmerge.errors import AggregationError, FedMergeError, PolicyError
from fedmerge.privacy.dp.agreement import largest_entry
from fedmerge.privacy.secagg.agreement import agreed_threshold, agreement_of
from fedmerge.privacy.secagg.client import advertise, mask_values, share, unmask
from fedmerge.privacy.secagg.server import add_values, new_session, weighted_mean
from fedmerge.privacy.secagg.session import Session
from fedmerge.privacy.secagg.state import Advertisement, ClientState
from sim.app.client.secure_sum import remember_values, secagg_advertise, secagg_masked, secagg_share, secagg_unmask
from sim.app.messages import secure_sum as secure_records

VICTIM, INVENTED = "beauty", ("books", "coffee")
CLIENTS = (VICTIM, *INVENTED)
NUM_USERS = 30


@pytest.fixture(autouse=True)
def _in_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower makes messages only within a task."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.fixture
def values() -> NDArray[np.float32]:
    return np.random.default_rng(0).uniform(-0.1, 0.1, 40).astype(np.float32)


def context_of(place: Path, values: NDArray[np.float32], node: dict[str, Any], **changes: Any) -> Context:
    """Return a client on a machine of its own that has trained these values."""
    flat = {
        "run_id": "run",
        "cache_dir": str(place / "cache"),
        "domains.train": ",".join(CLIENTS),
        "domains.unseen": "",
        "merge.methods": "average",
        "privacy.policy": "aggregate-only",
        "privacy.metrics": "suppressed",
    }
    run_config = to_flat(from_flat(flat | {key.replace("__", "."): value for key, value in changes.items()}))
    context = Context(1, 1, {"domain-path": str(place / VICTIM)} | node, RecordDict(), dict(run_config))
    number = 1 if "rounds__rule" in changes else 0
    sha256 = cache_values(str(place / "cache"), VICTIM, values)
    remember_values(context, sha256, "run", number, NUM_USERS)
    return context


def policy(place: Path, text: str = "") -> dict[str, str]:
    path = place / "policy.toml"
    path.write_text(f'policies = "aggregate-only"\n{text}')
    return {"policy-path": str(path)}


def keys(place: Path, names: tuple[str, ...] = CLIENTS) -> dict[str, str]:
    """Write the keys of the real clients, as their owners exchange them."""
    (place / "peers").mkdir()
    for name in names:
        write_identity(place / name, place / "peers" / f"{name}.pub")
    return {"identity-key": str(place / VICTIM), "peer-keys": str(place / "peers")}


def session_for(context: Context, number: int = 0, weights: dict[str, float] | None = None) -> Session:
    """Return the session that the client's run configuration implies."""
    config = from_flat(context.run_config)
    weights = weights or dict.fromkeys(CLIENTS, 1.0)
    threshold, agreement = agreed_threshold(config, len(weights)), agreement_of(config, number)
    return new_session(weights, 40, largest_entry(config), threshold, agreement)


def ask(handler: Any, content: RecordDict, context: Context) -> RecordDict:
    found: RecordDict = handler(Message(content, dst_node_id=1, message_type="query"), context)
    return found


class InventedClients:
    """Clients that exist in the server only."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.states: dict[str, ClientState] = {}
        self.keys: dict[str, Advertisement] = {}

    def ask_for_masked(self, context: Context) -> NDArray[np.uint32]:
        """Return the victim's masked values."""
        content = secure_records.session_record(self.session)
        self.keys[VICTIM] = secure_records.read_advertisement(ask(secagg_advertise, content, context))
        for name in INVENTED:
            self.states[name], self.keys[name] = advertise(self.session, name)
        content = secure_records.advertisements_record(self.keys)
        self.boxes = {VICTIM: secure_records.read_boxes(ask(secagg_share, content, context))}
        for name in INVENTED:
            self.states[name], self.boxes[name] = share(self.states[name], self.keys)
        self.relayed = secure_records.boxes_record({name: self.boxes[name][VICTIM] for name in INVENTED})
        return secure_records.read_masked(ask(secagg_masked, self.relayed, context))

    def read_victim(self, context: Context) -> NDArray[np.float64]:
        """Return the victim's values: the invented clients add zeros to the sum."""
        total, nothing = self.ask_for_masked(context), np.zeros(40)
        for name in INVENTED:
            relayed = {peer: self.boxes[peer][name] for peer in CLIENTS if peer != name}
            self.states[name], masked = mask_values(self.states[name], relayed, nothing)
            total = add_values(self.session, name, total, masked)
        revealed = {name: unmask(self.states[name], CLIENTS) for name in INVENTED}
        content = ask(secagg_unmask, secure_records.survivors_record([*CLIENTS]), context)
        revealed[VICTIM] = secure_records.read_revealed(content)
        everybody = frozenset(CLIENTS)
        return weighted_mean(self.session, self.keys, everybody, everybody, total, revealed) * len(CLIENTS)


def test_invented_clients_are_refused_where_keys_are_required(tmp_path: Path, values: NDArray[np.float32]) -> None:
    for node in ({}, policy(tmp_path)):
        context = context_of(tmp_path, values, node)
        with pytest.raises(PolicyError, match=r"require_peer_keys = true.*aggregate-only.*identity_key and peer_keys"):
            InventedClients(session_for(context)).read_victim(context)
    context = context_of(tmp_path, values, keys(tmp_path))
    with pytest.raises(AggregationError, match=r"books|coffee"):
        InventedClients(session_for(context)).read_victim(context)


def test_an_owner_who_does_without_keys_trusts_the_server(tmp_path: Path, values: NDArray[np.float32]) -> None:
    """The attack works: it is what require_peer_keys is for."""
    context = context_of(tmp_path, values, policy(tmp_path, "require_peer_keys = false"))
    assert np.abs(InventedClients(session_for(context)).read_victim(context) - values).max() < 1e-7


ANOTHER_SESSION: list[tuple[dict[str, Any], str]] = [
    ({"coefficients": {"beauty": 0.4, "books": 0.2, "camping": 0.2, "coffee": 0.2}}, r"0\.4 .* 1 of 4 agreed"),
    ({"coefficients": dict.fromkeys(("beauty", "books", "camping", "toys"), 0.25)}, "toys"),
    ({"coefficients": dict.fromkeys(("books", "camping", "coffee", "toys"), 0.25)}, "books, camping, coffee, toys"),
    ({"threshold": 4}, "threshold of 4, 3 agreed"),
    ({"value_range": 4.0}, "range of 4, 8 agreed"),
    ({"total_weight": 90.0}, "total weight of 90, 1 of 4 agreed"),
    ({"agreement": "{}"}, r"'?dp'?.*none"),
]


@pytest.mark.parametrize(("changes", "told"), ANOTHER_SESSION)
def test_a_client_holds_the_session_to_its_run_configuration(
    tmp_path: Path, values: NDArray[np.float32], changes: dict[str, Any], told: str
) -> None:
    node, names = policy(tmp_path, "require_peer_keys = false"), (*CLIENTS, "camping")
    context = context_of(tmp_path, values, node, domains__train=",".join(names))
    session = replace(session_for(context, weights=dict.fromkeys(names, 1.0)), **changes)
    before = deepcopy(context.state)
    with pytest.raises(PolicyError, match=f"domain beauty: .*{told}"):
        ask(secagg_advertise, secure_records.session_record(session), context)
    assert context.state == before


def test_a_client_holds_its_own_weight_and_the_round(tmp_path: Path, values: NDArray[np.float32]) -> None:
    """With weights by users every client vouches for its own; the others cannot be told another total."""
    own = policy(tmp_path, "require_peer_keys = false")
    names = (*CLIENTS, "camping")
    rounds: dict[str, Any] = {"rounds__rule": "weighted-average", "rounds__weights": "users"}
    context = context_of(tmp_path, values, own, domains__train=",".join(names), **rounds)
    weights = {"beauty": float(NUM_USERS), "books": 50.0, "camping": 40.0, "coffee": 25.0}
    ask(secagg_advertise, secure_records.session_record(session_for(context, 1, weights)), context)
    for wrong in (session_for(context, 1, {**weights, VICTIM: 31.0}), session_for(context, 2, weights)):
        with pytest.raises(PolicyError, match=r"domain beauty"):
            ask(secagg_advertise, secure_records.session_record(wrong), context)


def test_a_session_of_fewer_clients_than_the_run_needs_is_refused(tmp_path: Path, values: NDArray[np.float32]) -> None:
    own = policy(tmp_path, "require_peer_keys = false")
    names = ",".join((*CLIENTS, "camping"))
    context = context_of(tmp_path, values, own, domains__train=names, server__min_train_clients=4)
    with pytest.raises(PolicyError, match=r"3 clients, at least 4 agreed .*server\.min_train_clients"):
        ask(secagg_advertise, secure_records.session_record(session_for(context)), context)


def outcome(place: Path, values: NDArray[np.float32], value_range: float, told_by: str) -> str:
    """Return what the server sees of a client that is asked for masked values with a range."""
    node = policy(place, "require_peer_keys = false")
    noise = {"dp__mode": "domain-local", "dp__delta": 1e-3, "dp__noise_multiplier": value_range / 16}  # sets a range
    context = context_of(place, values, node, **noise if told_by == "run" else {})
    session = session_for(context)
    if told_by == "session":
        session = replace(session, value_range=value_range)
    try:
        InventedClients(session).ask_for_masked(context)
    except FedMergeError as error:
        return f"{type(error).__name__}: {error}".replace(str(place), "")
    return "masked values"


@pytest.mark.parametrize("told_by", ["session", "run"])
def test_the_range_tells_nothing_about_the_values(tmp_path: Path, values: NDArray[np.float32], told_by: str) -> None:
    """A refusal of values out of range gave the largest one in 17 questions, by halving."""
    low, high = 0.0, 15.0
    larger = values * 90  # up to 8.9
    for name in ("small", "large"):
        (tmp_path / name).mkdir()
    for _ in range(17):
        middle = (low + high) / 2
        small, large = (outcome(tmp_path / n, v, middle, told_by) for n, v in (("small", values), ("large", larger)))
        assert small == large, f"the server learns that the largest value is above {middle}"
        assert (large == "masked values") == (told_by == "run")  # else the range is not the agreed one
        low, high = (middle, high) if large == "masked values" else (low, middle)


def test_a_session_gets_one_masked_answer_whatever_the_node_remembers(
    tmp_path: Path, values: NDArray[np.float32]
) -> None:
    context = context_of(tmp_path, values, policy(tmp_path, "require_peer_keys = false"))
    server = InventedClients(session_for(context))
    server.ask_for_masked(context)
    with pytest.raises(AggregationError):
        ask(secagg_masked, server.relayed, context)
    record = context.state.config_records["secure sum"]
    record["state"] = str(record["state"]).replace('"step": "masked"', '"step": "shared"')  # as before the answer
    with pytest.raises(PolicyError, match="domain beauty"):
        ask(secagg_masked, server.relayed, context)
