"""What travels between server and clients as Flower records; ``secure_records`` has what a secure sum adds.

No other file knows record keys.
"""

import hashlib
import io
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, ConfigRecordValues, RecordDict
from numpy.typing import NDArray

from fedmerge.adapter import Adapter, LoraModule
from fedmerge.config import DOMAIN_NAME, Split
from fedmerge.errors import ClientError, LayoutMismatchError
from fedmerge.evaluation.sums import VARIANTS, MetricSums, Variant, metric_sums_from_dict
from fedmerge.privacy.signatures import Signature
from fedmerge.privacy.transport import PIECES, Coding, pack, unpack

DESCRIBE = "query.describe"
CATALOG = "query.catalog"
TRAIN = "train"
EVALUATE = "evaluate"
COHORT = "query.cohort"
GRADIENT = "query.gradient"

OWN_EXPERT = "own"
FLOAT32 = Coding()

NOT_FRESH = -1  # a round starts from the adapter that is sent, whole

LARGEST_COUNT, LARGEST_NUMBER = 2**53, 1e30  # in a report

T = TypeVar("T")
T_Scalar = TypeVar("T_Scalar", bound=np.generic)

_ONE_VERSION = "use one fedmerge version everywhere"
_FACTS = "facts"
_ADAPTER = "adapter"
_SCALINGS = "scalings"
_MODELS = "models"
_ERROR = "error"
_SIGNATURE = "signature"
_COEFFICIENTS = "coefficients"
_USERS = "users"

_NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}

ModelRecords = dict[str, ArrayRecord | ConfigRecord]


@dataclass(frozen=True)
class Description:
    """What a client says it is.

    Attributes:
        domain: its name, empty for a client without a domain.
        role: ``train``, ``unseen`` or ``idle``.
        num_users, num_items, num_interactions: counts of the domain.
        synthetic: whether the domain says it is.
        catalog_sha256: content hash of the catalog.
        backbone_sha256: hash over the encoder's weights and tokenizer.
        precision: ``float32`` or ``bfloat16``.
        fedmerge_version: of the client.
        policy: the privacy policy that the client enforces.
        num_nodes: how many nodes there are in all, where the client knows: in a simulation; otherwise 0.
        layout_sha256: hash of the LoRA layout that it would train.
    """

    domain: str
    role: str
    num_users: int = 0
    num_items: int = 0
    num_interactions: int = 0
    synthetic: bool = False
    catalog_sha256: str = ""
    backbone_sha256: str = ""
    precision: str = ""
    fedmerge_version: str = ""
    policy: str = ""
    num_nodes: int = 0
    layout_sha256: str = ""


@dataclass(frozen=True)
class EvaluationRequest:
    """Which models to evaluate, on which split.

    Attributes:
        split: ``valid`` or ``test``.
        backbone: the backbone alone, too.
        expert_sha256: the client's own expert, too, by its hash, or as OWN_EXPERT where the server does not know that;
            empty for none.
        baselines: the sanity baselines, too.
    """

    split: Split
    backbone: bool
    expert_sha256: str
    baselines: bool


@dataclass(frozen=True)
class RoundRequest:
    """What a client is to do in a round.

    Attributes:
        number: of the round, from 1.
        num_rounds: in all.
        trained: ``A and B`` or ``B``.
        fresh_seed: the seed of a fresh adapter to start from; where the start's lora_B travels alone, of its lora_A;
            NOT_FRESH where all of it does.
    """

    number: int
    num_rounds: int
    trained: Literal["A and B", "B"]
    fresh_seed: int


@dataclass(frozen=True)
class GradientRequest:
    """Which step of learning through the clients a message is for.

    Attributes:
        label: of the merge whose coefficients are learned.
        cohort_sha256: the cohort that the client has received.
        step: the first step, from 0.
        num_steps: how many steps the client makes by itself; 0: it returns the gradient.
    """

    label: str
    cohort_sha256: str
    step: int
    num_steps: int


def description_record(description: Description) -> RecordDict:
    """A client's description."""
    return RecordDict({_FACTS: ConfigRecord(asdict(description))})


def read_description(content: RecordDict) -> Description:
    """Inverse of :func:`description_record`.

    Raises:
        ClientError: another form, for instance of another version.
    """
    return _dataclass(Description, _config(content, _FACTS))


