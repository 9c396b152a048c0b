"""Recommendations: equal to a slow oracle and to what evaluation ranks; the catalog is enough."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from adapters import layout_of, random_adapter
from backbones import tiny_bert, tiny_roberta
from peft import PeftModel
from run_folders import Place, make_place, make_run, output, refusal
from transformers import AutoModel, AutoTokenizer

from fedmerge.adapter import Adapter, LoraModule, adapter_sha256
from fedmerge.client.evaluate import evaluate
from fedmerge.client.local_domain import open_domain
from fedmerge.config import ATTRIBUTES, Text, load_config
from fedmerge.device import resolve_compute
from fedmerge.domain.catalog import Catalog, load_catalog
from fedmerge.domain.demo import generate_domain
from fedmerge.domain.splits import evaluation_examples
from fedmerge.encoder.adapted import folded
from fedmerge.encoder.backbone import Backbone, load_backbone
from fedmerge.encoder.encode import encode
from fedmerge.encoder.lora import applied
from fedmerge.encoder.peft.folder import read_adapter, write_adapter
from fedmerge.encoder.text import item_text, pack_sequences, sequence_text
from fedmerge.errors import ConfigError, DomainError, LayoutMismatchError
from fedmerge.evaluation.ranks import rank_targets
from fedmerge.serving.recommender import Recommender, load_recommender, make_recommender, recommend

Capsys = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def finished(place: Place) -> Path:
    return make_run(place, "trial", ["merge.methods=average"])


@pytest.fixture(scope="module")
def average(finished: Path) -> Path:
    return finished / "merged" / "average"


@pytest.fixture(scope="module")
def recommender(place: Place, average: Path) -> Recommender:
    return load_recommender(average, place.domains / "toys")


def history_of(recommender: Recommender, *indices: int) -> list[str]:
    return [recommender.catalog.item_ids[index] for index in indices]


def oracle(place: Place, adapter: Path, catalog: Catalog, history: list[int]) -> list[float]:
    """Every item's score by PEFT, the tokenizer and plain sums, one text at a time."""
    bare = AutoModel.from_pretrained(place.root / "backbone", add_pooling_layer=False)
    model = PeftModel.from_pretrained(bare, str(adapter)).eval()
    tokenizer = AutoTokenizer.from_pretrained(place.root / "backbone")

    def vector(text: str) -> list[float]:
        inputs = tokenizer(text, truncation=True, max_length=96, return_tensors="pt")
        with torch.no_grad():
            hidden = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state[0]
        mean = [sum(float(row[i]) for row in hidden) / len(hidden) for i in range(hidden.shape[1])]
        norm = sum(value * value for value in mean) ** 0.5
        return [value / norm for value in mean]

    texts = []
    for index in range(len(catalog)):
        attributes = {name: catalog.attributes[name][index] for name in ATTRIBUTES}
        texts.append(item_text(attributes, tokenizer, 12))
    items = [vector(text) for text in texts]
    user = vector(sequence_text([texts[index] for index in history], 3))
    return [sum(a * b for a, b in zip(user, item, strict=True)) for item in items]


@pytest.mark.parametrize("history", [[3], [0, 5, 9], [1, 2, 3, 4, 5, 4]], ids=len)
def test_scores_and_order_are_those_of_a_slow_oracle(
    place: Place, average: Path, recommender: Recommender, history: list[int]
) -> None:
    catalog = recommender.catalog
    wanted = oracle(place, average, catalog, history)
    for keep_seen in (False, True):
        candidates = [index for index in range(len(catalog)) if keep_seen or index not in history]
        best = sorted(candidates, key=lambda index: -wanted[index])[:7]
        found = recommend(recommender, history_of(recommender, *history), 7, keep_seen)
        assert [item.item_id for item in found] == [catalog.item_ids[index] for index in best]
        assert [item.title for item in found] == [catalog.attributes["title"][index] for index in best]
        np.testing.assert_allclose([item.score for item in found], [wanted[index] for index in best], atol=1e-5)


def test_ranks_and_metrics_are_those_of_evaluation(place: Place, average: Path, recommender: Recommender) -> None:
    config, adapter = load_config(average.parent.parent / "config.toml"), read_adapter(average)
    domain = open_domain(place.domains / "toys", place.backbone(), config.text)
    examples = evaluation_examples(domain.interactions, "test", None, 0)
    with applied(domain.backbone, adapter):
        items = encode(domain.backbone, domain.item_sequences)
        special = domain.backbone.special
        users = encode(domain.backbone, pack_sequences(domain.table, examples.histories, special, 3, 96))
    scores = (users @ items.T).numpy()
    everything = len(domain.catalog)
    found = {"unmasked": 0.0, "masked": 0.0}
    for user, (history, target) in enumerate(zip(examples.histories, examples.targets, strict=True)):
        ids = history_of(recommender, *history)
        for variant, seen in (("unmasked", None), ("masked", [history])):
            ranked = recommend(recommender, ids, everything, keep_seen=variant == "unmasked")
            positions = {item.item_id: number for number, item in enumerate(ranked, start=1)}
            for item in ranked:
                assert item.score == pytest.approx(scores[user, recommender.item_index[item.item_id]], abs=1e-5)
            rank = int(rank_targets(users[user : user + 1], items, examples.targets[user : user + 1], seen)[0])
            name = domain.catalog.item_ids[target]
            if name in positions:  # the target of a repeated purchase is masked with its history here
                assert positions[name] == rank
            found[variant] += 1 / rank
    sums = evaluate(domain, {"average": adapter}, "test", None, 0)
    for variant, of_variant in sums.items():
        assert found[variant] == pytest.approx(of_variant.mean("average", "mrr") * len(examples))


