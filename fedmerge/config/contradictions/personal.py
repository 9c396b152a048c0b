"""Contradictions between ``[personal]`` and other sections.

Every function yields one line for each contradiction: the keys, what was found, and the remedy.
"""

from collections.abc import Iterator

from fedmerge.config.personal import Personal
from fedmerge.config.privacy import DP, Privacy
from fedmerge.config.training import Rounds


def personal_problems(personal: Personal, privacy: Privacy, dp: DP, rounds: Rounds, num_domains: int) -> Iterator[str]:
    """Yield settings under which clients have no directions of others, or noise does not cover personal merges."""
    if personal.directions is None:
        if personal.universal:
            yield (
                "personal.universal = true without personal.directions: there are no coefficients to send; set "
                "personal.directions = 'module', or personal.universal = false"
            )
        return
    if personal.universal:
        yield from _universal_problems(privacy, dp)
    asked = f"personal.directions = '{personal.directions}'"
    if privacy.policy != "catalog-private":
        yield (
            f"{asked} sends every single adapter to the other clients, which privacy.policy = '{privacy.policy}' does "
            "not allow; set privacy.policy = 'catalog-private', or personal.directions = 'none'"
        )
    if num_domains < 2:
        yield f"{asked} with {num_domains} training domain: there is no other direction; name at least two domains"
    if rounds.rule is not None:
        yield (
            f"{asked} starts from experts, but rounds.rule is {rounds.rule}, which leaves none; set rounds.rule = "
            "'none', or personal.directions = 'none'"
        )
    if privacy.metrics == "noised":
        yield (
            f"{asked} with privacy.metrics = 'noised': a personal merge is fitted to many users, so one user changes "
            "every outcome and the noise does not cover it; set privacy.metrics = 'suppressed', or "
            "personal.directions = 'none'"
        )
    if dp.mode == "domain-central":
        yield (
            f"{asked} with dp.mode = 'domain-central': the clients would receive single adapters without noise; set "
            "dp.mode = 'domain-local', or personal.directions = 'none'"
        )


def _universal_problems(privacy: Privacy, dp: DP) -> Iterator[str]:
    sent = "personal.universal = true sends coefficients that are fitted to users without noise"
    if dp.mode != "none":
        yield f"{sent}, but dp.mode = '{dp.mode}' promises a bound; set personal.universal = false, or dp.mode = 'none'"
    if privacy.metrics != "exact":
        yield (
            f"{sent}, but privacy.metrics = '{privacy.metrics}' holds exact numbers back; set personal.universal = "
            "false, or privacy.metrics = 'exact'"
        )
