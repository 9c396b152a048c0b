"""The client: one domain, opened from this machine's disk, answering the server's messages."""

import logging
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache, partial, wraps
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedmerge import __version__
from fedmerge.adapter import Adapter, adapter_sha256
from fedmerge.client.audit.users import for_audit
from fedmerge.client.baselines.rankers import baseline_rankers
from fedmerge.client.cache.dp_releases import (
    CoefficientMessage,
    Release,
    check_counted,
    noised_answer_once,
    released_once,
)
from fedmerge.client.cache.experts import expert_by_hash, trained_expert
from fedmerge.client.cache.secure_sums import check_not_shown, keep_values, sum_of_run
from fedmerge.client.coefficients.own_users import ClientMergeSettings, clipped_gradient_sum, coefficient_gradient
from fedmerge.client.coefficients.pseudo_users import (
    Cohort,
    LocalGradient,
    cohort_folder,
    keep_cohort,
    local_change,
    on_pseudo_users,
    read_cohort,
    student_items,
)
from fedmerge.client.evaluate import evaluate
from fedmerge.client.local_domain import LocalDomain, open_domain
from fedmerge.client.training.dp_sgd import check_user_dp, plan_record, poisson_records, user_plan
from fedmerge.client.training.poisoning import sent, training_inputs
from fedmerge.client.training.round import RoundTask, train_round
from fedmerge.config import ExperimentConfig, Lora, Simulation, Text, from_flat
from fedmerge.device import resolve_compute
from fedmerge.domain.catalog import catalog_to_bytes
from fedmerge.domain.demo import domains_root
from fedmerge.domain.manifest import check_catalog_is_public
from fedmerge.encoder.backbone import Backbone, load_backbone
from fedmerge.encoder.lora import fresh_adapter, layout_sha256
from fedmerge.errors import ClientError, FedMergeError, PolicyError
from fedmerge.evaluation.sums import BACKBONE, EXPERT
from fedmerge.federated.rules import RULES
from fedmerge.federated.summed import summed_values
from fedmerge.mergerec.cohort import cohort_sha256
from fedmerge.mergerec.objective import CollaborativeSettings
from fedmerge.mergerec.variants import learned_settings
from fedmerge.mergerec.vectors import Vectors, initial_vectors, on_device
from fedmerge.merging.stack import stack_adapters
from fedmerge.privacy.client_policy import ClientPolicy, check_message_size, check_run_is_allowed, read_client_policy
from fedmerge.privacy.dp.randomness import source
from fedmerge.privacy.dp.releases import answer_rate, answers_have_noise
from fedmerge.privacy.paths import without_paths
from fedmerge.privacy.policy import check_enough_users, check_may_leave
from fedmerge.privacy.signatures import read_private_key, sign, statement
from fedmerge.privacy.transport import coding_of, decode_as_receiver, residual
from sim.app.client.secure_sum import answer_advertise, answer_masked, answer_share, answer_unmask, remember_values
from sim.app.messages import records

app = ClientApp()
logger = logging.getLogger("fedmerge.client")


@dataclass(frozen=True)
class Client:
    """This node's part in the federation."""

    config: ExperimentConfig
    domain: LocalDomain
    role: records.Role


def _answer(handler: Callable[[Message, Context], RecordDict]) -> Callable[[Message, Context], Message]:
    """Turn what a handler returns into a reply, and an error into a reply that names it."""

    @wraps(handler)
    def answer(message: Message, context: Context) -> Message:
        log_to_stderr()
        try:
            content = handler(message, context)
            if own := _own_policy(context):
                check_message_size(own, records.size_bytes(content), _domain_name(context))
            if key_path := context.node_config.get("key-path"):
                asked = message.metadata
                stated = statement(asked.run_id, asked.message_id, records.content_sha256(content))
                records.add_signature(content, sign(read_private_key(Path(str(key_path))), stated))
        except FedMergeError as error:
            logger.error("%s: %s", type(error).__name__, error)
            told = without_paths(f"{type(error).__name__}: {error}", _own_paths(context))
            content = records.error_record(told, _domain_name(context))
        except Exception as error:  # its text may quote private data, so it stays in this client's own log
            logger.error("%s", traceback.format_exc())
            told = f"{type(error).__name__}; the client's own log tells more"
            content = records.error_record(told, _domain_name(context))
        return Message(content, reply_to=message)

    return answer


