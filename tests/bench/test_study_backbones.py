"""The study of backbones without training: its rows are those of an evaluation, and it resumes."""

import json
from pathlib import Path

import pytest
import study_backbones
from backbones import tiny_bert
from tiny_families import smollm

from fedmerge.client.baselines.rankers import baseline_rankers
from fedmerge.client.evaluate import evaluate
from fedmerge.client.local_domain import open_domain
from fedmerge.config import Evaluation, Text
from fedmerge.config.model import BackboneSection
from fedmerge.device import resolve_compute
from fedmerge.domain.demo import generate_domain
from fedmerge.domain.folder import write_domain
from fedmerge.encoder.backbone import open_backbone
from fedmerge.evaluation.sums import metric_sums_from_dict


def test_rows_equal_an_evaluation_and_pieces_are_encoded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(study_backbones, "PIECE", 10)
    demo = generate_domain("toys", num_users=30, num_items=25)
    folder = tmp_path / "toys"
    write_domain(folder, demo.catalog, demo.interactions, public_catalog=True, synthetic=True, source="test")
    sources = [str(tiny_bert(tmp_path / "bert")), str(smollm(tmp_path / "smollm"))]
    settings = ["text.max_tokens=64", "text.max_items=4", "runtime.precision=float32"]
    arguments = [
        str(folder),
        "--out",
        str(tmp_path / "out"),
        "--users",
        "20",
        "--set",
        *settings,
        "--backbones",
        *sources,
    ]
    study_backbones.main(arguments)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    for source, order in zip(sources, ("newest-first", "newest-last"), strict=True):
        backbone = open_backbone(BackboneSection(source=source), resolve_compute("cpu", "float32"))
        domain = open_domain(folder, backbone, Text(max_tokens=64, max_items=4, order=order))
        last = baseline_rankers(domain, ["last-item"], Evaluation(), 0, str(tmp_path / "cache"))
        direct = evaluate(domain, {"backbone": None}, "valid", 20, 0, last)
        for record in results["sums"]["toys"]:
            sums = metric_sums_from_dict(record)
            for row, expected in ((f"text, {order}", "backbone"), ("last item", "last item")):
                found = [sums.mean(f"{Path(source).name}: {row}", metric) for metric in ("recall@10", "ndcg@10")]
                assert found == [direct[sums.variant].mean(expected, metric) for metric in ("recall@10", "ndcg@10")]
    printed = capsys.readouterr().out
    assert "smollm: text, newest-last" in printed
    assert "difference" in printed

    pieces = sorted((tmp_path / "out").rglob("*.safetensors"))
    assert len(pieces) == 2 * (3 + 2 + 2)  # items, and users in both orders
    pieces[0].unlink()
    kept = {piece: piece.stat().st_mtime_ns for piece in pieces[1:]}
    study_backbones.main(arguments)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["sums"] == results["sums"]
    assert pieces[0].is_file()
    assert kept == {piece: piece.stat().st_mtime_ns for piece in kept}
