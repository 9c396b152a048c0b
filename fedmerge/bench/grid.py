"""A benchmark's grid of datasets, seeds, folds and strategies, and the files of its folder.

DIR/benchmark.json                    the benchmark and its experiment, resolved, and the split of users into batches; a
                                      resumed benchmark must have the same
DIR/training/<experiment>/            run folders that end with the experts
DIR/joint/<dataset>/<seed>/<fold>/<drawing>/      joint.json, adapter/: trained on pooled data, which breaks isolation
DIR/admission/<dataset>/<seed>/<fold>/<gate>.json     record of the admission gate, for strategies that have one
DIR/merges/<dataset>/<seed>/<fold>/<strategy>/    merges.json, merged/<label>/; choice.json after the selection
DIR/clients/<dataset>/<domain>/       ranks per user, audits, personal merges: represents the clients' disks
the tables of fedmerge.report.bench_tables
"""

import json
from dataclasses import dataclass
from pathlib import Path

from fedmerge.bench.cells import JOINT, is_one_shot
from fedmerge.bench.config import Bench, Dataset, Drawing
from fedmerge.client.cache.experts import BATCHES
from fedmerge.client.cache.folders import inputs_key
from fedmerge.config import SIGNAL_METHODS, Admission, ExperimentConfig, Head, Personal, Rounds, Split, Weave, flatten
from fedmerge.config.privacy import Policy
from fedmerge.errors import ConfigError, RunDirError
from fedmerge.files import read_json, write_json

BENCHMARK = "benchmark.json"
OF_TABLES = {"benchmark.title", "benchmark.baseline"}  # what decides about a benchmark's tables alone


@dataclass(frozen=True)
class Place:
    """A column of the grid: one dataset, one seed, and the domain left out of the merge ("" for none)."""

    dataset: str
    seed: int
    left_out: str

    @property
    def fold(self) -> str:
        """Name of the folder."""
        return f"without-{self.left_out}" if self.left_out else "all"

    def __str__(self) -> str:
        """Title in progress and errors."""
        return f"{self.dataset}, seed {self.seed}" + (f", without {self.left_out}" if self.left_out else "")


