"""Merging coefficients learned on clients' pseudo-users: the cached cohort, and the answers to messages.

The server sends the cohort's adapters once, then coefficients. A client answers with the gradient of the objective on
its own pseudo-users, or with the change of a few local steps: K or K × G numbers, nothing else. This module needs only
the client's catalog; :mod:`fedmerge.client.coefficients.own_users` computes the gradient on its users.
"""

import hashlib
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fedmerge import __version__
from fedmerge.adapter import Adapter
from fedmerge.client.cache.folders import fill_folder, inputs_key, mark_used
from fedmerge.config import ExperimentConfig
from fedmerge.domain.catalog import Catalog
from fedmerge.encoder.backbone import Backbone
from fedmerge.encoder.encode import embed_batch, encode
from fedmerge.encoder.lora import applied
from fedmerge.encoder.peft.folder import read_adapter, write_adapter
from fedmerge.encoder.text import Tokens, build_token_table
from fedmerge.errors import ClientError, FedMergeError
from fedmerge.mergerec.coefficients import optimise
from fedmerge.mergerec.learn import draw_pseudo_users
from fedmerge.mergerec.objective import MergeRecSettings, batch_terms, weighted_total
from fedmerge.mergerec.pseudo_users import PseudoDomain, pseudo_users_of
from fedmerge.mergerec.vectors import Vectors, merge_vectors, merged_forward

ADAPTERS = "adapters"
PSEUDO_FILE = "pseudo-users.safetensors"
STUDENTS_FILE = "students.safetensors"

LocalGradient = Callable[[int, torch.Tensor], torch.Tensor]
"""(step within the message, coefficients) -> gradient, both (K,) or (K, G) float32 on the CPU."""


@dataclass(frozen=True, eq=False)
class Cohort:
    """The cached cohort of a client: all experts whose coefficients are learned.

    Attributes:
        folder: folder on the client's own disk.
        adapters: domain -> expert, of all domains.
        pseudo: the client's own pseudo-users with the vectors of its expert; None if the run learns on the client's own
            users, or only fits personal merges. A missing file is an error, never None.
    """

    folder: Path
    adapters: Mapping[str, Adapter]
    pseudo: PseudoDomain | None


def cohort_folder(config: ExperimentConfig, name: str, catalog: Catalog, backbone: Backbone, sha256: str) -> Path:
    """Return the cache folder of a cohort; its key has everything that the pseudo-users depend on."""
    inputs = {
        "cohort": sha256,
        "catalog": catalog.sha256,
        "backbone": backbone.sha256,
        "pooling": backbone.pooling,
        "text": config.text.cache_inputs(),
        "mergerec": config.mergerec.cache_inputs(),
        "users": config.cohort_learns_on,
        "seed": config.seed,
        "threads": config.runtime.threads_per_client,
        "device": str(backbone.device),
        "precision": backbone.compute.precision,
        "versions": [__version__, torch.__version__],
    }
    return Path(config.cache_dir).expanduser() / "cohorts" / f"{name}-{inputs_key(inputs)}"


def cache_cohort(
    folder: Path,
    name: str,
    backbone: Backbone,
    adapters: Mapping[str, Adapter],
    catalog: Catalog,
    config: ExperimentConfig,
) -> None:
    """Generate a client's pseudo-users and cache them with the cohort's adapters; do nothing if they are cached.

    Args:
        folder: :func:`cohort_folder`.
        name: the client's domain.
        backbone: the frozen encoder; it stays unchanged.
        adapters: domain -> expert, of all domains.
        catalog: the client's catalog; it never leaves the client.
        config: text, mergerec, through_clients and seed are read.

    Raises:
        ClientError: the client's own expert is missing, or the folder cannot be written.
    """
    if name not in adapters:
        raise ClientError(
            f"domain {name}: the cohort has the experts of {', '.join(sorted(adapters))}, expected {name} among them. "
            "Use one fedmerge version everywhere."
        )
    if folder.is_dir():
        mark_used(folder)
        return
    own = config.cohort_learns_on == "own-users"
    pseudo = None
    if not own:
        table = build_token_table(
            catalog, backbone.tokenizer, config.text.max_attribute_tokens, backbone.special.attributes
        )
        pseudo = pseudo_users_of(
            name,
            backbone,
            adapters,
            table,
            config.text,
            kind=config.mergerec.pseudo_users,
            seed=config.seed,
            teacher=config.mergerec.teacher,
        )

    def write(cohort: Path) -> None:
        for domain, adapter in adapters.items():
            write_adapter(adapter, cohort / ADAPTERS / domain, backbone.name)
        if pseudo is not None:
            lengths = torch.tensor([len(user) for user in pseudo.users])
            tensors = {
                "teacher_items": pseudo.teacher_items,
                "teacher_users": pseudo.teacher_users,
                "users": torch.from_numpy(np.concatenate([np.asarray(user, dtype=np.int32) for user in pseudo.users])),
                "lengths": lengths,
            }
            if pseudo.amateur_items is not None and pseudo.amateur_users is not None:
                tensors |= {"amateur_items": pseudo.amateur_items, "amateur_users": pseudo.amateur_users}
            save_file({key: value.clone() for key, value in tensors.items()}, cohort / PSEUDO_FILE)

    fill_folder(folder, write, folder.is_dir, f"domain {name}: the cohort")