@app.query("describe")
@_answer
def describe(message: Message, context: Context) -> RecordDict:
    """Say which domain this is and what it runs on."""
    num_nodes = int(context.node_config.get("num-partitions", 0))
    if _place(context) is None:
        return records.description_record(records.Description("", "idle", num_nodes=num_nodes))
    client = _client(context)
    manifest, backbone = client.domain.manifest, client.domain.backbone
    check_may_leave(client.config.privacy.policy, "description", manifest.name)
    if client.role == "train" and client.config.dp.mode == "user":
        check_user_dp(client.domain, client.config.dp)  # before anybody trains
    description = records.Description(
        domain=manifest.name,
        role=client.role,
        num_users=manifest.num_users,
        num_items=manifest.num_items,
        num_interactions=manifest.num_interactions,
        synthetic=manifest.synthetic,
        catalog_sha256=manifest.catalog_sha256,
        backbone_sha256=backbone.sha256,
        precision=backbone.compute.precision,
        fedmerge_version=__version__,
        policy=client.config.privacy.policy,
        num_nodes=num_nodes,
        layout_sha256=layout_sha256(backbone, client.config.lora.of(manifest.name)),
    )
    return records.description_record(description)


@app.query("catalog")
@_answer
def catalog(message: Message, context: Context) -> RecordDict:
    """Send the catalog, where policy and owner allow it."""
    client = _client(context)
    manifest = client.domain.manifest
    check_may_leave(client.config.privacy.policy, "catalog", manifest.name)
    check_catalog_is_public(manifest.name, manifest.public_catalog)
    return records.catalog_record(catalog_to_bytes(client.domain.catalog))


@app.train()
@_answer
def train(message: Message, context: Context) -> RecordDict:
    """Train the expert, or take it from disk, or train for a round; send the adapter, or keep it for a secure sum."""
    client = _client(context)
    policy, name = client.config.privacy.policy, client.domain.manifest.name
    if policy == "aggregate-only":
        check_may_leave(policy, "metric sums", name)
        return _kept_for_sum(client, message, context)
    check_may_leave(policy, "adapter", name)
    adapter, report, task = _trained(client, message)
    coding = coding_of(client.config, name, client.domain.backbone)
    if coding.transport != "float32":
        lost = residual(adapter, decode_as_receiver(adapter, coding))
        report = {**report, "transport": {"kind": coding.transport, "residual": lost}}
    return records.expert_record(adapter, report, coding, only_B=task is not None and task.trained == "B")


def _kept_for_sum(client: Client, message: Message, context: Context) -> RecordDict:
    """Train, keep what the secure sum will ask for, and send the report alone, without the hash of the adapter."""
    adapter, report, task = _trained(client, message)
    rule = client.config.rounds.rule
    row = RULES["weighted-average" if rule is None else rule]
    if row.summed is None:
        raise PolicyError(f"rounds.rule is {rule}, which needs single adapters; the policy keeps them at the client.")
    values = summed_values(row.summed, adapter, task.start if task and row.of == "updates" else None)
    name, cache_dir = client.domain.manifest.name, client.config.cache_dir
    of = sum_of_run(client.config, task.number if task else 0)
    sha256 = keep_values(cache_dir, name, values)
    check_not_shown(cache_dir, name, sha256, of)
    remember_values(context, sha256, of)
    return records.report_record({key: value for key, value in report.items() if key != "sha256"})


def _trained(client: Client, message: Message) -> tuple[Adapter, dict[str, Any], RoundTask | None]:
    """The adapter that was asked for, the report of its training, and the task of a round."""
    if client.config.rounds.rule is not None:
        return _trained_round(client, message)
    adapter, report = trained_expert(client.domain, client.config, logger.info)
    if report["validation_users"] < client.config.privacy.min_users:
        of_few = ("best_step", "stopped_by") if report["validation_users"] else ()  # chosen by the same few
        report = {**{key: value for key, value in report.items() if key not in of_few}, "validations": []}
    return adapter, report, None


