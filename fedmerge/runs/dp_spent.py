"""The releases of a run's privacy mechanisms, as recorded in its folder."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedmerge.config import ExperimentConfig
from fedmerge.files import append_line, read_json, read_lines, read_sealed
from fedmerge.privacy.dp.releases import METRIC_SUMS, answers_have_noise, noised_sums, sample_rate
from fedmerge.runs.checkpoints import ADAPTERS, LEARNING, MERGED
from fedmerge.runs.round_checkpoints import round_records
from fedmerge.runs.secure_sums import revealed_reports

EVERY_DOMAIN = "every domain"
RELEASED = "released.jsonl"
ANSWER: Mapping[str, Any] = {"answer": True}  # an answer about coefficients; its noise is that of its domain's training


def note_release(
    run_dir: Path, domain: str, number: int, sha256: str, privacy: Mapping[str, Any] | None, why_not: str = ""
) -> None:
    """Record what a reply released, before anything can refuse it: it has left its client whatever happens next.

    Args:
        run_dir: run folder.
        domain: domain that sent the reply.
        number: round of the reply; 0 outside of rounds.
        sha256: hash of the content; the same content sent twice is one release.
        privacy: record of the release, :data:`ANSWER` for an answer about coefficients, None if it is unknown.
        why_not: reason why the record is unknown, else empty.

    Raises:
        RunDirError: the file cannot be written.
    """
    line = {"domain": domain, "round": number, "sha256": sha256, "privacy": privacy, "why_not": why_not}
    append_line(run_dir / RELEASED, line)


def not_counted(run_dir: Path) -> dict[str, str]:
    """Return domain -> why a release of it cannot be counted."""
    return {line["domain"]: line["why_not"] for line in read_lines(run_dir / RELEASED) if line["privacy"] is None}


def spent_by_domain(run_dir: Path, config: ExperimentConfig) -> dict[str, list[Mapping[str, Any]]]:
    """Return domain -> one record for each kind of release: expert, rounds, answers, metric sums, or a sum of all.

    Every reply that arrived counts, including late and refused ones.

    Args:
        run_dir: run folder.
        config: configuration of the run. With ``dp.mode = "domain-central"`` only the server adds noise, and only its
            releases count.
    """
    found: dict[str, list[Mapping[str, Any]]] = {}

    def add(domain: str, reported: Mapping[str, Any] | None) -> None:
        if reported and reported.get("privacy"):
            found.setdefault(domain, []).append(reported["privacy"])

    if config.dp.mode == "domain-central":
        for path in sorted((run_dir / MERGED).glob("[!.]*/provenance.json")):
            add(EVERY_DOMAIN, read_json(path))
        return found
    noted = {
        (line["domain"], line["round"], line["sha256"]): line["privacy"] for line in read_lines(run_dir / RELEASED)
    }
    arrived = Counter(domain for (domain, _, _), privacy in noted.items() if privacy == ANSWER)
    trained = {release: privacy for release, privacy in noted.items() if privacy not in (None, ANSWER)}
    for (domain, _, _), privacy in trained.items():
        add(domain, {"privacy": privacy})
    counted = {(domain, number) for domain, number, _ in trained}  # others on disk have no line in RELEASED
    for path in sorted((run_dir / ADAPTERS).glob("[!.]*/training.json")):
        if (path.parent.name, 0) not in counted:
            add(path.parent.name, read_sealed(path))
    in_sums = revealed_reports(run_dir)
    for domain, reported in in_sums:
        add(domain, reported)
    for number, record in enumerate(round_records(run_dir) if not in_sums else (), start=1):
        for domain, reported in sorted(record["clients"].items()):
            if (domain, number) not in counted:
                add(domain, reported)
    if answers_have_noise(config.dp, config.through_clients):
        asked = _messages_by_domain(run_dir)
        for domain in sorted({*asked, *arrived} & {*found}):
            training = found[domain][0]  # the noise was chosen to cover the answers, too
            number = max(asked.get(domain, 0), arrived[domain])
            changes: dict[str, Any] = {"clip": config.dp.coefficient_clip, "steps": number}
            if config.dp.mode == "user":
                changes["sample_rate"] = sample_rate(config.through_clients.batch_size, training["num_units"])
            found[domain].append({**training, **changes})
    return dict(sorted(found.items()))


def add_metric_sums(
    spent: Mapping[str, Sequence[Mapping[str, Any]]], evaluated: Iterable[str], config: ExperimentConfig
) -> dict[str, list[Mapping[str, Any]]]:
    """Add the noised metric sums of every domain that was evaluated: as many as a client sends at most.

    Args:
        spent: of :func:`spent_by_domain`.
        evaluated: domains that sent metric sums.
        config: configuration of the run.
    """
    found = {domain: list(records) for domain, records in spent.items()}
    for domain in evaluated:
        record = {
            "unit": "user",
            "what": METRIC_SUMS,
            "noise_multiplier": config.privacy.metrics_noise,
            "clip": 1.0,
            "sample_rate": 1.0,
            "num_units": None,
            "steps": noised_sums(config),
            "randomness": config.dp.randomness,
        }
        found.setdefault(domain, []).append(record)
    return dict(sorted(found.items()))


def _messages_by_domain(run_dir: Path) -> dict[str, int]:
    """Return domain -> number of coefficient messages sent to it, an upper bound: not every step asks every domain."""
    found: dict[str, int] = {}
    for cohort in sorted((run_dir / LEARNING).glob("cohort-*.json")):
        logs = (run_dir / LEARNING).glob(f"*{cohort.stem.removeprefix('cohort')}.jsonl")
        number = sum(1 for log in logs for _ in read_lines(log))
        for domain in read_sealed(cohort) or {}:
            found[domain] = found.get(domain, 0) + number
    return {domain: number for domain, number in found.items() if number}
