"""Checkpoints of a run in its folder (see :mod:`fedmerge.runs.folder`), so that finished work is never repeated.

Every checkpoint is written whole or not at all. It is verified when it is read; a damaged one counts as absent and is
requested or computed again, with the same result.
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from fedmerge.adapter import Adapter, OnDemand, adapter_sha256, is_zero
from fedmerge.encoder.peft.folder import write_adapter
from fedmerge.errors import FedMergeError, RunDirError
from fedmerge.evaluation.sums import VARIANTS, MetricSums, Variant, metric_sums_from_dict
from fedmerge.federated.shared_items import SharedItems
from fedmerge.federated.weaving import Weaving
from fedmerge.files import read_json, read_record, read_sealed, seal, whole_folder, write_json
from fedmerge.mergerec.pictures import draw_learned
from fedmerge.merging.candidate import Candidate, Provenance
from fedmerge.merging.signals import Signals, read_signals
from fedmerge.runs.folder import ADMISSION
from fedmerge.runs.verified import read_verified
from fedmerge.tensor_files import read_tensors, write_tensors

ADAPTERS = "adapters"
LEARNING = "learning"
MERGED = "merged"
HEADS = "heads"
WOVEN = "woven"
WEAVE_FILE = "weave.json"
SIMILARITY = "similarity"  # folder of similarity factors
FACTORS_FILE = "averaged.json"
WOVEN_MERGES = "woven-merges"
Stage = Literal["admission", "valid", "heads", "test"]
SUMS: Mapping[Stage, str] = {
    "admission": "admission",
    "valid": "validation",
    "heads": "heads-validation",
    "test": "test",
}

Sums = dict[Variant, MetricSums]


def stored_experts(run_dir: Path, sources: Mapping[str, str]) -> Mapping[str, Adapter]:
    """Return domain -> expert of a run, each read from disk on access (see :mod:`fedmerge.runs.verified`).

    Reading raises RunDirError if the expert changed on disk since it arrived.

    Args:
        run_dir: run folder.
        sources: domain -> hash of its expert.
    """
    return OnDemand(sources, lambda domain: _read_unchanged(run_dir / ADAPTERS / domain, sources[domain], "expert"))


def stored_signals(run_dir: Path, experts: Mapping[str, Adapter]) -> Signals:
    """Return domain -> training signals of its expert, None where the client sent none; each read from disk on access.

    Args:
        run_dir: run folder.
        experts: domain -> expert.
    """
    return OnDemand(experts, lambda domain: read_signals(run_dir / ADAPTERS / domain, experts[domain]))


def write_expert(run_dir: Path, domain: str, adapter: Adapter, report: Mapping[str, Any], backbone_name: str) -> str:
    """Write an expert and the report of its training, with ``nothing_learned``; return its hash.

    Raises:
        RunDirError: the folder cannot be written.
    """
    sha256 = adapter_sha256(adapter)
    with whole_folder(run_dir / ADAPTERS / domain) as folder:
        write_adapter(adapter, folder, backbone_name)
        record = {**report, "nothing_learned": is_zero(adapter), "sha256": sha256}
        write_json(folder / "training.json", seal(record))
    return sha256


def read_untrained(run_dir: Path, domains: Iterable[str]) -> list[str]:
    """Return the domains whose experts are zero, sorted: nothing was learned there."""
    reports = {domain: read_record(run_dir / ADAPTERS / domain / "training.json") for domain in domains}
    return sorted(domain for domain, report in reports.items() if report.get("nothing_learned") is True)


def read_expert_hash(run_dir: Path, domain: str) -> str | None:
    """Return the hash of an expert on disk; None if it is absent or damaged."""
    folder = run_dir / ADAPTERS / domain
    try:
        report = read_sealed(folder / "training.json") or {}
        sha256 = report["sha256"]
        return str(sha256) if read_verified(folder)[1] == sha256 else None
    except (FedMergeError, OSError, LookupError, TypeError, AttributeError):
        return None


def woven_folder(run_dir: Path, weaving: Weaving) -> Path:
    """Return the folder of an adapter that a client continued."""
    return run_dir / WOVEN / weaving.target / weaving.source.replace(" ", "-")


def stored_woven(run_dir: Path, hashes: Mapping[Weaving, str]) -> Mapping[Weaving, Adapter]:
    """Return training -> continued adapter of a run, each read from disk on access, as by :func:`stored_experts`.

    Args:
        run_dir: run folder.
        hashes: training -> hash of its adapter.
    """
    return OnDemand(hashes, lambda each: _read_unchanged(woven_folder(run_dir, each), hashes[each], "adapter"))


def write_woven(
    run_dir: Path, weaving: Weaving, adapter: Adapter, report: Mapping[str, Any], start_sha256: str, backbone_name: str
) -> str:
    """Write a continued adapter, the report of its training, and the hash of its start; return its hash.

    Raises:
        RunDirError: the folder cannot be written.
    """
    sha256 = adapter_sha256(adapter)
    _made(run_dir / WOVEN)
    with whole_folder(_made(run_dir / WOVEN / weaving.target) / woven_folder(run_dir, weaving).name) as folder:
        write_adapter(adapter, folder, backbone_name)
        record = {**report, "source": weaving.source, "start_sha256": start_sha256, "sha256": sha256}
        write_json(folder / "training.json", seal(record))
    return sha256


def read_woven_hash(run_dir: Path, weaving: Weaving, start_sha256: str) -> str | None:
    """Return the hash of a continued adapter on disk; None if it is absent, damaged, or had another start."""
    folder = woven_folder(run_dir, weaving)
    try:
        report = read_sealed(folder / "training.json") or {}
        whole = report["start_sha256"] == start_sha256 and read_verified(folder)[1] == report["sha256"]
        return str(report["sha256"]) if whole else None
    except (FedMergeError, OSError, LookupError, TypeError, AttributeError):
        return None


def write_weave(run_dir: Path, hashes: Mapping[Weaving, str]) -> None:
    """End the weaving: record the continued adapters to merge, target -> source -> hash."""
    write_json(run_dir / WEAVE_FILE, seal(weave_record(hashes)))


def weave_record(hashes: Mapping[Weaving, str]) -> dict[str, Any]:
    """Return the hashes of continued adapters as target -> source -> hash."""
    woven: dict[str, dict[str, str]] = {}
    for each, sha256 in sorted(hashes.items()):
        woven.setdefault(each.target, {})[each.source] = sha256
    return {"woven": woven}


def read_weave(run_dir: Path) -> dict[Weaving, str] | None:
    """Return the hashes of the continued adapters to merge; None while the weaving has not ended."""
    record = read_sealed(run_dir / WEAVE_FILE)
    if record is None:
        return None
    return {Weaving(target, source): sha for target, of in record["woven"].items() for source, sha in of.items()}


def write_factors(run_dir: Path, domain: str, shared: SharedItems, factors: torch.Tensor) -> str:
    """Write a domain's similarity factors (n, q) with the items that they are of; return their hash.

    Raises:
        RunDirError: the folder cannot be written.
    """
    _made(run_dir / SIMILARITY)
    tensors = {
        "items": torch.from_numpy(shared.items),
        "shared": torch.from_numpy(shared.shared),
        "factors": factors,
    }
    write_tensors(_factors_file(run_dir, domain), tensors, {}, f"the similarity factors of {domain}")
    return _factors_sha256(shared, factors)


def read_factors(run_dir: Path, domain: str) -> tuple[SharedItems, torch.Tensor, str] | None:
    """Return what :func:`write_factors` wrote, and its hash; None if it is absent or damaged."""
    found = read_tensors(_factors_file(run_dir, domain))
    if found is None or {*found[0]} != {"items", "shared", "factors"}:
        return None
    shared = SharedItems(found[0]["items"].numpy(), found[0]["shared"].numpy())
    return shared, found[0]["factors"], _factors_sha256(shared, found[0]["factors"])


def write_factor_hashes(run_dir: Path, hashes: Mapping[str, str]) -> None:
    """End the collection of factors: record those that are averaged, domain -> hash."""
    write_json(run_dir / SIMILARITY / FACTORS_FILE, seal(dict(sorted(hashes.items()))))


def read_factor_hashes(run_dir: Path) -> dict[str, str] | None:
    """Return the factors that are averaged, domain -> hash; None while they are collected."""
    hashes: dict[str, str] | None = read_sealed(run_dir / SIMILARITY / FACTORS_FILE)
    return hashes


def stored_factors(run_dir: Path) -> dict[str, tuple[SharedItems, torch.Tensor]]:
    """Return domain -> the items and factors that were averaged; empty without any.

    Raises:
        RunDirError: some changed on disk since they arrived.
    """
    sent = {}
    for domain, sha256 in (read_factor_hashes(run_dir) or {}).items():
        found = read_factors(run_dir, domain)
        if found is None or found[2] != sha256:
            raise RunDirError(
                f"{_factors_file(run_dir, domain)}: changed since it arrived, or missing; expected the similarity "
                f"factors with hash {sha256[:12]}. Restore the file from a copy of the run."
            )
        sent[domain] = found[:2]
    return sent


def _factors_file(run_dir: Path, domain: str) -> Path:
    return run_dir / SIMILARITY / f"{domain}.safetensors"


def _factors_sha256(shared: SharedItems, factors: torch.Tensor) -> str:
    digest = hashlib.sha256()
    for array in (shared.items, shared.shared, factors.numpy()):
        digest.update(f"{array.dtype} {array.shape} ".encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def write_sources(run_dir: Path, sources: Mapping[str, str]) -> None:
    """End the training: record the experts to merge, domain -> hash."""
    write_json(run_dir / "experts.json", dict(sorted(sources.items())))


def read_sources(run_dir: Path) -> dict[str, str] | None:
    """Return the experts to merge, domain -> hash; None while training has not ended."""
    sources: dict[str, str] | None = read_json(run_dir / "experts.json")
    return sources


def read_excluded_experts(run_dir: Path) -> dict[str, str]:
    """Return domain -> why the admission gate excludes its expert from merging.

    The result is empty before the gate has decided, and if the gate only flags experts.
    """
    record = read_sealed(run_dir / ADMISSION) or {}
    failed: dict[str, str] = record["failed"] if record.get("action") == "exclude" else {}
    return failed


def merge_folder(run_dir: Path, label: str) -> Path:
    """Return the folder of a merge."""
    return run_dir / MERGED / label.replace(" ", "-")


def write_candidate(run_dir: Path, candidate: Candidate, backbone_name: str) -> None:
    """Write a merge and its provenance, for a learned merge also its pictures.

    Raises:
        RunDirError: the folder cannot be written.
    """
    _write_merge(merge_folder(run_dir, candidate.label), candidate, backbone_name)


def _write_merge(path: Path, candidate: Candidate, backbone_name: str) -> None:
    with whole_folder(path) as folder:
        write_adapter(candidate.adapter, folder, backbone_name)
        write_json(folder / "provenance.json", seal(candidate.provenance.to_dict()))
        draw_learned(folder, candidate.provenance)


def _read_merge(folder: Path) -> Candidate | None:
    """Return the merge in a folder; None if it is absent or damaged."""
    try:
        provenance = Provenance.from_dict(read_sealed(folder / "provenance.json") or {})
        adapter, sha256 = read_verified(folder)
        return Candidate(adapter, provenance) if provenance.sha256 == sha256 else None
    except (FedMergeError, OSError, LookupError, TypeError, AttributeError):
        return None


def target_merge_folder(run_dir: Path, domain: str) -> Path:
    """Return the folder of the woven merge of one domain."""
    return run_dir / WOVEN_MERGES / domain


def write_target_merge(run_dir: Path, domain: str, candidate: Candidate, backbone_name: str) -> None:
    """Write the woven merge of one domain, with the factor that its validation chose.

    Raises:
        RunDirError: the folder cannot be written.
    """
    _write_merge(_made(run_dir / WOVEN_MERGES) / domain, candidate, backbone_name)


def read_target_merge(run_dir: Path, domain: str) -> Candidate | None:
    """Return the woven merge of one domain; None if it is absent or damaged."""
    return _read_merge(target_merge_folder(run_dir, domain))


def read_candidates(run_dir: Path, sources: Mapping[str, str]) -> dict[str, Candidate]:
    """Return label -> merge of exactly these experts (domain -> hash); damaged merges are skipped."""
    made = [_read_merge(folder) for folder in sorted((run_dir / MERGED).glob("[!.]*"))]
    of_these = [each for each in made if each is not None and each.provenance.domains == dict(sources)]
    return {each.label: each for each in of_these if each.provenance.label}


def write_heads(run_dir: Path, domain: str, of: Mapping[str, str], reports: Mapping[str, Mapping[str, Any]]) -> None:
    """Write a client's reports of its heads.

    Args:
        run_dir: run folder.
        domain: name of the domain.
        of: the models that the heads were trained over, label -> hash.
        reports: vectors -> report.

    Raises:
        RunDirError: the file cannot be written.
    """
    record = {"of": dict(of), "reports": {vectors: dict(report) for vectors, report in reports.items()}}
    write_json(_made(run_dir / HEADS) / f"{domain}.json", seal(record))


def read_heads(run_dir: Path, of: Mapping[str, str]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return domain -> vectors -> report of the heads over exactly these models, label -> hash; sorted by domain.

    Damaged files and heads over other models are skipped.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for file in sorted((run_dir / HEADS).glob("*.json")):
        try:
            record = read_sealed(file) or {}
            if record["of"] == dict(of):
                found[file.stem] = record["reports"]
        except (FedMergeError, LookupError, TypeError):
            continue
    return found


def write_sums(run_dir: Path, stage: Stage, domain: str, sums: Mapping[Variant, MetricSums]) -> None:
    """Write the metric sums of a domain.

    Raises:
        RunDirError: the file cannot be written.
    """
    record = {str(variant): of_variant.to_dict() for variant, of_variant in sums.items()}
    write_json(_made(run_dir / SUMS[stage]) / f"{domain}.json", seal(record))


def read_sums(run_dir: Path, stage: Stage) -> dict[str, Sums]:
    """Return domain -> metric sums, sorted by domain; damaged files are skipped."""
    found = {}
    for file in sorted((run_dir / SUMS[stage]).glob("*.json")):
        try:
            record = read_sealed(file) or {}
            found[file.stem] = {variant: metric_sums_from_dict(record[variant]) for variant in VARIANTS}
        except (FedMergeError, LookupError, TypeError, ValueError):
            continue
    return found


def _read_unchanged(folder: Path, expected: str, what: str) -> Adapter:
    adapter, sha256 = read_verified(folder)
    if sha256 != expected:
        raise RunDirError(
            f"{folder}: this {what} changed since it arrived; only the run may write there. Resume the run: its client "
            f"sends the {what} again."
        )
    return adapter


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise RunDirError(f"{folder}: cannot be created ({error.strerror}). Check the permissions there.") from error
    return folder
