"""A client's personal merge: its own expert and its own coefficients over the directions of the other domains.

The coefficients β are fitted at home, on users whose targets the expert did not fit, and stay at home: nothing but the
metric sums of the merge leaves. Δ_c has fitted the training items, so on them the gradient of β is biased to 0. With
``fit_on = "held-out"`` β is fitted on the validation item of users whom neither early stopping nor the selection on
validation reads. So no expert is trained again, cached experts keep their names, and other users choose the number of
steps and what is served. In a domain that validates on all of its users nobody is left, and β stays 0.
"""

import hashlib
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedmerge import __version__
from fedmerge.adapter import Adapter, adapter_sha256
from fedmerge.client.cache.folders import fill_folder, inputs_key
from fedmerge.client.evaluate import encode_text
from fedmerge.client.local_domain import MIN_TRAINING_USERS, LocalDomain
from fedmerge.client.training.batches import Batch, training_batches
from fedmerge.client.training.plain_sgd import batch_loss
from fedmerge.config import ExperimentConfig, Personal, Train
from fedmerge.domain.splits import MIN_EVALUATED_LENGTH, Examples, evaluated_users, evaluation_examples, examples_of
from fedmerge.encoder.peft.folder import read_adapter, write_adapter
from fedmerge.errors import FedMergeError
from fedmerge.evaluation.ranks import rank_targets, selection_score
from fedmerge.files import read_sealed, seal, write_json
from fedmerge.mergerec.coefficients import optimise
from fedmerge.mergerec.directions import (
    direction_stack,
    modules_without_direction,
    personal_merge,
    start_of_personal,
)
from fedmerge.mergerec.vectors import Vectors, merged_forward, on_device

RECORD_FILE = "personal.json"
BATCH_SIZE = 64
PRIOR = 1e-3  # the loss has ½ · PRIOR · ‖β‖²
VALIDATIONS = 4  # points after the start at which β is validated
Progress = Callable[[str], None]
Sequences = list[npt.NDArray[np.int32]]


@dataclass(frozen=True)
class PersonalSettings:
    """Everything that decides a personal merge, apart from domain, backbone, expert and cohort.

    Attributes:
        personal: section ``[personal]``.
        stopping_users: number of validation users that choose the number of steps; None takes all.
        choosing_users: number of validation users that the selection reads; None takes all.
        metrics: ``privacy.metrics``, which decides how those are drawn.
        seed: seed of the experiment.
        threads: PyTorch threads of the client.
    """

    personal: Personal
    stopping_users: int | None
    choosing_users: int | None
    metrics: str
    seed: int
    threads: int

    def record(self) -> dict[str, Any]:
        """Return the settings as JSON types, for the cache; the fit does not depend on ``universal``."""
        section = {key: value for key, value in self.personal.cache_inputs().items() if key != "universal"}
        return {**asdict(self), "personal": section}


def personal_settings(config: ExperimentConfig) -> PersonalSettings:
    """Select the settings of personal merges from an experiment."""
    return PersonalSettings(
        config.personal,
        config.train.validation_users,
        config.evaluation.validation_users,
        config.privacy.metrics,
        config.seed,
        config.runtime.threads_per_client,
    )


@dataclass(frozen=True, eq=False)
class PersonalMerge:
    """A client's personal merge.

    Attributes:
        adapter: the merge; the expert itself if no step beats it on validation.
        record: what is known of it, as in the cache: ``coefficients`` (domain -> G numbers, 1 for the own update
            unless it is fitted),
            ``groups``, ``best_step``, ``validations`` (step, NDCG@10), ``num_users``, ``seconds``, and
            ``without_direction`` (domain -> modules whose update is zero).
    """

    adapter: Adapter
    record: Mapping[str, Any]


def fitting_sequences(domain: LocalDomain, settings: PersonalSettings, choosing: npt.NDArray[np.int64]) -> Sequences:
    """Return the sequences that β is fitted on; with ``held-out`` the last item of each is the validation item.

    Args:
        domain: the client's domain.
        settings: fit_on, stopping_users and seed are read.
        choosing: indices of the users that the selection on validation reads.
    """
    if settings.personal.fit_on == "train":
        return domain.training_sequences
    interactions = domain.interactions
    if not (np.diff(interactions.offsets) >= MIN_EVALUATED_LENGTH).any():
        return []
    users = np.setdiff1d(evaluated_users(interactions, "valid"), choosing)
    users = np.setdiff1d(users, _stopping_examples(domain, settings).users)
    if domain.left_out is not None:  # an audit asks what training without them tells
        users = users[~domain.left_out[users]]
    examples = examples_of(interactions, "valid", users)
    targets = examples.targets.astype(np.int32)
    return [np.append(history, target) for history, target in zip(examples.histories, targets, strict=True)]


