"""Allowed imports between packages, read from the source, and the imports of the server's modules."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

from fedmerge.config.privacy import ALLOWED

REPOSITORY = Path(__file__).resolve().parents[2]
FILES = sorted((REPOSITORY / "fedmerge").rglob("*.py"))
ROOMS = [path for path in FILES if path.parent.name != "fedmerge" or path.name != "__init__.py"]  # it offers api lazily

# Dependencies run one way: a module imports from its own row or from those above.
ROWS: tuple[tuple[str, ...], ...] = (
    ("errors", "__init__"),
    ("installation",),
    (
        "adapter",
        "backbone_files",
        "config",
        "device",
        "escaping",
        "evaluation",
        "files",
        "seeding",
        "storage",
        "tensor_files",
    ),
    ("domain",),
    ("encoder",),
    ("merging", "sequence"),
    ("federated", "llm2rec", "mergerec", "privacy"),
    ("client", "runs"),
    ("server",),
    ("report", "serving"),
    ("bench", "deploy", "organisation", "planning"),
    ("api", "cli"),
)
ROW_OF = {part: number for number, row in enumerate(ROWS) for part in row}
PRIVATE = {
    "fedmerge.domain.interactions",
    "fedmerge.domain.splits",
    "fedmerge.domain.folder",
    "fedmerge.client.local_domain",
    "fedmerge.client.evaluate",
    "fedmerge.storage.fetching",
}
FRAMEWORKS = {"flwr", "ray"}
USE_FLOWER = {"fedmerge.api.simulation"} | {
    f"fedmerge.cli.{name}" for name in ("init", "run", "runs", "bench", "configs", "machines.deploy", "machines.client")
}


def module_name(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def imports_of(path: Path) -> frozenset[str]:
    """Every module that a file imports, wherever in the file; names taken from a package count as its modules."""
    found = set[str]()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found.add(str(node.module))
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def part_of(module: str) -> str:
    """``fedmerge.domain.catalog`` -> ``domain``; what ``fedmerge`` itself holds (its version) -> ``__init__``."""
    second = [*module.split("."), "__init__"][1]
    place = REPOSITORY / "fedmerge" / second
    return second if place.is_dir() or place.with_suffix(".py").exists() else "__init__"


def test_the_files_are_found_and_every_part_has_its_row() -> None:
    assert len(FILES) > 30
    assert {part_of(module_name(path)) for path in FILES} <= ROW_OF.keys()


def test_imports_are_found_wherever_they_stand(tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text("import a.b as c\ndef f():\n    from d import e\n    if True:\n        import g\n")
    assert imports_of(path) == {"a.b", "d", "d.e", "g"}
    assert (part_of("fedmerge.domain.catalog"), part_of("fedmerge.__version__"), part_of("fedmerge.config.Text")) == (
        "domain",
        "__init__",
        "config",
    )


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_the_library_knows_no_flower_and_no_ray(path: Path) -> None:
    tops = {name.split(".")[0] for name in imports_of(path)}
    assert not tops & FRAMEWORKS
    if module_name(path) not in USE_FLOWER:
        assert "sim" not in tops


@pytest.mark.parametrize("path", ROOMS, ids=module_name)
def test_dependencies_run_one_way(path: Path) -> None:
    own = ROW_OF[part_of(module_name(path))]
    ours = {name for name in imports_of(path) if name.split(".")[0] == "fedmerge"}
    upwards = {name for name in ours if ROW_OF[part_of(name)] > own}
    assert not upwards


def test_packages_of_one_row_do_not_import_each_other_in_a_circle() -> None:
    edges = {
        (part_of(module_name(path)), part_of(name))
        for path in ROOMS
        for name in imports_of(path)
        if name.split(".")[0] == "fedmerge"
    }
    assert ("encoder", "domain") in edges  # text needs catalogs
    assert not {(right, left) for left, right in edges if left != right} & edges


def test_the_config_is_light() -> None:
    heavy = {"torch", "transformers", "peft", "numpy", "pyarrow", "safetensors"}
    package = REPOSITORY / "fedmerge"
    for path in (*(package / "config").rglob("*.py"), package / "errors.py"):
        assert not {module.split(".")[0] for module in imports_of(path)} & heavy


def test_gradients_on_own_users_are_sent_by_the_client_app_alone_and_under_one_policy() -> None:
    files = [*FILES, *(REPOSITORY / "sim").rglob("*.py")]
    using = [module_name(path) for path in files if "fedmerge.client.coefficients.own_users" in imports_of(path)]
    assert using == ["sim.app.client.coefficients"]
    assert [policy for policy, allowed in ALLOWED.items() if "coefficient gradient" in allowed] == ["catalog-private"]


@pytest.mark.parametrize(("side", "other"), [("client", "server"), ("server", "client")])
@pytest.mark.parametrize("package", ["fedmerge", "sim/app"])
def test_neither_side_imports_code_of_the_other(package: str, side: str, other: str) -> None:
    files = sorted((REPOSITORY / package / side).rglob("*.py"))
    assert len(files) >= 3
    of_other = (f"fedmerge.{other}", f"sim.app.{other}")
    assert not {name for path in files for name in imports_of(path) if name.startswith(of_other)}


IMPORT_THE_SERVER = """
import importlib, pkgutil, sys
for name in ("fedmerge.server", "fedmerge.mergerec", "fedmerge.federated", "fedmerge.llm2rec", "fedmerge.merging",
             "fedmerge.privacy"):
    for module in pkgutil.walk_packages(importlib.import_module(name).__path__, name + "."):
        importlib.import_module(module.name)
