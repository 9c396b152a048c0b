"""A grid of training-free and learned merges of a run's adapters, compared on validation users.

    python benchmarks/studies/mergerec/study_mergerec.py CONFIG ADAPTERS GRID --out DIR [--users 1000] [--leave-out D]

CONFIG is the experiment file of the run, ADAPTERS its folder with a PEFT adapter per domain, GRID a TOML file with a
table [[setting]] for each method; a list gives one point per value (lists of several keys: all combinations):

    [[setting]]
    method = "mergerec"                # or adamerging, clients, expert, backbone, any training-free method
    loss = ["rec+kd", "kd"]            # keys of MergeRecSettings, of study_settings, or of the method
    granularity = ["domain", "layer"]
    preset = "default"                 # of mergerec; without it, the published settings
    look_at = [100, 250]               # steps to evaluate besides the last one; not a list of points

Every point is one JSON file in DIR with its coefficients and the ranks of the users, written atomically; a point whose
file exists is not computed again. Left-out domains are evaluated as unseen. The table is printed at the end; --table
prints it for all points in one or more DIRs: adapters of several seeds, each domain left out in turn. A user's outcome
is then the mean over seeds; differences to --baseline are paired over users, with 95 % half-widths, not corrected for
the number of points.

--split test is for a single evaluation of a committed configuration; nothing is selected by it.
"""

import argparse
import hashlib
import itertools
import json
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from learning_on_clients import learn_on_clients, study_settings

from fedmerge.adapter import Adapter, adapter_sha256
from fedmerge.client.local_domain import LocalDomain, open_domain
from fedmerge.config import ExperimentConfig, Split, load_config
from fedmerge.device import resolve_compute
from fedmerge.domain.splits import evaluation_examples
from fedmerge.encoder.backbone import Backbone, open_backbone
from fedmerge.encoder.encode import encode
from fedmerge.encoder.lora import applied
from fedmerge.encoder.peft.folder import read_verified
from fedmerge.errors import ConfigError
from fedmerge.evaluation.ranks import METRICS, per_user_metrics, rank_targets
from fedmerge.evaluation.sums import Variant
from fedmerge.files import write_json
from fedmerge.mergerec.coefficients import start_coefficients
from fedmerge.mergerec.learn import learn_coefficients, student_vectors
from fedmerge.mergerec.objective import ADAMERGING, PAPER, MergeRecSettings
from fedmerge.mergerec.pseudo_users import (
    CONTRASTIVE_KINDS,
    PseudoDomain,
    average_of_others,
    one_item_domain,
    popular_domain,
    pseudo_domain,
    with_amateur,
)
from fedmerge.mergerec.similarity import union_similarity
from fedmerge.mergerec.vectors import TASK_VECTORS, Vectors, initial_vectors, merge_vectors
from fedmerge.merging.stack import Stack, stack_adapters
from fedmerge.merging.training_free import merge_adapters

Point = dict[str, Any]
Merge = tuple[int | None, Any, Mapping[str, Adapter | None]]  # step, coefficients, domain -> adapter
Outcomes = list[npt.NDArray[np.float64]]  # (users, metrics) of each seed
Rows = dict[str, dict[bool, dict[str, Outcomes]]]  # row -> is unseen -> domain


