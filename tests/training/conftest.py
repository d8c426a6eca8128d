"""Shapes and types are checked in one of the whole runs here, and in what is not a run."""

import contextlib

import pytest
from typecheck import unchecked

CHECKED = "test_measurements_hold_every_depth_and_the_state_of_every_loop"
WITH_RUNS = {f"test_{name}.py" for name in ("trainer", "steps", "stopping", "start", "resuming")}


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "rhyme.txt"
    lines = [f"The {n} mice ran up the clock, and the clock struck {n % 12}." for n in range(150)]
    path.write_text("\n\n".join(lines))
    return path


@pytest.fixture(autouse=True)
def _check_shapes_in_one_run(request):
    # The checks take half of the time, and one run goes through every path.
    others = request.path.name in WITH_RUNS and request.node.name != CHECKED
    with unchecked() if others else contextlib.nullcontext():
        yield
