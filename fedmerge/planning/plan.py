"""Choose the settings of an experiment for domain folders, estimate its time, and write it with comments."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedmerge.config import ATTRIBUTES, LEARNED_METHODS, ExperimentConfig, flat_to_toml, from_flat, to_flat
from fedmerge.config.files import Scalar
from fedmerge.domain.folder import list_domains
from fedmerge.domain.interactions import load_interactions
from fedmerge.domain.manifest import Manifest, read_manifest
from fedmerge.domain.splits import MIN_EVALUATED_LENGTH
from fedmerge.errors import ConfigError
from fedmerge.planning.pace import Pace

FEWEST_STEPS, MOST_STEPS = 60, 2000
VALIDATIONS = 6  # of a training
HEAD_EPOCHS = 20  # early stopping usually ends a head's training by then
EVALUATED = 1000  # validation users, who select
TESTED = 4000
STARTING_SECONDS = 25.0  # Flower and Ray
MIN_USERS = 2


@dataclass(frozen=True)
class Facts:
    """What a domain's experiment depends on.

    Attributes:
        manifest: counts and attributes.
        num_evaluated: users with enough items for validation and test.
        num_trained: users with a history and a target outside them.
    """

    manifest: Manifest
    num_evaluated: int
    num_trained: int

    @property
    def can_train(self) -> bool:
        """True if an expert can be trained and validated."""
        return self.num_trained >= MIN_USERS and self.num_evaluated > 0


@dataclass(frozen=True)
class Plan:
    """An experiment for this machine.

    Attributes:
        config: all settings.
        given: dotted keys that differ from the defaults for a reason -> comment.
        seconds: phase -> estimated wall clock.
        within: False if even the fewest steps take longer than was asked.
    """

    config: ExperimentConfig
    given: Mapping[str, str]
    seconds: Mapping[str, float]
    within: bool


def read_facts(root: Path) -> dict[str, Facts]:
    """Read what a plan needs of every domain folder under root.

    Raises:
        DomainError: a damaged folder.
        ConfigError: there is no domain.
    """
    found = {}
    for name in list_domains(root):
        lengths = np.diff(load_interactions(root / name).offsets)
        evaluated = lengths >= MIN_EVALUATED_LENGTH
        trained = np.where(evaluated, lengths - 2, lengths) >= MIN_USERS  # a history and a target
        found[name] = Facts(read_manifest(root / name), int(evaluated.sum()), int(trained.sum()))
    if not found:
        raise ConfigError(
            f"{root}: found no domain folder. Import tables with 'fedmerge data import table', or write the synthetic "
            f"domains there with 'fedmerge data demo {root}'."
        )
    return found


def draft(
    root: Path, facts: Mapping[str, Facts], unseen: Sequence[str], cpus: int, overrides: Mapping[str, Scalar]
) -> tuple[ExperimentConfig, dict[str, str]]:
    """Choose everything that does not depend on this machine's pace.

    Args:
        root: folder of the domain folders.
        facts: of :func:`read_facts`.
        unseen: domains that must not train.
        cpus: of this machine.
        overrides: dotted key -> value that the user gives.

    Returns:
        The experiment, and dotted key -> reason of each setting that the file names.

    Raises:
        ConfigError: unknown names, fewer than two domains that can train, or an unusable value.
    """
    if unknown := [name for name in unseen if name not in facts]:
        raise ConfigError(f"--unseen: {root} has no domain {', '.join(unknown)}; it has: {', '.join(facts)}.")
    too_small = [name for name, of in facts.items() if not of.can_train and name not in unseen]
    train = [name for name, of in facts.items() if of.can_train and name not in unseen]
    if len(train) < MIN_USERS:
        raise ConfigError(
            f"{root}: found {len(train)} domains that can train ({', '.join(train) or 'none'}), expected at least two. "
            f"A domain trains with {MIN_USERS} users or more who have four items. Import more domains."
        )
    of_train = [facts[name].manifest for name in train]
    templates = {facts[name].manifest.attributes for name in facts}
    public = all(manifest.public_catalog for manifest in of_train)
    private = ", ".join(manifest.name for manifest in of_train if not manifest.public_catalog)
    smallest = min(facts[name].num_trained for name in train)
    at_once = min(cpus, len(facts))
    values: dict[str, tuple[Scalar, str]] = {
        "name": (root.resolve().name, ""),
        "domains.root": (str(root), ""),
        "domains.train": (",".join(train), "each trains an expert on its own users"),
        "domains.unseen": (
            ",".join([*unseen, *too_small]),
            "only evaluated" + (f"; too few users to train: {', '.join(too_small)}" if too_small else ""),
        ),
        "domains.attributes": (
            ",".join(next(iter(templates))) if len(templates) == 1 else "",
            "of an item's text, in order" if len(templates) == 1 else "the domains have different ones",
        ),
        "text.max_tokens": (96, "of a history; the newest three or four items"),
        "lora.rank": (16, ""),
        "lora.alpha": (32, ""),
        "lora.target_modules": ("all-linear", ""),
        "train.learning_rate": (5e-4, ""),
        "train.batch_size": (max(2, min(64, smallest)), "other targets of a step are the negatives"),
        "train.validation_users": (EVALUATED, "select the best step"),
        "merge.methods": (
            "average,task-arithmetic,mergerec" if public else "average,task-arithmetic,ties",
            "" if public else f"mergerec needs public catalogs, which these do not give: {private}",
        ),
        "merge.task_arithmetic_coefficients": ("0.5,0.7,1.0", "the best on validation is taken"),
        "head.kind": ("local", "each domain's own model over ids and texts, which stays there; 'none' is faster"),
        "head.vectors": ("merge,expert", "joined, and what the domain could do alone"),
        "head.max_minutes": ("none", "early stopping ends it, so the machine's speed decides nothing"),
        "evaluation.validation_users": (EVALUATED, ""),
        "evaluation.test_users": (TESTED, "'none' for all"),
        "runtime.threads_per_client": (max(1, cpus // at_once), f"{cpus} CPUs here, {at_once} clients at once"),
        "runtime.server_threads": (cpus, ""),
    }
    if templates == {ATTRIBUTES}:
        del values["domains.attributes"]
    flat = {key: value for key, (value, _) in values.items()} | dict(overrides)
    reasons = {key: reason for key, (_, reason) in values.items()} | dict.fromkeys(overrides, "given")
    return from_flat(flat, where="init"), reasons


def make_plan(
    config: ExperimentConfig, given: Mapping[str, str], facts: Mapping[str, Facts], pace: Pace, minutes: float
) -> Plan:
    """Choose the largest number of training steps that fits a time, and estimate the whole run.

    Args:
        config, given: of :func:`draft`; a step count among ``given`` stays.
        facts: of :func:`read_facts`.
        pace: of :func:`fedmerge.planning.pace.measure_pace`.
        minutes: wall clock that the run may take.
    """
    reasons = dict(given)
    if "train.max_steps" not in given:
        fixed = sum(estimate(_with_steps(config, 0), facts, pace).values())
        a_hundred = sum(estimate(_with_steps(config, 100), facts, pace).values()) - fixed
        affordable = (60 * minutes - fixed) / a_hundred * 100
        steps = max(FEWEST_STEPS, min(MOST_STEPS, int(affordable) // 20 * 20))
        config = _with_steps(config, steps)
        reasons |= {
            "train.max_steps": f"what {minutes:g} minutes on this machine allow, {FEWEST_STEPS} to {MOST_STEPS}",
            "train.validate_every_steps": "",
        }
    seconds = estimate(config, facts, pace)
    return Plan(config, reasons, seconds, within=sum(seconds.values()) <= 60 * minutes * 1.02)


def estimate(config: ExperimentConfig, facts: Mapping[str, Facts], pace: Pace) -> dict[str, float]:
    """Return phase -> seconds of wall clock of a run with nothing in its cache.

    Args:
        config: the experiment.
        facts: of its domains.
        pace: of this machine.
    """
    train, everyone = config.domains.train, config.domains.train + config.domains.unseen
    at_once = max(1, config.runtime.server_threads // config.runtime.threads_per_client)
    settings, steps = config.train, config.train.max_steps or 0

    def encoding(name: str, limit: int | None) -> float:
        users = min(facts[name].num_evaluated, limit or facts[name].num_evaluated)
        return facts[name].manifest.num_items * pace.item + users * pace.history

    def together(seconds: Sequence[float]) -> float:
        return max(sum(seconds) / min(at_once, len(seconds)), *seconds)

    checks = 1 + math.ceil(steps / settings.validate_every_steps)
    training = [steps * pace.step + checks * encoding(name, settings.validation_users) for name in train]
    learned = [method for method in config.merge.methods if method in LEARNED_METHODS]
    variants = {"task-arithmetic": len(config.merge.task_arithmetic_coefficients)}
    num_merges = sum(variants.get(method, 1) for method in config.merge.methods)
    items = sum(facts[name].manifest.num_items for name in train)
    merging = len(learned) * (2 * items * pace.item + config.mergerec.steps * pace.step)
    evaluation = config.evaluation
    selecting = [(num_merges + 1) * encoding(name, evaluation.validation_users) for name in train]
    tested = len(config.merge.methods) + 2  # and expert, backbone
    testing = [tested * encoding(name, evaluation.test_users) for name in everyone]
    heads = [
        len(config.head.vectors)
        * (
            HEAD_EPOCHS
            * pace.head
            * facts[name].num_trained
            * config.head.scored(facts[name].manifest.num_items)
            / 1000
            + encoding(name, evaluation.validation_users)
        )
        for name in train
    ]
    phases = {
        "start": STARTING_SECONDS,
        "training": together(training),
        "merging": merging,
        "heads": together(heads) if config.head.kind else 0.0,
        "validation and test": together(selecting) + together(testing),
    }
    return {name: seconds for name, seconds in phases.items() if seconds}


def plan_toml(plan: Plan, heading: Sequence[str]) -> str:
    """Return the experiment as a file: a heading, the settings that the plan gives, and their reasons.

    Args:
        plan: the plan.
        heading: lines of the comment at its top.
    """
    flat = {key: value for key, value in to_flat(plan.config).items() if key in plan.given}
    lines, section = [], ""
    for line in flat_to_toml(flat).splitlines():
        if line.startswith("["):
            section = line.strip("[]") + "."
        reason = plan.given.get(section + line.partition(" = ")[0], "")
        lines.append(f"{line}  # {reason}" if reason else line)
    return "\n".join([*(f"# {line}" for line in heading), *lines]) + "\n"


def _with_steps(config: ExperimentConfig, steps: int) -> ExperimentConfig:
    every = max(10, steps // VALIDATIONS)
    train = config.train.model_copy(update={"max_steps": steps, "validate_every_steps": every})
    return config.model_copy(update={"train": train})
