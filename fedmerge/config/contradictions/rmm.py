"""Contradictions between ``[rmm]`` and other sections, where ``rmm-style`` is among the methods.

Every function yields one line for each contradiction: the keys, what was found, and the remedy.
"""

from collections.abc import Iterator

from fedmerge.config.merging import SEARCHED_METHODS, Merge, Rmm
from fedmerge.config.privacy import DP, Privacy
from fedmerge.config.running import Server
from fedmerge.config.training import Rounds


def rmm_problems(rmm: Rmm, merge: Merge, rounds: Rounds, privacy: Privacy, dp: DP, server: Server) -> Iterator[str]:
    """Yield a search in rounds, and rewards that the policy, the noise or the number of users rules out."""
    if rounds.rule in SEARCHED_METHODS:
        yield (
            f"rounds.rule = '{rounds.rule}' would search anew in every round; set rounds.rule = 'none' and add it to "
            "merge.methods, or choose another rule"
        )
    if rounds.rule is not None or not SEARCHED_METHODS & {*merge.methods}:
        return
    if rmm.reward == "pseudo-users":
        yield from _without_catalogs(privacy, server)
        return
    asked = "rmm.reward = 'validation'"
    if privacy.policy != "catalog-private":
        yield (
            f"{asked} sends every single adapter to the other clients, which privacy.policy = '{privacy.policy}' does "
            "not allow; set privacy.policy = 'catalog-private', or rmm.reward = 'pseudo-users'"
        )
    if privacy.metrics != "exact":
        yield (
            f"{asked} with privacy.metrics = '{privacy.metrics}': every episode is one more exact sum over the same "
            "users, which neither rounding nor the noise of one release covers; set privacy.metrics = 'exact', or "
            "rmm.reward = 'pseudo-users'"
        )
    if dp.mode != "none":
        yield (
            f"{asked} with dp.mode = '{dp.mode}': the sums of the search have no noise, so the guarantee would not "
            "cover the merge; set dp.mode = 'none', or rmm.reward = 'pseudo-users'"
        )
    if rmm.users // rmm.shards < privacy.min_users:
        yield (
            f"{asked} with rmm.users = {rmm.users} and rmm.shards = {rmm.shards}: {rmm.users // rmm.shards} users a "
            f"shard are fewer than privacy.min_users = {privacy.min_users}; raise rmm.users, or lower rmm.shards"
        )


def _without_catalogs(privacy: Privacy, server: Server) -> Iterator[str]:
    asked = (
        "merge.methods holds rmm-style with rmm.reward = 'pseudo-users', which needs the catalogs on the server, but"
    )
    if privacy.policy == "catalog-private":
        yield (
            f"{asked} privacy.policy = 'catalog-private' keeps them at the clients; set rmm.reward = 'validation', or "
            "privacy.policy = 'adapter+catalog'"
        )
    if privacy.policy == "adapter" and server.catalogs is None:
        yield (
            f"{asked} privacy.policy = 'adapter' keeps them at the clients and server.catalogs is 'none'; set "
            "privacy.policy = 'adapter+catalog' or give server.catalogs a folder"
        )
