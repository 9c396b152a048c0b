"""Contradictions between [head] and other sections.

Every function yields one line for each contradiction: the keys, what was found, and the remedy.
"""

from collections.abc import Iterator

from fedmerge.config.head import Head
from fedmerge.config.merging import MIN_SUMMED, SUMMED_RULES
from fedmerge.config.privacy import DP, Privacy
from fedmerge.config.training import Rounds

_WHOLE_HEADS_ONLY = {"ffa-lora": "freezes A", "flora": "freezes the global head and adds a fresh one"}
_LEAST_CLIENTS = {"krum": 5, "multi-krum": 5, "trimmed-mean": 5}  # with the default parameters of each


def head_problems(head: Head, rounds: Rounds, privacy: Privacy, dp: DP, until: str, num_domains: int) -> Iterator[str]:
    """Yield the contradictions of heads with what the run trains and evaluates, and with its promises of privacy.

    Args:
        head, rounds, privacy, dp: the sections.
        until: the last phase of the run.
        num_domains: training clients.
    """
    if head.kind is None:
        return
    if until == "train":
        yield (
            f"head.kind = '{head.kind}' with until = 'train': heads are trained after the merge; set until = 'report', "
            "or head.kind = 'none'"
        )
    if "expert" in head.vectors and rounds.rule is not None:
        yield (
            f"head.vectors names expert, but with rounds.rule = '{rounds.rule}' no client has an expert; name merge or "
            "backbone, or set rounds.rule = 'none'"
        )
    if privacy.metrics == "noised":
        yield (
            f"privacy.metrics = 'noised' with head.kind = '{head.kind}': a head is trained on all users, so one user "
            "changes the outcomes of all others, which the noise does not cover; set head.kind = 'none', or "
            "privacy.metrics = 'suppressed'"
        )
    if head.kind == "federated":
        yield from _federated_problems(head, rounds, privacy, dp, num_domains)


def _federated_problems(head: Head, rounds: Rounds, privacy: Privacy, dp: DP, num_domains: int) -> Iterator[str]:
    clients = rounds.clients_a_round(num_domains)
    if dp.mode != "none":
        yield (
            f"dp.mode = '{dp.mode}' with head.kind = 'federated': the rounds of the head get no noise; set head.kind = "
            "'local', which never leaves a client, or dp.mode = 'none'"
        )
    if privacy.hides_adapters and head.rule not in SUMMED_RULES:
        yield (
            f"head.rule is {head.rule}, which needs every single head, but privacy.policy = 'aggregate-only' shows the "
            f"server none; use one of {', '.join(SUMMED_RULES)}, or set privacy.policy = 'adapter'"
        )
    elif privacy.hides_adapters and (clients < MIN_SUMMED or (rounds.weights == "users" and clients == MIN_SUMMED)):
        yield (
            f"head.kind = 'federated' with privacy.policy = 'aggregate-only' sums the heads of {clients} clients with "
            f"rounds.weights = '{rounds.weights}': with fewer than {MIN_SUMMED}, or {MIN_SUMMED} of unequal weight, "
            "one client reads another's head off the sum; name more domains, raise rounds.fraction, or set "
            "rounds.weights = 'equal'"
        )
    if head.rule in _WHOLE_HEADS_ONLY:
        yield (
            f"head.rule is {head.rule}, which {_WHOLE_HEADS_ONLY[head.rule]}, but clients train all of the head that a "
            "round starts from; use another rule, such as weighted-average or fedadam"
        )
    if head.rule in _LEAST_CLIENTS and clients < _LEAST_CLIENTS[head.rule]:
        yield (
            f"head.rule is {head.rule}, and {clients} clients take part in a round; it needs "
            f"{_LEAST_CLIENTS[head.rule]}. Name more domains, or use median"
        )
