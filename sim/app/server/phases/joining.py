"""Clients join: asked for their description, excluded if it does not fit the experiment."""

import logging
import math
import time
from collections.abc import Collection

from flwr.app import RecordDict

from fedmerge import __version__
from fedmerge.domain.manifest import OTHER_ATTRIBUTES
from fedmerge.encoder.backbone import Backbone
from fedmerge.encoder.lora import layout_sha256
from fedmerge.files import read_json
from fedmerge.runs import checkpoints
from fedmerge.runs.federated_head import HEAD_FOLDER
from fedmerge.runs.folder import ADMISSION
from fedmerge.runs.round_checkpoints import HEAD_ROUNDS
from fedmerge.server.choice import CHOICE_FILE, SELECTION_FILE
from sim.app.messages import records
from sim.app.server.asking import DESCRIBE_SECONDS, LOOK_SECONDS, ask, pause
from sim.app.server.members import FEW_CLIENTS, Members, join_names
from sim.app.server.phases.weaving.passes import WEAVE
from sim.app.server.questions import Question, State
from sim.app.server.run import Run

IDLE_SECONDS = 10.0  # time for the other nodes to answer once all domains have joined

logger = logging.getLogger("fedmerge.server")


def restore_members(run: Run) -> None:
    """Restore who took part in a resumed run.

    A client that failed in a phase that has ended stays excluded; one that failed in the phase at which the run stopped
    is asked again.
    """
    ended = {"catalogs", "train"} if checkpoints.read_sources(run.folder) else set()
    ended |= {"admission"} if read_json(run.folder / ADMISSION) else set()
    ended |= {WEAVE} if (run.folder / checkpoints.WEAVE_FILE).is_file() else set()
    ended |= {"merge"} if (run.folder / checkpoints.SUMS["valid"]).is_dir() else set()
    ended |= {HEAD_ROUNDS} if (run.folder / HEAD_FOLDER).is_dir() else set()
    if chosen := read_json(run.folder / CHOICE_FILE):
        ended |= {checkpoints.HEADS, checkpoints.SUMS["heads"]}
    ended |= {"validation"} if chosen or read_json(run.folder / SELECTION_FILE) else set()
    run.members.restore(ended)


def gather(run: Run, backbone: Backbone) -> None:
    """Wait for the nodes, and let each join as soon as it is connected.

    Raises:
        ClientError: too few training clients joined within ``server.wait_seconds``.
    """
    members, wait_seconds = run.members, run.config.server.wait_seconds
    num_domains = len(run.config.domains.train) + len(run.config.domains.unseen)
    logger.info("waiting for %d nodes, one for each domain, for up to %g s", num_domains, wait_seconds)
    started = time.monotonic()
    while True:
        greet(run, backbone, wait_for_lost=True)
        expected = min(num_domains, members.num_nodes or num_domains)
        come = len(members.greeted) if members.num_nodes else len(members.nodes) + len(members.excluded)
        if come >= expected or time.monotonic() > started + wait_seconds:
            break
        pause(started)
    members.absent = _find_absent(run)
    members.write()
    logger.info("%d nodes are connected, %d domains are expected", len(members.greeted), num_domains)
    if idle := len(members.greeted) - len(members.nodes) - len(members.excluded):
        logger.info("%d connected nodes are not part of this experiment", idle)
    log_members(run)
    run.require_quorum(members.in_role("train"))


def _find_absent(run: Run) -> dict[str, str]:
    """Return domain -> why no client of it has joined, for all domains of the experiment that were not excluded."""
    members, named = run.members, run.config.domains.train + run.config.domains.unseen
    why = f"no client came within {run.config.server.wait_seconds:g} s"
    if 0 < members.num_nodes < len(named):
        why = f"the simulation has {members.num_nodes} nodes for {len(named)} domains"
    absent = {domain: why for domain in named if domain not in members.nodes and domain not in members.excluded}
    refused = {name.partition(" (node ")[0] for name in members.excluded}
    for domain in absent:
        if domain in members.descriptions:
            absent[domain] = "its client did not come back when the run was resumed"
        elif domain in refused:
            absent[domain] = "the only node that claimed to be it was excluded"
    return absent


def greet_late(run: Run, backbone: Backbone, merged: Collection[str]) -> None:
    """Let clients join that came after the merge: they are evaluated as unseen.

    Args:
        run: with its merges made.
        backbone: that of the experiment.
        merged: domains whose experts are in the merges.
    """
    late = greet(run, backbone)
    if late:
        logger.info("joined late; evaluated as unseen: %s", join_names(late))
    for domain in late:
        if domain in run.config.domains.train and domain not in merged:
            run.members.absent[domain] = "its client came after the merge; evaluated as unseen"


