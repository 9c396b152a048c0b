"""Contradictions between ``[weave]`` and other sections.

Every function yields one line for each contradiction: the keys, what was found, and the remedy.
"""

from collections.abc import Iterator

from fedmerge.config.privacy import ALLOWED, DP, Privacy
from fedmerge.config.running import Server
from fedmerge.config.training import Rounds, Weave


def weave_problems(
    weave: Weave, privacy: Privacy, dp: DP, rounds: Rounds, server: Server, num_domains: int
) -> Iterator[str]:
    """Yield settings under which no client may receive the adapters of others, or noise does not cover weaving."""
    if weave.schedule is None:
        return
    asked = f"weave.schedule = '{weave.schedule}'"
    if weave.schedule == "similarity":
        yield from _similarity_problems(privacy, server)
    elif privacy.policy != "catalog-private":
        yield (
            f"{asked} sends adapters of single domains to the other clients, which privacy.policy = "
            f"'{privacy.policy}' does not allow; set privacy.policy = 'catalog-private', or weave.schedule = 'none'"
        )
    if num_domains < 2:
        yield f"{asked} with {num_domains} training domain: there is no other adapter; name at least two domains"
    if rounds.rule is not None:
        yield (
            f"{asked} continues experts, but rounds.rule is {rounds.rule}, which leaves none; set rounds.rule = "
            "'none', or weave.schedule = 'none'"
        )
    if privacy.transport != "float32":
        yield (
            f"{asked} with privacy.transport = '{privacy.transport}', which encodes the change since a fresh adapter; "
            "woven adapters start elsewhere. Set privacy.transport = 'float32'"
        )
    if dp.mode.startswith("domain"):
        yield (
            f"{asked} with dp.mode = '{dp.mode}', which covers one update of a domain; a woven domain sends several. "
            "Set dp.mode = 'user', whose noise covers all trainings together, or weave.schedule = 'none'"
        )
    if dp.mode == "user" and weave.steps == 0:
        yield (
            f"{asked} with weave.steps = 0 and dp.mode = 'user': a training without steps releases nothing to account "
            "for; raise weave.steps, or set weave.schedule = 'none'"
        )


def _similarity_problems(privacy: Privacy, server: Server) -> Iterator[str]:
    asked = "weave.schedule = 'similarity'"
    if "similarity factors" not in ALLOWED[privacy.policy]:
        yield (
            f"{asked} sends similarities of single domains to the server, which privacy.policy = '{privacy.policy}' "
            "does not allow; set privacy.policy = 'adapter+catalog', or weave.schedule = 'none'"
        )
    elif not privacy.sends_catalogs and server.catalogs is None:
        yield (
            f"{asked} finds the items that two catalogs share, but privacy.policy = '{privacy.policy}' keeps catalogs "
            "at the clients and server.catalogs is 'none'; give server.catalogs a folder, or set privacy.policy = "
            "'adapter+catalog'"
        )
