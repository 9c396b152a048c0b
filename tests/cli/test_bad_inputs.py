"""Bad inputs at the command line: every message names the place, the value found and the one expected.

One table per kind of input; the tests of the modules cover more cases. ``fedmerge`` prints one line and no traceback.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from adapters import random_adapter
from messages_in_order import Parts, check_parts
from safetensors.torch import load_file, save_file
from source_tables import small_source, write_source

from fedmerge.adapter import Adapter, LoraModule
from fedmerge.cli import main
from fedmerge.domain.demo import generate_domain
from fedmerge.domain.folder import write_domain
from fedmerge.encoder.lora import layout_of
from fedmerge.encoder.peft.folder import write_adapter
from fedmerge.errors import FedMergeError
from fedmerge.server.reply_checks import check_adapter

# Config: an experiment file, passed to `fedmerge check`

CONFIG: dict[str, tuple[bytes | None, Parts]] = {
    "a missing file": (None, ["experiment.toml: ", "No such file"]),
    "not TOML": (b"seed = = 1", ["experiment.toml: ", "line 1, column 8"]),
    "not text": (b"\xff\xfe", ["experiment.toml: ", "'utf-8'", "0xff"]),
    "a repeated key": (b"seed = 1\nseed = 2", ["experiment.toml: ", "TOML"]),
    "endless brackets": (b"seed = " + b"[" * 5000, ["experiment.toml: ", "TOML"]),
    "an unknown key": (b"[train]\nmax_step = 3", ["train.max_step: ", "train.max_steps"]),
    "an unknown section": (b"[zzz]\nqqq = 3", ["zzz.qqq: ", "docs/config.md"]),
    "a section as a value": (b"train = 3", ["train: ", "3", "[train]"]),
    "text for a number": (b'seed = "abc"', ["seed: ", "integer", "'abc'"]),
    "true for a number": (b"[lora]\nrank = true", ["lora.rank: ", "integer", "'true'"]),
    "out of bounds": (b"[train]\nlearning_rate = 2", ["train.learning_rate: ", "1"]),
    "NaN": (b"[rounds]\nproximal = nan", ["rounds.proximal: ", "nan"]),
    "not among the choices": (b'[merge]\nmethods = "average,magic"', ["merge.methods.1: ", "mergerec", "'magic'"]),
    "a repeated method": (b'[merge]\nmethods = "average,average"', ["merge: ", "methods", "average"]),
    "two merges of one name": (
        b'[merge]\ntask_arithmetic_coefficients = "0.5,0.50000001"',
        ["merge: ", "task_arithmetic_coefficients", "0.5"],
    ),
    "a repeated domain": (b'[domains]\ntrain = "a,b"\nunseen = "b"', ["domains: ", "train", "unseen", "b"]),
    "a domain that is a path": (b'[domains]\ntrain = "../a,b"', ["domains.train.0: ", "'../a'"]),
    "no training domain": (b'[domains]\ntrain = ""', ["domains: ", "train"]),
    "no budget": (b'[train]\nmax_steps = "none"', ["train: ", "max_epochs", "max_steps", "max_minutes", "'none'"]),
    "a method that the policy forbids": (
        b'[privacy]\npolicy = "adapter"',
        ["merge.methods", "mergerec", "privacy.policy", "'adapter+catalog'"],
    ),
    "more training clients than domains": (
        b"[server]\nmin_train_clients = 9",
        ["server.min_train_clients", "9", "domains.train", "4"],
    ),
}

# Data: a domain folder, passed to `fedmerge data info`

Harm = Callable[[Path], object]
NO_MANIFEST = "tables without a manifest"


def manifest(**changes: Any) -> Harm:
    """Change values in manifest.json."""

    def harm(folder: Path) -> None:
        path = folder / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return harm


def table(name: str, change: Callable[[pa.Table], pa.Table]) -> Harm:
    """Change the table in the file of this name."""

    def harm(folder: Path) -> None:
        path = folder / f"{name}.parquet"
        pq.write_table(change(pq.read_table(path)), path)

    return harm


def item_indices(change: Callable[[list[Any]], list[Any]], kind: pa.DataType | None = None) -> Harm:
    """Change the item indices of the interactions."""

    def of(found: pa.Table) -> pa.Table:
        values = pa.array(change(found.column("item_index").to_pylist()), kind or pa.int32())
        return found.set_column(1, "item_index", values)

    return table("interactions", of)


def content(file: str, data: bytes) -> Harm:
    """Replace the file's content."""
    return lambda folder: (folder / file).write_bytes(data)


