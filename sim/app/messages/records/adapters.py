"""Adapters as Flower records."""

import math
from collections.abc import Mapping

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, ConfigRecordValues, RecordDict

from fedmerge.adapter import Adapter, LoraModule
from fedmerge.errors import ClientError, LayoutMismatchError
from fedmerge.escaping import one_line
from fedmerge.privacy.transport import PIECES, Coding, pack, unpack
from sim.app.messages.records.arrays import array_values, read_tensor
from sim.app.messages.records.fields import LONGEST_SHOWN, ONE_VERSION, read_config

FLOAT32 = Coding()
ADAPTER = "adapter"
_SCALINGS = "scalings"
_MODELS = "models"
ModelRecords = dict[str, ArrayRecord | ConfigRecord]


def model_records(adapters: Mapping[str, Adapter]) -> ModelRecords:
    """Make the records of adapters by label, once for all requests."""
    content: ModelRecords = {_MODELS: ConfigRecord({"labels": list(adapters)})}
    for number, adapter in enumerate(adapters.values()):
        content |= adapter_records(adapter, str(number))
    return content


def adapter_records(adapter: Adapter, suffix: str, coding: Coding = FLOAT32, only_B: bool = False) -> ModelRecords:
    packed = pack(adapter, coding)
    arrays = {name: Array(values) for name, values in packed.items() if not only_B or name.endswith(".lora_B")}
    scalings: dict[str, ConfigRecordValues] = {name: module.scaling for name, module in adapter.modules.items()}
    return {f"{ADAPTER}{suffix}": ArrayRecord(arrays), f"{_SCALINGS}{suffix}": ConfigRecord(scalings)}


def read_adapter_records(
    content: RecordDict,
    suffix: str,
    coding: Coding = FLOAT32,
    like: Adapter | None = None,
    frozen: Adapter | None = None,
) -> Adapter:
    arrays, scalings = (
        content.array_records.get(f"{ADAPTER}{suffix}"),
        content.config_records.get(f"{_SCALINGS}{suffix}"),
    )
    if arrays is None or scalings is None:
        raise LayoutMismatchError(f"the message holds no adapter{suffix} (records: {sorted(content)}); {ONE_VERSION}")
    for name, scaling in scalings.items():
        if not isinstance(scaling, (int, float)):
            raise LayoutMismatchError(
                f"module {name}: its scaling is a {type(scaling).__name__}, expected a number; {ONE_VERSION}"
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
                name: LoraModule(module.lora_A, read_tensor(arrays[f"{name}.lora_B"], f"{name}.lora_B"), numbers[name])
                for name, module in frozen.modules.items()
            }
        )
    expected = {f"{name}.{part}" for name in scalings for part in ("lora_A", "lora_B")}
    if set(arrays) != expected:
        raise LayoutMismatchError(
            f"the adapter's tensors do not match its modules: {sorted(set(arrays) ^ expected)[:3]}; {ONE_VERSION}"
        )
    modules = {}
    for name, scaling in numbers.items():
        lora_A, lora_B = (read_tensor(arrays[f"{name}.{part}"], f"{name}.{part}") for part in ("lora_A", "lora_B"))
        modules[name] = LoraModule(lora_A, lora_B, scaling)
    return Adapter(modules)


def _check_alone(arrays: ArrayRecord, scalings: ConfigRecord, frozen: Adapter) -> None:
    """Check that the arrays are lora_B of every module, each with its scaling."""
    found = set(arrays) | {f"{name}.scaling" for name in scalings}
    expected = {f"{name}.{part}" for name in frozen.modules for part in ("lora_B", "scaling")}
    if found != expected:
        raise LayoutMismatchError(
            f"the adapter's lora_B was to travel alone, since lora_A is frozen: it lacks "
            f"{sorted(expected - found)[:3]} and has unexpected {sorted(found - expected)[:3]}; {ONE_VERSION}"
        )


def read_models(content: RecordDict) -> dict[str, Adapter]:
    labels = read_config(content, _MODELS).get("labels")
    if not isinstance(labels, list):
        raise ClientError(f"the request names no models; {ONE_VERSION}")
    models = {str(label): read_adapter_records(content, str(number)) for number, label in enumerate(labels)}
    for label, adapter in models.items():
        check_is_finite(adapter, f"model {one_line(label, LONGEST_SHOWN)!r}")
    return models


def check_is_finite(adapter: Adapter, what: str) -> None:
    """Refuse an adapter with NaN or infinite values, under which no user can be ranked.

    Raises:
        ClientError: its first such module.
    """
    for name, module in adapter.modules.items():
        if not (module.lora_A.isfinite().all() and module.lora_B.isfinite().all() and math.isfinite(module.scaling)):
            raise ClientError(f"{what} of the request: module {name} has NaN or infinite values; send finite ones")


def _piece(name: str) -> str:
    """Return the piece of a packed factor: ``encoder.query.lora_A.levels`` -> ``.levels``; empty for a plain factor."""
    last = name.rpartition(".")[2]
    return "" if last in ("lora_A", "lora_B") else f".{last}"
