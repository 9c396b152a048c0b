"""The merges that a secure sum gives without any single adapter: multiples of the mean, by METHODS' names."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedmerge.config import ExperimentConfig
from fedmerge.encoder.backbone import Backbone
from fedmerge.encoder.lora import Adapter, adapter_sha256, read_adapter, write_adapter
from fedmerge.errors import FedMergeError
from fedmerge.federated.product_space import weighted_sum
from fedmerge.run_dir import append_line, read_json, read_lines, whole_folder, write_json
from fedmerge.server.candidates import Candidate, linear_variants

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


def candidates_of_mean(
    config: ExperimentConfig, mean: Adapter, record: Mapping[str, Any], backbone: Backbone
) -> list[Candidate]:
    """Average and task arithmetic of the clients in a secure sum of equal coefficients.

    Args:
        config: merge counts.
        mean: of their experts.
        record: how it was made; its ``clients`` are who is in it.
        backbone: what they were trained on.
    """
    domains = sorted(record["clients"])
    candidates = []
    for method in config.merge.methods:
        for label, parameters in linear_variants(method, config):
            given = parameters.get("coefficient")
            coefficient = float(given) if given is not None else 1 / len(domains)
            adapter = weighted_sum({"mean": mean}, {"mean": coefficient * len(domains)})
            provenance = {
                "label": label,
                "method": method,
                "domains": dict.fromkeys(domains, ""),
                "rank": max(module.rank for module in adapter.modules.values()),
                "excluded": {},
                "policy": config.privacy.policy,
                "backbone": {"name": backbone.name, "sha256": backbone.sha256},
                "sha256": adapter_sha256(adapter),
                "parameters": parameters,
                "coefficients": dict.fromkeys(domains, coefficient),
                "coefficient_groups": ["all"],
                "secure_sum": {key: value for key, value in record.items() if key != "sha256"},
            }
            candidates.append(Candidate(label, method, adapter, provenance))
    return candidates