def a_folder(file: str) -> Harm:
    """Replace the file by a folder."""

    def harm(folder: Path) -> None:
        (folder / file).unlink()
        (folder / file).mkdir()

    return harm


DATA: dict[str, tuple[Harm, Parts]] = {
    "a missing folder": (shutil.rmtree, ["toys: "]),
    NO_MANIFEST: (lambda folder: (folder / "manifest.json").unlink(), ["toys/manifest.json: "]),
    "a manifest that is not JSON": (content("manifest.json", b"{"), ["manifest.json: ", "JSON"]),
    "a manifest nested too deeply": (content("manifest.json", b"[" * 99999), ["manifest.json: ", "JSON"]),
    "a manifest that is a folder": (a_folder("manifest.json"), ["manifest.json: ", "Is a directory"]),
    "a later format": (manifest(format=3), ["manifest.json: ", " 3", " 2"]),
    "a count in words": (manifest(num_users="many"), ["manifest.json: ", "'num_users'", "'many'", "int"]),
    "another name": (manifest(name="books"), ["manifest.json: ", "'books'", "'toys'"]),
    "a name that is a path": (manifest(name="../toys"), ["manifest.json: ", "'../toys'", "64"]),
    "a missing catalog": (lambda folder: (folder / "catalog.parquet").unlink(), ["catalog.parquet: "]),
    "a catalog as CSV": (
        content("catalog.parquet", b"item_id,title\n1,Tent\n"),
        ["catalog.parquet: ", "21 bytes", "Parquet"],
    ),
    "a missing column": (
        table("catalog", lambda found: found.drop_columns(["brand"])),
        ["catalog.parquet: ", "['item_id', 'title', 'category']", "['item_id', 'title', 'brand', 'category']"],
    ),
    "a repeated item": (
        table("catalog", lambda found: pa.concat_tables([found.slice(0, 19), found.slice(0, 1)])),
        ["catalog.parquet: ", "0 and 19"],
    ),
    "other texts than the manifest's": (
        table("catalog", lambda found: found.set_column(2, "brand", pa.array(["New"] * len(found)))),
        ["catalog.parquet: ", "20 items", "20 items"],
    ),
    "another type": (
        item_indices(list, pa.int64()),
        ["interactions.parquet: ", "'item_index'", "int64", "int32"],
    ),
    "an empty cell": (
        item_indices(lambda items: [None, *items[1:]]),
        ["interactions.parquet: ", "'item_index'", "1 null", "row 0"],
    ),
    "an item that is not in the catalog": (
        item_indices(lambda items: [99, *items[1:]]),
        ["interactions.parquet: ", "1 rows", "99", "row 0", "0 to 19"],
    ),
    "scattered rows of a user": (
        table("interactions", lambda found: pa.concat_tables([found.slice(1), found.slice(0, 1)])),
        ["interactions.parquet: ", "row "],
    ),
    "no interactions": (table("interactions", lambda found: found.slice(0, 0)), ["interactions.parquet: "]),
}

# Data: files in MergeRec's layout, passed to `fedmerge data import mergerec`