class Study:
    """Adapters, domains and values that several points share, since encoding a catalog takes longer than learning."""

    def __init__(
        self, config: ExperimentConfig, adapters: Path, left_out: Sequence[str], users: int | None, split: Split
    ) -> None:
        """Open everything; domains of train and unseen without an adapter are unseen."""
        torch.set_num_threads(config.runtime.server_threads)
        compute = resolve_compute(config.runtime.device, config.runtime.precision)
        self.config, self.users, self.split = config, users, split
        self.backbone: Backbone = open_backbone(config.backbone, compute)
        names = sorted({*config.domains.train, *config.domains.unseen})
        self.evaluated = names
        self.domains = {n: open_domain(Path(config.domains.root) / n, self.backbone, config.text) for n in names}
        self.adapters = {n: read_verified(adapters / n) for n in sorted(config.domains.train) if n not in left_out}
        self.stack: Stack = stack_adapters(self.adapters)
        self.items: dict[str, PseudoDomain] = {}
        self.pseudo: dict[tuple[Any, ...], dict[str, PseudoDomain]] = {}
        self.vectors: dict[str, Vectors] = {}
        self.students: dict[tuple[str, float | None], dict[str, torch.Tensor]] = {}

    def identity(self) -> dict[str, Any]:
        """Return the inputs that every point depends on."""
        return {
            "adapters": {name: adapter_sha256(adapter) for name, adapter in self.adapters.items()},
            "catalogs": {name: domain.manifest.catalog_sha256 for name, domain in self.domains.items()},
            "backbone": self.backbone.sha256,
            "text": self.config.text.cache_inputs(),
            "users": self.users,
            **({} if self.split == "valid" else {"split": self.split, "evaluated": self.evaluated}),
        }

    def vectors_of(self, initialisation: str) -> Vectors:
        """Return the vectors of an initialisation, made once."""
        if initialisation not in self.vectors:
            self.vectors[initialisation] = initial_vectors(self.stack, initialisation)
        return self.vectors[initialisation]

    def pseudo_users(self, kind: str, number: int | None, seed: int) -> dict[str, PseudoDomain]:
        """Return the pseudo-users of a kind, made once."""
        key = (kind, number, seed)
        if key not in self.pseudo:
            self.pseudo[key] = {name: self._pseudo_domain(name, kind, number, seed) for name in self.adapters}
        return self.pseudo[key]

    def _pseudo_domain(self, name: str, kind: str, number: int | None, seed: int) -> PseudoDomain:
        domain, expert, text = self.domains[name], self.adapters[name], self.config.text
        if name not in self.items:
            self.items[name] = one_item_domain(name, self.backbone, expert, domain.table, text)
        items = self.items[name]
        if kind == "popular":
            counts = np.bincount(np.concatenate(domain.training_sequences), minlength=len(domain.catalog))
            return popular_domain(items, counts, len(items.items) if number is None else number)
        amateur = average_of_others(self.adapters, name) if kind in CONTRASTIVE_KINDS else None
        return pseudo_domain(
            kind, items, self.backbone, expert, domain.table, text, number=number, seed=seed, amateur=amateur
        )

    def contrasted(self, pseudo: Mapping[str, PseudoDomain]) -> dict[str, PseudoDomain]:
        """Return pseudo-users with the vectors that a contrastive teacher has."""
        others = {name: average_of_others(self.adapters, name) for name in pseudo}
        return {name: with_amateur(domain, self.backbone, others[name]) for name, domain in pseudo.items()}

    def merges(self, point: Point) -> Iterator[Merge]:
        """Yield every merge of a point."""
        keys = {key: value for key, value in point.items() if key not in ("method", "look_at", "name")}
        method, look_at = point["method"], point.get("look_at", [])

        def everywhere(adapter: Adapter | None) -> dict[str, Adapter | None]:
            return dict.fromkeys(self.domains, adapter)

        if method == "backbone":
            yield None, None, everywhere(None)
        elif method == "expert":
            yield None, None, {name: self.adapters[name] for name in self.domains if name in self.adapters}
        elif method in ("mergerec", "adamerging", "clients"):
            start = torch.tensor(keys.pop("start")) if "start" in keys else None
            if method == "clients":
                vectors = self.vectors_of(keys.pop("initialisation", "task-vectors"))
                clients = [self.domains[name] for name in self.adapters]
                learned = learn_on_clients(clients, vectors, *study_settings(keys), start=start)
            else:
                settings = settings_of(method, keys)
                vectors = self.vectors_of(settings.initialisation)
                pseudo = self.pseudo_users(settings.pseudo_users, settings.num_pseudo_users, settings.seed)
                union = None
                if settings.compares_items:
                    items = {name: domain.items for name, domain in pseudo.items()}
                    union = union_similarity(self.backbone, self.adapters, items, settings)
                if settings.teacher == "contrastive":
                    pseudo = self.contrasted(pseudo)
                students = None
                if start is None and settings.terms_of_users:
                    place = (settings.initialisation, settings.start)
                    if place not in self.students:
                        initial = start_coefficients(vectors, "domain", settings.start)
                        self.students[place] = student_vectors(self.backbone, vectors, pseudo, initial)
                    students = self.students[place]
                learned = learn_coefficients(
                    self.backbone, vectors, pseudo, settings, students=students, start=start, union=union
                )
            for step in sorted({*look_at, learned.chosen_step}):
                coefficients = learned.trajectory[step]
                yield step, coefficients.tolist(), everywhere(merge_vectors(vectors, coefficients))
        else:
            yield None, None, everywhere(merge_adapters(self.adapters, method, **keys).adapter)

    def ranks(self, domain: LocalDomain, adapter: Adapter | None) -> dict[Variant, list[int]]:
        """Return the ranks of the users' targets; the users are the same for all points."""
        examples = evaluation_examples(domain.interactions, self.split, self.users, self.config.seed)
        packed = domain.packed(examples.histories)
        with applied(self.backbone, adapter):
            items, users = encode(self.backbone, domain.item_sequences), encode(self.backbone, packed)
        return {
            "unmasked": rank_targets(users, items, examples.targets).tolist(),
            "masked": rank_targets(users, items, examples.targets, examples.histories).tolist(),
        }


