"""A benchmark file: one experiment, and the strategies, seeds and datasets that it is repeated for."""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedmerge.config import (
    LEARNED_METHODS,
    Baseline,
    ExperimentConfig,
    describe_problem,
    flatten,
    from_flat,
    load_config,
    to_flat,
    too_few_for_krum,
    with_absolute_paths,
)
from fedmerge.errors import ConfigError
from fedmerge.report.bench_tables import POOLED

Drawing = Literal["shuffled", "balanced"]  # of joint training
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,63}$")]
REFERENCES = ("backbone", "expert")  # rows of every benchmark, beside the baselines of the experiment file
FIXED = {"name", "seed", "run_id", "resume", "until", "output_dir"}  # a benchmark sets these itself


class Table(BaseModel):
    """Frozen; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Variation(Table):
    """A strategy or a dataset: its name, and the keys of the experiment in which it differs."""

    name: Name
    set: dict[str, Any] = {}


class BenchConfig(Table):
    """A grid: every strategy on every dataset with every seed.

    Attributes:
        title: of the report.
        experiment: an experiment file, relative to this one.
        seeds: of training and merging; which users are evaluated depends on the experiment's own seed alone.
        joint: rows of one adapter trained on pooled data, which breaks isolation; see fedmerge.bench.joint.
        joint_folds: with leave_one_out, train those rows for every fold, too.
        leave_one_out: besides, each training domain in turn is left out of the merge and evaluated as unseen.
        baseline: the row that the others are compared with.
        dataset: where there is more than one.
        strategy: what is compared; of several merges that one asks for, validation chooses.
    """

    title: str = Field(min_length=1)
    experiment: str = Field(min_length=1)
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...] = Field((0, 1, 2), min_length=1)
    joint: tuple[Drawing, ...] = ()
    joint_folds: bool = True
    leave_one_out: bool = False
    baseline: str
    dataset: tuple[Variation, ...] = Field((Variation(name="main"),), min_length=1)
    strategy: tuple[Variation, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> "BenchConfig":
        for what, names in (
            ("seeds", [str(seed) for seed in self.seeds]),
            ("joint", [*map(str, self.joint)]),
            ("dataset", [dataset.name for dataset in self.dataset]),
            ("strategy", [*REFERENCES, *get_args(Baseline), *(strategy.name for strategy in self.strategy)]),
        ):
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"{what}: {', '.join(twice)} is there twice; give each once")
        rows = [*REFERENCES, *(strategy.name for strategy in self.strategy)]
        if self.baseline not in rows:
            raise ValueError(f"baseline: found {self.baseline!r}, expected one of {', '.join(rows)}")
        return self


def joint_row(drawing: Drawing) -> str:
    """What a row of joint training is called: wherever it stands, the name says what it is."""
    return f"joint-{drawing}{POOLED}"


@dataclass(frozen=True)
class Bench:
    """A benchmark whose every experiment is valid.

    Attributes:
        config: the grid.
        base: its experiment file, flat, with absolute paths.
    """

    config: BenchConfig
    base: dict[str, Any]
    _validated: dict[tuple[str, str | None, int], ExperimentConfig] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def experiment(self, dataset: str, strategy: str | None, seed: int) -> ExperimentConfig:
        """The experiment of one strategy; None: of what all strategies on a dataset share.

        Raises:
            ConfigError: every problem at once.
        """
        key = (dataset, strategy, seed)
        if key not in self._validated:  # a grid asks for each again and again, and validating one takes milliseconds
            self._validated[key] = self._validate(*key)
        return self._validated[key]

    def _validate(self, dataset: str, strategy: str | None, seed: int) -> ExperimentConfig:
        changes: dict[str, Any] = {}
        where = "benchmark"
        for what, name, variations in (
            ("dataset", dataset, self.config.dataset),
            ("strategy", strategy, self.config.strategy),
        ):
            if name is not None:
                (variation,) = (variation for variation in variations if variation.name == name)
                changes |= flatten(variation.set)
                where += f", {what} {name}"
        if wrong := sorted(FIXED & changes.keys()):
            raise ConfigError(f"{where}: set: found {', '.join(wrong)}, which a benchmark sets itself; leave it out")
        return from_flat({**self.base, **changes, "seed": seed}, where)


def load_bench(path: Path, overrides: Sequence[str] = ()) -> Bench:
    """Read a benchmark file and validate every experiment in it.

    Args:
        path: TOML file.
        overrides: ``key=value`` pairs that change the experiment file, as for :func:`fedmerge.config.load_config`.

    Raises:
        ConfigError: every problem of the file, or of the first experiment that has one.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        config = BenchConfig.model_validate(values)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}). Give the path of a benchmark file.") from error
    except ValidationError as error:
        problems = [describe_problem(problem) for problem in error.errors(include_url=False)]
        raise ConfigError(
            f"{path}: {len(problems)} problem(s)\n" + "\n".join(f"  {line}" for line in problems)
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}.") from error
    base = with_absolute_paths(load_config(path.parent / config.experiment, overrides), Path.cwd())
    bench = Bench(config, dict(to_flat(base)))
    for dataset in config.dataset:
        for strategy in (None, *(strategy.name for strategy in config.strategy)):
            experiment = bench.experiment(dataset.name, strategy, config.seeds[0])
            shared = bench.experiment(dataset.name, None, config.seeds[0])
            if experiment.admission.rollback:
                raise ConfigError(
                    f"{path}: strategy {strategy}: admission.rollback = true; a benchmark shows merges as they are. "
                    "Leave it out."
                )
            if problem := _not_in_one_place(experiment):
                raise ConfigError(f"{path}: strategy {strategy}: {problem}")
            for section in ("domains", "evaluation", "attack"):
                if getattr(experiment, section) != getattr(shared, section):
                    raise ConfigError(
                        f"{path}: strategy {strategy}: found another [{section}] than its dataset's; strategies are "
                        "compared on the same domains and users. Make it a dataset of its own."
                    )
            if config.joint and len(experiment.domains.train) < 2:
                raise ConfigError(
                    f"{path}: dataset {dataset.name}: found joint, but domains.train names only one; leave joint out, "
                    "or name more domains"
                )
            if config.leave_one_out:
                _check_fold(path, dataset.name, strategy, experiment)
    return bench


