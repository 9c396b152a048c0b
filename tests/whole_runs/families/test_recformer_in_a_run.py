"""A whole federation on a tiny RecFormer: training, learned merges, evaluation, recommendations."""

from pathlib import Path

import pytest
import torch
from in_process import small_experiment
from tiny_families import recformer

from fedmerge.device import resolve_compute
from fedmerge.domain.catalog import load_catalog
from fedmerge.encoder.backbone import open_backbone
from fedmerge.encoder.encode import encode
from fedmerge.encoder.peft.folder import read_adapter
from fedmerge.encoder.text import build_token_table, item_sequences, pack_sequences
from fedmerge.files import read_json
from fedmerge.serving.recommender import load_recommender, recommend
from sim.local.in_process import run_in_process

pytestmark = pytest.mark.federation


def test_a_federation_trains_merges_and_recommends_on_a_recformer(tmp_path: Path) -> None:
    settings = {
        "backbone.source": str(recformer(tmp_path / "recformer")),
        "text.max_tokens": 100,
        "lora.target_modules": "attention,query_global,key_global,value_global",
        "train.max_steps": 2,
        "train.objectives": "mip=0.1",
        "mergerec.granularities": "layer",
        "domains.unseen": "",
    }
    config = small_experiment(tmp_path, **settings)
    run_in_process(config)
    run = Path(config.output_dir) / str(config.run_id)
    adapters = [read_adapter(run / "adapters" / name) for name in config.domains.train]
    merged = read_adapter(run / "merged" / "average")
    ends = ("query", "key", "value", "query_global", "key_global", "value_global")
    names = {f"attention.self.{name}" for name in ends} | {"attention.output.dense"}
    assert {*merged.modules} == {f"encoder.layer.{layer}.{name}" for layer in (0, 1) for name in names}
    for name, module in merged.modules.items():
        deltas = [adapter.modules[name].delta_weight() for adapter in adapters]
        torch.testing.assert_close(module.delta_weight(), sum(deltas) / 3, atol=1e-6, rtol=0)
    assert all(adapters[0].modules[f"encoder.layer.0.attention.self.{name}"].lora_B.any() for name in ends[3:])
    assert (run / "merged" / "mergerec-layer-wise").is_dir()

    backbone = open_backbone(config.backbone, resolve_compute("cpu", "float32"))
    recorded = read_json(run / "merged" / "average" / "provenance.json")
    assert recorded is not None
    assert recorded["backbone"]["sha256"] == backbone.sha256
    folder = Path(config.domains.root) / "books"
    catalog, text = load_catalog(folder), config.text
    table = build_token_table(catalog, backbone.tokenizer, text.max_attribute_tokens, backbone.special.attributes)
    (user,) = pack_sequences(table, [[3, 8, 5]], backbone.special, text.max_items, text.max_tokens)
    scores = encode(backbone, item_sequences(table, backbone.special, text.max_tokens)) @ encode(backbone, [user])[0]
    scores[[3, 8, 5]] = -torch.inf
    found = recommend(load_recommender("none", folder, config), [catalog.item_ids[i] for i in (3, 8, 5)], k=4)
    assert [item.item_id for item in found] == [catalog.item_ids[i] for i in scores.topk(4).indices.tolist()]
