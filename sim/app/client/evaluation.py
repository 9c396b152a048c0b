"""Evaluate models on the domain's users."""

import logging

from flwr.app import Context, Message, RecordDict

from fedmerge.adapter import Adapter, adapter_sha256
from fedmerge.client.baselines.rankers import baseline_rankers
from fedmerge.client.cache.experts import load_expert
from fedmerge.client.evaluate import evaluate
from fedmerge.evaluation.sums import BACKBONE, EXPERT
from fedmerge.privacy.policy import check_enough_users, check_may_leave
from fedmerge.privacy.transport import coding_of, decode_as_receiver
from sim.app.client.node import open_client
from sim.app.messages import records

logger = logging.getLogger("fedmerge.client")


def evaluate_models(message: Message, context: Context) -> RecordDict:
    """Evaluate models on this domain's users and send sums of metrics."""
    client = open_client(context)
    config, domain = client.config, client.domain
    check_may_leave(config.privacy.policy, "metric sums", domain.manifest.name)
    request, adapters = records.read_evaluation_request(message.content)
    sha256 = None if request.expert_sha256 == records.OWN_EXPERT else request.expert_sha256
    coding = coding_of(config.privacy, config.lora.of(domain.manifest.name), config.seed, domain.backbone)

    def received(expert: Adapter) -> str:
        """Return the hash by which the server knows an expert: that of the decoded adapter."""
        return adapter_sha256(decode_as_receiver(expert, coding))

    models = {
        **({BACKBONE: None} if request.backbone else {}),
        **({EXPERT: load_expert(domain, config, sha256, received)} if request.expert_sha256 else {}),
        **adapters,
    }
    limit = config.evaluation.validation_users if request.split == "valid" else config.evaluation.test_users
    names = config.evaluation.baselines if request.baselines else ()
    baselines = baseline_rankers(domain, config, names, logger.info)
    sums = evaluate(domain, models, request.split, limit, config.seed, baselines, logger.info)
    for of_variant in sums.values():
        check_enough_users(domain.manifest.name, of_variant.num_users, config.privacy.min_users)
    return records.metric_sums_record(sums)
