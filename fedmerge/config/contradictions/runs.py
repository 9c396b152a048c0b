"""Contradictions between settings of several sections: run, rounds, learned merges, the gate, simulations.

Every function yields one line for each contradiction: the keys, what was found, and the remedy.
"""

from collections.abc import Iterator

from fedmerge.config.head import Head
from fedmerge.config.merging import (
    LEARNED_METHODS,
    PAIR_METHODS,
    SEARCHED_METHODS,
    Merge,
    MergeRec,
    ThroughClients,
)
from fedmerge.config.model import Domains, Lora
from fedmerge.config.privacy import DP, Privacy
from fedmerge.config.running import Admission, Server, Simulation
from fedmerge.config.training import Rounds
from fedmerge.storage.addresses import is_address, without_secrets


def run_problems(resume: bool, run_id: str | None, domains: Domains, server: Server) -> Iterator[str]:
    """Yield problems that keep a run from starting or resuming."""
    if resume and run_id is None:
        yield "resume = true, but run_id is 'none'; set run_id to the name of the run folder"
    if server.min_train_clients > len(domains.train):
        yield (
            f"server.min_train_clients = {server.min_train_clients}, but domains.train names only "
            f"{len(domains.train)}; lower it"
        )


def address_problems(output_dir: str, cache_dir: str, server: Server) -> Iterator[str]:
    """Yield addresses of shared storage where a folder of this machine is needed."""
    copied = "runs are written on this machine and copied when they are finished: fedmerge push RUN ADDRESS"
    told = {
        "output_dir": (output_dir, copied),
        "cache_dir": (cache_dir, "name a folder on each client's own disk"),
        "server.catalogs": (server.catalogs, "copy the catalogs to a folder of the server first"),
        "server.client_keys": (server.client_keys, "copy the keys to a folder of the server first"),
    }
    for key, (value, remedy) in told.items():
        if value is not None and is_address(value):
            yield f"{key} is an address ({without_secrets(value)}), expected a folder; {remedy}"


def rounds_problems(rounds: Rounds, lora: Lora, domains: Domains) -> Iterator[str]:
    """Yield ranks that the rule cannot average, ranks of domains that do not train, and too few clients for Krum."""
    if rounds.rule in ("fedit", "ffa-lora") and lora.ranks:
        yield (
            f"lora.ranks differ, but rounds.rule = '{rounds.rule}' averages factors of one shape; leave lora.ranks "
            "out, or choose flexlora, flora or hetlora"
        )
    if strange := sorted({text.partition("=")[0] for text in lora.ranks} - {*domains.train}):
        yield f"lora.ranks names {', '.join(strange)}, not among domains.train; correct the name"
    if problem := too_few_for_krum(rounds, len(domains.train)):
        yield problem


def pair_problems(merge: Merge, rounds: Rounds, domains: Domains) -> Iterator[str]:
    """Yield methods of two domains where more of them train."""
    where = "merge.methods" if rounds.rule is None else "rounds.rule"
    methods = merge.methods if rounds.rule is None else (rounds.rule,)
    for method in sorted(PAIR_METHODS & {*methods}):
        if len(domains.train) > 2:
            yield (
                f"{where} holds {method}, which merges two domains, but domains.train names {len(domains.train)}; "
                f"choose multi-{method}"
            )


def too_few_for_krum(rounds: Rounds, num_domains: int) -> str:
    """Return the problem if Krum or Multi-Krum has fewer than 2f + 3 clients in a round, else an empty text."""
    clients = rounds.clients_a_round(num_domains)
    given = dict(text.split("=", 1) for text in rounds.parameters).get("num_malicious", "1")
    if rounds.rule not in ("krum", "multi-krum") or not given.isdecimal() or clients >= 2 * int(given) + 3:
        return ""
    return (
        f"rounds.rule is {rounds.rule} with num_malicious = {given}, and {clients} clients take part in a round; its "
        f"proof needs at least 2 · num_malicious + 3 = {2 * int(given) + 3}. Name more domains, or lower num_malicious "
        "in rounds.parameters"
    )