def test_only_manifest_and_catalog_are_read(place: Place, average: Path, tmp_path: Path) -> None:
    shutil.copytree(place.domains / "toys", tmp_path / "toys")
    (tmp_path / "toys" / "interactions.parquet").unlink()
    recommender = load_recommender(str(average), str(tmp_path / "toys"))
    assert len(recommend(recommender, history_of(recommender, 0))) == 10


def test_old_items_of_a_long_history_are_masked_but_not_read(recommender: Recommender) -> None:
    recent = history_of(recommender, 2, 4, 6)
    short = recommend(recommender, recent, 20, keep_seen=True)
    assert recommend(recommender, history_of(recommender, 9, 8) * 50 + recent, 20, keep_seen=True) == short
    masked = recommend(recommender, history_of(recommender, 9, 8) + recent, 20)
    assert masked == [item for item in short if item.item_id not in history_of(recommender, 9, 8, 2, 4, 6)]


def test_no_more_than_the_catalog_has(recommender: Recommender) -> None:
    everything = history_of(recommender, *range(20))
    assert recommend(recommender, everything) == []
    assert len(recommend(recommender, everything[:1], 100)) == 19
    assert len(recommend(recommender, everything[:1], 100, keep_seen=True)) == 20


def test_of_equal_scores_the_first_in_the_catalog_comes_first(place: Place) -> None:
    shop = generate_domain("toys", num_users=1, num_items=20).catalog
    same = dict.fromkeys(ATTRIBUTES, ("tent",) * 20)
    recommender = make_recommender(place.backbone(), None, Catalog("toys", shop.item_ids, same, "x"), Text())
    ids = recommender.catalog.item_ids
    assert [item.item_id for item in recommend(recommender, [ids[3]], 5)] == [ids[i] for i in (0, 1, 2, 4, 5)]


def test_without_an_adapter_it_is_the_backbone(place: Place, finished: Path) -> None:
    config = load_config(finished / "config.toml")
    alone = load_recommender("none", place.domains / "toys", config)
    domain = open_domain(place.domains / "toys", place.backbone(), config.text)
    torch.testing.assert_close(alone.item_vectors, encode(domain.backbone, domain.item_sequences))


# An encoder of its own


@pytest.mark.parametrize("build", [tiny_bert, tiny_roberta])
def test_a_folded_encoder_is_the_applied_one_and_shares_the_rest(build: object, tmp_path: Path) -> None:
    assert callable(build)
    backbone: Backbone = load_backbone(str(build(tmp_path / "b")), "cls", resolve_compute("cpu", "float32"))
    before = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    adapter = random_adapter(layout_of(backbone), 2, 1.0, 0)
    encoder = folded(backbone, adapter)
    sequences = [np.array([2, 7, 9, 3], dtype=np.int32), np.array([2, 8, 3], dtype=np.int32)]
    with applied(backbone, adapter):
        wanted = encode(backbone, sequences)
    assert torch.equal(encode(encoder, sequences), wanted)
    assert not torch.allclose(encode(backbone, sequences), wanted, atol=1e-3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.model.state_dict().items())
    theirs = dict(backbone.model.named_parameters())
    own = {name for name, tensor in encoder.model.named_parameters() if tensor is not theirs[name]}
    assert own == {f"{name}.weight" for name in adapter.modules}
    assert not any(tensor.requires_grad for tensor in encoder.model.parameters())
    assert folded(backbone, None) is backbone


# What is refused


def test_bad_requests_are_refused(recommender: Recommender) -> None:
    (known,) = history_of(recommender, 0)
    with pytest.raises(DomainError, match="toys"):
        recommend(recommender, [])
    for k in (0, -3):
        with pytest.raises(ConfigError, match=rf"k .*{k}.* 1"):
            recommend(recommender, [known], k)
    with pytest.raises(DomainError, match=f"'{known}'"):
        recommend(recommender, known)
    with pytest.raises(DomainError, match=rf"1 of 2 .*toys.*'{known}x'.*{known}"):
        recommend(recommender, [known, f"{known}x"])
    with pytest.raises(DomainError, match=rf"'§'.* 20 items.*'{known}'"):
        recommend(recommender, ["§"])


