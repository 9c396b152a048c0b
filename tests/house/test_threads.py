"""How threads wait is set before any of our processes loads torch, and a setting of the user's own stays."""

import os
import re
import subprocess
import sys

import pytest


def shown_spins(code: str, **environment: str) -> int:
    """Return how often a thread looks before it sleeps, as OpenMP itself shows it when torch is loaded."""
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**inherited, "OMP_DISPLAY_ENV": "VERBOSE", **environment},
        check=True,
        capture_output=True,
        text=True,
    )
    (spins,) = re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)
    return int(spins)


@pytest.mark.parametrize(
    "module",
    ["fedmerge.adapter", pytest.param("sim.app.client.app", marks=pytest.mark.long)],
)
def test_threads_that_wait_sleep(module: str) -> None:
    assert shown_spins("import torch") > 0
    assert shown_spins(f"import {module}; import torch") == 0


def test_a_policy_of_the_user_stays() -> None:
    assert shown_spins("import fedmerge; import torch", OMP_WAIT_POLICY="active") > 0
