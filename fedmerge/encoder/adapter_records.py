"""Files beside an adapter that record how it was made."""

from dataclasses import dataclass
from pathlib import Path

from fedmerge.files import read_record, table_or_empty, text_or_none


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
        backbone = table_or_empty(table_or_empty(participants).get(adapter.resolve().name)).get("backbone_sha256")
    else:
        backbone = table_or_empty(backbone).get("sha256")
    return AdapterRecord(
        text_or_none(training.get("sha256")) or text_or_none(provenance.get("sha256")), text_or_none(backbone)
    )
