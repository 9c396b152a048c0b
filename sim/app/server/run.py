"""One run of an experiment on the server: what every phase works on."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from flwr.serverapp import Grid

from fedmerge.config import ExperimentConfig
from fedmerge.errors import ClientError
from fedmerge.runs.overview.progress import Stages
from sim.app.flower_internals import InMemoryGrid
from sim.app.server.ledger import Ledger
from sim.app.server.members import Members, join_names
from sim.app.server.questions import Inquiry


@dataclass
class Run:
    """One run of an experiment.

    Attributes:
        config: of the experiment.
        folder: where everything is written as soon as it exists, see :mod:`fedmerge.runs.folder`.
        grid: Flower's connection to the nodes.
        members: the clients that take part and those that are excluded.
        ledger: what left the clients.
        stages: what the clients were asked so far.
        current_phase: name of the innermost phase; it is written beside every exclusion.
        late: questions that are no longer waited for; answers that still come are recorded.
        cohorts: hash of a cohort that was sent in this attempt -> its domains with their numbers of pseudo-users.
    """

    config: ExperimentConfig
    folder: Path
    grid: Grid
    members: Members
    ledger: Ledger
    stages: Stages
    current_phase: str = ""
    late: list[Inquiry] = field(default_factory=list)
    cohorts: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def simulated(self) -> bool:
        """True if the nodes are processes of this machine; claims of other nodes about themselves are not believed."""
        return isinstance(self.grid, InMemoryGrid)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name the phase for the length of a block; afterwards the outer phase is current again."""
        outer, self.current_phase = self.current_phase, name
        try:
            yield
        finally:
            self.current_phase = outer

    def exclude(self, name: str, reason: str) -> None:
        """Exclude a domain or a node in the current phase."""
        self.members.exclude(name, reason, self.current_phase)

    def require_quorum(self, domains: list[str]) -> None:
        """Fail the run if too few training domains are left.

        Args:
            domains: that are left.

        Raises:
            ClientError: with every exclusion and its reason.
        """
        needed = self.config.server.min_train_clients
        if len(domains) >= needed:
            return
        named = [*self.config.domains.train, *self.config.domains.unseen]
        absent = [domain for domain in named if domain not in self.members.descriptions]
        reasons = "".join(f"\n  {name}: {exclusion.reason}" for name, exclusion in self.members.excluded.items())
        none = f" none; never connected: {join_names(absent) or 'none'}"
        raise ClientError(
            f"{len(domains)} training clients are left ({', '.join(domains) or 'none'}), server.min_train_clients is "
            f"{needed}. Excluded:{reasons or none}"
        )


def new_run(config: ExperimentConfig, folder: Path, grid: Grid) -> Run:
    """Return a run without members."""
    return Run(config, folder, grid, Members(folder), Ledger(folder), Stages(folder))