@dataclass(frozen=True)
class Grid:
    """A benchmark and its folder."""

    bench: Bench
    folder: Path

    def experiment(self, place: Place, strategy: str | None) -> ExperimentConfig:
        """Return a strategy's experiment at a place of the grid."""
        return self.bench.experiment(place.dataset, strategy, place.seed)

    def evaluation(self, place: Place, strategy: str | None) -> ExperimentConfig:
        """Return the same with the seed that selects the evaluated users, which the whole benchmark shares."""
        return self.bench.experiment(place.dataset, strategy, int(self.bench.base["seed"]))

    def training(self, place: Place, strategy: str | None) -> ExperimentConfig:
        """Return the training run of a strategy, shared by all strategies with equal training and by all folds.

        The policy does not change experts trained once, so strategies of all policies share them. A federation of
        rounds is a run of its own, without the left-out domain, and so is a weaving, whose experts come from the cache.
        """
        wanted = self.experiment(place, strategy)
        runtime, rounds, woven = wanted.runtime, not is_one_shot(wanted.rounds), wanted.weave.schedule is not None
        left_out = place.left_out if rounds or woven else ""
        domains = tuple(domain for domain in wanted.domains.train if domain != left_out)
        policy: Policy = wanted.privacy.policy if rounds or woven else "adapter+catalog"
        simulation = wanted.simulation
        if simulation.attacker not in domains:  # a left-out attacker poisons nothing
            simulation = simulation.model_copy(update={"attacker": None})
        sections = [wanted.backbone, wanted.text, wanted.lora, wanted.train]
        sections += [wanted.rounds, wanted.mergerec, wanted.adamerging] if rounds else []
        optional = [simulation.attack_record()] if simulation.attacker else []
        optional += [wanted.dp.model_dump()] if wanted.dp.mode != "none" else []
        optional += [simulation.audit_record()] if simulation.audited else []
        optional += [{k: v for k, v in wanted.weave.cache_inputs().items() if k != "factors"}] if woven else []
        inputs = {
            "domains": [wanted.domains.root, sorted(domains)],
            "sections": [section.cache_inputs() for section in sections] + optional,
            "runtime": [runtime.threads_per_client, runtime.device, runtime.precision],
            "policy": policy,
            "transport": wanted.privacy.transport,
            **({"threshold": wanted.privacy.threshold} if policy == "aggregate-only" else {}),
            **({"signals": wanted.livar.spread} if wanted.sends_signals else {}),  # the cached experts, sent once more
        }
        methods = [method for method in wanted.merge.methods if method in SIGNAL_METHODS and wanted.sends_signals]
        changes = {
            "name": "bench",
            "run_id": f"{place.dataset}-seed{place.seed}-{inputs_key(inputs)[:8]}",
            "output_dir": str(self.folder / "training"),
            "until": "train",
            "domains": wanted.domains.model_copy(update={"train": domains, "unseen": ()}),
            "lora": wanted.lora.model_copy(update={"ranks": wanted.lora.ranks_of(domains)}),
            "merge": wanted.merge.model_copy(update={"methods": ("average", *methods)}),
            "rounds": wanted.rounds if rounds else Rounds(),
            "weave": wanted.weave.model_copy(update={"factors": Weave().factors}),
            "admission": Admission(),
            "head": Head(),
            "personal": Personal(),
            "simulation": simulation,
            "privacy": wanted.privacy.model_copy(update={"policy": policy}),
        }
        return wanted.model_copy(update=changes)

    def run(self, place: Place, strategy: str | None) -> Path:
        """Return the folder of the training run."""
        return self.folder / "training" / str(self.training(place, strategy).run_id)

    def gate(self, place: Place, strategy: str) -> Path | None:
        """Return the file of the gate's record, shared by strategies with the same gate; None without a gate."""
        config = self.evaluation(place, strategy)
        if config.admission.action != "exclude":
            return None
        inputs = {"admission": config.admission.model_dump(), "run": self.run(place, strategy).name}
        folder = self.folder / "admission" / place.dataset / f"seed{place.seed}" / place.fold
        return folder / f"{inputs_key(inputs)[:8]}.json"

    def excluded_by_gate(self, place: Place, strategy: str) -> dict[str, str]:
        """Return domain -> reason, for the experts that a strategy's gate excludes from the merges."""
        gate = self.gate(place, strategy)
        failed: dict[str, str] = (read_json(gate) or {}).get("failed", {}) if gate else {}
        return failed

    def merges(self, place: Place, strategy: str) -> Path:
        """Return the folder of a strategy's merges."""
        return self._at(place, "merges") / strategy

    def federated_head(self, place: Place, strategy: str) -> Path:
        """Return the record of a strategy's federated head."""
        return self.merges(place, strategy) / "federated-head.json"

    def personal(self, place: Place, strategy: str, domain: str) -> Path:
        """Return the record of a domain's personal merge."""
        folder = self.folder / "clients" / place.dataset / domain / "personal"
        return folder / f"seed{place.seed}" / place.fold / f"{strategy}.json"

    def joint(self, place: Place, drawing: Drawing) -> Path:
        """Return the file that joint training writes last."""
        return self._at(place, "joint") / drawing / JOINT

    def _at(self, place: Place, what: str) -> Path:
        return self.folder / what / place.dataset / f"seed{place.seed}" / place.fold

    @property
    def strategies(self) -> list[str]:
        """Names of the strategies, in the order of the file."""
        return [strategy.name for strategy in self.bench.config.strategy]

    def dataset(self, place: Place) -> Dataset:
        """Return the dataset of a place."""
        (dataset,) = (dataset for dataset in self.bench.config.dataset if dataset.name == place.dataset)
        return dataset

    def test_root(self, place: Place, split: Split) -> str | None:
        """Return the folder of domains whose users are ranked, where it is not the experiment's."""
        root = self.dataset(place).test_root
        return str(Path(root).expanduser().absolute()) if root and split == "test" else None

    def places(self) -> list[Place]:
        """Return all places, those without a left-out domain first."""
        config = self.bench.config
        whole = [Place(dataset.name, seed, "") for dataset in config.dataset for seed in config.seeds]
        folds = [
            Place(place.dataset, place.seed, domain)
            for place in whole
            for domain in self.experiment(place, None).domains.train
            if config.leave_one_out and domain in (self.dataset(place).tested or (domain,))
        ]
        return whole + folds

    def joint_rows(self, place: Place) -> tuple[Drawing, ...]:
        """Return the rows of joint training at a place."""
        config = self.bench.config
        return () if place.left_out and not config.joint_folds else config.joint


def open_folder(folder: Path, bench: Bench) -> None:
    """Create a benchmark's folder, or check that an existing one belongs to this benchmark.

    Title and baselines decide about its tables alone, so they may differ; the folder then has the new ones.

    Raises:
        ConfigError: the folder holds another benchmark, cells trained with another split of users into batches, or
            other files.
        RunDirError: the folder cannot be written.
    """
    wanted = {"benchmark": bench.config.model_dump(mode="json"), "experiment": bench.base, "batches": BATCHES}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        others = any(folder.iterdir())
    except OSError as error:
        raise RunDirError(f"{folder}: cannot be created ({error.strerror}). Give --out a writable folder.") from error
    kept = read_json(folder / BENCHMARK)
    if kept is None:
        if others:
            raise ConfigError(f"{folder}: holds files that are not a benchmark; give --out a new or empty folder")
        write_json(folder / BENCHMARK, wanted)
    elif kept != json.loads(json.dumps(wanted)):
        flat = {name: flatten(of) for name, of in {"kept": kept, "wanted": wanted}.items()}
        keys = [key for key in {**flat["kept"], **flat["wanted"]} if flat["kept"].get(key) != flat["wanted"].get(key)]
        if set(keys) <= OF_TABLES:
            write_json(folder / BENCHMARK, wanted)
            return
        if keys == ["batches"]:
            raise ConfigError(
                f"{folder}: its trainings split users into batches as {kept.get('batches', 'floor')!r}, expected "
                f"{BATCHES!r}; new cells could not be compared with them. Give --out another folder."
            )
        raise ConfigError(
            f"{folder}: belongs to another benchmark; {', '.join(sorted(keys))} differ. Give --out another folder, "
            "or restore the benchmark's files."
        )
