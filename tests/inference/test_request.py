"""What a request may hold, and that nobody needs torch to write one."""

import subprocess
import sys

import jaxtyping
import numpy as np
import pytest

from openmythos.errors import InputError
from openmythos.inference.engine_settings import EngineSettings
from openmythos.inference.request import Request
from openmythos.inference.sampling import Sampling
from openmythos.inference.thinking import Thinking

GOOD = {"token_ids": (1, 2), "max_new_tokens": 3}


@pytest.fixture
def as_called():
    """Without checks of types: callers have none either."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("as_called")
@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"token_ids": ()}, "token_ids holds no token, must hold at least one"),
        ({"token_ids": (1, -2)}, "token_ids holds -2, must hold integers of 0 or more"),
        ({"token_ids": (1, 2.5)}, "token_ids holds 2.5, must hold integers of 0 or more"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1 must be an integer of 0 or more"),
        ({"max_new_tokens": True}, "max_new_tokens=True must be an integer of 0 or more"),
        ({"choices": 0}, "choices=0 must be an integer of 1 or more"),
        ({"priority": 0.5}, "priority=0.5 must be an integer"),
        ({"logprobs": -1}, "logprobs=-1 must be an integer of 0 or more, or None"),
        ({"draft_loops": 0}, "draft_loops=0 must be an integer of 1 or more, or None"),
        ({"draft_loops": 1, "constraint": 1}, "draft_loops must be left out with a constraint"),
        (
            {"draft_loops": 1, "thinking": Thinking(cache_policy="last")},
            "draft_loops must be left out with cache_policy='last'",
        ),
        ({"stop": "STOP"}, "stop='STOP' must be a tuple of strings: write ('STOP',)"),
        ({"stop": ("a", 3)}, "stop holds 3, must hold strings"),
        ({"stop": ("a", "")}, "stop must hold no empty string"),
    ],
)
def test_what_no_engine_could_serve_is_refused(fields, sentence):
    with pytest.raises(InputError) as error:
        Request(**GOOD | fields)
    assert str(error.value).startswith(sentence)


def test_a_request_that_fits_is_taken():
    request = Request(**GOOD, stop=("a", "bc"), choices=2, logprobs=0)
    assert request.token_ids == (1, 2)
    assert request.thinking.halting == "none"


@pytest.mark.usefixtures("as_called")
def test_numbers_of_numpy_are_numbers():
    two = np.int64(2)
    request = Request(
        token_ids=np.array([1, 2]), max_new_tokens=two, choices=two, priority=two, logprobs=two
    )
    fields = (request.max_new_tokens, request.choices, request.priority, request.logprobs)
    assert request.token_ids == (1, 2)
    assert {type(number) for number in (*fields, *request.token_ids)} == {int}
    assert type(Sampling(seed=np.int64(3)).seed) is int
    assert EngineSettings(budget=two).budget == 2


@pytest.mark.parametrize("module", ["request", "pages", "scheduler", "speculation"])
def test_writing_and_scheduling_requests_needs_no_torch(module):
    code = f"import sys, openmythos.inference.{module}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
