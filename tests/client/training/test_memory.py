"""Memory that training frees goes back to the system."""

import subprocess
import sys

import pytest

MEASURED = """
import torch
from fedmerge.client.training.loop import give_back_memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 1e6

parts = [torch.zeros(1000 + number) for number in range(40_000)]  # 160 MB, too small for pages of their own
kept = parts[::1000]
full = resident()
del parts
freed = resident()
give_back_memory()
print(full, freed, resident(), float(sum(part.sum() for part in kept)))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_freed_memory_goes_back_to_the_system() -> None:
    command = [sys.executable, "-c", MEASURED]
    full, freed, after, kept = map(float, subprocess.check_output(command, text=True).split())
    assert full - freed < 60  # kept by the C library, since what is above it is in use
    assert full - after > 120
    assert kept == 0