def test_adapters_that_do_not_fit_are_refused(place: Place, average: Path, tmp_path: Path, finished: Path) -> None:
    config = load_config(finished / "config.toml")
    toys = place.domains / "toys"
    adapter = read_adapter(average)
    name, module = next(iter(adapter.modules.items()))
    shutil.copytree(average, tmp_path / "changed")
    write_adapter(Adapter({name: module}), tmp_path / "changed", "x")
    with pytest.raises(LayoutMismatchError, match=rf"changed: .*{adapter_sha256(adapter)[:12]}"):
        load_recommender(tmp_path / "changed", toys, config)
    lora_B = module.lora_B.clone()
    lora_B[0, 0] = torch.inf
    write_adapter(Adapter({name: LoraModule(module.lora_A, lora_B, 1.0)}), tmp_path / "infinite", "x")
    with pytest.raises(LayoutMismatchError, match=rf"infinite: 1 of {lora_B.numel()} .*{name}.lora_B"):
        load_recommender(tmp_path / "infinite", toys, config)
    write_adapter(random_adapter({"decoder.q": (32, 32)}, 1, 1.0, 0), tmp_path / "foreign", "x")
    with pytest.raises(LayoutMismatchError, match=r"decoder.q"):
        load_recommender(tmp_path / "foreign", toys, config)
    huge = LoraModule(torch.full_like(module.lora_A, 1e30), torch.full_like(module.lora_B, 1e30), 1.0)
    with pytest.raises(LayoutMismatchError, match="20 of 20"):
        make_recommender(place.backbone(), Adapter({name: huge}), load_catalog(toys), config.text)
    other = load_config(finished / "config.toml", [f"backbone.source={tiny_bert(tmp_path / 'other', seed=1)}"])
    with pytest.raises(LayoutMismatchError, match=rf"{place.backbone().sha256[:12]}.* other "):
        load_recommender(average, toys, other)


# The command


def test_recommend_prints_titles_and_scores(
    place: Place, average: Path, recommender: Recommender, capsys: Capsys
) -> None:
    ids = history_of(recommender, 1, 5)
    arguments = ("--domain", place.domains / "toys", "--history", ",".join(ids), "-k", "3")
    lines = output(capsys, "recommend", average, *arguments).splitlines()
    titles = recommender.catalog.attributes["title"]
    assert lines[0] == "toys (SYNTHETIC DATA): history"
    assert [line.strip() for line in lines[1:3]] == [f"{ids[0]}  {titles[1]}", f"{ids[1]}  {titles[5]}"]
    for number, (line, item) in enumerate(zip(lines[4:], recommend(recommender, ids, 3), strict=True), start=1):
        assert line.split() == [str(number), f"{item.score:.4f}", item.item_id, *item.title.split()]


def test_recommend_as_json(place: Place, average: Path, recommender: Recommender, capsys: Capsys) -> None:
    (seen,) = history_of(recommender, 4)
    arguments = ("recommend", average, "--domain", place.domains / "toys", "--history", f" {seen} ,", "--json")
    found = json.loads(output(capsys, *arguments, "--keep-seen", "-k", "20"))
    assert {key: found[key] for key in ("domain", "synthetic", "adapter", "precision", "keep_seen")} == {
        "domain": "toys",
        "synthetic": True,
        "adapter": str(average),
        "precision": "float32",
        "keep_seen": True,
    }
    assert found["history"] == [{"item_id": seen, "title": recommender.catalog.attributes["title"][4]}]
    wanted = recommend(recommender, [seen], 20, keep_seen=True)
    assert [(item["item_id"], item["title"]) for item in found["recommendations"]] == [
        (item.item_id, item.title) for item in wanted
    ]
    assert [item["score"] for item in found["recommendations"]] == pytest.approx([item.score for item in wanted])
    settings = ("--config", average.parent.parent / "config.toml")
    alone = output(capsys, "recommend", "none", *settings, *arguments[2:])
    assert json.loads(alone)["adapter"] == "none"


def test_the_command_refuses_in_a_line(place: Place, average: Path, tmp_path: Path, capsys: Capsys) -> None:
    def refused(*arguments: str | Path) -> str:
        return refusal(capsys, "recommend", *arguments)

    toys, known = place.domains / "toys", load_catalog(place.domains / "toys").item_ids[0]
    assert "gone: " in refused(average, "--domain", tmp_path / "gone", "--history", known)
    assert "adapter_config.json" in refused(tmp_path / "gone", "--domain", toys, "--history", known)
    assert "toys" in refused(average, "--domain", toys, "--history", " , ")
    assert "0" in refused(average, "--domain", toys, "--history", known, "-k", "0")
    assert "'nothing-like-it'" in refused(average, "--domain", toys, "--history", "nothing-like-it")
    assert "text.max_tokens = 4096" in refused(
        average, "--domain", toys, "--history", known, "--set", "text.max_tokens=4096"
    )
