"""Contradictions of ``train.objective = 'csft'``, ``[mntp]`` and ``[simcse]`` with other sections.

Every function yields one line for each contradiction: the keys, what was found, and the remedy.
"""

from collections.abc import Iterator

from fedmerge.config.model import BackboneSection
from fedmerge.config.privacy import Privacy
from fedmerge.config.running import Server
from fedmerge.config.training import CSFT, Mntp, Simcse, Train

_ENCODERS = ("encoder", "blair")


def language_model_problems(
    train: Train, mntp: Mntp, simcse: Simcse, backbone: BackboneSection, privacy: Privacy, server: Server
) -> Iterator[str]:
    """Yield encoders that shall predict tokens, stages that would train another encoder than the one that is served,
    and stages without catalogs.
    """
    if train.objective == "csft" and backbone.family in _ENCODERS:
        yield (
            f"{CSFT} predicts tokens, which backbone.family = '{backbone.family}' does not; set train.objective = "
            "'infonce', or take a decoder"
        )
    if asked := stages_asked(mntp, simcse):
        yield from _stage_problems(asked, backbone)
        if privacy.learns_through_clients or not (privacy.sends_catalogs or server.catalogs):
            remedy = "privacy.policy = 'adapter+catalog'"
            if not privacy.learns_through_clients:
                remedy = f"server.catalogs to a folder of them, or {remedy}"
            yield (
                f"{asked} reads titles of public catalogs on the server, but privacy.policy = '{privacy.policy}' keeps "
                f"them at the clients; set {remedy}"
            )


def stages_asked(mntp: Mntp, simcse: Simcse) -> str:
    """Return the stages that are on with their steps; empty if none is."""
    stages = (("mntp", mntp.steps), ("simcse", simcse.steps))
    return " and ".join(f"{name}.steps = {steps}" for name, steps in stages if steps)


def _stage_problems(asked: str, backbone: BackboneSection) -> Iterator[str]:
    family, attention = backbone.family, backbone.attention
    if family in _ENCODERS:
        yield f"{asked} is for decoders, found backbone.family = '{family}'; set steps = 0, or take a decoder"
    elif attention != "both-ways" and not (attention == "auto" and family == "llm2vec"):
        yield (
            f"{asked} trains a decoder that attends both ways, but backbone.attention = '{attention}' with family = "
            f"'{family}' serves a causal one; set backbone.attention = 'both-ways'"
        )
    if backbone.pooling in ("cls", "last"):
        yield (
            f"{asked} trains the mean of all tokens, but backbone.pooling = '{backbone.pooling}' is served; set "
            "backbone.pooling = 'mean'"
        )
