"""Evaluate and recommend: models on the users of opened domains."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmerge.api.data import load_backbone
from fedmerge.api.models import adapter_of
from fedmerge.errors import ConfigError

if TYPE_CHECKING:
    import pandas as pd

    from fedmerge.api.models import AdapterLike
    from fedmerge.client.local_domain import LocalDomain
    from fedmerge.config import Split
    from fedmerge.encoder.backbone import Backbone
    from fedmerge.evaluation.sums import Estimate, MetricSums, Variant
    from fedmerge.serving.listing import Listing
    from fedmerge.serving.recommender import Item, Recommendation, Recommender


@dataclass(frozen=True)
class Scores:
    """Metric sums of models on the users of one or more domains.

    Attributes:
        split: ``valid`` or ``test``.
        sums: domain -> variant (``unmasked``, ``masked``) -> sums over its users.
    """

    split: Split
    sums: Mapping[str, Mapping[Variant, MetricSums]]

    @property
    def models(self) -> tuple[str, ...]:
        """The labels of the evaluated models."""
        return next(iter(self.sums.values()))["unmasked"].methods

    def mean(self, model: str, metric: str = "ndcg@10", variant: Variant = "unmasked") -> float:
        """Return the unweighted mean over domains of a model's mean over users."""
        values = [of_domain[variant].mean(model, metric) for of_domain in self.sums.values()]
        return sum(values) / len(values)

    def interval(self, model: str, domain: str, metric: str = "ndcg@10", variant: Variant = "unmasked") -> Estimate:
        """Return a model's mean over the users of one domain, with its 95 % interval."""
        from fedmerge.evaluation.sums import estimate_mean

        return estimate_mean(self._of(domain)[variant], model, metric)

    def difference(
        self,
        model: str,
        baseline: str,
        domain: str | None = None,
        metric: str = "ndcg@10",
        variant: Variant = "unmasked",
    ) -> Estimate:
        """Return the paired difference of two models over the same users, with its 95 % interval.

        Args:
            model: what is judged.
            baseline: what it is judged against.
            domain: the users; None is the unweighted mean over all domains.
            metric: one of ``recall@k``, ``ndcg@k`` with k in 1, 5, 10, 50, or ``mrr``.
            variant: ``unmasked`` or ``masked``.
        """
        from fedmerge.evaluation.sums import paired_difference, paired_difference_of_mean

        if domain is None:
            of_domains = [of_domain[variant] for of_domain in self.sums.values()]
            return paired_difference_of_mean(of_domains, model, baseline, metric)
        return paired_difference(self._of(domain)[variant], model, baseline, metric)

    def to_frame(self) -> pd.DataFrame:
        """Return one row per domain, variant, model and metric: mean, low and high of its 95 % interval, num_users.

        Raises:
            ConfigError: pandas is not installed.
        """
        from fedmerge.evaluation.ranks import METRICS
        from fedmerge.evaluation.sums import estimate_mean

        rows = []
        for domain, of_domain in self.sums.items():
            for variant, sums in of_domain.items():
                for model in sums.methods:
                    for metric in METRICS:
                        found = estimate_mean(sums, model, metric)
                        keys = {"domain": domain, "variant": variant, "model": model, "metric": metric}
                        values = {"mean": found.mean, "low": found.low, "high": found.high}
                        rows.append({**keys, **values, "num_users": sums.num_users})
        return frame_of(rows)

    def _of(self, domain: str) -> Mapping[Variant, MetricSums]:
        if domain not in self.sums:
            raise ConfigError(f"scores: found the domain {domain!r}, expected one of {', '.join(self.sums)}.")
        return self.sums[domain]


