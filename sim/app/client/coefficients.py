"""Merges made through clients: the cohort, the gradients and the layer maps on it, and the client's personal merge."""

import logging
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

import torch
from flwr.app import Context, Message, RecordDict

from fedmerge.adapter import Adapter, adapter_sha256
from fedmerge.client.cache.dp_releases import CoefficientMessage, release_answer_once
from fedmerge.client.coefficients.layer_maps import ndcg_of, validation_readers
from fedmerge.client.coefficients.own_users import ClientMergeSettings, clipped_gradient_sum, coefficient_gradient
from fedmerge.client.coefficients.personal import PersonalMerge, load_or_fit_personal_merge, personal_settings
from fedmerge.client.coefficients.pseudo_users import (
    Cohort,
    LocalGradient,
    cache_cohort,
    cohort_folder,
    load_or_encode_items,
    pseudo_user_gradient,
    read_cached_cohort,
    take_local_steps,
)
from fedmerge.client.disclosed.account import REPLACED, Entry, Unit
from fedmerge.client.disclosed.sums import count_models
from fedmerge.client.local_domain import LocalDomain
from fedmerge.client.training.dp_sgd import poisson_records
from fedmerge.config import SEARCHED_METHODS, Rmm
from fedmerge.encoder.backbone import Backbone
from fedmerge.errors import ClientError, FedMergeError, MergeError, PolicyError
from fedmerge.mergerec.cohort import cohort_sha256
from fedmerge.mergerec.layer_maps.candidates import LayerCandidates, assemble, layer_candidates
from fedmerge.mergerec.layer_maps.episodes import OTHERS
from fedmerge.mergerec.objective import MergeRecSettings
from fedmerge.mergerec.variants import learned_settings, learned_variant
from fedmerge.mergerec.vectors import Vectors, initial_vectors, on_device
from fedmerge.merging.stack import stack_adapters
from fedmerge.privacy.dp.randomness import source
from fedmerge.privacy.dp.releases import Release, answers_have_noise, noisy_answers, sample_rate
from fedmerge.privacy.policy import check_enough_users, check_may_leave
from sim.app.client.experts import own_expert
from sim.app.client.node import Client, charge_run, evaluated_examples, open_client
from sim.app.client.replies import neutral_errors
from sim.app.messages import records

logger = logging.getLogger("fedmerge.client")


def cohort(message: Message, context: Context) -> RecordDict:
    """Cache the cohort's adapters on this client's disk, and generate its pseudo-users."""
    client = open_client(context)
    config, domain = client.config, client.domain
    name = domain.manifest.name
    check_may_leave(config.privacy.policy, "pseudo-user count", name)
    _check_enough_own_users(client)
    adapters = records.read_cohort(message.content)
    folder = cohort_folder(config, name, domain.catalog, domain.backbone, cohort_sha256(adapters))
    try:
        cache_cohort(folder, name, domain.backbone, adapters, domain.catalog, config)
    except FedMergeError as error:
        if config.dp.mode != "domain-local" or config.cohort_learns_on == "own-users":
            raise
        logger.error("%s", error)
        raise ClientError(
            "the pseudo-users of this cohort cannot be generated. The reason would reveal data; see the client's log"
        ) from error
    pseudo = _cached_cohort(folder, domain, config.cohort_learns_on).pseudo
    return records.pseudo_users_record(0 if pseudo is None else len(pseudo.users))


def _check_enough_own_users(client: Client) -> None:
    config, domain = client.config, client.domain
    if config.through_clients.users == "own-users":
        num_users = min(len(domain.training_sequences), config.through_clients.batch_size)
        what = "gradients of coefficients"
        check_enough_users(domain.manifest.name, num_users, config.privacy.min_users, what)


