"""Read the fields of a record, each of its type."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal, TypeVar, get_args, get_origin

from flwr.app import ConfigRecord, RecordDict

from fedmerge.errors import ClientError
from fedmerge.escaping import one_line

LONGEST_SHOWN = 80  # characters of a client's text in an error
T = TypeVar("T")
ONE_VERSION = "use one fedmerge version everywhere"
FACTS = "facts"


def read_config(content: RecordDict, key: str) -> ConfigRecord:
    record = content.config_records.get(key)
    if record is None:
        raise ClientError(f"its message has no record {key!r} (records: {sorted(content)}); {ONE_VERSION}")
    return record


def read_dataclass(kind: type[T], values: Mapping[str, Any]) -> T:
    """Read a dataclass from a record, each field of exactly its type; a Literal is one of its strings.

    Raises:
        ClientError: a field is missing, unknown, of another type or of another value.
    """
    expected = {field.name: field.type for field in fields(kind)}  # type: ignore[arg-type]  # kind is a dataclass
    wrong = sorted(
        {key for key in expected.keys() | values.keys() if key not in values or key not in expected}
        | {key for key, value in values.items() if key in expected and type(value) is not _plain(expected[key])}
    )
    if wrong:
        shown = [one_line(key, LONGEST_SHOWN) for key in wrong]
        raise ClientError(f"its {kind.__name__} has another form in {shown}; {ONE_VERSION}")
    for key, annotation in expected.items():
        allowed = get_args(annotation)
        if allowed and values[key] not in allowed:
            found = one_line(values[key], LONGEST_SHOWN)
            raise ClientError(
                f"its {kind.__name__} has {key} = {found!r}, expected one of {', '.join(map(repr, allowed))}; "
                f"{ONE_VERSION}"
            )
    return kind(**values)


def _plain(annotation: Any) -> Any:
    return str if get_origin(annotation) is Literal else annotation
