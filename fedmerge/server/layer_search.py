"""The search of ``rmm-style`` on the server, by the reward on pseudo-users, and what its merge records."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from fedmerge.adapter import Adapter
from fedmerge.config import ExperimentConfig, Rmm
from fedmerge.domain.catalog import Catalog
from fedmerge.encoder.backbone import Backbone
from fedmerge.errors import MergeError
from fedmerge.mergerec.cohort import cohort_sha256
from fedmerge.mergerec.layer_maps.candidates import LayerCandidates, LayerMap, map_coefficients, named
from fedmerge.mergerec.layer_maps.episodes import FoundMap, ReadMap, Sums, search_maps
from fedmerge.mergerec.layer_maps.rewards import on_pseudo_users
from fedmerge.mergerec.pseudo_users import pseudo_domains
from fedmerge.mergerec.variants import mergerec_settings
from fedmerge.runs.checkpoints import LEARNING

METHOD = "rmm-style"
NDCG_SCALE = 100.0  # of the outcomes of validation users, in per cent

Search = Callable[[LayerCandidates], FoundMap]


def search_on_pseudo_users(
    backbone: Backbone | None,
    adapters: Mapping[str, Adapter],
    catalogs: Mapping[str, Catalog],
    config: ExperimentConfig,
    progress: Callable[[str], None] = lambda line: None,
    folder: Path | None = None,
) -> Search:
    """Return a function that searches in this process, by the pseudo-users of the catalogs.

    Args:
        backbone: the frozen encoder; None only if nothing is searched.
        adapters: domain -> expert.
        catalogs: domain -> catalog; may be empty only if nothing is searched.
        config: the experiment; rmm, mergerec, text and seed are read.
        progress: receives lines about the progress.
        folder: folder in which a resumed search finds its readings; None keeps none.

    Returns:
        A function for :func:`fedmerge.server.candidates.merge_candidates`. It raises MergeError without the backbone or
        one of the catalogs, and for rewards that need the clients of a run.
    """
    rmm, settings = config.rmm, replace(mergerec_settings(config.mergerec), seed=config.seed)

    def search(candidates: LayerCandidates) -> FoundMap:
        if rmm.reward != "pseudo-users":
            raise MergeError(
                f"{METHOD}: rmm.reward = {rmm.reward!r} asks the clients of a run (fedmerge run), which this merge "
                "does not have; set rmm.reward = 'pseudo-users', or leave the method out of merge.methods"
            )
        if backbone is None:
            raise MergeError(f"{METHOD}: found no backbone, expected the one that the adapters were trained on")

        @cache  # a search whose readings are all on disk makes no pseudo-users
        def reader() -> ReadMap:
            kind, number = settings.pseudo_users, settings.num_pseudo_users
            pseudo = pseudo_domains(
                backbone, adapters, catalogs, config.text, kind=kind, number=number, seed=config.seed, progress=progress
            )
            return on_pseudo_users(backbone, candidates, pseudo, settings, rmm.users, rmm.shards)

        def read(layer_map: LayerMap, shard: int) -> Sums:
            return reader()(layer_map, shard)

        return search_with(candidates, read, config, adapters, progress, folder)

    return search


def search_with(
    candidates: LayerCandidates,
    read: ReadMap,
    config: ExperimentConfig,
    adapters: Mapping[str, Adapter],
    progress: Callable[[str], None],
    folder: Path | None,
) -> FoundMap:
    """Search by the settings of ``[rmm]``; the readings lie in ``folder``, under a name of all that they depend on."""
    rmm, log = config.rmm, None
    if folder is not None:
        sections = {
            key: getattr(config, key).model_dump(mode="json") for key in ("rmm", "mergerec", "text", "evaluation")
        }
        inputs = [cohort_sha256(dict(adapters)), candidates.names, sections, config.seed]
        key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:8]
        log = folder / LEARNING / f"{METHOD}-{key}.jsonl"
    return search_maps(
        candidates,
        rmm.searcher,
        read,
        budget=rmm.budget,
        num_shards=rmm.shards,
        seed=config.seed,
        log=log,
        progress=progress,
    )


def search_entries(candidates: LayerCandidates, found: FoundMap, rmm: Rmm) -> dict[str, Any]:
    """Return the entries of the provenance of a map: its choices, its reward, and its coefficients if it is linear."""
    entries: dict[str, Any] = {
        "parameters": rmm.model_dump(mode="json"),
        "search": {
            "map": named(candidates, found.layer_map),
            "reward": found.reward,
            "start": candidates.names[candidates.reference],
            "episodes": found.episodes,
            "readings": found.readings,
            "read_again": [
                {"map": list(named(candidates, each).values()), "search": searched, "others": others}
                for each, searched, others in found.read_again
            ],
        },
    }
    if (coefficients := map_coefficients(candidates, found.layer_map)) is not None:
        layout = candidates.layout
        entries["coefficients"] = dict(zip(layout.domains, coefficients.tolist(), strict=True))
        entries["coefficient_groups"] = list(layout.groups)
    return entries
