"""Checkpoints of secure sums: the mean of the experts, and the record of whose values each sum revealed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedmerge.adapter import Adapter, adapter_sha256
from fedmerge.encoder.peft.folder import read_adapter, write_adapter
from fedmerge.errors import FedMergeError
from fedmerge.files import append_line, read_lines, read_sealed, seal, whole_folder, write_json
from fedmerge.privacy.secagg.agreement import Summand

SECURE_SUM, SUM_FILE, REVEALED = "secure-sum", "sum.json", "secure-sum.jsonl"


def write_mean(run_dir: Path, mean: Adapter, record: Mapping[str, Any], backbone_name: str) -> None:
    """Write the mean of the experts and the record of its secure sum.

    Raises:
        RunDirError: the folder cannot be written.
    """
    with whole_folder(run_dir / SECURE_SUM) as folder:
        write_adapter(mean, folder, backbone_name)
        write_json(folder / SUM_FILE, seal({**record, "sha256": adapter_sha256(mean)}))


def note_reveal(
    run_dir: Path,
    number: int,
    reports: Mapping[str, Mapping[str, Any]],
    domains: Sequence[str],
    what: Summand = "adapter",
) -> None:
    """Record whose values a sum is about to reveal, before it does, since the run may be killed right after.

    Args:
        run_dir: run folder.
        number: round of the sum; 0 outside of rounds.
        reports: domain -> training report.
        domains: domains in the sum.
        what: the sum is of.

    Raises:
        RunDirError: the file cannot be written.
    """
    line = {"round": number, "reports": {name: dict(reports[name]) for name in domains}}
    append_line(run_dir / REVEALED, line if what == "adapter" else {**line, "what": what})


def revealed_reports(run_dir: Path) -> list[tuple[str, Mapping[str, Any]]]:
    """Return domain and report of every adapter that a sum revealed.

    An adapter that a repeated sum revealed again counts once. An expert that its client had lost and trained again is
    another release.
    """
    found: list[tuple[str, Mapping[str, Any]]] = []
    seen: set[tuple[str, str, int]] = set()
    for line in read_lines(run_dir / REVEALED):
        for domain, report in sorted(line["reports"].items()):
            release = (domain, line.get("what", "adapter"), line["round"])
            if release not in seen or report.get("cached") is False:
                found.append((domain, report))
            seen.add(release)
    return found


def read_mean(run_dir: Path) -> tuple[Adapter, dict[str, Any]] | None:
    """Inverse of :func:`write_mean`; None if the mean is absent or damaged."""
    try:
        mean, record = read_adapter(run_dir / SECURE_SUM), read_sealed(run_dir / SECURE_SUM / SUM_FILE) or {}
        return (mean, record) if adapter_sha256(mean) == record["sha256"] else None
    except (FedMergeError, OSError, LookupError, TypeError):
        return None
