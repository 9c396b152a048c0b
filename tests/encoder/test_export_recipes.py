"""The Python in an exported folder's card gives the platform's vectors where fedmerge cannot be imported."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from adapters import layout_of, random_adapter
from backbones import tiny_bert, tiny_roberta
from test_export_graphs import encoder_of, needs_onnx, needs_openvino
from tokenizers import pre_tokenizers

from fedmerge.config import Text
from fedmerge.domain.catalog import Catalog, make_catalog
from fedmerge.encoder.adapted import folded
from fedmerge.encoder.backbone import Backbone
from fedmerge.encoder.encode import encode
from fedmerge.encoder.export.folder import export_model
from fedmerge.encoder.export.formats import Format
from fedmerge.encoder.text import build_token_table, item_sequences, pack_sequences

TEXT = Text(max_tokens=60, max_items=3, max_attribute_tokens=5)
HISTORIES = ([0], [1, 2], [4, 3, 2, 1, 0])
WITHOUT = "import sys\nsys.modules['fedmerge'] = sys.modules['sim'] = None\n"


def shop() -> Catalog:
    """Items with values that are cut, absent values, letters outside ASCII, and a limit of an attribute's own.

    No value is cut inside a letter of several bytes, which a text cannot express.
    """
    columns = {
        "title": ("red tent for kids and small doll", "Étui à café", "", "wooden puzzle 12", "a"),
        "colour": ("red blue green", "", "blue", "steel steel steel", ""),
        "maker": ("Bjørn & Søn", "the toy pack of the kids", "soap", "", "x"),
    }
    return make_catalog("shop", [f"i{number}" for number in range(5)], columns, {"colour": 2})


def sequence_roberta(folder: Path) -> Path:
    """A byte-level vocabulary behind two pre-tokenizers, as Qwen's is."""
    tiny_roberta(folder)
    definition = json.loads((folder / "tokenizer.json").read_text())
    byte_level = json.loads(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).__getstate__())
    split = json.loads(pre_tokenizers.Split(pattern=";", behavior="isolated").__getstate__())
    definition["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    return folder


def vectors_of(backbone: Backbone, catalog: Catalog) -> np.ndarray:
    """Encode items and histories from the token table, as the platform does."""
    table = build_token_table(catalog, backbone.tokenizer, TEXT.max_attribute_tokens)
    sequences = item_sequences(table, backbone.special, TEXT.max_tokens)
    sequences += pack_sequences(table, HISTORIES, backbone.special, TEXT.max_items, TEXT.max_tokens)
    return encode(backbone, sequences).numpy()


def run_recipes(folders: list[Path], catalog: Catalog) -> list[np.ndarray]:
    """Run the first code block of each card in one process; return the vectors of items and histories."""
    items = [{name: column[row] for name, column in catalog.attributes.items()} for row in range(len(catalog))]
    script = WITHOUT
    for folder in folders:
        block = (folder / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
        script += block.replace("PATH OF THIS FOLDER", str(folder))
        script += f"items = {items!r}\n"
        script += "texts = [item_text(item) for item in items]\n"
        script += f"texts += [history_text([items[row] for row in history]) for history in {HISTORIES!r}]\n"
        script += "print('VECTORS', json.dumps(np.asarray(encode(texts)).tolist()))\n"
    script = "import numpy as np\n" + script
    done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = [line.removeprefix("VECTORS ") for line in done.stdout.splitlines() if line.startswith("VECTORS")]
    return [np.array(json.loads(line)) for line in found]


@pytest.mark.long
def test_sentence_transformers(tmp_path: Path) -> None:
    builds: list[Callable[[Path], Path]] = [tiny_bert, tiny_roberta, sequence_roberta]
    catalog, folders, wanted = shop(), [], []
    for number, build in enumerate(builds):
        backbone = encoder_of(build, "mean", tmp_path / f"backbone-{number}")
        adapter = random_adapter(layout_of(backbone), 2, 1.0, 0)
        folders.append(tmp_path / str(number))
        export_model(backbone, adapter, folders[-1], TEXT, {}, template=catalog.template, catalog=catalog)
        wanted.append(vectors_of(folded(backbone, adapter), catalog))
    for found, expected in zip(run_recipes(folders, catalog), wanted, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.long
@needs_onnx
@needs_openvino
def test_onnx_and_openvino(tmp_path: Path) -> None:
    catalog = shop()
    formats: tuple[Format, ...] = ("onnx", "openvino")
    backbone = encoder_of(tiny_bert, "cls", tmp_path / "backbone")
    for to in formats:
        export_model(backbone, None, tmp_path / to, TEXT, {}, to=to, template=catalog.template, catalog=catalog)
    for found in run_recipes([tmp_path / to for to in formats], catalog):
        np.testing.assert_allclose(found, vectors_of(backbone, catalog), atol=1e-5)


def test_the_record_of_the_text(tmp_path: Path) -> None:
    catalog = shop()
    backbone = encoder_of(tiny_bert, "cls", tmp_path / "backbone")
    export_model(backbone, None, tmp_path / "out", TEXT, {}, template=catalog.template, catalog=catalog)
    assert json.loads((tmp_path / "out" / "text.json").read_text()) == {
        "format": 1,
        "attributes": [
            {"name": "title", "max_tokens": 5},
            {"name": "colour", "max_tokens": 2},
            {"name": "maker", "max_tokens": 5},
        ],
        "attribute": "{name}: {value}",
        "attribute_separator": " ",
        "max_items": 3,
        "item_order": "newest first",
        "item_separator": "; ",
        "max_tokens": 60,
        "pad_token_id": 0,
        "pooling": "cls",
        "normalised": True,
        "history_prompt": "",
        "item_prompt": "",
    }
