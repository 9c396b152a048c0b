"""The server side reaches no interactions, and the app that Flower ships carries no data."""

import json
import shutil
import subprocess
import sys
import zipfile
from io import BytesIO
from pathlib import Path

import pytest
from adapters import layout_of, random_adapter
from backbones import tiny_bert
from flwr.cli.build import build_fab_from_disk

from fedmerge.device import resolve_compute
from fedmerge.domain.demo import write_demo
from fedmerge.domain.interactions import INTERACTIONS_FILE
from fedmerge.encoder.backbone import load_backbone
from fedmerge.encoder.peft.folder import write_adapter

REPOSITORY = Path(__file__).resolve().parents[2]
DOMAINS = ("beauty", "books", "camping")
SECRET = "user-4711-bought-item-42"

GUARD = '''
import sys

FORBIDDEN = {"fedmerge.domain.interactions", "fedmerge.domain.splits", "fedmerge.domain.folder"}


class Reached(BaseException):
    """Nothing that catches exceptions can hide it."""


def on_event(event, arguments):
    if event == "open" and "interactions" in str(arguments[0]):
        raise Reached(f"opens {arguments[0]}")


class Guard:
    def find_spec(self, name, path=None, target=None):
        if name in FORBIDDEN:
            raise Reached(f"imports {name}")


sys.addaudithook(on_event)
sys.meta_path.insert(0, Guard())
'''

SERVER = """
import json
from pathlib import Path

import numpy as np
import torch

import sim.app.server.app  # what Flower loads on the server
from fedmerge.adapter import adapter_sha256
from fedmerge.config import load_config
from fedmerge.device import resolve_compute
from fedmerge.domain.catalog import load_catalog
from fedmerge.encoder.backbone import load_backbone
from fedmerge.encoder.peft.folder import read_adapter, write_adapter
from fedmerge.evaluation.ranks import per_user_metrics
from fedmerge.evaluation.sums import metric_sums
from fedmerge.merging.candidate import Origin
from fedmerge.encoder.lora import expected_layout
from fedmerge.server.reply_checks import check_adapter
from fedmerge.server.candidates import learn_from_catalogs, merge_candidates, recipe_of
from fedmerge.server.choice import choose

torch.set_num_threads(1)
root, names = Path(sys.argv[1]), sys.argv[2].split(",")
config = load_config(None, ["lora.rank=2", "lora.alpha=4", "text.max_tokens=32", "mergerec.steps=3"])
backbone = load_backbone(str(root / "backbone"), "mean", resolve_compute("cpu", "float32"))
layout = expected_layout(backbone, config.lora)
adapters = {name: read_adapter(root / "adapters" / name) for name in names}
for name, adapter in adapters.items():
    check_adapter(name, adapter, layout)
catalogs = {name: load_catalog(root / "domains" / name) for name in names}
hashes = {name: adapter_sha256(adapter) for name, adapter in adapters.items()}
origin = Origin(hashes, backbone.record, config.privacy.policy)
recipe, learn = recipe_of(config), learn_from_catalogs(backbone, adapters, catalogs, config.text)
candidates = merge_candidates(adapters, recipe.variants(), origin, recipe, learn=learn)
ranks = {candidate.label: np.array([20 - number, 1 + number]) for number, candidate in enumerate(candidates)}
sums = metric_sums({label: per_user_metrics(of_label) for label, of_label in ranks.items()}, "unmasked")
_, served, _ = choose(candidates, {name: sums for name in names}, names, "ndcg@10")
chosen = next(candidate for candidate in candidates if candidate.label == served)
write_adapter(chosen.adapter, root / "served", backbone.name)
assert adapter_sha256(read_adapter(root / "served")) == chosen.provenance.sha256
loaded = sorted(name for name in sys.modules if name.startswith("fedmerge."))
print(json.dumps({"labels": [candidate.label for candidate in candidates], "served": served, "loaded": loaded}))
"""