def greet(run: Run, backbone: Backbone, *, wait_for_lost: bool = False) -> list[str]:
    """Ask new nodes for their descriptions, until all have answered or no domain is missing.

    Nobody knows whether a node has a part in the experiment before it says so. A node that is lost or silent is
    therefore waited for only while a domain is missing: nodes that train nothing delay nobody. Nodes that connect
    meanwhile are asked at once.

    Args:
        run: the run.
        backbone: that of the experiment.
        wait_for_lost: wait for lost nodes while a domain is missing; else they are asked when they are greeted next.

    Returns:
        The domains that joined, sorted.
    """
    members = run.members
    named = {*run.config.domains.train, *run.config.domains.unseen}
    joined: list[str] = []
    last_look, last_joined = -math.inf, time.monotonic()

    def receive(name: str, content: RecordDict) -> str | None:
        nonlocal last_joined
        description = records.read_description(content)
        if description.num_nodes and run.simulated:
            members.num_nodes = description.num_nodes
        if description.role == "idle":
            return None
        problem = _wrong_key(members, description, _node(name)) or _misfit(run, description, backbone)
        if problem:
            name = f"{description.domain} ({name})"
            run.exclude(name, problem)
            return name
        if description.domain in members.excluded:
            return description.domain  # in a phase that has ended
        members.nodes[description.domain] = _node(name)
        members.descriptions[description.domain] = description
        members.absent.pop(description.domain, None)
        joined.append(description.domain)
        last_joined = time.monotonic()
        few = len(run.config.domains.train) + len(run.config.domains.unseen) <= FEW_CLIENTS
        (logger.info if few else logger.debug)(
            "%s (%s%s): %d users, %d items, %d interactions",
            description.domain,
            description.role,
            ", synthetic" if description.synthetic else "",
            description.num_users,
            description.num_items,
            description.num_interactions,
        )
        return description.domain

    def newcomers() -> dict[str, int]:
        nonlocal last_look
        if time.monotonic() - last_look < LOOK_SECONDS:
            return {}
        last_look = time.monotonic()
        new = {f"node {node}": node for node in sorted(set(run.grid.get_node_ids()) - members.greeted)}
        members.greeted |= set(new.values())
        return new

    def matters(state: State) -> bool:
        missing = named - members.nodes.keys() - members.excluded.keys()
        if state is State.LOST:
            return wait_for_lost and bool(missing)
        return bool(missing) or time.monotonic() <= last_joined + IDLE_SECONDS

    with run.phase("gather"):
        left = ask(run, {}, Question(records.DESCRIBE, DESCRIBE_SECONDS), receive, newcomers=newcomers, matters=matters)
    if left:
        logger.info("not waited for, without a known part in this experiment: %s", join_names(sorted(left)))
    members.greeted -= {_node(name) for name, state in left.items() if state is State.LOST}  # greeted when they return
    return sorted(joined)


def log_members(run: Run) -> None:
    """Log who takes part and who does not."""
    members, domains = run.members, run.config.domains
    named = domains.train + domains.unseen
    unseen = [f"{domain} (unseen)" for domain in members.in_role("unseen")]
    logger.info("taking part: %s", join_names([*members.in_role("train"), *unseen]))
    absent = [domain for domain in named if domain not in members.nodes]
    if absent and not any(description.num_nodes for description in members.descriptions.values()):
        logger.info("not taking part: %s", join_names(absent))
    elif absent:
        logger.info(
            "not taking part: %s. For all %d domains: fedmerge run CONFIG, or "
            "flwr run . --federation-config 'num-supernodes=%d client-resources-num-cpus=%d'",
            join_names(absent),
            len(named),
            len(named),
            run.config.runtime.threads_per_client,
        )


def _misfit(run: Run, description: records.Description, backbone: Backbone) -> str | None:
    """Return why a client cannot take part, or None."""
    domains, name = run.config.domains, description.domain
    if name not in (domains.train if description.role == "train" else domains.train + domains.unseen):
        return f"it claims to be {name!r} ({description.role}), which the experiment does not list in that role"
    if name in run.members.nodes:
        return f"another client already is {name}; start one client for each domain"
    if description.role == "train" and description.num_users < 1:
        return f"it is to train, but has {description.num_users} users; import its domain again"
    checks = {
        "backbone": (
            description.backbone_sha256,
            backbone.sha256,
            "use the same backbone and tokenizer files everywhere",
        ),
        "precision": (
            description.precision,
            backbone.compute.precision,
            "'auto' is the fastest precision of each machine, so set runtime.precision to float32 or bfloat16 for both",
        ),
        "fedmerge version": (description.fedmerge_version, __version__, "install the same version everywhere"),
        "LoRA layout": (
            description.layout_sha256,
            layout_sha256(backbone, run.config.lora.of(name)),
            "use the same versions of fedmerge, peft and transformers everywhere",
        ),
        "policy": (description.policy, run.config.privacy.policy, "agree on privacy.policy"),
    }
    if domains.attributes:
        checks["template of item texts"] = (description.attributes, ",".join(domains.attributes), OTHER_ATTRIBUTES)
    if before := run.members.descriptions.get(name):  # the run is resumed
        remedy = "the domain changed since the run started; restore it, or start a new run"
        for key in ("catalog_sha256", "num_interactions", "num_items", "num_users", "role"):
            checks[key] = (getattr(description, key), getattr(before, key), remedy)
    for what, (found, wanted, remedy) in checks.items():
        if found != wanted:
            return f"its {what} is {found}, the server's is {wanted}; {remedy}"
    return None


def _wrong_key(members: Members, description: records.Description, node: int) -> str | None:
    """Return why a client's key does not fit its domain, or None."""
    name, registered = description.domain, members.keys.get(members.signers.get(node, ""))
    bound = {key.domain: key.name for key in members.keys.values() if key.domain is not None}
    if registered is None or registered.domain == name or (registered.domain is None and name not in bound):
        return None
    whose = (
        f"for {registered.domain!r} only"
        if registered.domain
        else f"without a domain, and {bound[name]} is registered for it"
    )
    return (
        f"it claims to be {name!r}, but its key ({registered.name}) is registered {whose}. One client uses the key or "
        "the name of another; check both"
    )


def _node(name: str) -> int:
    return int(name.removeprefix("node "))
