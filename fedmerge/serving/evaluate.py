"""Evaluate the models of a run on the users of the organisation's own domain."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fedmerge.client.baselines.rankers import Ranker
from fedmerge.client.evaluate import NO_BASELINES, Ranks, TextVectors, encode_text, outcomes
from fedmerge.client.heads.heads import alone_and_fused
from fedmerge.config import Split
from fedmerge.domain.splits import evaluation_examples
from fedmerge.errors import ClientError
from fedmerge.evaluation.sums import (
    BACKBONE,
    EXPERT,
    FEDERATED_FUSED,
    FEDERATED_HEAD,
    GROUP,
    PERSONAL,
    WOVEN,
    MetricSums,
    Variant,
    fused_label,
    head_label,
    metric_sums,
)
from fedmerge.server.choice import MERGED
from fedmerge.serving.decision import TEXT_MODELS, Decision, decide, group_of
from fedmerge.serving.model import RunDomain, ServedModel, load_head, load_served, text_of


@dataclass(frozen=True)
class Evaluated:
    """Metric sums of a run's models on one domain.

    Attributes:
        decision: the model that is served; its row has this name.
        sums: variant -> sums, a row for each model.
    """

    decision: Decision
    sums: Mapping[Variant, MetricSums]


def evaluate_run(
    place: RunDomain,
    split: Split,
    max_users: int | None,
    model: str | None = None,
    baselines: Mapping[str, Ranker] = NO_BASELINES,
    progress: Callable[[str], None] = lambda line: None,
) -> Evaluated:
    """Evaluate the models that a run has for a domain, on the same users.

    A model that is not on this disk has no row, and a line of progress says why; the served one must be there.

    Args:
        place: of :func:`fedmerge.serving.model.open_run`.
        split: ``valid`` or ``test``.
        max_users: largest number of users, the same users for every call; None takes all.
        model: the only model to evaluate, and what is served instead of the run's choice; None evaluates all.
        baselines: label -> ranker; their rows come last.
        progress: receives a line now and then.

    Raises:
        ClientError, LayoutMismatchError: as :func:`fedmerge.serving.model.load_served`, for the served model.
    """
    decision = decide(place.run, place.manifest.name, model)
    domain, seed = place.local, place.config.seed
    examples = evaluation_examples(domain.interactions, split, max_users, seed)
    texts: dict[str, ServedModel] = {}
    encoded: dict[str, TextVectors] = {}
    heads: dict[str, Ranks] = {}
    for name in [decision.model] if model is not None else _models(place, decision):
        try:
            served = load_served(place, name)
            if name in TEXT_MODELS:
                texts[name] = served
                continue
            if (text := encoded.get(text_of(name))) is None:
                text = encoded[text_of(name)] = encode_text(domain, served.adapter, examples.histories)
            head = load_head(place, served, text.items)
        except ClientError as error:
            if name == decision.model:
                raise
            progress(f"{place.manifest.name}: no row for {name}: {error}")
            continue
        alone, fused = alone_and_fused(head.sources(text, examples.histories), head.weights, examples)
        heads[name] = fused if served.fused else alone
    adapters = {name: served.adapter for name, served in texts.items()}
    encoded = {name: text for name, text in encoded.items() if name in adapters}
    by_user = outcomes(domain, adapters, examples, baselines, progress, heads, encoded)
    return Evaluated(decision, {variant: metric_sums(of_variant, variant) for variant, of_variant in by_user.items()})


def _models(place: RunDomain, decision: Decision) -> list[str]:
    """List the models that a run can have for a domain, the served one among them."""
    config = place.config
    names = [BACKBONE, MERGED]
    if place.manifest.name in config.domains.train:
        names += [EXPERT, *([PERSONAL] if config.personal.directions is not None else [])]
        names += [WOVEN] if config.weave.schedule is not None else []
        names += [GROUP] if group_of(place.run, place.manifest.name) is not None else []
        if config.head.kind is not None:
            names += [label(vectors) for vectors in config.head.vectors for label in (head_label, fused_label)]
    if config.head.kind == "federated":
        names += [FEDERATED_HEAD, FEDERATED_FUSED]
    return [*names, *([] if decision.model in names else [decision.model])]
