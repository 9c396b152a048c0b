"""The cells that rank a client's users: under a merge or an expert, a baseline, or a head; and the sums of their ranks.

Ranks of single users are under ``clients/``, which represents the clients' own disks.
"""

import io
import zipfile
from collections.abc import Mapping
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from fedmerge.adapter import Adapter
from fedmerge.client.baselines.rankers import baseline_rankers, sasrec_settings
from fedmerge.client.baselines.sasrec import sasrec_inputs
from fedmerge.client.cache.folders import inputs_key
from fedmerge.client.evaluate import Ranks, TextVectors, baseline_ranks, encode_text, model_ranks
from fedmerge.client.heads.heads import head_ranks, load_or_train_head, why_no_head
from fedmerge.client.heads.vectors import item_vectors
from fedmerge.client.local_domain import LocalDomain, open_domain
from fedmerge.config import (
    BackboneSection,
    Baseline,
    Evaluation,
    ExperimentConfig,
    HeadVectors,
    Runtime,
    Split,
    Text,
)
from fedmerge.device import resolve_compute
from fedmerge.domain.demo import domain_folder
from fedmerge.domain.interactions import load_interactions
from fedmerge.domain.manifest import read_manifest
from fedmerge.domain.splits import Examples, evaluation_examples
from fedmerge.encoder.backbone import Backbone, open_backbone
from fedmerge.encoder.peft.folder import read_adapter
from fedmerge.errors import DomainError, RunDirError
from fedmerge.evaluation.ranks import per_user_metrics
from fedmerge.evaluation.sums import VARIANTS, MetricSums, Variant, head_label, metric_sums
from fedmerge.files import write_bytes, write_json
from fedmerge.privacy.policy import check_enough_users


def rank_model(
    result: Path, config: ExperimentConfig, domain: str, split: Split, test_root: str | None, adapter: Path | None
) -> None:
    """Write every user's rank of the target under one model.

    Args:
        result: on the client's own disk.
        config: text, backbone, evaluation, runtime and seed count.
        domain: its name.
        split: split of the targets.
        test_root: folder of domains whose users are ranked, with equal catalogs; None: those of the experiment.
        adapter: a PEFT folder; None for the backbone alone.
    """
    opened = domain_of(config, domain)
    examples = questions(config, domain, split, test_root)
    encoder, text = text_vectors(config, domain, split, test_root, adapter)
    write_ranks(result, {"": model_ranks(opened, {"model": encoder}, examples, encoded={"model": text})["model"]})


def rank_baseline(
    result: Path, config: ExperimentConfig, domain: str, split: Split, test_root: str | None, baseline: Baseline
) -> None:
    """Do the same as :func:`rank_model` under a baseline; the file is empty if it has no training data."""
    opened = domain_of(config, domain)
    examples = questions(config, domain, split, test_root)
    found = baseline_ranks(
        examples, baseline_rankers(opened, [baseline], config.evaluation, config.seed, config.cache_dir)
    )
    rows = [*found.values()]
    write_ranks(result, {"": rows[0]} if rows else {})


def rank_head(
    result: Path,
    config: ExperimentConfig,
    domain: str,
    split: Split,
    test_root: str | None,
    adapter: Path | None,
    vectors: HeadVectors,
    seed: int,
    anchor: Path | None,
) -> None:
    """Train a domain's own head, or load it, and do the same as :func:`rank_model` under it, alone and fused.

    The file is empty if the domain has too few users for a head.

    Args:
        result, config, domain, split, test_root: as for :func:`rank_model`.
        adapter: a PEFT folder, whose item vectors the head reads; None for the backbone.
        vectors: the head's name for that adapter.
        seed: seed of the head's training.
        anchor: PEFT folder of a federated head that the client continues; None without one.
    """
    opened, examples = domain_of(config, domain), questions(config, domain, split, test_root)
    if why_no_head(opened):
        write_json(head_report(result), {"seconds": 0.0})
        write_ranks(result, {})
        return
    model, text = text_vectors(config, domain, split, test_root, adapter)
    validation_users = num_users(config.evaluation, "valid")
    shared = None if anchor is None else read_adapter(anchor)
    head = load_or_train_head(opened, model, config.head, validation_users, seed, config.cache_dir, anchor=shared)
    write_json(head_report(result), {**head.report, "fusion": {of: asdict(made) for of, made in head.fusion.items()}})
    found = head_ranks(opened, vectors, model, head, examples, text)
    write_ranks(result, {label.removeprefix(head_label(vectors)): ranks for label, ranks in found.items()})


def head_report(ranks: Path) -> Path:
    """Return the file with the report of the training of a head, beside its ranks."""
    return ranks.with_suffix(".json")


# ---- data that leaves a client


def ranks_file(
    clients: Path,
    config: ExperimentConfig,
    domain: str,
    split: Split,
    test_root: str | None,
    model: str,
    head_seed: int | None = None,
) -> Path:
    """Return the file of a domain's ranks under a model, named by the hash of all their inputs.

    Args:
        clients: folder that represents the clients' disks.
        config, domain, split, test_root: as for :func:`rank_model`.
        model: the adapter's hash, or the name of another row.
        head_seed: seed of a head on the vectors of that model; None without one.
    """
    of_head = {key: value for key, value in config.head.cache_inputs().items() if key != "vectors"}
    inputs = {
        "root": config.domains.root,
        "text": config.text.cache_inputs(),
        "backbone": config.backbone.cache_inputs(),
        "sasrec": sasrec_inputs(sasrec_settings(config.evaluation)),
        "runtime": [config.runtime.device, config.runtime.precision],
        "users": [config.seed, num_users(config.evaluation, split), config.evaluation.validation_users],
        "model": model,
        **({"test_root": test_root} if test_root else {}),
        **({"head": of_head, "seed": head_seed} if head_seed is not None else {}),
    }
    return clients / domain / split / f"{inputs_key(inputs)}.npz"


