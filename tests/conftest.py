"""Makes every test repeatable: fixed seeds, one thread, no examples drawn anew each run."""

import os
import random

# Threads that wait for each other must not hold the cores that they wait for: with as many tests as
# cores at once, a test of two threads then takes minutes. OpenMP reads it when torch loads it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pytest
import torch
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("repeatable")

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fixed_seeds():
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries under test may draw from it
    torch.manual_seed(0)
