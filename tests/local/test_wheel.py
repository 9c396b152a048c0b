"""The wheel, installed and used from an empty folder: contents, commands, and a federation with Flower and Ray."""

import os
import subprocess
import zipfile
from pathlib import Path

import pytest
from backbones import tiny_bert
from wheels import REPOSITORY, Installed, build_wheel, install_wheel

from fedmerge.installation import shipped_configs
from sim.machines.app_bundle import submitted_sha256

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

TINY = {
    "domains.train": "beauty,books",
    "train.max_steps": "4",
    "train.warmup_steps": "1",
    "train.validate_every_steps": "2",
    "mergerec.steps": "3",
    "evaluation.validation_users": "40",
    "evaluation.test_users": "40",
    "runtime.device": "cpu",
    "runtime.precision": "float32",
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("wheel")
    return install_wheel(build_wheel(folder), folder / "venv")


def test_it_installs_one_package_and_holds_what_the_checkout_has(installed: Installed) -> None:
    with zipfile.ZipFile(installed.wheel) as wheel:
        names = set(wheel.namelist())
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"fedmerge"}
    modules = {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "fedmerge").rglob("*.py")}
    assert {name for name in names if name.endswith(".py") and "/shipped/" not in name} == modules
    data = [path for path in (REPOSITORY / "fedmerge").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assets = {path.relative_to(REPOSITORY).as_posix() for path in data if path.suffix != ".py"}
    assert "fedmerge/serving/http/page/page.js" in assets
    assert {
        name for name in names if not name.endswith(".py") and "/shipped/" not in name and ".dist-info/" not in name
    } == (assets)
    sources = [*(REPOSITORY / "sim").rglob("*.py"), *(REPOSITORY / "configs").rglob("*.toml")]
    sources += [REPOSITORY / name for name in ("pyproject.toml", "LICENSE", "constraints.txt")]
    shipped = {f"fedmerge/shipped/{path.relative_to(REPOSITORY).as_posix()}" for path in sources}
    assert {name for name in names if "/shipped/" in name} == shipped


def test_nothing_called_sim_is_importable_and_a_users_own_is_left_alone(installed: Installed, tmp_path: Path) -> None:
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def python(program: str) -> "subprocess.CompletedProcess[str]":
        command = [installed.python, "-c", program]
        return subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)

    assert "No module named 'sim'" in python("import fedmerge.cli, sim").stderr
    (tmp_path / "sim").mkdir()
    (tmp_path / "sim" / "__init__.py").write_text("")
    done = python(
        "from fedmerge import installation as i; i.import_flower_side(); import sim.local; print(sim.__file__)"
    )
    assert Path(done.stdout.strip()) == installed.package / "shipped" / "sim" / "__init__.py"
    done = python("import sim; from fedmerge import installation as i; i.import_flower_side()")
    assert "ConfigError" in done.stderr
    assert str(tmp_path / "sim") in done.stderr


def test_the_app_has_the_hash_of_the_checkouts(installed: Installed) -> None:
    assert installed.package.joinpath("shipped").is_dir()
    assert submitted_sha256(installed.package / "shipped") == submitted_sha256(REPOSITORY)


def test_the_configurations_are_there_by_name(installed: Installed, tmp_path: Path) -> None:
    done = installed.run("configs", folder=tmp_path)
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(shipped_configs())
    assert installed.run("configs", "show", "bench/smoke", folder=tmp_path).stdout == (
        (REPOSITORY / "configs" / "bench" / "smoke.toml").read_text()
    )
    assert installed.run("configs", "copy", "mine", folder=tmp_path).returncode == 0
    assert installed.run("check", "mine/demo.toml", folder=tmp_path).returncode == 0
    assert installed.run("check", "privacy/aggregate-only", folder=tmp_path).returncode == 0
    done = installed.run("run", "demoo", folder=tmp_path)
    assert (done.returncode, "demo?" in done.stdout) == (2, True)


def test_the_demo_runs_from_an_empty_folder(installed: Installed, tmp_path: Path) -> None:
    backbone = tiny_bert(tmp_path / "backbone")
    empty = tmp_path / "empty"
    empty.mkdir()
    settings = TINY | {"backbone.source": str(backbone), "cache_dir": str(tmp_path / "cache"), "run_id": "wheel"}
    done = installed.run("demo", "--set", *(f"{key}={value}" for key, value in settings.items()), folder=empty)
    assert done.returncode == 0, done.stdout
    assert (empty / "runs" / "wheel" / "DONE").is_file()
    assert [path.name for path in empty.iterdir()] == ["runs"]
    assert str(REPOSITORY) not in done.stdout
