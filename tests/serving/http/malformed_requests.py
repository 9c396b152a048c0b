"""Requests that no client should send: of each kind many, drawn from a seed. None of them is valid."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from fedmerge.seeding import generator
from fedmerge.serving.http.guard import BODY_BYTES

WRONG: tuple[Any, ...] = (None, True, -1, 1.5, "", [], [[]], {}, {"a": 1}, [None], 10**400, "\ud800", "é" * 20_000)
Choice = TypeVar("Choice")


@dataclass(frozen=True)
class Sent:
    """A request as it is sent; ``kind`` says what is wrong with it."""

    method: str
    path: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    kind: str = ""


def malformed_requests(number: int, item_id: str) -> Iterator[Sent]:
    """Yield requests that are valid but for one thing.

    Args:
        number: how many.
        item_id: an item of the catalog.
    """
    valid = (
        Sent("POST", "/recommend", _json({"history": [item_id]})),
        Sent("POST", "/compare", _json({"history": [item_id]})),
        Sent("POST", "/similar", _json({"item": item_id})),
        Sent("PUT", "/items", _json({"items": [{"item_id": "x", "attributes": {"title": "x"}}]})),
        Sent("POST", "/swap", _json({"model": "runs/none"})),
    )
    rng = generator(0, "malformed-requests")
    for turn in range(number):
        spoil = KINDS[turn % len(KINDS)]
        yield replace(spoil(_one(valid, rng), rng), kind=spoil.__name__)


def _random_bytes(valid: Sent, rng: np.random.Generator) -> Sent:
    return replace(valid, body=rng.bytes(int(rng.integers(1, 400))))


def _cut_off(valid: Sent, rng: np.random.Generator) -> Sent:
    return replace(valid, body=valid.body[: int(rng.integers(0, len(valid.body)))])


def _wrong_value(valid: Sent, rng: np.random.Generator) -> Sent:
    (name,) = json.loads(valid.body)
    return replace(valid, body=_json({name: [_one(WRONG, rng), {"title": _one(WRONG, rng)}]}))


def _unknown_field(valid: Sent, rng: np.random.Generator) -> Sent:
    return replace(valid, body=_json({**json.loads(valid.body), f"x{rng.integers(99)}": _one(WRONG, rng)}))


def _wrong_setting(valid: Sent, rng: np.random.Generator) -> Sent:
    name = _one(("k", "keep_seen", "only", "among", "exclude", "diversity", "popularity"), rng)
    history = [f"toys-i{number:05}" for number in range(3)]
    return Sent("POST", "/recommend", _json({"history": history, name: [_one(WRONG[:5], rng)]}))


def _nested(valid: Sent, rng: np.random.Generator) -> Sent:
    deep = (b"[" * 50_000, b"[" * 9_000 + b"]" * 9_000, b'{"history":' * 9_000 + b"1" + b"}" * 9_000)
    return replace(valid, body=_one(deep, rng))


def _no_number(valid: Sent, rng: np.random.Generator) -> Sent:
    number = _one((b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1", b"0x1"), rng)
    return Sent("POST", "/recommend", b'{"history": ["toys-i00001"], "diversity": %s}' % number)


def _not_utf8(valid: Sent, rng: np.random.Generator) -> Sent:
    place = valid.body.rindex(b'"')
    return replace(valid, body=valid.body[:place] + _one((b"\xff", b"\xc3", b"\xed\xa0\x80"), rng) + valid.body[place:])


def _too_large(valid: Sent, rng: np.random.Generator) -> Sent:
    return replace(valid, body=valid.body[:-1] + b" " * (BODY_BYTES + int(rng.integers(1000))) + b"}")


def _no_object(valid: Sent, rng: np.random.Generator) -> Sent:
    return replace(valid, body=_json(_one((None, 3, "text", [1], True, 10**400), rng)))


def _unknown_path(valid: Sent, rng: np.random.Generator) -> Sent:
    return replace(valid, path=_one(("/nothing", "/recommend/", "/recommend%00", "/..%2fetc/passwd", "/%ff"), rng))


def _wrong_method(valid: Sent, rng: np.random.Generator) -> Sent:
    return replace(valid, method=_one(("GET", "DELETE", "PATCH", "FROB"), rng))


def _wrong_content_type(valid: Sent, rng: np.random.Generator) -> Sent:
    return replace(valid, headers={"Content-Type": _one(("text/plain", "multipart/form-data", ""), rng)})


KINDS: tuple[Callable[[Sent, np.random.Generator], Sent], ...] = (
    _random_bytes,
    _cut_off,
    _wrong_value,
    _unknown_field,
    _wrong_setting,
    _nested,
    _no_number,
    _not_utf8,
    _too_large,
    _no_object,
    _unknown_path,
    _wrong_method,
    _wrong_content_type,
)


def _one(values: Sequence[Choice], rng: np.random.Generator) -> Choice:
    return values[int(rng.integers(len(values)))]


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()
