"""The settings of an experiment that decide what a client trains."""

from dataclasses import dataclass

from fedmerge.adapter import Adapter
from fedmerge.config import DP, ExperimentConfig, Lora, Simulation, Train, Weave
from fedmerge.federated.shared_items import MeanSimilarity
from fedmerge.privacy.dp.releases import NoisyAnswers, Release, metric_releases, noisy_answers, woven_steps


@dataclass(frozen=True)
class TrainingSettings:
    """Everything that decides a client's adapter, apart from its domain and backbone.

    Attributes:
        lora: layout of the adapter, with the ranks of single domains.
        train: optimiser and budgets.
        dp: differential privacy.
        simulation: audit and poisoning.
        answers: noisy answers about coefficients; with the adapter they share the noise multiplier.
        sums: noisy metric sums; by user they share (ε, δ) with the adapter.
        seed: seed of the experiment.
        threads: PyTorch threads of the client.
        weave: how the client continues adapters of others.
        woven_steps: steps of that in all; by user they share the noise multiplier with the adapter.
    """

    lora: Lora
    train: Train
    dp: DP
    simulation: Simulation
    answers: NoisyAnswers
    sums: tuple[Release, ...]
    seed: int
    threads: int
    weave: Weave
    woven_steps: int


@dataclass(frozen=True)
class WeaveTask:
    """The server's request to continue an adapter.

    Attributes:
        number: number of the pass, from 1.
        source: the domain whose expert the adapter was, or MEAN or SHARED of ``fedmerge.federated.weaving``.
        start: the adapter.
        similarity: under schedule ``similarity`` the mean that it is pulled to.
    """

    number: int
    source: str
    start: Adapter
    similarity: MeanSimilarity | None = None


def training_settings(config: ExperimentConfig) -> TrainingSettings:
    """Select the settings of a client's training from an experiment."""
    return TrainingSettings(
        config.lora,
        config.train,
        config.dp,
        config.simulation,
        noisy_answers(config),
        metric_releases(config),
        config.seed,
        config.runtime.threads_per_client,
        config.weave,
        woven_steps(config),
    )
