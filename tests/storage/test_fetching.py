"""Domains and adapters at addresses: copied once for each state, by clients and commands, never by a server."""

import os
import stat
from importlib.util import find_spec
from pathlib import Path

import pytest
from adapters import random_adapter
from flwr.app import Context, RecordDict
from run_folders import make_place, make_run, output, refusal

from fedmerge.client.cache.contents import cache_entries
from fedmerge.config import ExperimentConfig, load_config, to_flat, with_absolute_paths
from fedmerge.domain.catalog import CATALOG_FILE
from fedmerge.domain.demo import domain_folder, domains_root, write_demo
from fedmerge.domain.manifest import read_manifest
from fedmerge.encoder.peft.folder import write_adapter
from fedmerge.errors import ConfigError, DomainError, StorageError
from fedmerge.organisation.folder import init_client, read_client
from fedmerge.privacy.paths import without_paths
from fedmerge.storage.addresses import Place, open_place, reached
from fedmerge.storage.copying import MARK, push_folder
from fedmerge.storage.fetching import local_folder
from sim.app.client.node import find_place
from sim.checks import check_simulation

Capsys = pytest.CaptureFixture[str]


@pytest.fixture
def shops(tmp_path: Path) -> str:
    """The address of a folder with two domains."""
    write_demo(tmp_path / "shared" / "shops", num_domains=2, num_users=5, num_items=20)
    return f"file://{tmp_path}/shared/shops"


def test_a_folder_is_copied_once_and_again_when_it_changed(shops: str, tmp_path: Path) -> None:
    cache, source = tmp_path / "cache", tmp_path / "shared" / "shops" / "beauty"
    first = local_folder(f"{shops}/beauty/", cache, "domains")
    assert read_manifest(first) == read_manifest(source)
    assert stat.S_IMODE(first.parent.stat().st_mode) == 0o700
    written = (first / CATALOG_FILE).stat().st_mtime_ns
    assert local_folder(f"{shops}/beauty", cache, "domains") == first
    assert (first / CATALOG_FILE).stat().st_mtime_ns == written
    os.utime(source / CATALOG_FILE, (1, 1))
    second = local_folder(f"{shops}/beauty", cache, "domains")
    assert second != first
    assert (second.name, first.exists()) == ("beauty", True)  # a run at work may still read the first
    assert {entry.kind for entry in cache_entries(cache)} == {"domains"}
    assert len(cache_entries(cache)) == 2
    assert local_folder(source, cache, "domains") == source  # a path is taken as it is


