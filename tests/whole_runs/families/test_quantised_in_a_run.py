"""A whole federation on a quantised backbone: its adapters merge as all do, and its hash tells it from another."""

from pathlib import Path

import pytest
import torch
from in_process import small_experiment

from fedmerge.device import resolve_compute
from fedmerge.encoder.backbone import open_backbone
from fedmerge.encoder.peft.folder import read_adapter
from fedmerge.errors import LayoutMismatchError
from fedmerge.files import read_json
from fedmerge.serving.recommender import load_recommender
from sim.local.in_process import run_in_process

pytestmark = pytest.mark.federation


def test_a_federation_on_an_int8_backbone_merges_exactly(tmp_path: Path) -> None:
    config = small_experiment(tmp_path, **{"backbone.quantisation": "int8", "domains.unseen": ""})
    run_in_process(config)
    run = Path(config.output_dir) / str(config.run_id)
    adapters = [read_adapter(run / "adapters" / name) for name in config.domains.train]
    for name, module in read_adapter(run / "merged" / "average").modules.items():
        deltas = [adapter.modules[name].delta_weight() for adapter in adapters]
        torch.testing.assert_close(module.delta_weight(), sum(deltas) / 3, atol=1e-6, rtol=0)
        assert any(delta.any() for delta in deltas)
    merge, folder = run / "merged" / "mergerec-layer-wise", Path(config.domains.root) / "books"
    recorded = read_json(merge / "provenance.json")
    assert recorded is not None
    backbone = open_backbone(config.backbone, resolve_compute("cpu", "float32"))
    assert recorded["backbone"]["sha256"] == backbone.sha256
    load_recommender(merge, folder, config)
    full = config.model_copy(update={"backbone": config.backbone.model_copy(update={"quantisation": "none"})})
    with pytest.raises(LayoutMismatchError, match=r"made on a backbone with hash"):
        load_recommender(merge, folder, full)
