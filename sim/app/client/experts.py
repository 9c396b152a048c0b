"""The expert that this client trained before, and the similarity of items under it."""

from flwr.app import Context, Message, RecordDict

from fedmerge.adapter import Adapter, adapter_sha256
from fedmerge.client.cache.experts import load_expert
from fedmerge.client.disclosed.account import read_account
from fedmerge.client.training.settings import training_settings
from fedmerge.domain.manifest import check_catalog_is_public
from fedmerge.encoder.encode import encode
from fedmerge.encoder.lora import applied
from fedmerge.errors import PolicyError
from fedmerge.federated.shared_items import similarity_factors
from fedmerge.privacy.policy import check_may_leave
from fedmerge.privacy.transport import coding_of, decode_as_receiver
from sim.app.client.node import Client, open_client
from sim.app.messages import records


def own_expert(client: Client, expert_sha256: str) -> Adapter:
    """Load the client's own expert.

    Args:
        client: this node.
        expert_sha256: hash by which the server knows it; OWN_EXPERT if it never left the client.

    Raises:
        ClientError: it is not in the cache.
        PolicyError: it was trained with differential privacy, but never released.
    """
    config, domain = client.config, client.domain
    sha256 = None if expert_sha256 == records.OWN_EXPERT else expert_sha256
    coding = coding_of(config.privacy, config.lora.of(domain.manifest.name), config.seed, domain.backbone)

    def received(expert: Adapter) -> str:
        """Return the hash by which the server knows an expert: that of the decoded adapter."""
        return adapter_sha256(decode_as_receiver(expert, coding))

    expert = load_expert(domain, training_settings(config), config.cache_dir, config.run_id, sha256, received)
    counted = config.dp.mode in ("user", "domain-local") and client.own is not None
    if counted and adapter_sha256(expert) not in {entry.key for entry in read_account(client.disclosed)}:
        raise PolicyError(
            f"domain {domain.manifest.name}: its expert was trained but never released, so its account does not "
            "cover what it tells of users; it is not evaluated. Train it in a run that the owner's limits allow."
        )
    return expert


def send_similarity(message: Message, context: Context) -> RecordDict:
    """Send factors of the similarity of shared items under the own expert; no user is read."""
    client = open_client(context)
    config, domain, name = client.config, client.domain, client.domain.manifest.name
    check_may_leave(config.privacy.policy, "similarity factors", name)
    if not config.shares_similarity:
        raise PolicyError(f"domain {name}: the server asks for similarities, but weave.schedule is not 'similarity'")
    check_catalog_is_public(name, domain.manifest.public_catalog)
    request, items = records.read_similarity_request(message.content, len(domain.catalog))
    rank = min(request.rank, config.weave.similarity_rank)
    with applied(domain.backbone, own_expert(client, request.expert_sha256)):
        vectors = encode(domain.backbone, [domain.item_sequences[item] for item in items])
    return records.similarity_record(similarity_factors(vectors.cpu(), rank))