def catalog_record(data: bytes) -> RecordDict:
    """A catalog as Parquet bytes."""
    return RecordDict({_FACTS: ConfigRecord({"catalog": data})})


def read_catalog(content: RecordDict) -> bytes:
    """Inverse of :func:`catalog_record`."""
    data = _config(content, _FACTS).get("catalog")
    if not isinstance(data, bytes):
        raise ClientError(f"its catalog came as {type(data).__name__}, expected bytes; {_ONE_VERSION}")
    return data


def expert_record(
    adapter: Adapter, report: Mapping[str, Any], coding: Coding = FLOAT32, only_B: bool = False
) -> RecordDict:
    """A trained adapter with the report of its training; with ``only_B`` its lora_A stays, which nobody trained."""
    arrays = _adapter_records(adapter, "", coding, only_B)
    return RecordDict({**arrays, _FACTS: ConfigRecord({"report": json.dumps(report)})})


def read_expert(
    content: RecordDict, coding: Coding = FLOAT32, like: Adapter | None = None, frozen: Adapter | None = None
) -> tuple[Adapter, dict[str, Any]]:
    """Inverse of :func:`expert_record`.

    Args:
        content: of the message.
        coding: how it was sent.
        like: an adapter of the expected layout, needed where it was not sent as float32.
        frozen: an adapter whose lora_A goes with the lora_B that was sent alone; None: both were sent.

    Raises:
        ClientError, LayoutMismatchError: another form.
    """
    report = read_report(content)
    return _read_adapter(content, "", coding, like, frozen), report


def read_report(content: RecordDict) -> dict[str, Any]:
    """The report of a training, with its adapter or without.

    Raises:
        ClientError: another form.
    """
    try:
        report = json.loads(str(_config(content, _FACTS).get("report")))
    except (ValueError, RecursionError) as error:
        raise ClientError(f"its training report is not JSON; {_ONE_VERSION}") from error
    if not isinstance(report, dict):
        raise ClientError(f"its training report is a {type(report).__name__}, expected an object; {_ONE_VERSION}")
    for key, (expected, fits) in _REPORT.items():
        if key in report and not fits(report[key]):
            raise ClientError(
                f"its training report has {key} = {json.dumps(report[key])[:80]}, expected {expected}; {_ONE_VERSION}"
            )
    return report


def report_record(report: Mapping[str, Any]) -> RecordDict:
    """The report of a training whose adapter stays at the client."""
    return RecordDict({_FACTS: ConfigRecord({"report": json.dumps(report)})})


def round_request_record(request: RoundRequest, start: Adapter | None, base: Adapter | None) -> RecordDict:
    """A round's request: the adapter to start from, None for a fresh one, and what is folded into the backbone."""
    adapters: ModelRecords = {}
    if start is not None:
        adapters |= _adapter_records(start, "start", only_B=request.trained == "B")
    if base is not None:
        adapters |= _adapter_records(base, "base")
    return RecordDict({_FACTS: ConfigRecord(asdict(request)), **adapters})


def read_round_request(
    content: RecordDict, fresh: Callable[[int], Adapter]
) -> tuple[RoundRequest, Adapter, Adapter | None]:
    """Inverse of :func:`round_request_record`.

    Args:
        content: of the message.
        fresh: makes the fresh adapter of a seed.

    Raises:
        ClientError, LayoutMismatchError: another form.
    """
    request = _dataclass(RoundRequest, dict(_config(content, _FACTS)))
    made = None if request.fresh_seed == NOT_FRESH else fresh(request.fresh_seed)
    frozen = made if request.trained == "B" else None
    start = _read_adapter(content, "start", frozen=frozen) if f"{_ADAPTER}start" in content else made
    if start is None:
        raise ClientError(f"the request holds neither an adapter to start from nor the seed of one; {_ONE_VERSION}")
    base = _read_adapter(content, "base") if f"{_ADAPTER}base" in content else None
    return request, start, base


def cohort_record(adapters: Mapping[str, Adapter]) -> RecordDict:
    """The cohort's adapters, by domain."""
    return RecordDict({**model_records(adapters)})


