"""Shapes and types of every call are checked in one file here, and skipped in the others."""

import jaxtyping
import pytest


@pytest.fixture(autouse=True)
def _check_shapes_in_one_file(request):
    # The checks take more than half of the time, and test_transformer.py goes through every path.
    jaxtyping.config.update("jaxtyping_disable", request.path.name != "test_transformer.py")
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
