"""A benchmark file: one experiment, repeated for strategies, seeds and datasets."""

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
    Head,
    HeadVectors,
    describe_problem,
    flatten,
    from_flat,
    load_config,
    to_flat,
    too_few_for_krum,
    with_absolute_paths,
)
from fedmerge.errors import ConfigError
from fedmerge.evaluation.sums import FEDERATED_HEAD, PERSONAL, WOVEN, head_label
from fedmerge.report.bench_tables import POOLED

Drawing = Literal["shuffled", "balanced"]  # of joint training
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,63}$")]
REFERENCES = ("backbone", "expert")  # rows of every benchmark, beside the baselines of the experiment file
FUSED = ", fused"  # end of the row of heads fused with text and recent items
FIXED = {"name", "seed", "run_id", "resume", "until", "output_dir"}  # set by the benchmark


class Table(BaseModel):
    """A frozen table of the file; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Variation(Table):
    """A strategy or a dataset: its name, and the keys of the experiment that it changes."""

    name: Name
    set: dict[str, Any] = {}


class Dataset(Variation):
    """A dataset of the grid.

    Attributes:
        tested: domains to test; empty: all.
        test_root: folder of domains whose users are tested; None: those of the experiment. With domains that were cut
            to a share of their users, the whole ones: the catalogs must be equal.
    """

    tested: tuple[str, ...] = ()
    test_root: str | None = None


class BenchConfig(Table):
    """A grid: every strategy on every dataset with every seed.

    Attributes:
        title: title of the report.
        experiment: experiment file, relative to this one.
        seeds: seeds of training and merging; the experiment's own seed selects the evaluated users.
        joint: rows of an adapter trained on pooled data, which breaks isolation; see fedmerge.bench.joint.
        joint_folds: with leave_one_out, train those rows for every fold as well.
        leave_one_out: also leave each training domain in turn out of the merge, and evaluate it as unseen.
        baseline: row that the others are compared with; several rows: the first is the one of the page.
        dataset: datasets of the grid.
        strategy: strategies to compare; among several merges of one, the best on validation is selected.
    """

    title: str = Field(min_length=1)
    experiment: str = Field(min_length=1)
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...] = Field((0, 1, 2), min_length=1)
    joint: tuple[Drawing, ...] = ()
    joint_folds: bool = True
    leave_one_out: bool = False
    baseline: str | tuple[str, ...]
    dataset: tuple[Dataset, ...] = Field((Dataset(name="main"),), min_length=1)
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
                raise ValueError(f"{what}: {', '.join(twice)} is given twice; expected each once")
        return self

    @property
    def baselines(self) -> tuple[str, ...]:
        """Return the rows that the others are compared with."""
        return (self.baseline,) if isinstance(self.baseline, str) else self.baseline


def joint_row(drawing: Drawing) -> str:
    """Return the name of a row of joint training, which marks it as pooled wherever it is shown."""
    return f"joint-{drawing}{POOLED}"


def head_row(strategy: str, vectors: HeadVectors) -> str:
    """Return the row of a strategy's heads: ``average: head on the merge``; with FUSED at its end, the fused ones."""
    return f"{strategy}: {head_label(vectors)}"


def ranks_by_text(head: Head) -> bool:
    """Return True if a strategy's merge is a row itself: unless its heads read other vectors only."""
    return head.kind is None or "merge" in head.vectors


def woven_row(strategy: str) -> str:
    """Return the row of a strategy's merges of single targets: ``weave: woven merge``."""
    return f"{strategy}: {WOVEN}"


def personal_row(strategy: str) -> str:
    """Return the row of a strategy's personal merges: ``personal: personal merge``."""
    return f"{strategy}: {PERSONAL}"


def rows_of(strategy: str, experiment: ExperimentConfig) -> list[str]:
    """Return the rows of a strategy, in their order."""
    head = experiment.head
    own = [woven_row(strategy)] if experiment.weave.schedule is not None else []
    own += [personal_row(strategy)] if experiment.personal.directions is not None else []
    heads = [head_row(strategy, vectors) for vectors in head.vectors] if head.kind else []
    if head.kind == "federated":
        heads.append(f"{strategy}: {FEDERATED_HEAD}")
    return [strategy] * ranks_by_text(head) + own + [row + end for row in heads for end in ("", FUSED)]


@dataclass(frozen=True)
class Bench:
    """A benchmark with valid experiments only.

    Attributes:
        config: the benchmark file.
        base: its experiment file, as flat keys with absolute paths.
    """

    config: BenchConfig
    base: dict[str, Any]
    _validated: dict[tuple[str, str | None, int], ExperimentConfig] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def experiment(self, dataset: str, strategy: str | None, seed: int) -> ExperimentConfig:
        """Return the experiment of one strategy, or for None the one that all strategies of a dataset share.

        Raises:
            ConfigError: the experiment is not valid; all problems at once.
        """
        key = (dataset, strategy, seed)
        if key not in self._validated:  # a grid needs each many times, and validation takes milliseconds
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
            raise ConfigError(f"{where}: set: found {', '.join(wrong)}, set by the benchmark itself; omit it")
        return with_absolute_paths(from_flat({**self.base, **changes, "seed": seed}, where), Path.cwd())


