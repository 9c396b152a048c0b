"""Secure sums: what comes out, what the parties see, and what they refuse."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from secagg_parties import ADVERTISE, MASK, SHARE, UNMASK, run_session

from fedmerge.errors import AggregationError, PolicyError
from fedmerge.privacy.secagg.client import advertise, mask_values, share, unmask
from fedmerge.privacy.secagg.crypto import (
    agree_on_key,
    mask,
    new_secret,
    public_key,
    restore_secret,
    seal,
    split_secret,
    unseal,
)
from fedmerge.privacy.secagg.masks import apply_masks, pair_mask, self_mask
from fedmerge.privacy.secagg.server import (
    add_values,
    check_advertisement,
    check_boxes,
    check_revealed,
    new_session,
    weighted_mean,
)
from fedmerge.privacy.secagg.session import Session, decode_mean, default_threshold, encode_values, num_outside
from fedmerge.privacy.secagg.state import Advertisement, Revealed

Vector = NDArray[np.float64]


def session_of(num_clients: int, num_values: int = 40, **changes: Any) -> Session:
    weights = {f"client {k:02}": 1.0 + k % 3 * (num_clients > 3) for k in range(num_clients)}
    arguments: dict[str, Any] = {"weights": weights, "num_values": num_values, "value_range": 8.0, **changes}
    return new_session(**arguments)


def random_values(session: Session, seed: int = 0) -> dict[str, Vector]:
    rng = np.random.default_rng(seed)
    return {client: rng.uniform(-0.1, 0.1, session.num_values) for client in session.clients}


def plain_mean(session: Session, values: Mapping[str, Vector], survivors: set[str]) -> Vector:
    """Return the result of an aggregation that sees everything."""
    summed = sum(session.coefficients[client] * values[client] for client in survivors)
    return np.asarray(summed / sum(session.coefficients[client] for client in survivors))


# what comes out


@pytest.mark.parametrize("num_clients", [3, 4, 7, 12])
def test_a_secure_sum_is_the_plain_weighted_mean_to_the_stated_tolerance(num_clients: int) -> None:
    session = session_of(num_clients)
    values = random_values(session)
    mean = run_session(session, values).mean
    assert mean is not None
    assert np.abs(mean - plain_mean(session, values, set(values))).max() <= session.tolerance
    assert session.tolerance < 4.0e-9 * num_clients


DROPS: list[dict[str, str]] = [
    {"client 00": ADVERTISE},
    {"client 01": SHARE},
    {"client 02": MASK},
    {"client 03": UNMASK},
    {"client 00": ADVERTISE, "client 01": SHARE},
    {"client 05": MASK, "client 06": MASK, "client 00": UNMASK},
    {"client 00": ADVERTISE, "client 02": SHARE, "client 04": MASK},
    {"client 01": UNMASK, "client 03": UNMASK, "client 05": UNMASK},
]


@pytest.mark.parametrize("drops", DROPS, ids=lambda drops: " ".join(f"{k[-1]}:{v}" for k, v in drops.items()))
def test_clients_may_drop_out_at_every_step(drops: dict[str, str]) -> None:
    session = session_of(7)
    values = random_values(session, 1)
    seen = run_session(session, values, drops)
    survivors = {client for client in values if drops.get(client, UNMASK) == UNMASK}
    assert set(seen.masked) == survivors
    assert seen.mean is not None
    share_of_sum = sum(session.coefficients[client] for client in survivors)
    assert np.abs(seen.mean - plain_mean(session, values, survivors)).max() <= session.tolerance / share_of_sum
    exact = np.zeros(session.num_values, np.uint32)
    for client in survivors:
        exact += encode_values(session, client, values[client])
    assert np.array_equal(seen.mean, decode_mean(session, exact, frozenset(survivors)))  # masks leave nothing behind


@pytest.mark.parametrize("drops", [{0: MASK, 1: MASK, 2: MASK}, {0: ADVERTISE, 1: SHARE, 2: MASK}])
def test_too_many_dropouts_end_the_sum(drops: dict[int, str]) -> None:
    session = session_of(5, weights={f"client {k:02}": 1.0 for k in range(5)})
    gone = {f"client {k:02}": step for k, step in drops.items()}
    with pytest.raises(AggregationError, match=r"2 of 5 clients \(client 03, client 04\).* 3\b"):
        run_session(session, random_values(session), gone)
    with pytest.raises(AggregationError, match=r"unmasking: .* 2 clients .* 3\b"):
        run_session(session, random_values(session), {f"client {k:02}": UNMASK for k in range(3)})


def test_a_dropout_that_leaves_the_weight_of_two_ends_the_sum() -> None:
    session = new_session({"a": 5, "b": 1, "c": 5, "d": 5}, 40, 8.0)  # 3.37 equal ones; without d 2.37
    with pytest.raises(AggregationError, match=r"3 clients .* 2\.37 .* 45%") as caught:
        run_session(session, random_values(session), {"d": MASK})
    assert "rounds.weights" in str(caught.value)


@given(st.integers(4, 60), st.floats(1e-3, 1e6), st.sampled_from([-1.0, 1.0]), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_no_sum_overflows_even_at_the_ends_of_the_range(clients: int, range_: float, sign: float, seed: int) -> None:
    weights = dict(zip(map(str, range(clients)), np.random.default_rng(seed).uniform(0.5, 1, clients), strict=True))
    session = new_session(weights, 1, range_)
    ends = np.full(1, sign * range_)
    total = np.zeros(1, np.uint32)
    survivors: frozenset[str] = frozenset()
    for client in session.clients:
        total += encode_values(session, client, ends)
        survivors |= {client}
        share_of_sum = sum(session.coefficients[each] for each in survivors)
        assert np.abs(decode_mean(session, total, survivors) - ends).max() <= session.tolerance / share_of_sum


# what the server sees


def test_masked_values_are_uniform() -> None:
    """Use the most revealing input: all zeros at one client, one constant at another."""
    session = session_of(4, num_values=20_000)
    values = {client: np.full(session.num_values, k / 4) for k, client in enumerate(session.clients)}
    seen = run_session(session, values)
    for client, sent in seen.masked.items():
        counts = np.bincount(sent.view(np.uint8), minlength=256)
        assert stats.chisquare(counts).pvalue > 1e-6, client
        assert stats.kstest(sent / 2**32, "uniform").pvalue > 1e-6, client
        ones = np.unpackbits(sent.view(np.uint8)).reshape(-1, 32).mean(axis=0)
        assert np.abs(ones - 0.5).max() < 6 * 0.5 / np.sqrt(session.num_values)
        plain = encode_values(session, client, values[client])
        assert stats.kstest(plain / 2**32, "uniform").pvalue < 1e-6  # the tests see what is not uniform
    left, right = list(seen.masked.values())[:2]
    assert abs(stats.spearmanr(left, right).statistic) < 6 / np.sqrt(session.num_values)


def test_the_same_values_look_different_in_every_session() -> None:
    values = random_values(session_of(3))
    first, second = (run_session(session_of(3), values).masked for _ in range(2))
    assert all((first[client] == second[client]).mean() < 0.1 for client in first)


def test_the_server_and_the_colluding_see_the_same_whatever_the_others_values_are() -> None:
    """The definition, by a coupling.

    Two inputs of the honest clients with one sum. For every draw of the masks there is a draw, equally likely (a shift
    of uniform masks that nobody else knows is a bijection), under which the view is the same to the last bit: so the
    views have one distribution. The masks that may be shifted are those between honest clients, and the self mask of
    an honest client that dropped out late, whose masked values arrived and are not in the sum.
    """
    rng = np.random.default_rng(7)
    size = 50
    honest, colluding, late = ["a", "c", "e"], ["b", "d"], "f"
    everybody = sorted([*honest, *colluding, late])

    def uniform() -> NDArray[np.uint32]:
        return rng.integers(0, 2**32, size, dtype=np.uint32)

    own = {client: uniform() for client in everybody}
    pairs = {pair: uniform() for pair in combinations(everybody, 2)}
    values = {client: rng.integers(0, 2**20, size, dtype=np.uint32) for client in everybody}
    others = {**values, "a": uniform(), "c": uniform(), late: uniform()}
    others["e"] = values["a"] + values["c"] + values["e"] - others["a"] - others["c"]  # the same sum

    shifted, shifted_own = dict(pairs), dict(own)
    carried = np.zeros(size, np.uint32)
    for left, right in pairwise(honest):  # along a path through the honest clients
        carried += others[left] - values[left]
        shifted[left, right] = pairs[left, right] - carried
    shifted_own[late] = own[late] - (others[late] - values[late])

    def view(inputs: Mapping[str, Any], own: Mapping[str, Any], pairs: Mapping[tuple[str, str], Any]) -> list[Any]:
        """Masked values of all; self masks of those in the sum; masks with the colluding and with who dropped out."""
        sent = []
        for client in everybody:
            with_peers = {peer: pairs[min(client, peer), max(client, peer)] for peer in everybody if peer != client}
            sent.append(apply_masks(inputs[client], own[client], with_peers, client))
        known = [own[client] for client in everybody if client != late]
        known += [pair for names, pair in pairs.items() if {*names} & {*colluding, late}]
        return [*sent, *known, sum(inputs[client] for client in [*honest, *colluding])]

    first, second = view(values, own, pairs), view(others, shifted_own, shifted)
    assert all(np.array_equal(left, right) for left, right in zip(first, second, strict=True))
    assert any(not np.array_equal(values[client], others[client]) for client in honest)


def test_fewer_colluding_clients_than_the_threshold_cannot_tell_which_secret_is_shared() -> None:
    """Whatever t − 1 clients hold, every other secret has shares that agree with it; t − 1 of them always do."""
    threshold, num_clients = 3, 5
    secret, other = new_secret(), new_secret()
    shares = dict(enumerate(split_secret(secret, threshold, num_clients), 1))
    for held in combinations(shares, threshold - 1):
        points = {0: other, **{number: shares[number] for number in held}}
        forged = {number: interpolated(points, number) for number in shares}
        assert all(forged[number] == shares[number] for number in held)
        assert restore_secret({number: forged[number] for number in list(shares)[-threshold:]}, threshold) == other
    assert restore_secret(shares, threshold) == secret


def test_as_many_colluding_clients_as_the_threshold_can_take_the_masks_off() -> None:
    """The bound is sharp: t of them, with the server, read everybody's values."""
    session = session_of(5)
    values = random_values(session, 3)
    seen = run_session(session, values)
    target, *colluding = session.clients
    held = [seen.states[client].held[target] for client in colluding[: session.threshold]]
    numbers = [session.number(client) for client in colluding[: session.threshold]]
    mask_secret, self_secret = (
        restore_secret({n: getattr(each, name) for n, each in zip(numbers, held, strict=True)}, session.threshold)
        for name in ("mask_key", "self_mask")
    )
    pairs = {
        peer: pair_mask(session, target, mask_secret, peer, keys.mask_key)
        for peer, keys in seen.advertisements.items()
        if peer != target
    }
    bare = seen.masked[target] - apply_masks(
        np.zeros(session.num_values, np.uint32), self_mask(session, self_secret), pairs, target
    )
    assert np.array_equal(bare, encode_values(session, target, values[target]))