def gradient(message: Message, context: Context) -> RecordDict:
    """Send the gradient of the merging coefficients on pseudo-users or users, or the change by local steps."""
    client = open_client(context)
    config, domain = client.config, client.domain
    check_may_leave(config.privacy.policy, "coefficient gradient", domain.manifest.name)
    _check_enough_own_users(client)  # the cohort may be cached by a run that allowed fewer
    request, at, students, users = records.read_gradient_request(message.content)
    variant = learned_variant(request.label, config.mergerec, config.adamerging, config.through_clients)
    settings = learned_settings(variant, config.mergerec, config.adamerging, config.seed)
    start = at[:, 0] if settings.granularity == "domain" else at
    students = students[:, 0] if students.shape[1] == 1 else students
    client_cohort = _cached_cohort(
        cohort_folder(config, domain.manifest.name, domain.catalog, domain.backbone, request.cohort_sha256),
        domain,
        config.through_clients.users,
    )
    vectors = _cached_vectors(client_cohort, settings.initialisation, domain.backbone)

    def answer() -> torch.Tensor:
        # The setting decides, and the organisation's policy has been held to it. Absent files never lead to users.
        if config.through_clients.users == "own-users":
            if config.dp.mode == "user":
                return _sum_over_own_users(client, vectors, settings, request, start)
            found = _on_own_users(client, vectors, settings, request.step)
        else:
            if client_cohort.pseudo is None:
                raise ClientError(f"domain {domain.manifest.name}: found no pseudo-users, which the run learns on")
            items = load_or_encode_items(
                client_cohort, domain.manifest.name, domain.item_sequences, domain.backbone, vectors, students
            )
            found = pseudo_user_gradient(
                domain.backbone, vectors, client_cohort.pseudo, items, settings, request.step, users
            )
        return take_local_steps(found, start, settings, request.num_steps) if request.num_steps else found(0, start)

    if not answers_have_noise(config.dp, config.through_clients):
        return records.gradient_record(answer())
    asked = CoefficientMessage(**asdict(request), coefficients=start.tolist(), students=students.tolist(), users=users)
    return records.gradient_record(release_answer_once(domain, config, asked, answer, partial(_charge_answers, client)))


def _charge_answers(client: Client, noise_multiplier: float) -> None:
    """Charge all answers of the run when the first is given, since the noise is chosen for all of them."""
    config, run = client.config, str(client.config.run_id)
    by_user = config.dp.mode == "user"
    num_users = len(client.domain.training_sequences)
    rate = sample_rate(config.through_clients.batch_size, num_users) if by_user else 1.0
    unit: Unit = "user" if by_user else "domain"
    number, what = noisy_answers(config).number, "answers about merging coefficients"
    key = f"{run}: {number} answers, {noise_multiplier:.6g} at {rate:.6g}"  # other settings are other releases
    release = Release(noise_multiplier, rate, number, replaced=REPLACED[unit])
    charge_run(client, [Entry(key, run, what, unit, release)])


def _on_own_users(client: Client, vectors: Vectors, settings: MergeRecSettings, first: int) -> LocalGradient:
    own, device = _client_settings(client, settings), client.domain.backbone.device

    def found(step: int, coefficients: torch.Tensor) -> torch.Tensor:
        return coefficient_gradient(client.domain, vectors, coefficients.to(device), first + step, own)[0].cpu()

    return found


def _sum_over_own_users(
    client: Client,
    vectors: Vectors,
    settings: MergeRecSettings,
    request: records.GradientRequest,
    coefficients: torch.Tensor,
) -> torch.Tensor:
    """Return the clipped gradient sum over a Poisson sample of the users: each takes part independently."""
    config, domain = client.config, client.domain
    drawn = source(
        config.dp.randomness, config.seed, "client", domain.manifest.name, "own-users", request.label, request.step
    )
    rate = sample_rate(config.through_clients.batch_size, len(domain.training_sequences))
    taking_part = poisson_records(domain.training_sequences, "random-prefix", rate, drawn)
    own, at = _client_settings(client, settings), coefficients.to(domain.backbone.device)
    return clipped_gradient_sum(domain, vectors, at, taking_part, request.step, own, config.dp.coefficient_clip)


def _client_settings(client: Client, settings: MergeRecSettings) -> ClientMergeSettings:
    return ClientMergeSettings(batch_size=client.config.through_clients.batch_size, seed=settings.seed)


def fit_personal(message: Message, context: Context) -> RecordDict:
    """Fit this client's personal merge on its own users, or find it in the cache."""
    client = open_client(context)
    check_may_leave(client.config.privacy.policy, "training report", client.domain.manifest.name)
    request = records.read_personal_request(message.content)
    found = own_personal_merge(client, request.cohort_sha256, request.expert_sha256)
    return records.fitted_record(float(found.record["seconds"]), _for_universal(client, found))


