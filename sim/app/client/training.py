"""Train an expert or a round, and send it or cache it for a secure sum; continue an adapter of another domain."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from flwr.app import ArrayRecord, Context, Message, RecordDict

from fedmerge.adapter import Adapter, adapter_sha256, is_zero
from fedmerge.client.cache.dp_releases import Release, check_round_is_counted, release_round_once, releases_folder
from fedmerge.client.cache.experts import load_or_train_expert
from fedmerge.client.cache.woven import load_or_weave
from fedmerge.client.disclosed.account import entries_of
from fedmerge.client.training.dp_sgd import plan_record, user_plan
from fedmerge.client.training.poisoning import apply_attack, training_inputs
from fedmerge.client.training.round import RoundTask, train_round
from fedmerge.client.training.settings import WeaveTask, training_settings
from fedmerge.client.training_signals import spread_of_users
from fedmerge.config import Lora
from fedmerge.encoder.lora import fresh_adapter
from fedmerge.errors import PolicyError
from fedmerge.privacy.policy import check_may_leave
from fedmerge.privacy.transport import coding_of, decode_as_receiver, residual
from sim.app.client.node import Client, charge_run, open_client
from sim.app.client.secure_sum import keep_for_sum
from sim.app.messages import records

logger = logging.getLogger("fedmerge.client")


def train(message: Message, context: Context) -> RecordDict:
    """Send a trained adapter: the expert, from the cache if it is there, or a round; or cache it for a secure sum."""
    client = open_client(context)
    privacy, name = client.config.privacy, client.domain.manifest.name
    check_may_leave(privacy.policy, "training report", name)
    if privacy.hides_adapters:
        return _train_for_sum(client, message, context)
    check_may_leave(privacy.policy, "adapter", name)
    adapter, report, task = _train_as_asked(client, message)
    signals = report.pop("signals", None)
    coding = coding_of(client.config.privacy, client.config.lora.of(name), client.config.seed, client.domain.backbone)
    if coding.transport != "float32":
        lost = residual(adapter, decode_as_receiver(adapter, coding))
        report = {**report, "transport": {"kind": coding.transport, "residual": lost}}
    only_B = task is not None and task.trained == "B"
    return records.expert_record(adapter, report, coding, only_B, _signals(client, adapter, report, signals))


def _signals(
    client: Client, adapter: Adapter, report: Mapping[str, Any], signals: Mapping[str, Sequence[float]] | None
) -> ArrayRecord | None:
    """Make the record of an expert's training signals, if the run weighs by them and enough users are behind them."""
    config, name = client.config, client.domain.manifest.name
    if not config.sends_signals:
        return None
    if signals is None:
        logger.warning(
            "%s: its expert has no training signals, since an earlier version trained it; livar-style weighs it as one "
            "of equals. To train it again, delete it from cache_dir (fedmerge cache).",
            name,
        )
        return None
    num_users = len(client.domain.training_sequences)
    if num_users < config.privacy.min_users or "steps" not in report:
        logger.warning("%s: training signals stay here: fewer than %d users", name, config.privacy.min_users)
        return None
    spread = spread_of_users(client.domain, adapter, config.seed) if config.livar.spread else None
    return records.signals_record(signals, spread)


def _train_for_sum(client: Client, message: Message, context: Context) -> RecordDict:
    """Train, cache the values for the secure sum, and send the report alone, without the hash of the adapter."""
    adapter, report, task = _train_as_asked(client, message)
    rule = client.config.rounds.rule or "weighted-average"
    keep_for_sum(client, context, rule, adapter, task.start if task else None, task.number if task else 0)
    return records.report_record({key: value for key, value in report.items() if key not in ("sha256", "signals")})


def _train_as_asked(client: Client, message: Message) -> tuple[Adapter, dict[str, Any], RoundTask | None]:
    """Return the adapter, the report of its training, and the task where it is a round."""
    if client.config.rounds.rule is not None:
        return _train_round_once(client, message)
    config = client.config
    adapter, report = load_or_train_expert(
        client.domain, training_settings(config), config.cache_dir, config.run_id, logger.info
    )
    if is_zero(adapter):
        logger.warning(
            "%s: nothing was learned: no validation beats the untouched backbone, so the expert is zero. More steps, "
            "another learning rate or more users may help.",
            client.domain.manifest.name,
        )
    charge_run(client, entries_of(report["privacy"], report["sha256"], str(config.run_id), "expert"))
    return adapter, _without_few_users(client, report), None


