"""Measure how fast this machine does the work of a run: encoding, training steps, epochs of a head.

On a CPU the clock is that of this process's threads, so what else runs at the moment does not count.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fedmerge.client.csft import next_titles
from fedmerge.client.heads.heads import head_settings, why_no_head
from fedmerge.client.local_domain import LocalDomain
from fedmerge.client.training.batches import training_batches
from fedmerge.client.training.loop import Attached, Budget, Recipe, Schedule, Step, fit
from fedmerge.client.training.plain_sgd import batch_steps
from fedmerge.config import ExperimentConfig
from fedmerge.domain.splits import evaluation_examples
from fedmerge.encoder.encode import encode
from fedmerge.seeding import generator
from fedmerge.sequence.training import train_sequence_model

PROBED_TEXTS, PROBED_STEPS, PROBED_USERS = 192, 3, 512
VALIDATED = 32  # of the probed users: few in an epoch, as in a run


@dataclass(frozen=True)
class Pace:
    """Seconds of work in one process with ``runtime.threads_per_client`` threads, on CPUs of their own.

    Attributes:
        item: encoding an item.
        history: encoding a history.
        step: a training step of ``train.batch_size`` users.
        head: an epoch of a head, for a user and 1,000 items; 0 where none was measured.
    """

    item: float
    history: float
    step: float
    head: float


def measure_pace(domain: LocalDomain, config: ExperimentConfig) -> Pace:
    """Time a little of each kind of work on a domain that can train.

    Args:
        domain: of typical texts and histories.
        config: lora, train, head, runtime and seed count.
    """
    torch.set_num_threads(config.runtime.threads_per_client)
    examples = evaluation_examples(domain.interactions, "valid", PROBED_TEXTS, config.seed)
    histories = domain.packed(examples.histories)
    items = domain.item_sequences[:PROBED_TEXTS]
    encode(domain.backbone, items[:8])  # the first call also loads code
    return Pace(
        item=_seconds(domain, lambda: encode(domain.backbone, items)) / len(items),
        history=_seconds(domain, lambda: encode(domain.backbone, histories)) / max(1, len(histories)),
        step=(_train(domain, config, PROBED_STEPS + 1) - _train(domain, config, 1)) / PROBED_STEPS,
        head=0.0 if config.head.kind is None or why_no_head(domain) else _head_epoch(domain, config),
    )


def _seconds(domain: LocalDomain, work: Callable[[], object]) -> float:
    if domain.backbone.device.type != "cpu":
        started = time.perf_counter()
        work()
        return time.perf_counter() - started
    started = time.process_time()
    work()
    return (time.process_time() - started) / torch.get_num_threads()


def _train(domain: LocalDomain, config: ExperimentConfig, steps: int) -> float:
    """Return the seconds of a training without validation."""
    settings, name = config.train, domain.manifest.name
    drawn = training_batches(domain.training_sequences, settings, config.seed, name)
    batches = ((domain, batch, epochs) for batch, epochs in drawn)
    schedule = Schedule(settings.learning_rate, settings.warmup_steps, Budget(max_steps=steps))
    titles = next_titles(settings, domain)

    def init(attached: Attached, first: int) -> Step:
        return batch_steps(batches, settings, attached, first, titles=titles)

    recipe = Recipe(name, init, schedule)
    return _seconds(domain, lambda: fit(recipe, domain.backbone, config.lora, config.seed))


def _head_epoch(domain: LocalDomain, config: ExperimentConfig) -> float:
    """Return the seconds of an epoch, for a user and 1,000 items of the softmax."""
    settings = head_settings(config.head.model_copy(update={"max_epochs": 1}), VALIDATED)
    validation = evaluation_examples(domain.interactions, "valid", VALIDATED, config.seed)
    sequences, size = domain.training_sequences[:PROBED_USERS], len(domain.catalog)
    drawn = generator(config.seed, "pace").standard_normal((size, domain.backbone.width))  # values take no time
    vectors = torch.nn.functional.normalize(torch.from_numpy(drawn).float(), dim=1)
    seconds = _seconds(
        domain,
        lambda: train_sequence_model(
            sequences, size, validation, settings, config.seed, domain.backbone.compute, vectors
        ),
    )
    return seconds / len(sequences) / (config.head.scored(size) / 1000)
