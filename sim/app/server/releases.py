"""What clients release is written down as it arrives, so that it counts also where it is late, refused or lost."""

from collections.abc import Callable
from typing import Any

from flwr.app import RecordDict

from fedmerge.config import ExperimentConfig
from fedmerge.errors import FedMergeError, RunDirError
from fedmerge.privacy.dp.agreement import check_spent
from fedmerge.runs.dp_spent import ANSWER, note_release
from sim.app.messages import records
from sim.app.server.asking import LONGEST_REASON, Federation, own_noise, printable


def trainings_released(
    federation: Federation, config: ExperimentConfig, number: int | None = None
) -> Callable[[str, RecordDict | str], None] | None:
    """Return the function that notes adapters as they arrive (``Question.released``), or None if they have no noise.

    Args:
        federation: the clients.
        config: of the run.
        number: of the round, where there are rounds.
    """

    def spent(domain: str, content: RecordDict) -> Any:
        told = records.read_report(content).get("privacy")
        check_spent(domain, config, told, federation.descriptions[domain].num_users, number)
        return told

    return None if own_noise(config) == "none" else _noting(federation, number or 0, spent)


def answers_released(federation: Federation) -> Callable[[str, RecordDict | str], None]:
    """What notes the answers about coefficients that arrive with noise."""

    def spent(domain: str, content: RecordDict) -> Any:
        records.read_gradient(content)
        return ANSWER

    return _noting(federation, 0, spent)


def _noting(
    federation: Federation, number: int, spent: Callable[[str, RecordDict], Any]
) -> Callable[[str, RecordDict | str], None]:
    def released(domain: str, content: RecordDict | str) -> None:
        sha256, privacy, why_not = "", None, content
        if isinstance(content, RecordDict):
            sha256, why_not = records.arrays_sha256(content), ""
            try:
                privacy = spent(domain, content)
            except RunDirError:
                raise  # the server's own trouble, not the client's
            except FedMergeError as error:
                why_not = str(error)
            except Exception as error:  # whatever a client sends
                why_not = f"{type(error).__name__}: {error}"
        note_release(federation.run_dir, domain, number, sha256, privacy, printable(str(why_not), LONGEST_REASON))

    return released