def read_cohort(content: RecordDict) -> dict[str, Adapter]:
    """Inverse of :func:`cohort_record`.

    Raises:
        ClientError, LayoutMismatchError: another form, or a label that is no name of a domain: they become folders.
    """
    adapters = _read_models(content)
    if strange := [label for label in adapters if not re.fullmatch(DOMAIN_NAME, label)]:
        raise ClientError(
            f"the cohort names a domain {strange[0]!r}, expected letters, digits, '.', '_', '-'; it was not kept"
        )
    return adapters


def pseudo_users_record(number: int) -> RecordDict:
    """How many pseudo-users a client has made; 0 where it learns on its own users."""
    return RecordDict({_FACTS: ConfigRecord({"num_pseudo_users": number})})


def read_pseudo_users(content: RecordDict) -> int:
    """Inverse of :func:`pseudo_users_record`.

    Raises:
        ClientError: another form.
    """
    number = _config(content, _FACTS).get("num_pseudo_users")
    if type(number) is not int or number < 0:
        raise ClientError(f"its number of pseudo-users is {number!r}, expected a count; {_ONE_VERSION}")
    return number


def gradient_request_record(
    request: GradientRequest, coefficients: torch.Tensor, students: torch.Tensor, users: Sequence[int]
) -> RecordDict:
    """A request for a gradient.

    Args:
        request: which step.
        coefficients: (K,) or (K, G), where the gradient is taken.
        students: likewise, under which the items' vectors are.
        users: the client's pseudo-users of the step; none where it draws itself.
    """
    arrays = {"at": _coefficient_array(coefficients), "students": _coefficient_array(students)}
    drawn = {_USERS: ConfigRecord({"indices": list(users)})} if users else {}
    return RecordDict({_FACTS: ConfigRecord(asdict(request)), _COEFFICIENTS: ArrayRecord(arrays), **drawn})


def read_gradient_request(
    content: RecordDict,
) -> tuple[GradientRequest, torch.Tensor, torch.Tensor, list[int]]:
    """Inverse of :func:`gradient_request_record`; coefficients have two axes.

    Raises:
        ClientError, LayoutMismatchError: another form.
    """
    at, students = (_read_coefficients(content, name) for name in ("at", "students"))
    indices: Any = _config(content, _USERS).get("indices") if _USERS in content else []
    if not isinstance(indices, list) or not all(type(index) is int for index in indices):
        raise ClientError(f"the request for a gradient names no pseudo-users; {_ONE_VERSION}")
    return _dataclass(GradientRequest, dict(_config(content, _FACTS))), at, students, indices


def gradient_record(found: torch.Tensor) -> RecordDict:
    """What a client answers: the gradient of the coefficients, or their change; (K,) or (K, G) float32."""
    return RecordDict({_COEFFICIENTS: ArrayRecord({"answer": _coefficient_array(found)})})


def read_gradient(content: RecordDict) -> torch.Tensor:
    """Inverse of :func:`gradient_record`; with two axes.

    Raises:
        ClientError, LayoutMismatchError: another form.
    """
    return _read_coefficients(content, "answer")


def model_records(adapters: Mapping[str, Adapter]) -> ModelRecords:
    """Adapters by label, as :func:`evaluation_request_record` takes them: made once, shared by all requests."""
    content: ModelRecords = {_MODELS: ConfigRecord({"labels": list(adapters)})}
    for number, adapter in enumerate(adapters.values()):
        content |= _adapter_records(adapter, str(number))
    return content


def evaluation_request_record(request: EvaluationRequest, models: ModelRecords) -> RecordDict:
    """A request to evaluate the models of :func:`model_records`."""
    return RecordDict({_FACTS: ConfigRecord(asdict(request)), **models})


def read_evaluation_request(content: RecordDict) -> tuple[EvaluationRequest, dict[str, Adapter]]:
    """Inverse of :func:`evaluation_request_record`."""
    facts = dict(_config(content, _FACTS))
    return _dataclass(EvaluationRequest, facts), _read_models(content)


def metric_sums_record(sums: Mapping[Variant, MetricSums]) -> RecordDict:
    """Metric sums of all variants."""
    return RecordDict(
        {_FACTS: ConfigRecord({variant: json.dumps(of_variant.to_dict()) for variant, of_variant in sums.items()})}
    )