print(*sorted(sys.modules))
import sim.app.server.app
print(*sorted(sys.modules))
"""


def test_the_server_brings_no_private_module_into_its_process() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_THE_SERVER], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    library, app = (set(line.split()) for line in done.stdout.splitlines())
    expected = {"fedmerge.mergerec.learn", "fedmerge.merging.stack", "fedmerge.privacy.policy"}
    assert expected | {"fedmerge.domain.catalog"} <= library
    assert not library & PRIVATE
    assert not {name.split(".")[0] for name in library} & (FRAMEWORKS | {"sim"})
    assert {"sim.app.server.app", "flwr"} <= app
    assert not app & PRIVATE


HELP = """
import contextlib, sys
before = set(sys.modules)
import fedmerge.cli
with contextlib.suppress(SystemExit):
    fedmerge.cli.main(["--help"])
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
"""


def test_help_imports_the_standard_library_only() -> None:
    done = subprocess.run([sys.executable, "-c", HELP], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    imported = set(done.stdout.splitlines()[-1].split())
    assert "fedmerge" in imported
    assert imported <= {*sys.stdlib_module_names, "fedmerge"}


def test_merging_and_peft_folders_need_torch_and_safetensors_alone() -> None:
    light = "import fedmerge.merging.training_free, fedmerge.merging.folders.writing, fedmerge.encoder.peft.folder"
    done = subprocess.run(
        [sys.executable, "-c", f"{light}, sys; print(*sys.modules)"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    imported = {name.split(".")[0] for name in done.stdout.split()}
    assert {"torch", "safetensors"} <= imported
    assert not imported & {"transformers", "peft", "flwr", "ray", "pyarrow", "pydantic"}


def test_only_a_benchmark_can_train_jointly() -> None:
    files = [*FILES, *sorted((REPOSITORY / "sim").rglob("*.py"))]
    users = [module_name(path) for path in files if "fedmerge.bench.joint" in imports_of(path)]
    assert users == ["fedmerge.bench.cells"]
    of_cells = [module_name(path) for path in files if "fedmerge.bench.cells" in imports_of(path)]
    bench = [f"fedmerge.bench.{name}" for name in ("grid", "outcomes", "stages", "tables")]
    assert sorted(of_cells) == [*bench, "sim.local.bench"]
