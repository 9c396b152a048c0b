"""The command line: output, exit codes, and one line per error."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from adapters import layout_of, random_adapter
from backbones import tiny_bert
from source_tables import small_source, write_source

from fedmerge import __version__
from fedmerge.cli import main
from fedmerge.client.baselines.rankers import BASELINE_LABELS, baseline_rankers
from fedmerge.client.evaluate import evaluate
from fedmerge.client.local_domain import open_domain
from fedmerge.config import ExperimentConfig, Text, load_config, to_toml
from fedmerge.device import resolve_compute
from fedmerge.domain.demo import DEMO_DOMAINS, demo_names, generate_domain
from fedmerge.domain.folder import list_domains, write_domain
from fedmerge.domain.manifest import read_manifest
from fedmerge.encoder.backbone import load_backbone
from fedmerge.encoder.demo_backbone import NOTE
from fedmerge.encoder.peft.folder import write_adapter
from fedmerge.evaluation.ranks import METRICS
from fedmerge.evaluation.sums import BACKBONE

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = REPOSITORY / "configs" / "amazon3.toml"
TINY = REPOSITORY / "configs" / "tiny.toml"  # on the bundled data, so every check passes
NUM_USERS = 15
POPULARITY, LAST_ITEM = BASELINE_LABELS["popularity"], BASELINE_LABELS["last-item"]

Lines = tuple[int, list[str], list[str]]
Command = Callable[..., Lines]


@pytest.fixture
def fedmerge(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command; return its exit code and the lines of standard output and standard error."""

    def run(*arguments: str | Path) -> Lines:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out.splitlines(), captured.err.splitlines()

    return run


def refusal(outcome: Lines) -> str:
    """Return the single error line of a failed command."""
    code, out, err = outcome
    assert code == 1
    assert out == []
    assert len(err) == 1
    assert err[0].startswith("fedmerge: ")
    return err[0]


# Usage


def test_wrong_usage_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        [],
        ["nonsense"],
        ["data"],
        ["check"],
        ["evaluate", "none"],
        ["data", "demo", "x", "--num-domains", "y"],
    ):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
        assert "usage: fedmerge" in capsys.readouterr().err


def test_help_and_version_end_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"fedmerge {__version__}\n"
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert all(command in text for command in ("run", "check", "data", "evaluate"))


def test_an_error_is_one_line_without_traceback() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fedmerge.cli", "check", "gone.toml"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("fedmerge: gone.toml: ")
    assert len(done.stderr.splitlines()) == 1


# check


def test_check_describes_an_experiment(fedmerge: Command) -> None:
    code, out, err = fedmerge("check", TINY)
    assert (code, err) == (0, [])
    (line,) = out
    assert line.startswith(f"{TINY}: valid (tiny: 2 training and 1 unseen domains")
    assert "average, task-arithmetic, mergerec" in line
    code, out, _ = fedmerge("check", TINY, "--set", "seed=4", "domains.unseen=toys")
    assert code == 0
    assert "1 unseen" in out[0]
    assert "seed 4" in out[0]


