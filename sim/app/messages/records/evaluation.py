"""Requests to evaluate models, and the metric sums that clients answer."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from flwr.app import ConfigRecord, RecordDict

from fedmerge.adapter import Adapter
from fedmerge.config import Split
from fedmerge.errors import ClientError
from fedmerge.escaping import one_line
from fedmerge.evaluation.sums import FEDERATED_SOURCES, VARIANTS, MetricSums, Variant, metric_sums_from_dict
from sim.app.messages.records.adapters import ModelRecords, read_models
from sim.app.messages.records.fields import FACTS, LONGEST_SHOWN, ONE_VERSION, read_config, read_dataclass

EVALUATE = "evaluate"
OWN_EXPERT = "own"
_LEFT_OUT = ("heads", "served", "fusion", "personal")  # of a request where they are empty
MOST_DEVIATIONS = 10.0  # of noise by which a sum may leave its range


@dataclass(frozen=True)
class EvaluationRequest:
    """A request to evaluate models on a split.

    Attributes:
        split: ``valid`` or ``test``.
        backbone: True to evaluate the backbone alone as well.
        expert_sha256: hash of the client's own expert, which is evaluated as well; OWN_EXPERT if the server does not
            know the hash; empty for none.
        baselines: True to evaluate the sanity baselines as well.
        heads: vectors whose head rows are evaluated as well, comma-separated; empty for none.
        served: label of the model that the vectors ``merge`` mean; empty without heads.
        fusion: weights of the federated head's fusion, :func:`fusion_text`; empty if the client chooses them itself.
            The rows of that head are evaluated if the request holds it among its models, as FEDERATED_HEAD.
        personal: hash of the cohort whose personal merge is evaluated as well; empty for none.
    """

    split: Split
    backbone: bool
    expert_sha256: str
    baselines: bool
    heads: str = ""
    served: str = ""
    fusion: str = ""
    personal: str = ""


def evaluation_request_record(request: EvaluationRequest, models: ModelRecords) -> RecordDict:
    """Make a request to evaluate the models of :func:`model_records`; optional fields stay out where empty."""
    facts = {key: value for key, value in asdict(request).items() if value or key not in _LEFT_OUT}
    return RecordDict({FACTS: ConfigRecord(facts), **models})


def read_evaluation_request(content: RecordDict) -> tuple[EvaluationRequest, dict[str, Adapter]]:
    """Inverse of :func:`evaluation_request_record`."""
    facts = {**dict.fromkeys(_LEFT_OUT, ""), **read_config(content, FACTS)}
    return read_dataclass(EvaluationRequest, facts), read_models(content)


def fusion_text(weights: Mapping[Variant, Sequence[float]]) -> str:
    """Write the weights of the federated head's fusion, variant -> weights of FEDERATED_SOURCES, as JSON."""
    return json.dumps({variant: list(weights[variant]) for variant in VARIANTS})


def read_fusion(text: str) -> dict[Variant, tuple[float, ...]]:
    """Inverse of :func:`fusion_text`.

    Raises:
        ClientError: another form, or weights that :func:`are_weights` refuses.
    """
    try:
        found = json.loads(text)
        weights = {variant: tuple(float(weight) for weight in found[variant]) for variant in VARIANTS}
        if not all(are_weights(of_variant) for of_variant in weights.values()):
            raise ValueError
    except (LookupError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ClientError(
            f"the request has the fusion {one_line(text, LONGEST_SHOWN)!r}, expected {len(FEDERATED_SOURCES)} weights "
            f"of sum 1 for {' and '.join(VARIANTS)}; {ONE_VERSION}"
        ) from error
    return weights


def are_weights(weights: Sequence[float]) -> bool:
    """Return True for one weight from 0 to 1 of each of FEDERATED_SOURCES, which add up to 1."""
    return len(weights) == len(FEDERATED_SOURCES) and min(weights) >= 0 and abs(sum(weights) - 1) < 1e-6


def metric_sums_record(sums: Mapping[Variant, MetricSums]) -> RecordDict:
    """Make the record of the metric sums of all variants."""
    return RecordDict(
        {FACTS: ConfigRecord({variant: json.dumps(of_variant.to_dict()) for variant, of_variant in sums.items()})}
    )


def read_metric_sums(content: RecordDict) -> dict[Variant, MetricSums]:
    """Inverse of :func:`metric_sums_record`.

    Raises:
        ClientError: another form.
    """
    facts = read_config(content, FACTS)
    try:
        sums = {variant: metric_sums_from_dict(json.loads(str(facts[variant]))) for variant in VARIANTS}
    except (KeyError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ClientError(f"its metric sums are malformed ({type(error).__name__}: {error}); {ONE_VERSION}") from error
    for variant, of_variant in sums.items():
        if of_variant.variant != variant:
            raise ClientError(f"its metric sums named {variant} are {of_variant.variant}; {ONE_VERSION}")
        stated = of_variant.sums[~np.isnan(of_variant.sums)]
        slack = MOST_DEVIATIONS * of_variant.noise + 1e-9 * of_variant.num_users
        if stated.size and (stated.min() < -slack or stated.max() > of_variant.num_users + slack):
            raise ClientError(
                f"its metric sums run from {stated.min():g} to {stated.max():g}, expected 0 to {of_variant.num_users}: "
                f"the outcome of a user is between 0 and 1; {ONE_VERSION}, or check its client"
            )
    return sums