def evaluate(
    domains: LocalDomain | Mapping[str, LocalDomain],
    models: Mapping[str, AdapterLike | None],
    *,
    split: Split = "valid",
    max_users: int | None = None,
    seed: int = 0,
    baselines: Sequence[str] = (),
    progress: Callable[[str], None] = lambda line: None,
) -> Scores:
    """Rank every user's held-out item among all items of the domain, under each model.

    Args:
        domains: one domain, or domains by name, of :func:`load_domains`.
        models: label -> adapter; None is the backbone alone.
        split: ``valid`` (the default) or ``test``, which should be read once.
        max_users: users drawn per domain; None takes all.
        seed: seed of that draw.
        baselines: reference rows: popularity, last-item, item-knn, sasrec.
        progress: receives one line per model and domain.

    Raises:
        LayoutMismatchError: an adapter of another backbone.
        DomainError: a domain without users to evaluate.
    """
    from fedmerge.client.baselines.rankers import baseline_rankers
    from fedmerge.client.evaluate import evaluate as evaluate_models
    from fedmerge.client.local_domain import LocalDomain
    from fedmerge.config import load_config

    adapters = {label: None if model is None else adapter_of(model) for label, model in models.items()}
    opened = {domains.manifest.name: domains} if isinstance(domains, LocalDomain) else dict(domains)
    rows = ",".join(baselines)
    config = load_config(None, [f"seed={seed}", f"evaluation.baselines={json.dumps(rows)}"])
    sums = {}
    for name, domain in opened.items():
        rankers = baseline_rankers(
            domain, config.evaluation.baselines, config.evaluation, seed, config.cache_dir, progress
        )
        sums[name] = evaluate_models(domain, adapters, split, max_users, seed, rankers, progress)
    return Scores(split, sums)


def load_recommender(
    model: AdapterLike | None, catalog: LocalDomain | str | Path, backbone: Backbone | None = None
) -> Recommender:
    """Encode a catalog under a model; its interactions are never read.

    Args:
        model: an adapter, or None for the backbone alone.
        catalog: an opened domain, or a domain folder.
        backbone: the encoder of a domain folder; an opened domain has its own.

    Raises:
        LayoutMismatchError: an adapter of another backbone.
    """
    from fedmerge.client.local_domain import LocalDomain
    from fedmerge.config import Text
    from fedmerge.domain.catalog import load_catalog
    from fedmerge.serving.recommender import make_recommender

    adapter = None if model is None else adapter_of(model)
    if isinstance(catalog, LocalDomain):
        return make_recommender(catalog.backbone, adapter, catalog.catalog, catalog.text)
    return make_recommender(backbone or load_backbone(), adapter, load_catalog(Path(catalog)), Text())


def load_served(
    run: str | Path, domain: str | Path, *, model: str | None = None, cache_dir: str | Path | None = None
) -> Recommender:
    """Load what a run serves a domain, as validation chose it: a merge, the domain's own expert, or its own head.

    Args:
        run: a run folder, or the beginning of a run's id in ``runs``.
        domain: the domain folder.
        model: what to load in place of the run's choice: ``merged``, ``expert``, ``backbone``, ``personal merge``,
            ``woven merge``, ``head on the merge``, ``head on the merge, fused``, …
        cache_dir: cache of this organisation's client, which holds what never left it; None is ``cache_dir`` of the
            run.

    Returns:
        The recommender; its ``score_kind`` says whether scores are cosines or standardised.

    Raises:
        RunDirError: no such run, or it has not chosen yet.
        ClientError: a head, or an expert, that is not on this disk.
    """
    from fedmerge.config import load_config
    from fedmerge.runs.reading import find_run
    from fedmerge.serving.model import load_served as load_model
    from fedmerge.serving.model import open_run, served_recommender

    folder = find_run(str(run), Path("runs"))
    overrides = [] if cache_dir is None else [f"cache_dir={json.dumps(str(cache_dir))}"]
    place = open_run(folder, Path(domain), load_config(folder / "config.toml", overrides))
    return served_recommender(place, load_model(place, model))


def recommend(
    recommender: Recommender,
    history: Sequence[Item],
    k: int = 10,
    keep_seen: bool = False,
    listing: Listing | None = None,
) -> list[Recommendation]:
    """Recommend the k items with the highest scores for a user's history.

    Args:
        recommender: of :func:`load_recommender` or :func:`load_served`; reuse it, since it holds the encoded catalog.
        history: item ids, oldest first; an item that the catalog lacks by its attributes, as ``{"title": "Red tent"}``.
        k: number of items.
        keep_seen: recommend items of the history, too.
        listing: filters, diversity, popularity; then ``k`` and ``keep_seen`` are those of the listing.

    Raises:
        DomainError: an empty history, or an item that the catalog does not have.
    """
    from fedmerge.serving import recommender as room

    return room.recommend(recommender, history, k, keep_seen, listing)


def frame_of(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    try:
        import pandas as pd
    except ImportError as error:
        raise ConfigError("to_frame: pandas is not installed. Install it: pip install pandas.") from error
    return pd.DataFrame(rows)
