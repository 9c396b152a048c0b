"""What a run has finished, kept in its folder (see ``fedmerge.runs.folder``), so that nothing finished is done again.

What is written here is whole or absent. What is read here is verified, and counts as absent where it is damaged: then
it is asked for or computed again, with the same result.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from fedmerge.adapter import Adapter, adapter_sha256
from fedmerge.encoder.peft_folder import write_adapter
from fedmerge.errors import FedMergeError, RunDirError
from fedmerge.evaluation.sums import VARIANTS, MetricSums, Variant, metric_sums_from_dict
from fedmerge.files import read_json, whole_folder, write_json
from fedmerge.mergerec.pictures import draw_learned
from fedmerge.merging.candidate import Candidate
from fedmerge.runs.verified import read_verified

ADAPTERS = "adapters"
LEARNING = "learning"
MERGED = "merged"
Stage = Literal["admission", "valid", "test"]
SUMS: Mapping[Stage, str] = {"admission": "admission", "valid": "validation", "test": "test"}
ADMISSION = "admission.json"

Sums = dict[Variant, MetricSums]


class KeptExperts(Mapping[str, Adapter]):
    """The experts of a run, each read from disk when it is asked for, see :mod:`fedmerge.runs.verified`."""

    def __init__(self, run_dir: Path, sources: Mapping[str, str]) -> None:
        """Experts by domain, with their hashes."""
        self._run_dir, self._sources = run_dir, dict(sorted(sources.items()))

    def __getitem__(self, domain: str) -> Adapter:
        """The expert of a domain.

        Raises:
            RunDirError: it was changed on disk since it arrived.
        """
        adapter, sha256 = read_verified(self._run_dir / ADAPTERS / domain)
        if sha256 != self._sources[domain]:
            raise RunDirError(
                f"{self._run_dir / ADAPTERS / domain}: this expert changed since it arrived; only the run may write "
                "there. Resume the run: its client sends the expert again."
            )
        return adapter

    def __iter__(self) -> Iterator[str]:
        """Domains, sorted."""
        return iter(self._sources)

    def __len__(self) -> int:
        """How many."""
        return len(self._sources)


def keep_expert(run_dir: Path, domain: str, adapter: Adapter, report: Mapping[str, Any], backbone_name: str) -> str:
    """Write an expert with the report of its training; return its hash.

    Raises:
        RunDirError: it cannot be written.
    """
    sha256 = adapter_sha256(adapter)
    with whole_folder(run_dir / ADAPTERS / domain) as folder:
        write_adapter(adapter, folder, backbone_name)
        write_json(folder / "training.json", {**report, "sha256": sha256})
    return sha256


def kept_expert(run_dir: Path, domain: str) -> str | None:
    """The hash of an expert that is there and whole."""
    folder = run_dir / ADAPTERS / domain
    try:
        sha256 = read_json(folder / "training.json")["sha256"]
        return str(sha256) if read_verified(folder)[1] == sha256 else None
    except (FedMergeError, OSError, LookupError, TypeError):
        return None


def end_training(run_dir: Path, sources: Mapping[str, str]) -> None:
    """Fix which experts are merged: domain -> hash."""
    write_json(run_dir / "experts.json", dict(sorted(sources.items())))


def ended_training(run_dir: Path) -> dict[str, str] | None:
    """The experts that are there to be merged, by hash, once that is fixed."""
    sources: dict[str, str] | None = read_json(run_dir / "experts.json")
    return sources


def turned_away(run_dir: Path) -> dict[str, str]:
    """Domain -> why the gate keeps its expert out of the merges; empty before it has decided, and where it flags."""
    record = read_json(run_dir / ADMISSION) or {}
    failed: dict[str, str] = record["failed"] if record.get("action") == "exclude" else {}
    return failed


def merge_folder(run_dir: Path, label: str) -> Path:
    """Where a merge lies."""
    return run_dir / MERGED / label.replace(" ", "-")


def keep_merge(run_dir: Path, candidate: Candidate, backbone_name: str) -> None:
    """Write a merge with its provenance, a learned one with its pictures.

    Raises:
        RunDirError: it cannot be written.
    """
    with whole_folder(merge_folder(run_dir, candidate.label)) as folder:
        write_adapter(candidate.adapter, folder, backbone_name)
        write_json(folder / "provenance.json", candidate.provenance)
        draw_learned(folder, candidate.provenance)


def kept_merges(run_dir: Path, sources: Mapping[str, str]) -> dict[str, Candidate]:
    """The merges of these experts that are there and whole, by label."""
    found = {}
    for folder in sorted((run_dir / MERGED).glob("[!.]*")):
        try:
            provenance = read_json(folder / "provenance.json")
            adapter, sha256 = read_verified(folder)
            if provenance["domains"] == dict(sources) and provenance["sha256"] == sha256:
                label = provenance["label"]
                found[label] = Candidate(label, provenance["method"], adapter, provenance)
        except (FedMergeError, OSError, LookupError, TypeError):
            continue
    return found


def keep_sums(run_dir: Path, stage: Stage, domain: str, sums: Mapping[Variant, MetricSums]) -> None:
    """Write the metric sums of a domain.

    Raises:
        RunDirError: they cannot be written.
    """
    folder = run_dir / SUMS[stage]
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise RunDirError(f"{folder} cannot be made ({error.strerror}). Check the permissions there.") from error
    write_json(folder / f"{domain}.json", {variant: of_variant.to_dict() for variant, of_variant in sums.items()})


def kept_sums(run_dir: Path, stage: Stage) -> dict[str, Sums]:
    """The metric sums that are there and whole, by domain, sorted."""
    found = {}
    for file in sorted((run_dir / SUMS[stage]).glob("*.json")):
        try:
            record = read_json(file)
            found[file.stem] = {variant: metric_sums_from_dict(record[variant]) for variant in VARIANTS}
        except (FedMergeError, LookupError, TypeError, ValueError):
            continue
    return found