IMPORTS: dict[str, tuple[dict[str, Any], Parts]] = {
    "an unknown item": ({"train": {"0": [7]}}, ["train.json: ", "'0'", "[7]", "0 to 2"]),
    "an unknown user": ({"val": {"9": [1]}}, ["val.json: ", "'9'", "umap.json", "0 to 2"]),
    "a gap in the numbers": ({"smap": {"B1": 0, "B2": 2, "B3": 3}}, ["smap.json: ", "2 ('B2')", " 1 ", "0 to 2"]),
    "an item without texts": (
        {"meta_data": {"B1": {}, "B2": {}, "B3": {}}},
        ["meta_data.json: ", "'B1'", "{}", "title, brand, category"],
    ),
}

# Adapters: a PEFT folder, passed to `fedmerge evaluate`

QUERY = "encoder.layer.0.attention.self.query"
LAYOUT = {QUERY: (32, 32), "encoder.layer.1.attention.self.value": (32, 32)}
GOOD = random_adapter(LAYOUT, 2, 2.0, 0)


def setting(**changes: Any) -> Harm:
    """Change values in adapter_config.json."""

    def harm(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return harm


def tensors(**changes: torch.Tensor | None) -> Harm:
    """Change tensors of one module (None removes one)."""

    def harm(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        found = {name: tensor.clone() for name, tensor in load_file(path).items()}
        changed = {f"base_model.model.{QUERY}.{part}.weight": tensor for part, tensor in changes.items()}
        save_file({name: tensor for name, tensor in (found | changed).items() if tensor is not None}, path)

    return harm


def cut(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


ADAPTERS: dict[str, tuple[Harm, Parts]] = {
    "a missing folder": (shutil.rmtree, ["mine: ", "adapter_config.json"]),
    "missing tensors": (
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        ["mine: ", "adapter_model.safetensors"],
    ),
    "a truncated file": (cut, ["mine: "]),
    "a pickle": (lambda folder: torch.save({"a": 1}, folder / "adapter_model.safetensors"), ["mine: "]),
    "endless brackets": (content("adapter_config.json", b"[" * 99999), ["mine: ", "recursion"]),
    "another method": (setting(peft_type="IA3"), ["mine: ", "peft_type", "'IA3'", "'LORA'"]),
    "DoRA": (setting(use_dora=True), ["mine: ", "use_dora", "True"]),
    "a rank in words": (setting(r="two"), ["mine: ", "'two'", "adapter_config.json"]),
    "another rank": (setting(r=3), ["mine: ", QUERY, "(2, 32)", "(32, 2)", "3"]),
    "a scaling that is NaN": (setting(lora_alpha=float("nan")), ["mine: ", "lora_alpha", "nan", "adapter_config.json"]),
    "a scaling that overflows": (setting(lora_alpha=10**400), ["mine: ", "lora_alpha", "1000"]),
    "an invalid pattern": (setting(alpha_pattern={"(": 2}), ["mine: ", "alpha_pattern", "{'(': 2}"]),
    "a pattern without a number": (
        setting(alpha_pattern={"query": None}),
        ["mine: ", "alpha_pattern", "{'query': None}"],
    ),
    "a missing lora_B": (tensors(lora_B=None), ["mine: ", QUERY, "lora_A, lora_B"]),
    "rank 0": (
        tensors(lora_A=torch.zeros(0, 32), lora_B=torch.zeros(32, 0)),
        ["mine: ", QUERY, "(0, 32)", "(32, 0)", "2"],
    ),
    "whole numbers": (
        tensors(lora_A=torch.zeros(2, 32, dtype=torch.int8)),
        ["mine: ", f"'base_model.model.{QUERY}.lora_A.weight'", "torch.int8"],
    ),
    "an unknown tensor": (
        tensors(magnitude=torch.zeros(2)),
        ["mine: ", f"'base_model.model.{QUERY}.magnitude.weight'"],
    ),
}

# Adapters: trained by a client, at the server's check before the merge


def replaced(name: str = QUERY, **changes: Any) -> Adapter:
    """Return the good adapter with one changed or added module."""
    good = GOOD.modules[QUERY]
    parts = {"lora_A": good.lora_A, "lora_B": good.lora_B, "scaling": good.scaling, **changes}
    return Adapter({**GOOD.modules, name: LoraModule(**parts)})


ADMITTED: dict[str, tuple[Adapter, Parts]] = {
    "a missing module": (
        Adapter({QUERY: GOOD.modules[QUERY]}),
        ["domain shop: ", "['encoder.layer.1.", "1 modules", "2"],
    ),
    "an additional module": (replaced("pooler"), ["domain shop: ", "['pooler']", "3 modules", "2"]),
    "another rank": (
        replaced(lora_A=torch.ones(3, 32), lora_B=torch.ones(32, 3)),
        ["domain shop: ", QUERY, "(3, 32)", "lora.rank"],
    ),
    "another scaling": (replaced(scaling=9.0), ["domain shop: ", QUERY, "9.0", "2.0"]),
    "NaN": (
        replaced(lora_A=torch.full((2, 32), torch.nan)),
        ["domain shop: ", f"{QUERY}.lora_A", "torch.float32", "64 of 64"],
    ),
    "infinity": (replaced(lora_B=torch.full((32, 2), torch.inf)), [f"{QUERY}.lora_B", "64 of 64"]),
    "another precision": (replaced(lora_A=torch.ones(2, 32).half()), ["torch.float16", "0 of 64"]),
}


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Run a command that fails; return its error."""
    assert main([str(argument) for argument in arguments]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fedmerge: ")
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize("wrong", CONFIG)
def test_bad_config(wrong: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, parts = CONFIG[wrong]
    if data is not None:
        (tmp_path / "experiment.toml").write_bytes(data)
    check_parts(refusal(capsys, "check", tmp_path / "experiment.toml"), parts)


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("domains") / "toys"
    demo = generate_domain("toys", num_users=30, num_items=20)
    write_domain(folder, demo.catalog, demo.interactions, public_catalog=True, synthetic=True, source="a test")
    return folder


@pytest.mark.parametrize("wrong", DATA)
def test_bad_data(wrong: str, toys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    harm, parts = DATA[wrong]
    shutil.copytree(toys, tmp_path / "toys")
    harm(tmp_path / "toys")
    target = tmp_path if wrong == NO_MANIFEST else tmp_path / "toys"
    check_parts(refusal(capsys, "data", "info", target), parts)


@pytest.mark.parametrize("wrong", IMPORTS)
def test_bad_imports(wrong: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes, parts = IMPORTS[wrong]
    source = write_source(tmp_path / "Tiny", {**small_source(), **changes})
    check_parts(refusal(capsys, "data", "import", "mergerec", source, tmp_path / "domains"), parts)
    assert not (tmp_path / "domains").exists()


@pytest.mark.parametrize("wrong", ADAPTERS)
def test_bad_adapters(wrong: str, toys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    harm, parts = ADAPTERS[wrong]
    write_adapter(GOOD, tmp_path / "mine", "tiny")
    harm(tmp_path / "mine")
    check_parts(refusal(capsys, "evaluate", tmp_path / "mine", "--domain", toys), parts)


@pytest.mark.parametrize("wrong", ADMITTED)
def test_bad_adapters_at_the_gate(wrong: str) -> None:
    adapter, parts = ADMITTED[wrong]
    check_adapter("shop", GOOD, layout_of(GOOD))
    with pytest.raises(FedMergeError) as caught:
        check_adapter("shop", adapter, layout_of(GOOD))
    check_parts(str(caught.value), parts)


def test_every_kind_has_many_cases() -> None:
    sizes = [len(CONFIG), len(DATA) + len(IMPORTS), len(ADAPTERS) + len(ADMITTED)]
    assert min(sizes) >= 15
