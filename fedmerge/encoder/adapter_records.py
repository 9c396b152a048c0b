"""Files beside an adapter that record how it was made."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmerge.files import read_record


@dataclass(frozen=True)
class AdapterRecord:
    """Hashes recorded beside an adapter; None where no file has one.

    Attributes:
        sha256: ``adapter_sha256`` of the adapter.
        backbone_sha256: hash of the backbone that it was trained or merged on.
    """

    sha256: str | None
    backbone_sha256: str | None


def config_of_adapter(adapter: Path) -> Path | None:
    """Find the nearest ``config.toml`` in or above an adapter: that of its run, or of a later merge."""
    folders = (adapter.resolve(), *adapter.resolve().parents[:2])
    return next((path for path in (folder / "config.toml" for folder in folders) if path.is_file()), None)


def adapter_record(adapter: Path) -> AdapterRecord:
    """Read the record of an adapter: ``training.json`` of an expert, ``provenance.json`` of a merge.

    Raises:
        RunDirError: one of these files is damaged.
    """
    training = read_record(adapter / "training.json")
    provenance = read_record(adapter / "provenance.json")
    backbone = provenance.get("backbone")
    if training and not provenance:
        participants = read_record(adapter.resolve().parent.parent / "clients.json").get("participants")
        backbone = _table(_table(participants).get(adapter.resolve().name)).get("backbone_sha256")
    else:
        backbone = _table(backbone).get("sha256")
    return AdapterRecord(_text(training.get("sha256")) or _text(provenance.get("sha256")), _text(backbone))


def _table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