def learning_problems(
    merge: Merge,
    mergerec: MergeRec,
    rounds: Rounds,
    through_clients: ThroughClients,
    server: Server,
    privacy: Privacy,
    num_domains: int,
) -> Iterator[str]:
    """Yield problems of coefficients that are learned on the server or through the clients."""
    rule = rounds.rule
    learned = [name for name in (merge.methods if rule is None else (rule,)) if name in LEARNED_METHODS]
    if learned and privacy.learns_through_clients:
        problems = [*_through_clients_problems(learned, rounds, through_clients, server, privacy)]
        if "mergerec" in learned:
            problems += _loss_problems(mergerec, through_clients)
        for problem in problems:
            yield f"privacy.policy = 'catalog-private': {problem}"
    elif through_clients.users == "own-users":
        yield (
            "through_clients.users = 'own-users', but nothing is learned through the clients; set privacy.policy = "
            "'catalog-private' and add mergerec to merge.methods, or leave users at 'pseudo-users'"
        )
    if learned and privacy.policy == "adapter" and server.catalogs is None:
        catalogs = (
            "which needs the catalogs, but privacy.policy = 'adapter' keeps them at the clients and server.catalogs "
            "is 'none'; set privacy.policy = 'adapter+catalog' or give server.catalogs a folder"
        )
        yield f"merge.methods holds {learned[0]}, {catalogs}" if rule is None else f"rounds.rule is {rule}, {catalogs}"
    if learned and num_domains == 1 and through_clients.users == "pseudo-users":
        yield from _contrast_problems(mergerec)


def _through_clients_problems(
    learned: list[str], rounds: Rounds, section: ThroughClients, server: Server, privacy: Privacy
) -> Iterator[str]:
    if rounds.rule is not None:
        yield (
            f"rounds.rule = '{learned[0]}' learns from catalogs at the server; set privacy.policy = "
            "'adapter+catalog', or another rule"
        )
    if server.catalogs is not None:
        yield (
            "server.catalogs gives the server what the policy keeps at the clients; set server.catalogs = 'none', "
            "or privacy.policy = 'adapter'"
        )
    if section.users == "own-users" and "adamerging" in learned:
        yield "adamerging has no loss on own users; set through_clients.users = 'pseudo-users', or leave it out"
    if section.users == "own-users" and section.batch_size < privacy.min_users:
        yield (
            f"through_clients.batch_size = {section.batch_size} own users are fewer than privacy.min_users = "
            f"{privacy.min_users}; raise the one, or lower the other"
        )


def _contrast_problems(mergerec: MergeRec) -> Iterator[str]:
    """Yield contrasts of a single domain."""
    for key, value, plain in (
        ("pseudo_users", mergerec.pseudo_users, "chain"),
        ("teacher", mergerec.teacher, "expert"),
    ):
        if value.startswith("contrastive"):
            yield (
                f"mergerec.{key} = '{value}' contrasts an expert with the other experts, but domains.train names one "
                f"domain; set mergerec.{key} = '{plain}', or name at least two domains"
            )


def _loss_problems(mergerec: MergeRec, through_clients: ThroughClients) -> Iterator[str]:
    """Yield parts of the loss that no client can compute."""
    if "similarity" in mergerec.loss.split("+"):
        yield (
            f"mergerec.loss = '{mergerec.loss}' compares the items of all catalogs, but each client has its own alone; "
            "set privacy.policy = 'adapter+catalog', or mergerec.loss = 'kd'"
        )
    if mergerec.domains_per_step is not None:
        yield (
            f"mergerec.domains_per_step = {mergerec.domains_per_step} samples domains at the server, but each client "
            "computes the gradient of all coefficients; set privacy.policy = 'adapter+catalog', or "
            "mergerec.domains_per_step = 'none'"
        )
    if mergerec.teacher != "expert" and through_clients.users == "own-users":
        yield (
            f"mergerec.teacher = '{mergerec.teacher}', but through_clients.users = 'own-users' has no teacher; set "
            "mergerec.teacher = 'expert', or through_clients.users = 'pseudo-users'"
        )