def settings_of(method: str, keys: Mapping[str, Any]) -> MergeRecSettings:
    """Return the published settings of a learned method, or those of a preset, with changed keys."""
    changes = {key: value for key, value in keys.items() if key != "preset"}
    if keys.get("preset") == "default":
        return MergeRecSettings(**changes)
    rows = changes.get("initialisation", TASK_VECTORS) != TASK_VECTORS
    start = {"initial_coefficient": None} if rows else {}  # 1, the method's own merge
    return replace(PAPER if method == "mergerec" else ADAMERGING, **(start | changes))


def points_of(grid: Path) -> list[Point]:
    """Return the points of a grid file, each once, in order."""
    points: list[Point] = []
    for setting in tomllib.loads(grid.read_text(encoding="utf-8")).get("setting", []):
        fixed = {key: setting[key] for key in ("look_at", "start") if key in setting}
        keys = [key for key in setting if key not in fixed]
        values = [setting[key] if isinstance(setting[key], list) else [setting[key]] for key in keys]
        points += [dict(zip(keys, chosen, strict=True)) | fixed for chosen in itertools.product(*values)]
    if not points or any("method" not in point for point in points):
        raise ConfigError(f"{grid}: expected tables [[setting]], each with the key method")
    return [point for index, point in enumerate(points) if point not in points[:index]]


def title(point: Point, step: int | None, steps: int) -> str:
    """Return the name of a row of the table."""
    keys = [f"{key}={value}" for key, value in point.items() if key not in ("method", "look_at", "name")]
    at = f" @{step}" if steps > 1 else ""
    return str(point.get("name", " ".join([point["method"], *keys]))) + at


def pooled(records: Sequence[Mapping[str, Any]], variant: Variant) -> Rows:
    """Return every merge's outcomes over the records of one point: row -> is unseen -> domain."""
    rows: Rows = {}
    for record in records:
        for merge in record["merges"]:
            name = title(record["point"], merge["step"], len(record["merges"]))
            for domain, ranks in merge["ranks"].items():
                of_role = rows.setdefault(name, {False: {}, True: {}})[domain not in record["trained"]]
                of_role.setdefault(domain, []).append(per_user_metrics(np.array(ranks[variant])))
    return rows


def print_table(rows: Rows, baseline: str) -> None:
    """Print means over domains and paired differences to the baseline, for merged and for unseen domains."""
    reference = rows.get(baseline, next(iter(rows.values())))
    width = max(map(len, rows))
    recall, ndcg = METRICS.index("recall@10"), METRICS.index("ndcg@10")
    for unseen in (False, True):
        if not reference[unseen]:
            continue
        print("\nunseen domains" if unseen else "\nmerged domains")
        print(f"{'':<{width}}  recall@10  ndcg@10  differences to {baseline!r}, paired; ndcg@10 by domain, run")
        for name, row in rows.items():
            if not row[unseen]:
                continue
            outcomes = {domain: np.mean(seeds, axis=0) for domain, seeds in row[unseen].items()}  # (users, metrics)
            means = np.mean([values.mean(axis=0) for values in outcomes.values()], axis=0)
            paired = {
                domain: values - np.mean(reference[unseen][domain], axis=0)
                for domain, values in outcomes.items()
                if domain in reference[unseen]
            }
            seeds = [
                np.mean([a[:, ndcg].mean() - b[:, ndcg].mean() for a, b in zip(*pair, strict=True)])
                for pair in _by_seed(row[unseen], reference[unseen])
            ]
            cells = [
                f"{name:<{width}}     {means[recall]:.4f}   {means[ndcg]:.4f}",
                *(_interval([values[:, metric] for values in paired.values()]) for metric in (recall, ndcg)),
                *(
                    f"{domain} {values[:, ndcg].mean():.4f} ({_interval([paired[domain][:, ndcg]])})"
                    for domain, values in outcomes.items()
                    if domain in paired
                ),
                "runs " + " ".join(f"{value:+.4f}" for value in seeds) if len(seeds) > 1 else "",
            ]
            print("  ".join(cells).rstrip())


