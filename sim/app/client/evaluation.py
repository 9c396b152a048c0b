"""Evaluate models on the domain's users."""

import logging

import numpy as np
from flwr.app import Context, Message, RecordDict

from fedmerge.adapter import Adapter, adapter_sha256
from fedmerge.client.baselines.rankers import BASELINE_LABELS, baseline_rankers
from fedmerge.client.disclosed.account import Entry
from fedmerge.client.disclosed.sums import Sums, count_models, release_sums_once
from fedmerge.client.disclosed.users import read_secret, remember_users
from fedmerge.client.evaluate import outcomes
from fedmerge.config import Split
from fedmerge.domain.manifest import NOISED_METRICS, check_catalog_is_given
from fedmerge.domain.splits import Examples
from fedmerge.errors import ClientError, PolicyError
from fedmerge.evaluation.ranks import METRICS
from fedmerge.evaluation.sums import BACKBONE, EXPERT, FEDERATED_HEAD, PERSONAL, VARIANTS
from fedmerge.privacy.dp.randomness import source
from fedmerge.privacy.dp.releases import METRIC_SUMS, Release, noised_sums
from fedmerge.privacy.metric_sums import disclose
from fedmerge.privacy.policy import check_enough_users, check_may_leave
from sim.app.client.coefficients import own_personal_merge
from sim.app.client.experts import own_expert
from sim.app.client.heads import encoders_of, federated_head_ranks, head_models, own_head_ranks
from sim.app.client.node import Client, charge_run, evaluated_examples, open_client
from sim.app.client.replies import neutral_errors
from sim.app.messages import records

logger = logging.getLogger("fedmerge.client")


def evaluate_models(message: Message, context: Context) -> RecordDict:
    """Evaluate models on this domain's users and send sums of metrics."""
    client = open_client(context)
    config, domain, name = client.config, client.domain, client.domain.manifest.name
    check_may_leave(config.privacy.policy, "metric sums", name)
    if config.until == "train":
        raise PolicyError(f"domain {name}: the run ends after training (until = 'train'), so nothing is evaluated.")
    request, adapters = records.read_evaluation_request(message.content)
    anchor = adapters.pop(FEDERATED_HEAD, None)
    models = _models(client, request, adapters)
    encoders = encoders_of(client, request.heads, request.served, request.expert_sha256, adapters)
    hashes = {label: "" if adapter is None else adapter_sha256(adapter) for label, adapter in models.items()}
    if client.own is not None:
        evaluated = set(hashes.values()) | head_models(encoders, anchor, adapters.get(request.served), request.fusion)
        count_models(client.disclosed, str(config.run_id), evaluated, client.own.max_models)
    examples = _examples(client, request.split)
    check_enough_users(name, len(examples), config.privacy.min_users)
    names = config.evaluation.baselines if request.baselines else ()
    if anchor is not None and "last-item" not in names:  # a federated head that is below it is not served
        names = (*names, "last-item")
    if config.privacy.metrics == "noised":  # the others are fitted to all users, who would each change every outcome
        names = tuple(baseline for baseline in names if baseline == "last-item")

    def sums() -> Sums:
        try:
            with neutral_errors(client, "the evaluation failed"):
                baselines = baseline_rankers(
                    domain, names, config.evaluation, config.seed, config.cache_dir, logger.info
                )
                heads, encoded = own_head_ranks(client, encoders, request.served, anchor, examples)
                shared, of_served = federated_head_ranks(client, anchor, request, adapters, examples, encoded)
                encoded |= of_served
                found = outcomes(domain, models, examples, baselines, logger.info, heads | shared, encoded)
        except ClientError:
            if config.privacy.metrics != "noised":
                raise
            labels = [*models, *(BASELINE_LABELS[baseline] for baseline in names)]
            nothing = np.zeros((len(examples), len(METRICS)))  # noise alone answers: that it failed tells of users, too
            found = {variant: dict.fromkeys(labels, nothing) for variant in VARIANTS}
        drawn = source(
            config.dp.randomness, config.seed, "client", name, "metric-sums", request.split, *hashes.values()
        )
        privacy = config.privacy
        return disclose(found, privacy.metrics, privacy.min_users, privacy.metrics_noise, drawn)

    if config.privacy.metrics != "noised":
        return records.metric_sums_record(sums())
    check_catalog_is_given(domain.manifest, NOISED_METRICS)
    asked = {
        "models": hashes,
        "baselines": list(names),
        "split": request.split,
        "users": len(examples),
        "data": [domain.manifest.catalog_sha256, domain.manifest.interactions_sha256],
        "backbone": [domain.backbone.sha256, domain.backbone.pooling],
        "text": config.text.cache_inputs(),
        "noise": config.privacy.metrics_noise,
    }
    run, release = str(config.run_id), Release(config.privacy.metrics_noise, 1.0, 1, replaced=1.0)

    def account(key: str) -> None:
        charge_run(client, [Entry(key, run, f"{METRIC_SUMS} on {request.split}", "user", release)])

    sent = release_sums_once(client.disclosed, run, asked, noised_sums(config), account, sums)
    return records.metric_sums_record(sent)


def _models(
    client: Client, request: records.EvaluationRequest, adapters: dict[str, Adapter]
) -> dict[str, Adapter | None]:
    models: dict[str, Adapter | None] = {BACKBONE: None} if request.backbone else {}
    if request.expert_sha256:
        models[EXPERT] = own_expert(client, request.expert_sha256)
    if request.personal:
        models[PERSONAL] = own_personal_merge(client, request.personal, request.expert_sha256).adapter
    return models | adapters


def _examples(client: Client, split: Split) -> Examples:
    """Return the evaluated users; where sums are suppressed, write them down first."""
    examples = evaluated_examples(client, split)
    if client.config.privacy.metrics == "suppressed":  # noise covers differences
        min_users, secret = client.config.privacy.min_users, read_secret(client.disclosed)
        remember_users(client.disclosed, client.domain.interactions, examples, split, min_users, secret)
    return examples
