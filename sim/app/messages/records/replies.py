"""Every reply: its error, signature, hash, size, and contents for the ledger."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from flwr.app import Array, ConfigRecord, RecordDict

from fedmerge.escaping import one_line
from fedmerge.privacy.signatures import Signature
from sim.app.messages.records.fields import LONGEST_SHOWN, read_dataclass

LONGEST_EXPOSED = 200  # characters of a name in the ledger
_ERROR = "error"
_SIGNATURE = "signature"


def error_record(error: str, domain: str = "") -> RecordDict:
    """Make the record of a client's error; the domain is empty if the client does not know its own."""
    return RecordDict({_ERROR: ConfigRecord({"message": error, "domain": domain})})


def read_error(content: RecordDict) -> str | None:
    """Return the client's error, or None."""
    if _ERROR not in content.config_records:
        return None
    message = content.config_records[_ERROR].get("message")
    return message if isinstance(message, str) and message else "an error without a message"


def read_error_domain(content: RecordDict) -> str:
    """Return the domain that a client with an error claims to be; empty if it does not know."""
    return str(content.config_records[_ERROR].get("domain", "")) if _ERROR in content.config_records else ""


def content_sha256(content: RecordDict) -> str:
    """Hash everything in a message except its signature: names, types, shapes, bytes."""
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
    """Hash the arrays of a message, regardless of its other records."""
    return content_sha256(RecordDict(dict(content.array_records)))


def add_signature(content: RecordDict, signature: Signature) -> None:
    """Add the signature of a message to it."""
    content[_SIGNATURE] = ConfigRecord({"key": signature.key, "data": signature.data})


def read_signature(content: RecordDict) -> Signature | None:
    """Inverse of :func:`add_signature`; None without a signature.

    Raises:
        ClientError: another form.
    """
    return read_dataclass(Signature, content.config_records[_SIGNATURE]) if _SIGNATURE in content else None


def size_bytes(content: RecordDict) -> int:
    """Return the approximate size of a message, names included, without reading or copying its values."""
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
    """Yield a row for each array and value of a message, for the exposure ledger."""
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
    """Return a row of the ledger; its texts are the client's own."""
    name, dtype = one_line(name, LONGEST_EXPOSED), one_line(dtype, LONGEST_SHOWN)
    return {"name": name, "dtype": dtype, "shape": "x".join(map(str, shape)), "size_bytes": size_bytes}