def _trained_round(client: Client, message: Message) -> tuple[Adapter, dict[str, Any], RoundTask]:
    config, domain = client.config, client.domain
    name = domain.manifest.name
    lora = config.lora.of(name)
    request, start, base = records.read_round_request(message.content, partial(fresh_adapter, domain.backbone, lora))
    task = RoundTask(request.number, request.num_rounds, start, base, request.trained, config.rounds.proximal)
    if config.dp.mode == "user":
        check_counted(name, config, task)
        released = released_once(domain, config, task, lambda: _round(client, task, lora))
    else:
        released = _round(client, task, lora)
    return released.adapter, dict(released.told), task


def _round(client: Client, task: RoundTask, lora: Lora) -> Release:
    config, domain = client.config, client.domain
    trained_on, settings = training_inputs(domain, config)
    plan = user_plan(domain, config) if config.dp.mode == "user" else None
    adapter, report = train_round(trained_on, lora, settings, config.seed, task, logger.info, plan)
    adapter = sent(adapter, domain.manifest.name, config)
    told = asdict(report) | {"privacy": plan and plan_record(replace(plan, steps=report.steps))}
    if len(domain.training_sequences) < config.privacy.min_users:
        told["loss"] = None
    return Release(adapter, told)


@app.query("secagg_advertise")
@_answer
def secagg_advertise(message: Message, context: Context) -> RecordDict:
    """Fresh keys for a secure sum."""
    domain, _ = _in_sum(context)
    return answer_advertise(domain, message.content, context)


@app.query("secagg_share")
@_answer
def secagg_share(message: Message, context: Context) -> RecordDict:
    """Sealed shares of this client's secrets, for every other one."""
    _in_sum(context)
    return answer_share(message.content, context)


@app.query("secagg_masked")
@_answer
def secagg_masked(message: Message, context: Context) -> RecordDict:
    """What this client trained, masked."""
    domain, config = _in_sum(context)
    return answer_masked(domain, config, message.content, context)


@app.query("secagg_unmask")
@_answer
def secagg_unmask(message: Message, context: Context) -> RecordDict:
    """Shares of what takes the masks off the sum, and off nothing else."""
    domain, config = _in_sum(context)
    return answer_unmask(domain, config, message.content, context)


def _in_sum(context: Context) -> tuple[str, ExperimentConfig]:
    """Domain and configuration of a client that takes part in a secure sum; no backbone is loaded for it."""
    config, domain = from_flat(context.run_config), _domain_name(context)
    _check_own_policy(context, config, domain)
    check_may_leave(config.privacy.policy, "masked update", domain)
    return domain, config


@app.evaluate()
@_answer
def evaluate_models(message: Message, context: Context) -> RecordDict:
    """Evaluate models on this domain's own users and send sums."""
    client = _client(context)
    config, domain = client.config, client.domain
    check_may_leave(config.privacy.policy, "metric sums", domain.manifest.name)
    request, adapters = records.read_evaluation_request(message.content)
    sha256 = None if request.expert_sha256 == records.OWN_EXPERT else request.expert_sha256
    coding = coding_of(config, domain.manifest.name, domain.backbone)

    def received(expert: Adapter) -> str:
        """The server knows an expert by the hash of what arrived."""
        return adapter_sha256(decode_as_receiver(expert, coding))

    models = {
        **({BACKBONE: None} if request.backbone else {}),
        **({EXPERT: expert_by_hash(domain, config, sha256, received)} if request.expert_sha256 else {}),
        **adapters,
    }
    limit = config.evaluation.validation_users if request.split == "valid" else config.evaluation.test_users
    names = config.evaluation.baselines if request.baselines else ()
    baselines = baseline_rankers(domain, config, names, logger.info)
    sums = evaluate(domain, models, request.split, limit, config.seed, baselines, logger.info)
    for of_variant in sums.values():
        check_enough_users(domain.manifest.name, of_variant.num_users, config.privacy.min_users)
    return records.metric_sums_record(sums)


