"""Shapes and types are checked in one of the whole runs here, and in what is not a run."""

import contextlib

import pytest
from typecheck import unchecked

CHECKED = "test_measurements_hold_every_depth_and_the_state_of_every_loop"


@pytest.fixture(autouse=True)
def _check_shapes_in_one_run(request):
    # The checks take half of the time, and one run goes through every path.
    others = request.path.name == "test_trainer.py" and request.node.name != CHECKED
    with unchecked() if others else contextlib.nullcontext():
        yield