def read_metric_sums(content: RecordDict) -> dict[Variant, MetricSums]:
    """Inverse of :func:`metric_sums_record`.

    Raises:
        ClientError: another form.
    """
    facts = _config(content, _FACTS)
    try:
        sums = {variant: metric_sums_from_dict(json.loads(str(facts[variant]))) for variant in VARIANTS}
    except (KeyError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ClientError(f"its metric sums are malformed ({type(error).__name__}: {error}); {_ONE_VERSION}") from error
    for variant, of_variant in sums.items():
        if of_variant.variant != variant:
            raise ClientError(f"its metric sums named {variant} are {of_variant.variant}; {_ONE_VERSION}")
        low, high = of_variant.sums.min(), of_variant.sums.max()
        if low < 0 or high > of_variant.num_users * (1 + 1e-9):
            raise ClientError(
                f"its metric sums run from {low:g} to {high:g}, expected 0 to {of_variant.num_users}: the outcome "
                f"of a user is between 0 and 1; {_ONE_VERSION}, or look into its client"
            )
    return sums


def error_record(error: str, domain: str = "") -> RecordDict:
    """A client's own account of what went wrong; the domain is empty where it does not know its own."""
    return RecordDict({_ERROR: ConfigRecord({"message": error, "domain": domain})})


def read_error(content: RecordDict) -> str | None:
    """The client's error, if it reports one."""
    if _ERROR not in content.config_records:
        return None
    message = content.config_records[_ERROR].get("message")
    return message if isinstance(message, str) and message else "an error that does not say what it is"


def read_error_domain(content: RecordDict) -> str:
    """The domain that a client with an error says it is; empty where it does not know."""
    return str(content.config_records[_ERROR].get("domain", "")) if _ERROR in content.config_records else ""


def content_sha256(content: RecordDict) -> str:
    """A hash over everything that a message holds, its signature aside: names, types, shapes, bytes."""
    digest = hashlib.sha256()
    for key, record in sorted(content.items()):
        if key == _SIGNATURE:
            continue
        digest.update(repr((key, type(record).__name__)).encode())
        for name, value in sorted(record.items()):
            if isinstance(value, Array):
                data = hashlib.sha256(value.data).hexdigest()
                digest.update(repr((name, value.dtype, tuple(value.shape), value.stype, data)).encode())
            else:
                digest.update(repr((name, type(value).__name__, value)).encode())
    return digest.hexdigest()


def arrays_sha256(content: RecordDict) -> str:
    """A hash over the arrays that a message holds, whatever is told beside them."""
    return content_sha256(RecordDict(dict(content.array_records)))


def add_signature(content: RecordDict, signature: Signature) -> None:
    """Put a signature of the rest into a message."""
    content[_SIGNATURE] = ConfigRecord({"key": signature.key, "data": signature.data})


def read_signature(content: RecordDict) -> Signature | None:
    """Inverse of :func:`add_signature`; None where there is none.

    Raises:
        ClientError: another form.
    """
    return _dataclass(Signature, content.config_records[_SIGNATURE]) if _SIGNATURE in content else None


def size_bytes(content: RecordDict) -> int:
    """About how many bytes a message holds, names included; nothing of it is read or copied."""
    total = 0
    for record in content.values():
        for name, value in record.items():
            if isinstance(value, Array):
                total += len(value.data) + len(value.dtype) + len(value.stype) + 8 * len(value.shape)
            elif isinstance(value, (bytes, str)):
                total += len(value)
            elif isinstance(value, list):
                total += sum(len(part) if isinstance(part, (bytes, str)) else 8 for part in value)
            total += len(name) + 8
    return total


def contents(content: RecordDict) -> Iterator[dict[str, Any]]:
    """What a message holds, for the exposure ledger: one row per array and per value."""
    for key, arrays in content.array_records.items():
        for name, array in arrays.items():
            yield _exposed(f"{key}.{name}", array.dtype, tuple(array.shape), len(array.data))
    for key, values in content.config_records.items():
        for name, value in values.items():
            if isinstance(value, list) and all(isinstance(part, (bytes, str)) for part in value):
                size = sum(len(part) for part in value if isinstance(part, (bytes, str)))
            else:
                size = len(value) if isinstance(value, (bytes, str)) else len(json.dumps(value, default=str))
            yield _exposed(f"{key}.{name}", type(value).__name__, (), size)
    for key, metrics in content.metric_records.items():
        for name, metric in metrics.items():
            yield _exposed(f"{key}.{name}", type(metric).__name__, (), len(json.dumps(metric)))


def _exposed(name: str, dtype: str, shape: tuple[int, ...], size_bytes: int) -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": "x".join(map(str, shape)), "size_bytes": size_bytes}


def _adapter_records(adapter: Adapter, suffix: str, coding: Coding = FLOAT32, only_B: bool = False) -> ModelRecords:
    packed = pack(adapter, coding)
    arrays = {name: Array(values) for name, values in packed.items() if not only_B or name.endswith(".lora_B")}
    scalings: dict[str, ConfigRecordValues] = {name: module.scaling for name, module in adapter.modules.items()}
    return {f"{_ADAPTER}{suffix}": ArrayRecord(arrays), f"{_SCALINGS}{suffix}": ConfigRecord(scalings)}


def _read_adapter(
    content: RecordDict,
    suffix: str,
    coding: Coding = FLOAT32,
    like: Adapter | None = None,
    frozen: Adapter | None = None,
) -> Adapter:
    arrays, scalings = (
        content.array_records.get(f"{_ADAPTER}{suffix}"),
        content.config_records.get(f"{_SCALINGS}{suffix}"),
    )
    if arrays is None or scalings is None:
        raise LayoutMismatchError(f"the message holds no adapter{suffix} (records: {sorted(content)}); {_ONE_VERSION}")
    for name, scaling in scalings.items():
        if not isinstance(scaling, (int, float)):
            raise LayoutMismatchError(
                f"module {name}: its scaling is a {type(scaling).__name__}, expected a number; {_ONE_VERSION}"
            )
    numbers = {name: float(scaling) for name, scaling in scalings.items()}  # type: ignore[arg-type]  # as checked
    if coding.transport != "float32" and like is not None:
        types = PIECES[coding.transport]
        found = {
            name: array_values(array, name, np.dtype(types.get(_piece(name), "float32")), 2)
            for name, array in arrays.items()
        }
        return unpack(found, like, numbers, coding)
    if frozen is not None:
        _check_alone(arrays, scalings, frozen)
        return Adapter(
            {
                name: LoraModule(module.lora_A, _tensor(arrays[f"{name}.lora_B"], f"{name}.lora_B"), numbers[name])
                for name, module in frozen.modules.items()
            }
        )
    expected = {f"{name}.{part}" for name in scalings for part in ("lora_A", "lora_B")}
    if set(arrays) != expected:
        raise LayoutMismatchError(
            f"the adapter's tensors do not match its modules: {sorted(set(arrays) ^ expected)[:3]}; {_ONE_VERSION}"
        )
    modules = {}
    for name, scaling in numbers.items():
        lora_A, lora_B = (_tensor(arrays[f"{name}.{part}"], f"{name}.{part}") for part in ("lora_A", "lora_B"))
        modules[name] = LoraModule(lora_A, lora_B, scaling)
    return Adapter(modules)


def _check_alone(arrays: ArrayRecord, scalings: ConfigRecord, frozen: Adapter) -> None:
    """Refuse anything but lora_B of every module, with its scaling."""
    found = set(arrays) | {f"{name}.scaling" for name in scalings}
    expected = {f"{name}.{part}" for name in frozen.modules for part in ("lora_B", "scaling")}
    if found != expected:
        raise LayoutMismatchError(
            f"the adapter's lora_B was to travel alone, since lora_A is frozen: it lacks "
            f"{sorted(expected - found)[:3]} and has unexpected {sorted(found - expected)[:3]}; {_ONE_VERSION}"
        )


def _read_models(content: RecordDict) -> dict[str, Adapter]:
    labels = _config(content, _MODELS).get("labels")
    if not isinstance(labels, list):
        raise ClientError(f"the request names no models; {_ONE_VERSION}")
    return {str(label): _read_adapter(content, str(number)) for number, label in enumerate(labels)}


def _coefficient_array(values: torch.Tensor) -> Array:
    """(K, G) float32; (K,) travels as (K, 1), and whoever reads it knows which it is."""
    return Array(values.detach().cpu().float().reshape(len(values), -1).contiguous().numpy())


def _read_coefficients(content: RecordDict, name: str) -> torch.Tensor:
    arrays = content.array_records.get(_COEFFICIENTS)
    if arrays is None or name not in arrays:
        raise LayoutMismatchError(
            f"the message holds no coefficients {name!r} (records: {sorted(content)}); {_ONE_VERSION}"
        )
    return _tensor(arrays[name], name)


def _tensor(array: Array, name: str) -> torch.Tensor:
    return torch.from_numpy(array_values(array, name, np.dtype(np.float32), 2))


def _piece(name: str) -> str:
    """``encoder.query.lora_A.levels`` -> ``.levels``; empty for a factor as it is."""
    last = name.rpartition(".")[2]
    return "" if last in ("lora_A", "lora_B") else f".{last}"


def array_values(array: Array, name: str, dtype: np.dtype[T_Scalar], num_axes: int) -> NDArray[T_Scalar]:
    """The values of an array that arrived, in memory of their own.

    Args:
        array: as Flower holds it.
        name: for the message.
        dtype: expected.
        num_axes: expected.

    Raises:
        LayoutMismatchError: another type or shape than announced or expected.
    """
    if array.dtype != str(dtype) or len(array.shape) != num_axes:
        what = {1: "vector", 2: "matrix"}[num_axes]
        raise LayoutMismatchError(
            f"{name} is {array.dtype} of shape {tuple(array.shape)}, expected a {dtype} {what}; {_ONE_VERSION}"
        )
    if array.stype != "numpy.ndarray":
        raise LayoutMismatchError(
            f"{name} cannot be read: it is serialised as {array.stype!r}, expected numpy.ndarray; {_ONE_VERSION}"
        )
    stream = io.BytesIO(array.data)
    try:  # the header first: nothing is allocated for more than what came
        shape, fortran_order, found = _NPY_HEADERS[np.lib.format.read_magic(stream)](stream)
    except (LookupError, ValueError, TypeError, OSError, EOFError) as error:
        raise LayoutMismatchError(f"{name} cannot be read ({error}); {_ONE_VERSION}") from error
    values = array.data[stream.tell() :]
    in_order = not fortran_order or num_axes == 1
    if (
        shape != tuple(array.shape)
        or found != dtype
        or not in_order
        or len(values) != dtype.itemsize * math.prod(shape)
    ):
        raise LayoutMismatchError(
            f"{name} announces {dtype} {tuple(array.shape)} but holds {found} {shape} in {len(values)} bytes; "
            f"{_ONE_VERSION}"
        )
    return np.frombuffer(values, dtype=dtype).reshape(shape).copy()


def _config(content: RecordDict, key: str) -> ConfigRecord:
    record = content.config_records.get(key)
    if record is None:
        raise ClientError(f"its message has no record {key!r} (records: {sorted(content)}); {_ONE_VERSION}")
    return record


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < LARGEST_COUNT


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < LARGEST_NUMBER  # NaN is not


def _is_validation(value: Any) -> bool:
    if not isinstance(value, dict) or not _is_count(value.get("step")):
        return False
    return all(value.get(key) is None or _is_number(value[key]) for key in ("loss", "ndcg"))


_REPORT: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("steps", "best_step", "validation_users"), ("a count", _is_count)),
    "seconds": ("a number", _is_number),
    "loss": ("a number, or null", lambda value: value is None or _is_number(value)),
    **dict.fromkeys(("stopped_by", "sha256"), ("a text", lambda value: isinstance(value, str))),
    "cached": ("true or false", lambda value: isinstance(value, bool)),
    "privacy": ("an object, or null", lambda value: value is None or isinstance(value, dict)),
    "transport": ("an object", lambda value: isinstance(value, dict)),
    "validations": (
        "a list of objects with step, loss and ndcg",
        lambda value: isinstance(value, list) and all(map(_is_validation, value)),
    ),
}


def _dataclass(kind: type[T], values: Mapping[str, Any]) -> T:
    expected = {field.name: field.type for field in fields(kind)}  # type: ignore[arg-type]  # kind is a dataclass
    wrong = sorted(
        {key for key in expected.keys() | values.keys() if key not in values or key not in expected}
        | {key for key, value in values.items() if key in expected and type(value) is not _plain(expected[key])}
    )
    if wrong:
        raise ClientError(f"its {kind.__name__} has another form in {wrong}; {_ONE_VERSION}")
    return kind(**values)


def _plain(annotation: Any) -> Any:
    return annotation if isinstance(annotation, type) else str  # a Literal of strings