def load_bench(path: Path, overrides: Sequence[str] = ()) -> Bench:
    """Read a benchmark file and validate every experiment in it.

    Args:
        path: TOML file.
        overrides: ``key=value`` pairs that change the experiment file, as for :func:`fedmerge.config.load_config`.

    Raises:
        ConfigError: all problems of the file, or of the first experiment with problems.
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
        _check_dataset(path, bench, dataset)
        for strategy in (None, *(strategy.name for strategy in config.strategy)):
            experiment = bench.experiment(dataset.name, strategy, config.seeds[0])
            shared = bench.experiment(dataset.name, None, config.seeds[0])
            if experiment.admission.rollback:
                raise ConfigError(
                    f"{path}: strategy {strategy}: admission.rollback = true; a benchmark makes no rollback. Omit it."
                )
            if problem := _not_in_one_place(experiment):
                raise ConfigError(f"{path}: strategy {strategy}: {problem}")
            for what, differs in (
                ("[domains]", experiment.domains != shared.domains),
                ("[evaluation]", experiment.evaluation != shared.evaluation),
                ("simulation.attack", experiment.simulation.attack_record() != shared.simulation.attack_record()),
            ):
                if differs:
                    raise ConfigError(
                        f"{path}: strategy {strategy}: {what} differs from its dataset's; strategies are compared on "
                        "the same domains and users. Make it a dataset of its own."
                    )
            if config.joint and len(experiment.domains.train) < 2:
                raise ConfigError(
                    f"{path}: dataset {dataset.name}: found joint, but domains.train names only one; omit joint, or "
                    "name more domains"
                )
            if config.leave_one_out:
                _check_fold(path, dataset.name, strategy, experiment)
    return bench


def _check_dataset(path: Path, bench: Bench, dataset: Dataset) -> None:
    """Raise ConfigError if a dataset tests unknown domains, or has no row that is a baseline."""
    shared = bench.experiment(dataset.name, None, bench.config.seeds[0])
    if unknown := sorted({*dataset.tested} - {*shared.domains.train, *shared.domains.unseen}):
        raise ConfigError(
            f"{path}: dataset {dataset.name}: tested names {', '.join(unknown)}; expected domains of domains.train or "
            "domains.unseen"
        )
    rows = [*REFERENCES]
    for strategy in bench.config.strategy:
        rows += rows_of(strategy.name, bench.experiment(dataset.name, strategy.name, bench.config.seeds[0]))
    rows += shared.evaluation.baselines
    if wrong := [name for name in bench.config.baselines if name not in rows]:
        raise ConfigError(f"{path}: baseline: found {', '.join(map(repr, wrong))}, expected one of {', '.join(rows)}")


def _check_fold(path: Path, dataset: str, strategy: str | None, experiment: ExperimentConfig) -> None:
    """Raise ConfigError if too few domains remain in a fold."""
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
    if experiment.privacy.hides_adapters:
        fold = {
            "domains": experiment.domains.model_copy(update={"train": rest}),
            "lora": experiment.lora.model_copy(update={"ranks": experiment.lora.ranks_of(rest)}),
        }
        from_flat(to_flat(experiment.model_copy(update=fold)), where)


def _not_in_one_place(experiment: ExperimentConfig) -> str:
    """Return the reason why a benchmark's cell cannot do what clients do; empty if it can."""
    learned = {*experiment.merge.methods} & LEARNED_METHODS and experiment.rounds.rule is None
    through_clients = experiment.privacy.learns_through_clients and learned
    needed: list[tuple[str, str | float, str | float]] = [
        ("privacy.metrics", experiment.privacy.metrics, "exact"),
    ]
    if experiment.head.kind == "federated":
        needed.append(("with head.kind = 'federated', rounds.fraction", experiment.rounds.fraction, 1.0))
    if through_clients:
        needed += [
            ("through_clients.users", experiment.through_clients.users, "pseudo-users"),
            ("through_clients.mode", experiment.through_clients.mode, "exact"),
        ]
    if experiment.weave.schedule is not None:
        needed.append(("with weave.schedule, personal.directions", experiment.personal.directions or "none", "none"))
        if experiment.admission.action == "exclude":  # others continue what it excludes
            needed.append(("with weave.schedule, admission.action", "exclude", "flag"))
    if experiment.refines_merges:
        needed += [
            ("with mntp.steps or simcse.steps, rounds.rule", experiment.rounds.rule or "none", "none"),
            ("with mntp.steps or simcse.steps, weave.schedule", experiment.weave.schedule or "none", "none"),
        ]
    for key, found, wanted in needed:
        if found != wanted:
            return f"{key} = {found!r} needs a federation (fedmerge run); set {wanted!r}"
    if through_clients and experiment.dp.mode == "domain-local":
        return (
            "dp.mode = 'domain-local' adds noise to every answer about coefficients, which needs a federation "
            "(fedmerge run); omit learned merges"
        )
    return ""