def fit_personal_merge(
    domain: LocalDomain,
    adapters: Mapping[str, Adapter],
    settings: PersonalSettings,
    sequences: Sequences,
    progress: Progress = lambda line: None,
) -> PersonalMerge:
    """Fit a client's coefficients β by Adam from 0, and keep the best of five points on validation.

    L(β) = in-batch softmax of the users' next items + ½ · 10⁻³ ‖β‖². The factor of the own update is 1; with
    ``personal.own`` it is fitted, too, from 1 by layer, and the prior pulls it there.

    Args:
        domain: the client's domain.
        adapters: domain -> expert, of the whole cohort, the client's own one included.
        settings: see there.
        sequences: of :func:`fitting_sequences`.
        progress: receives a line after every validation.

    Raises:
        MergeError: the own expert is missing, or a loss is not finite.
        LayoutMismatchError: the layouts of the experts differ.

    Source: FeDecider-style, see :func:`fedmerge.mergerec.directions.direction_stack`.
    """
    started, name = time.monotonic(), domain.manifest.name
    section = settings.personal
    stack = direction_stack(name, adapters, section.directions or "module")
    expert, own, start = adapters[name], stack.domains.index(name), start_of_personal(name, stack)
    validations: list[tuple[int, float]] = []
    best_step, coefficients = 0, start
    if len(sequences) >= MIN_TRAINING_USERS and len(stack.domains) > 1:
        validation = _stopping_examples(domain, settings)

        def validate(values: torch.Tensor) -> float:
            merge = personal_merge(name, expert, stack, values)
            score = _ndcg(domain, merge, validation)
            progress(f"{name}: personal merge, validation ndcg@10 {score:.4f}")
            return -score

        fit_batches = Train(batch_size=BATCH_SIZE, samples="last" if section.fit_on == "held-out" else "random-prefix")
        batches = training_batches(sequences, fit_batches, settings.seed, name, "personal")
        on_backbone = on_device(stack, domain.backbone.device)

        def gradient(_: int, values: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
            found, loss = coefficient_gradient(domain, on_backbone, values, next(batches)[0])
            if not section.own:
                found[own] = 0.0  # the own update keeps its factor
            return found, {"total": loss}

        learned = optimise(
            f"{name}: personal merge",
            start.to(domain.backbone.device),
            gradient,
            steps=section.steps,
            learning_rate=section.learning_rate,
            prior_weight=PRIOR / 2 * start.numel(),
            validate=validate,
            validate_every=max(1, section.steps // VALIDATIONS),
        )
        coefficients, best_step = learned.coefficients, learned.chosen_step
        validations = [(step, -score) for step, score in learned.validation]
    else:
        alone = len(stack.domains) == 1
        reason = "no other domain" if alone else f"{len(sequences)} users"
        progress(f"{name}: {reason} to fit a personal merge on; it is the expert")
    record = {
        "coefficients": dict(zip(stack.domains, coefficients.tolist(), strict=True)),
        "groups": list(stack.groups),
        "best_step": best_step,
        "validations": [list(validation) for validation in validations],
        "num_users": len(sequences),
        "without_direction": modules_without_direction(name, adapters),
        "seconds": time.monotonic() - started,
    }
    return PersonalMerge(personal_merge(name, expert, stack, coefficients), record)


def coefficient_gradient(
    domain: LocalDomain, stack: Vectors, coefficients: torch.Tensor, batch: Batch
) -> tuple[torch.Tensor, float]:
    """Return the gradient of a batch's in-batch softmax in the (K, G) coefficients, and the loss.

    Gradients flow through users and items, as in the training of an expert.
    """
    leaf = coefficients.detach().clone().requires_grad_()
    with merged_forward(domain.backbone, stack, leaf):
        loss = batch_loss(domain, batch, None)
    (found,) = torch.autograd.grad(loss, [leaf])
    return found, float(loss.detach())


def load_or_fit_personal_merge(
    domain: LocalDomain,
    adapters: Mapping[str, Adapter],
    sources: Mapping[str, str],
    settings: PersonalSettings,
    choosing: npt.NDArray[np.int64],
    cache_dir: str,
    progress: Progress = lambda line: None,
) -> PersonalMerge:
    """Return the client's personal merge: from its cache if the same inputs were fitted before, else fitted and cached.

    A fit that was killed starts again, with an identical result.

    Args:
        domain, adapters, settings, progress: as for :func:`fit_personal_merge`.
        sources: domain -> hash of the expert, as the server has it; see :func:`find_personal_merge`.
        choosing: as for :func:`fitting_sequences`.
        cache_dir: folder on the client's own disk.

    Raises:
        MergeError, LayoutMismatchError: as for :func:`fit_personal_merge`.
        ClientError: it cannot be cached.
    """
    name, sequences = domain.manifest.name, fitting_sequences(domain, settings, choosing)
    folder = _root(cache_dir) / f"{name}-{_key(domain, adapters, settings, sequences)}"
    if cached := _read_cached(folder):
        progress(f"{name}: reusing the personal merge in {folder}")
        return cached
    shutil.rmtree(folder, ignore_errors=True)  # a damaged one
    made = fit_personal_merge(domain, adapters, settings, sequences, progress)
    known = {
        "domain": name,
        "sources": dict(sources),
        "settings": settings.record(),
        "sha256": adapter_sha256(made.adapter),
        **made.record,
    }

    def write(path: Path) -> None:
        write_adapter(made.adapter, path, domain.backbone.name)
        write_json(path / RECORD_FILE, seal(known))

    fill_folder(folder, write, lambda: _read_cached(folder) is not None, f"domain {name}: its personal merge")
    return _read_cached(folder) or made


def find_personal_merge(
    name: str, sources: Mapping[str, str], settings: PersonalSettings, cache_dir: str
) -> Adapter | None:
    """Find the personal merge that a client fitted in a run; None if its cache has none.

    Args:
        name: the client's domain.
        sources: domain -> hash of its expert, of the cohort of the run.
        settings: of :func:`personal_settings`.
        cache_dir: folder on the client's own disk.
    """
    wanted = {"domain": name, "sources": dict(sources), "settings": settings.record()}
    for folder in sorted(_root(cache_dir).glob(f"{name}-*")):
        found = _read_cached(folder)
        if found is not None and {key: found.record.get(key) for key in wanted} == wanted:
            return found.adapter
    return None


def _ndcg(domain: LocalDomain, merge: Adapter, examples: Examples) -> float:
    text = encode_text(domain, merge, examples.histories)
    ranks = rank_targets(text.users, text.items, examples.targets)
    return selection_score(ranks)


def _stopping_examples(domain: LocalDomain, settings: PersonalSettings) -> Examples:
    """The validation users on which an expert's training stops."""
    return evaluation_examples(domain.interactions, "valid", settings.stopping_users, settings.seed)


def _root(cache_dir: str) -> Path:
    return Path(cache_dir).expanduser() / "personal"


def _key(
    domain: LocalDomain,
    adapters: Mapping[str, Adapter],
    settings: PersonalSettings,
    sequences: Sequences,
) -> str:
    fitted = hashlib.sha256()
    for sequence in sequences:
        fitted.update(f"{len(sequence)} ".encode() + sequence.tobytes())
    return inputs_key(
        {
            "catalog": domain.manifest.catalog_sha256,
            "interactions": domain.manifest.interactions_sha256,
            "backbone": domain.backbone.sha256,
            "pooling": domain.backbone.pooling,
            "text": domain.text.cache_inputs(),
            "adapters": {name: adapter_sha256(adapter) for name, adapter in adapters.items()},
            "settings": settings.record(),
            "sequences": fitted.hexdigest(),
            "device": str(domain.backbone.device),
            "precision": domain.backbone.compute.precision,
            "versions": [__version__, torch.__version__],
        }
    )


def _read_cached(folder: Path) -> PersonalMerge | None:
    """Read a cached merge; None if it is missing or damaged."""
    try:
        adapter, record = read_adapter(folder), read_sealed(folder / RECORD_FILE)
    except (FedMergeError, OSError, ValueError, KeyError):
        return None
    if record is None or record.get("sha256") != adapter_sha256(adapter):
        return None
    return PersonalMerge(adapter, record)
