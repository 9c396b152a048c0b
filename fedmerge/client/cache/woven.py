"""The cache of the adapters of other domains that a client has continued: the same inputs are trained once."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from fedmerge.adapter import Adapter, adapter_sha256
from fedmerge.client.cache.dp_releases import Release, release_woven_once
from fedmerge.client.cache.experts import (
    Trained,
    cached_or_trained,
    expert_inputs,
    is_released_once,
    release_key,
)
from fedmerge.client.cache.folders import inputs_key
from fedmerge.client.local_domain import LocalDomain
from fedmerge.client.training.by_mode import continue_as_asked
from fedmerge.client.training.loop import Progress
from fedmerge.client.training.settings import TrainingSettings, WeaveTask


def load_or_weave(
    domain: LocalDomain,
    settings: TrainingSettings,
    task: WeaveTask,
    most: int,
    cache_dir: str,
    run_id: str | None,
    progress: Progress,
) -> tuple[Adapter, dict[str, Any]]:
    """Return the continued adapter: from the cache if the same inputs were trained before, else trained and cached.

    A training that was killed resumes from its checkpoint. By user a run releases one adapter for each pass.

    Args:
        domain: the client's domain.
        settings: settings of the training; with data, backbone, versions and ``task.start`` they are the cache's key.
        task: the request.
        most: number of passes that the noise is calibrated for.
        cache_dir: folder on the client's own disk.
        run_id: name of the run; by user it names the release.
        progress: receives a line now and then.

    Returns:
        The adapter, and its report as of :func:`fedmerge.client.cache.experts.load_or_train_expert`.

    Raises:
        PolicyError: by user, the pass is not counted, or the run has released another adapter in it.
        ClientError: the loss is not finite, or the adapter cannot be cached.
    """
    name, inputs = domain.manifest.name, _inputs(domain, settings, task)
    folder = Path(cache_dir).expanduser() / "woven" / f"{name}-{inputs_key(inputs)}"

    def train(checkpoint: Path) -> Trained:
        return continue_as_asked(domain, settings, task, progress, checkpoint)

    def made() -> Release:
        return Release(
            *cached_or_trained(domain, settings, folder, f"continued adapter of {task.source}", train, progress)
        )

    if not is_released_once(settings, run_id):
        found = made()
    else:
        found = release_woven_once(domain, cache_dir, run_id, task, most, release_key(inputs), made)
    return found.adapter, dict(found.report)


def _inputs(domain: LocalDomain, settings: TrainingSettings, task: WeaveTask) -> dict[str, Any]:
    weave = settings.weave
    return {
        **expert_inputs(domain, settings),
        "source": task.source,
        "start": adapter_sha256(task.start),
        "weave": [weave.steps, weave.rate, weave.proximal],
        **_of_similarity(task, weave.similarity_weight),
    }


def _of_similarity(task: WeaveTask, weight: float) -> dict[str, Any]:
    if task.similarity is None:
        return {}
    digest = hashlib.sha256()
    for array in (task.similarity.items, task.similarity.factors.numpy(), task.similarity.present.numpy()):
        digest.update(f"{array.dtype} {array.shape} ".encode() + np.ascontiguousarray(array).tobytes())
    return {"similarity": [digest.hexdigest(), weight]}