@app.query("cohort")
@_answer
def cohort(message: Message, context: Context) -> RecordDict:
    """Keep the cohort's adapters on this client's own disk, and make its pseudo-users."""
    client = _client(context)
    config, domain = client.config, client.domain
    name = domain.manifest.name
    check_may_leave(config.privacy.policy, "coefficient gradient", name)
    _check_enough_own_users(client)
    adapters = records.read_cohort(message.content)
    folder = cohort_folder(config, name, domain.catalog, domain.backbone, cohort_sha256(adapters))
    try:
        keep_cohort(folder, name, domain.backbone, adapters, domain.catalog, config)
    except FedMergeError as error:
        if config.dp.mode != "domain-local" or config.through_clients.users == "own-users":
            raise
        logger.error("%s", error)
        raise ClientError(
            "no pseudo-users can be made of this cohort; why would tell of data, the client's own log has it"
        ) from error
    pseudo = _cohort(folder, domain).pseudo
    return records.pseudo_users_record(len(pseudo.users) if pseudo else 0)


def _check_enough_own_users(client: Client) -> None:
    config, domain = client.config, client.domain
    if config.through_clients.users == "own-users":
        num_users = min(len(domain.training_sequences), config.through_clients.batch_size)
        what = "gradients of coefficients"
        check_enough_users(domain.manifest.name, num_users, config.privacy.min_users, what)


@app.query("gradient")
@_answer
def gradient(message: Message, context: Context) -> RecordDict:
    """The gradient of the merging coefficients on this client's pseudo-users or users, or what a few steps change."""
    client = _client(context)
    config, domain = client.config, client.domain
    check_may_leave(config.privacy.policy, "coefficient gradient", domain.manifest.name)
    _check_enough_own_users(client)  # the cohort may be on disk from a run that allowed fewer
    request, at, students, users = records.read_gradient_request(message.content)
    settings = learned_settings(config, request.label)
    start = at[:, 0] if settings.granularity == "domain" else at
    students = students[:, 0] if students.shape[1] == 1 else students
    kept = _cohort(
        cohort_folder(config, domain.manifest.name, domain.catalog, domain.backbone, request.cohort_sha256), domain
    )
    vectors = _vectors(kept, settings.initialisation, domain.backbone)

    def answer() -> torch.Tensor:
        if kept.pseudo is None and config.dp.mode == "user":
            return _sum_over_own_users(client, vectors, settings, request, start)
        if kept.pseudo is None:
            found = _on_own_users(client, vectors, settings, request.step)
        else:
            items = student_items(kept, domain.manifest.name, domain.item_sequences, domain.backbone, vectors, students)
            found = on_pseudo_users(domain.backbone, vectors, kept.pseudo, items, settings, request.step, users)
        return local_change(found, start, settings, request.num_steps) if request.num_steps else found(0, start)

    if not answers_have_noise(config):
        return records.gradient_record(answer())
    asked = CoefficientMessage(**asdict(request), coefficients=start.tolist(), students=students.tolist(), users=users)
    return records.gradient_record(noised_answer_once(domain, config, asked, answer))


def _on_own_users(client: Client, vectors: Vectors, settings: CollaborativeSettings, first: int) -> LocalGradient:
    own, device = _client_settings(client, settings), client.domain.backbone.device

    def found(step: int, coefficients: torch.Tensor) -> torch.Tensor:
        return coefficient_gradient(client.domain, vectors, coefficients.to(device), first + step, own)[0].cpu()

    return found


def _sum_over_own_users(
    client: Client,
    vectors: Vectors,
    settings: CollaborativeSettings,
    request: records.GradientRequest,
    coefficients: torch.Tensor,
) -> torch.Tensor:
    """Of those users who take part in the step: each with the same probability, and whoever else does."""
    config, domain = client.config, client.domain
    drawn = source(
        config.dp.randomness, config.seed, "client", domain.manifest.name, "own-users", request.label, request.step
    )
    rate = answer_rate(config, len(domain.training_sequences))
    taking_part = poisson_records(domain.training_sequences, "random-prefix", rate, drawn)
    own, at = _client_settings(client, settings), coefficients.to(domain.backbone.device)
    return clipped_gradient_sum(domain, vectors, at, taking_part, request.step, own, config.dp.coefficient_clip)


def _client_settings(client: Client, settings: CollaborativeSettings) -> ClientMergeSettings:
    section = client.config.through_clients
    return ClientMergeSettings(
        granularity=settings.granularity,
        batch_size=section.batch_size,
        seed=settings.seed,
    )


