"""Push, pull and fetch on S3: s3fs against moto's server on the loopback, where both are installed."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedmerge.errors import StorageError
from fedmerge.storage.copying import pull_folder, push_folder
from fedmerge.storage.fetching import has_file, local_folder

pytest.importorskip("s3fs")
SERVER = shutil.which("moto_server")
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(SERVER is None, reason="no moto_server on PATH: pip install 'moto[server]', anywhere"),
]
SECRET = "top-secret-key"

PUSH_AND_DIE = """
import os, signal, sys
from pathlib import Path
import s3fs
write, left = s3fs.S3FileSystem._put_file, 2
async def put_file(self, *arguments, **options):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    await write(self, *arguments, **options)
s3fs.S3FileSystem._put_file = put_file
import fedmerge.storage.copying as copying
copying.AT_ONCE = 1
copying.push_folder(Path(sys.argv[1]), sys.argv[2])
"""


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """The address of an empty bucket."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    import s3fs  # noqa: PLC0415 - after the variables, which clients read once

    s3fs.S3FileSystem.clear_instance_cache()
    command = [str(SERVER), "-H", "127.0.0.1", "-p", str(port)]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # its Python may be another
    with subprocess.Popen(command, env=clean, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            for _ in range(300):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.2)
            s3fs.S3FileSystem().mkdir("shared")
            yield "s3://shared"
        finally:
            server.terminate()
            s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "first"
    (made / "merged" / "average").mkdir(parents=True)
    for number in range(3):
        (made / f"{number}.json").write_text(f"{number}" * (number + 1))
    (made / "empty").touch()
    (made / "merged" / "average" / "tensors").write_bytes(os.urandom(6_000_000))
    return made


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_push_killed_halfway_is_refused_and_continues(bucket: str, folder: Path, tmp_path: Path) -> None:
    address = f"{bucket}/runs/first"
    done = subprocess.run([sys.executable, "-c", PUSH_AND_DIE, str(folder), address], check=False)
    assert done.returncode == -signal.SIGKILL
    with pytest.raises(StorageError, match="not whole"):
        pull_folder(address, tmp_path / "back")
    with pytest.raises(StorageError, match="not whole"):
        local_folder(f"{address}/merged/average", tmp_path / "cache", "adapters")
    assert push_folder(folder, address).num_sent == 3
    assert push_folder(folder, address).num_sent == 0
    pull_folder(address, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(folder)


def test_an_object_with_another_etag_is_fetched_again(bucket: str, folder: Path, tmp_path: Path) -> None:
    import s3fs  # noqa: PLC0415

    push_folder(folder / "merged" / "average", f"{bucket}/average")
    first = local_folder(f"{bucket}/average", tmp_path / "cache", "adapters")
    assert contents(first) == contents(folder / "merged" / "average")
    assert local_folder(f"{bucket}/average", tmp_path / "cache", "adapters") == first
    s3fs.S3FileSystem().pipe_file("shared/average/tensors", b"x" * 6_000_000)
    second = local_folder(f"{bucket}/average", tmp_path / "cache", "adapters")
    assert second != first
    assert (second / "tensors").read_bytes() == b"x" * 6_000_000
    assert has_file(f"{bucket}/average", "tensors")
    assert not has_file(f"{bucket}/average", "others")


def test_what_cannot_be_reached_is_said_without_secrets(bucket: str, folder: Path, tmp_path: Path) -> None:
    for call in (
        lambda: push_folder(folder, "s3://no-such-bucket/first"),
        lambda: pull_folder("s3://no-such-bucket/first", tmp_path / "back"),
        lambda: local_folder("s3://no-such-bucket/first", tmp_path / "cache", "domains"),
    ):
        with pytest.raises(StorageError, match="s3://no-such-bucket/first") as refused:
            call()
        assert SECRET not in str(refused.value)
    assert not (tmp_path / "back").exists()