def _check_fold(path: Path, dataset: str, strategy: str | None, experiment: ExperimentConfig) -> None:
    """Refuse what too few domains are left for when one of them is left out; ConfigError."""
    rest = experiment.domains.train[1:]
    whose = f"dataset {dataset}" if strategy is None else f"strategy {strategy}"
    where = f"{path}: {whose}, with leave_one_out = true"
    if problem := too_few_for_krum(experiment.rounds, len(rest)):
        raise ConfigError(f"{where}: {problem}")
    if len(rest) < 2:
        raise ConfigError(
            f"{path}: dataset {dataset}: leave_one_out = true, but domains.train names only "
            f"{len(experiment.domains.train)}; at least 3 are needed, so that two are left to merge"
        )
    if experiment.privacy.policy == "aggregate-only":
        fold = {
            "domains": experiment.domains.model_copy(update={"train": rest}),
            "lora": experiment.lora.model_copy(update={"ranks": experiment.lora.ranks_of(rest)}),
        }
        from_flat(to_flat(experiment.model_copy(update=fold)), where)


def _not_in_one_place(experiment: ExperimentConfig) -> str:
    """Why coefficients that the clients learn cannot be learned in a benchmark's own cell; empty if they can."""
    learned = {*experiment.merge.methods} & LEARNED_METHODS and experiment.rounds.rule is None
    if experiment.privacy.policy != "catalog-private" or not learned:
        return ""
    for key, found, wanted in (
        ("through_clients.users", experiment.through_clients.users, "pseudo-users"),
        ("through_clients.mode", experiment.through_clients.mode, "exact"),
    ):
        if found != wanted:
            return f"{key} = '{found}' is learned in a federation only (fedmerge run); set {wanted!r}"
    if experiment.dp.mode == "domain-local":
        return (
            "dp.mode = 'domain-local' adds noise to every answer about coefficients, in a federation only (fedmerge "
            "run); leave learned merges out"
        )
    return ""
