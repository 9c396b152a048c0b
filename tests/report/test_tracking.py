"""TensorBoard and MLflow: written results are read back completely, and the network is not used."""

import importlib.util
import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, Message
from in_process import small_experiment
from report_folders import some_bench
from run_folders import make_place, make_run

from fedmerge.config import Tracking, flatten
from fedmerge.encoder.adapted import folded, load_adapted
from fedmerge.encoder.backbone import in_float32
from fedmerge.encoder.encode import encode
from fedmerge.errors import ConfigError
from fedmerge.report.bench_tables import BenchTables
from fedmerge.report.mlflow_model import ServedMerge
from fedmerge.report.tracking import FOLDER, STORE, check_tracking, tracked_runs, write_tracking
from fedmerge.runs.folder import DONE
from sim.local.in_process import answer_honestly, run_in_process
from sim.local.run import run_experiment

needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed"
)
needs_mlflow = pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="mlflow is not installed")
RUNS = {f"demo/seed{seed}/{strategy}" for seed in (0, 1) for strategy in ("average", "mergerec")}


@pytest.fixture(scope="module")
def bench() -> BenchTables:
    return some_bench(("average", "mergerec"), ("books", "toys"), seeds=(0, 1), folds=False)


def read_tensorboard(folder: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Return tracked run -> name -> (step, value)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: PLC0415  # optional

    found = {}
    for place in {file.parent for file in folder.rglob("events.*")}:
        events = EventAccumulator(str(place)).Reload()
        name = str(place.relative_to(folder))
        found[name] = {
            tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
        }
        (settings,) = events.Tensors("settings/text_summary")
        assert b"lora.rank" in settings.tensor_proto.string_val[0]
    return found


def expected_score(bench: BenchTables) -> float:
    wanted = {"seed": 1, "strategy": "mergerec", "split": "test", "domain": "toys", "variant": "masked"}
    (row,) = (row for row in bench.results if row.items() >= {**wanted, "metric": "ndcg@10"}.items())
    return float(row["value"])


@needs_tensorboard
def test_tensorboard_has_curves_scores_and_settings_of_every_strategy(bench: BenchTables, tmp_path: Path) -> None:
    for _ in range(2):  # the second write replaces the first
        write_tracking(bench, tmp_path / "tracking", "tensorboard")
    assert [path.name for path in tmp_path.iterdir()] == ["tracking"]
    found = read_tensorboard(tmp_path / "tracking")
    assert found.keys() == RUNS
    of_run = found["demo/seed1/mergerec"]
    assert dict(of_run["test masked ndcg_at_10/toys"]) == pytest.approx({0: expected_score(bench)})
    curve = [row for row in bench.curves if (row["strategy"], row["seed"], row["domain"]) == ("mergerec", 1, "toys")]
    losses = {row["step"]: row["value"] for row in curve if row["name"] == "loss"}
    assert dict(of_run["loss/toys"]) == pytest.approx(losses)


@needs_mlflow
def test_mlflow_has_the_same_in_one_local_file_without_network(
    bench: BenchTables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("it asked the network")

    for way in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, way, refuse)
    monkeypatch.chdir(tmp_path)
    write_tracking(bench, tmp_path / "tracking", "mlflow")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [STORE]
    assert (tmp_path / "tracking" / STORE).stat().st_mode & 0o004
    from mlflow.tracking import MlflowClient  # noqa: PLC0415  # optional

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'tracking' / STORE}")
    (experiment,) = (found for found in client.search_experiments() if found.name == bench.title)
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert runs.keys() == RUNS
    run = runs["demo/seed1/mergerec"]
    assert run.data.metrics["test masked ndcg_at_10/toys"] == pytest.approx(expected_score(bench))
    (tracked,) = (run for run in tracked_runs(bench) if run.name == "demo/seed1/mergerec")
    assert run.data.params.keys() == tracked.settings.keys()
    assert run.data.params["lora.rank"] == "8"
    history = client.get_metric_history(run.info.run_id, "loss/toys")
    wanted = [(step, value) for name, step, value in tracked.numbers if name == "loss/toys"]
    assert [(point.step, point.value) for point in history] == wanted


LOAD = """
import json, sys
sys.modules["fedmerge"] = sys.modules["sim"] = None
import mlflow
model = mlflow.sentence_transformers.load_model(sys.argv[1])
print("VECTORS", json.dumps(model.encode(["title: red tent"]).tolist()))
print("VECTORS", json.dumps(mlflow.pyfunc.load_model(sys.argv[1]).predict(["title: red tent"]).tolist()))
"""


