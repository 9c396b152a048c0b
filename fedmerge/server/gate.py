"""The admission gate: find experts that are well formed (``fedmerge.server.reply_checks``) but would harm the merge.

There are three kinds of checks: the size of an update relative to the cohort, a probe of the adapted encoder on its
domain's own catalog, and the other domains' validation of the merge without the expert. Each has a number and a limit;
the reasons for the limits are below. docs/reference/privacy/admission.md says what the checks cannot see.

Source: "One Bad Model Spoils the Bunch" (arXiv:2406.14563) shows the need; the checks are our own.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from fedmerge.adapter import Adapter
from fedmerge.config import Admission, ExperimentConfig, Text
from fedmerge.domain.catalog import Catalog, make_catalog
from fedmerge.encoder.backbone import Backbone
from fedmerge.encoder.encode import encode
from fedmerge.encoder.lora import applied
from fedmerge.encoder.text import Tokens, build_token_table, item_sequences
from fedmerge.errors import MergeError
from fedmerge.evaluation.ranks import rank_targets
from fedmerge.evaluation.sums import MetricSums, paired_difference
from fedmerge.federated.product_space import inner_product
from fedmerge.merging.stack import linear_merge_of_many, survey_adapters
from fedmerge.seeding import generator

SMALLEST_COHORT = 3  # with two experts, neither can be called the outlier
# Norms are compared as ratios, so by their logarithms. 3.5 robust standard deviations is the usual bound for outliers
# (Iglewicz and Hoaglin, 1993). The MAD of a few experts can be close to 0, so a factor below 3 is never an outlier: for
# K = 8, an update that is √(K - 1) = 2.6 times as large as the others outweighs all of them in the average. The MAD can
# also be huge, so a factor above 10 is always an outlier.
MOST_DEVIATIONS = 3.5
LEAST_FACTOR, MOST_FACTOR = 3.0, 10.0
DEVIATIONS_OF_MAD = 1.4826  # standard deviation over MAD of a normal distribution
NEAREST = 10
# Fine-tuning moves items together that are bought together, also across categories, so an honest expert may lose some
# of the backbone's knowledge of titles and categories. The limit was set by hand between measurements with seed 0: ten
# honest experts kept .76 or more of the share of categories, one trained on flipped labels .48, one on promoted items
# .53. (The distance between items is no signal: honest experts shrink it to a thirtieth of the backbone's.)
LEAST_SHARE_OF_BACKBONE = 0.6
LEAST_GAIN = 0.05  # relative: a smaller gain may only mean that the domain is far from the others
NOTHING_LEARNED = "nothing was learned: its update is zero, so it only shrinks the average"
ALL, WITHOUT = "average of all", "average without "


@dataclass(frozen=True)
class Check:
    """The result of one check of one expert.

    Attributes:
        value: the measured number.
        limit: the number beyond which the expert fails.
        failed: True if it failed.
        reason: the failure in words; empty if it passed.
        details: other numbers.
    """

    value: float
    limit: float
    failed: bool = False
    reason: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)


Checks = dict[str, Check]  # domain -> result of one check
Vote = tuple[float, bool]  # relative gain without an expert, and True if it counts against the expert


def probes(config: ExperimentConfig) -> bool:
    """Return True if experts are probed on their catalogs, which the server then needs."""
    one_merge = config.rounds.rule is None and config.until != "train"
    return config.admission.probe_items is not None and one_merge


def failures(checks: Mapping[str, Mapping[str, Check]]) -> dict[str, str]:
    """Return domain -> reason for every expert that fails a check, sorted by name.

    Args:
        checks: name of a check -> domain -> result.
    """
    reasons: dict[str, list[str]] = {}
    for of_check in checks.values():
        for domain, check in of_check.items():
            if check.failed:
                reasons.setdefault(domain, []).append(check.reason)
    return {domain: "; ".join(found) for domain, found in sorted(reasons.items())}


def check_experts(
    adapters: Mapping[str, Adapter],
    admission: Admission,
    text: Text,
    seed: int,
    backbone: Backbone | None,
    catalogs: Mapping[str, Catalog],
    votes: Mapping[str, Mapping[str, Vote]],
) -> dict[str, Any]:
    """Run all checks that the experiment asks for.

    Args:
        adapters: domain -> expert, well formed; read one at a time.
        admission: section ``[admission]``.
        text: section ``[text]``, for the probe.
        seed: seed of the probe's draw.
        backbone: the frozen encoder, for the probe.
        catalogs: domain -> catalog, for the probe.
        votes: for leave-one-out: domain -> its vote on each other domain, from :func:`votes_of`.

    Returns:
        ``admission.json``: the action, the reason of every expert that failed, every number of every check, the
        geometry of the updates, and ``nothing_learned``, the experts that are zero: they fail no check and are never
        excluded, since they harm nobody, but no check finds anything in them either.

    Raises:
        MergeError: the probe has no backbone, or no catalog of a domain.
    """
    geometry = cohort_geometry(adapters)
    checks = {"norm": norm_checks({domain: values["norm"] for domain, values in geometry.items()})}
    if admission.probe_items is not None:
        checks |= {"titles": {}, "categories": {}}
        for domain in sorted(adapters):
            if backbone is None or domain not in catalogs:
                raise MergeError(
                    f"admission: found no {'backbone' if backbone is None else f'catalog of {domain}'} to probe its "
                    "expert with; give one, or set admission.probe_items = 'none'"
                )
            found = probe_checks(
                backbone,
                domain,
                adapters[domain],
                catalogs[domain],
                text,
                admission.probe_items,
                seed,
            )
            for name, check in found.items():
                checks[name][domain] = check
    if admission.leave_one_out:
        checks["leave-one-out"] = leave_one_out_checks(votes)
    return {
        "action": admission.action,
        "failed": failures(checks),
        "nothing_learned": {domain: NOTHING_LEARNED for domain, values in geometry.items() if not values["norm"]},
        "checks": {
            name: {domain: asdict(check) for domain, check in sorted(of_check.items())}
            for name, of_check in checks.items()
        },
        "geometry": geometry,
    }


# ---- the size of updates


def cohort_geometry(adapters: Mapping[str, Adapter]) -> dict[str, dict[str, float]]:
    """Compute the norm of every update, and the change of the average without it, from the LoRA factors.

    With M the average of all K updates and M₋ₖ the average of the others, M - M₋ₖ = (Δₖ - M) / (K - 1).

    Args:
        adapters: domain -> expert, at least one; read one at a time, twice.

    Returns:
        domain -> ``norm`` ‖Δₖ‖_F over all modules, ``shift`` ‖M - M₋ₖ‖ / ‖M‖, ``cosine`` of Δₖ and M₋ₖ; the last
        two are 0 if an average is 0 or there is no other domain.

    Raises:
        LayoutMismatchError, MergeError: as :func:`fedmerge.merging.stack.survey_adapters`.
    """
    layout = survey_adapters(adapters)
    num_domains = len(layout.domains)
    mean = linear_merge_of_many(adapters, layout, torch.full((num_domains,), 1 / num_domains))
    whole = max(0.0, inner_product(mean, mean))  # rounding can make it negative if factors cancel
    found = {}
    for domain in layout.domains:
        adapter = adapters[domain]
        own, shared = max(0.0, inner_product(adapter, adapter)), inner_product(adapter, mean)
        others = num_domains * shared - own  # ⟨Δₖ, sum of the others⟩
        of_others = max(0.0, num_domains**2 * whole - 2 * num_domains * shared + own)
        away = max(0.0, own - 2 * shared + whole)
        found[domain] = {
            "norm": math.sqrt(own),
            "shift": math.sqrt(away / whole) / (num_domains - 1) if whole and num_domains > 1 else 0.0,
            "cosine": others / math.sqrt(own * of_others) if own and of_others and num_domains > 1 else 0.0,
        }
    return found


def norm_checks(norms: Mapping[str, float]) -> Checks:
    """Find updates that are far larger than the cohort's median; small updates do no harm and always pass.

    Updates of norm 0 are left out of the median. Fewer than ``SMALLEST_COHORT`` other updates give no checks.
    """
    logs = [math.log(norm) for norm in norms.values() if norm > 0]
    if len(logs) < SMALLEST_COHORT:
        return {}
    median = statistics.median(logs)
    spread = DEVIATIONS_OF_MAD * statistics.median(abs(value - median) for value in logs)
    typical = math.exp(median)
    limit = typical * min(max(math.exp(MOST_DEVIATIONS * spread), LEAST_FACTOR), MOST_FACTOR)
    return {
        domain: Check(
            norm,
            limit,
            norm > limit,
            f"its update has norm {norm:.3g}, {norm / typical:.1f} times the cohort's median; expected at most "
            f"{limit / typical:.1f} times"
            if norm > limit
            else "",
        )
        for domain, norm in norms.items()
    }


# ---- the adapted encoder on its own catalog


def probe_checks(
    backbone: Backbone, domain: str, adapter: Adapter, catalog: Catalog, text: Text, num_items: int, seed: int
) -> dict[str, Check]:
    """Check that an expert still ranks its own catalog sensibly, compared with the backbone alone.

    On a random subset of items:
    titles: the mean reciprocal rank of an item when the query is its title; ties count against it.
    categories: the share of an item's ten nearest items that have its category, over items with a category.

    Args:
        backbone: the frozen encoder; left as it was.
        domain: name of the domain.
        adapter: the domain's expert.
        catalog: the domain's catalog.
        text: section ``[text]``.
        num_items: largest size of the subset; items without a title (``Catalog.titles``) are left out.
        seed: seed of the draw.

    Returns:
        Name -> check; empty for twenty items with a title or fewer. If the backbone finds no
        categories, or the catalog has no such attribute, they pass.
    """
    drawn = generator(seed, "probe", domain).permutation(len(catalog))
    chosen = [int(item) for item in drawn if catalog.titles[item]][:num_items]
    if len(chosen) <= 2 * NEAREST:
        return {}
    ids = [catalog.item_ids[item] for item in chosen]
    columns = {name: [values[item] for item in chosen] for name, values in catalog.attributes.items()}
    bare = {name: values if name == catalog.title_attribute else [""] * len(values) for name, values in columns.items()}
    categories = columns.get("category", [""] * len(chosen))
    titles, items = (
        item_sequences(
            build_token_table(
                make_catalog(domain, ids, attributes, catalog.limits),
                backbone.tokenizer,
                text.max_attribute_tokens,
                backbone.special.attributes,
            ),
            backbone.special,
            text.max_tokens,
        )
        for attributes in (bare, columns)
    )
    before = _probe(backbone, None, titles, items, categories)
    after = _probe(backbone, adapter, titles, items, categories)
    checks = {}
    for name, said in (
        ("titles", "a title finds its item with reciprocal rank"),
        ("categories", "the share of the ten nearest items that are of an item's category is"),
    ):
        limit = LEAST_SHARE_OF_BACKBONE * before[name]
        failed = after[name] < limit
        reason = f"under its expert {said} {after[name]:.3f}, under the backbone {before[name]:.3f}; expected at least "
        checks[name] = Check(
            after[name], limit, failed, f"{reason}{limit:.3f}" if failed else "", {"backbone": before[name]}
        )
    return checks


def _probe(
    backbone: Backbone,
    adapter: Adapter | None,
    titles: Sequence[Tokens],
    items: Sequence[Tokens],
    categories: Sequence[str],
) -> dict[str, float]:
    with applied(backbone, adapter):
        queries, vectors = encode(backbone, titles), encode(backbone, items)  # (n, d) each
    if not (queries.isfinite().all() and vectors.isfinite().all()):
        return {"titles": 0.0, "categories": 0.0}
    ranks = rank_targets(queries, vectors, np.arange(len(items)))
    similar = vectors @ vectors.T
    similar.fill_diagonal_(-torch.inf)
    nearest = similar.topk(NEAREST, dim=1).indices  # (n, 10)
    numbers = np.unique(categories, return_inverse=True)[1]
    same = torch.from_numpy(numbers)[nearest] == torch.from_numpy(numbers)[:, None]  # (n, 10)
    named = torch.tensor([bool(category) for category in categories])
    return {
        "titles": float((1 / ranks).mean()),
        "categories": float(same[named].float().mean()) if named.any() else 0.0,
    }


# ---- the other domains' votes


def leave_one_out_merges(adapters: Mapping[str, Adapter]) -> dict[str, Adapter]:
    """Return label -> merge: the average of all experts and, for each expert, the average of the others.

    Fewer than ``SMALLEST_COHORT`` experts give none.
    """
    layout = survey_adapters(adapters)
    num_domains = len(layout.domains)
    if num_domains < SMALLEST_COHORT:
        return {}
    weights = {ALL: torch.full((num_domains,), 1 / num_domains)}
    for k, domain in enumerate(layout.domains):
        weights[WITHOUT + domain] = torch.full((num_domains,), 1 / (num_domains - 1))
        weights[WITHOUT + domain][k] = 0
    return {label: linear_merge_of_many(adapters, layout, of_label) for label, of_label in weights.items()}


def votes_of(sums: MetricSums, domains: Sequence[str], metric: str) -> dict[str, Vote]:
    """Compute one domain's vote on each other domain, from its validation users.

    Args:
        sums: metric sums of the merges of :func:`leave_one_out_merges` on this domain's users.
        domains: the other domains.
        metric: the metric to compare.

    Returns:
        Other domain -> relative gain without it, and True if the gain is at least ``LEAST_GAIN`` and significant (the
        95 % interval, paired over users, is above 0).

    Raises:
        ClientError: no users can have these sums.
    """
    whole = sums.mean(ALL, metric)
    votes = {}
    for other in domains:
        difference = paired_difference(sums, WITHOUT + other, ALL, metric)
        gain = difference.mean / whole if whole > 0 else (math.inf if difference.mean > 0 else 0.0)
        votes[other] = (gain, bool(difference.low > 0 and gain >= LEAST_GAIN))
    return votes


def leave_one_out_checks(votes: Mapping[str, Mapping[str, Vote]]) -> Checks:
    """Find experts without which more than half of the other domains do better, so that no minority can exclude one.

    Args:
        votes: domain -> its vote on each other domain, from :func:`votes_of`.
    """
    found: Checks = {}
    for domain in sorted({other for of_domain in votes.values() for other in of_domain}):
        against = {voter: of_voter[domain] for voter, of_voter in votes.items() if domain in of_voter}
        if len(against) < SMALLEST_COHORT - 1:
            continue
        share = sum(vote for _, vote in against.values()) / len(against)
        gains = {voter: gain if math.isfinite(gain) else None for voter, (gain, _) in sorted(against.items())}
        gain = statistics.median(gain for gain, _ in against.values())
        reason = (
            f"without it the average ranks significantly better for {round(share * len(against))} of {len(against)} "
            f"other domains (median gain {100 * gain:.0f} %); expected at most half of them"
        )
        found[domain] = Check(share, 0.5, share > 0.5, reason if share > 0.5 else "", {"gains": gains})
    return found
