"""Heads of the clients: each trains its own over the merge that is served, and reports how that went."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flwr.app import RecordDict

from fedmerge.adapter import Adapter, adapter_sha256
from fedmerge.config import HeadVectors
from fedmerge.errors import ClientError
from fedmerge.escaping import one_line
from fedmerge.evaluation.sums import (
    FEDERATED_FUSED,
    FEDERATED_HEAD,
    FEDERATED_SOURCES,
    VARIANTS,
    fused_label,
    head_label,
)
from fedmerge.federated.head import Weights, mean_weights
from fedmerge.merging.candidate import Candidate
from fedmerge.runs import checkpoints
from sim.app.messages import records
from sim.app.server.asking import ask
from sim.app.server.members import FEW_CLIENTS, LONGEST_NAME, join_names
from sim.app.server.questions import Question
from sim.app.server.run import Run

logger = logging.getLogger("fedmerge.server")


@dataclass(frozen=True)
class Heads:
    """The heads that the clients hold, by the vectors that each reads.

    Attributes:
        served: label of the merge that the vectors ``merge`` mean.
        vectors: domain -> vectors of the heads that its client trained; unseen domains have none.
        federated: the federated head, which every domain evaluates; None without one.
        fusions: domain -> weights of the federated head's fusion that its client chose and reported.
    """

    served: str = ""
    vectors: Mapping[str, tuple[HeadVectors, ...]] = field(default_factory=dict)
    federated: Adapter | None = field(default=None, repr=False)
    fusions: Mapping[str, Weights] = field(default_factory=dict)

    @property
    def mean_fusion(self) -> Weights:
        """Weights of the federated head's fusion for domains that do not choose their own."""
        return mean_weights(list(self.fusions.values()))

    def rows(self, domain: str) -> list[str]:
        """Return the labels of the rows that heads add to a domain's metric sums."""
        vectors = self.vectors.get(domain, ())
        own = [label for each in vectors for label in (head_label(each), fused_label(each))]
        return own if self.federated is None else [*own, FEDERATED_HEAD, FEDERATED_FUSED]

    def request(self, domain: str) -> tuple[str, str, str]:
        """Return the fields ``heads``, ``served`` and ``fusion`` of a request to evaluate; empty without heads."""
        vectors = ",".join(self.vectors.get(domain, ()))
        if self.federated is None:
            return vectors, self.served if vectors else "", ""
        return vectors, self.served, "" if domain in self.vectors else records.fusion_text(self.mean_fusion)


NO_HEADS = Heads()


def train_heads(
    run: Run,
    domains: Sequence[str],
    served: Candidate,
    sources: Mapping[str, str],
    federated: Adapter | None = None,
    *,
    ask_clients: bool,
) -> Heads:
    """Let every training client train its heads over the merge that is served; a head never leaves its client.

    Reports that are on disk are not asked for again.

    Args:
        run: the run.
        domains: training domains; those that still take part are asked.
        served: the merge that is served.
        sources: domain -> hash of its expert, over which a head may be trained as well.
        federated: the federated head, whose fusion each client chooses; None without one.
        ask_clients: False for the reports on disk alone, which are final once the choice is made.
    """
    head = run.config.head
    if head.kind is None:
        return NO_HEADS
    sent = {served.label: served.adapter} | ({} if federated is None else {FEDERATED_HEAD: federated})
    over = {label: adapter_sha256(adapter) for label, adapter in sent.items()}
    expected = [*head.vectors, *([] if federated is None else [records.FEDERATED])]
    reports = {name: of for name, of in checkpoints.read_heads(run.folder, over).items() if name in domains}
    if ask_clients:
        if reports:
            logger.info("heads: already on disk: %s", join_names(list(reports)))
        missing = run.members.nodes_of([domain for domain in domains if domain not in reports])
        if missing:
            logger.info("heads: %s, over the vectors of: %s", join_names(list(missing)), ", ".join(head.vectors))
        models = records.model_records(sent)

        def request(domain: str) -> RecordDict:
            expert_sha256 = sources.get(domain, "") if "expert" in head.vectors else ""
            asked = records.HeadRequest(served.label, ",".join(head.vectors), expert_sha256)
            return records.head_request_record(asked, models)

        def receive(domain: str, content: RecordDict) -> None:
            found = records.read_head_reports(content)
            if found.keys() != {*expected}:
                raise ClientError(
                    f"domain {domain}: it reports heads on {', '.join(found) or 'nothing'}, asked for were heads on "
                    f"{', '.join(expected)}. Use the same fedmerge version everywhere."
                )
            _fusion_of(found)  # raises if it is none
            reports[domain] = {str(vectors): report for vectors, report in found.items()}
            checkpoints.write_heads(run.folder, domain, over, reports[domain])
            for vectors in head.vectors:
                _log_head(domain, vectors, found[vectors], few=len(missing) <= FEW_CLIENTS)

        with run.phase(checkpoints.HEADS):
            ask(run, missing, Question(records.TRAIN_HEAD, run.config.server.timeout_seconds, request), receive)
    trained = {
        domain: tuple(vectors for vectors in head.vectors if reports[domain][vectors]["trained"])
        for domain in sorted(reports)
    }
    fusions = {domain: fusion for domain in sorted(reports) if (fusion := _fusion_of(reports[domain]))}
    return Heads(served.label, trained, federated, fusions)


def _fusion_of(reports: Mapping[str, Mapping[str, Any]]) -> Weights | None:
    """Return the weights of the federated head's fusion that a client reports; None if it keeps them.

    Raises:
        ClientError: other sources, or a variant is missing.
    """
    weights = reports.get(records.FEDERATED, {}).get("weights")
    if weights is None:
        return None
    if weights.keys() != {*VARIANTS} or any(
        of_variant.keys() != {*FEDERATED_SOURCES} for of_variant in weights.values()
    ):
        raise ClientError(
            f"its fusion of the federated head has other sources than {', '.join(FEDERATED_SOURCES)}. Use the same "
            "fedmerge version everywhere."
        )
    return {variant: tuple(weights[variant][source] for source in FEDERATED_SOURCES) for variant in VARIANTS}


def _log_head(domain: str, vectors: str, report: Mapping[str, object], few: bool) -> None:
    if not report["trained"]:
        reason = one_line(str(report["reason"]), LONGEST_NAME)
        logger.warning("%s: no head on the %s: %s", domain, vectors, reason)
        return
    shown = [f"{key} {report[key]}" for key in ("epochs", "best_epoch", "stopped_by", "seconds") if key in report]
    cached = ["from the client's cache"] if report.get("cached") else []
    (logger.info if few else logger.debug)("%s: head on the %s: %s", domain, vectors, ", ".join([*shown, *cached]))
