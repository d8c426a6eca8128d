"""What a command asks of its process."""

import subprocess
import sys

import pytest

PROGRAM = """
import os, resource, torch
from openmythos.cli.process import {name}
{name}()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
fewest = []
for _ in range(8):  # how many are kept before the first is given again depends on the heap
    before = faults()
    for _ in range(4):
        torch.ones(64 << 20, dtype=torch.uint8)
    fewest.append(faults() - before)
print(min(fewest), os.environ["GOMP_SPINCOUNT"])
"""


def measured(name, environment):
    """Fewest page faults of making four tensors of 64 MB, and the spins of idle threads."""
    program = [sys.executable, "-c", PROGRAM.format(name=name)]
    done = subprocess.run(
        program, env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    faults, spins = done.stdout.split()
    return int(faults), spins


@pytest.mark.skipif(sys.platform != "linux", reason="of GNU's C library")
def test_a_command_keeps_the_memory_of_freed_tensors_unless_the_user_says_otherwise():
    faults, spins = measured("prepare", {})
    assert faults < 4 * 64  # mapped anew, they would be one for each 4 KiB, or each 2 MiB at least
    assert spins == "2000"
    faults, spins = measured("prepare", {"MALLOC_TRIM_THRESHOLD_": "131072", "GOMP_SPINCOUNT": "7"})
    assert faults >= 4 * 32
    assert spins == "7"
