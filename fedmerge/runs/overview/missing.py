"""Which domains of an experiment are missing from a run's merges, and why."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedmerge.files import read_record, table_or_empty
from fedmerge.runs.folder import ADMISSION

NO_REASON = "it did not take part"


def find_missing(folder: Path, clients: Mapping[str, Any], named: Sequence[str]) -> dict[str, str]:
    """Return name -> why it is missing: domains that were absent, excluded or kept out by the admission gate.

    A domain that failed after its expert was merged is among them, and the reason says so.

    Args:
        folder: run folder.
        clients: content of ``clients.json``; empty while no client has answered.
        named: domains of the experiment.

    Raises:
        RunDirError: a record is damaged.
    """
    if not clients:
        return {}
    merged = find_merged(folder)
    phases, absent = table_or_empty(clients.get("excluded_in_phase")), table_or_empty(clients.get("absent"))
    missing = {str(name): f"absent: {reason}" for name, reason in absent.items()}
    gate = read_record(folder / ADMISSION)
    if gate.get("action") == "exclude":
        for name, reason in table_or_empty(gate.get("failed")).items():
            missing[name] = f"not merged, it failed at the admission gate: {reason}"
    for name, reason in table_or_empty(clients.get("excluded")).items():
        phase = f" in the phase {phases[name]}" if phases.get(name) else ""
        still = "; its expert is still merged" if name in merged else ""
        missing[name] = f"excluded{phase}: {reason}{still}"
    known = {
        *missing,
        *(name.partition(" (node ")[0] for name in missing),
        *table_or_empty(clients.get("participants")),
    }
    return missing | {name: f"absent: {NO_REASON}" for name in named if name not in known}


def find_merged(folder: Path) -> tuple[str, ...]:
    """Return the domains whose experts are in the merges, sorted; empty before training has ended, and after rounds.

    Raises:
        RunDirError: a record is damaged.
    """
    gate = read_record(folder / ADMISSION)
    kept_out = table_or_empty(gate.get("failed")) if gate.get("action") == "exclude" else {}
    return tuple(sorted({*read_record(folder / "experts.json")} - {*kept_out}))
