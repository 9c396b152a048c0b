"""Run folders as written by `fedmerge run`, created without Flower: tiny backbone, small shops, random experts."""

import hashlib
import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from adapters import layout_of, merges_of, random_adapter
from backbones import tiny_bert

from fedmerge.adapter import adapter_sha256
from fedmerge.cli import main
from fedmerge.config import load_config
from fedmerge.device import resolve_compute
from fedmerge.domain.catalog import load_catalog
from fedmerge.domain.demo import generate_domain
from fedmerge.domain.folder import write_domain
from fedmerge.encoder.backbone import Backbone, load_backbone
from fedmerge.encoder.peft.folder import write_adapter
from fedmerge.evaluation.ranks import METRICS
from fedmerge.files import write_json, write_table, write_text
from fedmerge.runs.checkpoints import write_candidate
from fedmerge.runs.folder import DONE, FILES, create_run

TRAIN, UNSEEN = ("books", "coffee", "toys"), "camping"
NUM_USERS, NUM_ITEMS = 12, 20
RESULTS = ("experts.json", "admission.json", "choice.json", "metrics.parquet", "products.parquet", "report.txt")
SETTINGS = [
    "runtime.device=cpu",
    "runtime.precision=float32",
    "runtime.server_threads=1",
    "text.max_tokens=96",
    "text.max_items=3",
    "text.max_attribute_tokens=12",
    "merge.task_arithmetic_coefficients=0.5",
    "mergerec.granularities=domain",
    "mergerec.steps=2",
    "train.max_steps=7",
]


@dataclass(frozen=True)
class Place:
    """Domains, a backbone and a folder for runs."""

    root: Path

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @property
    def domains(self) -> Path:
        return self.root / "domains"

    @property
    def settings(self) -> list[str]:
        return [
            *SETTINGS,
            f"output_dir={self.runs}",
            f"domains.root={self.domains}",
            f"domains.train={','.join(TRAIN)}",
            f"domains.unseen={UNSEEN}",
            f"backbone.source={self.root / 'backbone'}",
        ]

    def backbone(self) -> Backbone:
        return load_backbone(str(self.root / "backbone"), "mean", resolve_compute("cpu", "float32"))


def make_place(root: Path) -> Place:
    place = Place(root)
    for name in (*TRAIN, UNSEEN):
        shop = generate_domain(name, num_users=NUM_USERS, num_items=NUM_ITEMS)
        write_domain(
            place.domains / name, shop.catalog, shop.interactions, public_catalog=True, synthetic=True, source="a test"
        )
    tiny_bert(root / "backbone")
    return place


def make_run(place: Place, run_id: str, more: Sequence[str] = ()) -> Path:
    """Write a finished run; ndcg@10 of the average is 0.25 on books, 0.5 on coffee and 0.75 on toys."""
    config = load_config(None, [*place.settings, f"run_id={run_id}", *more])
    backbone, folder = place.backbone(), create_run(config)
    adapters = {name: random_adapter(layout_of(backbone), 2, 1.5, seed) for seed, name in enumerate(TRAIN)}
    for name, adapter in adapters.items():
        write_adapter(adapter, folder / "adapters" / name, backbone.name)
        report = {"steps": 7, "best_step": 6, "stopped_by": "max_steps", "seconds": 12.0, "validations": [{"step": 0}]}
        write_json(folder / "adapters" / name / "training.json", {**report, "sha256": adapter_sha256(adapter)})
    catalogs = {name: load_catalog(place.domains / name) for name in (*TRAIN, UNSEEN)}
    candidates = merges_of(backbone, adapters, {name: catalogs[name] for name in TRAIN}, config)
    for candidate in candidates:
        write_candidate(folder, candidate, backbone.name)
    scores = {candidate.label: 0.3 for candidate in candidates} | {"average": 0.4}
    best = {candidate.method: candidate.label for candidate in candidates}
    write_json(
        folder / "choice.json", {"metric": "ndcg@10", "validation": scores, "best_variants": best, "served": "average"}
    )
    rows = [
        {
            "split": split,
            "variant": variant,
            "domain": name,
            "role": "unseen" if name == UNSEEN else "train",
            "method": method,
            "metric": metric,
            "num_users": NUM_USERS,
            "sum": NUM_USERS * 0.25 * (number + 1) * (1.0 if (split, variant, method) == MEASURED else 0.1),
        }
        for split in ("valid", "test")
        for variant in ("unmasked", "masked")
        for number, name in enumerate((*TRAIN, UNSEEN))
        for method in ("average", "expert")
        for metric in METRICS
    ]
    write_table(folder / "metrics.parquet", rows)
    participants = {
        name: {
            "domain": name,
            "role": "unseen" if name == UNSEEN else "train",
            "num_users": NUM_USERS,
            "num_items": NUM_ITEMS,
            "num_interactions": 1234,
            "synthetic": True,
            "catalog_sha256": catalogs[name].sha256,
            "backbone_sha256": backbone.sha256,
        }
        for name in (*TRAIN, UNSEEN)
    }
    excluded = {"garden (node 7)": "query.describe failed: DomainError: damaged"}
    write_json(folder / "clients.json", {"participants": participants, "excluded": excluded})
    write_text(folder / "report.txt", "SYNTHETIC DATA\nthe tables\n")
    write_text(folder / "run.log", f"09:00:00 run folder: {folder}\n09:01:30 done in 90 s, run folder: {folder}\n")
    write_text(folder / DONE, "finished after 90 s\n")
    return folder


MEASURED = ("test", "unmasked", "average")


def contents(folder: Path) -> dict[str, str]:
    """Return path -> hash of every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def output(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Run a command that succeeds; return its standard output."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Run a command that fails with a message only; return its standard error."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert (code, captured.out) == (1, "")
    assert captured.err.startswith("fedmerge: ")
    assert "Traceback" not in captured.err
    return captured.err


@contextmanager
def full_disk(largest_file_bytes: int) -> Iterator[None]:
    """Limit the size of files within the context, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def hash_results(run: Path) -> dict[str, str]:
    """Hash everything in a run folder that must be equal in an equal run: neither logs nor seconds."""
    files = [run / name for name in RESULTS if (run / name).exists()]
    for pattern in ("*/*/adapter_*", "merged/*/provenance.json", "validation/*", "test/*"):
        files += run.glob(pattern)
    return {str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(files)}


def unlisted_files(run: Path) -> list[str]:
    """List what lies in a run folder and is missing in the table of its files."""
    listed = {name.partition("/")[0] for names in FILES for name in names.split(", ")}
    return sorted({path.name for path in run.iterdir()} - listed)
