"""Who takes part: asked what it is, refused where it does not fit, remembered where the run is resumed."""

import logging
import time
from pathlib import Path

from flwr.app import RecordDict

from fedmerge import __version__
from fedmerge.config import ExperimentConfig
from fedmerge.encoder.backbone import Backbone
from fedmerge.files import read_json
from fedmerge.runs import checkpoints
from fedmerge.server.admission import layout_sha256
from sim.app.messages import records
from sim.app.server.asking import (
    DESCRIBE_SECONDS,
    Federation,
    Question,
    ask,
    listed,
    pause,
    remembered_clients,
    require_quorum,
)

logger = logging.getLogger("fedmerge.server")


def remember(federation: Federation, run_dir: Path) -> None:
    """Who was excluded in a phase that has ended stays so; who failed in one that goes on is asked again."""
    federation.descriptions, excluded = remembered_clients(run_dir)
    ended = {"catalogs", "train"} if checkpoints.ended_training(run_dir) else set()
    ended |= {"admission"} if read_json(run_dir / checkpoints.ADMISSION) else set()
    ended |= {"merge"} if (run_dir / checkpoints.SUMS["valid"]).is_dir() else set()
    ended |= {"validation"} if read_json(run_dir / "choice.json") else set()
    federation.excluded = {name: exclusion for name, exclusion in excluded.items() if exclusion.phase in ended}


def gather(federation: Federation, config: ExperimentConfig, backbone: Backbone) -> None:
    """Wait for the nodes, ask each what it is as it comes, refuse those that do not fit."""
    num_domains = len(config.domains.train) + len(config.domains.unseen)
    logger.info("waiting for %d nodes, one a domain, at most %g s", num_domains, config.server.wait_seconds)
    started = time.monotonic()
    deadline = started + config.server.wait_seconds
    while True:
        greet(federation, config, backbone)
        expected = min(num_domains, federation.num_nodes or num_domains)
        come = len(federation.greeted) if federation.num_nodes else len(federation.nodes) + len(federation.excluded)
        if come >= expected or time.monotonic() > deadline:
            break
        pause(started)
    federation.write_clients()
    logger.info("%d nodes are connected, %d domains are expected", len(federation.greeted), num_domains)
    if idle := len(federation.greeted) - len(federation.nodes) - len(federation.excluded):
        logger.info("%d of them say that the experiment does not name their domain", idle)
    say_who_took_part(federation, config)
    require_quorum(federation, config, federation.of("train"))


def greet(federation: Federation, config: ExperimentConfig, backbone: Backbone) -> list[str]:
    """Ask the nodes that are new what they are; the domains that take part now, too."""
    federation.phase = "gather"
    welcomed: list[str] = []

    def receive(name: str, content: RecordDict) -> str | None:
        description = records.read_description(content)
        if description.num_nodes and federation.simulated:  # there are so many and no more
            federation.num_nodes = description.num_nodes
        if description.role == "idle":
            return None
        problem = _misfit(description, backbone, config, federation) or _not_its_key(description, name, federation)
        if problem:
            name = f"{description.domain} ({name})"
            federation.exclude(name, problem)
            return name
        if description.domain in federation.excluded:
            return description.domain  # in a phase that has ended
        federation.nodes[description.domain] = _node(name)
        federation.descriptions[description.domain] = description
        welcomed.append(description.domain)
        log = logger.info if len(config.domains.train) + len(config.domains.unseen) <= 20 else logger.debug
        log(
            "%s (%s%s): %d users, %d items, %d interactions",
            description.domain,
            description.role,
            ", synthetic" if description.synthetic else "",
            description.num_users,
            description.num_items,
            description.num_interactions,
        )
        return description.domain

    new = sorted(set(federation.grid.get_node_ids()) - federation.greeted)
    question = Question(records.DESCRIBE, DESCRIBE_SECONDS)
    ask(federation, {f"node {node}": node for node in new}, question, receive)
    federation.greeted |= set(new)
    return sorted(welcomed)


def _misfit(
    description: records.Description, backbone: Backbone, config: ExperimentConfig, federation: Federation
) -> str | None:
    domains = config.domains
    if description.domain not in (domains.train if description.role == "train" else domains.train + domains.unseen):
        return f"it says to be {description.domain!r} ({description.role}), which the experiment does not name as such"
    if description.domain in federation.nodes:
        return f"another client already is {description.domain}; start one client for each domain"
    if description.role == "train" and description.num_users < 1:
        return f"it trains, but has {description.num_users} users; import its domain again"
    checks = {
        "backbone": (
            description.backbone_sha256,
            backbone.sha256,
            "use the same backbone and tokenizer files everywhere",
        ),
        "precision": (
            description.precision,
            backbone.compute.precision,
            "'auto' is what each machine multiplies best, so set runtime.precision to float32 or bfloat16 for both",
        ),
        "fedmerge version": (description.fedmerge_version, __version__, "install the same version everywhere"),
        "LoRA layout": (
            description.layout_sha256,
            layout_sha256(backbone, config.lora.of(description.domain)),
            "use the same versions of fedmerge, peft and transformers everywhere",
        ),
        "policy": (description.policy, config.privacy.policy, "agree on privacy.policy"),
    }
    if before := federation.descriptions.get(description.domain):  # the run is resumed
        data = {"role", "num_users", "num_items", "num_interactions", "catalog_sha256"}
        remedy = "a run has one state of the data: put it back, or start a new run"
        checks |= {key: (getattr(description, key), getattr(before, key), remedy) for key in sorted(data)}
    for what, (found, wanted, remedy) in checks.items():
        if found != wanted:
            return f"its {what} is {found}, the server's {wanted}; {remedy}"
    return None


def _not_its_key(description: records.Description, name: str, federation: Federation) -> str | None:
    registered = federation.keys.get(federation.signers.get(_node(name), ""))
    bound = {key.domain: key.name for key in federation.keys.values() if key.domain is not None}
    if registered is None or registered.domain == description.domain:
        return None
    if registered.domain is None and description.domain not in bound:
        return None
    whose = (
        f"for {registered.domain!r} alone" if registered.domain else f"without it; {bound[description.domain]} has it"
    )
    return (
        f"it says to be {description.domain!r}, but its key ({registered.name}) is registered {whose}. One of them "
        "took the other's key or name: look into it"
    )


def _node(name: str) -> int:
    return int(name.removeprefix("node "))


def say_who_took_part(federation: Federation, config: ExperimentConfig) -> None:
    named = config.domains.train + config.domains.unseen
    absent = [domain for domain in named if domain not in federation.nodes]
    logger.info(
        "taking part: %s",
        listed([*federation.of("train"), *(f"{domain} (unseen)" for domain in federation.of("unseen"))]),
    )
    if absent and not any(description.num_nodes for description in federation.descriptions.values()):
        logger.info("not taking part: %s", listed(absent))
    elif absent:
        logger.info(
            "not taking part: %s. For all %d domains: fedmerge run CONFIG, or "
            "flwr run . --federation-config 'num-supernodes=%d client-resources-num-cpus=%d'",
            listed(absent),
            len(named),
            len(named),
            config.runtime.threads_per_client,
        )