# the pieces


def product(left: int, right: int) -> int:
    """In GF(2^128) modulo x^128 + x^7 + x^2 + x + 1, bit by bit."""
    found = 0
    for bit in reversed(range(128)):
        found <<= 1
        if found >> 128:
            found ^= (1 << 128) | 0b10000111
        if right >> bit & 1:
            found ^= left
    return found


@cache
def inverse(value: int) -> int:
    """value^(2^128 − 2)."""
    found = 1
    for bit in reversed(range(128)):
        found = product(found, found)
        if bit:
            found = product(found, value)
    return found


def interpolated(points: Mapping[int, bytes], at: int) -> bytes:
    """Lagrange's polynomial through some points, at another one."""
    total = 0
    for number, share_ in points.items():
        term = int.from_bytes(share_, "big")
        for other in points:
            if other != number:
                term = product(term, product(at ^ other, inverse(number ^ other)))
        total ^= term
    return total.to_bytes(16, "big")


@pytest.mark.parametrize(("threshold", "num_shares"), [(2, 3), (3, 5), (6, 10)])
def test_shares_of_secrets_agree_with_another_implementation(threshold: int, num_shares: int) -> None:
    secret = new_secret()
    shares = dict(enumerate(split_secret(secret, threshold, num_shares), 1))
    chosen = list(shares.items())[-threshold:]
    assert interpolated(dict(chosen), 0) == secret == restore_secret(dict(chosen), threshold)
    assert interpolated(dict(chosen), 1) == shares[1]  # one polynomial of degree threshold − 1
    assert interpolated(dict(chosen[1:]), 0) != secret
    with pytest.raises(AggregationError, match=f" {threshold - 1} shares .* {threshold}\\b"):
        restore_secret(dict(chosen[1:]), threshold)


