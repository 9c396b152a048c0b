"""Train the federated head for a round over the item vectors of the served merge; it reads no item ids."""

import logging
from typing import Any

from flwr.app import Context, Message, RecordDict

from fedmerge.adapter import adapter_sha256
from fedmerge.client.disclosed.sums import count_models
from fedmerge.client.heads.vectors import item_vectors
from fedmerge.client.training.expert import check_can_train
from fedmerge.encoder.lora import layout_of
from fedmerge.errors import ClientError
from fedmerge.federated.head import fresh_head
from fedmerge.privacy.policy import check_may_leave
from fedmerge.sequence.anchored import train_anchored
from sim.app.client.node import open_client
from sim.app.client.replies import neutral_errors
from sim.app.client.secure_sum import keep_for_sum
from sim.app.messages import records

logger = logging.getLogger("fedmerge.client")


def train_head_round(message: Message, context: Context) -> RecordDict:
    """Send the head that this client trained from the round's start; or cache it for a secure sum."""
    client = open_client(context)
    config, domain, head = client.config, client.domain, client.config.head
    name, privacy = domain.manifest.name, config.privacy
    # 1. What is asked for, and whether it may leave.
    check_may_leave(privacy.policy, "training report", name)
    if not privacy.hides_adapters:
        check_may_leave(privacy.policy, "adapter", name)
    if head.kind != "federated":
        raise ClientError(
            f"domain {name}: the server asks for a round of a federated head, but the run has head.kind = "
            f"'{head.kind or 'none'}'; use one fedmerge version everywhere"
        )
    check_can_train(domain)
    width = domain.backbone.width
    task, start, encoder = records.read_round_request(message.content, lambda seed: fresh_head(width, head, seed))
    if layout_of(start) != layout_of(fresh_head(width, head, seed=0)):
        raise ClientError(
            f"domain {name}: the head that round {task.number} starts from has another layout than head.rank and the "
            "backbone give; use one configuration and one fedmerge version everywhere"
        )
    if not 1 <= task.number <= head.rounds:
        raise ClientError(
            f"domain {name}: the server asks for round {task.number} of a federated head, but the run has "
            f"head.rounds = {head.rounds}; use one configuration and one fedmerge version everywhere"
        )
    if client.own is not None:  # the vectors of each encoder are cached, which takes minutes and space on the disk
        encoders = {"" if encoder is None else adapter_sha256(encoder)}
        count_models(client.disclosed, str(config.run_id), encoders, client.own.max_models)
    # 2. Train.
    with neutral_errors(client, "the training of the federated head failed"):
        trained, of_training = train_anchored(
            domain.training_sequences,
            item_vectors(domain, encoder, config.cache_dir),
            start,
            steps=head.steps,
            proximal=head.proximal,
            sampled_items=head.sampled_items,
            seed=config.seed,
            scope=(name, "head round", task.number),
            progress=logger.info,
        )
    report: dict[str, Any] = {"steps": of_training.steps, "seconds": of_training.seconds, "loss": of_training.loss}
    if len(domain.training_sequences) < privacy.min_users or privacy.metrics != "exact":
        report["loss"] = None  # a mean over the users of its batches
    # 3. Send it, or keep it for the sum.
    if privacy.hides_adapters:
        keep_for_sum(client, context, head.rule, trained, start, task.number, "head")
        return records.report_record(report)
    return records.expert_record(trained, report)
