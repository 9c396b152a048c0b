"""Find a head that this client trained before, without reading interactions: for serving, long after the run.

The catalog may have changed since the training. Id embeddings then move to their items' places in the catalog of today;
an item that was added has none and is scored by its text, and an item that was removed is left out.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from fedmerge.adapter import Adapter
from fedmerge.client.heads.heads import (
    INPUTS_FILE,
    LocalHead,
    find_fusion,
    head_settings,
    heads_folder,
    model_hash,
    read_cached_head,
)
from fedmerge.config import Head
from fedmerge.errors import ClientError, RunDirError
from fedmerge.files import read_sealed
from fedmerge.sequence.model import SequenceModel, SequenceSettings

_ID_PARTS = ("items.weight", "trained_items")  # entries of a state dict with a row for each item


def find_trained_head(
    name: str,
    item_ids: Sequence[str],
    item_vectors: torch.Tensor,
    adapter: Adapter | None,
    head: Head,
    validation_users: int | None,
    seed: int,
    cache_dir: str,
    anchor: Adapter | None = None,
) -> LocalHead:
    """Return the newest head of a domain over the item vectors of an adapter, for the catalog of today.

    Versions of the libraries, interactions and catalog may have changed since the training.

    Args:
        name: of the domain.
        item_ids: N ids of the catalog.
        item_vectors: (N, d) under the adapter.
        adapter, head, validation_users, seed, cache_dir, anchor: as for
            :func:`fedmerge.client.heads.heads.load_or_train_head`.

    Raises:
        ClientError: no such head, or only damaged ones.
    """
    folder, settings = heads_folder(cache_dir), head_settings(head, validation_users)
    named = re.compile(re.escape(name) + r"-[0-9a-f]{16}")
    wanted, found, damaged = model_hash(adapter), list[tuple[float, Path]](), list[str]()
    for path in sorted(folder.glob(f"*/{INPUTS_FILE}")):
        if not named.fullmatch(path.parent.name):
            continue
        try:
            inputs = read_sealed(path) or {}
        except RunDirError:
            damaged.append(path.parent.name)
            continue
        over = inputs.get("vectors", {}).get("adapter", wanted)  # a head of ids has no vectors
        contrast = {key: value for key, value in inputs.get("contrast", {}).items() if key != "similar"}
        trained_so = over, inputs.get("seed"), inputs.get("settings"), contrast
        if trained_so == (wanted, seed, settings.record(), head.contrast_record()):
            found.append((path.stat().st_mtime, path.parent))
    for _, trained in sorted(found, reverse=True):
        cached, fusion = read_cached_head(trained), find_fusion(trained, adapter, anchor)
        if cached is None or fusion is None:
            damaged.append(trained.name)
            continue
        tensors = _moved(cached.tensors, cached.inputs["item_ids"], item_ids)
        return LocalHead(_model(tensors, settings, item_vectors), fusion, cached.report, True, anchor)
    wrong = f"; damaged or without weights of a fusion: {', '.join(damaged)}" if damaged else ""
    raise ClientError(f"{folder} holds no head of {name} over these item vectors{wrong}.")


def extended(model: SequenceModel, item_vectors: torch.Tensor) -> SequenceModel:
    """Return a head for a catalog with more items at its end, or with other texts; new items are scored by their text.

    Args:
        model: of N items.
        item_vectors: (N or more, d), those of the catalog of today.
    """
    tensors = dict(model.state_dict())
    for key in _ID_PARTS:
        if key in tensors:
            old = tensors[key]
            tensors[key] = torch.cat([old, old.new_zeros(len(item_vectors) - len(old), *old.shape[1:])])
    return _model(tensors, model.settings, item_vectors)


def _model(tensors: dict[str, torch.Tensor], settings: SequenceSettings, item_vectors: torch.Tensor) -> SequenceModel:
    if settings.inputs == "ids":
        model = SequenceModel(len(item_vectors), settings)
    else:
        whitening = tensors["text_mean"], tensors["text_axes"]
        model = SequenceModel(len(item_vectors), settings, item_vectors, whitening)
    model.load_state_dict(tensors)
    return model.eval()


def _moved(
    tensors: dict[str, torch.Tensor], trained_on: Sequence[str], item_ids: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Move the rows of items to their places in another catalog; an item that is not in both has a row of zeros."""
    if list(trained_on) == list(item_ids):
        return tensors
    place = {item: row for row, item in enumerate(trained_on)}
    known = [row for row, item in enumerate(item_ids) if item in place]
    rows = [place[item_ids[row]] for row in known]
    moved = dict(tensors)
    for key in _ID_PARTS:
        if key in tensors:
            moved[key] = tensors[key].new_zeros(len(item_ids), *tensors[key].shape[1:])
            moved[key][known] = tensors[key][rows]
    return moved