def test_both_ends_agree_on_a_key_and_on_nothing_else() -> None:
    left, right = new_secret(), new_secret()
    key = agree_on_key(left, public_key(right), b"pair", b"a")
    assert key == agree_on_key(right, public_key(left), b"pair", b"a")
    assert (
        len({key, agree_on_key(left, public_key(right), b"pair", b"b"), agree_on_key(left, public_key(right), b"p")})
        == 3
    )
    assert agree_on_key(left, public_key(right), b"ab", b"c") != agree_on_key(left, public_key(right), b"a", b"bc")
    assert np.array_equal(mask(key, 5, b"x"), mask(key, 5, b"x"))
    assert not np.array_equal(mask(key, 5, b"x"), mask(key, 5, b"y"))
    with pytest.raises(AggregationError, match="X25519"):
        agree_on_key(left, bytes(32), b"pair")
    with pytest.raises(AggregationError, match="X25519"):
        agree_on_key(left, b"short", b"pair")


def test_sealed_shares_open_for_their_receiver_alone() -> None:
    key = agree_on_key(new_secret(), public_key(new_secret()))
    box = seal(key, b"shares", b"a to b")
    assert unseal(key, box, b"a to b") == b"shares"
    changed = box[:-1] + bytes([box[-1] ^ 1])
    for wrong in ((key, box, b"b to a"), (bytes(32), box, b"a to b"), (key, changed, b"a to b"), (key, b"", b"a to b")):
        with pytest.raises(AggregationError, match="sealed"):
            unseal(*wrong)