def read_cached_cohort(
    folder: Path, name: str, items: Sequence[Tokens], learned_on: Literal["pseudo-users", "own-users"]
) -> Cohort:
    """Read the cohort that :func:`cache_cohort` wrote.

    Args:
        folder: :func:`cohort_folder`.
        name: the client's domain.
        items: N token sequences of its catalog.
        learned_on: ``through_clients.users``. It alone decides whether there are pseudo-users, not the files: a client
            that lost them must not answer with gradients of its real users.

    Raises:
        ClientError: the cohort, or its pseudo-users, are missing or damaged.
    """
    try:
        adapters = {path.name: read_adapter(path) for path in sorted((folder / ADAPTERS).iterdir())}
        pseudo = None if learned_on == "own-users" else _read_pseudo(folder / PSEUDO_FILE, name, items)
    except (FedMergeError, OSError, LookupError, ValueError, SafetensorError) as error:
        missing = "" if folder.is_dir() else " (the folder is missing)"
        raise ClientError(
            f"domain {name}: found no complete cohort in {folder}{missing}: {type(error).__name__}. Keep cache_dir "
            "between the messages of a run; delete the folder, if there is one, and resume the run, which sends the "
            "cohort again."
        ) from error
    return Cohort(folder, adapters, pseudo)


def load_or_encode_items(
    cohort: Cohort, name: str, items: Sequence[Tokens], backbone: Backbone, vectors: Vectors, coefficients: torch.Tensor
) -> torch.Tensor:
    """Return the client's item vectors under a merge, Ê (N, d): from the cache, which has the latest, or encoded.

    Args:
        cohort: the client's cohort.
        name: its domain.
        items: N token sequences of its catalog.
        backbone: the frozen encoder; it stays unchanged.
        vectors: vectors of the K experts.
        coefficients: (K,) or (K, G).

    Raises:
        ClientError: the vectors cannot be cached.
    """
    values = coefficients.detach().cpu().contiguous()
    of = f"{type(vectors).__name__} {tuple(values.shape)} ".encode()
    key, path = hashlib.sha256(of + values.numpy().tobytes()).hexdigest(), cohort.folder / STUDENTS_FILE
    try:
        cached = load_file(path)
        if key in cached:
            return cached[key]
    except (OSError, SafetensorError):
        pass
    with applied(backbone, merge_vectors(vectors, values)):
        found = encode(backbone, items)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        save_file({key: found}, partial)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise ClientError(
            f"domain {name}: item vectors cannot be cached in {cohort.folder} ({error}). Check the free space there."
        ) from error
    return found


