"""A client's account of differential privacy: every noised release of every run, on its own disk.

ε is a property of everything that was ever released about a user, not of one run. Entries are synced to disk before the
release is sent, so no crash forgets one.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from fedmerge.errors import FedMergeError, PolicyError, RunDirError
from fedmerge.files import append_line, exclusive, read_lines
from fedmerge.privacy.dp.accountant import spent_epsilon
from fedmerge.privacy.dp.releases import Adjacency, Release
from fedmerge.privacy.dp.replacement import replaced_epsilon

ACCOUNT_FILE = "account.jsonl"
LEAST_NOISE = 1e-3  # noise multiplier below which no accountant computes anything
Unit = Literal["user", "domain"]
REPLACED: Mapping[Unit, float] = {"user": 2.0, "domain": 1.0}  # of gradients and adapters, see Release


@dataclass(frozen=True)
class Entry:
    """Equal Gaussian mechanisms that were released together.

    Attributes:
        key: names the release; releasing the same thing again costs nothing.
        run: run_id.
        what: in words.
        unit: that is protected: a user of the domain, or the whole domain.
        release: the mechanisms.
    """

    key: str
    run: str
    what: str
    unit: Unit
    release: Release


def read_account(folder: Path) -> list[Entry]:
    """Return all entries of an account, oldest first.

    Raises:
        PolicyError: the account is damaged or cannot be read, so nothing more may be released.
    """
    try:
        return [Entry(**{**line, "release": Release(**line["release"])}) for line in read_lines(folder / ACCOUNT_FILE)]
    except (FedMergeError, LookupError, TypeError) as error:
        raise PolicyError(
            f"{folder / ACCOUNT_FILE}: the account of released ε is damaged ({type(error).__name__}: {error}), so "
            "nothing more is released. Restore the file."
        ) from error


def total_epsilon(entries: Iterable[Entry], delta: float, adjacency: Adjacency = "add-remove") -> dict[Unit, float]:
    """Return unit -> ε of all entries together at this δ, an upper bound; infinite with hardly any noise.

    Raises:
        ConfigError: Opacus is not installed.
    """
    by_unit: dict[Unit, list[Release]] = {}
    entries = list(entries)
    for entry in entries:
        by_unit.setdefault(entry.unit, []).append(entry.release)
        if entry.unit == "domain":  # it is about each user of the domain, too
            by_unit.setdefault("user", []).append(entry.release)
    if any(not entry.release.noise_multiplier >= LEAST_NOISE for entry in entries):
        return dict.fromkeys(by_unit, math.inf)
    if adjacency == "replace":
        return {unit: replaced_epsilon(releases, delta) for unit, releases in by_unit.items()}
    return {unit: spent_epsilon(releases, delta, "rdp") for unit, releases in by_unit.items()}


def charge(
    folder: Path,
    entries: Sequence[Entry],
    max_total_epsilon: float | None,
    max_delta: float | None,
    adjacency: Adjacency = "add-remove",
) -> None:
    """Enter releases into the account before they are sent; those that are there already cost nothing.

    Args:
        folder: of the account.
        entries: to enter.
        max_total_epsilon, max_delta: the organisation's limit on all releases ever; None is no limit.
        adjacency: that the limit is about.

    Raises:
        PolicyError: the limit would be passed; nothing was entered. Or the account is damaged, or cannot be written.
    """
    try:
        with exclusive(folder):
            account = read_account(folder)
            known = {entry.key for entry in account}
            new = [entry for entry in entries if entry.key not in known and entry.release.steps]
            if not new:
                return
            check_total([*account, *new], max_total_epsilon, max_delta, adjacency)
            for entry in new:
                append_line(folder / ACCOUNT_FILE, asdict(entry))
    except (OSError, RunDirError) as error:
        raise PolicyError(
            f"{folder / ACCOUNT_FILE}: the account of released ε cannot be written ({error}), so nothing is released. "
            "Check the space and the permissions there."
        ) from error


def check_total(
    entries: Iterable[Entry],
    max_total_epsilon: float | None,
    max_delta: float | None,
    adjacency: Adjacency = "add-remove",
) -> None:
    """Refuse releases that are more than the organisation allows over all runs.

    Raises:
        PolicyError: the total ε and the limit.
    """
    if max_total_epsilon is None or max_delta is None:
        return
    for unit, epsilon in total_epsilon(entries, max_delta, adjacency).items():
        if not epsilon <= max_total_epsilon:
            raise PolicyError(
                f"max_total_epsilon = {max_total_epsilon:g} of its own policy file: this run and the earlier ones "
                f"would come to ε = {epsilon:.3g} by {unit} ({adjacency}) at δ = {max_delta:g}. Use more noise, or "
                "agree on another limit with the organisation."
            )


def entries_of(told: Mapping[str, object] | None, key: str, run: str, what: str) -> Iterator[Entry]:
    """Yield the entry of a training from the ``privacy`` part of its report; none if it released nothing with noise."""
    if told:
        unit: Unit = "user" if told["unit"] == "user" else "domain"
        numbers = (float(str(told["noise_multiplier"])), float(str(told["sample_rate"])), int(str(told["steps"])))
        yield Entry(key, run, what, unit, Release(*numbers, replaced=REPLACED[unit]))