def sums_of_ranks(files: Mapping[str, Path], domain: str, min_users: int) -> dict[Variant, MetricSums]:
    """Return a client's answer: sums over its users, and their products between rows.

    Args:
        files: row -> file of ranks, of the same users; rows whose file is empty are left out. A head's file has two
            rows, the second with FUSED at its end.
        domain: for messages.
        min_users: smallest number of users whose sums may leave.

    Raises:
        PolicyError: too few users.
        RunDirError: a file cannot be read.
    """
    ranks = {row + end: read for row, file in files.items() for end, read in _read_ranks(file).items()}
    sums = {
        variant: metric_sums({row: per_user_metrics(found[variant]) for row, found in ranks.items()}, variant)
        for variant in VARIANTS
    }
    for of_variant in sums.values():
        check_enough_users(domain, of_variant.num_users, min_users)
    return sums


def num_users(evaluation: Evaluation, split: Split) -> int | None:
    """Return the largest number of evaluated users in a domain."""
    return evaluation.validation_users if split == "valid" else evaluation.test_users


def questions(config: ExperimentConfig, domain: str, split: Split, test_root: str | None) -> Examples:
    """Return the questions to rank, of users of the experiment's domain or of its namesake in another folder.

    Raises:
        DomainError: the catalogs of the two differ.
    """
    users = num_users(config.evaluation, split)
    return _questions(domain_of(config, domain), config.domains.root, split, test_root, users, config.seed)


def text_vectors(
    config: ExperimentConfig, domain: str, split: Split, test_root: str | None, adapter: Path | None
) -> tuple[Adapter | None, TextVectors]:
    """Return an encoder, and its vectors of a domain's items and of the histories of :func:`questions`.

    Those of the last calls are kept, since a model and its heads are ranked one after the other.
    """
    opened, users = domain_of(config, domain), num_users(config.evaluation, split)
    return _text_vectors(opened, config.domains.root, split, test_root, users, config.seed, adapter, config.cache_dir)


def write_ranks(file: Path, rows: Mapping[str, Ranks]) -> None:
    """Write the ranks of rows; each array is named by its variant and the end of its row's name."""
    arrays: dict[str, Any] = {
        variant + end: of_variant.astype(np.int32)
        for end, ranks in rows.items()
        for variant, of_variant in ranks.items()
    }
    data = io.BytesIO()
    np.savez_compressed(data, **arrays)
    write_bytes(file, data.getvalue())


def _read_ranks(file: Path) -> dict[str, Ranks]:
    try:
        with np.load(file) as arrays:
            rows: dict[str, Ranks] = {}
            for name in arrays.files:
                variant = next(variant for variant in VARIANTS if name.startswith(variant))
                rows.setdefault(name.removeprefix(variant), {})[variant] = arrays[name].astype(np.int64)
            return rows
    except (OSError, ValueError, StopIteration, zipfile.BadZipFile) as error:
        raise RunDirError(f"{file}: cannot be read ({error}). Delete it and start the benchmark again.") from error


# ---- shared by the cells of a process


def _questions(
    domain: LocalDomain, root: str, split: Split, test_root: str | None, max_users: int | None, seed: int
) -> Examples:
    interactions = domain.interactions
    if test_root is not None:
        name, own = domain.manifest.name, domain.manifest
        other = read_manifest(Path(test_root) / name)
        if own.catalog_sha256 != other.catalog_sha256:
            raise DomainError(
                f"domain {name}: its catalog in {root} has hash {own.catalog_sha256[:12]}…, that in test_root "
                f"{test_root} has {other.catalog_sha256[:12]}…; expected equal catalogs. Cut the domains of test_root "
                "with 'fedmerge data cut'."
            )
        interactions = load_interactions(Path(test_root) / name)
    return evaluation_examples(interactions, split, max_users, seed)


@lru_cache(maxsize=4)  # 50 MB each at 20,000 users
def _text_vectors(
    domain: LocalDomain,
    root: str,
    split: Split,
    test_root: str | None,
    max_users: int | None,
    seed: int,
    adapter: Path | None,
    cache_dir: str,
) -> tuple[Adapter | None, TextVectors]:
    encoder = None if adapter is None else read_adapter(adapter)
    histories = _questions(domain, root, split, test_root, max_users, seed).histories
    return encoder, encode_text(domain, encoder, histories, item_vectors(domain, encoder, cache_dir))


def domain_of(config: ExperimentConfig, domain: str) -> LocalDomain:
    """Return a domain, opened once per process."""
    return _domain(
        domain_folder(config.domains.root, domain, config.cache_dir),
        backbone_of(config.backbone, config.runtime),
        config.text,
    )


@lru_cache(maxsize=1)
def backbone_of(section: BackboneSection, runtime: Runtime) -> Backbone:
    """Return the frozen encoder, loaded once per process."""
    compute = resolve_compute(runtime.device, runtime.precision)
    return open_backbone(section, compute)


@lru_cache(maxsize=16)  # small beside the backbone; opening one tokenises its catalog
def _domain(folder: Path, backbone: Backbone, text: Text) -> LocalDomain:
    return open_domain(folder, backbone, text)
