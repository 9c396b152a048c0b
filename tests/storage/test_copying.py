"""Push and pull: whole or refused, resumed after a kill, verified; over fsspec's local and in-memory storage."""

import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from fedmerge.errors import RunDirError, StorageError
from fedmerge.files import seal
from fedmerge.storage.addresses import address_problem, name_of, without_secrets
from fedmerge.storage.copying import LIST_FILE, MARK, Copied, pull_folder, push_folder

KILLED = """
import os, signal, sys
from pathlib import Path
import fsspec
files, left = fsspec.get_filesystem_class("file"), int(sys.argv[3])
{patch}
from fedmerge.storage.copying import pull_folder, push_folder
{call}
"""
DIE_WHILE_PUSHING = """
write = files.put_file
def put_file(self, source, target, **options):
    global left
    left -= 1
    if left < 0:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        Path(target).write_bytes(Path(source).read_bytes()[:3])  # the half of a file
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, source, target, **options)
files.put_file = put_file
import fedmerge.storage.copying as copying
copying.AT_ONCE = 1
"""
DIE_WHILE_PULLING = """
read = files.open
def open_(self, path, *arguments, **options):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return read(self, path, *arguments, **options)
files.open = open_
import fedmerge.storage.copying as copying
copying.AT_ONCE = 1
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of six files, one empty, some below others, and what is not copied."""
    made = tmp_path / "first"
    (made / "merged" / "average").mkdir(parents=True)
    for number in range(4):
        (made / f"{number}.json").write_text(json.dumps({"number": number}) * (number + 1))
    (made / "empty").touch()
    (made / "merged" / "average" / "tensors").write_bytes(os.urandom(3_000_000))
    (made / ".hidden").write_text("a")
    (made / "lock").write_text("held")
    return made


