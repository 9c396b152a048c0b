"""Small source files of the importers in the layouts of their publishers, and readers of the imported domains."""

import json
from pathlib import Path
from typing import Any

from fedmerge.cli import main
from fedmerge.domain.catalog import load_catalog
from fedmerge.domain.importers.events import ImportReport
from fedmerge.domain.interactions import load_interactions

Files = dict[str, Any]


def small_source() -> Files:
    """Return three items and three users, ordered differently in each file; user 1 lacks val and test."""
    return {
        "smap": {"B2": 1, "B1": 0, "B3": 2},
        "meta_data": {
            "B1": {"title": "One", "brand": "", "category": "C"},
            "B9": {"title": "Not in smap", "brand": "", "category": ""},
            "B2": {"title": "Two", "brand": "Acme", "category": ""},
            "B3": {"title": "Three", "brand": "", "category": ""},
        },
        "umap": {"zed": 2, "ann": 0, "bob": 1},
        "train": {"2": [2, 2], "0": [0], "1": [1, 0, 2]},
        "val": {"0": [1], "2": [0]},
        "test": {"2": [1], "0": [2]},
    }


def write_source(folder: Path, files: Files) -> Path:
    """Write the six JSON files."""
    folder.mkdir(parents=True)
    for stem, content in files.items():
        (folder / f"{stem}.json").write_text(json.dumps(content))
    return folder


def sequences(folder: Path) -> dict[str, list[str]]:
    """Return each user's item ids, in the order of the domain."""
    item_ids, interactions = load_catalog(folder).item_ids, load_interactions(folder)
    return {
        user: [item_ids[item] for item in interactions.sequence(number)]
        for number, user in enumerate(interactions.user_ids)
    }


def bad_rows(report: ImportReport, file: int = 0) -> dict[str, tuple[int, tuple[int, ...]]]:
    return {reason.text: (reason.count, reason.first) for reason in report.files[file].bad}


def import_by_command(folder: Path, interactions: Path, catalog: Path | None = None, *options: str) -> int:
    """Run ``fedmerge data import table`` for the domain folder; return the exit code."""
    tables = ["--interactions", str(interactions), *([] if catalog is None else ["--catalog", str(catalog)])]
    return main(["data", "import", "table", str(folder.parent), "--name", folder.name, *tables, *options])
