"""Apps that a client accepts: approved ones that hold the installed code and nothing else."""

import shutil
import tomllib
import zipfile
from io import BytesIO
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk
from flwr.supercore.fab import Fab

import sim
from fedmerge.cli import main
from fedmerge.domain.demo import write_demo
from fedmerge.errors import PolicyError, RunDirError
from fedmerge.organisation.app import app_sha256, check_app, check_contents, installed_code
from fedmerge.organisation.folder import approve_app, approved_apps, init_client, read_client
from sim.app_folder import copy_app
from sim.machines.app_bundle import build_app, submitted_sha256
from sim.machines.executor import check

REPOSITORY = Path(__file__).resolve().parents[2]
INSTALLED = installed_code(Path(str(sim.__file__)).parent)


@pytest.fixture(scope="module")
def good() -> bytes:
    return build_app(REPOSITORY)


def test_the_copy_that_flower_is_given_depends_on_the_app_alone(tmp_path: Path, good: bytes) -> None:
    """Other files of the checkout and other settings of its pyproject.toml do not matter."""
    checkout = tmp_path / "checkout"
    shutil.copytree(REPOSITORY / "sim", checkout / "sim")
    for name in ("pyproject.toml", "LICENSE", "README.md", ".gitignore"):
        shutil.copyfile(REPOSITORY / name, checkout / name)
    settings = (checkout / "pyproject.toml").read_text()
    assert "line-length = 120" in settings
    (checkout / "pyproject.toml").write_text(settings.replace("line-length = 120", "line-length = 100"))
    (checkout / ".gitignore").write_text((checkout / ".gitignore").read_text() + "\nsim/scratch.py\n")
    for name in (".venv/lib/other/module.py", "runs/notes.md", "sim/notes.md", "sim/scratch.py", "docs/code.py"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text("not of the app")
    (checkout / "sim" / "link.py").symlink_to(REPOSITORY / "README.md")
    copied = copy_app(checkout, tmp_path / "copied")
    assert build_fab_from_disk(copied) == good
    assert submitted_sha256(checkout) == app_sha256(good)
    assert {file.suffix for file in copied.rglob("*") if file.is_file()} == {".py", ".toml", ""}
    assert not (copied / "docs").exists()
    result = tomllib.loads((copied / "pyproject.toml").read_text())
    assert result.keys() == {"project", "tool"}
    assert result["tool"] == {"flwr": tomllib.loads(settings)["tool"]["flwr"]}
    (checkout / "pyproject.toml").write_text(settings.replace("warmup_steps = 10", "warmup_steps = 11"))
    assert submitted_sha256(checkout) != app_sha256(good)


@pytest.mark.parametrize(
    "project",
    [
        "[tool.flwr.app]\npublisher = 'x'\n",
        "[tool.flwr.app]\nfab-include = ['sim/']\n",
        "[tool.flwr.app]\nfab-include = ['*.py']\n",
        "[tool.flwr.app]\nfab-include = ['/LICENSE', 1, '']\n",
        "[tool.flwr.app]\nfab-include = ['sim/**/*.py']\nfab-exclude = ['sim/machines/app_bundle.py']\n",
        "tool = 3\n",
        "not toml",
        None,
    ],
)
def test_an_app_with_other_rules_is_not_copied(tmp_path: Path, project: str | None) -> None:
    (tmp_path / "app").mkdir()
    if project is not None:
        (tmp_path / "app" / "pyproject.toml").write_text(project)
    assert copy_app(tmp_path / "app", tmp_path / "none") == tmp_path / "app"
    assert not (tmp_path / "none").exists()


def test_a_copy_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunDirError, match=r"file/app: .*\(Not a directory\).*TMPDIR"):
        copy_app(REPOSITORY, tmp_path / "file" / "app")


def repacked(good: bytes, changes: dict[str, bytes | None]) -> bytes:
    """Return a bundle with some files replaced, added, or left out (None)."""
    packed = BytesIO()
    with zipfile.ZipFile(BytesIO(good)) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            if name not in changes:
                target.writestr(name, source.read(name))
        for name, data in changes.items():
            if data is not None:
                target.writestr(name, data)
    return packed.getvalue()


def test_the_installed_app_is_accepted_once_it_is_approved(good: bytes) -> None:
    with pytest.raises(PolicyError, match=app_sha256(good)):
        check_app(good, frozenset({"0" * 64}), INSTALLED)
    check_app(good, frozenset({app_sha256(good)}), INSTALLED)