def _client(context: Context) -> Client:
    config = from_flat(context.run_config)
    torch.set_num_threads(config.runtime.threads_per_client)  # before any work; Ray's own setting does not count
    place = _place(context)
    if place is None:
        raise ClientError("this node has no domain; it takes no part")
    folder, role = place
    _check_own_policy(context, config, folder.name)
    wanted, runtime = config.backbone, config.runtime
    backbone = _backbone(wanted.source, wanted.pooling, wanted.weights_sha256, runtime.device, runtime.precision)
    domain = _domain(folder, backbone, config.text, config.cache_dir)
    if config.simulation != Simulation():
        if "partition-id" not in context.node_config:
            raise ClientError(
                f"domain {domain.manifest.name}: [simulation] changes the training data or poisons a training, so it "
                "is refused outside simulations; remove its keys from the experiment"
            )
        domain = for_audit(domain, config.simulation, config.seed)
    if role == "train" and not domain.can_train:
        logger.info("%s: nobody to train on, so it takes part as unseen", domain.manifest.name)
        role = "unseen"
    return Client(config, domain, role)


def _place(context: Context) -> tuple[Path, records.Role] | None:
    """This node's domain folder and role: the node's own ``domain-path``, or its turn in the experiment's list."""
    config = from_flat(context.run_config)
    domains = config.domains
    names = domains.train + domains.unseen
    if "domain-path" in context.node_config:
        folder = Path(str(context.node_config["domain-path"])).expanduser()
        if folder.name not in names:
            return None
    elif "partition-id" in context.node_config:
        turn = int(context.node_config["partition-id"])
        if turn >= len(names):
            return None
        folder = domains_root(domains.root, config.cache_dir) / names[turn]
    else:
        raise ClientError("this node does not know its domain: start it with --node-config 'domain-path=\"/…/NAME\"'")
    return folder, "train" if folder.name in domains.train else "unseen"


def _check_own_policy(context: Context, config: ExperimentConfig, domain: str) -> None:
    """Refuse what the organisation does not allow; in a simulation the run's policy alone rules."""
    own = _own_policy(context)
    if own is not None or "domain-path" in context.node_config:
        check_run_is_allowed(own, config, domain)


def _own_policy(context: Context) -> ClientPolicy | None:
    """What the organisation allows, by the node's own ``policy-path``; None where it left that to the run."""
    path = context.node_config.get("policy-path")
    return None if path is None else read_client_policy(Path(str(path)).expanduser())


def _own_paths(context: Context) -> list[str]:
    """The folders of this machine that its messages can name."""
    paths = [str(context.node_config.get(key, "")) for key in ("domain-path", "policy-path", "key-path")]
    paths += [str(Path.cwd()), tempfile.gettempdir()]
    with suppress(Exception):  # this is for a reply that tells of an error already
        config = from_flat(context.run_config)
        paths += [config.cache_dir, config.domains.root, config.backbone.source]
    return paths


def _domain_name(context: Context) -> str:
    try:
        place = _place(context)
    except Exception:  # this is for a reply that tells of an error already
        return ""
    return place[0].name if place else ""


@cache
def _backbone(source: str, pooling: str, weights_sha256: str | None, device: str, precision: str) -> Backbone:
    return load_backbone(source, pooling, resolve_compute(device, precision), weights_sha256)


@lru_cache(maxsize=4)
def _domain(folder: Path, backbone: Backbone, text: Text, cache_dir: str) -> LocalDomain:
    return open_domain(folder, backbone, text, Path(cache_dir))


@lru_cache(maxsize=4)
def _cohort(folder: Path, domain: LocalDomain) -> Cohort:
    return read_cohort(folder, domain.manifest.name, domain.item_sequences)


@lru_cache(maxsize=4)
def _vectors(kept: Cohort, initialisation: str, backbone: Backbone) -> Vectors:
    return on_device(initial_vectors(stack_adapters(kept.adapters), initialisation), backbone.device)


@cache
def log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s client %(message)s", "%H:%M:%S"))
    library = logging.getLogger("fedmerge")
    library.addHandler(handler)
    library.setLevel(logging.INFO)
    library.propagate = False