@pytest.fixture(params=["file", "memory"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The address of a folder that does not exist yet."""
    if request.param == "file":
        yield f"file://{tmp_path}/shared/runs/first"
    else:
        root = f"memory://{secrets.token_hex(4)}"
        yield f"{root}/runs/first"
        files, path = at(root, "")
        if files.exists(path):
            files.rm(path, recursive=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def expected(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name not in {".hidden", "lock"}}


def at(address: str, name: str) -> tuple[fsspec.AbstractFileSystem, str]:
    files, path = fsspec.url_to_fs(f"{address}/{name}")
    return files, str(path)


def test_a_folder_comes_back_as_it_was(folder: Path, address: str, tmp_path: Path) -> None:
    sent = push_folder(folder, f"{address}/", ("lock",))
    assert sent == Copied(6, 6, sum(len(data) for data in expected(folder).values()))
    assert pull_folder(address, tmp_path / "back").num_sent == 6
    assert contents(tmp_path / "back") == expected(folder)
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(RunDirError, match="not an empty folder"):
        pull_folder(address, tmp_path / "back")


def test_a_second_push_sends_what_changed_and_removes_what_went(folder: Path, address: str, tmp_path: Path) -> None:
    push_folder(folder, address, ("lock",))
    assert push_folder(folder, address, ("lock",)) == Copied(6, 0, 0)
    (folder / "1.json").write_text((folder / "1.json").read_text().replace("1", "7"))  # of the same size
    (folder / "2.json").unlink()
    assert push_folder(folder, address, ("lock",)).num_sent == 1
    pull_folder(address, tmp_path / "back")
    assert contents(tmp_path / "back") == expected(folder)
    files, path = at(address, "2.json")
    assert not files.exists(path)


def test_what_lies_at_an_address_is_not_overwritten_by_another(folder: Path, address: str, tmp_path: Path) -> None:
    push_folder(folder, address)
    other = folder.rename(tmp_path / "second")
    with pytest.raises(StorageError, match=r"holds first, found second to push; nothing is overwritten"):
        push_folder(other, address)
    with pytest.raises(StorageError, match="holds other files"):
        push_folder(other, address.rpartition("/")[0])


def test_what_is_not_whole_is_refused(folder: Path, address: str, tmp_path: Path) -> None:
    push_folder(folder, address)
    files, mark = at(address, MARK)
    files.pipe_file(mark, b"")
    for part in (address, f"{address}/merged/average"):  # also below it
        with pytest.raises(StorageError, match="not whole: a push to it is under way, or was interrupted"):
            pull_folder(part, tmp_path / "back")
    files.rm_file(mark)
    damaged, path = at(address, "1.json")
    damaged.pipe_file(path, b"x" * len((folder / "1.json").read_bytes()))
    with pytest.raises(StorageError, match=r"1\.json: changed since it was pushed"):
        pull_folder(address, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    listed, path = at(address, LIST_FILE)
    listed.pipe_file(path, json.dumps(seal({"name": "first", "files": {"../../x": ["0" * 64, 1, 1]}})).encode())
    with pytest.raises(StorageError, match="outside the folder"):
        pull_folder(address, tmp_path / "back")
    listed.rm_file(path)
    with pytest.raises(StorageError, match=r"no files\.json there"):
        pull_folder(address, tmp_path / "back")


def test_links_are_refused(folder: Path, address: str) -> None:
    (folder / "link").symlink_to("1.json")
    with pytest.raises(StorageError, match="a link, expected files and folders alone"):
        push_folder(folder, address)


@pytest.mark.parametrize("num_files", [0, 1, 5])
def test_a_killed_push_is_refused_by_readers_and_continues(folder: Path, tmp_path: Path, num_files: int) -> None:
    address = f"file://{tmp_path}/shared/first"
    kill(DIE_WHILE_PUSHING, "push_folder(Path(sys.argv[1]), sys.argv[2], ('lock',))", folder, address, num_files)
    with pytest.raises(StorageError, match="not whole"):
        pull_folder(address, tmp_path / "back")
    assert push_folder(folder, address, ("lock",)).num_sent == 6 - num_files
    pull_folder(address, tmp_path / "back")
    assert contents(tmp_path / "back") == expected(folder)


def test_a_killed_pull_leaves_no_folder_and_continues(folder: Path, tmp_path: Path) -> None:
    address, back = f"file://{tmp_path}/shared/first", tmp_path / "back"
    push_folder(folder, address, ("lock",))
    kill(DIE_WHILE_PULLING, "pull_folder(sys.argv[2], Path(sys.argv[1]))", back, address, 4)  # the list, three files
    assert not back.exists()
    (tmp_path / ".back.pulling" / "0.json").write_text("was damaged meanwhile")
    (tmp_path / ".back.pulling" / "of-another").mkdir()
    (tmp_path / ".back.pulling" / "of-another" / "file").touch()
    assert pull_folder(address, back).num_sent == 4
    assert contents(back) == expected(folder)
    assert not list(tmp_path.glob(".*"))


def kill(patch: str, call: str, folder: Path, address: str, num_files: int) -> None:
    script = KILLED.format(patch=patch, call=call)
    done = subprocess.run([sys.executable, "-c", script, str(folder), address, str(num_files)], check=False)
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("s3://id:top-secret@bucket/x", "s3://…@bucket/x holds a user or password"),
        ("s3://bucket/x?X-Amz-Signature=top-secret", r"s3://bucket/x\?… has a query"),
        ("http://host/x", r"begins with http://, expected one of s3://, gs://, file://"),
        ("s3://bucket/../x", r"has an empty part, or '\.'"),
        ("s3://", "has an empty part"),
        ("bucket/x", "is no address"),
    ],
)
def test_addresses_are_refused_by_name_and_their_secrets_are_not_repeated(
    address: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(StorageError, match=said) as refused:
        pull_folder(address, tmp_path / "back")
    assert "top-secret" not in str(refused.value)
    assert "top-secret" not in address_problem(address)


def test_names_and_errors_without_secrets() -> None:
    assert name_of("s3://bucket/shops/north//") == "north"
    assert without_secrets("at https://id:key@host/x?sig=1 and s3://b/x") == "at https://…@host/x?… and s3://b/x"