def run_python(program: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=folder, capture_output=True, text=True, check=False
    )


def test_merging_choosing_and_admission_need_no_interactions(tmp_path: Path) -> None:
    write_demo(tmp_path / "domains", num_domains=len(DOMAINS), num_users=10, num_items=20)
    for name in DOMAINS:  # Parquet readers open files in C++, where no hook of Python sees it
        (tmp_path / "domains" / name / INTERACTIONS_FILE).unlink()
    backbone = load_backbone(str(tiny_bert(tmp_path / "backbone")), "mean", resolve_compute("cpu", "float32"))
    for seed, name in enumerate(DOMAINS):
        adapter = random_adapter(layout_of(backbone, ("query", "value")), 2, 2.0, seed)
        write_adapter(adapter, tmp_path / "adapters" / name, "tiny")

    done = run_python(GUARD + SERVER, str(tmp_path), ",".join(DOMAINS), folder=tmp_path)

    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["labels"] == [
        "average",
        *(f"task-arithmetic {coefficient}" for coefficient in (0.2, 0.4, 0.6, 0.8)),
        "mergerec layer-wise",
    ]
    assert result["served"] == "average"
    assert "fedmerge.domain.catalog" in result["loaded"]


@pytest.mark.parametrize(
    ("reach", "message"),
    [
        ("open(sys.argv[1]).read()", "Reached: opens "),
        ("from pathlib import Path; Path(sys.argv[1]).read_bytes()", "Reached: opens "),
        ("import fedmerge.domain.interactions", "Reached: imports fedmerge.domain.interactions"),
        ("from fedmerge.domain.splits import train_sequences", "Reached: imports fedmerge.domain.splits"),
        ("from fedmerge.domain import folder", "Reached: imports fedmerge.domain.folder"),
        ("import sim.app.client.app", "Reached: imports fedmerge.domain."),
        ("from fedmerge.client.evaluate import evaluate", "Reached: imports fedmerge.domain."),
    ],
)
def test_the_guard_bites(tmp_path: Path, reach: str, message: str) -> None:
    private = tmp_path / INTERACTIONS_FILE
    private.write_text(SECRET)
    program = GUARD + f"try:\n    {reach}\nexcept Exception:\n    pass\n"
    done = run_python(program, str(private), folder=tmp_path)
    assert done.returncode == 1
    assert message in done.stderr
    assert SECRET not in done.stdout


def test_the_app_that_flower_ships_holds_its_code_and_nothing_else(tmp_path: Path) -> None:
    app = tmp_path / "app"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "runs", "build", "dist")
    shutil.copytree(REPOSITORY, app, ignore=ignored)  # without .gitignore, which would help
    planted = [
        "interactions.parquet",
        "manifest.json",
        "users.jsonl",
        "notes.md",
        "data/beauty/interactions.parquet",
        "data/beauty/train.json",
        "runs/demo/metrics.parquet",
        "runs/demo/clients.json",
        "runs/demo/config.toml",
        "sim/train.json",
        "sim/local/more.py",
        "sim/app/users.json",
        "sim/users.jsonl",
        "sim/domain.toml",
        "sim/data/interactions.parquet",
        "sim/data/umap.json",
        "sim/data/notes.yaml",
        "fedmerge/users.py",
    ]
    for name in planted:
        (app / name).parent.mkdir(parents=True, exist_ok=True)
        (app / name).write_text(SECRET)

    with zipfile.ZipFile(BytesIO(build_fab_from_disk(app))) as fab:
        names = {name for name in fab.namelist() if not name.startswith(".info/")}
        contents = b"".join(fab.read(name) for name in fab.namelist())

    travels = {file.relative_to(REPOSITORY).as_posix() for file in (REPOSITORY / "sim" / "app").rglob("*.py")}
    assert names == {"pyproject.toml", "LICENSE", "sim/__init__.py", *travels}
    assert {"sim/app/server/app.py", "sim/app/client/app.py"} < names
    assert SECRET.encode() not in contents
