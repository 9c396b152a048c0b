"""The mean of the experts that a secure sum gave, kept in the run folder with the record of what was revealed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedmerge.adapter import Adapter, adapter_sha256
from fedmerge.encoder.peft_folder import read_adapter, write_adapter
from fedmerge.errors import FedMergeError
from fedmerge.files import append_line, read_json, read_lines, whole_folder, write_json

SECURE_SUM, SUM_FILE, REVEALED = "secure-sum", "sum.json", "secure-sum.jsonl"


def keep_mean(run_dir: Path, mean: Adapter, record: Mapping[str, Any], backbone_name: str) -> None:
    """Write the mean of the experts with how it was made.

    Raises:
        RunDirError: it cannot be written.
    """
    with whole_folder(run_dir / SECURE_SUM) as folder:
        write_adapter(mean, folder, backbone_name)
        write_json(folder / SUM_FILE, {**record, "sha256": adapter_sha256(mean)})


def note_reveal(run_dir: Path, number: int, reports: Mapping[str, Mapping[str, Any]], domains: Sequence[str]) -> None:
    """Write down whose values a sum is about to show, before it does: what follows may be killed.

    Args:
        run_dir: the run.
        number: of the round; 0 where there are none.
        reports: domain -> the report of its training.
        domains: who is in the sum.

    Raises:
        RunDirError: it cannot be written.
    """
    append_line(run_dir / REVEALED, {"round": number, "reports": {name: dict(reports[name]) for name in domains}})


def revealed_reports(run_dir: Path) -> list[tuple[str, Mapping[str, Any]]]:
    """Domain and report of every adapter that was in a sum, once each: a sum that began again shows the same again.

    The same but for an expert that its client did not find on its disk any more and trained anew.
    """
    found: list[tuple[str, Mapping[str, Any]]] = []
    seen: set[tuple[str, int]] = set()
    for line in read_lines(run_dir / REVEALED):
        for domain, told in sorted(line["reports"].items()):
            if (domain, line["round"]) not in seen or told.get("cached") is False:
                found.append((domain, told))
            seen.add((domain, line["round"]))
    return found


def kept_mean(run_dir: Path) -> tuple[Adapter, dict[str, Any]] | None:
    """What :func:`keep_mean` wrote, if it is there and whole."""
    try:
        mean, record = read_adapter(run_dir / SECURE_SUM), read_json(run_dir / SECURE_SUM / SUM_FILE)
        return (mean, record) if adapter_sha256(mean) == record["sha256"] else None
    except (FedMergeError, OSError, LookupError, TypeError):
        return None
