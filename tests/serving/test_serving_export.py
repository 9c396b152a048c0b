"""An exported head scores as fedmerge does, by the recipe in its folder and without fedmerge."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from run_folders import UNSEEN, Place, contents, make_place, output, refusal
from runs_with_heads import DOMAIN, config_of, make_run_with_heads, serve, train_head

from fedmerge.files import read_sealed, seal, write_json
from fedmerge.runs.checkpoints import write_heads
from fedmerge.runs.federated_head import write_fusion
from fedmerge.serving.model import load_served, open_run, served_recommender
from fedmerge.serving.recommender import recommend

Capsys = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def run(place: Place) -> Path:
    run = make_run_with_heads(place)
    train_head(place, run)
    return run


def recipe_of(folder: Path) -> str:
    """Return the last code block of the folder's card, with the path of the folder."""
    block = (folder / "README.md").read_text(encoding="utf-8").split("```python\n")[-1].split("```")[0]
    assert "fedmerge" not in block
    return block.replace("PATH OF THIS FOLDER", str(folder))


@pytest.mark.long
def test_the_recipe_gives_fedmerge_s_scores(place: Place, run: Path, tmp_path: Path, capsys: Capsys) -> None:
    alone, fused, script = "head on the merge", "head on the merge, fused", "import json, sys\n"
    shared = make_run_with_heads(place, "shared", "federated")
    train_head(place, shared)
    settings = {
        "fused": (run, fused, (0.5, 0.3, 0.2)),
        "one": (run, fused, (0.0, 0.0, 1.0)),
        "alone": (run, alone, (0.2, 0.4, 0.4)),
        "continued": (shared, fused, (0.4, 0.1, 0.2, 0.3)),
        "federated": (shared, "federated head", ()),
        "federated fused": (shared, "federated head, fused", ()),
    }
    wanted = []
    for name, (of_run, model, weights) in settings.items():
        set_weights(place, weights)
        serve(of_run, model)
        said = output(capsys, "export", of_run, tmp_path / name, "--domain", place.domains / DOMAIN)
        assert ("keep the folder within the organisation" in said) == bool(weights)
        assert ("not give this folder away" in (tmp_path / name / "README.md").read_text()) == bool(weights)
        here = open_run(of_run, place.domains / DOMAIN, config_of(of_run))
        recommender = served_recommender(here, load_served(here))
        items = here.catalog.item_ids
        history = [items[index] for index in (3, 8, 1, 12)]
        script += recipe_of(tmp_path / name)
        for keep_seen in (True, False):
            wanted.append({i.item_id: i.score for i in recommend(recommender, history, len(items), keep_seen)})
            script += f"print(json.dumps(score({history}, {keep_seen}).tolist()))\n"
    script += "assert not any(name.startswith('fedmerge') for name in sys.modules)\n"
    done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, check=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("[")]
    for line, of_items in zip(lines, wanted, strict=True):
        found = dict(zip(items, json.loads(line), strict=True))
        assert [found.pop(item) for item in of_items] == pytest.approx([*of_items.values()], abs=1e-4)
        assert not np.isfinite([*found.values()]).any()  # the items of the history


def set_weights(place: Place, weights: tuple[float, ...]) -> None:
    """Replace the weights that the tiny validation chose, with others for masked and unmasked ranking."""
    of_variant = {"masked": weights, "unmasked": weights[::-1]}
    for path in (place.root / "cache" / "heads").glob("*/fusion-*.json"):
        record = read_sealed(path) or {}
        if len(record["masked"]["weights"]) == len(weights):
            chosen = {name: {"weights": list(each), "ndcg": 0.5} for name, each in of_variant.items()}
            write_json(path, seal(record | chosen))


def test_the_folder_says_what_it_is_and_that_it_is_private(
    place: Place, run: Path, tmp_path: Path, capsys: Capsys
) -> None:
    serve(run, "head on the merge, fused")
    out = tmp_path / "model"
    output(capsys, "export", run, out, "--domain", place.domains / DOMAIN)
    card, head = (out / "README.md").read_text(encoding="utf-8"), json.loads((out / "head.json").read_text())
    assert "**Do not give this folder away.**" in card
    assert f"trained on the users of {DOMAIN}" in card
    assert head["sha256"] == hashlib.sha256((out / "head.safetensors").read_bytes()).hexdigest()
    assert head["model"] == "head on the merge, fused"
    assert head["item_ids"] == list(open_run(run, place.domains / DOMAIN, config_of(run)).catalog.item_ids)
    assert json.loads((out / "provenance.json").read_text())["head"]["sha256"] == head["sha256"]
    before = contents(out)
    assert str(out) in refusal(capsys, "export", run, out, "--domain", place.domains / DOMAIN)
    assert contents(out) == before
    missing = ("--cache-dir", tmp_path / "nothing")
    refused = refusal(capsys, "export", run, tmp_path / "b", "--domain", place.domains / DOMAIN, *missing)
    assert "--cache-dir" in refused
    assert not (tmp_path / "b").exists()


