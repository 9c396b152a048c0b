"""Bad inputs by the front door: each is refused in words that say where, what was found, what was expected, what to do.

One table a kind of input; the modules' own tests go into every corner. ``fedmerge`` prints one line and no traceback.
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
from fedmerge.encoder.peft_folder import write_adapter
from fedmerge.errors import FedMergeError
from fedmerge.server.admission import check_adapter

# Config: an experiment file, given to `fedmerge check`

CONFIG: dict[str, tuple[bytes | None, Parts]] = {
    "no file": (None, ["experiment.toml: cannot be read (No such file", "Give the path of an experiment file."]),
    "no TOML": (b"seed = = 1", ["experiment.toml: not valid TOML: Invalid value (at line 1, column 8)."]),
    "no text": (b"\xff\xfe", ["experiment.toml: not valid TOML: 'utf-8' codec can't decode byte 0xff"]),
    "a key twice": (b"seed = 1\nseed = 2", ["experiment.toml: not valid TOML: Cannot overwrite a value"]),
    "brackets without end": (b"seed = " + b"[" * 5000, ["experiment.toml: not valid TOML: maximum recursion depth"]),
    "an unknown key": (b"[train]\nmax_step = 3", ["train.max_step: unknown key; did you mean train.max_steps?"]),
    "an unknown section": (b"[zzz]\nqqq = 3", ["zzz.qqq: unknown key; docs/config.md lists all keys"]),
    "a section as a value": (b"train = 3", ["train: found 3, but this is a section; write [train] and its keys below"]),
    "text for a number": (b'seed = "abc"', ["seed: Input should be a valid integer", "(found 'abc')"]),
    "true for a number": (b"[lora]\nrank = true", ["lora.rank: Input should be a valid integer", "(found 'true')"]),
    "out of bounds": (b"[train]\nlearning_rate = 2", ["train.learning_rate: Input should be less than or equal to 1"]),
    "NaN": (b"[rounds]\nproximal = nan", ["rounds.proximal: Input should be a finite number (found nan)"]),
    "not among the choices": (
        b'[merge]\nmethods = "average,magic"',
        ["merge.methods.1: ", "mergerec, adamerging (found 'magic')"],
    ),
    "a method twice": (b'[merge]\nmethods = "average,average"', ["merge: methods names average "]),
    "two merges of one name": (
        b'[merge]\ntask_arithmetic_coefficients = "0.5,0.50000001"',
        ["merge: task_arithmetic_coefficients has 0.5 "],
    ),
    "a domain twice": (
        b'[domains]\ntrain = "a,b"\nunseen = "b"',
        ["domains: train and unseen name b "],
    ),
    "a domain that is a path": (b'[domains]\ntrain = "../a,b"', ["domains.train.0: ", "(found '../a')"]),
    "nobody trains": (b'[domains]\ntrain = ""', ["domains: train names no domain; name at least one"]),
    "no budget": (
        b'[train]\nmax_steps = "none"',
        ["train: max_epochs, max_steps and max_minutes are all 'none'; set at least one"],
    ),
    "a method that the policy forbids": (
        b'[privacy]\npolicy = "adapter"',
        ["merge.methods holds mergerec, which needs the catalogs", "set privacy.policy = 'adapter+catalog' or give"],
    ),
    "more clients asked for than there are": (
        b"[server]\nmin_train_clients = 9",
        ["server.min_train_clients = 9, but domains.train names only 4; lower it"],
    ),
}

# Config and this machine's files: an experiment with two small domains, given to `fedmerge check` and `fedmerge run`

# Data: a domain folder, given to `fedmerge data info`

Harm = Callable[[Path], object]


def manifest(**changes: Any) -> Harm:
    """Other values in manifest.json."""

    def harm(folder: Path) -> None:
        path = folder / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return harm


def table(name: str, change: Callable[[pa.Table], pa.Table]) -> Harm:
    """Another table in the file of this name."""

    def harm(folder: Path) -> None:
        path = folder / f"{name}.parquet"
        pq.write_table(change(pq.read_table(path)), path)

    return harm


def item_indices(change: Callable[[list[Any]], list[Any]], kind: pa.DataType | None = None) -> Harm:
    """Other item indices in the interactions."""

    def of(found: pa.Table) -> pa.Table:
        values = pa.array(change(found.column("item_index").to_pylist()), kind or pa.int32())
        return found.set_column(1, "item_index", values)

    return table("interactions", of)


def content(file: str, data: bytes) -> Harm:
    """Another file of this name."""
    return lambda folder: (folder / file).write_bytes(data)


def a_folder(file: str) -> Harm:
    """A folder of this name in place of the file."""

    def harm(folder: Path) -> None:
        (folder / file).unlink()
        (folder / file).mkdir()

    return harm


DATA: dict[str, tuple[Harm, Parts]] = {
    "no folder": (shutil.rmtree, ["toys: no such domain folder. Check the path."]),
    "no manifest, but tables": (
        lambda folder: (folder / "manifest.json").unlink(),
        ["toys/manifest.json: missing beside the domain's tables. Restore the file from a copy or import the domain"],
    ),
    "a manifest that is no JSON": (content("manifest.json", b"{"), ["manifest.json: not JSON (", "Restore the file"]),
    "a manifest nested without end": (content("manifest.json", b"[" * 99999), ["manifest.json: not JSON (maximum rec"]),
    "a manifest that is a folder": (
        a_folder("manifest.json"),
        ["manifest.json: the file cannot be read (Is a directory). Check that it is a file and that you may read it."],
    ),
    "a later format": (manifest(format=2), ["manifest.json: found format 2, expected 1. Import the domain again."]),
    "a count in words": (manifest(num_users="many"), ["manifest.json: 'num_users' is 'many', expected int. Restore"]),
    "another name": (
        manifest(name="books"),
        ["manifest.json: the domain is called 'books' but its folder 'toys'. Rename the folder to 'books'"],
    ),
    "a name that is a path": (
        manifest(name="../toys"),
        ["manifest.json: Domain name '../toys': expected at most 64 ASCII", "Choose such a name."],
    ),
    "no catalog": (
        lambda folder: (folder / "catalog.parquet").unlink(),
        ["catalog.parquet: the file is missing. Restore the file from a copy or import the domain again."],
    ),
    "a catalog as CSV": (
        content("catalog.parquet", b"item_id,title\n1,Tent\n"),
        ["catalog.parquet: 21 bytes that cannot be read as Parquet", "truncated or damaged. Restore"],
    ),
    "a column fewer": (
        table("catalog", lambda found: found.drop_columns(["brand"])),
        ["catalog.parquet: found columns ['item_id', 'title', 'category'], expected exactly ['item_id', 'title', 'bra"],
    ),
    "an item twice": (
        table("catalog", lambda found: pa.concat_tables([found, found.slice(0, 1)])),
        ["catalog.parquet: items 0 and 20 have the same id, expected unique ids. Remove the duplicate"],
    ),
    "other texts than the manifest's": (
        table("catalog", lambda found: found.set_column(2, "brand", pa.array(["New"] * len(found)))),
        [
            "catalog.parquet: found 20 items with content hash",
            "the manifest says 20 items with",
            "was changed. Restore",
        ],
    ),
    "another type": (
        item_indices(list, pa.int64()),
        ["interactions.parquet: column 'item_index' is of type int64, expected int32. Convert the column"],
    ),
    "an empty cell": (
        item_indices(lambda items: [None, *items[1:]]),
        ["interactions.parquet: column 'item_index' has 1 null cells, the first in row 0; expected none", "Fill the"],
    ),
    "an item that is not in the catalog": (
        item_indices(lambda items: [99, *items[1:]]),
        ["interactions.parquet: 1 rows have an item_index outside the catalog, the first is 99 in row 0; expected 0"],
    ),
    "rows of a user apart": (
        table("interactions", lambda found: pa.concat_tables([found, found.slice(0, 1)])),
        ["interactions.parquet: row ", "returns to an earlier user, expected each user's rows together. Restore"],
    ),
    "no interactions": (
        table("interactions", lambda found: found.slice(0, 0)),
        ["interactions.parquet: ", "no interactions"],
    ),
}

# Data: files in MergeRec's layout, given to `fedmerge data import mergerec`

IMPORTS: dict[str, tuple[dict[str, Any], Parts]] = {
    "nobody's items": (
        {"train": {"0": [7]}},
        ["train.json: user '0' has [7], expected a list of items from 0 to 2. Correct it"],
    ),
    "an unknown user": ({"val": {"9": [1]}}, ["val.json: user '9' is not in umap.json, expected 0 to 2. Take the fil"]),
    "a gap in the numbers": (
        {"smap": {"B1": 0, "B2": 2, "B3": 3}},
        ["smap.json: found number 2 ('B2') where 1 was expected", "Number them again"],
    ),
    "an item without texts": (
        {"meta_data": {"B1": {}, "B2": {}, "B3": {}}},
        ["meta_data.json: item 'B1' is {}, expected an object with the texts title, brand, category. Correct it"],
    ),
}

# Adapters: a PEFT folder, given to `fedmerge evaluate`

QUERY = "encoder.layer.0.attention.self.query"
LAYOUT = {QUERY: (32, 32), "encoder.layer.1.attention.self.value": (32, 32)}
GOOD = random_adapter(LAYOUT, 2, 2.0, 0)


def setting(**changes: Any) -> Harm:
    """Other values in adapter_config.json."""

    def harm(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return harm


def tensors(**changes: torch.Tensor | None) -> Harm:
    """Other tensors of one module (None: left out)."""

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
    "no folder": (
        shutil.rmtree,
        ["mine: no adapter_config.json. A PEFT folder holds adapter_config.json and adapter_model.safetensors."],
    ),
    "no tensors": (
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        ["mine: no adapter_model.safetensors. A PEFT folder holds"],
    ),
    "half a file": (cut, ["adapter ", "mine: damaged (", "Get the folder again."]),
    "a pickle": (
        lambda folder: torch.save({"a": 1}, folder / "adapter_model.safetensors"),
        ["mine: damaged (", "Get the folder again."],
    ),
    "brackets without end": (content("adapter_config.json", b"[" * 99999), ["mine: damaged (maximum recursion depth"]),
    "another method": (setting(peft_type="IA3"), ["mine: peft_type is 'IA3', expected 'LORA'."]),
    "DoRA": (setting(use_dora=True), ["mine: use_dora = True; only plain LoRA", "Train without it."]),
    "a rank in words": (setting(r="two"), ["mine: r is 'two' in adapter_config.json, not a number above 0. Get the"]),
    "another rank": (
        setting(r=3),
        [f"mine: module {QUERY} has lora_A (2, 32) and lora_B (32, 2), its configuration says rank 3."],
    ),
    "a scaling that is NaN": (
        setting(lora_alpha=float("nan")),
        ["mine: lora_alpha is nan in adapter_config.json, not"],
    ),
    "a scaling beyond all numbers": (setting(lora_alpha=10**400), ["mine: lora_alpha is 1000", "not a number above 0"]),
    "a pattern that is none": (
        setting(alpha_pattern={"(": 2}),
        ["mine: alpha_pattern is {'(': 2} in adapter_config.json, not an object of module patterns and num"],
    ),
    "a pattern without a number": (setting(alpha_pattern={"query": None}), ["mine: alpha_pattern is {'query': None}"]),
    "half a pair": (tensors(lora_B=None), [f"mine: module {QUERY} has no matrix pair lora_A, lora_B."]),
    "no rank at all": (
        tensors(lora_A=torch.zeros(0, 32), lora_B=torch.zeros(32, 0)),
        [f"mine: module {QUERY} has lora_A (0, 32) and lora_B (32, 0), its configuration says rank 2."],
    ),
    "whole numbers": (
        tensors(lora_A=torch.zeros(2, 32, dtype=torch.int8)),
        [f"mine: tensor 'base_model.model.{QUERY}.lora_A.weight' is torch.int8, expected floating point. Save it"],
    ),
    "something else": (
        tensors(magnitude=torch.zeros(2)),
        [f"mine: tensor 'base_model.model.{QUERY}.magnitude.weight' is not part of a LoRA on linear layers."],
    ),
}

# Adapters: what a client trained, at the gate in front of the merge


def replaced(name: str = QUERY, **changes: Any) -> Adapter:
    """The good adapter with another module."""
    good = GOOD.modules[QUERY]
    parts = {"lora_A": good.lora_A, "lora_B": good.lora_B, "scaling": good.scaling, **changes}
    return Adapter({**GOOD.modules, name: LoraModule(**parts)})


ADMITTED: dict[str, tuple[Adapter, Parts]] = {
    "a module fewer": (
        Adapter({QUERY: GOOD.modules[QUERY]}),
        ["domain shop: its adapter lacks the modules ['encoder.layer.1.", "(1 modules, expected 2). Use the same"],
    ),
    "a module more": (replaced("pooler"), ["domain shop: ", "has unexpected ['pooler'] (3 modules, expected 2). Use"]),
    "another rank": (
        replaced(lora_A=torch.ones(3, 32), lora_B=torch.ones(32, 3)),
        [f"domain shop: module {QUERY} has (lora_A, lora_B, scaling) ((3, 32), ", "Use the same lora.rank and lora.al"],
    ),
    "another scaling": (
        replaced(scaling=9.0),
        [f"domain shop: module {QUERY} has", "9.0), expected", ", 2.0). Use the"],
    ),
    "NaN": (
        replaced(lora_A=torch.full((2, 32), torch.nan)),
        [
            f"domain shop: {QUERY}.lora_A is torch.float32 with 64 of 64 values NaN or infinite, expected finite",
        ],
    ),
    "infinity": (replaced(lora_B=torch.full((32, 2), torch.inf)), ["64 of 64 values NaN or infinite"]),
    "another precision": (replaced(lora_A=torch.ones(2, 32).half()), ["is torch.float16 with 0 of 64 values NaN"]),
}


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """What a command says that fails."""
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
    given = tmp_path if "beside" in parts[0] else tmp_path / "toys"
    check_parts(refusal(capsys, "data", "info", given), parts)


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


def test_there_are_many_of_each_kind() -> None:
    sizes = [len(CONFIG), len(DATA) + len(IMPORTS), len(ADAPTERS) + len(ADMITTED)]
    assert min(sizes) >= 15
