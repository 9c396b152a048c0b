"""Merges made through the clients: the cohort, gradients of coefficients, and readings of layer maps."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedmerge.adapter import Adapter
from fedmerge.config import DOMAIN_NAME
from fedmerge.errors import ClientError, LayoutMismatchError
from sim.app.messages.records.adapters import model_records, read_models
from sim.app.messages.records.arrays import read_tensor
from sim.app.messages.records.fields import FACTS, ONE_VERSION, read_config, read_dataclass
from sim.app.messages.records.training import is_number

COHORT = "query.cohort"
GRADIENT = "query.gradient"
LAYER_MAP = "query.layer_map"
_COEFFICIENTS = "coefficients"
_USERS = "users"
_MAP = "map"


@dataclass(frozen=True)
class GradientRequest:
    """A request for a step of learning through the clients.

    Attributes:
        label: of the merge whose coefficients are learned.
        cohort_sha256: hash of the cohort that the client has received.
        step: the first step, from 0.
        num_steps: number of steps that the client makes by itself; 0 to return the gradient.
    """

    label: str
    cohort_sha256: str
    step: int
    num_steps: int


@dataclass(frozen=True)
class LayerMapRequest:
    """A request to read a map.

    Attributes:
        cohort_sha256: hash of the cohort that the client has received, from whose adapters it makes the candidates.
        shard: number of the shard of its searching users; -1 for the other users, who choose.
    """

    cohort_sha256: str
    shard: int


def cohort_record(adapters: Mapping[str, Adapter]) -> RecordDict:
    """Make the record of the cohort's adapters, by domain."""
    return RecordDict({**model_records(adapters)})


def read_cohort(content: RecordDict) -> dict[str, Adapter]:
    """Inverse of :func:`cohort_record`.

    Raises:
        ClientError, LayoutMismatchError: another form, or a label that is not a domain name, since labels name folders.
    """
    adapters = read_models(content)
    if strange := [label for label in adapters if not re.fullmatch(DOMAIN_NAME, label)]:
        raise ClientError(
            f"the cohort names a domain {strange[0]!r}, expected letters, digits, '.', '_', '-'; it was not kept"
        )
    return adapters


def pseudo_users_record(number: int) -> RecordDict:
    """Make the record of a client's number of pseudo-users; 0 if it learns on its own users."""
    return RecordDict({FACTS: ConfigRecord({"num_pseudo_users": number})})


def read_pseudo_users(content: RecordDict) -> int:
    """Inverse of :func:`pseudo_users_record`.

    Raises:
        ClientError: another form.
    """
    number = read_config(content, FACTS).get("num_pseudo_users")
    if type(number) is not int or number < 0:
        raise ClientError(f"its number of pseudo-users is {number!r}, expected a count; {ONE_VERSION}")
    return number


def gradient_request_record(
    request: GradientRequest, coefficients: torch.Tensor, students: torch.Tensor, users: Sequence[int]
) -> RecordDict:
    """Make a request for a gradient.

    Args:
        request: the step.
        coefficients: (K,) or (K, G), at which the gradient is taken.
        students: (K,) or (K, G), under which the item vectors are encoded.
        users: the client's pseudo-users of the step; none if it draws them itself.
    """
    arrays = {"at": _coefficient_array(coefficients), "students": _coefficient_array(students)}
    drawn = {_USERS: ConfigRecord({"indices": list(users)})} if users else {}
    return RecordDict({FACTS: ConfigRecord(asdict(request)), _COEFFICIENTS: ArrayRecord(arrays), **drawn})


def read_gradient_request(
    content: RecordDict,
) -> tuple[GradientRequest, torch.Tensor, torch.Tensor, list[int]]:
    """Inverse of :func:`gradient_request_record`; coefficients have two axes.

    Raises:
        ClientError, LayoutMismatchError: another form.
    """
    at, students = (_read_coefficients(content, name) for name in ("at", "students"))
    indices: Any = read_config(content, _USERS).get("indices") if _USERS in content else []
    if not isinstance(indices, list) or not all(type(index) is int for index in indices):
        raise ClientError(f"the request for a gradient names no pseudo-users; {ONE_VERSION}")
    return read_dataclass(GradientRequest, dict(read_config(content, FACTS))), at, students, indices


def gradient_record(found: torch.Tensor) -> RecordDict:
    """Make the record of an answer: gradient or change of the coefficients, (K,) or (K, G) float32."""
    return RecordDict({_COEFFICIENTS: ArrayRecord({"answer": _coefficient_array(found)})})


def read_gradient(content: RecordDict) -> torch.Tensor:
    """Inverse of :func:`gradient_record`; with two axes.

    Raises:
        ClientError, LayoutMismatchError: another form.
    """
    return _read_coefficients(content, "answer")


def layer_map_request_record(request: LayerMapRequest, layer_map: Sequence[int]) -> RecordDict:
    """Make a request to read a map: the index of a candidate for each of G groups."""
    return RecordDict({FACTS: ConfigRecord(asdict(request)), _MAP: ConfigRecord({"candidates": list(layer_map)})})


def read_layer_map_request(content: RecordDict) -> tuple[LayerMapRequest, list[int]]:
    """Inverse of :func:`layer_map_request_record`; the client checks the indices against its candidates.

    Raises:
        ClientError: another form.
    """
    indices: Any = read_config(content, _MAP).get("candidates")
    if not isinstance(indices, list) or not all(type(index) is int for index in indices):
        raise ClientError(f"the request to read a layer map holds no map; {ONE_VERSION}")
    return read_dataclass(LayerMapRequest, dict(read_config(content, FACTS))), indices


def layer_map_record(num_users: int, ndcg: float) -> RecordDict:
    """Make the record of an answer: number of users, and the sum of their NDCG@10."""
    return RecordDict({FACTS: ConfigRecord({"num_users": num_users, "ndcg": ndcg})})


def read_layer_map(content: RecordDict) -> tuple[int, float]:
    """Inverse of :func:`layer_map_record`.

    Raises:
        ClientError: another form, or a sum that these users cannot have.
    """
    facts = read_config(content, FACTS)
    num_users, ndcg = facts.get("num_users"), facts.get("ndcg")
    if {*facts} != {"num_users", "ndcg"} or type(num_users) is not int or not is_number(ndcg):
        raise ClientError(f"its answer about a layer map is not a number of users and a sum; {ONE_VERSION}")
    total = float(ndcg)  # type: ignore[arg-type]  # as checked
    if num_users < 1 or not math.isfinite(total) or not 0 <= total <= num_users:
        raise ClientError(
            f"its answer about a layer map is a sum of {total:g} over {num_users} users, expected 0 to their number; "
            f"{ONE_VERSION}, or check its client"
        )
    return num_users, total


def _coefficient_array(values: torch.Tensor) -> Array:
    """Return coefficients as (K, G) float32; (K,) travels as (K, 1), and the reader knows its own shape."""
    return Array(values.detach().cpu().float().reshape(len(values), -1).contiguous().numpy())


def _read_coefficients(content: RecordDict, name: str) -> torch.Tensor:
    arrays = content.array_records.get(_COEFFICIENTS)
    if arrays is None or name not in arrays:
        raise LayoutMismatchError(
            f"the message holds no coefficients {name!r} (records: {sorted(content)}); {ONE_VERSION}"
        )
    return read_tensor(arrays[name], name)
