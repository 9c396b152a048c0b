"""A secure sum with Flower and Ray: `fedmerge run` on a shipped configuration."""

import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from backbones import tiny_bert
from in_process import expert_of

from fedmerge.client.local_domain import open_domain
from fedmerge.config import load_config
from fedmerge.device import resolve_compute
from fedmerge.domain.demo import write_demo
from fedmerge.encoder.backbone import load_backbone
from fedmerge.encoder.peft.folder import read_adapter
from fedmerge.files import read_json

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

SHIPPED = Path(__file__).resolve().parents[2] / "configs" / "privacy" / "aggregate-only.toml"
TRAIN = ("beauty", "books", "coffee")


def test_the_server_learns_the_average_and_no_expert(tmp_path: Path) -> None:
    write_demo(tmp_path / "domains", num_domains=8, num_users=60, num_items=40)
    tiny_bert(tmp_path / "backbone")
    settings = {
        "run_id": "secure",
        "output_dir": tmp_path / "runs",
        "cache_dir": tmp_path / "cache",
        "domains.root": tmp_path / "domains",
        "domains.train": ",".join(TRAIN),
        "domains.unseen": "camping",
        "backbone.source": tmp_path / "backbone",
        "lora.rank": 2,
        "lora.alpha": 4,
        "train.max_steps": 6,
        "train.warmup_steps": 1,
        "train.validate_every_steps": 2,
        "train.learning_rate": 0.03,
        "train.batch_size": 16,
        "runtime.device": "cpu",
        "runtime.precision": "float32",
        "runtime.server_threads": 1,
    }
    options = [f"{key}={value}" for key, value in settings.items()]
    done = subprocess.run(
        [sys.executable, "-m", "fedmerge.cli", "run", str(SHIPPED), "--set", *options],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    folder = tmp_path / "runs" / "secure"
    assert "secure sum of 3 clients" in done.stdout
    assert not (folder / "adapters").exists()
    assert len(list(folder.rglob("adapter_model.safetensors"))) == 4  # the mean, average, two of task arithmetic
    sent = {(row["message"], row["name"]) for row in pq.read_table(folder / "exposure.parquet").to_pylist()}
    assert ("query.secagg_masked", "masked.values") in sent
    assert not any("lora" in name for _, name in sent)

    config = load_config(SHIPPED, options)
    compute = resolve_compute(config.runtime.device, config.runtime.precision)
    backbone = load_backbone(config.backbone.source, config.backbone.pooling, compute)
    torch.set_num_threads(config.runtime.threads_per_client)
    deltas = []
    for name in TRAIN:  # from the clients' own disk
        expert, report = expert_of(
            open_domain(tmp_path / "domains" / name, backbone, config.text), config, lambda line: None
        )
        assert report["cached"]
        deltas.append({key: module.delta_weight() for key, module in expert.modules.items()})
    made = read_json(folder / "secure-sum" / "sum.json")
    average = read_adapter(folder / "merged" / "average")
    for key, module in average.modules.items():
        expected = torch.stack([each[key] for each in deltas]).mean(0)
        assert float(expected.abs().max()) > 1e-4
        torch.testing.assert_close(module.delta_weight(), expected, rtol=0, atol=made["tolerance"] + 1e-7)
    shutil.rmtree(tmp_path / "runs")
