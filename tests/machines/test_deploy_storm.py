"""All nodes of a deployment at once, a third of them killed during training: the benchmark of the storm, small."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from deploy_hosts import REPOSITORY, has_nginx

pytestmark = [
    pytest.mark.deploy,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not has_nginx(), reason="nginx is not installed: apt-get install nginx"),
]


def test_a_storm_and_the_loss_of_a_third_end_complete_and_replies_come_in_bulk(tmp_path: Path) -> None:
    """A killed node is refused until Flower has noticed its end, up to a minute: the test takes little more."""
    benchmark = REPOSITORY / "benchmarks" / "federation" / "bench_storm.py"
    command = [sys.executable, str(benchmark), "--num-nodes", "4", "--folder", str(tmp_path / "storm")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    complete = "complete: 4 experts, test results of 4 of 4 domains, excluded: none"
    assert complete in done.stdout.splitlines()[-1], done.stdout
    assert "1 nodes killed" in done.stdout
    looked = re.search(r"looked (\d+) times for ([\d.]+) answers on average, and took (\d+)", done.stdout)
    assert looked, done.stdout
    assert float(looked[2]) > 1.2  # 1 if there were a request for each answer
    assert int(looked[3]) >= 16  # describe, train, and evaluations on validation and test
    answers = re.search(r"to nodes: (\{[^}]*\})", done.stdout)
    assert answers, done.stdout
    counts = {int(code): int(number) for code, number in re.findall(r"'(\d+)': (\d+)", answers[1])}
    # 412: a node that is back too early. 499: the killed node ended within a request, of which it has two at a time.
    assert {*counts} <= {200, 412, 499}, done.stdout
    assert counts.get(499, 0) <= 2, done.stdout
