"""Describe the domain and send its catalog."""

from flwr.app import Context, Message, RecordDict

from fedmerge import __version__
from fedmerge.client.training.dp_sgd import check_user_dp
from fedmerge.domain.catalog import catalog_to_bytes
from fedmerge.domain.manifest import check_catalog_is_public
from fedmerge.encoder.lora import layout_sha256
from fedmerge.privacy.policy import check_may_leave
from sim.app.client.node import find_place, open_client
from sim.app.messages import records


def describe(message: Message, context: Context) -> RecordDict:
    """Describe the domain and what it runs on."""
    num_nodes = int(context.node_config.get("num-partitions", 0))
    if find_place(context) is None:
        return records.description_record(records.Description("", "idle", num_nodes=num_nodes))
    client = open_client(context)
    manifest, backbone = client.domain.manifest, client.domain.backbone
    check_may_leave(client.config.privacy.policy, "description", manifest.name)
    if client.role == "train" and client.config.dp.mode == "user":
        check_user_dp(client.domain, client.config.dp)  # before any client trains
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
        attributes=",".join(manifest.attributes),
    )
    return records.description_record(description)


def catalog(message: Message, context: Context) -> RecordDict:
    """Send the catalog, where policy and owner allow it."""
    client = open_client(context)
    manifest = client.domain.manifest
    check_may_leave(client.config.privacy.policy, "catalog", manifest.name)
    check_catalog_is_public(manifest.name, manifest.public_catalog)
    return records.catalog_record(catalog_to_bytes(client.domain.catalog))