def test_what_is_not_a_whole_folder_is_not_copied(shops: str, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nothing there"):
        local_folder(f"{shops}/books-3", tmp_path / "cache", "domains")
    (tmp_path / "shared" / MARK).touch()
    with pytest.raises(StorageError, match="not whole"):
        local_folder(f"{shops}/beauty", tmp_path / "cache", "domains")
    (tmp_path / "shared" / MARK).rename(tmp_path / "shared" / "DONE")
    with pytest.raises(StorageError, match=r"a run, expected one folder of a domain or an adapter"):
        local_folder(f"file://{tmp_path}/shared", tmp_path / "cache", "domains")
    assert not list((tmp_path / "cache").glob("*/*-*"))


def test_clients_copy_their_own_domain_alone(shops: str, tmp_path: Path) -> None:
    config = load_config(None, [f"domains.root={shops}", "domains.train=beauty,books", "domains.unseen="])
    config = with_absolute_paths(config.model_copy(update={"cache_dir": str(tmp_path / "cache")}), Path("/elsewhere"))
    assert config.domains.root == shops
    check_simulation(config)
    for node in ({"partition-id": 1}, {"domain-path": f"{shops}/books"}):
        found = find_place(Context(1, 1, dict(node), RecordDict(), dict(to_flat(config))))
        assert found is not None
        folder = found[0]
        assert read_manifest(folder).name == folder.name == "books"
    assert [entry.path.name.partition("-")[0] for entry in cache_entries(tmp_path / "cache")] == ["books"]
    assert domain_folder(shops, "books", config.cache_dir) == folder
    with pytest.raises(DomainError, match="an address, expected a folder here"):
        domains_root(shops, config.cache_dir)
    with pytest.raises(ConfigError, match="has no domain toys; correct the address or the names"):
        check_simulation(config.model_copy(update={"domains": config.domains.model_copy(update={"unseen": ("toys",)})}))


def test_an_error_travels_without_the_address(tmp_path: Path) -> None:
    address = f"file://{tmp_path}/anna-private/shops/books"
    with pytest.raises(StorageError, match="anna-private") as refused:
        local_folder(address, tmp_path / "cache", "domains")
    assert without_paths(str(refused.value)).startswith("…/books: nothing there")
    place = Place("s3://anna-private/shops/books", open_place(address).files, "anna-private/shops/books")
    with pytest.raises(StorageError) as refused, reached(place, "read"):
        raise OSError("cannot reach 'http://anna.example.org/anna-private?prefix=shops' for anna-private/shops/books")
    assert "anna" not in without_paths(str(refused.value))


def test_an_organisations_client_copies_its_domain_to_its_own_cache(shops: str, tmp_path: Path) -> None:
    with pytest.raises(DomainError, match=r"no manifest\.json there"):
        init_client(tmp_path / "client", "north", f"{shops}/north")
    init_client(tmp_path / "client", "north", f"{shops}/beauty")
    client = read_client(tmp_path / "client")
    assert client.domain.parents[2] == client.cache_dir
    assert client.domain.name == read_manifest(client.domain).name == "beauty"


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("domains.root=s3://id:top-secret@bucket/shops", "holds a user or password"),
        ("domains.root=s3://bucket/shops?sig=top-secret", "has a query"),
        ("output_dir=s3://id:top-secret@bucket/runs", "fedmerge push RUN ADDRESS"),
        ("cache_dir=s3://bucket/cache", "on each client's own disk"),
        ("server.catalogs=s3://bucket/shops", "copy the catalogs to a folder of the server first"),
    ],
)
def test_settings_are_refused_without_their_secrets(setting: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        load_config(None, [setting])
    assert "top-secret" not in str(refused.value)


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_missing_package_is_named(scheme: str, package: str) -> None:
    if find_spec(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(StorageError, match=rf"pip install 'fedmerge\[{scheme}\]'"):
        open_place(f"{scheme}://bucket/folder")


def test_adapters_at_addresses_are_merged_and_evaluated(tmp_path: Path, capsys: Capsys) -> None:
    for seed, name in enumerate(("law", "medicine")):
        write_adapter(random_adapter({"layers.0.q": (6, 5)}, 2, 1.5, seed), tmp_path / name, "base")
    address = f"file://{tmp_path}/shared/medicine"
    output(capsys, "push", tmp_path / "medicine", address)
    cache = ExperimentConfig(cache_dir=str(tmp_path / "cache")).cache_dir
    merge = ("merge", "--method", "average", "--cache-dir", cache)
    output(capsys, *merge, "--out", tmp_path / "far", tmp_path / "law", address)
    output(capsys, *merge, "--out", tmp_path / "near", tmp_path / "law", tmp_path / "medicine")
    tensors = [(tmp_path / place / "adapter_model.safetensors").read_bytes() for place in ("far", "near")]
    assert tensors[0] == tensors[1]


def test_a_finished_run_is_pushed_and_pulled(tmp_path: Path, capsys: Capsys) -> None:
    place = make_place(tmp_path)
    run = make_run(place, "first")
    (run / "DONE").unlink(missing_ok=True)
    address = f"file://{tmp_path}/shared/first"
    assert "not finished" in refusal(capsys, "push", run, address)
    (run / "DONE").write_text("after 1.0 s\n")
    assert "files copied" in output(capsys, "push", "first", address, "--dir", place.runs)
    assert "files copied" in output(capsys, "pull", address, tmp_path / "back" / "first")
    assert output(capsys, "show", tmp_path / "back" / "first") == output(capsys, "show", run).replace(
        str(run), str(tmp_path / "back" / "first")
    )
    assert "top-secret" not in refusal(capsys, "pull", "s3://id:top-secret@bucket/x", tmp_path / "x")
    with pytest.raises(StorageError, match="holds first"):
        push_folder(run.rename(run.with_name("second")), address)
