"""An exported model in the real sentence-transformers gives the platform's vectors."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from adapters import layout_of, random_adapter
from backbones import tiny_bert, tiny_roberta
from run_folders import contents, make_place, make_run, output, refusal

from fedmerge.adapter import Adapter, LoraModule
from fedmerge.config import ATTRIBUTES, Text
from fedmerge.device import resolve_compute
from fedmerge.domain.catalog import Catalog
from fedmerge.domain.demo import generate_domain
from fedmerge.encoder.adapted import folded
from fedmerge.encoder.backbone import load_backbone
from fedmerge.encoder.encode import encode
from fedmerge.encoder.export.folder import export_model
from fedmerge.encoder.peft.folder import write_adapter
from fedmerge.encoder.text import build_token_table, item_sequences, item_text, pack_sequences, sequence_text
from fedmerge.files import read_json

Capsys = pytest.CaptureFixture[str]
TEXT = Text(max_tokens=120, max_items=3, max_attribute_tokens=20)
HISTORIES = [[4], [1, 2], [7, 8, 9, 3, 5]]


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return generate_domain("toys", num_users=1, num_items=20).catalog


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("build", [tiny_bert, tiny_roberta], ids=["bert", "roberta"])
def test_sentence_transformers_gives_the_same_vectors(
    build: Callable[[Path], Path], pooling: str, catalog: Catalog, tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer  # noqa: PLC0415  # takes seconds, in this process alone

    backbone = load_backbone(str(build(tmp_path / "backbone")), pooling, resolve_compute("cpu", "float32"))
    adapter = random_adapter(layout_of(backbone), 2, 1.0, 0)
    export_model(backbone, adapter, tmp_path / "out", TEXT, {"method": "average"})
    model = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert (model.max_seq_length, model.similarity_fn_name) == (120, "cosine")

    table = build_token_table(catalog, backbone.tokenizer, TEXT.max_attribute_tokens)
    encoder = folded(backbone, adapter)
    sequences = item_sequences(table, backbone.special, TEXT.max_tokens)
    texts = [
        item_text({name: catalog.attributes[name][i] for name in ATTRIBUTES}, backbone.tokenizer, 20) for i in range(20)
    ]
    found = model.encode(texts, convert_to_numpy=True)
    np.testing.assert_allclose(found, encode(encoder, sequences).numpy(), atol=1e-5)
    assert not np.allclose(found, encode(backbone, sequences).numpy(), atol=1e-2)

    packed = pack_sequences(table, HISTORIES, backbone.special, TEXT.max_items, TEXT.max_tokens)
    users = [sequence_text([texts[index] for index in history], TEXT.max_items) for history in HISTORIES]
    np.testing.assert_allclose(model.encode(users), encode(encoder, packed).numpy(), atol=1e-5)
    assert max(map(len, packed)) == TEXT.max_tokens or build is tiny_bert  # what is too long is cut alike


def test_weights_are_those_of_the_adapter_and_the_backbone_is_left_alone(tmp_path: Path) -> None:
    backbone = load_backbone(str(tiny_bert(tmp_path / "backbone")), "mean", resolve_compute("cpu", "float32"))
    before = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    adapter = random_adapter(layout_of(backbone), 2, 1.0, 0)
    export_model(backbone, adapter, tmp_path / "out", TEXT, {})
    again = load_backbone(str(tmp_path / "out"), "mean", resolve_compute("cpu", "float32"))
    for name, tensor in again.model.state_dict().items():
        module = adapter.modules.get(name.removesuffix(".weight"))
        wanted = before[name] if module is None else before[name] + module.delta_weight()
        assert torch.equal(tensor, wanted)
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.model.state_dict().items())


# The command


def test_export_of_a_run_s_merge(tmp_path: Path, capsys: Capsys) -> None:
    place = make_place(tmp_path / "place")
    average = make_run(place, "trial", ["merge.methods=average"]) / "merged" / "average"
    out = tmp_path / "model"
    assert str(out) in output(capsys, "export", average, out)
    assert sorted(contents(out)) == [
        "1_Pooling/config.json",
        "2_Normalize/config.json",
        "README.md",
        "config.json",
        "config_sentence_transformers.json",
        "model.safetensors",
        "modules.json",
        "provenance.json",
        "sentence_bert_config.json",
        "text.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    provenance = read_json(average / "provenance.json")
    written = json.loads((out / "provenance.json").read_text())
    assert written.pop("export")["largest_deviation"] < 1e-6
    assert written == provenance
    card = (out / "README.md").read_text()
    for wanted in (
        "library_name: sentence-transformers",
        provenance["sha256"],
        "`title` 12, `brand` 12, `category` 12",
        "cuts at 96 tokens",
    ):
        assert wanted in card
    assert all(f"| {name} | `{digest}` |" in card for name, digest in provenance["domains"].items())
    assert json.loads((out / "sentence_bert_config.json").read_text())["max_seq_length"] == 96

    before = contents(out)
    assert f"{out}: " in refusal(capsys, "export", average, out)
    assert contents(out) == before
    output(capsys, "export", average.parent.parent / "adapters" / "toys", tmp_path / "expert")
    assert '- method: `"expert"`' in (tmp_path / "expert" / "README.md").read_text()
    config = ("--config", average.parent.parent / "config.toml")
    output(capsys, "export", "none", tmp_path / "alone", *config)
    assert json.loads((tmp_path / "alone" / "provenance.json").read_text())["method"] == "backbone alone"
    assert "`backbone` as it is, in float32" in (tmp_path / "alone" / "README.md").read_text()
    assert "`backbone` with a LoRA adapter folded in" in card
    assert (out / "model.safetensors").stat().st_mode == (out / "config.json").stat().st_mode


def test_bad_exports_are_refused_and_leave_nothing(tmp_path: Path, capsys: Capsys) -> None:
    backbone = load_backbone(str(tiny_bert(tmp_path / "backbone")), "mean", resolve_compute("cpu", "float32"))
    good = random_adapter(layout_of(backbone), 1, 1.0, 0)
    name, module = next(iter(good.modules.items()))
    write_adapter(good, tmp_path / "good", "x")
    nan = LoraModule(module.lora_A * torch.nan, module.lora_B, 1.0)
    write_adapter(Adapter({name: nan}), tmp_path / "nan", "x")
    write_adapter(random_adapter({"decoder.q": (32, 32)}, 1, 1.0, 0), tmp_path / "foreign", "x")
    settings = ("--set", f"backbone.source={tmp_path / 'backbone'}", "text.max_tokens=64", "runtime.device=cpu")

    def refused(adapter: str | Path, *more: str, out: str = "out") -> str:
        return refusal(capsys, "export", adapter, tmp_path / out, *settings, *more)

    before = contents(tmp_path)
    assert "adapter_config.json" in refused(tmp_path / "gone")
    assert f"{module.lora_A.numel()} of {module.lora_A.numel()}" in refused(tmp_path / "nan")
    assert "decoder.q" in refused(tmp_path / "foreign")
    assert "text.max_tokens = 4096" in refused(tmp_path / "good", "text.max_tokens=4096")
    assert str(tmp_path / "none") in refused(tmp_path / "good", f"backbone.source={tmp_path / 'none'}")
    (tmp_path / "file").write_text("mine")
    assert f"{tmp_path / 'file'}: " in refused(tmp_path / "good", out="file")
    assert f"{tmp_path / 'file' / 'model'}: " in refused(tmp_path / "good", out="file/model")
    assert {path: digest for path, digest in contents(tmp_path).items() if path != "file"} == before


# Texts


def test_texts_of_items_and_histories() -> None:
    assert item_text({"title": "Red tent", "brand": "", "category": "Camping"}) == "title: Red tent category: Camping"
    assert item_text({"category": "Toys", "title": "Car"}) == "title: Car category: Toys"
    assert item_text({}) == ""
    assert sequence_text(["a", "b", "c"]) == "c; b; a"
    assert sequence_text(["a", "b", "c"], 2) == "c; b"


def test_values_are_cut_where_the_token_table_cuts_them(tmp_path: Path) -> None:
    backbone = load_backbone(str(tiny_bert(tmp_path / "backbone")), "mean", resolve_compute("cpu", "float32"))
    found = item_text({"title": "red tents and stove", "brand": "toy"}, backbone.tokenizer, 2)
    assert found == "title: red tent brand: toy"
    ids = backbone.tokenizer(found, add_special_tokens=False)["input_ids"]
    full = backbone.tokenizer("red tents", add_special_tokens=False)["input_ids"]
    assert len(full) == 3  # red, tent, ##s
    assert ids[2:4] == full[:2]
