"""The node that the client app runs on: its domain, its role and its owner's policy."""

import logging
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import torch
from flwr.app import Context

from fedmerge.client.audit.users import prepare_for_audit
from fedmerge.client.disclosed.account import Entry, charge
from fedmerge.client.disclosed.users import draw_examples, read_secret
from fedmerge.client.local_domain import LocalDomain, open_domain
from fedmerge.config import BackboneSection, ExperimentConfig, Simulation, Split, Text, from_flat
from fedmerge.device import resolve_compute
from fedmerge.domain.demo import domain_folder
from fedmerge.domain.manifest import read_manifest
from fedmerge.domain.splits import Examples, evaluation_examples
from fedmerge.encoder.backbone import Backbone, open_backbone
from fedmerge.errors import ClientError
from fedmerge.privacy.client_policy import (
    ClientPolicy,
    check_replacement_is_allowed,
    check_run_is_allowed,
    read_client_policy,
)
from fedmerge.storage.addresses import name_of
from fedmerge.storage.fetching import local_folder
from sim.app.messages import records

logger = logging.getLogger("fedmerge.client")


@dataclass(frozen=True)
class Client:
    """This node's part in the federation.

    Attributes:
        config: the run's configuration.
        domain: the node's own.
        role: its role in the run.
        own: the organisation's policy; None if the node has no policy file.
        disclosed: folder of what the client has disclosed about its users, see ``fedmerge.client.disclosed``.
    """

    config: ExperimentConfig
    domain: LocalDomain
    role: records.Role
    own: ClientPolicy | None
    disclosed: Path


def open_client(context: Context) -> Client:
    """Open this node's domain with its backbone, after its owner's policy allows the run.

    Raises:
        ClientError: the node has no domain, or a [simulation] is asked of a deployed node.
        PolicyError: the organisation's policy refuses the run.
    """
    config = from_flat(context.run_config)
    torch.set_num_threads(config.runtime.threads_per_client)  # before any work; Ray's own setting does not count
    place = find_place(context)
    if place is None:
        raise ClientError("this node has no domain in the experiment")
    folder, role = place
    check_own_policy(context, config, folder.name)
    if config.simulation != Simulation() and not _is_simulated(context):
        raise ClientError(
            f"domain {folder.name}: [simulation] changes the training data or poisons a training, so it is refused "
            "outside simulations. Remove its keys from the experiment."
        )
    backbone = cached_backbone(config.backbone, config.runtime.device, config.runtime.precision)
    data = read_manifest(folder)
    domain = cached_domain(
        folder, data.catalog_sha256, data.interactions_sha256, backbone, config.text, config.cache_dir
    )
    if config.simulation != Simulation():
        domain = prepare_for_audit(domain, config.simulation, config.seed)
    if role == "train" and not domain.can_train:
        logger.info("%s: no users to train on; joining as unseen", domain.manifest.name)
        role = "unseen"
    own = own_policy(context)
    check_replacement_is_allowed(
        own, config, len(domain.training_sequences) if role == "train" else 0, domain.manifest.name
    )
    return Client(config, domain, role, own, disclosed_folder(context, config, folder.name))


def disclosed_folder(context: Context, config: ExperimentConfig, domain: str) -> Path:
    """Return the folder of what was disclosed: a run cannot move it where the node has a policy file."""
    node = context.node_config
    if "disclosed-path" in node:
        return Path(str(node["disclosed-path"])).expanduser()
    if "policy-path" in node:
        return Path(str(node["policy-path"])).expanduser().parent / "disclosed" / domain
    return Path(config.cache_dir).expanduser() / "disclosed" / domain


def charge_run(client: Client, entries: Iterable[Entry]) -> None:
    """Enter releases of the run into the client's account, within its owner's limits.

    Raises:
        PolicyError: see :func:`fedmerge.client.disclosed.account.charge`.
    """
    own = client.own or ClientPolicy()
    charge(client.disclosed, list(entries), own.max_total_epsilon, own.max_delta, own.adjacency)


def evaluated_examples(client: Client, split: Split) -> Examples:
    """Draw the evaluated users: by the run's seed for exact sums, else by the client's secret."""
    config, interactions = client.config, client.domain.interactions
    limit = config.evaluation.validation_users if split == "valid" else config.evaluation.test_users
    if config.privacy.metrics == "exact":
        return evaluation_examples(interactions, split, limit, config.seed)
    return draw_examples(interactions, split, limit, read_secret(client.disclosed))


def _is_simulated(context: Context) -> bool:
    """Return True on a node of a simulation; one with a domain of its own never is, whatever else its settings say."""
    return "partition-id" in context.node_config and "domain-path" not in context.node_config


def find_place(context: Context) -> tuple[Path, records.Role] | None:
    """Return domain folder and role: by the node's own ``domain-path``, or by its number in a simulation."""
    config = from_flat(context.run_config)
    domains = config.domains
    names = domains.train + domains.unseen
    if "domain-path" in context.node_config:
        own = str(context.node_config["domain-path"])
        if name_of(own) not in names:
            return None
        folder = local_folder(own, config.cache_dir, "domains")
    elif "partition-id" in context.node_config:
        turn = int(context.node_config["partition-id"])
        if turn >= len(names):
            return None
        folder = domain_folder(domains.root, names[turn], config.cache_dir)
    else:
        raise ClientError("this node does not know its domain: start it with --node-config 'domain-path=\"/…/NAME\"'")
    return folder, "train" if folder.name in domains.train else "unseen"


def check_own_policy(context: Context, config: ExperimentConfig, domain: str) -> None:
    """Refuse what the organisation does not allow; in a simulation only the run's policy applies."""
    own = own_policy(context)
    if own is not None or "domain-path" in context.node_config:
        has_peer_keys = {"identity-key", "peer-keys"} <= context.node_config.keys()
        check_run_is_allowed(own, config, domain, has_peer_keys=has_peer_keys)


def own_policy(context: Context) -> ClientPolicy | None:
    """Read the organisation's policy from the node's ``policy-path``; None where only the run's policy applies."""
    path = context.node_config.get("policy-path")
    return None if path is None else read_client_policy(Path(str(path)).expanduser())


def own_paths(context: Context) -> list[str]:
    """List the folders of this machine that a message could name."""
    paths = [str(context.node_config.get(key, "")) for key in ("domain-path", "policy-path", "key-path")]
    paths += [str(Path.cwd()), tempfile.gettempdir()]
    with suppress(Exception):  # the reply already reports an error
        config = from_flat(context.run_config)
        paths += [config.cache_dir, config.domains.root, config.backbone.source]
    return paths


def domain_name(context: Context) -> str:
    """Return the name of this node's domain; empty where it has none."""
    try:
        place = find_place(context)
    except Exception:  # the reply already reports an error
        return ""
    return place[0].name if place else ""


@cache
def cached_backbone(section: BackboneSection, device: str, precision: str) -> Backbone:
    """Load a backbone once for all clients of a worker."""
    return open_backbone(section, resolve_compute(device, precision))


@lru_cache(maxsize=4)
def cached_domain(
    folder: Path, catalog_sha256: str, interactions_sha256: str, backbone: Backbone, text: Text, cache_dir: str
) -> LocalDomain:
    """Open a domain; the same data are opened once."""
    return open_domain(folder, backbone, text, Path(cache_dir))