@needs_mlflow
def test_the_served_merge_is_a_model_that_loads_without_fedmerge(tmp_path: Path) -> None:
    changes = {"train.max_steps": 1, "merge.methods": "average", "privacy.min_users": 2, "tracking": "mlflow"}
    config = small_experiment(tmp_path, **changes)
    run_in_process(config)
    run = tmp_path / "runs" / "run"
    from mlflow.tracking import MlflowClient  # noqa: PLC0415  # optional

    client = MlflowClient(tracking_uri=f"sqlite:///{run / FOLDER / STORE}")
    experiments = [found.experiment_id for found in client.search_experiments() if found.name == "run"]
    (model,) = client.search_logged_models(experiments)
    assert (model.name, str(model.status)) == ("average", "READY")
    assert client.get_run(model.source_run_id).info.run_name == "small/seed0/average"
    place = Path(model.artifact_location.removeprefix("file://"))
    assert place.is_relative_to(run / FOLDER)
    assert not list(run.rglob(".model"))
    done = subprocess.run([sys.executable, "-I", "-c", LOAD, str(place)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line[8:]) for line in done.stdout.splitlines() if line.startswith("VECTORS ")]
    backbone, adapter = load_adapted(run / "merged" / "average", config)
    encoder = in_float32(folded(backbone, adapter))
    tokens = np.array(encoder.tokenizer(" title: red tent")["input_ids"], dtype=np.int32)
    for vectors in found:
        np.testing.assert_allclose(vectors, encode(encoder, [tokens]).numpy(), atol=1e-5)
    assert len(found) == 2


@needs_mlflow
def test_a_missing_backbone_leaves_the_tables_without_a_model(
    bench: BenchTables, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = make_place(tmp_path / "place")
    run = make_run(place, "trial", ["merge.methods=average"])
    shutil.rmtree(place.root / "backbone")
    served = ServedMerge(run / "merged" / "average", "average", run / "config.toml")
    write_tracking(bench, tmp_path / "tracking", "mlflow", served)
    assert [path.name for path in (tmp_path / "tracking").rglob("*") if path.is_file()] == [STORE]
    assert "not logged as a model" in caplog.text
    assert "backbone.source" in caplog.text


@pytest.mark.long
@needs_tensorboard
def test_a_run_writes_tracking_beside_its_tables(tmp_path: Path) -> None:
    changes = {"train.max_steps": 1, "merge.methods": "average", "privacy.min_users": 2, "tracking": "tensorboard"}
    run_in_process(small_experiment(tmp_path, **changes))
    found = read_tensorboard(tmp_path / "runs" / "run" / FOLDER)
    rows = ("average", "backbone", "expert", "last-item", "popularity", "served--with-fallback-")
    assert found.keys() == {f"small/seed0/{row}" for row in rows}
    assert "valid unmasked ndcg_at_10/books" in found["small/seed0/average"]
    assert [step for step, _ in found["small/seed0/expert"]["Experts_ loss/books"]] == [1]


@pytest.mark.long
@needs_tensorboard
def test_a_failing_tracker_does_not_fail_a_finished_run(tmp_path: Path) -> None:
    changes = {"train.max_steps": 1, "merge.methods": "average", "privacy.min_users": 2, "tracking": "tensorboard"}
    run_dir = tmp_path / "runs" / "run"

    def occupy(message: Message, context: Context) -> Message | None:
        (run_dir / FOLDER).write_text("in the way")
        return answer_honestly(message, context)

    run_in_process(small_experiment(tmp_path, **changes), occupy)
    assert (run_dir / DONE).is_file()
    assert "tracking = 'tensorboard' failed; the run is finished without it" in (run_dir / "run.log").read_text()


@pytest.mark.parametrize("tracking", ["tensorboard", "mlflow"])
def test_a_missing_tracker_is_an_error_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracking: Tracking
) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, tracking, raising=False)
    remedy = rf"tracking = '{tracking}'.*fedmerge\[{tracking}\]"
    with pytest.raises(ConfigError, match=remedy):
        check_tracking(tracking)
    config = small_experiment(tmp_path, tracking=tracking)
    with pytest.raises(ConfigError, match=remedy):
        run_experiment(config, tmp_path)
    assert not (tmp_path / "runs").exists()
    check_tracking(None)


def test_settings_are_flat(bench: BenchTables) -> None:
    settings = next(tracked_runs(bench)).settings
    assert settings == flatten(settings)
    assert settings["environment.packages.torch"] == "2.13.0"
