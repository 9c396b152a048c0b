"""Note what clients release on its arrival, so that it counts even if it is late, refused or lost afterwards."""

from collections.abc import Callable
from typing import Any

from flwr.app import RecordDict

from fedmerge.errors import FedMergeError, RunDirError
from fedmerge.escaping import one_line
from fedmerge.privacy.dp.agreement import check_spent
from fedmerge.runs.dp_spent import ANSWER, note_release
from sim.app.messages import records
from sim.app.server.members import LONGEST_REASON
from sim.app.server.questions import own_noise
from sim.app.server.run import Run

Released = Callable[[str, RecordDict | str], None]
"""See ``Question.released``."""


def trainings_released(run: Run, number: int | None = None, *, woven: bool = False) -> Released | None:
    """Return a function that notes adapters on arrival, or None if clients add no noise to them.

    Args:
        run: the run.
        number: of the round in a federation of rounds, or of the pass of weaving.
        woven: True for adapters of others that clients continued.
    """
    of_round = None if woven else number

    def spent(domain: str, content: RecordDict) -> Any:
        claimed = records.read_report(content).get("privacy")
        check_spent(domain, run.config, claimed, run.members.descriptions[domain].num_users, of_round, woven)
        return claimed

    return None if own_noise(run.config.dp.mode) == "none" else _noting(run, number or 0, spent)


def answers_released(run: Run) -> Released:
    """Return a function that notes answers about coefficients on arrival."""

    def spent(domain: str, content: RecordDict) -> Any:
        records.read_gradient(content)
        return ANSWER

    return _noting(run, 0, spent)


def _noting(run: Run, number: int, spent: Callable[[str, RecordDict], Any]) -> Released:
    def released(domain: str, content: RecordDict | str) -> None:
        sha256, privacy, why_not = "", None, content
        if isinstance(content, RecordDict):
            sha256, why_not = records.arrays_sha256(content), ""
            try:
                privacy = spent(domain, content)
            except RunDirError:
                raise  # a failure of the server, not of the client
            except FedMergeError as error:
                why_not = str(error)
            except Exception as error:  # whatever a client sends
                why_not = f"{type(error).__name__}: {error}"
        note_release(run.folder, domain, number, sha256, privacy, one_line(str(why_not), LONGEST_REASON))

    return released
