"""What a whole federation trained is evaluated after it, from disk, with the numbers of the run."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from in_process import small_experiment, train
from run_folders import output

from fedmerge.files import read_record

pytestmark = pytest.mark.federation
SETTINGS = {"head.vectors": "merge,expert", "head.hidden_size": 8, "head.max_epochs": 2, "head.rounds": 1}


@pytest.mark.parametrize("kind", ["local", "federated"])
def test_rows_are_those_of_the_run_and_the_choice_is_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    config = small_experiment(tmp_path, **{"head.kind": kind, "head.max_minutes": "none", **SETTINGS})
    train(config)
    run, choice = tmp_path / "runs" / "run", read_record(tmp_path / "runs" / "run" / "choice.json")
    rows = pq.read_table(run / "metrics.parquet").to_pylist()
    for domain in ("beauty", "camping"):
        of_run = {
            (row["method"], row["metric"], row["variant"]): row["sum"] / row["num_users"]
            for row in rows
            if row["domain"] == domain and row["split"] == "test"
        }
        command = ("evaluate", run, "--domain", tmp_path / "domains" / domain, "--split", "test", "--json")
        found = json.loads(output(capsys, *command))
        assert found["model"] == choice["per_domain"].get(domain, {"serve": "merged"})["serve"]
        methods = [*found["unmasked"]["methods"]]
        assert ("head on the expert, fused" in methods) == (domain == "beauty")
        assert ("federated head, fused" in methods) == (kind == "federated")
        compared = 0
        for variant in ("unmasked", "masked"):
            for method, metrics in found[variant]["methods"].items():
                label = choice["served"] if method == "merged" else method
                for metric, value in metrics.items():
                    if (label, metric, variant) in of_run:
                        assert value == pytest.approx(of_run[label, metric, variant], abs=1e-9), (method, metric)
                        compared += method != "merged"
        assert compared > 20
        assert domain != "beauty" or ("head on the merge, fused", "ndcg@10", "masked") in of_run
    history = "--history", "beauty-i00003"
    served = ("--domain", tmp_path / "domains" / "beauty", *history, "--model", "head on the merge, fused")
    assert "standardised" in output(capsys, "recommend", run, *served)