def _for_universal(client: Client, found: PersonalMerge) -> torch.Tensor | None:
    """Return the fitted coefficients (K, G), if the run makes a universal merge and enough users are behind them."""
    config, name = client.config, client.domain.manifest.name
    if not config.personal.universal:
        return None
    check_may_leave(config.privacy.policy, "coefficient gradient", name)
    if found.record["num_users"] < config.privacy.min_users:
        logger.warning(
            "%s: coefficients fitted to %d users stay here: fewer than privacy.min_users = %d",
            name,
            found.record["num_users"],
            config.privacy.min_users,
        )
        return None
    return torch.tensor([values for _, values in sorted(found.record["coefficients"].items())])


def own_personal_merge(client: Client, cohort_sha256: str, expert_sha256: str) -> PersonalMerge:
    """Return the client's personal merge: from its cache, else fitted and cached.

    Args:
        client: this node.
        cohort_sha256: hash of the cohort that it has received.
        expert_sha256: as for :func:`sim.app.client.experts.own_expert`.

    Raises:
        PolicyError: the run has no personal merges.
        ClientError: cohort or expert are not in the cache, or the fit failed.
    """
    config, domain, name = client.config, client.domain, client.domain.manifest.name
    if config.personal.directions is None:
        raise PolicyError(f"domain {name}: the server asks for a personal merge, but personal.directions = 'none'")
    folder = cohort_folder(config, name, domain.catalog, domain.backbone, cohort_sha256)
    cohort = _cached_cohort(folder, domain, config.cohort_learns_on)
    adapters: dict[str, Adapter] = {**cohort.adapters, name: own_expert(client, expert_sha256)}
    sources = {member: adapter_sha256(adapter) for member, adapter in cohort.adapters.items()}
    choosing, settings = evaluated_examples(client, "valid").users, personal_settings(config)
    # The text of a MergeError may hold a loss and coefficients of this client's users.
    with neutral_errors(client, "its personal merge cannot be fitted", always=(MergeError,)):
        return load_or_fit_personal_merge(domain, adapters, sources, settings, choosing, config.cache_dir, logger.info)


def read_layer_map(message: Message, context: Context) -> RecordDict:
    """Send number and sum of NDCG@10 of some validation users under the adapter of a map."""
    client = open_client(context)
    config, domain, name, rmm = client.config, client.domain, client.domain.manifest.name, client.config.rmm
    check_may_leave(config.privacy.policy, "metric sums", name)
    if not SEARCHED_METHODS & {*config.merge.methods} or rmm.reward != "validation":
        raise PolicyError(
            f"domain {name}: the server asks for the sums of a layer map, but the run has no rmm-style with rmm.reward "
            "= 'validation'"
        )
    request, layer_map = records.read_layer_map_request(message.content)
    if not OTHERS <= request.shard < rmm.shards:
        raise ClientError(
            f"domain {name}: the server asks for shard {request.shard}, expected {OTHERS} to {rmm.shards - 1}; use one "
            "fedmerge version everywhere"
        )
    validated = evaluated_examples(client, "valid")
    readers = validation_readers(domain, validated, rmm.users, rmm.shards, config.seed)
    users = readers.at(request.shard)
    check_enough_users(name, len(users), config.privacy.min_users)
    folder = cohort_folder(config, name, domain.catalog, domain.backbone, request.cohort_sha256)
    candidates = _cached_candidates(_cached_cohort(folder, domain, config.cohort_learns_on), rmm, config.seed)
    adapter = assemble(candidates, layer_map)  # refuses an unknown index
    if client.own is not None:
        count_models(client.disclosed, str(config.run_id), {adapter_sha256(adapter)}, client.own.max_models)
    return records.layer_map_record(*ndcg_of(domain, adapter, users, config.seed))


@lru_cache(maxsize=4)
def _cached_cohort(folder: Path, domain: LocalDomain, users: Literal["pseudo-users", "own-users"]) -> Cohort:
    return read_cached_cohort(folder, domain.manifest.name, domain.item_sequences, users)


@lru_cache(maxsize=4)
def _cached_vectors(cohort: Cohort, initialisation: str, backbone: Backbone) -> Vectors:
    return on_device(initial_vectors(stack_adapters(cohort.adapters), initialisation), backbone.device)


@lru_cache(maxsize=4)
def _cached_candidates(cohort: Cohort, rmm: Rmm, seed: int) -> LayerCandidates:
    return layer_candidates(cohort.adapters, rmm.candidates, rmm.coefficients, seed)
