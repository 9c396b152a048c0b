"""Whole federations on tiny decoders: training, merges, coefficients, evaluation, recommendations, export."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from in_process import small_experiment
from tiny_families import llama, qwen3
from transformers import AutoModel, AutoTokenizer

from fedmerge.config import ATTRIBUTES, ExperimentConfig
from fedmerge.device import resolve_compute
from fedmerge.domain.catalog import Catalog, load_catalog
from fedmerge.domain.interactions import load_interactions
from fedmerge.domain.splits import evaluation_examples
from fedmerge.encoder.backbone import open_backbone
from fedmerge.encoder.export.folder import export_model
from fedmerge.encoder.families import TASK
from fedmerge.encoder.peft.folder import read_adapter
from fedmerge.encoder.text import item_text, sequence_text
from fedmerge.errors import BackboneError, LayoutMismatchError
from fedmerge.files import read_json
from fedmerge.merging.stack import stack_adapters
from fedmerge.serving.recommender import load_recommender, recommend
from sim.local.in_process import run_in_process

pytestmark = pytest.mark.federation

WIDTH, RANK, ATTRIBUTE_TOKENS = 24, 3, 30
PROMPT = f"Instruct: {TASK}\nQuery:"
TRAINED = ("beauty", "books", "coffee")


def experiment(place: Path, backbone: Path, **changes: object) -> ExperimentConfig:
    settings = {
        "backbone.source": str(backbone),
        "text.max_tokens": 300,
        "text.max_attribute_tokens": ATTRIBUTE_TOKENS,
        "text.order": "newest-last",
        "lora.rank": RANK,
        "lora.alpha": 4,
        "lora.variant": "rslora",
        "lora.target_modules": "attention,mlp",
        "train.max_steps": 2,
        "mergerec.granularities": "layer",
    }
    return small_experiment(place, **{**settings, **changes})


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ExperimentConfig:
    """A finished run on a decoder with a prompt, cut vectors, and histories that end with the newest item."""
    place = tmp_path_factory.mktemp("place")
    more = {"backbone.family": "qwen3-embedding", "backbone.dimension": WIDTH}
    config = experiment(place, qwen3(place / "qwen3"), **more)
    run_in_process(config)
    return config


def run_of(config: ExperimentConfig) -> Path:
    return Path(config.output_dir) / str(config.run_id)


class Original:
    """The backbone as its authors use it, on texts of a catalog; from transformers alone."""

    def __init__(self, config: ExperimentConfig, catalog: Catalog) -> None:
        self.model: Any = AutoModel.from_pretrained(config.backbone.source)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(config.backbone.source)
        rows = range(len(catalog))
        values = [{name: catalog.attributes[name][row] for name in ATTRIBUTES} for row in rows]
        self.texts = [item_text(value, self.tokenizer, ATTRIBUTE_TOKENS) for value in values]

    @torch.no_grad()
    def __call__(self, text: str) -> torch.Tensor:
        hidden = self.model(**self.tokenizer(text, return_tensors="pt")).last_hidden_state[0, -1, :WIDTH]
        return torch.nn.functional.normalize(hidden, dim=0)

    def items(self) -> torch.Tensor:
        return torch.stack([self(f" {text}") for text in self.texts])

    def user(self, history: list[int]) -> torch.Tensor:
        return self(f"{PROMPT} {sequence_text([self.texts[item] for item in history], 2, 'newest-last')}")


def test_metrics_of_the_backbone_are_those_of_the_original_convention(config: ExperimentConfig) -> None:
    folder = Path(config.domains.root) / "camping"
    encoder = Original(config, load_catalog(folder))
    items, hits = encoder.items(), 0
    examples = evaluation_examples(load_interactions(folder), "test", None, config.seed)
    for history, target in zip(examples.histories, examples.targets.tolist(), strict=True):
        scores = items @ encoder.user(history.tolist())
        hits += int((scores >= scores[target]).sum() <= 10)
    rows = pq.read_table(run_of(config) / "metrics.parquet").to_pylist()
    key = {"split": "test", "variant": "unmasked", "domain": "camping", "method": "backbone", "metric": "recall@10"}
    (row,) = [row for row in rows if all(row[name] == value for name, value in key.items())]
    assert (row["num_users"], row["sum"]) == (len(examples), pytest.approx(hits))
    assert 0 < hits < len(examples)


def test_experts_have_the_layers_of_their_groups_and_merges_are_exact(config: ExperimentConfig) -> None:
    run = run_of(config)
    experts = {name: read_adapter(run / "adapters" / name) for name in TRAINED}
    names = [f"self_attn.{end}" for end in ("q_proj", "k_proj", "v_proj", "o_proj")]
    names += [f"mlp.{end}" for end in ("gate_proj", "up_proj", "down_proj")]
    expected = {f"layers.{layer}.{name}" for layer in (0, 1) for name in names}
    merged = read_adapter(run / "merged" / "average")
    for name in expected:
        deltas = [expert.modules[name].delta_weight() for expert in experts.values()]
        assert [expert.modules[name].scaling for expert in experts.values()] == pytest.approx([4 / RANK**0.5] * 3)
        torch.testing.assert_close(merged.modules[name].delta_weight(), sum(deltas) / 3, atol=1e-6, rtol=0)
    assert {*merged.modules} == expected
    assert any(delta.any() for delta in deltas)
    assert stack_adapters(experts).groups == ("layer 0", "layer 1")


def test_the_conventions_are_part_of_the_provenance(config: ExperimentConfig) -> None:
    backbone = open_backbone(config.backbone, resolve_compute("cpu", "float32"))
    plain = open_backbone(
        config.backbone.model_copy(update={"family": "plain", "dimension": None}), resolve_compute("cpu", "float32")
    )
    recorded = read_json(run_of(config) / "merged" / "average" / "provenance.json")
    assert recorded is not None
    assert recorded["backbone"]["sha256"] == backbone.sha256 != plain.sha256
    other = config.model_copy(update={"backbone": config.backbone.model_copy(update={"history_prompt": ""})})
    with pytest.raises(LayoutMismatchError, match=r"made on a backbone with hash"):
        load_recommender(run_of(config) / "merged" / "average", Path(config.domains.root) / "camping", other)


def test_recommendations_of_the_backbone_are_those_of_the_original_convention(config: ExperimentConfig) -> None:
    folder = Path(config.domains.root) / "camping"
    catalog = load_catalog(folder)
    encoder, history = Original(config, catalog), [3, 8, 5]
    found = recommend(load_recommender("none", folder, config), [catalog.item_ids[i] for i in history], k=4)
    scores = encoder.items() @ encoder.user(history)
    scores[history] = -torch.inf
    assert [item.item_id for item in found] == [catalog.item_ids[i] for i in scores.topk(4).indices.tolist()]


def test_an_order_that_no_export_has_is_refused(config: ExperimentConfig, tmp_path: Path) -> None:
    backbone = open_backbone(config.backbone, resolve_compute("cpu", "float32"))
    with pytest.raises(BackboneError, match=r"newest-last.* cuts histories at the beginning.*fedmerge.recommend"):
        export_model(backbone, None, tmp_path / "out", config.text, {})
    assert not (tmp_path / "out").exists()


def test_a_decoder_that_attends_both_ways_is_merged_as_well(tmp_path: Path) -> None:
    more = {"backbone.family": "llm2vec", "text.order": "newest-first", "lora.target_modules": "q_proj,v_proj"}
    config = experiment(tmp_path, llama(tmp_path / "llama"), **more, **{"domains.unseen": ""})
    run_in_process(config)
    assert len(read_adapter(run_of(config) / "merged" / "mergerec-layer-wise").modules) == 4