# Errors

BAD_SESSIONS: list[tuple[dict[str, Any], str]] = [
    ({"identifier": b"short"}, " 5 bytes.* 32"),
    ({"coefficients": {"a": 0.5, "b": 0.5}, "threshold": 2}, " 2 clients.* 3"),
    ({"threshold": 2}, " 2, .* 3 to 5.* 5 clients"),
    ({"threshold": 6}, " 6, .* 3 to 5"),
    ({"coefficients": dict.fromkeys("abcde", 0.3)}, r"0\.3.* 1\b"),
    ({"coefficients": dict(zip("abcde", (0.5, 0.5, 0.0, 0.1, 0.1), strict=True))}, r"0\.5, 0\.5, 0, 0\.1"),
    ({"coefficients": dict.fromkeys("abcde", 1e-12)}, r"1e-12.* 1\b"),
    ({"total_weight": 0.0}, " 0, .* above 0"),
    ({"num_values": 0}, " 0 values .*±8"),
    ({"value_range": float("inf")}, "±inf"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_SESSIONS)
def test_invalid_sessions_are_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(AggregationError, match=message):
        replace(session_of(5), **changes)


def test_a_client_that_outweighs_the_others_and_values_that_do_not_fit() -> None:
    assert [default_threshold(number) for number in (3, 4, 5, 10)] == [2, 3, 3, 6]
    few: list[tuple[dict[str, float], str]] = [
        ({"a": 8, "b": 1, "c": 1}, r"1\.52 .* a with 80%"),
        ({"a": 2, "b": 1, "c": 1}, r"2\.67 .* a with 50%"),
        ({"a": 55, **dict.fromkeys("bcdefghij", 5.0)}, r"3\.08 .* a with 55%"),
    ]
    for weights, values in few:
        with pytest.raises(AggregationError, match=values) as caught:
            new_session(weights, 2, 1.0)
        assert "rounds.weights = 'equal'" in str(caught.value)
    session = session_of(3, 2)
    for wrong in (np.array([np.nan, 0.0]), np.array([-np.inf, 0.0])):
        with pytest.raises(AggregationError, match="client 00"):
            encode_values(session, "client 00", wrong)
    assert num_outside(session, np.array([8.1, -9.0])) == 2
    assert np.array_equal(
        encode_values(session, "client 00", np.array([8.1, -1e30])),
        encode_values(session, "client 00", np.array([8.0, -8.0])),
    )
    with pytest.raises(AggregationError, match=r"\(3,\).*\(2,\)"):
        encode_values(session, "client 00", np.zeros(3))
    with pytest.raises(AggregationError, match=r"'x'.*client 00, client 01, client 02"):
        advertise(session, "x")


def test_a_client_answers_each_question_once_and_in_turn() -> None:
    session = session_of(3)
    values = random_values(session)
    seen = run_session(session, values)
    state = seen.states["client 00"]
    for again in (
        lambda: share(state, seen.advertisements),
        lambda: mask_values(state, {}, values["client 00"]),
        lambda: unmask(replace(state, step="shared"), session.clients),
    ):
        with pytest.raises(AggregationError, match=r"'\w+'"):
            again()


def test_a_client_reveals_one_secret_of_a_peer_and_nothing_for_too_few() -> None:
    session = session_of(6)
    seen = run_session(session, random_values(session), {"client 05": MASK})
    state = seen.states["client 00"]
    survivors = [f"client {k:02}" for k in range(5)]
    revealed = unmask(state, survivors)
    assert set(revealed.self_masks) == set(survivors)
    assert set(revealed.mask_keys) == {"client 05"}
    with pytest.raises(AggregationError, match=r"masked values: .*3 of 6 clients .* 4\b"):
        unmask(state, survivors[:3])
    with pytest.raises(AggregationError, match=r"stranger.*client 00"):
        unmask(state, [*survivors, "stranger"])
    with pytest.raises(PolicyError, match="client 00"):
        unmask(state, [f"client {k:02}" for k in range(1, 5)])


def test_a_client_refuses_replaced_keys_and_boxes() -> None:
    session = session_of(4)
    made = {client: advertise(session, client) for client in session.clients}
    keys = {client: keys for client, (_, keys) in made.items()}
    state = made["client 00"][0]
    strange = Advertisement(public_key(new_secret()), public_key(new_secret()))
    with pytest.raises(AggregationError, match="client 00"):
        share(state, {**keys, "client 00": strange})
    with pytest.raises(AggregationError, match="key"):
        share(state, {**keys, "client 01": keys["client 02"]})
    with pytest.raises(AggregationError, match=r"keys: .*2 of 4 clients"):
        share(state, {client: keys[client] for client in ("client 00", "client 01")})
    shared = {client: share(each, keys) for client, (each, _) in made.items()}
    mine = {peer: boxes["client 00"] for peer, (_, boxes) in shared.items() if peer != "client 00"}
    others = {**mine, "client 01": shared["client 01"][1]["client 02"]}
    with pytest.raises(AggregationError, match="sealed"):
        mask_values(shared["client 00"][0], others, np.zeros(session.num_values))
    swapped = {**mine, "client 01": mine["client 02"]}
    with pytest.raises(AggregationError, match="sealed"):
        mask_values(shared["client 00"][0], swapped, np.zeros(session.num_values))


def test_signed_keys_keep_a_server_from_taking_a_clients_place() -> None:
    session = session_of(3)
    identities = {client: Ed25519PrivateKey.generate() for client in session.clients}
    registered = {client: identity.public_key() for client, identity in identities.items()}
    made = {client: advertise(session, client, identity) for client, identity in identities.items()}
    keys = {client: keys for client, (_, keys) in made.items()}
    state = made["client 00"][0]
    share(state, keys, registered)
    forged = replace(keys["client 01"], mask_key=public_key(new_secret()))
    share(state, {**keys, "client 01": forged})  # unsigned keys are trusted
    for wrong in (forged, replace(forged, signature=b""), replace(forged, signature=keys["client 02"].signature)):
        with pytest.raises(AggregationError, match="client 01"):
            share(state, {**keys, "client 01": wrong}, registered)
    other = advertise(session_of(3), "client 01", identities["client 01"])[1]  # of another session
    with pytest.raises(AggregationError, match="client 01"):
        share(state, {**keys, "client 01": other}, registered)
    with pytest.raises(AggregationError, match="client 02"):
        share(state, keys, {client: key for client, key in registered.items() if client != "client 02"})


def test_the_server_refuses_malformed_answers() -> None:
    session = session_of(3, 4)
    keys = run_session(session, random_values(session)).advertisements
    with pytest.raises(AggregationError, match=r"client a: .* 32 and 5 bytes.* 32"):
        check_advertisement("a", Advertisement(bytes(32), b"short"))
    with pytest.raises(AggregationError, match=r" client 01, .* client 01, client 02"):
        check_boxes("client 00", {"client 01": b""}, keys)
    total = np.zeros(4, np.uint32)
    wrong: Any
    for wrong in (np.zeros(3, np.uint32), np.zeros(4, np.int64)):
        with pytest.raises(AggregationError, match=r"uint32 of \(4,\)"):
            add_values(session, "client 00", total, wrong)
    everybody = frozenset(session.clients)
    for revealed in (
        Revealed({}, {}),
        Revealed(dict.fromkeys(everybody, bytes(16)), {"client 00": bytes(16)}),
        Revealed(dict.fromkeys(everybody, bytes(15)), {}),
    ):
        with pytest.raises(AggregationError, match=r"client 01: .* 3 and 0 of 16"):
            check_revealed("client 01", revealed, everybody, everybody)


def wrong_share(revealed: Revealed, part: str) -> Revealed:
    wrong = {client: bytes(16) for client in getattr(revealed, part)}
    return replace(revealed, **{part: wrong})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda revealed: wrong_share(revealed, "self_masks"), "sum"),
        (lambda revealed: wrong_share(revealed, "mask_keys"), "client 04"),
    ],
)
def test_a_wrong_share_is_noticed(spoil: Callable[[Revealed], Revealed], message: str) -> None:
    session = session_of(5)
    seen = run_session(session, random_values(session), {"client 04": MASK})
    total = sum(seen.masked.values(), np.zeros(session.num_values, np.uint32))
    revealed = {**seen.revealed, "client 00": spoil(seen.revealed["client 00"])}
    with pytest.raises(AggregationError, match=message):
        weighted_mean(session, seen.advertisements, frozenset(seen.boxes), frozenset(seen.masked), total, revealed)


def test_a_state_keeps_its_secrets_out_of_logs() -> None:
    state, keys = advertise(session_of(3), "client 00")
    state, _ = share(
        state, {**{name: advertise(state.session, name)[1] for name in state.session.clients}, "client 00": keys}
    )
    shown = repr(state)
    for secret in (state.channel_secret, state.mask_secret, state.self_secret, state.own.self_mask):  # type: ignore[union-attr]  # it has shared
        assert repr(secret)[2:-1] not in shown
