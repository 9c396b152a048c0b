"""The expert that this client trained before."""

from fedmerge.adapter import Adapter, adapter_sha256
from fedmerge.client.cache.experts import load_expert
from fedmerge.client.disclosed.account import read_account
from fedmerge.client.training.settings import training_settings
from fedmerge.errors import PolicyError
from fedmerge.privacy.transport import coding_of, decode_as_receiver
from sim.app.client.node import Client
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
