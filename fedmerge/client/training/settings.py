"""The settings of an experiment that decide what a client trains."""

from dataclasses import dataclass

from fedmerge.config import DP, ExperimentConfig, Lora, Simulation, Train
from fedmerge.privacy.dp.releases import NoisyAnswers, Release, metric_releases, noisy_answers


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
    """

    lora: Lora
    train: Train
    dp: DP
    simulation: Simulation
    answers: NoisyAnswers
    sums: tuple[Release, ...]
    seed: int
    threads: int


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
    )
