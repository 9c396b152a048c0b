"""The clients of a run: who takes part, who is excluded and why; written to ``clients.json`` at every change."""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fedmerge.errors import RunDirError
from fedmerge.escaping import one_line
from fedmerge.files import read_sealed, seal, write_json
from fedmerge.privacy.signatures import RegisteredKey
from sim.app.messages import records

CLIENTS_FILE = "clients.json"
FEW_CLIENTS = 20  # with at most this many, each client gets its own log line
LONGEST_REASON = 2000
LONGEST_NAME = 200

logger = logging.getLogger("fedmerge.server")


@dataclass(frozen=True)
class Exclusion:
    """Why a domain or a node is excluded.

    Attributes:
        phase: in which it failed.
        reason: a single printable line.
        description: its client's own, if it sent one.
    """

    phase: str
    reason: str
    description: records.Description | None = None


@dataclass
class Members:
    """Participants of a run, and excluded domains and nodes.

    Attributes:
        folder: run folder.
        nodes: domain -> node of the participating domains.
        descriptions: domain -> its client's description, of every domain that ever took part.
        excluded: domain or node -> reason.
        absent: domain of the experiment -> why it is not in the merge, though nothing of it failed.
        greeted: nodes that were asked for their description.
        num_nodes: number of nodes in all, if a simulation announces it; else 0.
        keys: registered public keys by fingerprint; empty if none are registered.
        signers: node -> fingerprint of the key that it signs with; empty text for none.
    """

    folder: Path
    nodes: dict[str, int] = field(default_factory=dict)
    descriptions: dict[str, records.Description] = field(default_factory=dict)
    excluded: dict[str, Exclusion] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    greeted: set[int] = field(default_factory=set)
    num_nodes: int = 0
    keys: Mapping[str, RegisteredKey] = field(default_factory=dict)
    signers: dict[int, str] = field(default_factory=dict)

    def in_role(self, role: str) -> list[str]:
        """Return the domains of a role (``train`` or ``unseen``) that still take part, sorted."""
        return sorted(domain for domain in self.nodes if self.descriptions[domain].role == role)

    def nodes_of(self, domains: list[str]) -> dict[str, int]:
        """Return domain -> node for those of the domains that still take part, in the given order."""
        return {domain: self.nodes[domain] for domain in domains if domain in self.nodes}

    def exclude(self, name: str, reason: str, phase: str) -> None:
        """Exclude a domain or a node, and write this down."""
        name, reason = one_line(name, LONGEST_NAME), one_line(reason, LONGEST_REASON)
        logger.warning("excluded: %s: %s", name, reason)
        self.excluded[name] = Exclusion(phase, reason, self.descriptions.get(name))
        self.nodes.pop(name, None)
        self.write()

    def write(self) -> None:
        """Write ``clients.json``.

        Raises:
            RunDirError: the file cannot be written.
        """
        excluded = self.excluded.items()
        clients = {
            "participants": {
                domain: asdict(description)
                for domain, description in sorted(self.descriptions.items())
                if domain not in self.excluded
            },
            "excluded": {name: exclusion.reason for name, exclusion in excluded},
            "excluded_in_phase": {name: exclusion.phase for name, exclusion in excluded},
            "excluded_participants": {
                name: asdict(exclusion.description) for name, exclusion in excluded if exclusion.description
            },
            "absent": dict(sorted(self.absent.items())),
        }
        write_json(self.folder / CLIENTS_FILE, seal(clients))

    def restore(self, ended: set[str]) -> None:
        """Restore the members of a resumed run from ``clients.json``.

        Args:
            ended: finished phases: a client that failed in one of them stays excluded; the others are asked again.

        Raises:
            RunDirError: the file is damaged or of another version.
        """
        self.descriptions, excluded = _read_clients(self.folder / CLIENTS_FILE)
        self.excluded = {name: exclusion for name, exclusion in excluded.items() if exclusion.phase in ended}


def _read_clients(path: Path) -> tuple[dict[str, records.Description], dict[str, Exclusion]]:
    found: Mapping[str, Any] | None = read_sealed(path)
    if found is None:  # the run ended before any client had answered
        return {}, {}
    try:
        entries = {**found["participants"], **found["excluded_participants"]}
        descriptions = {name: records.Description(**entry) for name, entry in entries.items()}
        excluded = {
            name: Exclusion(found["excluded_in_phase"][name], reason, descriptions.get(name))
            for name, reason in found["excluded"].items()
        }
    except (LookupError, TypeError) as error:
        raise RunDirError(
            f"{path}: cannot be read as the clients of a run ({type(error).__name__}: {error}). Restore the file, or "
            "start a new run."
        ) from error
    return descriptions, excluded


def join_names(names: list[str]) -> str:
    """Join names for a log line: the first few, and the number of the others."""
    more = len(names) - FEW_CLIENTS
    return ", ".join(names[:FEW_CLIENTS]) + (f" and {more} more" if more > 0 else "")