def test_check_names_every_problem(fedmerge: Command, tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text('seed = -1\n[train]\nlearning_rte = 1\nbatch_size = "many"\n')
    code, out, err = fedmerge("check", path, "--set", "lora.rank=0")
    assert (code, out) == (1, [])
    assert err[0] == f"fedmerge: {path}: 4 problems"
    assert {line.strip().split(":")[0] for line in err[1:]} == {
        "seed",
        "train.learning_rte",
        "train.batch_size",
        "lora.rank",
    }
    assert "did you mean train.learning_rate?" in "".join(err)


def test_check_validates_the_parameters_of_a_rule(fedmerge: Command) -> None:
    code, _, err = fedmerge("check", CONFIG, "--set", "rounds.rule=fedit", "rounds.parameters=trim=0.1")
    assert code != 0
    assert "trim" in "".join(err)


@pytest.mark.parametrize("command", ["check", "run"])
def test_a_bad_experiment_is_one_line(fedmerge: Command, tmp_path: Path, command: str) -> None:
    assert "gone.toml: " in refusal(fedmerge(command, tmp_path / "gone.toml"))
    (tmp_path / "bad.toml").write_text("seed = [")
    assert "bad.toml: " in refusal(fedmerge(command, tmp_path / "bad.toml"))
    assert "key=value" in refusal(fedmerge(command, CONFIG, "--set", "seed"))


# data


def test_demo_domains_are_written_once(fedmerge: Command, tmp_path: Path) -> None:
    code, out, err = fedmerge("data", "demo", tmp_path / "shops", "--num-domains", "2")
    assert (code, err) == (0, [])
    assert list_domains(tmp_path / "shops") == tuple(sorted(DEMO_DOMAINS[:2]))
    assert out == [f"{tmp_path / 'shops'}: 2 synthetic domains: {', '.join(DEMO_DOMAINS[:2])}"]
    before = read_manifest(tmp_path / "shops" / DEMO_DOMAINS[0])
    existing = refusal(fedmerge("data", "demo", tmp_path / "shops", "--num-domains", "2"))
    assert ", ".join(DEMO_DOMAINS[:2]) in existing
    assert fedmerge("data", "demo", tmp_path / "shops", "--num-domains", "2", "--overwrite")[0] == 0
    assert read_manifest(tmp_path / "shops" / DEMO_DOMAINS[0]) == before
    assert "num_domains is 0" in refusal(fedmerge("data", "demo", tmp_path / "none", "--num-domains", "0"))


def test_many_small_demo_domains_and_a_tiny_encoder(fedmerge: Command, tmp_path: Path) -> None:
    sizes = ("--num-users", "20", "--num-items", "30")
    code, out, _ = fedmerge("data", "demo", tmp_path / "shops", "--num-domains", "13", *sizes)
    assert (code, out) == (0, [f"{tmp_path / 'shops'}: 13 synthetic domains: {', '.join(demo_names(12))}, …"])
    manifest = read_manifest(tmp_path / "shops" / "camping-2")
    assert (manifest.num_users, manifest.num_items) == (20, 30)
    code, out, err = fedmerge("data", "demo-backbone", tmp_path / "encoder")
    assert (code, err) == (0, [])
    assert out == [f"{tmp_path / 'encoder'}: {NOTE}"]
    backbone = load_backbone(str(tmp_path / "encoder"), "mean", resolve_compute("cpu", "float32"))
    assert open_domain(tmp_path / "shops" / "camping-2", backbone, Text()).can_train
    assert "encoder: " in refusal(fedmerge("data", "demo-backbone", tmp_path / "encoder"))


@pytest.fixture(scope="module")
def shops(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shops")
    for name in ("coffee", "toys"):
        demo = generate_domain(name, num_users=NUM_USERS, num_items=20)
        write_domain(root / name, demo.catalog, demo.interactions, public_catalog=True, synthetic=True, source="a test")
    return root


def test_info_describes_a_domain_or_a_folder_of_them(fedmerge: Command, shops: Path) -> None:
    code, one, err = fedmerge("data", "info", shops / "toys")
    assert (code, err) == (0, [])
    assert one[0] == "toys  (SYNTHETIC)"
    text = "\n".join(one)
    assert "source          a test" in text
    assert f"users           {NUM_USERS} (0 " in text
    assert "items           20 (" in text
    assert "private-" not in text
    assert "toys-u" not in text  # no user's id
    code, both, _ = fedmerge("data", "info", shops)
    assert code == 0
    assert [line for line in both if "SYNTHETIC" in line] == ["coffee  (SYNTHETIC)", "toys  (SYNTHETIC)"]
    assert both[-len(one) :] == one


def test_info_reports_missing_and_damaged_domains(fedmerge: Command, shops: Path, tmp_path: Path) -> None:
    assert f"{tmp_path}/gone: " in refusal(fedmerge("data", "info", tmp_path / "gone"))
    assert f"{tmp_path}: " in refusal(fedmerge("data", "info", tmp_path))
    damaged = tmp_path / "toys"
    damaged.mkdir()
    for path in (shops / "toys").iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    (damaged / "interactions.parquet").write_bytes(b"PAR1")
    assert "interactions.parquet" in refusal(fedmerge("data", "info", damaged))


def test_import_creates_a_domain(fedmerge: Command, tmp_path: Path) -> None:
    source = write_source(tmp_path / "Tiny", small_source())
    code, out, err = fedmerge("data", "import", "mergerec", source, tmp_path / "domains")
    assert (code, err) == (0, [])
    assert out == [f"{tmp_path / 'domains' / 'Tiny'}: 3 users, 3 items, 10 interactions"]
    assert not read_manifest(tmp_path / "domains" / "Tiny").public_catalog
    again = ("data", "import", "mergerec", source, tmp_path / "domains")
    assert "domains/Tiny: " in refusal(fedmerge(*again))
    assert fedmerge(*again, "--overwrite", "--public-catalog")[0] == 0
    assert read_manifest(tmp_path / "domains" / "Tiny").public_catalog
    assert fedmerge(*again, "--name", "other")[0] == 0
    assert list_domains(tmp_path / "domains") == ("Tiny", "other")


def test_import_reports_bad_sources(fedmerge: Command, tmp_path: Path) -> None:
    assert "gone" in refusal(fedmerge("data", "import", "mergerec", tmp_path / "gone", tmp_path / "domains"))
    source = write_source(tmp_path / "Tiny", {**small_source(), "smap": {"B1": 0}})
    assert "Tiny" in refusal(fedmerge("data", "import", "mergerec", source, tmp_path / "domains"))
    (tmp_path / "Tiny" / "train.json").write_text("{")
    assert "train.json" in refusal(fedmerge("data", "import", "mergerec", source, tmp_path / "domains"))
    good = write_source(tmp_path / "Good", small_source())
    assert "../x" in refusal(fedmerge("data", "import", "mergerec", good, tmp_path / "domains", "--name", "../x"))
    assert not (tmp_path / "domains").exists() or list_domains(tmp_path / "domains") == ()


# evaluate


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def overrides(model: Path) -> list[str]:
    return [
        "--set",
        f"backbone.source={model}",
        "runtime.server_threads=1",
        "runtime.precision=float32",
        "runtime.device=cpu",
        "text.max_tokens=64",
        "text.max_items=2",
        "text.max_attribute_tokens=10",
    ]


@pytest.mark.parametrize("kind", ["none", "adapter"])
@pytest.mark.parametrize("split", ["valid", "test"])
def test_evaluate_prints_the_results_of_the_library(
    fedmerge: Command, shops: Path, model: Path, overrides: list[str], tmp_path: Path, kind: str, split: str
) -> None:
    backbone = load_backbone(str(model), "mean", resolve_compute("cpu", "float32"))
    adapter = random_adapter(layout_of(backbone), 2, 1.0, 0) if kind == "adapter" else None
    label = BACKBONE if adapter is None else "mine"
    if adapter is not None:
        write_adapter(adapter, tmp_path / "mine", backbone.name)
    domain = open_domain(shops / "toys", backbone, Text(max_tokens=64, max_items=2, max_attribute_tokens=10))
    baselines = baseline_rankers(domain, ("popularity", "last-item"), ExperimentConfig().evaluation, 0, str(tmp_path))
    wanted = evaluate(domain, {label: adapter}, "valid" if split == "valid" else "test", 9, seed=0, baselines=baselines)

    path = "none" if adapter is None else tmp_path / "mine"
    code, out, err = fedmerge(
        "evaluate", path, "--domain", shops / "toys", "--split", split, "--max-users", "9", "--json", *overrides
    )
    assert (code, err) == (0, [])
    found = json.loads("\n".join(out))
    assert (found["domain"], found["split"], found["synthetic"], found["precision"]) == ("toys", split, True, "float32")
    for variant, sums in wanted.items():
        assert found[variant] == {"num_users": 9, "methods": sums.metrics_by_method()}
        assert set(found[variant]["methods"]) == {label, POPULARITY, LAST_ITEM}
        assert all(set(metrics) == set(METRICS) for metrics in found[variant]["methods"].values())
    if adapter is not None:  # it differs from the backbone
        alone = evaluate(domain, {BACKBONE: None}, "valid" if split == "valid" else "test", 9, seed=0)
        assert not np.array_equal(alone["unmasked"].sums[0], wanted["unmasked"].sums[0])


def test_evaluate_prints_tables_of_both_variants(fedmerge: Command, shops: Path, overrides: list[str]) -> None:
    code, out, err = fedmerge("evaluate", "none", "--domain", shops / "toys", *overrides)
    assert (code, err) == (0, [])
    text = "\n".join(out)
    assert "unmasked (" in text
    assert "\nmasked" in text or " masked (" in text
    assert text.count("SYNTHETIC DATA") >= 1
    assert all(method in text for method in (BACKBONE, POPULARITY, LAST_ITEM, "toys"))


def test_an_adapter_of_a_run_is_evaluated_with_that_run_s_settings(
    fedmerge: Command, shops: Path, model: Path, overrides: list[str], tmp_path: Path
) -> None:
    backbone = load_backbone(str(model), "mean", resolve_compute("cpu", "float32"))
    folder = tmp_path / "run" / "merged" / "average"
    write_adapter(random_adapter(layout_of(backbone), 2, 1.0, 0), folder, backbone.name)
    (tmp_path / "run" / "config.toml").write_text(to_toml(load_config(None, overrides[1:])))
    arguments = ("evaluate", folder, "--domain", shops / "coffee", "--json")
    code, of_run, _ = fedmerge(*arguments)
    assert code == 0
    assert of_run == fedmerge(*arguments, *overrides)[1]
    assert of_run != fedmerge(*arguments, "--set", "text.max_items=1")[1]


def test_evaluate_errors_are_one_line(
    fedmerge: Command, shops: Path, model: Path, overrides: list[str], tmp_path: Path
) -> None:
    def evaluated(adapter: str | Path, domain: Path, *more: str) -> str:
        return refusal(fedmerge("evaluate", adapter, "--domain", domain, *overrides, *more))

    toys = shops / "toys"
    assert "adapter_config.json" in evaluated(tmp_path / "gone", toys)
    assert f"{tmp_path}/gone: " in evaluated("none", tmp_path / "gone")
    assert "max_users" in evaluated("none", toys, "--max-users", "0")
    assert "4096" in evaluated("none", toys, "--set", "text.max_tokens=4096")
    assert f"{tmp_path}/gone" in evaluated("none", toys, "--set", f"backbone.source={tmp_path / 'gone'}")
    assert "*.safetensors" in evaluated("none", toys, "--set", f"backbone.source={tmp_path}")
    write_adapter(random_adapter({"decoder.layer.0.query": (32, 32)}, 1, 1.0, 0), tmp_path / "foreign", "other")
    assert "decoder.layer.0.query" in evaluated(tmp_path / "foreign", toys)
    assert "gone.toml: " in evaluated("none", toys, "--config", str(tmp_path / "gone.toml"))


def test_a_closed_pipe_is_not_a_traceback() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "fedmerge.cli", "check", str(TINY)]
    done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (141, "")