def _interval(differences: Sequence[npt.NDArray[np.float64]]) -> str:
    """Return the mean over domains, and the half-width of its 95 % interval over users."""
    mean = np.mean([values.mean() for values in differences])
    half = 1.96 * np.sqrt(sum(values.var(ddof=1) / len(values) for values in differences)) / len(differences)
    return f"{mean:+.5f} ± {half:.5f}"


def _by_seed(row: Mapping[str, Outcomes], reference: Mapping[str, Outcomes]) -> Iterator[tuple[Outcomes, Outcomes]]:
    """Yield the outcomes of all domains of both rows, seed by seed, if the numbers of seeds are equal."""
    counts = {len(seeds) for of in (row, reference) for seeds in of.values()}
    if len(counts) == 1 and row.keys() == reference.keys():
        for index in range(counts.pop()):
            yield [row[d][index] for d in row], [reference[d][index] for d in row]


def main() -> None:
    """Compute the missing points, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("adapters", type=Path)
    parser.add_argument("grid", type=Path)
    parser.add_argument(
        "--out", type=Path, nargs="+", required=True, help="points are written to the first; the table has all"
    )
    parser.add_argument("--set", nargs="+", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--leave-out", nargs="+", default=[], metavar="DOMAIN", help="evaluated as unseen")
    parser.add_argument("--unseen-only", action="store_true", help="evaluate only the left-out domains")
    parser.add_argument("--users", type=int, default=1000, help="users per domain, 0: all")
    parser.add_argument("--split", choices=["valid", "test"], default="valid")
    parser.add_argument("--baseline", default="average")
    parser.add_argument("--table", action="store_true", help="print the table of the existing points")
    options = parser.parse_args()
    points = points_of(options.grid)
    if not options.table:
        config = load_config(options.config, options.overrides)
        study = Study(config, options.adapters, options.leave_out, options.users or None, options.split)
        if options.unseen_only:
            study.evaluated = sorted(set(study.evaluated) - set(study.adapters))
        options.out[0].mkdir(parents=True, exist_ok=True)
        for point in points:
            compute(study, point, options.out[0])
    records = [
        json.loads(path.read_text(encoding="utf-8")) for out in options.out for path in sorted(out.glob("*.json"))
    ]
    records = [record for record in records if record["point"] in points]
    records.sort(key=lambda record: points.index(record["point"]))
    for variant in ("unmasked", "masked") if records else ():
        print(f"\n{variant}, {' and '.join(sorted({record['split'] for record in records}))}")
        print_table(pooled(records, variant), options.baseline)


def compute(study: Study, point: Point, out: Path) -> None:
    """Compute one point, unless its file exists."""
    key = json.dumps({"point": point, **study.identity()}, sort_keys=True)
    path = out / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    if path.exists():
        return
    started = time.monotonic()
    merges = [
        {
            "step": step,
            "coefficients": coefficients,
            "ranks": {
                name: study.ranks(study.domains[name], adapter)
                for name, adapter in adapters.items()
                if name in study.evaluated
            },
        }
        for step, coefficients, adapters in study.merges(point)
    ]
    seconds = time.monotonic() - started
    record = {"point": point, "split": study.split, "trained": sorted(study.adapters), "seconds": seconds}
    write_json(path, {**record, "merges": merges})
    print(f"{title(point, None, 1)}: {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