def _without_few_users(client: Client, report: dict[str, Any]) -> dict[str, Any]:
    """Return a report without what rests on too few users, or is an exact mean over users where sums are not exact."""
    privacy = client.config.privacy
    if report["validation_users"] >= privacy.min_users and privacy.metrics == "exact":
        return report
    # Validations are exact means over users; best step and end of the training depend on the same users.
    hidden = ("steps", "best_step", "stopped_by") if report["validation_users"] else ()
    return {**{key: value for key, value in report.items() if key not in hidden}, "validations": []}


def weave(message: Message, context: Context) -> RecordDict:
    """Continue an adapter, by default another domain's, on this client's users, or take it from the cache; send it."""
    client = open_client(context)
    config, name = client.config, client.domain.manifest.name
    check_may_leave(config.privacy.policy, "training report", name)
    check_may_leave(config.privacy.policy, "adapter", name)
    if config.weave.schedule is None:
        raise PolicyError(f"domain {name}: the server asks to continue an adapter, but weave.schedule = 'none'")
    request, start = records.read_weave_request(message.content)
    similarity = records.read_mean_similarity(message.content, len(client.domain.catalog))
    if (similarity is not None) != config.shares_similarity:
        raise PolicyError(f"domain {name}: a mean similarity comes with weave.schedule = 'similarity', and only then")
    task, run = WeaveTask(request.number, request.source, start, similarity), str(config.run_id)
    most = config.weave.trainings(len(config.domains.train))
    adapter, report = load_or_weave(
        client.domain, training_settings(config), task, most, config.cache_dir, config.run_id, logger.info
    )
    key = f"{report['sha256']} woven {request.number}"
    charge_run(client, entries_of(report["privacy"], key, run, f"pass {request.number} of weaving"))
    report.pop("signals", None)  # they weigh experts alone
    return records.woven_record(request.source, adapter, _without_few_users(client, report))


def _train_round_once(client: Client, message: Message) -> tuple[Adapter, dict[str, Any], RoundTask]:
    config, domain = client.config, client.domain
    name = domain.manifest.name
    lora = config.lora.of(name)
    request, start, base = records.read_round_request(message.content, partial(fresh_adapter, domain.backbone, lora))
    task = RoundTask(request.number, request.num_rounds, start, base, request.trained, config.rounds.proximal)
    if config.dp.mode == "user":
        check_round_is_counted(name, task, config.rounds.number, config.run_id)
        folder = releases_folder(config.cache_dir, config.run_id, name)
        settings = training_settings(config)
        release = release_round_once(domain, settings, folder, task, lambda: _train_round(client, task, lora))
    else:
        release = _train_round(client, task, lora)
    key = f"{adapter_sha256(release.adapter)} {request.number}"
    charge_run(client, entries_of(release.report["privacy"], key, str(config.run_id), f"round {request.number}"))
    return release.adapter, dict(release.report), task


def _train_round(client: Client, task: RoundTask, lora: Lora) -> Release:
    config, domain, settings = client.config, client.domain, training_settings(client.config)
    trained_on, of_training = training_inputs(domain, settings)
    plan = (
        user_plan(domain, config.train, config.dp, settings.answers, settings.sums)
        if config.dp.mode == "user"
        else None
    )
    adapter, of_round = train_round(trained_on, lora, of_training, config.seed, task, logger.info, plan)
    adapter = apply_attack(adapter, domain.manifest.name, config.simulation)
    report = asdict(of_round) | {"privacy": plan and plan_record(replace(plan, steps=of_round.steps))}
    if len(domain.training_sequences) < config.privacy.min_users or config.privacy.metrics != "exact":
        report["loss"] = None  # a mean over the users of its batches
    return Release(adapter, report)