def group_problems(
    merge: Merge, mergerec: MergeRec, rounds: Rounds, head: Head, privacy: Privacy, dp: DP, admission: Admission
) -> Iterator[str]:
    """Yield settings under which the server has no adapters to group, or no merge of a group."""
    if not merge.groups:
        return
    asked, learned = f"merge.groups = {', '.join(map(str, merge.groups))}", LEARNED_METHODS & {*merge.methods}
    without = "leave merge.groups empty"
    if privacy.hides_adapters:
        yield (
            f"{asked} compares single adapters, which privacy.policy = 'aggregate-only' hides from the server; "
            f"{without}, or set privacy.policy = 'adapter'"
        )
    if dp.mode == "domain-central":
        yield f"{asked} compares adapters without the noise of dp.mode = 'domain-central'; {without}"
    if rounds.rule is not None:
        yield f"{asked} divides experts, but rounds.rule = '{rounds.rule}' leaves none; {without}, or set it to 'none'"
    if head.kind is not None:
        yield f"{asked} with head.kind = '{head.kind}': heads are trained over one merge for all domains; {without}"
    if admission.rollback:
        yield f"{asked} with admission.rollback, which replaces one merge for all; {without}, or set it to false"
    if learned and privacy.learns_through_clients:
        yield (
            f"{asked} with {', '.join(sorted(learned))} and privacy.policy = 'catalog-private': coefficients are "
            f"learned through the clients of all domains together; {without}, or leave these methods out"
        )
    if learned and (mergerec.teacher != "expert" or mergerec.pseudo_users.startswith("contrastive")):
        yield f"{asked} with a contrast in mergerec: a group of one domain has no other experts; {without}"
    if searched := sorted(SEARCHED_METHODS & {*merge.methods}):
        yield f"{asked} with {', '.join(searched)}, which searches one map for all; {without}, or leave it out"


def admission_problems(admission: Admission, rounds: Rounds, privacy: Privacy, server: Server) -> Iterator[str]:
    """Yield checks of the admission gate that need what the server does not see."""
    if admission.probe_items and not privacy.sends_catalogs and server.catalogs is None:
        yield (
            f"admission.probe_items needs the catalogs, but privacy.policy = '{privacy.policy}' keeps them at "
            "the clients and server.catalogs is 'none'; leave the probe out or give server.catalogs a folder"
        )
    asked = [key for key in ("probe_items", "leave_one_out", "rollback") if getattr(admission, key)]
    if not asked and admission.action != "exclude":
        return
    keys = ", ".join(f"admission.{key}" for key in asked or ["action"])
    if privacy.hides_adapters:
        yield (
            f"{keys}: the gate looks at single adapters, which privacy.policy = 'aggregate-only' hides from the "
            "server; leave it out, or set privacy.policy = 'adapter'"
        )
    if rounds.rule is not None:
        yield (
            f"{keys}: the gate stands in front of one merge of experts, but rounds.rule is {rounds.rule}; leave it "
            "out, or choose a robust rule (median, trimmed-mean, krum, multi-krum)"
        )


def simulation_problems(simulation: Simulation, domains: Domains, dp: DP) -> Iterator[str]:
    """Yield an attack by a domain that does not train, or by one that promises privacy."""
    attacker = simulation.attacker
    if attacker is None:
        return
    if dp.mode != "none":
        yield (
            f"simulation.attacker = {attacker!r} with dp.mode = '{dp.mode}': a client that poisons its training "
            "gives no guarantee of privacy; leave one of the two out"
        )
    if attacker not in domains.train:
        yield (f"simulation.attacker = {attacker!r} is not among domains.train; name one of {', '.join(domains.train)}")