def gradient_on_pseudo_users(
    backbone: Backbone,
    vectors: Vectors,
    pseudo: PseudoDomain,
    students: torch.Tensor,
    users: Sequence[int],
    coefficients: torch.Tensor,
    settings: MergeRecSettings,
) -> torch.Tensor:
    """Compute the gradient of the mean loss over some of the client's own pseudo-users.

    The gradient of a batch over several domains is the mean of the clients' gradients, weighted by their numbers of
    pseudo-users in the batch: the loss of :func:`fedmerge.mergerec.learn.learn_coefficients` scores a pseudo-user on
    its own catalog only.

    Args:
        backbone: the frozen encoder; it stays unchanged.
        vectors: vectors of the K experts, on its device.
        pseudo: the client's pseudo-users.
        students: Ê, (N, d).
        users: numbers of the pseudo-users.
        coefficients: (K,) or (K, G) float32.
        settings: loss, weights and temperatures are read.

    Returns:
        float32 in the shape of the coefficients, on the CPU.

    Raises:
        ClientError: the client does not have one of the pseudo-users.
    """
    if not users or min(users) < 0 or max(users) >= len(pseudo.users):
        raise ClientError(
            f"domain {pseudo.name}: the server asks for pseudo-users {sorted(users)[:3]} …, but the client has "
            f"{len(pseudo.users)}. Use one fedmerge version everywhere."
        )
    device = backbone.device
    leaf = coefficients.detach().clone().to(device).requires_grad_()
    with merged_forward(backbone, vectors, leaf):
        vectors_of_users = embed_batch(backbone, [pseudo.users[user] for user in users])  # (n, d)
    teacher_users = pseudo.teacher_users[list(users)].to(vectors_of_users)  # (n, d)
    teachers, items = pseudo.teacher_items.to(device, torch.float32), students.to(device)
    own = np.zeros(len(users), dtype=np.int64)
    amateur_users: torch.Tensor | None = None
    amateurs: list[torch.Tensor] = []
    if settings.teacher == "contrastive":
        amateur_users, amateurs = _amateurs(pseudo, users, vectors_of_users)
    terms = batch_terms(vectors_of_users, teacher_users, own, [teachers], [items], settings, amateur_users, amateurs)
    (found,) = torch.autograd.grad(weighted_total(terms, settings), [leaf])
    return found.cpu()


def pseudo_user_gradient(
    backbone: Backbone,
    vectors: Vectors,
    pseudo: PseudoDomain,
    students: torch.Tensor,
    settings: MergeRecSettings,
    first: int,
    users: Sequence[int],
) -> LocalGradient:
    """Return the gradient function of a message: on the pseudo-users that the server drew, or on the client's draw.

    Args:
        backbone, vectors, pseudo, students, settings: as for :func:`gradient_on_pseudo_users`.
        first: number of the message's first step.
        users: pseudo-users drawn by the server for one step; if empty, the client draws ``settings.batch_size``
            pseudo-users per step from its own permutations.
    """
    drawn = None if users else draw_pseudo_users((len(pseudo.users),), settings)[1]  # (steps, batch)

    def found(step: int, coefficients: torch.Tensor) -> torch.Tensor:
        chosen = list(users) if drawn is None else drawn[first + step].tolist()
        return gradient_on_pseudo_users(backbone, vectors, pseudo, students, chosen, coefficients, settings)

    return found


def take_local_steps(
    gradient: LocalGradient, start: torch.Tensor, settings: MergeRecSettings, steps: int
) -> torch.Tensor:
    """Take a few steps of Adam at one client, with fresh moments for each message.

    Args:
        gradient: (step within the message, coefficients) -> gradient.
        start: (K,) or (K, G) float32.
        settings: learning_rate and clamp are read.
        steps: number of steps.

    Returns:
        The change of the coefficients, on the CPU.
    """
    learned = optimise(
        "local steps",
        start,
        lambda step, coefficients: (gradient(step, coefficients), {}),
        steps=steps,
        learning_rate=settings.learning_rate,
        clamp=settings.clamp,
    )
    return learned.coefficients - start.cpu()


def _amateurs(
    pseudo: PseudoDomain, users: Sequence[int], like: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the vectors of some pseudo-users and of all items under the other experts, as a contrastive teacher has.

    Raises:
        ClientError: the cohort was cached without them.
    """
    if pseudo.amateur_users is None or pseudo.amateur_items is None:
        raise ClientError(
            f"domain {pseudo.name}: its pseudo-users have no vectors under the other experts, which a contrastive "
            "teacher needs. Delete the folder cohorts in cache_dir and resume the run, which sends the cohort again."
        )
    return pseudo.amateur_users[list(users)].to(like), [pseudo.amateur_items.to(like)]


def _read_pseudo(path: Path, name: str, items: Sequence[Tokens]) -> PseudoDomain:
    """Read a file of pseudo-users; raises OSError, LookupError, ValueError, FedMergeError or SafetensorError."""
    cached = load_file(path)
    lengths = cached["lengths"].numpy()
    if not len(lengths) or lengths.sum() != len(cached["users"]):
        raise ValueError(f"{path}: the lengths sum to {lengths.sum()}, expected {len(cached['users'])} tokens")
    users = np.split(cached["users"].numpy(), np.cumsum(lengths)[:-1])
    amateurs = cached.get("amateur_items"), cached.get("amateur_users")
    return PseudoDomain(name, items, cached["teacher_items"], users, cached["teacher_users"], *amateurs)
