"""Contradictions between [head] and other sections.

Every function yields one line for each contradiction: the keys, what was found, and the remedy.
"""

from collections.abc import Iterator

from fedmerge.config.head import Head
from fedmerge.config.merging import SUMMED_RULES
from fedmerge.config.privacy import DP, Privacy
from fedmerge.config.training import Rounds


def head_problems(head: Head, rounds: Rounds, privacy: Privacy, dp: DP, until: str) -> Iterator[str]:
    """Yield heads of a run that trains or evaluates nothing for them, or whose promises they would break.

    Args:
        head, rounds, privacy, dp: the sections.
        until: the last phase of the run.
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
        yield from _federated_problems(head, privacy, dp)


def _federated_problems(head: Head, privacy: Privacy, dp: DP) -> Iterator[str]:
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
