"""What the mechanisms of a run say that they released, read from its folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedmerge.config import ExperimentConfig
from fedmerge.privacy.releases import answer_rate, answers_have_noise
from fedmerge.run_dir import read_json, read_lines
from fedmerge.server.checkpoints import ADAPTERS, LEARNING, MERGED
from fedmerge.server.round_checkpoints import round_records
from fedmerge.server.summed import revealed_reports

EVERY_DOMAIN = "every domain"


def spent_by_domain(run_dir: Path, config: ExperimentConfig) -> dict[str, list[Mapping[str, Any]]]:
    """Domain -> one record for each kind of release: its expert, each round, answers, or a noised sum of all.

    Args:
        run_dir: the run.
        config: of the run. With ``dp.mode = "domain-central"`` the server alone adds noise; clients' accounts are
            nothing.
    """
    found: dict[str, list[Mapping[str, Any]]] = {}

    def add(domain: str, told: Mapping[str, Any] | None) -> None:
        if told and told.get("privacy"):
            found.setdefault(domain, []).append(told["privacy"])

    if config.dp.mode == "domain-central":
        for path in sorted((run_dir / MERGED).glob("[!.]*/provenance.json")):
            add(EVERY_DOMAIN, read_json(path))
        return found
    for path in sorted((run_dir / ADAPTERS).glob("[!.]*/training.json")):
        add(path.parent.name, read_json(path))
    in_sums = revealed_reports(run_dir)
    for domain, told in in_sums:
        add(domain, told)
    for record in round_records(run_dir) if not in_sums else ():
        for domain, told in sorted(record["clients"].items()):
            add(domain, told)
    if answers_have_noise(config) and (answers := _messages_by_domain(run_dir)):
        for domain, number in answers.items():
            training = found[domain][0]  # its noise was chosen for the answers, too
            changes: dict[str, Any] = {"clip": config.dp.coefficient_clip, "steps": number}
            if config.dp.mode == "user":
                changes["sample_rate"] = answer_rate(config, training["num_units"])
            found[domain].append({**training, **changes})
    return dict(sorted(found.items()))


def _messages_by_domain(run_dir: Path) -> dict[str, int]:
    """Domain -> how many messages about coefficients it was asked, at most: not every one has a part in each step."""
    found: dict[str, int] = {}
    for cohort in sorted((run_dir / LEARNING).glob("cohort-*.json")):
        logs = (run_dir / LEARNING).glob(f"*{cohort.stem.removeprefix('cohort')}.jsonl")
        number = sum(1 for log in logs for _ in read_lines(log))
        for domain in read_json(cohort) or {}:
            found[domain] = found.get(domain, 0) + number
    return {domain: number for domain, number in found.items() if number}