def test_the_card_says_where_the_weights_of_a_federated_head_are_from(
    place: Place, tmp_path: Path, capsys: Capsys
) -> None:
    run = make_run_with_heads(place, "mean", "federated")
    write_fusion(run, {"masked": (0.2, 0.3, 0.5), "unmasked": (0.6, 0.3, 0.1)})

    def card(model: str, domain: str, out: str) -> str:
        serve(run, model, domain)
        output(capsys, "export", run, tmp_path / out, "--domain", place.domains / domain)
        return (tmp_path / out / "README.md").read_text(encoding="utf-8")

    alone, fused, mean = "federated head", "federated head, fused", "are the mean of those that the training domains"
    assert "weights of the fusion were" not in card(alone, DOMAIN, "alone")
    assert mean in card(fused, UNSEEN, "unseen")
    assert mean in card(fused, DOMAIN, "joined")  # the settings train it, but it joined as an unseen domain
    write_heads(run, DOMAIN, {}, {})
    assert f"chosen on users of {DOMAIN}" in card(fused, DOMAIN, "trained")


@pytest.mark.slow
def test_the_recipe_of_a_head_with_onnx(place: Place, run: Path, tmp_path: Path, capsys: Capsys) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    serve(run, "head on the merge, fused")
    output(capsys, "export", run, tmp_path / "out", "--domain", place.domains / DOMAIN, "--to", "onnx")
    here = open_run(run, place.domains / DOMAIN, config_of(run))
    items = here.catalog.item_ids
    wanted = recommend(served_recommender(here, load_served(here)), [items[3], items[8]], len(items))
    script = f"{recipe_of(tmp_path / 'out')}print('SCORES', score({[items[3], items[8]]}).tolist())\n"
    done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, check=True)
    found = done.stdout.partition("SCORES ")[2].replace("-inf", "-Infinity")
    scores = dict(zip(items, json.loads(found), strict=True))
    assert [scores[each.item_id] for each in wanted] == pytest.approx([each.score for each in wanted], abs=1e-4)


def test_all_files_are_readable_by_others(place: Place, run: Path, tmp_path: Path, capsys: Capsys) -> None:
    serve(run, "head on the merge, fused")
    before = os.umask(0o022)
    try:
        output(capsys, "export", run, tmp_path / "out", "--domain", place.domains / DOMAIN)
    finally:
        os.umask(before)
    paths = [tmp_path / "out", *(tmp_path / "out").rglob("*")]
    assert {path.stat().st_mode & 0o777 for path in paths if path.is_file()} == {0o644}
    assert {path.stat().st_mode & 0o777 for path in paths if path.is_dir()} == {0o755}


@pytest.mark.long
def test_a_text_model_is_exported_as_its_adapter_is(place: Place, run: Path, tmp_path: Path, capsys: Capsys) -> None:
    folders: dict[str, str | Path] = {
        "merged": run / "merged" / "average",
        "expert": run / "adapters" / DOMAIN,
        "backbone": "none",
    }
    for model, folder in folders.items():
        serve(run, model)
        said = output(capsys, "export", run, tmp_path / model, "--domain", place.domains / DOMAIN)
        assert f"{DOMAIN} is served: {model} (chosen on validation)" in said
        output(capsys, "export", folder, tmp_path / f"{model} alone", "--config", run / "config.toml")
        assert files_and_provenance(tmp_path / model) == files_and_provenance(tmp_path / f"{model} alone")
    output(capsys, "export", run, tmp_path / UNSEEN, "--domain", place.domains / UNSEEN)
    assert files_and_provenance(tmp_path / UNSEEN) == files_and_provenance(tmp_path / "merged")


def files_and_provenance(folder: Path) -> tuple[dict[str, str], dict[str, object]]:
    """Return what does not depend on the texts that the vectors are verified on."""
    files, provenance = contents(folder), json.loads((folder / "provenance.json").read_text())
    for name in ("README.md", "provenance.json"):
        del files[name]
    del provenance["export"]
    return files, provenance
