"""The configuration of one experiment, and the settings of several sections that contradict each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from fedmerge.config.sections import (
    DP,
    AdaMerging,
    Admission,
    Attack,
    Audit,
    BackboneSection,
    Domains,
    Evaluation,
    Lora,
    Merge,
    MergeRec,
    Privacy,
    Rounds,
    Runtime,
    SASRec,
    Section,
    Server,
    Text,
    ThroughClients,
    Tracking,
    Train,
)

LEARNED_METHODS = frozenset({"mergerec", "adamerging"})  # from pseudo-users, so they need the catalogs
SUMMED_METHODS = ("average", "task-arithmetic", "knots-task-arithmetic")  # multiples of the sum: a secure sum will do
SUMMED_RULES = ("weighted-average", "fedit", "ffa-lora", "flexlora", "fedavgm", "fedadam", "fedyogi")
MIN_SUMMED = 3  # adapters in a secure sum: of two, each client reads the other's off it


def check_together(config: ExperimentConfig) -> None:
    """Refuse settings that contradict each other.

    Raises:
        ValueError: the first contradiction, and the remedy.
    """
    if config.resume and config.run_id is None:
        raise ValueError("resume = true, but run_id is 'none'; set run_id to the name of the run folder")
    rule = config.rounds.rule
    learned = [name for name in (config.merge.methods if rule is None else (rule,)) if name in LEARNED_METHODS]
    policy = config.privacy.policy
    if learned and policy == "catalog-private":
        _check_through_clients(config, learned)
    elif config.through_clients.users == "own-users":
        raise ValueError(
            "through_clients.users = 'own-users', but nothing is learned through the clients; set privacy.policy = "
            "'catalog-private' and add mergerec to merge.methods, or leave users at 'pseudo-users'"
        )
    if config.privacy.transport != "float32" and (config.rounds.rule is not None or policy == "aggregate-only"):
        raise ValueError(
            f"privacy.transport = '{config.privacy.transport}' is for experts that are trained once and merged; set "
            "it to 'float32' with rounds.rule and with privacy.policy = 'aggregate-only'"
        )
    if learned and policy == "adapter" and config.server.catalogs is None:
        catalogs = (
            "which needs the catalogs, but privacy.policy = 'adapter' keeps them at the clients and "
            "server.catalogs is 'none'; set privacy.policy = 'adapter+catalog' or give server.catalogs a folder"
        )
        if rule is not None:
            raise ValueError(f"rounds.rule is {rule}, {catalogs}")
        raise ValueError(f"merge.methods holds {learned[0]}, {catalogs}")
    if config.privacy.policy == "aggregate-only":
        _check_aggregate_only(config)
    _check_admission(config)
    if problem := too_few_for_krum(config.rounds, len(config.domains.train)):
        raise ValueError(problem)
    if rule in ("fedit", "ffa-lora") and config.lora.ranks:
        raise ValueError(
            f"lora.ranks differ, but rounds.rule = '{rule}' averages factors of one shape; leave lora.ranks out, or "
            "choose flexlora, flora or hetlora"
        )
    if strange := sorted({text.partition("=")[0] for text in config.lora.ranks} - {*config.domains.train}):
        raise ValueError(f"lora.ranks names {', '.join(strange)}, not among domains.train; correct the name")
    _check_dp(config)
    if config.server.min_train_clients > len(config.domains.train):
        raise ValueError(
            f"server.min_train_clients = {config.server.min_train_clients}, but domains.train names only "
            f"{len(config.domains.train)}; lower it"
        )


def _check_dp(config: ExperimentConfig) -> None:
    mode, train = config.dp.mode, config.train
    if mode == "user" and train.negatives == "in-batch":
        raise ValueError(
            "dp.mode = 'user', but train.negatives = 'in-batch': a user's loss then depends on the other users of "
            "the step, and clipping by user bounds nothing; set train.negatives = 'catalog'"
        )
    if mode == "user" and (train.max_steps is None or train.max_epochs or train.max_minutes):
        raise ValueError(
            "dp.mode = 'user' needs the number of steps beforehand, since the noise is chosen for it; set "
            "train.max_steps and leave train.max_epochs and train.max_minutes at 'none'"
        )
    if mode == "user" and config.rounds.rule is not None and (train.max_steps or 0) < config.rounds.number:
        raise ValueError(
            f"dp.mode = 'user' with rounds.number = {config.rounds.number}, but train.max_steps = {train.max_steps}: "
            "every round makes at least one step, and the noise is chosen for train.max_steps in all; lower "
            "rounds.number, or raise train.max_steps"
        )
    if mode == "domain-central" and config.privacy.policy == "aggregate-only":
        raise ValueError(
            "dp.mode = 'domain-central' with privacy.policy = 'aggregate-only': the server would clip every single "
            "adapter, which the policy hides from it; set dp.mode = 'domain-local' or 'user', or another policy"
        )
    own = (config.privacy.policy, config.through_clients.users) == ("catalog-private", "own-users")
    learned = {*config.merge.methods} & LEARNED_METHODS
    if mode == "user" and own and learned and config.through_clients.mode == "local-steps":
        raise ValueError(
            "dp.mode = 'user' with through_clients.users = 'own-users' and mode = 'local-steps': what several steps "
            "change cannot be clipped by user; set through_clients.mode = 'exact', or dp.mode = 'domain-local'"
        )
    noised = own if mode == "user" else mode == "domain-local" and config.privacy.policy == "catalog-private"
    counted = noised and not own and "mergerec" in learned  # as many pseudo-users as the server is told
    if mode == "domain-local" and counted and config.mergerec.pseudo_users == "centroid":
        raise ValueError(
            "dp.mode = 'domain-local' with mergerec.pseudo_users = 'centroid': how many pseudo-users that makes would "
            "leave without noise; set mergerec.pseudo_users = 'subset' or 'one-item'"
        )
    if noised and learned and config.admission.rollback:
        raise ValueError(
            f"dp.mode = '{mode}' with admission.rollback: a second merge would be learned through the clients, for "
            "which the noise is not chosen; set admission.rollback = false"
        )
    if mode.startswith("domain") and config.rounds.rule is not None:
        raise ValueError(
            f"dp.mode = '{mode}' covers a single merge, but rounds.rule is {config.rounds.rule}; set rounds.rule = "
            "'none', or dp.mode = 'user'"
        )
    gate = [key for key in ("leave_one_out", "rollback") if getattr(config.admission, key)]
    gate += ["action = 'exclude'"] if config.admission.action == "exclude" else []
    if mode == "domain-central" and gate:
        raise ValueError(
            f"dp.mode = 'domain-central' with admission.{gate[0]}: merges without noise would go to the clients, or "
            "one domain would decide which others are in the sum; leave it out, or set dp.mode = 'domain-local'"
        )
    if mode == "domain-central" and config.merge.methods != ("average",):
        raise ValueError(
            "dp.mode = 'domain-central' adds noise to the sum of all updates, so merge.methods can only be "
            f"'average', found {', '.join(config.merge.methods)}; set merge.methods = 'average', or dp.mode = "
            "'domain-local', after which any method may follow"
        )


def _check_through_clients(config: ExperimentConfig, learned: Sequence[str]) -> None:
    """Refuse what cannot be learned through the clients, each with the remedy."""
    section, problems = config.through_clients, []
    if config.rounds.rule is not None:
        problems.append(
            f"rounds.rule = '{learned[0]}' learns from catalogs at the server; set privacy.policy = "
            "'adapter+catalog', or another rule"
        )
    if config.server.catalogs is not None:
        problems.append(
            "server.catalogs gives the server what the policy keeps at the clients; set server.catalogs = 'none', "
            "or privacy.policy = 'adapter'"
        )
    if config.mergerec.select_every is not None:
        problems.append("mergerec.select_every needs losses, which stay at the clients; set it to 'none'")
    if section.mode == "local-steps" and (config.mergerec.try_steps or config.mergerec.prior_weight):
        problems.append(
            "mergerec.try_steps and mergerec.prior_weight need one message a step; set through_clients.mode = "
            "'exact', or leave them out"
        )
    if section.users == "own-users" and "adamerging" in learned:
        problems.append(
            "adamerging has no loss on own users; set through_clients.users = 'pseudo-users', or leave it out"
        )
    if section.users == "own-users" and section.batch_size < config.privacy.min_users:
        problems.append(
            f"through_clients.batch_size = {section.batch_size} own users are fewer than privacy.min_users = "
            f"{config.privacy.min_users}; raise the one, or lower the other"
        )
    if problems:
        raise ValueError(f"privacy.policy = 'catalog-private': {'; '.join(problems)}")


def _check_aggregate_only(config: ExperimentConfig) -> None:
    """Refuse what a server cannot do that sees sums alone.

    Raises:
        ValueError: what, and the remedy.
    """
    hidden = "privacy.policy = 'aggregate-only' shows the server no single adapter"
    rule, num_domains = config.rounds.rule, len(config.domains.train)
    if rule is None:
        if needing := [method for method in config.merge.methods if method not in SUMMED_METHODS]:
            raise ValueError(
                f"merge.methods holds {needing[0]}, which needs every single adapter, but {hidden}; use "
                f"one of {', '.join(SUMMED_METHODS)}, or set privacy.policy = 'adapter'"
            )
        if config.until == "train":
            raise ValueError(f"until = 'train' ends with the experts on the server's disk, but {hidden}; set 'report'")
    elif rule not in SUMMED_RULES:
        why = "lays the factors side by side, which shows every block" if rule == "flora" else "needs every single one"
        raise ValueError(
            f"rounds.rule is {rule}, which {why}, but {hidden}; use one of {', '.join(SUMMED_RULES)}, or set "
            "privacy.policy = 'adapter'"
        )
    drawn = num_domains if rule is None else math.ceil(config.rounds.fraction * num_domains)
    if drawn < MIN_SUMMED:
        raise ValueError(
            f"privacy.policy = 'aggregate-only' with {drawn} clients in a sum: with fewer than {MIN_SUMMED} one client "
            "reads another's adapter off the sum; name more domains, or raise rounds.fraction"
        )
    threshold = config.privacy.threshold
    if threshold is not None and not drawn // 2 < threshold <= drawn:
        raise ValueError(
            f"privacy.threshold = {threshold} with {drawn} clients in a sum: expected {drawn // 2 + 1} to {drawn}, "
            "more than half of them and not more than there are; change it, or write 'none'"
        )


def _check_admission(config: ExperimentConfig) -> None:
    admission, attack = config.admission, config.attack
    if admission.probe_items and config.privacy.policy != "adapter+catalog" and config.server.catalogs is None:
        raise ValueError(
            f"admission.probe_items needs the catalogs, but privacy.policy = '{config.privacy.policy}' keeps them at "
            "the clients and server.catalogs is 'none'; leave the probe out or give server.catalogs a folder"
        )
    asked = [key for key in ("probe_items", "leave_one_out", "rollback") if getattr(admission, key)]
    if config.privacy.policy == "aggregate-only" and (asked or admission.action == "exclude"):
        keys = ", ".join(f"admission.{key}" for key in asked or ["action"])
        raise ValueError(
            f"{keys}: the gate looks at single adapters, which privacy.policy = 'aggregate-only' hides from the "
            "server; leave it out, or set privacy.policy = 'adapter'"
        )
    if config.rounds.rule is not None and (asked or admission.action == "exclude"):
        keys = ", ".join(f"admission.{key}" for key in asked or ["action"])
        raise ValueError(
            f"{keys}: the gate stands in front of one merge of experts, but rounds.rule is {config.rounds.rule}; leave "
            "it out, or choose a robust rule (median, trimmed-mean, krum, multi-krum)"
        )
    if attack.domain is not None and config.dp.mode != "none":
        raise ValueError(
            f"attack.domain = {attack.domain!r} with dp.mode = '{config.dp.mode}': who poisons its training keeps no "
            "promise of privacy; leave one of the two out"
        )
    if attack.domain is not None and attack.domain not in config.domains.train:
        raise ValueError(f"attack.domain = {attack.domain!r} is not among domains.train; only who trains can poison")


def too_few_for_krum(rounds: Rounds, num_domains: int) -> str:
    """What is wrong where Krum or Multi-Krum has fewer than 2f + 3 clients in a round; empty if nothing is."""
    clients = max(1, math.ceil(rounds.fraction * num_domains))
    given = dict(text.split("=", 1) for text in rounds.parameters).get("num_malicious", "1")
    if rounds.rule not in ("krum", "multi-krum") or not given.isdecimal() or clients >= 2 * int(given) + 3:
        return ""
    return (
        f"rounds.rule is {rounds.rule} with num_malicious = {given}, and {clients} clients take part in a round; its "
        f"proof needs at least 2 · num_malicious + 3 = {2 * int(given) + 3}. Name more domains, or lower num_malicious "
        "in rounds.parameters"
    )


class ExperimentConfig(Section):
    """Everything that defines one experiment."""

    name: str = Field("demo", pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$", description="Begins the name of the run folder.")
    seed: int = Field(0, ge=0, lt=2**31, description="Of every random draw.")
    run_id: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$",
        description="Name of the run folder; 'none': name, time and a random part.",
    )
    resume: bool = Field(False, description="Go on with the run that run_id names, from where it was ended.")
    until: Literal["report", "train"] = Field("report", description="train: end when the experts are on disk.")
    output_dir: str = Field("runs", min_length=1, description="Where run folders are made.")
    cache_dir: str = Field(
        "~/.cache/fedmerge", min_length=1, description="Each client's own disk: its experts, the demo domains."
    )
    tracking: Tracking | None = Field(
        None, description="Copy curves, scores and settings for this viewer into the run folder."
    )
    domains: Domains = Domains()
    backbone: BackboneSection = BackboneSection()
    text: Text = Text()
    lora: Lora = Lora()
    train: Train = Train()
    rounds: Rounds = Rounds()
    merge: Merge = Merge()
    mergerec: MergeRec = MergeRec()
    adamerging: AdaMerging = AdaMerging()
    through_clients: ThroughClients = ThroughClients()
    evaluation: Evaluation = Evaluation()
    sasrec: SASRec = SASRec()
    server: Server = Server()
    privacy: Privacy = Privacy()
    admission: Admission = Admission()
    attack: Attack = Attack()
    dp: DP = DP()
    audit: Audit = Audit()
    runtime: Runtime = Runtime()

    @model_validator(mode="after")
    def _consistent(self) -> ExperimentConfig:
        check_together(self)
        return self