TAMPERED: dict[str, tuple[dict[str, bytes | None], str]] = {
    "a line more": ({"sim/app/client/app.py": b"import os\n"}, "sim/app/client/app.py"),
    "a file more": ({"sim/app/more.py": b""}, "sim/app/more.py (1 "),
    "a file less": ({"sim/app/server/phases/rounds/adapters.py": None}, "sim/app/server/phases/rounds/adapters.py"),
    "its own fedmerge": ({"fedmerge/__init__.py": b""}, "fedmerge/__init__.py"),
    "fedmerge as a module": ({"fedmerge.py": b""}, "fedmerge.py"),
    "something that shadows": ({"torch.py": b""}, "torch.py"),
    "out of the folder": ({"../sim/x.py": b""}, "../sim/x.py"),
    "out of the app": ({"sim/app/../../torch.py": b""}, "sim/app/../../torch.py"),
    "a second spelling": ({"sim/app/./client/app.py": b"import os\n"}, "sim/app/./client/app.py"),
    "another case": ({"sim/APP/client/app.py": b"import os\n"}, "sim/APP/client/app.py"),
    "an absolute path": ({"/sim/app/client/app.py": b"import os\n"}, "/sim/app/client/app.py"),
    "backslashes": ({"sim\\app\\client\\app.py": b"import os\n"}, "sim\\app\\client\\app.py"),
    "a folder that begins alike": ({"sim/apps/x.py": b""}, "sim/apps/x.py"),
    "below the first file": ({"sim/__init__.py/x.py": b""}, "sim/__init__.py/x.py"),
    "bytecode": ({"sim/app/client/__pycache__/app.cpython-311.pyc": b"x"}, "app.cpython-311.pyc"),
    "a folder": ({"sim/app/client/": b""}, "sim/app/client/"),
    "a launcher": ({"sim/local/run.py": b""}, "sim/local/run.py"),
    "data": ({"sim/app/users.json": b"[]"}, "sim/app/users.json"),
    "much": ({"sim/more.py": b"#" * 11 * 2**20}, "10,485,760"),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_an_app_with_other_contents_is_refused_even_if_approved(good: bytes, case: str) -> None:
    changes, value = TAMPERED[case]
    bundle = repacked(good, changes)
    with pytest.raises(PolicyError) as caught:
        check_app(bundle, frozenset({app_sha256(bundle)}), INSTALLED)
    assert value in str(caught.value)
    assert app_sha256(bundle)[:12] in str(caught.value)


def test_a_damaged_bundle_is_refused(good: bytes) -> None:
    for bundle in (b"", b"garbage", good[:-30], good[:2000] + b"\0" * 50 + good[2050:]):
        with pytest.raises(PolicyError):
            check_contents(bundle, INSTALLED)
    twice = BytesIO(good)
    with zipfile.ZipFile(twice, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("sim/app/client/app.py", b"import os\n")
    with pytest.raises(PolicyError):
        check_contents(twice.getvalue(), INSTALLED)


def test_a_name_cut_at_a_null_byte_is_another_file(good: bytes) -> None:
    with zipfile.ZipFile(BytesIO(good)) as archive:
        content = archive.read("sim/app/client/app.py")
    hidden = repacked(good, {"sim/app/client/app.py": None, "sim/app/client/app.py?more": content})
    hidden = hidden.replace(b"app.py?more", b"app.py\0more")
    with pytest.raises(PolicyError):
        check_contents(hidden, INSTALLED)


def test_only_flowers_way_of_packing_is_unpacked(good: bytes) -> None:
    """A few bytes of bzip2 or LZMA unpack to hundreds of megabytes before any limit applies."""
    packed = BytesIO()
    with zipfile.ZipFile(BytesIO(good)) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_BZIP2) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(PolicyError) as caught:
        check_contents(packed.getvalue(), INSTALLED)
    assert "deflate" in str(caught.value)


def test_a_client_compares_with_the_code_that_it_started_with(good: bytes, tmp_path: Path) -> None:
    """An upgrade under a running client changes the files, not the code in its memory."""
    package = tmp_path / "sim"
    shutil.copytree(REPOSITORY / "sim", package)
    loaded = installed_code(package)
    (package / "app" / "client" / "app.py").write_text("import os\n")
    check_contents(good, loaded)
    with pytest.raises(PolicyError) as caught:
        check_contents(good, installed_code(package))
    assert "sim/app/client/app.py" in str(caught.value)


def test_the_operator_writes_the_app_that_runs_submit_and_overwrites_nothing(
    good: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "app.fab"
    file.write_text("mine")
    assert main(["deploy", "app", "--out", str(file)]) == 1
    assert str(file) in capsys.readouterr().err
    assert file.read_text() == "mine"
    file.unlink()
    assert main(["deploy", "app", "--out", str(file)]) == 0
    assert file.read_bytes() == good
    assert submitted_sha256(REPOSITORY) in capsys.readouterr().out
    assert main(["deploy", "app", "--out", str(tmp_path / "none" / "app.fab")]) == 1
    assert str(tmp_path / "none") in capsys.readouterr().err


def test_approving_by_file_looks_into_it(good: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_demo(tmp_path / "domains", num_domains=2, num_users=10, num_items=20)
    init_client(tmp_path / "north", "north", tmp_path / "domains" / "beauty")
    (tmp_path / "good.fab").write_bytes(good)
    (tmp_path / "bad.fab").write_bytes(repacked(good, {"fedmerge/__init__.py": b""}))
    assert main(["client", "approve", str(tmp_path / "north"), "--app", str(tmp_path / "bad.fab")]) == 1
    assert "fedmerge/__init__.py" in capsys.readouterr().err
    assert main(["client", "approve", str(tmp_path / "north"), "--app", str(tmp_path / "good.fab")]) == 0
    assert approved_apps(tmp_path / "north") == {app_sha256(good)}
    client = read_client(tmp_path / "north")
    check(client, Fab(app_sha256(good), good, {}), INSTALLED)
    with pytest.raises(PolicyError, match="agents"):
        check(client, Fab(app_sha256(good), good, {}), INSTALLED, is_client_app=False)
    other = repacked(good, {"LICENSE": b"free"})
    with pytest.raises(PolicyError, match=app_sha256(other)):  # whatever hash comes with it
        check(client, Fab(app_sha256(good), other, {}), INSTALLED)
    approve_app(client.folder, app_sha256(other), "by hand")
    check(client, Fab(app_sha256(other), other, {}), INSTALLED)
