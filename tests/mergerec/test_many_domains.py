"""The benchmark of many domains at a small size: its tables, and what its federations are."""

import sys

import bench_many_domains as bench
import pytest
import torch

SMALL = "--cost 3 6 --repeats 1 --timed-steps 3 --width 32 --layers 1 --sample 2 --quality 2 4 --seeds 1 --steps 2"
SMALL += " --items 4 --groups 2 --group-domains 4 --group-seeds 1"


def test_the_benchmark_prints_its_tables(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["bench_many_domains.py", *SMALL.split()])
    try:
        bench.main()
    finally:
        torch.set_num_threads(threads)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    cost = [row for row in rows if len(row) == 8 and row[0] in ("3", "6") and row[1] in ("all", "2")]
    assert [row[:2] for row in cost] == [["3", "all"], ["6", "all"], ["3", "2"], ["6", "2"]]
    all_3, all_6, sampled_3, sampled_6 = (float(row[-1]) for row in cost)  # MiB
    assert all_6 == pytest.approx(2 * all_3, abs=0.02)
    assert sampled_6 == sampled_3
    losses = {(row[0], " ".join(row[1:-6])): float(row[-5]) for row in rows if len(row) > 6 and row[-3] == "to"}
    assert losses["2", "initial"] == 0
    assert losses["4", "all"] == 1
    assert "2 a step" in {name for _, name in losses}
    true, chosen, right, of, seeds, one, served = rows[-1]
    assert (true, of, seeds) == ("2", "of", "1")
    assert chosen in {"1", "2", "3", "4"}
    assert right in {"0", "1"}
    assert 0 < float(one) <= float(served) <= 1


def test_experts_share_an_update_and_differ_in_length() -> None:
    experts = bench.experts_of(bench.build_backbone(32, 1, 0), 4, 0)
    lengths = [
        sum(float(module.delta_weight().norm()) ** 2 for module in each.modules.values()) ** 0.5
        for each in experts.values()
    ]
    assert lengths[1] / lengths[0] == pytest.approx(4, rel=0.2)  # 2 against 0.5
    assert lengths[2] / lengths[0] == pytest.approx(1, rel=0.2)
    first, third = (next(iter(experts[f"domain 000{k}"].modules.values())).delta_weight().flatten() for k in (0, 2))
    assert float(torch.cosine_similarity(first, third, dim=0)) == pytest.approx(0.8, abs=0.1)  # 1 / (1 + 0.5²)
